"""The layout of each family's decoder layers, and of the layers that it is made from; the only place that knows them."""

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
# Gemma 3's: a norm before and one after each branch, every one of them times 1 + weight (see norm_offset).
SANDWICH = Layout(
    _gated("input_layernorm", "pre_feedforward_layernorm"),
    (ATTENTION, MLP),
    norms=("input_layernorm", "pre_feedforward_layernorm"),
    norms_after=("post_attention_layernorm", "post_feedforward_layernorm"),
)

# Gemma 4's: in full layers keys may be values too, and values pass a norm of their heads, so that no factors fold into what makes them.
GEMMA4 = replace(SANDWICH, sites=(SANDWICH.sites[0], replace(SANDWICH.sites[1], absorber=None), *SANDWICH.sites[2:]))
KEYS_AS_VALUES = replace(GEMMA4, sites=(replace(GEMMA4.sites[0], readers=("self_attn.q_proj", "self_attn.k_proj")), *GEMMA4.sites[1:]))
# Its small models' last layers take the keys and values of others.
QUERIES = replace(GEMMA4, sites=(replace(GEMMA4.sites[0], readers=("self_attn.q_proj",)), *GEMMA4.sites[1:]))

# GLM-4.1V's: the same places, plain norms, gate and up in one linear.
GLM = Layout(
    _gated("input_layernorm", "post_attention_layernorm"),
    (ATTENTION, MLP),
    norms=("input_layernorm", "post_attention_layernorm"),
    norms_after=("post_self_attn_layernorm", "post_mlp_layernorm"),
    fused=(Fused("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),),
)
# Qwen3.5's: three of four layers have a gated delta net for attention. It reads the norm by two more matrices, of one row per head, which
# stay as they are; so no factors fold into the norm, and no rotation passes.
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

# Experts, and where all tokens pass some of them (``shared``) these as an MLP of their own, between the branch's other linears. A router
# reads the norm too, so no factors fold into it, and no rotation passes.
MOE = Branch("mlp", "mlp", "mlp")
ROUTED = "its routers read the residual stream, and are not quantised"


def routed(layout: Layout, shared: str | None = None) -> Layout:
    """``layout`` with experts for an MLP."""
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
    """``layout`` where ``old``, the module of a branch, is called ``new``."""

    def name(given: str) -> str:
        return new + given.removeprefix(old) if given == old or given.startswith(f"{old}.") else given

    def site(given: Site) -> Site:
        absorber = given.absorber and name(given.absorber)
        return replace(given, readers=tuple(map(name, given.readers)), absorber=absorber, inspected=name(given.inspected))

    branches = tuple(replace(branch, module=name(branch.module), writer=name(branch.writer)) for branch in layout.branches)
    return replace(layout, sites=tuple(map(site, layout.sites)), branches=branches, experts=layout.experts and name(layout.experts))


def either(*variants: Layout) -> Layout:
    """Layers of several kinds: the sites and branches of all."""
    sites = dict.fromkeys(site for variant in variants for site in variant.sites)
    branches = dict.fromkeys(branch for variant in variants for branch in variant.branches)
    return replace(variants[-1], sites=tuple(sites), branches=tuple(branches), experts=None, variants=variants)


def beside(layout: Layout) -> Layout:
    """``layout`` with experts beside its MLP, each with norms of its own (Gemma 4's)."""
    return replace(
        layout,
        norms=(*layout.norms, "pre_feedforward_layernorm_2"),
        norms_after=(*layout.norms_after, "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"),
        experts="experts",
    )


def with_inputs(layout: Layout) -> Layout:
    """``layout`` with a third branch, whose gate reads the residual stream itself, and which is multiplied by what the layer is given of
    each token (Gemma 4's small models)."""
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


# Llama 4's: experts in every layer or every second one. Its sites are called as others' are, their modules are not.
LLAMA4 = either(*(renamed(layout, "mlp", "feed_forward") for layout in (STANDARD, routed(STANDARD, "mlp.shared_expert"))))

SMALL_GEMMA4 = either(*(with_inputs(layout) for layout in (GEMMA4, KEYS_AS_VALUES, QUERIES)))

# Of a language model without its tower.
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
    "Qwen3VLMoeForConditionalGeneration": routed(STANDARD),
    "Qwen3_5MoeForConditionalGeneration": either(routed(STANDARD, "mlp.shared_expert"), routed(DELTA, "mlp.shared_expert")),
    "Glm4vMoeForConditionalGeneration": either(STANDARD, routed(STANDARD, "mlp.shared_experts")),
    "Gemma4ForConditionalGeneration": either(GEMMA4, KEYS_AS_VALUES),
    "Gemma4ForConditionalGeneration/enable_moe_block": either(beside(GEMMA4), beside(KEYS_AS_VALUES)),
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
    """The layout of an architecture's decoder layers; the standard one for a name that is not in the table."""
    return LAYOUTS.get(architecture, STANDARD)
