"""The supported families. tests/families converts a small model of each and runs it in llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mbq_gguf.models import minicpmv, pictures
from mbq_gguf.models.pictures import Picture


@dataclass(frozen=True)
class Family:
    """A family of VLMs. ``architectures`` are class names in config.json; ``gguf`` is llama.cpp's name for the language model.

    If a class has several variants, a slash and what tells them apart follow its name: the model type of tower or language model, a setting
    of the language model that is on, or the version. ``limits`` has features that do not work, or not reliably, with the reason, beyond
    those that the layout excludes.
    """

    name: str
    architectures: tuple[str, ...]
    gguf: str
    picture: Picture
    limits: Mapping[str, str] = field(default_factory=dict)


CLIP = "clip_vision_model"
FAMILIES = (
    Family("Qwen2-VL", ("Qwen2VLForConditionalGeneration",), "qwen2vl", pictures.QWEN),
    Family("Qwen2.5-VL", ("Qwen2_5_VLForConditionalGeneration",), "qwen2vl", pictures.QWEN),
    Family("Qwen3-VL", ("Qwen3VLForConditionalGeneration",), "qwen3vl", pictures.QWEN),
    Family("Qwen3.5", ("Qwen3_5ForConditionalGeneration",), "qwen35", pictures.QWEN),
    Family("Qwen3-VL-MoE", ("Qwen3VLMoeForConditionalGeneration",), "qwen3vlmoe", pictures.QWEN),
    Family("Qwen3.5-MoE", ("Qwen3_5MoeForConditionalGeneration",), "qwen35moe", pictures.QWEN),
    Family("GLM-4.5V", ("Glm4vMoeForConditionalGeneration",), "glm4moe", pictures.GLM),
    Family("Llama 4", ("Llama4ForConditionalGeneration",), "llama4", pictures.LLAMA4),
    Family("SmolVLM", ("SmolVLMForConditionalGeneration",), "llama", pictures.SMOLVLM),
    Family("Idefics3", ("Idefics3ForConditionalGeneration",), "llama", pictures.SMOLVLM),
    Family("InternVL 3 (-hf)", ("InternVLForConditionalGeneration",), "qwen2", pictures.INTERNVL),
    Family("InternVL 2 to 3.5", ("InternVLChatModel",), "qwen2", pictures.INTERNVL),
    Family("InternVL 2 and 2.5 (InternLM2)", ("InternVLChatModel/internlm2",), "llama", pictures.INTERNVL),
    Family("InternVL 2 (Phi-3)", ("InternVLChatModel/phi3",), "llama", pictures.INTERNVL),
    Family("Gemma 3", ("Gemma3ForConditionalGeneration",), "gemma3", pictures.GEMMA3),
    Family("Gemma 4", ("Gemma4ForConditionalGeneration",), "gemma4", pictures.GEMMA4),
    Family("Gemma 4 (experts)", ("Gemma4ForConditionalGeneration/enable_moe_block",), "gemma4", pictures.GEMMA4),
    Family("Gemma 4 (E2B, E4B)", ("Gemma4ForConditionalGeneration/hidden_size_per_layer_input",), "gemma4", pictures.GEMMA4),
    Family("MiniCPM-V 4.6", ("MiniCPMV4_6ForConditionalGeneration",), "qwen35", pictures.MINICPM),
    Family("MiniCPM-V 2.6", (f"{minicpmv.ARCHITECTURE}/2.6",), "qwen2", pictures.RESAMPLED),
    Family("MiniCPM-V 4.5", (f"{minicpmv.ARCHITECTURE}/4.5",), "qwen3", pictures.RESAMPLED),
    Family("Mistral 3", ("Mistral3ForConditionalGeneration",), "mistral3", pictures.PIXTRAL),
    Family("Pixtral", ("LlavaForConditionalGeneration",), "llama", pictures.PIXTRAL),
    Family("LLaVA-1.5", (f"LlavaForConditionalGeneration/{CLIP}",), "llama", pictures.LLAVA),
    Family("LLaVA-NeXT", ("LlavaNextForConditionalGeneration",), "llama", pictures.ANYRES),
    Family("LLaVA-OneVision", ("LlavaOnevisionForConditionalGeneration",), "qwen2", pictures.ANYRES),
    Family("GLM-4.1V", ("Glm4vForConditionalGeneration",), "glm4", pictures.GLM),
    Family("GLM-OCR", ("GlmOcrForConditionalGeneration",), "glm4", pictures.GLM),
    Family("dots.ocr", ("DotsOCRForCausalLM",), "qwen2", pictures.DOTS),
    Family("PaddleOCR-VL", ("PaddleOCRVLForConditionalGeneration",), "paddleocr", pictures.PADDLE),
)

# Language models that cannot process text and pictures in one pass, with the runtime's reason (mtmd_aifs_refusal).
WINDOW = "the model's attention has a sliding window"
RECURRENT = "the model has a recurrent state"
IN_TURNS = {
    "gemma3": WINDOW,
    "gemma4": WINDOW,
    "llama4": WINDOW,
    "qwen35": RECURRENT,
    "qwen35moe": RECURRENT,
}

# Architectures that are refused, with the reason.
NEEDS_CODE = "its checkpoints need Python code from the model directory"
CODE_TOWER = "its vision tower is Python code in the model directory"
NO_RUNTIME = "llama.cpp does not support it"
REFUSED = {
    "QWenLMHeadModel": f"{CODE_TOWER}, and llama.cpp converts only the language model of Qwen-VL",
    "ChatGLMModel": f"{CODE_TOWER}, and llama.cpp converts only the language model of GLM-4V",
    "ChatGLMForConditionalGeneration": f"{CODE_TOWER}, and llama.cpp converts only the language model of GLM-4V",
    "CogVLMForCausalLM": f"{CODE_TOWER}, llama.cpp's conversion drops the matrices that only picture tokens pass through, no layout here "
    "describes them, and llama.cpp's runtime does not support CogVLM2's grouped heads and convolution",
    "MiniCPMV4_7ForConditionalGeneration": NO_RUNTIME,
    minicpmv.ARCHITECTURE: f"{NEEDS_CODE}; only versions {' and '.join(minicpmv.TEXTS)} are supported without it",
    "InternVLChatModel/internlm3": "transformers has no class for its language model, InternLM3",
    "Qwen2_5OmniModel": "its language model is nested among parts for speech",
    "MolmoForCausalLM": NO_RUNTIME,
    "VipLlavaForConditionalGeneration": "llama.cpp's conversion does not support its projector, which joins features of several layers",
    "MllamaForConditionalGeneration": NO_RUNTIME,
    "PaliGemmaForConditionalGeneration": NO_RUNTIME,
}

# Those of them whose language model can be converted alone, without a vision file.
LANGUAGE_ALONE = (
    "VipLlavaForConditionalGeneration",
    "QWenLMHeadModel",
    "ChatGLMModel",
    "ChatGLMForConditionalGeneration",
    "CogVLMForCausalLM",
)


def kind(architecture: str, config: Mapping[str, Any]) -> str:
    """The name in these tables of a model with this architecture and config.json."""
    parts = (config.get("text_config") or config.get("llm_config"), config.get("vision_config"))
    text, vision = (part if isinstance(part, dict) else {} for part in parts)
    suffixes = (vision.get("model_type"), text.get("model_type"), *(name for name, value in text.items() if value), config.get("version"))
    names = (f"{architecture}/{suffix}" for suffix in suffixes)
    return next((name for name in names if family_of(name) or name in REFUSED), architecture)


def family_of(architecture: str) -> Family | None:
    """The family of an architecture, or None."""
    return next((family for family in FAMILIES if architecture in family.architectures), None)
