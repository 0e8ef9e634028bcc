"""The families that are proved here, each in one line: tests/families converts a small model of every one and runs it in llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mbq_gguf.models import pictures
from mbq_gguf.models.pictures import Picture


@dataclass(frozen=True)
class Family:
    """VLMs of one kind: ``architectures`` are the class names in config.json, ``gguf`` what llama.cpp calls the language model.

    ``limits`` says of something why it cannot be done, or not reliably, beyond what the layout tells.
    """

    name: str
    architectures: tuple[str, ...]
    gguf: str
    picture: Picture
    limits: Mapping[str, str] = field(default_factory=dict)


FAMILIES = (
    Family("Qwen2-VL", ("Qwen2VLForConditionalGeneration",), "qwen2vl", pictures.QWEN),
    Family("Qwen2.5-VL", ("Qwen2_5_VLForConditionalGeneration",), "qwen2vl", pictures.QWEN),
    Family("Qwen3-VL", ("Qwen3VLForConditionalGeneration",), "qwen3vl", pictures.QWEN),
    Family("Qwen3.5", ("Qwen3_5ForConditionalGeneration",), "qwen35", pictures.QWEN),
    Family("Qwen3-VL-MoE", ("Qwen3VLMoeForConditionalGeneration",), "qwen3vlmoe", pictures.QWEN),
    Family("Qwen3.5-MoE", ("Qwen3_5MoeForConditionalGeneration",), "qwen35moe", pictures.QWEN),
    Family("GLM-4.5V", ("Glm4vMoeForConditionalGeneration",), "glm4moe", pictures.GLM),
    Family("SmolVLM", ("SmolVLMForConditionalGeneration",), "llama", pictures.SMOLVLM),
    Family("Idefics3", ("Idefics3ForConditionalGeneration",), "llama", pictures.SMOLVLM),
    Family("InternVL 3 (-hf)", ("InternVLForConditionalGeneration",), "qwen2", pictures.INTERNVL),
    Family("Gemma 3", ("Gemma3ForConditionalGeneration",), "gemma3", pictures.GEMMA3),
    Family("Mistral 3", ("Mistral3ForConditionalGeneration",), "mistral3", pictures.PIXTRAL),
    Family("Pixtral", ("LlavaForConditionalGeneration",), "llama", pictures.PIXTRAL),
    Family("GLM-4.1V", ("Glm4vForConditionalGeneration",), "glm4", pictures.GLM),
    Family("GLM-OCR", ("GlmOcrForConditionalGeneration",), "glm4", pictures.GLM),
)

# Language models whose text and pictures cannot go in one pass, and why: what the runtime says (mtmd_aifs_refusal).
RECURRENT = "the model has a recurrent state"
IN_TURNS = {
    "gemma3": "the model's attention has a sliding window",
    "qwen35": RECURRENT,
    "qwen35moe": RECURRENT,
}

# Families that people will ask for, by architecture or by the model type of the vision tower, and why they are refused.
NEEDS_CODE = "its checkpoints need Python code of their directory"
NO_RUNTIME = "llama.cpp does not know it"
REFUSED = {
    "Gemma4ForConditionalGeneration": "its layers take inputs of their own or keys for values, which no layout describes",
    "Llama4ForConditionalGeneration": "each of its experts takes all tokens, weighed by the router beforehand, which no layout describes",
    "LlavaNextForConditionalGeneration": "llama.cpp's conversion has no place for its tower",
    "LlavaOnevisionForConditionalGeneration": "llama.cpp's conversion has no place for its tower, nor its runtime for its tiles",
    "clip_vision_model": "llama.cpp's conversion has no place for its CLIP tower",
    "QWenLMHeadModel": f"{NEEDS_CODE}, and llama.cpp converts the language model of Qwen-VL alone",
    "ChatGLMModel": f"{NEEDS_CODE}, and llama.cpp converts the language model of GLM-4V alone",
    "CogVLMForCausalLM": NEEDS_CODE,
    "DotsOCRForCausalLM": NEEDS_CODE,
    "MiniCPMV": f"{NEEDS_CODE}, and llama.cpp converts it by scripts of another kind",
    "InternVLChatModel": f"{NEEDS_CODE}: the same models are published for transformers itself, with -hf in their name",
    "Qwen2_5OmniModel": "its language model lies among parts for speech",
    "MolmoForCausalLM": NO_RUNTIME,
    "MllamaForConditionalGeneration": NO_RUNTIME,
    "PaliGemmaForConditionalGeneration": NO_RUNTIME,
}


def refusal(architecture: str, tower: str | None) -> str | None:
    """Why models of an architecture, with a vision tower of a model type, are refused, or None."""
    return REFUSED.get(architecture) or REFUSED.get(tower or "")


def family_of(architecture: str) -> Family | None:
    """The family of an architecture, or None."""
    return next((family for family in FAMILIES if architecture in family.architectures), None)
