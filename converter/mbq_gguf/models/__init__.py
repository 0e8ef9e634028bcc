"""VLM families: where decoder layers, their linears and vision tokens are, and how a question about an image becomes inputs."""

from mbq_gguf.models.load import load
from mbq_gguf.models.loaded import LoadedModel

__all__ = ["LoadedModel", "load"]
