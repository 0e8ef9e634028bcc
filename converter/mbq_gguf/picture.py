"""One way to open a picture, for calibration, eval and the server: as a viewer shows it, in 8-bit RGB.

Turned as its EXIF orientation says, the first frame of an animation, transparency over white, 16 bits per channel brought to 8. Where
llama.cpp takes pictures it is given the PNG of these pixels: its own reader leaves EXIF and transparency alone and knows fewer formats.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mbq_gguf.errors import UsageError, UserError, said

LONGEST = 200  # times the shorter side: the image processors of dynamic size take no picture beyond that
NO_PICTURES = frozenset({"EPS", "MPEG", "PDF", "PSD", "WMF"})  # programs, films and documents that pillow also opens, or only names
RGB_MODES = frozenset({"1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"})


def suffixes() -> frozenset[str]:
    """The endings of files that pillow reads as pictures, ``.png`` and so on."""
    Image.init()
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in NO_PICTURES)


def open_picture(path: Path) -> Image.Image:
    """The picture in ``path`` as RGB. A UserError names the file where it cannot be read or no image processor takes its shape, a
    UsageError where there is none."""
    if not path.is_file():
        raise UsageError(f"the image {path} cannot be read (No such file): give the path of a picture")
    Image.init()
    try:
        # Half of the pixels that are refused are warned of, in pillow's words, though pictures of 108 million come out of telephones.
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(path, formats=sorted(set(Image.OPEN) - NO_PICTURES)) as opened,
        ):
            turned = ImageOps.exif_transpose(opened)
            picture = as_rgb(turned)
    except Image.DecompressionBombError as error:
        raise UserError(f"the image {path} cannot be read (it has too many pixels to be opened safely): make it smaller") from error
    except UnidentifiedImageError as error:
        raise UserError(f"the image {path} cannot be read (it is no picture of a known format): mend it or leave it out") from error
    except Exception as error:  # pillow's readers raise whatever a damaged file makes them raise
        raise UserError(f"the image {path} cannot be read ({said(error)}): mend it or leave it out") from error
    if max(picture.size) > LONGEST * min(picture.size):
        width, height = picture.size
        raise UserError(f"the image {path} cannot be read ({width} x {height}, one side over {LONGEST} times the other): crop it")
    return picture


def as_rgb(image: Image.Image) -> Image.Image:
    """``image`` in 8-bit RGB. Raises ValueError for a mode that says nothing of how it looks."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and not 0 <= int(values.min()) <= int(values.max()) <= 65535:
            raise ValueError("its values are not of 16 bits: save it with 8 or 16 bits per channel")
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")
    if image.mode not in RGB_MODES:
        raise ValueError(f"pixels of mode {image.mode} have no colour of their own: save it with 8 bits per channel")
    return image.convert("RGB")


def png(path: Path) -> bytes:
    """The picture in ``path`` as :func:`open_picture` shows it, as the bytes of a PNG file."""
    buffer = io.BytesIO()
    open_picture(path).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
