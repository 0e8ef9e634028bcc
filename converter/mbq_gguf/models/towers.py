"""The layout of each family's vision tower, and the lookup of a model's tower."""

from __future__ import annotations

from dataclasses import replace

from mbq_gguf.models.loaded import LoadedModel
from mbq_gguf.models.tower import Exit, Tower, TowerLayout, TowerSite


def _block(attention: tuple[str, ...], out: str, feed: tuple[str, ...], down: str, norms: tuple[str, str]) -> tuple[TowerSite, ...]:
    return TowerSite(norms[0], attention), TowerSite(None, (out,)), TowerSite(norms[1], feed), TowerSite(None, (down,))


NORMS = ("norm1", "norm2")
GATED = ("mlp.gate_proj", "mlp.up_proj")

QWEN2 = TowerLayout(
    "visual",
    "blocks",
    _block(("attn.qkv",), "attn.proj", ("mlp.fc1",), "mlp.fc2", NORMS),
    values="attn.qkv",
    entries=("patch_embed.proj",),
    exits=(Exit(r"visual\.merger", "ln_q", ("mlp.0",), (("mlp.2",),)),),
)
QWEN2_5 = replace(QWEN2, sites=_block(("attn.qkv",), "attn.proj", GATED, "mlp.down_proj", NORMS))
QWEN3 = replace(
    QWEN2,
    sites=_block(("attn.qkv",), "attn.proj", ("mlp.linear_fc1",), "mlp.linear_fc2", NORMS),
    entries=("patch_embed.proj", "pos_embed"),
    exits=(Exit(r"visual\.(?:merger|deepstack_merger_list\.\d+)", "norm", ("linear_fc1",), (("linear_fc2",),)),),
)
GLM_OCR = replace(
    QWEN2_5,
    exits=(
        Exit("visual", "post_layernorm", ("downsample",)),
        Exit(r"visual\.merger", None, ("proj",), (("gate_proj", "up_proj"), ("down_proj",))),
    ),
)
GLM = replace(GLM_OCR, unturned="there is a norm with a gain between its patches and its blocks (post_conv_layernorm)")
DOTS = replace(
    QWEN2,
    path="vision_tower",
    sites=_block(("attn.qkv",), "attn.proj", ("mlp.fc1", "mlp.fc3"), "mlp.fc2", NORMS),
    entries=("patch_embed.patchifier.proj",),
    exits=(),
    unturned="there are norms with gains between its patches and its blocks, and two in a row at its end",
)

SIGLIP = TowerLayout(
    "vision_model",
    "encoder.layers",
    _block(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.out_proj",
        ("mlp.fc1",),
        "mlp.fc2",
        ("layer_norm1", "layer_norm2"),
    ),
    values="self_attn.v_proj",
    entries=("embeddings.patch_embedding", "embeddings.position_embedding"),
    exits=(Exit("", "vision_model.post_layernorm", ("connector.modality_projection.proj",)),),
)
PADDLE = replace(
    SIGLIP,
    exits=(),
    unturned="no linear separates its last norm from the projector's norm",
)
GEMMA3 = replace(
    SIGLIP,
    path="vision_tower",
    exits=(),
    unturned="only pooling, no linear, separates its last norm from the projector's norm",
)
GEMMA4 = TowerLayout(
    "vision_tower",
    "encoder.layers",
    _block(
        ("self_attn.q_proj.linear", "self_attn.k_proj.linear", "self_attn.v_proj.linear"),
        "self_attn.o_proj.linear",
        ("mlp.gate_proj.linear", "mlp.up_proj.linear"),
        "mlp.down_proj.linear",
        ("input_layernorm", "pre_feedforward_layernorm"),
    ),
    values="self_attn.v_proj.linear",
    entries=("patch_embedder.input_proj",),
    exits=(),
    unturned="its blocks have norms after their branches",
)
MINICPM = replace(SIGLIP, path="vision_tower", exits=(), unturned="another kind of layer merges its patches between two blocks")
RESAMPLED = replace(
    SIGLIP,
    path="vision_tower",
    exits=(
        Exit(
            "",
            "vision_tower.post_layernorm",
            ("resampler.kv_proj",),
            tuple((f"resampler.{name}",) for name in ("attn.in_proj_q", "attn.in_proj_k", "attn.in_proj_v", "attn.out_proj", "proj")),
        ),
    ),
)
CLIP = replace(
    SIGLIP,
    path="vision_tower",
    entries=("embeddings.patch_embedding", "embeddings.position_embedding", "embeddings.class_embedding"),
    exits=(Exit("multi_modal_projector", None, ("linear_1",), (("linear_2",),)),),
    unturned="there is a norm with a gain between its patches and its blocks (pre_layrnorm)",
)
ONEVISION = replace(
    SIGLIP,
    path="vision_tower",
    exits=(Exit("multi_modal_projector", None, ("linear_1",), (("linear_2",),), bare=True),),
    cut=True,
)
INTERNVL = TowerLayout(
    "vision_tower",
    "encoder.layer",
    _block(
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attention.projection_layer",
        ("mlp.fc1",),
        "mlp.fc2",
        ("layernorm_before", "layernorm_after"),
    ),
    values="attention.v_proj",
    entries=("embeddings.patch_embeddings.projection", "embeddings.cls_token", "embeddings.position_embeddings"),
    exits=(Exit("multi_modal_projector", "layer_norm", ("linear_1",), (("linear_2",),)),),
    scales=(("lambda_1", "attention.projection_layer"), ("lambda_2", "mlp.fc2")),
    plain="layernorm",
)
PIXTRAL = TowerLayout(
    "vision_tower",
    "transformer.layers",
    _block(
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attention.o_proj",
        ("feed_forward.gate_proj", "feed_forward.up_proj"),
        "feed_forward.down_proj",
        ("attention_norm", "ffn_norm"),
    ),
    values="attention.v_proj",
    entries=("patch_conv",),
    exits=(Exit("multi_modal_projector", None, ("linear_1",), (("linear_2",),)),),
    unturned="there is a norm with a gain between its patches and its blocks (ln_pre)",
)
LLAMA4 = TowerLayout(
    "vision_model",
    "model.layers",
    _block(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        ("mlp.fc1",),
        "mlp.fc2",
        ("input_layernorm", "post_attention_layernorm"),
    ),
    values="self_attn.v_proj",
    entries=("patch_embedding.linear", "class_embedding", "positional_embedding_vlm"),
    exits=(
        Exit(
            "",
            "vision_model.layernorm_post",
            ("vision_model.vision_adapter.mlp.fc1",),
            (("vision_model.vision_adapter.mlp.fc2",), ("multi_modal_projector.linear_1",)),
        ),
    ),
    unturned="there is a norm with a gain between its patches and its blocks (layernorm_pre)",
)
MISTRAL3 = replace(PIXTRAL, exits=(Exit(r"multi_modal_projector\.patch_merger", None, ("merging_layer",)), *PIXTRAL.exits))

TOWERS = {
    "Qwen2VLForConditionalGeneration": QWEN2,
    "Qwen2_5_VLForConditionalGeneration": QWEN2_5,
    "Qwen3VLForConditionalGeneration": QWEN3,
    "Qwen3VLMoeForConditionalGeneration": QWEN3,
    "Qwen3_5ForConditionalGeneration": QWEN3,
    "Qwen3_5MoeForConditionalGeneration": QWEN3,
    "Llama4ForConditionalGeneration": LLAMA4,
    "SmolVLMForConditionalGeneration": SIGLIP,
    "Idefics3ForConditionalGeneration": SIGLIP,
    "InternVLForConditionalGeneration": INTERNVL,
    "InternVLChatModel": INTERNVL,
    "InternVLChatModel/internlm2": INTERNVL,
    "InternVLChatModel/phi3": INTERNVL,
    "Gemma3ForConditionalGeneration": GEMMA3,
    "Gemma4ForConditionalGeneration": GEMMA4,
    "Gemma4ForConditionalGeneration/enable_moe_block": GEMMA4,
    "Gemma4ForConditionalGeneration/hidden_size_per_layer_input": GEMMA4,
    "MiniCPMV4_6ForConditionalGeneration": MINICPM,
    "MiniCPMV/2.6": RESAMPLED,
    "MiniCPMV/4.5": RESAMPLED,
    "Mistral3ForConditionalGeneration": MISTRAL3,
    "LlavaForConditionalGeneration": PIXTRAL,
    "LlavaForConditionalGeneration/clip_vision_model": CLIP,
    "LlavaNextForConditionalGeneration": replace(CLIP, cut=True),
    "LlavaOnevisionForConditionalGeneration": ONEVISION,
    "Glm4vForConditionalGeneration": GLM,
    "Glm4vMoeForConditionalGeneration": GLM,
    "GlmOcrForConditionalGeneration": GLM_OCR,
    "DotsOCRForCausalLM": DOTS,
    "PaddleOCRVLForConditionalGeneration": PADDLE,
}


def find_tower(loaded: LoadedModel) -> Tower | None:
    """The vision tower of ``loaded``, or None if its family is not in :data:`TOWERS`."""
    layout = TOWERS.get(loaded.architecture)
    if layout is None:
        return None
    for name, holder in loaded.model.named_modules():
        if hasattr(holder, layout.path) and not name.startswith("language_model"):
            return Tower(layout, holder)
    return None
