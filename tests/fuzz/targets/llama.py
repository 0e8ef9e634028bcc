"""libllama and libmtmd of the patched build: a file is loaded and run, or refused; the process goes on."""

from __future__ import annotations

import wave
import zlib
from pathlib import Path
from typing import Any

from mbq_gguf.errors import USER_ERRORS, UserError
from mutators import gguf, picture

from targets import TAKEN, Spoilt, refusal

CONTEXT = 96  # tokens
TOKENS = (0, 20, 30, 7, 20) * 14  # more than 64: fewer have no static ranges
PICTURE_BYTES = Path(__file__).parents[1] / "seeds" / "picture" / "rgb.png"


class Text(Spoilt):
    """A language model: load, every row checked in half of the cases, a context, tokens through the graph."""

    mutator, file, folders = gguf, "model.gguf", ("text",)

    def open(self) -> None:
        from mbq_cbind import model

        _bind()

        class Checked(model.Model):
            """With every row of the weights checked."""

            def _open_model(self, gpu_layers: int) -> Any:
                c, defaults = self._binding.c, self._binding.c.llama_model_default_params
                c.llama_model_default_params = lambda: _checking(defaults())
                try:
                    return super()._open_model(gpu_layers)
                finally:
                    c.llama_model_default_params = defaults

        self.kinds = (model.Model, Checked)

    def read(self, folder: Path) -> str:
        path = folder / "model.gguf"
        kind = self.kinds[zlib.crc32(path.read_bytes()) % 2]
        try:
            with kind(path, threads=1, context=CONTEXT, batch=CONTEXT) as opened:
                opened.text_logits([token % opened.vocabulary_size for token in TOKENS], outputs=1)
        except USER_ERRORS as error:
            return refusal(error)
        return TAKEN


class Mmproj(Spoilt):
    """A vision file beside a language model that is whole: load, a picture through the tower, and a sound if there is one for it."""

    mutator, file, folders = gguf, "mmproj.gguf", ("mmproj",)

    def open(self) -> None:
        _bind()
        self.model = _whole_model()

    def read(self, folder: Path) -> str:
        from mbq_cbind.vision import Vision

        try:
            vision = Vision(folder / "mmproj.gguf", self.model._model, threads=1, use_gpu=False)
            try:
                vision.encode(PICTURE_BYTES)
                if vision._binding.c.mtmd_support_audio(vision._context):
                    _hear(vision, folder / "sound.wav")
            finally:
                vision.close()
        except USER_ERRORS as error:
            return refusal(error)
        return TAKEN


class Decoder(Spoilt):
    """A picture as llama-server gets it from a client: through libmtmd's decoder and the tower."""

    mutator, file, folders = picture, "picture", ("picture",)

    def open(self) -> None:
        from mbq_cbind.vision import Vision

        _bind()
        self.model = _whole_model()
        mmproj = Path(__file__).parents[1] / "seeds" / "mmproj" / "f16.gguf"
        self.vision = Vision(mmproj, self.model._model, threads=1, use_gpu=False)

    def read(self, folder: Path) -> str:
        try:
            self.vision.encode(folder / "picture")
        except USER_ERRORS as error:
            return refusal(error)
        return TAKEN


def _hear(vision: Any, path: Path) -> None:
    """A fifth of a second through the audio tower: 20 frames, 5 tokens."""
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes(bytes(range(256)) * 25)
    c = vision._binding.c
    with vision._tokenized(vision.marker, [vision._bitmap(path)]) as chunks:
        heard = [chunk for chunk in chunks if c.mtmd_input_chunk_get_type(chunk) == c.MTMD_INPUT_CHUNK_TYPE_AUDIO]
        if any(c.mtmd_encode_chunk(vision._context, chunk) != 0 for chunk in heard):
            raise UserError("the audio tower failed: give another file")


def _bind() -> None:
    from mbq_gguf.llama_cpp.bindings import bind

    bind()


def _whole_model() -> Any:
    from mbq_cbind.model import Model

    path = Path(__file__).parents[1] / "seeds" / "text" / "mbq3s.gguf"
    return Model(path, threads=1, context=CONTEXT, batch=CONTEXT)


def _checking(parameters: Any) -> Any:
    parameters.check_tensors = True
    return parameters
