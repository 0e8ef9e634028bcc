"""Runs a whole GGUF model with libllama: logits for given answers, and greedy answers, to questions about pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mbq_cbind.chat import ChatTemplate
from mbq_cbind.clipping import Clipping
from mbq_cbind.errors import BindingError
from mbq_cbind.library import load_whole, take_error
from mbq_cbind.types import Floats
from mbq_cbind.vision import Chunk, EncodedImage, Vision, require_gguf


class Model:
    """A language model and, with ``mmproj``, its vision part; a context manager. Not thread-safe.

    ``context`` is the maximum number of tokens of a prompt with its answer, ``batch`` the size of a micro-batch. ``gpu_layers`` is 0 for
    the CPU, -1 for all layers on the GPU. The part that a prompt shares with the previous one (the same beginning and the same encoded
    image) is not computed again. ``aifs``: decode the rest of a prompt, text and pictures, in one call if the model allows it (``apart``
    says why not; with ``reorder``, rows of pictures come first in each micro-batch); otherwise each picture has separate calls.
    ``decode_calls`` counts calls. ``observe`` maps names of llama.cpp's graph to functions, which receive every float32 matrix [rows,
    columns] of that name; ``clipping`` counts values beyond static ranges.
    """

    def __init__(
        self,
        gguf: Path,
        mmproj: Path | None = None,
        *,
        threads: int | None = None,
        gpu_layers: int = 0,
        context: int = 4096,
        batch: int = 512,
        aifs: bool = False,
        flash_attention: bool = True,
        observe: Mapping[str, Callable[[Floats], object]] | None = None,
        clipping: Clipping | None = None,
    ) -> None:
        self._binding = load_whole()
        ffi, c = self._binding.ffi, self._binding.c
        self._observing, self._clipping = observe or {}, clipping
        self._observer = ffi.callback("bool(struct ggml_tensor *, bool, void *)", self._observed)
        self.path, self._batch = gguf, batch
        self._model = self._context = ffi.NULL
        self._vision: Vision | None = None
        self._done: list[Chunk] = []  # the chunks that the context holds ...
        self.decode_calls = 0
        self.reorder = False
        self.apart: str | None = "it is off"  # why text and pictures are decoded separately
        self._cells = 0  # ... and its used cells, including those of text after the last chunk
        require_gguf(gguf)
        threads = threads or os.cpu_count() or 1
        try:
            self._model = self._open_model(gpu_layers)
            self._context = self._open_context(threads, context, flash_attention)
            self._vocabulary = c.llama_model_get_vocab(self._model)
            if mmproj is not None:
                self._vision = Vision(mmproj, self._model, threads=threads, use_gpu=gpu_layers != 0)
                self.apart = self._vision.refusal(self._context) if aifs else self.apart
        except BaseException:
            self.close()
            raise
        self.vocabulary_size: int = c.llama_vocab_n_tokens(self._vocabulary)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free model and context; may be called again."""
        c, null = self._binding.c, self._binding.ffi.NULL
        if self._vision is not None:
            self._vision.close()
        if self._context != null:
            c.llama_free(self._context)
        if self._model != null:
            c.llama_model_free(self._model)
        self._model = self._context = null

    @property
    def vision(self) -> Vision:
        """The vision part. Raises BindingError if the model was opened without one."""
        if self._vision is None:
            raise BindingError(f"{self.path} was opened without its vision part: give the mmproj file too")
        return self._vision

    @property
    def parameters(self) -> int:
        """Number of weights in the file."""
        return int(self._binding.c.llama_model_n_params(self._model))

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return int(self._binding.c.llama_model_size(self._model))

    @cached_property
    def end_of_answer(self) -> int:
        """The token that ends an assistant's turn: that of the chat template, or EOS if the template's does not end generation."""
        after = self.tokenize(self._template.end_of_answer(), special=True)[len(self.tokenize("", special=True)) :]
        return after[0] if after and self.is_end(after[0]) else int(self._binding.c.llama_vocab_eos(self._vocabulary))

    def prompt(self, question: str, images: int = 1) -> str:
        """The question after ``images`` media markers in the model's chat template, as llama-server renders it."""
        return self._template.prompt(question, marker=self.vision.marker if images else "", images=images)

    @cached_property
    def _template(self) -> ChatTemplate:
        c = self._binding.c
        source = self._binding.text(c.llama_model_chat_template(self._model, self._binding.ffi.NULL))
        if not source:
            raise BindingError(f"{self.path} has no chat template: convert the model again from a directory that has one")
        bos, eos = (self._piece(token(self._vocabulary)) for token in (c.llama_vocab_bos, c.llama_vocab_eos))
        return ChatTemplate(source, bos if c.llama_vocab_get_add_bos(self._vocabulary) else "", eos)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Tokenise ``text``; with ``special``, names of special tokens are parsed as such, and BOS is added if the model uses it."""
        ffi, c = self._binding.ffi, self._binding.c
        data = text.encode()
        tokens = ffi.new("llama_token[]", len(data) + 2)
        count = c.llama_tokenize(self._vocabulary, data, len(data), tokens, len(tokens), special, special)
        return list(ffi.unpack(tokens, count))

    def text(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, without special tokens."""
        ffi, c = self._binding.ffi, self._binding.c
        size = 64 + 64 * len(tokens)
        while True:
            buffer = ffi.new("char[]", size)
            written = c.llama_detokenize(self._vocabulary, list(tokens), len(tokens), buffer, size, False, False)
            if written >= 0:
                return bytes(ffi.buffer(buffer, written)).decode("utf-8", errors="replace")
            size = -written

    def is_end(self, token: int) -> bool:
        """Whether ``token`` ends generation."""
        return bool(self._binding.c.llama_vocab_is_eog(self._vocabulary, token))

    def prompt_tokens(self, prompt: str, images: Sequence[EncodedImage] = ()) -> list[int | None]:
        """The tokens of ``prompt``: text tokens, and None for each image token."""
        with self._chunks(prompt, images) as chunks:
            return [token for chunk in chunks for token in (chunk.tokens or [None] * chunk.length)]

    def logits(self, prompt: str, images: Sequence[EncodedImage], answer: Sequence[int]) -> Floats:
        """Teacher forcing: row i of float32 [len(answer), vocabulary] predicts ``answer[i]`` from the prompt and the answer before it."""
        with self._chunks(prompt, images) as chunks:
            return self._evaluate(chunks[:-1], [*chunks[-1].tokens, *answer[:-1]], outputs=len(answer))[0]

    def generate(self, prompt: str, images: Sequence[EncodedImage], *, limit: int, opening: Sequence[int] = ()) -> list[int]:
        """The greedy answer, starting with ``opening``, of at most ``limit`` tokens, without the token that ends the turn."""
        answer = list(opening)
        with self._chunks(prompt, images) as chunks:
            logits, position = self._evaluate(chunks[:-1], [*chunks[-1].tokens, *answer], outputs=1)
        while len(answer) < limit:
            token = int(logits[0].argmax())
            if self.is_end(token):
                break
            answer.append(token)
            if len(answer) < limit:
                logits = self._decode([token], position, outputs=1)
                position += 1
        return answer

    def text_logits(self, tokens: Sequence[int], *, outputs: int) -> Floats:
        """Logits after each of the last ``outputs`` of ``tokens``, without any other context: float32 [outputs, vocabulary]."""
        return self._evaluate([], tokens, outputs=outputs)[0]

    def _open_model(self, gpu_layers: int) -> Any:
        ffi, c = self._binding.ffi, self._binding.c
        parameters = c.llama_model_default_params()
        parameters.n_gpu_layers = gpu_layers
        no_devices = ffi.new("ggml_backend_dev_t[1]")  # an empty list keeps a CUDA build off the GPU
        if gpu_layers == 0:
            parameters.devices = no_devices
        model = c.llama_model_load_from_file(os.fsencode(self.path), parameters)
        if model == ffi.NULL:
            raise BindingError(f"llama.cpp cannot load {self.path} ({take_error('unknown reason')}): fetch or convert it again")
        return model

    def _open_context(self, threads: int, context: int, flash_attention: bool) -> Any:
        ffi, c = self._binding.ffi, self._binding.c
        parameters = c.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = context
        parameters.n_ubatch = self._batch
        parameters.n_threads = parameters.n_threads_batch = threads
        if not flash_attention:  # otherwise if the backend supports it
            parameters.flash_attn_type = c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.cb_eval = self._observer if self._observing or self._clipping else ffi.NULL
        opened = c.llama_init_from_model(self._model, parameters)
        if opened == ffi.NULL:
            raise BindingError(f"no context of {context} tokens for {self.path} ({take_error('unknown reason')}): try a smaller one")
        return opened

    def _observed(self, tensor: Any, asking: bool, _: object) -> bool:
        """Called by libllama, first to ask whether a tensor is wanted, then with its data."""
        found = self._observing.get(self._binding.text(tensor.name)) if self._observing else None
        counted = self._clipping is not None and self._clipping.wants(self._binding, tensor)
        if found and not asking:
            values = np.empty((tensor.ne[1], tensor.ne[0]), np.float32)
            self._binding.c.ggml_backend_tensor_get(tensor, self._binding.ffi.from_buffer(values), 0, values.nbytes)
            found(values)
        if self._clipping is not None and counted and not asking:
            self._clipping.take(self._binding, tensor)
        return not asking or found is not None or counted

    def _piece(self, token: int) -> str:
        return self._binding.text(self._binding.c.llama_vocab_get_text(self._vocabulary, token)) if token >= 0 else ""

    @contextmanager
    def _chunks(self, prompt: str, images: Sequence[EncodedImage]) -> Iterator[list[Chunk]]:
        if not images:
            tokens = tuple(self.tokenize(prompt, special=True))
            yield [Chunk(tokens=tokens, positions=len(tokens))]
            return
        with self.vision.chunks(prompt, images) as chunks:
            if not chunks[-1].tokens:
                raise BindingError("a prompt must end in text: put the pictures before the question")
            yield chunks

    def _evaluate(self, chunks: list[Chunk], tokens: Sequence[int], *, outputs: int) -> tuple[Floats, int]:
        """Run ``chunks``, except those that the context holds, then text ``tokens``. Returns logits of the last ``outputs`` tokens and the
        next position."""
        shared, position = self._reuse(chunks)
        rest = chunks[shared:]
        if self.apart is None and any(chunk.embedding is not None for chunk in rest):
            mixed = [*rest, Chunk(tokens=tuple(tokens), positions=len(tokens))]
            count = sum(chunk.length for chunk in mixed)
            self._take_cells(count)
            self._done = []  # in case it fails
            self.vision.decode_mixed(self._context, mixed, position, outputs, reorder=self.reorder)
            self.decode_calls += 1
            self._done = [Chunk(chunk.tokens, chunk.embedding, chunk.positions) for chunk in chunks]
            return self._read_logits(count, outputs), position + sum(chunk.positions for chunk in mixed)
        for chunk in rest:
            if chunk.tokens:
                self._decode(chunk.tokens, position, outputs=0)
            else:
                self._take_cells(chunk.length)
                self.vision.decode(self._context, chunk, position, self._batch)
                self.decode_calls += -(-chunk.length // self._batch)
            position += chunk.positions
            self._done.append(Chunk(chunk.tokens, chunk.embedding, chunk.positions))
        return self._decode(tokens, position, outputs=outputs), position + len(tokens)

    def _reuse(self, chunks: list[Chunk]) -> tuple[int, int]:
        """Truncate the context to the common prefix with ``chunks``; returns its number of chunks, and the next position."""
        shared = 0
        while shared < min(len(chunks), len(self._done)) and chunks[shared].same_as(self._done[shared]):
            shared += 1
        position = sum(chunk.positions for chunk in chunks[:shared])
        memory = self._binding.c.llama_get_memory(self._context)
        # Models with a recurrent state cannot be truncated: start again.
        if not self._binding.c.llama_memory_seq_rm(memory, 0, position, -1):
            self._binding.c.llama_memory_clear(memory, True)
            shared = position = 0
        self._done = chunks[:shared]
        self._cells = sum(chunk.length for chunk in self._done)
        return shared, position

    def _take_cells(self, count: int) -> None:
        """Count tokens that are added, because libllama aborts the process if they do not fit."""
        size = self._binding.c.llama_n_ctx(self._context)
        self._cells += count
        if self._cells > size:
            raise BindingError(f"{self._cells} tokens do not fit the context of {size}: open the model with a larger one")

    def _decode(self, tokens: Sequence[int], position: int, *, outputs: int) -> Floats:
        """Run text ``tokens`` from ``position``; logits of the last ``outputs`` of them, float32 [outputs, vocabulary]."""
        c = self._binding.c
        count = len(tokens)
        self._take_cells(count)
        batch = c.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            batch.token[0:count] = list(tokens)
            batch.pos[0:count] = range(position, position + count)
            for i in range(count):
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i >= count - outputs
            status = c.llama_decode(self._context, batch)
            self.decode_calls += 1
        finally:
            c.llama_batch_free(batch)
        if status != 0:
            self._done = []
            raise BindingError(
                f"llama.cpp failed on a prompt of {self._cells} tokens ({take_error('unknown reason')}): try a larger context"
            )
        return self._read_logits(count, outputs)

    def _read_logits(self, count: int, outputs: int) -> Floats:
        """Logits of the last ``outputs`` of the ``count`` most recently decoded tokens."""
        ffi, c = self._binding.ffi, self._binding.c
        logits = np.empty((outputs, c.llama_vocab_n_tokens(self._vocabulary)), np.float32)
        for row, i in enumerate(range(count - outputs, count)):
            ffi.memmove(ffi.from_buffer(logits[row]), c.llama_get_logits_ith(self._context, i), logits[row].nbytes)
        return logits
