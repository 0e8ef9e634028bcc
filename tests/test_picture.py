"""One picture in every format and mode: calibration, the server and eval see what a viewer shows."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from mbq_gguf.errors import UserError
from mbq_gguf.llama_cpp.server import data_url
from mbq_gguf.picture import open_picture, png, suffixes
from PIL import Image

SIDE = 48
# JPEG of quality 95 with chroma at half resolution keeps this smooth picture within so many steps of 255: 8 over the eight orientations.
JPEG_ERROR = 8


def colours() -> Image.Image:
    """Smooth, with another colour at each corner, so that turning it shows."""
    y, x = np.mgrid[0:SIDE, 0 : SIDE // 2]
    return Image.fromarray(np.stack([x * 10, y * 5, 255 - x * 5 - y * 2], axis=-1).astype(np.uint8))


def array(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.asarray(image.convert("RGB"), np.int64)


def seen(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """What the converter's reader gives; the PNGs that the server and eval get hold the same pixels."""
    ours = open_picture(path)
    assert ours.mode == "RGB"
    sent = Image.open(io.BytesIO(base64.b64decode(data_url(path).partition(",")[2])))
    asked = Image.open(io.BytesIO(png(path)))
    assert sent.format == asked.format == "PNG"
    assert sent.mode == asked.mode == "RGB"
    assert np.array_equal(array(sent), array(ours))
    assert np.array_equal(array(asked), array(ours))
    return array(ours)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".tga", ".ppm", ".webp", ".jp2", ".jpg", ".pcx", ".sgi"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture{suffix}"
    options = {".jpg": {"quality": 95}, ".webp": {"lossless": True}}.get(suffix, {})
    colours().save(path, **options)  # type: ignore[arg-type]
    assert suffix in suffixes()
    assert np.abs(seen(path) - array(colours())).max() <= (JPEG_ERROR if suffix == ".jpg" else 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_modes(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.tiff"
    converted = colours().convert(mode)
    converted.save(path)
    assert np.array_equal(seen(path), array(converted))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P with a transparent colour"])
def test_transparency_lies_over_white(mode: str, tmp_path: Path) -> None:
    alpha = np.zeros((SIDE, SIDE // 2), np.uint8)
    alpha[SIDE // 2 :] = 255
    path = tmp_path / "picture.png"
    if mode == "RGBA":
        image = colours().convert("RGBA")
    elif mode == "LA":
        image = colours().convert("L").convert("LA")
    else:
        image = colours().quantize(16).convert("RGBA")
    image.putalpha(Image.fromarray(alpha))
    below = array(image.convert("RGB"))[SIDE // 2 :]
    if mode == "PA":
        path = tmp_path / "picture.webp"
        image.save(path, lossless=True)
    elif mode.startswith("P "):
        flat = np.asarray(image.convert("RGB")).copy()
        flat[: SIDE // 2] = (255, 0, 255)
        palette = Image.fromarray(flat).quantize(32)
        clear = palette.getpixel((0, 0))
        palette.save(path, transparency=clear)
        below = array(palette.convert("RGB"))[SIDE // 2 :]
    else:
        image.save(path)
    found = seen(path)
    assert (found[: SIDE // 2] == 255).all()
    assert np.array_equal(found[SIDE // 2 :], below)


def test_sixteen_bits(tmp_path: Path) -> None:
    grey = np.asarray(colours().convert("L"))
    path = tmp_path / "picture.png"
    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    assert Image.open(path).mode.startswith("I")
    assert np.array_equal(seen(path)[..., 0], grey)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_orientation(orientation: int, suffix: str, tmp_path: Path) -> None:
    turn = Image.Transpose
    back = [
        None,
        turn.FLIP_LEFT_RIGHT,
        turn.ROTATE_180,
        turn.FLIP_TOP_BOTTOM,
        turn.TRANSPOSE,
        turn.ROTATE_90,
        turn.TRANSVERSE,
        turn.ROTATE_270,
    ]
    stored = colours() if (how := back[orientation - 1]) is None else colours().transpose(how)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"picture{suffix}"
    stored.save(path, exif=exif, quality=95, lossless=True)
    assert np.abs(seen(path) - array(colours())).max() <= (JPEG_ERROR if suffix == ".jpg" else 0)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
def test_animations_show_their_first_frame(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture{suffix}"
    first = colours().quantize(64).convert("RGB")
    first.save(path, save_all=True, append_images=[Image.new("RGB", first.size, "red")], duration=100, lossless=True)
    assert np.array_equal(seen(path), array(first))


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = {"long.png": (3000, 10), "bomb.png": (SIDE, SIDE)}
    for name, size in faults.items():
        Image.new("L", size).save(tmp_path / name)
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tiff")
    (tmp_path / "none.png").write_bytes(b"no picture")
    (tmp_path / "program.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE // 3)
    words = {
        "bomb.png": "too many pixels",
        "float.tiff": "pixels of mode F have no defined colour",
        "none.png": "it is not a picture of a known format",
        "program.eps": "it is not a picture of a known format",
        "absent.png": "No such file",
    }
    for name, said in words.items():
        for use in (open_picture, data_url, png):
            with pytest.raises(UserError) as caught:
                use(tmp_path / name)  # type: ignore[operator]
            assert f"the image {tmp_path / name} cannot be read" in str(caught.value)
            assert said in str(caught.value)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"long\.png cannot be read \(3000 x 10, one side over 200 times the other\): crop it"):
        open_picture(tmp_path / "long.png")
