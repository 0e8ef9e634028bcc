"""Opens a picture as a viewer shows it, in 8-bit RGB; used by calibration, eval and the server alike.

Applies the EXIF orientation, takes the first frame of an animation, puts transparency on white, and reduces 16 bits per channel to 8.
llama.cpp gets a PNG of these pixels, because its own reader ignores EXIF and transparency and supports fewer formats.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mbq_gguf.errors import UsageError, UserError, describe

LONGEST = 200  # largest ratio of the sides: image processors of dynamic size reject more
NO_PICTURES = frozenset({"EPS", "MPEG", "PDF", "PSD", "WMF"})  # not pictures, although pillow lists or opens them
RGB_MODES = frozenset({"1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"})


def suffixes() -> frozenset[str]:
    """The file suffixes that pillow reads as pictures, such as ``.png``."""
    Image.init()
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in NO_PICTURES)


def open_picture(path: Path) -> Image.Image:
    """The picture in ``path`` as RGB. Raises UserError with the file's name if it cannot be read or is too long for image processors, and
    UsageError if there is no such file."""
    if not path.is_file():
        raise UsageError(f"the image {path} cannot be read (No such file): give the path of a picture")
    Image.init()
    try:
        # Pillow warns from half of its limit on, but phones take pictures of 108 megapixels.
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(path, formats=sorted(set(Image.OPEN) - NO_PICTURES)) as opened,
        ):
            picture = as_rgb(ImageOps.exif_transpose(opened))
    except Image.DecompressionBombError as error:
        raise UserError(f"the image {path} cannot be read (it has too many pixels to be opened safely): make it smaller") from error
    except UnidentifiedImageError as error:
        raise UserError(f"the image {path} cannot be read (it is not a picture of a known format): repair it or leave it out") from error
    except Exception as error:  # damaged files can make pillow raise anything
        raise UserError(f"the image {path} cannot be read ({describe(error)}): repair it or leave it out") from error
    if max(picture.size) > LONGEST * min(picture.size):
        width, height = picture.size
        raise UserError(f"the image {path} cannot be read ({width} x {height}, one side over {LONGEST} times the other): crop it")
    return picture


def as_rgb(image: Image.Image) -> Image.Image:
    """``image`` in 8-bit RGB. Raises ValueError for a mode without defined colours."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and not 0 <= int(values.min()) <= int(values.max()) <= 65535:
            raise ValueError("its values exceed 16 bits: save it with 8 or 16 bits per channel")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")
    if image.mode not in RGB_MODES:
        raise ValueError(f"pixels of mode {image.mode} have no defined colour: save it with 8 bits per channel")
    return image.convert("RGB")


def png(path: Path) -> bytes:
    """The picture in ``path``, opened by :func:`open_picture`, as the bytes of a PNG file."""
    buffer = io.BytesIO()
    open_picture(path).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
