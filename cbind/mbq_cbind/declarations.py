"""C declarations for cffi, taken from the headers of the llama.cpp tree that the libraries were built from.

Struct layouts of ggml, llama and mtmd change every week, so this file lists only the names of the functions in use. The system compiler
preprocesses the headers, pycparser parses them, and the declarations that those functions need (structs, enums, typedefs) are printed as
cdef text. A small C program compiled from the same headers then prints all sizes, offsets and enum constants, and cffi's own layout must
agree. Both are cached under a hash of the headers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cffi
from pycparser import c_ast, c_generator, c_parser

from mbq_cbind.errors import BindingError

HEADERS = ("ggml.h", "ggml-alloc.h", "ggml-backend.h", "ggml-cpu.h", "llama.h", "mtmd.h", "mtmd-helper.h", "mtmd-aifs.h")
INCLUDE_DIRS = ("ggml/include", "include", "tools/mtmd")

FUNCTION_NAMES = """
    ggml_version ggml_log_set ggml_tensor_overhead ggml_graph_overhead ggml_type_name ggml_row_size ggml_get_type_traits
    ggml_quantize_chunk ggml_quantize_requires_imatrix ggml_validate_row_data ggml_cpu_init ggml_get_type_traits_cpu
    ggml_init ggml_free ggml_new_tensor_4d ggml_view_4d ggml_mul_mat ggml_mul_mat_id ggml_flash_attn_ext
    ggml_backend_cpu_set_use_ref ggml_new_graph ggml_build_forward_expand
    ggml_backend_load_all ggml_backend_dev_count ggml_backend_dev_get ggml_backend_dev_name ggml_backend_dev_by_name ggml_backend_dev_type
    ggml_backend_dev_init ggml_backend_dev_backend_reg ggml_backend_reg_get_proc_address ggml_backend_supports_op
    ggml_backend_alloc_ctx_tensors ggml_backend_buffer_free ggml_backend_tensor_set ggml_backend_tensor_get ggml_backend_graph_compute
    ggml_backend_free
    llama_version llama_backend_init llama_log_set llama_model_default_params llama_model_load_from_file llama_model_free
    llama_model_get_vocab llama_model_n_embd_inp llama_model_n_layer llama_model_n_params llama_model_size llama_model_desc
    llama_model_chat_template llama_context_default_params llama_init_from_model llama_free llama_n_ctx llama_get_memory
    llama_memory_clear llama_memory_seq_rm llama_batch_init llama_batch_free llama_decode llama_get_logits_ith
    llama_vocab_n_tokens llama_vocab_get_add_bos llama_vocab_bos llama_vocab_eos llama_vocab_is_eog llama_vocab_get_text
    llama_tokenize llama_detokenize
    mtmd_default_marker mtmd_context_params_default mtmd_init_from_file mtmd_free mtmd_support_vision mtmd_support_audio
    mtmd_log_set mtmd_bitmap_init mtmd_bitmap_get_nx mtmd_bitmap_get_ny mtmd_bitmap_get_id mtmd_bitmap_free mtmd_input_chunks_init
    mtmd_input_chunks_size mtmd_input_chunks_get mtmd_input_chunks_free mtmd_input_chunk_get_type mtmd_input_chunk_get_tokens_text
    mtmd_input_chunk_get_n_tokens mtmd_input_chunk_get_n_pos mtmd_tokenize mtmd_encode_chunk mtmd_get_output_embd
    mtmd_batch_init mtmd_batch_free mtmd_batch_add_chunk mtmd_batch_encode mtmd_batch_get_output_embd
    mtmd_helper_log_set mtmd_helper_init_opt_default mtmd_helper_bitmap_init_from_file mtmd_helper_decode_image_chunk
    mtmd_helper_eval_chunks mtmd_aifs_init mtmd_aifs_refusal mtmd_aifs_add_rows
    llama_batch_ext_init llama_batch_ext_free llama_batch_ext_add_token llama_batch_ext_add_embd llama_batch_ext_set_pos
    llama_batch_ext_set_output_logits llama_process llama_adapter_lora_init llama_set_adapters_lora
"""
FUNCTIONS = frozenset(FUNCTION_NAMES.split())

# Names that the headers take from the C library; cffi knows them by itself.
C_LIBRARY_TYPES = """
    size_t ssize_t ptrdiff_t intptr_t uintptr_t int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t uint64_t FILE va_list
"""


@dataclass(frozen=True)
class Declarations:
    """``cdef`` is the text for cffi; ``layout`` maps "struct x", "struct x.field" and enum constants to the C compiler's numbers."""

    cdef: str
    layout: dict[str, int]


def declarations(tree: Path, cache: Path) -> Declarations:
    """The declarations of the llama.cpp in ``tree``, from the folder ``cache`` if its headers have been parsed before.

    Raises BindingError if the headers are missing, cannot be read, lack a function, or no C compiler is found.
    """
    cached = cache / f"{_fingerprint(tree)}.json"
    if cached.is_file():
        return Declarations(**json.loads(cached.read_text(encoding="utf-8")))
    cdef = _cdef(_parse(_preprocess(tree), tree), tree)
    result = Declarations(cdef, _compiled_layout(list(layout(new_ffi(cdef), cdef)), tree))
    draft = cached.with_suffix(f".{os.getpid()}")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(asdict(result), indent=1))
        draft.replace(cached)
    except OSError:  # the disk is full or cannot be written: the headers are parsed again next time
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    return result


def new_ffi(cdef: str) -> Any:
    """A cffi.FFI with the declarations."""
    ffi = cffi.FFI()
    ffi.cdef(cdef)
    return ffi


def layout(ffi: Any, cdef: str) -> dict[str, int]:
    """cffi's view of every struct and enum in ``cdef``: the same keys as ``Declarations.layout``."""
    typedefs, structs, unions = ffi.list_types()
    numbers: dict[str, int] = {}
    for name in [*(f"struct {s}" for s in structs), *(f"union {u}" for u in unions), *typedefs]:
        kind = ffi.typeof(name)
        if kind.kind in ("struct", "union") and kind.fields is not None:
            numbers[name] = ffi.sizeof(name)
            numbers |= {f"{name}.{field}": ffi.offsetof(name, field) for field in _field_names(kind)}
    for enum in re.findall(r"\benum \w+(?=\s*{)", cdef):
        numbers |= ffi.typeof(enum).relements
    return numbers


def _field_names(kind: Any) -> list[str]:
    names: list[str] = []
    for name, field in kind.fields:
        names += [name] if name else _field_names(field.type)  # an anonymous union's members count as the struct's own
    return names


def _fingerprint(tree: Path) -> str:
    headers = [path for folder in INCLUDE_DIRS for path in sorted((tree / folder).glob("*.h"))]
    missing = [name for name in HEADERS if name not in {path.name for path in headers}]
    if missing:
        raise BindingError(f"{tree} lacks the header {missing[0]}: run `mbq-gguf build` again, or let MBQ_GGUF_LLAMA_CPP name a whole tree")
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in headers:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:24]


def _compiler() -> str:
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name.split()[0]):
            return name
    raise BindingError("no C compiler was found: install one (for example the package gcc), or set CC")


def _run(command: list[str], **options: Any) -> str:
    done: subprocess.CompletedProcess[str] = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[0]
        raise BindingError(f"the C compiler could not read llama.cpp's headers ({reason}): run `mbq-gguf build` again")
    return done.stdout


def _command(tree: Path, *options: str) -> list[str]:
    return [*_compiler().split(), *options, "-std=gnu11", *(f"-I{tree / folder}" for folder in INCLUDE_DIRS)]


def _preprocess(tree: Path) -> str:
    """The preprocessed headers, without those of the C library."""
    source = "".join(f'#include "{name}"\n' for name in HEADERS)
    text = _run(_command(tree, "-E", "-xc", "-D__attribute__(x)=", "-"), input=source)
    kept: list[str] = []
    ours = False
    for line in text.splitlines():
        if line.startswith("# "):  # a line marker: # number "file" flags
            ours = line.split('"')[1].startswith(str(tree))
        elif ours:
            kept.append(line)
    return "\n".join(kept)


def _parse(text: str, tree: Path) -> list[Any]:
    """The top-level declarations of the preprocessed headers, in their order."""
    known = C_LIBRARY_TYPES.split()
    prelude = "".join(f"typedef int {name};\n" for name in known)
    try:
        return list(c_parser.CParser().parse(prelude + text).ext[len(known) :])
    except c_parser.ParseError as error:
        raise BindingError(f"llama.cpp's headers in {tree} cannot be read ({error}): use the pinned llama.cpp") from error


def _cdef(items: list[Any], tree: Path) -> str:
    """The declarations of FUNCTIONS and of everything that they use, in the headers' order."""
    home: dict[str, int] = {}
    for index, item in enumerate(items):
        for name in _provided(item):
            home.setdefault(name, index)  # the headers repeat some typedefs
    missing = sorted(name for name in FUNCTIONS if name not in home)
    if missing:
        raise BindingError(f"llama.cpp in {tree} has no function {missing[0]}: use the pinned llama.cpp (`mbq-gguf build`)")
    kept: set[int] = set()
    wanted = set(FUNCTIONS)
    while wanted:
        found = home.get(wanted.pop())
        if found is not None and found not in kept:
            kept.add(found)
            wanted |= _mentioned(items[found])
    generator = c_generator.CGenerator()
    return "".join(generator.visit(items[index]) + ";\n" for index in sorted(kept))


def _provided(item: Any) -> set[str]:
    """What a declaration defines: functions and typedefs by their name, structs, unions and enums as "struct name"."""
    if not isinstance(item, c_ast.Decl | c_ast.Typedef):
        return set()  # inline functions, static assertions, pragmas
    names = {item.name} if isinstance(item, c_ast.Typedef) or isinstance(item.type, c_ast.FuncDecl) else set()
    return names | {tag for node, tag in _tags(item) if _members(node) is not None}


def _mentioned(item: Any) -> set[str]:
    names = {tag for _, tag in _tags(item)}
    for node in _walk(item):
        if isinstance(node, c_ast.IdentifierType):
            names.update(node.names)
        if isinstance(node, c_ast.ArrayDecl):
            node.dim = _without_sizeof(node.dim)
    return names


def _tags(item: Any) -> list[tuple[Any, str]]:
    tagged = [node for node in _walk(item) if isinstance(node, c_ast.Struct | c_ast.Union | c_ast.Enum)]
    return [(node, f"{type(node).__name__.lower()} {node.name}") for node in tagged if node.name]


def _members(node: Any) -> Any:
    return node.values if isinstance(node, c_ast.Enum) else node.decls


def _walk(node: Any) -> list[Any]:
    return [node, *(below for _, child in node.children() for below in _walk(child))]


def _without_sizeof(size: Any) -> Any:
    """An array size with each sizeof(type) replaced by a number, since cffi's parser supports arithmetic but not sizeof."""
    if isinstance(size, c_ast.UnaryOp) and size.op == "sizeof":
        return c_ast.Constant("int", str(cffi.FFI().sizeof(c_generator.CGenerator().visit(size.expr))))
    if isinstance(size, c_ast.BinaryOp):
        return c_ast.BinaryOp(size.op, _without_sizeof(size.left), _without_sizeof(size.right))
    return size


def _compiled_layout(keys: list[str], tree: Path) -> dict[str, int]:
    """The C compiler's values for the keys of :func:`layout`."""
    lines = [f'    printf("%lld\\n", (long long) {_c_expression(key)});' for key in keys]
    includes = "".join(f'#include "{name}"\n' for name in HEADERS)
    source = "#include <stddef.h>\n#include <stdio.h>\n" + includes + "int main(void) {\n" + "\n".join(lines) + "\n    return 0;\n}\n"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "layout"
        _run(_command(tree, "-w", "-xc", "-", "-o", str(program)), input=source)
        return dict(zip(keys, map(int, _run([str(program)]).split()), strict=True))


def _c_expression(key: str) -> str:
    kind, _, field = key.partition(".")
    if field:
        return f"offsetof({kind}, {field})"
    return f"sizeof({kind})" if not kind.isupper() else kind
