"""Where the matrices of a decoder layer are and what reads what: one table a family, and the only place that knows it.

A *site* is one activation that matrices read. It is the unit of Hessians, channel factors and token weights; what needs something for
each activation (a static scale, say) adds it here.

A *reader* of a site is a matrix that multiplies it: a linear, or rows of a fused one (:class:`Fused`). Readers have names that they would
have as linears of their own, so that sites, absorbers and everything that calibrates and rounds are the same for both kinds. Experts are
linears already (models/experts.py); a layout tells where they are, and has sites for as many as a layer has (:meth:`Layout.of`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import TypeVar

import torch
from torch import nn

from mbq_gguf.models.experts import Experts

Value = TypeVar("Value")


@dataclass(frozen=True)
class Site:
    """An activation and its ``readers``, the matrices that multiply it, by their names in the layer.

    ``absorber`` is the norm or linear before it that can take the inverse of channel factors (None: factors cannot be folded here);
    ``inspected`` is the module whose output tells what an error in the readers does; ``branch`` is the name of the site's branch.
    ``heads`` is where the layer keeps the channels of a head, where llama.cpp moves the readers' columns by heads (None: it does not).
    ``expert`` is the number of the expert that the readers belong to (None: all tokens pass them); inputs of sites of one ``stage`` do not
    depend on one another's readers.
    """

    name: str
    readers: tuple[str, ...]
    absorber: str | None
    inspected: str
    branch: str
    heads: str | None = None
    expert: int | None = None
    stage: str = ""


@dataclass(frozen=True)
class Fused:
    """A linear whose output is cut into ``parts``, each a reader: the first part's rows come first, and so on.

    The first part has as many rows as the linear ``first`` has columns (queries, as many as o_proj takes), the others share the rest
    alike; with ``first`` None all parts are alike (gate and up).
    """

    linear: str
    parts: tuple[str, ...]
    first: str | None = None

    def rows(self, module: nn.Module) -> dict[str, slice]:
        """Where each part lies in the linear of the layer ``module``. ValueError where its rows cannot be shared out so."""
        whole = _linear(module, self.linear).out_features
        sizes = [_linear(module, self.first).in_features] if self.first else []
        others = len(self.parts) - len(sizes)
        each, left = divmod(whole - sum(sizes), others)
        if left or each <= 0:
            raise ValueError(f"{whole} rows are not {' + '.join(map(str, (*sizes, f'{others} alike')))}")
        ends = list(accumulate((*sizes, *[each] * others)))
        return {part: slice(start, end) for part, start, end in zip(self.parts, (0, *ends), ends, strict=False)}


@dataclass(frozen=True)
class Branch:
    """A part of a layer that ends by writing into the residual stream: ``module`` holds it, ``writer`` is its last linear, or the module
    itself where many linears write.

    ``pair``: the module gives a second value beside its output (attention's weights), which no layer reads.
    """

    name: str
    module: str
    writer: str
    pair: bool = False


@dataclass(frozen=True)
class Layout:
    """A kind of decoder layer. Sites are in the order in which they are computed.

    ``norms`` stand before a branch; ``norms_after`` between a branch and the residual stream. ``projector`` is the linears that write
    image features into the residual stream, the end of their names in the model as a regular expression (None where it is not known).
    ``unturned`` says why a rotation cannot pass although norms and projector are known. ``alone``: tokens meet elsewhere than in attention,
    so samples cannot be run side by side. ``variants`` are the layouts of single layers where these differ (:meth:`of`): the layout itself
    then has the sites of all.
    ``embeds``: rows of the embeddings are among them, in the vision file (a token between rows of a picture); ``newline`` is a parameter
    of the model that stands there instead. ``fused`` tells of readers that are no linears of their own. ``experts`` is where a layer's
    experts are, of which sites know once a layer is at hand.
    """

    sites: tuple[Site, ...]
    branches: tuple[Branch, ...]
    norms: tuple[str, ...]
    norms_after: tuple[str, ...] = ()
    projector: str | None = None
    embeds: bool = False
    newline: str | None = None
    unturned: str | None = None
    alone: bool = False
    variants: tuple[Layout, ...] = ()
    fused: tuple[Fused, ...] = ()
    experts: str | None = None

    def of(self, module: nn.Module) -> Layout:
        """The layout of the layer ``module``: itself, or the variant that it is, with sites for each of its experts."""
        found = next((variant for variant in self.variants if variant.fault(module) is None), self)
        return with_experts(found, len(experts)) if isinstance(experts := _part(module, found.experts), Experts) else found

    @property
    def stacks(self) -> tuple[str, ...]:
        """Where layers may have experts."""
        return tuple(dict.fromkeys(layout.experts for layout in (self, *self.variants) if layout.experts))

    @property
    def readers(self) -> tuple[str, ...]:
        """Every matrix that is quantised, by its name in the layer."""
        return tuple(name for site in self.sites for name in site.readers)

    def fused_of(self, reader: str) -> Fused | None:
        """The fused linear that holds ``reader``, or None."""
        return next((fused for fused in self.fused if reader in fused.parts), None)

    def linear_of(self, reader: str) -> str:
        """The linear that holds ``reader``: itself, or the fused one."""
        fused = self.fused_of(reader)
        return fused.linear if fused else reader

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear that is quantised, as the checkpoint has them."""
        return tuple(dict.fromkeys(self.linear_of(name) for name in self.readers))

    def by_linear(self, values: Mapping[str, Value]) -> dict[str, list[Value]]:
        """``values`` by reader as lists by linear, in the order of its rows."""
        parts = {fused.linear: fused.parts for fused in self.fused}
        return {name: [values[part] for part in parts.get(name, (name,))] for name in self.linears}

    @property
    def last(self) -> Site:
        """The site that is computed last."""
        return self.sites[-1]

    def site(self, name: str) -> Site:
        """The site called ``name``."""
        return next(site for site in self.sites if site.name == name)

    def no_equalisation(self) -> str | None:
        """Why channels cannot be equalised, or None."""
        return None if any(site.absorber for site in self.sites) else "nothing before its matrices takes channel factors"

    def no_rotation(self) -> str | None:
        """Why the residual stream cannot be rotated, or None. A norm after a branch has a gain of its own, which no linear can take."""
        if self.norms_after:
            return f"its layers have norms after their blocks ({', '.join(self.norms_after)})"
        if self.unturned:
            return self.unturned
        if self.projector is None:
            return "it is not known which linear brings image features into the decoder"
        return None

    def fault(self, module: nn.Module) -> str | None:
        """What keeps ``module`` from being a layer of this kind, or None."""
        if self.variants:
            faults = [variant.fault(module) for variant in self.variants]
            return None if None in faults else faults[0]
        modules = dict(module.named_modules())
        for name in self.linears:
            if not isinstance(modules.get(name), nn.Linear):
                return f"has no linear {name}"
        if self.experts and not isinstance(modules.get(self.experts), Experts):
            return f"has no experts {self.experts} of gate, up and down alone"
        for fused in self.fused:
            try:
                fused.rows(module)
            except ValueError as error:
                return f"has a linear {fused.linear} that is no {', '.join(fused.parts)} ({error})"
        norms = (*self.norms, *self.norms_after)
        for name in norms:
            if not _is_norm(modules.get(name)):
                return f"has no norm {name}"
        for name, child in module.named_children():
            if _is_norm(child) and name not in norms:
                return f"has a norm {name} that no layout knows"
        return None


@cache
def with_experts(layout: Layout, count: int) -> Layout:
    """``layout`` with sites for ``count`` experts behind its others: what all of them read first, then what each writes from."""
    stack = layout.experts
    gate_up = (
        Site(f"gate_up.{n}", (f"{stack}.{n}.gate_proj", f"{stack}.{n}.up_proj"), None, f"{stack}.{n}", "mlp", None, n, "gate_up")
        for n in range(count)
    )
    down = (Site(f"down.{n}", (f"{stack}.{n}.down_proj",), None, f"{stack}.{n}.down_proj", "mlp", None, n, "down") for n in range(count))
    return replace(layout, sites=(*layout.sites, *gate_up, *down))


def _part(module: nn.Module, name: str | None) -> nn.Module | None:
    return None if name is None else module.get_submodule(name)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    found = module.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def _is_norm(module: nn.Module | None) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 1


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
# Qwen3.5's: three of four layers have a gated delta net for attention. It reads the norm by two more matrices, of one row a head, which
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
    unturned="its gated delta nets read the residual stream by more matrices than are quantised",
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
