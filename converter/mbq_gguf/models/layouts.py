"""The layout of each family's decoder layers. This is the only place that knows them."""

from __future__ import annotations

from dataclasses import replace

from mbq_gguf.models.layout import Branch, Fused, Layout, Site

ATTENTION = Branch("attention", "self_attn", "self_attn.o_proj", pair=True)
MLP = Branch("mlp", "mlp", "mlp.down_proj")


def _gated(before_attention: str, before_mlp: str) -> tuple[Site, ...]:
    """x + o(attention(q, k, v of norm(x))), then x + down(act(gate(y)) * up(y)) with y = norm(x)."""
    return (
        Site("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), before_attention, "self_attn", "attention"),
        Site("o", ("self_attn.o_proj",), "self_attn.v_proj", "self_attn.o_proj", "attention"),
        Site("gate_up", ("mlp.gate_proj", "mlp.up_proj"), before_mlp, "mlp", "mlp"),
        Site("down", ("mlp.down_proj",), "mlp.up_proj", "mlp.down_proj", "mlp"),
    )


# Llama's layer, which most families have.
STANDARD = Layout(
    _gated("input_layernorm", "post_attention_layernorm"), (ATTENTION, MLP), norms=("input_layernorm", "post_attention_layernorm")
)
# Gemma 3: a norm before and a norm after each branch, each multiplying by 1 + weight (see norm_offset).
SANDWICH = Layout(
    _gated("input_layernorm", "pre_feedforward_layernorm"),
    (ATTENTION, MLP),
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    norms_after=("post_attention_layernorm", "post_feedforward_layernorm"),
)

# Gemma 4: full-attention layers may use keys as values, and values pass a per-head norm, so factors cannot be folded into v_proj.
GEMMA4 = replace(SANDWICH, sites=(SANDWICH.sites[0], replace(SANDWICH.sites[1], absorber=None), *SANDWICH.sites[2:]))
KEYS_AS_VALUES = replace(GEMMA4, sites=(replace(GEMMA4.sites[0], readers=("self_attn.q_proj", "self_attn.k_proj")), *GEMMA4.sites[1:]))
# The last layers of its small models reuse the keys and values of other layers.
QUERIES = replace(GEMMA4, sites=(replace(GEMMA4.sites[0], readers=("self_attn.q_proj",)), *GEMMA4.sites[1:]))

# GLM-4.1V: norms in the same places, without offset; gate and up in one linear.
GLM = Layout(
    _gated("input_layernorm", "post_attention_layernorm"),
    (ATTENTION, MLP),
    norms=("input_layernorm", "post_attention_layernorm"),
    norms_after=("post_self_attn_layernorm", "post_mlp_layernorm"),
    fused=(Fused("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),),
)
# Qwen3.5: three of four layers have a gated delta net instead of attention. Two more matrices of it, with one row per head, read the norm
# and are not quantised. Hence factors cannot be folded into the norm, and the stream cannot be rotated.
DELTA_NET = Branch("attention", "linear_attn", "linear_attn.out_proj")
DELTA = replace(
    STANDARD,
    sites=(
        Site("delta", ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"), None, "linear_attn", "attention"),
        Site("delta_out", ("linear_attn.out_proj",), None, "linear_attn.out_proj", "attention", "linear_attn.head_v_dim"),
        *STANDARD.sites[2:],
    ),
    branches=(DELTA_NET, MLP),
    alone=True,
)
HYBRID = replace(
    STANDARD,
    sites=(*STANDARD.sites[:2], *DELTA.sites),
    branches=(ATTENTION, DELTA_NET, MLP),
    unturned="its gated delta nets read the residual stream through matrices that are not quantised",
    variants=(STANDARD, DELTA),
)

# Mixture of experts; ``shared`` is an MLP that all tokens pass through. The router reads the norm too, so factors cannot be folded into it,
# and the stream cannot be rotated.
MOE = Branch("mlp", "mlp", "mlp")
ROUTED = "its routers read the residual stream, and are not quantised"


def with_moe(layout: Layout, shared: str | None = None) -> Layout:
    """``layout`` with a mixture of experts instead of the MLP."""
    passed = (
        ()
        if shared is None
        else (
            Site("shared_gate_up", (f"{shared}.gate_proj", f"{shared}.up_proj"), None, shared, "mlp"),
            Site("shared_down", (f"{shared}.down_proj",), None, f"{shared}.down_proj", "mlp"),
        )
    )
    kept = tuple(site for site in layout.sites if site.branch != "mlp")
    branches = tuple(branch for branch in layout.branches if branch.name != "mlp")
    return replace(layout, sites=(*kept, *passed), branches=(*branches, MOE), unturned=ROUTED, experts="mlp.experts")


def renamed(layout: Layout, old: str, new: str) -> Layout:
    """``layout`` with the branch module ``old`` renamed to ``new``."""

    def name(given: str) -> str:
        return new + given.removeprefix(old) if given == old or given.startswith(f"{old}.") else given

    def site(given: Site) -> Site:
        absorber = given.absorber and name(given.absorber)
        return replace(given, readers=tuple(map(name, given.readers)), absorber=absorber, inspected=name(given.inspected))

    branches = tuple(replace(branch, module=name(branch.module), writer=name(branch.writer)) for branch in layout.branches)
    return replace(layout, sites=tuple(map(site, layout.sites)), branches=branches, experts=layout.experts and name(layout.experts))


def union(*variants: Layout) -> Layout:
    """The layout of a decoder with several kinds of layers: the sites and branches of all of them."""
    sites = dict.fromkeys(site for variant in variants for site in variant.sites)
    branches = dict.fromkeys(branch for variant in variants for branch in variant.branches)
    return replace(variants[-1], sites=tuple(sites), branches=tuple(branches), experts=None, variants=variants)


def with_parallel_experts(layout: Layout) -> Layout:
    """``layout`` with experts in parallel to its MLP, both with their own norms (Gemma 4)."""
    return replace(
        layout,
        norms=(*layout.norms, "pre_feedforward_layernorm_2"),
        norms_after=(*layout.norms_after, "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"),
        experts="experts",
    )


def with_per_layer_inputs(layout: Layout) -> Layout:
    """``layout`` with a third branch, whose gate reads the residual stream itself and multiplies the layer's own input for each token
    (Gemma 4's small models)."""
    branch = Branch("inputs", "per_layer_projection", "per_layer_projection")
    sites = (
        Site("inputs_gate", ("per_layer_input_gate",), None, "per_layer_input_gate", branch.name),
        Site("inputs", (branch.writer,), None, branch.writer, branch.name),
    )
    return replace(
        layout,
        sites=(*layout.sites, *sites),
        branches=(*layout.branches, branch),
        norms_after=(*layout.norms_after, "post_per_layer_input_norm"),
    )


# Llama 4: experts in every layer or every second one. Only the names of its modules differ.
LLAMA4 = union(*(renamed(layout, "mlp", "feed_forward") for layout in (STANDARD, with_moe(STANDARD, "mlp.shared_expert"))))

SMALL_GEMMA4 = union(*(with_per_layer_inputs(layout) for layout in (GEMMA4, KEYS_AS_VALUES, QUERIES)))

# Matches nothing: for a language model without its vision tower.
NO_PICTURES = r"(?!)"
LAYOUTS = {
    "Qwen2VLForConditionalGeneration": replace(STANDARD, projector=r"visual\.merger\.mlp\.2"),
    "Qwen2_5_VLForConditionalGeneration": replace(STANDARD, projector=r"visual\.merger\.mlp\.2"),
    "Qwen3VLForConditionalGeneration": replace(STANDARD, projector=r"visual\.(?:merger|deepstack_merger_list\.\d+)\.linear_fc2"),
    "SmolVLMForConditionalGeneration": replace(STANDARD, projector=r"connector\.modality_projection\.proj"),
    "Idefics3ForConditionalGeneration": replace(STANDARD, projector=r"connector\.modality_projection\.proj"),
    "InternVLForConditionalGeneration": replace(STANDARD, projector=r"multi_modal_projector\.linear_2"),
    "InternVLChatModel": replace(STANDARD, projector=r"multi_modal_projector\.linear_2"),
    "InternVLChatModel/internlm2": replace(STANDARD, projector=r"multi_modal_projector\.linear_2"),
    "InternVLChatModel/phi3": replace(STANDARD, projector=r"multi_modal_projector\.linear_2"),
    "Qwen3_5ForConditionalGeneration": HYBRID,
    "Qwen3VLMoeForConditionalGeneration": with_moe(STANDARD),
    "Qwen3_5MoeForConditionalGeneration": union(with_moe(STANDARD, "mlp.shared_expert"), with_moe(DELTA, "mlp.shared_expert")),
    "Glm4vMoeForConditionalGeneration": union(STANDARD, with_moe(STANDARD, "mlp.shared_experts")),
    "Gemma4ForConditionalGeneration": union(GEMMA4, KEYS_AS_VALUES),
    "Gemma4ForConditionalGeneration/enable_moe_block": union(with_parallel_experts(GEMMA4), with_parallel_experts(KEYS_AS_VALUES)),
    "Gemma4ForConditionalGeneration/hidden_size_per_layer_input": SMALL_GEMMA4,
    "Llama4ForConditionalGeneration": LLAMA4,
    "MiniCPMV4_6ForConditionalGeneration": HYBRID,
    "MiniCPMV/2.6": replace(STANDARD, projector=r"resampler\.proj"),
    "MiniCPMV/4.5": replace(STANDARD, projector=r"resampler\.proj"),
    "Gemma3ForConditionalGeneration": SANDWICH,
    "Mistral3ForConditionalGeneration": replace(STANDARD, projector=r"multi_modal_projector\.linear_2", embeds=True),
    "LlavaForConditionalGeneration": replace(STANDARD, projector=r"multi_modal_projector\.linear_2", embeds=True),
    "LlavaForConditionalGeneration/clip_vision_model": replace(STANDARD, projector=r"multi_modal_projector\.linear_2"),
    "LlavaNextForConditionalGeneration": replace(STANDARD, projector=r"multi_modal_projector\.linear_2", newline="image_newline"),
    "LlavaOnevisionForConditionalGeneration": replace(STANDARD, projector=r"multi_modal_projector\.linear_2", newline="image_newline"),
    "Glm4vForConditionalGeneration": GLM,
    "GlmOcrForConditionalGeneration": GLM,
    "DotsOCRForCausalLM": replace(STANDARD, projector=r"vision_tower\.merger\.mlp\.2"),
    "PaddleOCRVLForConditionalGeneration": replace(STANDARD, projector=r"projector\.linear_2"),
    "VipLlavaForConditionalGeneration": replace(STANDARD, projector=NO_PICTURES),
    "QWenLMHeadModel": replace(STANDARD, projector=NO_PICTURES),
    "ChatGLMModel": replace(STANDARD, fused=GLM.fused, projector=NO_PICTURES),
    "ChatGLMForConditionalGeneration": replace(STANDARD, fused=GLM.fused, projector=NO_PICTURES),
    "CogVLMForCausalLM": replace(STANDARD, projector=NO_PICTURES),
}
ROTATABLE = tuple(name for name, layout in LAYOUTS.items() if layout.no_rotation() is None)


def layout_of(architecture: str) -> Layout:
    """The layout of an architecture's decoder layers; the standard one for an unknown name."""
    return LAYOUTS.get(architecture, STANDARD)
