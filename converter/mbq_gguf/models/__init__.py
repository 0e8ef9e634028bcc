"""VLM families: where the decoder layers, their linears and the vision tokens are, and how a question about an image becomes model inputs."""

from mbq_gguf.models.load import load
from mbq_gguf.models.loaded import LoadedModel

__all__ = ["LoadedModel", "load"]
