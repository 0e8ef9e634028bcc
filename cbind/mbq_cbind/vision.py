"""Encodes images with libmtmd, and splits prompts into text and image chunks."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mbq_cbind.errors import BindingError, CallError
from mbq_cbind.library import load_whole, take_error
from mbq_cbind.types import Floats


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An encoded picture: the projector's output, float32 [tokens, width], for each of the picture's chunks (one, or several slices). It
    can be used with all models that share the mmproj file."""

    width: int  # pixels
    height: int
    embeddings: tuple[Floats, ...]


@dataclass(frozen=True)
class Chunk:
    """A part of a prompt: text tokens, or an image's embeddings with the number of positions that they take."""

    tokens: tuple[int, ...] = ()
    embedding: Floats | None = None
    positions: int = 0
    handle: Any = field(default=None, compare=False)  # mtmd_input_chunk, valid as long as its list

    @property
    def length(self) -> int:
        """The number of tokens, i.e. cells of the context; with M-RoPE, an image has fewer positions."""
        return len(self.tokens) if self.embedding is None else len(self.embedding)

    def same_as(self, other: Chunk) -> bool:
        """Whether both are the same input: equal tokens, or the identical embeddings object."""
        return self.tokens == other.tokens and self.embedding is other.embedding


class Vision:
    """An opened mmproj file, for use with a language model; a context manager."""

    def __init__(self, mmproj: Path, model: Any, *, threads: int, use_gpu: bool) -> None:
        self._binding = load_whole()
        ffi, c = self._binding.ffi, self._binding.c
        require_gguf(mmproj)
        parameters = c.mtmd_context_params_default()
        parameters.n_threads, parameters.use_gpu = threads, use_gpu
        parameters.print_timings = parameters.warmup = False
        # A random marker, as in llama-server, so that mtmd's default marker in a question is plain text.
        self.marker = f"<__media_{secrets.token_hex(16)}__>"
        marker = ffi.new("char[]", self.marker.encode())
        parameters.media_marker = marker
        self._context = c.mtmd_init_from_file(os.fsencode(mmproj), model, parameters)
        if self._context == ffi.NULL:
            raise BindingError(
                f"{mmproj} cannot be used as the vision part of this model ({take_error('unknown reason')}): give the mmproj made with it"
            )
        if not c.mtmd_support_vision(self._context):
            self.close()
            raise BindingError(f"{mmproj} holds no vision tower: give the mmproj file that was made with the model")
        self._width: int = c.llama_model_n_embd_inp(model)
        self.passes = 0  # of the tower, until now

    def close(self) -> None:
        """Free the vision tower; may be called again."""
        if self._context != self._binding.ffi.NULL:
            self._binding.c.mtmd_free(self._context)
            self._context = self._binding.ffi.NULL

    def encode(self, path: Path, among: int = 1) -> EncodedImage:
        """Encode a picture that is one of ``among`` in a prompt: some families tile only single pictures. Raises CallError if there is no
        such picture."""
        c = self._binding.c
        bitmap, embeddings = self._bitmap(path), []
        with self._cut(bitmap, among) as handles:
            for handle in handles:
                if c.mtmd_encode_chunk(self._context, handle) != 0:
                    raise BindingError(f"the vision tower failed on {path} ({take_error('unknown reason')}): try a smaller picture")
                self.passes += 1
                embeddings.append(self._rows(handle, c.mtmd_get_output_embd(self._context)))
        return EncodedImage(c.mtmd_bitmap_get_nx(bitmap), c.mtmd_bitmap_get_ny(bitmap), tuple(embeddings))

    def encode_together(self, paths: Sequence[Path]) -> list[EncodedImage]:
        """Encode the pictures of one prompt as llama-server does: adjacent pictures of the same size in one pass of the tower, if it
        supports that, up to libmtmd's limit (1024 tokens). ``passes`` counts passes. Raises CallError if there is no such picture."""
        c = self._binding.c
        bitmaps = [self._bitmap(path) for path in paths]
        with ExitStack() as stack:
            images = [stack.enter_context(self._cut(bitmap, len(bitmaps))) for bitmap in bitmaps]
            embeddings = iter(self._encoded([handle for handles in images for handle in handles]))
            return [
                EncodedImage(c.mtmd_bitmap_get_nx(bitmap), c.mtmd_bitmap_get_ny(bitmap), tuple(next(embeddings) for _ in handles))
                for bitmap, handles in zip(bitmaps, images, strict=True)
            ]

    def _encoded(self, handles: list[Any]) -> list[Floats]:
        """The embeddings of image chunks, batch by batch."""
        c = self._binding.c
        found: list[Floats] = []
        while len(found) < len(handles):
            batch = self._binding.ffi.gc(c.mtmd_batch_init(self._context), c.mtmd_batch_free)
            end = len(found)
            while end < len(handles) and c.mtmd_batch_add_chunk(batch, handles[end]) == 0:
                end += 1
            taken = handles[len(found) : end]
            if not taken or c.mtmd_batch_encode(batch) != 0:
                raise BindingError(f"the vision tower failed on {len(taken)} pictures ({take_error('unknown reason')}): try smaller ones")
            self.passes += 1
            found += [self._rows(handle, c.mtmd_batch_get_output_embd(batch, handle)) for handle in taken]
        return found

    def _bitmap(self, path: Path) -> Any:
        ffi, c = self._binding.ffi, self._binding.c
        if not path.is_file():
            raise CallError(f"there is no picture {path}: give the path of a PNG, JPEG, BMP or GIF file")
        loaded = c.mtmd_helper_bitmap_init_from_file(self._context, os.fsencode(path), False, c.mtmd_helper_init_opt_default())
        if loaded.bitmap == ffi.NULL:
            raise BindingError(f"{path} cannot be read as a picture: give a PNG, JPEG, BMP or GIF file")
        return ffi.gc(loaded.bitmap, c.mtmd_bitmap_free)

    @contextmanager
    def _cut(self, bitmap: Any, among: int) -> Iterator[list[Any]]:
        """The image chunks of a picture that is one of ``among``."""
        c = self._binding.c
        with self._tokenized(self.marker * among, [bitmap] * among) as chunks:
            images = [chunk for chunk in chunks if c.mtmd_input_chunk_get_type(chunk) == c.MTMD_INPUT_CHUNK_TYPE_IMAGE]
            yield images[: len(images) // among]

    def _rows(self, handle: Any, output: Any) -> Floats:
        """A copy of an image chunk's embeddings [tokens, width]."""
        size = self._binding.c.mtmd_input_chunk_get_n_tokens(handle) * self._width
        return np.frombuffer(self._binding.ffi.buffer(output, 4 * size), np.float32).reshape(-1, self._width).copy()

    def tokens(self, width: int, height: int) -> int:
        """The number of tokens of a picture of this size; nothing is encoded."""
        c = self._binding.c
        bitmap = self._binding.ffi.gc(c.mtmd_bitmap_init(width, height, self._binding.ffi.NULL), c.mtmd_bitmap_free)
        with self._tokenized(self.marker, [bitmap]) as handles:
            return sum(int(c.mtmd_input_chunk_get_n_tokens(handle)) for handle in handles)

    @contextmanager
    def chunks(self, prompt: str, images: Sequence[EncodedImage]) -> Iterator[list[Chunk]]:
        """Split ``prompt`` at its markers, one for each of ``images``; the chunks are valid within the ``with`` block."""
        ffi, c = self._binding.ffi, self._binding.c
        # Bitmaps without pixels are enough: only the size determines chunks and positions.
        bitmaps = [ffi.gc(c.mtmd_bitmap_init(image.width, image.height, ffi.NULL), c.mtmd_bitmap_free) for image in images]
        embeddings = iter([embedding for image in images for embedding in image.embeddings])
        with self._tokenized(prompt, bitmaps) as handles:
            cut = []
            for handle in handles:
                positions = c.mtmd_input_chunk_get_n_pos(handle)
                if c.mtmd_input_chunk_get_type(handle) == c.MTMD_INPUT_CHUNK_TYPE_TEXT:
                    count = ffi.new("size_t *")
                    tokens = c.mtmd_input_chunk_get_tokens_text(handle, count)
                    cut.append(Chunk(tokens=tuple(ffi.unpack(tokens, count[0])), positions=positions))
                else:
                    embedding = next(embeddings, None)
                    if embedding is None or len(embedding) != c.mtmd_input_chunk_get_n_tokens(handle):
                        raise CallError("a picture was encoded by another mmproj file than the one it is used with: encode it again")
                    cut.append(Chunk(embedding=embedding, positions=positions, handle=handle))
            yield cut

    def decode(self, context: Any, chunk: Chunk, position: int, batch: int) -> None:
        """Decode an image chunk in the language model's ``context`` (llama_context) at ``position``."""
        ffi, c = self._binding.ffi, self._binding.c
        data = ffi.from_buffer("float[]", np.ascontiguousarray(chunk.embedding))
        end = ffi.new("llama_pos *", position)
        if c.mtmd_helper_decode_image_chunk(self._context, context, chunk.handle, data, position, 0, batch, end, ffi.NULL, ffi.NULL) != 0:
            raise BindingError(f"an image did not go into the model ({take_error('unknown reason')}): try a larger context")

    def refusal(self, context: Any) -> str | None:
        """Why the language model ``context`` does not support text and pictures in one pass; None if it does (:meth:`decode_mixed`)."""
        reason = self._binding.c.mtmd_aifs_refusal(self._context, context)
        return None if reason == self._binding.ffi.NULL else self._binding.text(reason)

    def decode_mixed(self, context: Any, chunks: Sequence[Chunk], position: int, outputs: int, *, reorder: bool = False) -> None:
        """Decode ``chunks``, text and pictures, in one call; the last ``outputs`` tokens get logits.

        With ``reorder``, rows of pictures are computed first in each micro-batch.
        """
        ffi, c = self._binding.ffi, self._binding.c
        batch = ffi.gc(c.llama_batch_ext_init(context), c.llama_batch_ext_free)
        place = ffi.new("llama_pos *")
        fits, kept = True, []
        for chunk in chunks:
            if chunk.embedding is None:
                for place[0], token in enumerate(chunk.tokens, position):
                    index = c.llama_batch_ext_add_token(batch, 0, token)
                    fits = fits and index >= 0 and c.llama_batch_ext_set_pos(batch, index, place)
            else:
                kept.append(data := ffi.from_buffer("float[]", np.ascontiguousarray(chunk.embedding)))  # the batch does not copy it
                rows = (chunk.handle, data, position, 0, 0, chunk.length)
                fits = fits and c.mtmd_aifs_add_rows(self._context, context, batch, *rows, 2 if reorder else 1)
            position += chunk.positions
        count = sum(chunk.length for chunk in chunks)
        for index in range(count - outputs, count):
            c.llama_batch_ext_set_output_logits(batch, index, True)
        if not fits or c.llama_process(context, c.LLAMA_PROCESS_TYPE_DECODE, batch) != 0:
            raise BindingError(f"{count} tokens did not go into the model at once ({take_error('unknown reason')}): try a larger context")

    @contextmanager
    def _tokenized(self, prompt: str, bitmaps: Sequence[Any]) -> Iterator[list[Any]]:
        ffi, c = self._binding.ffi, self._binding.c
        text = prompt.encode()
        buffer = ffi.new("char[]", text)
        request = ffi.new("mtmd_input_text *", {"text": buffer, "text_len": len(text), "add_special": True, "parse_special": True})
        chunks = c.mtmd_input_chunks_init()
        try:
            if c.mtmd_tokenize(self._context, chunks, request, ffi.new("mtmd_bitmap *[]", list(bitmaps)), len(bitmaps)) != 0:
                raise BindingError(
                    f"the prompt and its pictures cannot be cut into tokens ({take_error('unknown reason')}): try other pictures"
                )
            yield [c.mtmd_input_chunks_get(chunks, i) for i in range(c.mtmd_input_chunks_size(chunks))]
        finally:
            c.mtmd_input_chunks_free(chunks)


def require_gguf(path: Path) -> None:
    """Raise CallError unless ``path`` is a file with GGUF's magic."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CallError(f"{path} cannot be opened ({error.strerror}): give a GGUF file") from error
    if magic != b"GGUF":
        raise CallError(f"{path} is not a GGUF file: give one that `mbq-gguf convert` or llama.cpp made")
