"""Procedural pictures with the statistics of photographs: noise with a 1/f spectrum, and dead leaves (shapes that cover one another).

Natural images have spectra close to 1/f (Field 1987) and object sizes close to a power law, which dead leaves reproduce (Lee, Mumford and
Huang 2001). Networks trained only on such pictures learn to recognise photographs (Baradad et al., arXiv 2106.05963).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

SIDES = (224, 224, 280, 308)  # pixels
NOISE_SHARE = 0.25  # the others are leaves on noise
LEAST_LEAF, LEAST_SHARE = 0.02, 0.004  # smallest radius relative to the side; the largest is 16 times as large
Floats = npt.NDArray[np.float64]


def picture(draw: np.random.Generator) -> Image.Image:
    """A picture; each call returns another one."""
    side = int(draw.choice(SIDES))
    canvas = noise(draw, side)
    if draw.random() < NOISE_SHARE:
        return _image(canvas)
    for _ in range(int(draw.integers(20, 250))):
        _leaf(draw, canvas)
    return _image(canvas).filter(ImageFilter.GaussianBlur(draw.uniform(0, 1.2)))


def noise(draw: np.random.Generator, side: int) -> Floats:
    """Colours [side, side, 3] around 0 to 255 with amplitude 1/f^a over frequency f; mostly grey, as in nature."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1 / side
    shape = (3, *frequency.shape)
    spectrum = (draw.normal(size=shape) + 1j * draw.normal(size=shape)) / frequency ** draw.uniform(0.8, 2.0)
    planes = np.fft.irfft2(spectrum, (side, side))
    planes -= planes.mean(axis=(1, 2), keepdims=True)
    planes /= planes.std(axis=(1, 2), keepdims=True)
    mix = np.linalg.qr(draw.normal(size=(3, 3)))[0] * np.array([1.0, 0.4, 0.2])
    colours = planes.transpose(1, 2, 0) @ mix.T
    shaded: Floats = colours / colours.std() * draw.uniform(30, 70) + draw.uniform(70, 190)
    return shaded


def _leaf(draw: np.random.Generator, canvas: Floats) -> None:
    """Draw a disc or box of one shaded, grainy colour anywhere on ``canvas`` [side, side, 3]; areas follow a power law."""
    side = len(canvas)
    radius = side * LEAST_LEAF / np.sqrt(draw.uniform(LEAST_SHARE, 1))
    centre = draw.uniform(0, side, 2)
    angle, flatness = draw.uniform(0, np.pi), draw.uniform(0.3, 1)
    reach = radius * np.hypot(1, flatness)  # to a box's corner; nothing is drawn beyond it, so nothing is computed there
    (top, left), (bottom, right) = (np.clip(centre + end, 0, side).astype(int) for end in (-reach, reach + 1))
    y, x = np.mgrid[top:bottom, left:right] - centre[:, None, None]
    u = (x * np.cos(angle) + y * np.sin(angle)) / radius
    v = (y * np.cos(angle) - x * np.sin(angle)) / (radius * flatness)
    inside = u * u + v * v < 1 if draw.random() < 0.5 else np.maximum(abs(u), abs(v)) < 1
    shade = 1 + draw.uniform(-0.5, 0.5) * u[inside] + draw.normal(0, draw.uniform(0, 0.15), int(inside.sum()))
    canvas[top:bottom, left:right][inside] = shade[:, None] * draw.uniform(0, 255, 3)


def _image(canvas: Floats) -> Image.Image:
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
