"""What ends the process in upstream's own code, each with the smallest fault that does it. FAULTS are those that the patched
llama.cpp has, too: tools/fuzz.py counts them, and they are no failure of it (there is none). MENDED are refused by it, by patch 0014 and
llama-mbq-checks.cpp.

    python tests/fuzz/upstream.py DIR            write the files, NAME/model.gguf or NAME/mmproj.gguf, from seeds/
    python tests/fuzz/upstream.py DIR KIND       and read the mended ones of KIND (text, mmproj): "NAME: what came of it", line by line

All were found with b11434 and need a file made to do it (or by a faulty converter): libllama checks what tensors there are and of which
shape, but few of the numbers in its metadata; libmtmd checks neither shapes nor, for biases, whether they are there, and reads keys with
functions that assert their type. Tensors and shapes are checked for the families that mbq-gguf converts (clip-mbq-towers.h,
clip-mbq-other-towers.h, clip-mbq-gemma4-audio.h): other families' graphs take their own for granted still.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mutators.gguf_document import ARRAY, STRING, Document, Key, copy_of, string, u32, u64

SEEDS = Path(__file__).parent / "seeds"
F32, I32, U32 = 6, 5, 4
BF16, I32_TENSOR = 30, 26
Edit = Callable[[Document], None]


@dataclass(frozen=True)
class Fault:
    """``signatures``: regular expressions of what tools/fuzz.py tells of it; ``edit``: what makes the seed of ``kind`` show it."""

    name: str
    kind: str
    signatures: tuple[str, ...]
    edit: Edit
    seed: str = ""  # a file of seeds/, by default Qwen2-VL's


def key(name: str, kind: int, payload: bytes) -> Edit:
    """Another value for a key."""
    return lambda document: document.put(Key(name.encode(), kind, payload))


def without(*names: str) -> Edit:
    """Tensors missing."""

    def edit(document: Document) -> None:
        document.tensors = [tensor for tensor in document.tensors if tensor.name.decode() not in names]

    return edit


def tensor(name: str, dims: tuple[int, ...] | None = None, kind: int | None = None) -> Edit:
    """A tensor of another shape or type over the same bytes."""

    def edit(document: Document) -> None:
        for index, found in enumerate(document.tensors):
            if found.name.decode() == name:
                document.tensors[index] = found._replace(dims=dims or found.dims, kind=found.kind if kind is None else kind)

    return edit


def twice(document: Document) -> None:
    """The vocabulary's last token is its first once more, the bytes of its text apart from that as they were."""
    index = document.find(b"tokenizer.ggml.tokens")
    assert index is not None
    payload = document.keys[index].payload
    length = struct.unpack_from("<Q", payload, 12)[0]
    first, second = payload[12 : 20 + length], struct.unpack_from("<Q", payload, 20 + length)[0]
    rest = payload[28 + length + second :]
    document.keys[index] = document.keys[index]._replace(payload=payload[:12] + first + first + rest)


def patches_of_64(document: Document) -> None:
    """Patches wider than half a window: as many of them as a window holds are none."""
    key(PATCH, U32, u32(64))(document)
    for name in ("v.patch_embd.weight", "v.patch_embd.weight.1"):
        tensor(name, dims=(64, 64, 3, 16))(document)


def i32s(*values: int) -> bytes:
    return u32(I32) + u64(len(values)) + struct.pack(f"<{len(values)}i", *values)


NAN = struct.pack("<f", float("nan"))
PATCH = "clip.vision.patch_size"
SECTIONS = "qwen2vl.rope.dimension_sections"
POSITIONS = "v.position_embd.weight"
MERGES = "clip.vision.projector.scale_factor"
FAULTS: list[Fault] = []
MENDED = [
    Fault("a token twice", "text", (r"id_to_token.size\(\) == token_to_id.size\(\)",), twice),
    Fault("no layers", "text", (r"n_layer_all > 0",), key("qwen2vl.block_count", U32, u32(0))),
    Fault("an epsilon that is no number", "text", (r"eps >= 0.0f",), key("qwen2vl.attention.layer_norm_rms_epsilon", F32, NAN)),
    Fault("rope sections wider than a head", "text", (r"sect_dims <= ne0",), key(SECTIONS, ARRAY, i32s(99, 99, 99, 0))),
    Fault("one number for rope sections", "text", (r"sect_dims <= ne0",), key(SECTIONS, I32, u32(128))),
    Fault("rope sections of nothing", "text", (r"sections\[0\] > 0",), key(SECTIONS, ARRAY, i32s(0, 0, 0, 0))),
    Fault("rope sections of the last alone", "text", (r"sections\[0\] > 0",), key(SECTIONS, ARRAY, i32s(0, 0, 0, 8))),
    Fault("a norm of another type", "text", (r"binary_op: unsupported types",), tensor("blk.0.attn_norm.weight", kind=BF16)),
    Fault("a norm in F16", "text", (r"binary_op: unsupported types",), tensor("output_norm.weight", kind=1)),
    Fault("a bias in F16", "text", (r"binary_op: unsupported types",), tensor("blk.0.attn_k.bias", kind=1)),
    Fault("a matrix of integers", "text", (r"SIGSEGV \| \?\?",), tensor("blk.0.attn_k.weight", kind=24)),
    Fault("embeddings of integers", "text", (r"ggml_compute_forward_get_rows",), tensor("token_embd.weight", kind=24)),
    Fault("a key of another type", "mmproj", (r"type_to_gguf_type<T>::value == type",), key(PATCH, STRING, string(b"8"))),
    Fault("an array for a number", "mmproj", (r"get_ne\(\) == 1",), key(PATCH, ARRAY, i32s(8, 8))),
    Fault("no layers in the tower", "mmproj", (r"Failed to get tensor positions",), key("clip.vision.block_count", U32, u32(0))),
    Fault("a bias that is missing", "mmproj", (r"SIGSEGV \| ggml_is_empty < ggml_can_repeat",), without("v.blk.0.attn_q.bias")),
    Fault("a matrix that is missing", "mmproj", (r"SIGSEGV \| ggml_\w+ < clip_graph",), without("v.blk.0.attn_q.weight")),
    Fault("patches that are missing", "mmproj", (r"SIGSEGV \| ggml_conv_2d < clip_graph",), without("v.patch_embd.weight.1")),
    Fault("a bias of another shape", "mmproj", (r"ggml_can_repeat\(b, a\)",), tensor("v.blk.0.attn_q.bias", dims=(12,))),
    Fault("a matrix of another shape", "mmproj", (r"ggml_can_mul_mat\(a, b\)",), tensor("mm.0.weight", dims=(32, 128))),
    Fault("patches of another shape", "mmproj", (r"a->ne\[2\] == b->ne\[2\]",), tensor("v.patch_embd.weight", dims=(8, 8, 1, 48))),
    Fault("a width that the tensors have not", "mmproj", (r"ggml_nelements\(a\) ==",), key("clip.vision.embedding_length", U32, u32(64))),
    Fault("a head of an odd width", "mmproj", (r"n_dims % 2 == 0",), key("clip.vision.attention.head_count", U32, u32(8))),
    Fault("an epsilon of a norm", "mmproj", (r"eps >= 0.0f",), key("clip.vision.attention.layer_norm_epsilon", F32, NAN)),
    Fault("a bias of another type", "mmproj", (r"binary_op: unsupported types",), tensor("mm.2.bias", kind=BF16)),
    Fault("a type without products", "mmproj", (r"SIGSEGV \| \?\?", r"\*cur_backend_id != -1"), tensor("mm.2.weight", kind=I32_TENSOR)),
    Fault("another family", "mmproj", (r"patch_bias != nullptr",), key("clip.projector_type", STRING, string(b"qwen3vl_merger"))),
    Fault(
        "windows in no layer", "mmproj", (r"Failed to get tensor window_mask",), key("clip.vision.n_wa_pattern", U32, u32(1)), "qwen2_5vl"
    ),
    Fault("windows of no patch", "mmproj", (r"hang",), patches_of_64, "qwen2_5vl"),
    Fault("another width to go out", "mmproj", (r"ggml_nelements\(a\) ==",), key("clip.vision.projection_dim", U32, u32(7)), "qwen2_5vl"),
    Fault("a matrix of Qwen3-VL", "mmproj", (r"SIGSEGV",), without("v.blk.0.attn_qkv.weight"), "qwen3vl"),
    Fault("positions of Qwen3-VL", "mmproj", (r"position_embeddings != nullptr",), without(POSITIONS), "qwen3vl"),
    Fault("positions in no square", "mmproj", (r"ggml_nelements\(a\) ==",), tensor(POSITIONS, dims=(16, 15)), "qwen3vl"),
    Fault(
        "a deep merger of another shape",
        "mmproj",
        (r"ggml_can_repeat\(b, a\)",),
        tensor("v.deepstack.0.fc2.weight", dims=(64, 32)),
        "qwen3vl",
    ),
    Fault("a bias of GLM-4V", "mmproj", (r"patch_bias != nullptr",), without("v.patch_embd.bias"), "glm4v"),
    Fault(
        "a merger of another shape",
        "mmproj",
        (r"a->ne\[2\] == b->ne\[2\]",),
        tensor("mm.patch_merger.weight", dims=(2, 2, 8, 256)),
        "glm4v",
    ),
    Fault("a matrix of Idefics3", "mmproj", (r"SIGSEGV",), without("v.blk.0.attn_k.weight"), "idefics3"),
    Fault("a matrix of Pixtral", "mmproj", (r"SIGSEGV",), without("v.blk.0.attn_k.weight"), "pixtral"),
    Fault("a norm of Mistral 3", "mmproj", (r"SIGSEGV",), without("mm.input_norm.weight"), "pixtral"),
    Fault("a class of InternVL", "mmproj", (r"class_embedding != nullptr",), without("v.class_embd"), "internvl"),
    Fault("tiles in the wrong order", "mmproj", (r"preproc_min_tiles <=",), key("clip.vision.preproc_min_tiles", U32, u32(13)), "internvl"),
    Fault("positions of Gemma 3", "mmproj", (r"ggml_can_repeat\(b, a\)",), tensor(POSITIONS, dims=(16, 15)), "gemma3"),
    Fault("a norm of Gemma 3", "mmproj", (r"ggml_can_repeat\(b, a\)",), tensor("mm.soft_emb_norm.weight", dims=(12,)), "gemma3"),
    Fault("a matrix of LLaVA-1.5", "mmproj", (r"SIGSEGV",), without("mm.2.weight"), "llava"),
    Fault("a class of LLaVA-1.5", "mmproj", (r"a->ne\[d\] == b->ne\[d\]",), tensor("v.class_embd", dims=(8,)), "llava"),
    Fault("positions for two patches", "mmproj", (r"i01 >= 0 && i01 < ne01",), tensor(POSITIONS, dims=(16, 2, 2)), "gemma4"),
    Fault("a norm of Gemma 4", "mmproj", (r"ggml_can_repeat\(b, a\)",), tensor("v.blk.0.attn_post_norm.weight", dims=(12,)), "gemma4"),
    Fault("queries of MiniCPM-V", "mmproj", (r"ggml_nelements\(a\) == ne0",), key("clip.minicpmv_query_num", U32, u32(5)), "minicpmv"),
    Fault("a norm of a resampler", "mmproj", (r"ggml_can_repeat\(b, a\)",), tensor("resampler.ln_kv.bias", dims=(12,)), "minicpmv"),
    Fault("squares of 3 by 3 patches", "mmproj", (r"n_merge == 2 \|\|",), key(MERGES, U32, u32(3)), "minicpmv4_6"),
    Fault("no square of patches", "mmproj", (r"Invalid number of output",), key("clip.vision.image_size", U32, u32(256)), "minicpmv4_6"),
    Fault("a norm between layers", "mmproj", (r"ggml_can_repeat\(b, a\)",), tensor("v.vit_merger.ds_ln.weight", dims=(12,)), "minicpmv4_6"),
    Fault("a class of Llama 4", "mmproj", (r"class_embedding != nullptr",), without("v.class_embd"), "llama4"),
    Fault("patches of Llama 4", "mmproj", (r"ggml_can_mul_mat\(a, b\)",), tensor("v.patch_embd.weight", dims=(96, 32)), "llama4"),
    Fault("merges of Llama 4", "mmproj", (r"ggml_nelements\(a\) ==",), key(MERGES, U32, u32(3)), "llama4"),
    Fault("a picture of no tile", "mmproj", (r"SIG",), key("clip.vision.image_grid_pinpoints", ARRAY, i32s(0, 0)), "anyres"),
    Fault("a resolution of half a tile", "mmproj", (r"SIG",), key("clip.vision.image_grid_pinpoints", ARRAY, i32s(32, 48)), "anyres"),
    Fault("no end of a row", "mmproj", (r"SIG",), without("v.image_newline"), "anyres"),
    Fault("a row's end of another shape", "mmproj", (r"SIG",), tensor("v.image_newline", dims=(64,)), "llava_next"),
    Fault("positions of PaddleOCR-VL", "mmproj", (r"ggml_nelements\(a\) ==",), tensor(POSITIONS, dims=(16, 15)), "paddleocr"),
    Fault("a matrix of PaddleOCR-VL", "mmproj", (r"ggml_can_mul_mat\(a, b\)",), tensor("mm.1.weight", dims=(32, 64)), "paddleocr"),
    Fault("no pixel of PaddleOCR-VL", "mmproj", (r"image_min_pixels > 0",), key("clip.vision.image_min_pixels", U32, u32(0)), "paddleocr"),
    Fault("a gate of dots.ocr", "mmproj", (r"ggml_are_same_shape",), tensor("v.blk.0.ffn_gate.weight", dims=(16, 16)), "dots_ocr"),
    Fault("a norm of dots.ocr", "mmproj", (r"ggml_can_repeat\(b, a\)",), tensor("mm.post_norm.weight", dims=(12,)), "dots_ocr"),
    Fault("hearing without queries", "mmproj", (r"Failed to get tensor kq_mask",), without("a.blk.0.attn_q.weight"), "gemma4"),
    Fault("hearing without places", "mmproj", (r"Failed to get tensor pos_emb",), without("a.blk.0.attn_k_rel.weight"), "gemma4"),
    Fault("fewer frequencies", "mmproj", (r"ggml_can_mul_mat\(a, b\)",), key("clip.audio.num_mel_bins", U32, u32(80)), "gemma4"),
    Fault("a longer kernel", "mmproj", (r"SIG",), tensor("a.blk.0.conv_dw.weight", dims=(4, 16)), "gemma4"),
    # keys that the patch reads for every family of dynamic size
    Fault("pictures of no pixel", "mmproj", (r"SIG",), key("clip.vision.image_min_pixels", U32, u32(0))),
    Fault("pictures of less than that", "mmproj", (r"SIG",), key("clip.vision.image_max_pixels", U32, u32(1 << 31))),
    Fault("pixels in 64 bits", "mmproj", (r"SIG",), key("clip.vision.image_max_pixels", 10, u64(4096))),
    Fault("pixels in words", "mmproj", (r"SIG",), key("clip.vision.image_min_pixels", STRING, string(b"256"))),
]


def write(fault: Fault, folder: Path) -> Path:
    """The smallest file that shows ``fault``, under the name that its target reads."""
    seed, name = ("mbq3s", "model.gguf") if fault.kind == "text" else ("f16", "mmproj.gguf")
    document = copy_of((SEEDS / fault.kind / f"{fault.seed or seed}.gguf").read_bytes())
    fault.edit(document)
    document.pack()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(document.write())
    return folder


def read_mended(kind: str, folder: Path) -> None:
    """One line for each, in one process: it ends with a file that is not mended."""
    from targets.table import LLAMA

    target = LLAMA[kind]()
    target.open()
    for seed in sorted({fault.seed for fault in MENDED if fault.kind == kind}):
        whole = write(Fault("whole", kind, (), lambda _: None, seed), folder / f"whole-{seed}")
        print(f"whole {seed}: {target.read(whole)}", flush=True)
    for fault in MENDED:
        if fault.kind == kind:
            print(f"{fault.name}: ", end="", flush=True)
            print(target.read(folder / fault.name.replace(" ", "-")), flush=True)


def main() -> None:
    """Write all of them."""
    folder = Path(sys.argv[1])
    for fault in FAULTS + MENDED:
        print(write(fault, folder / fault.name.replace(" ", "-")))
    if len(sys.argv) > 2:
        read_mended(sys.argv[2], folder)


if __name__ == "__main__":
    main()
