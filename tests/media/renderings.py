"""Renderings of known pixels for tests that need no bundle."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from meancache_trt.rendering import Rendering
from meancache_trt.shapes import PictureSize

PICTURE, VIDEO = PictureSize(48, 64), PictureSize(48, 64, 9)
LATENT = np.random.default_rng(1).standard_normal((12, 4), np.float32)


def smooth(size: PictureSize) -> NDArray[np.float32]:
    """A wave that moves from frame to frame, which every codec can follow."""
    frame, row, column = np.indices((size.frames or 1, size.height, size.width))
    waves = [np.sin((row + shift * column) / 30 + frame / 3) for shift in (0, 1, 2)]
    pixels = (np.stack(waves, axis=-1) * 0.4 + 0.5).astype(np.float32)
    return pixels if size.frames else pixels[0]


def rendering(size: PictureSize, rate: float = 24.0) -> Rendering:
    return Rendering(
        prompt="a fox",
        seed=3,
        noise="philox",
        schedule="b10",
        schedule_digest="ab" * 32,
        guidance_scale=3.5,
        bundle_id="cd" * 32,
        latent=LATENT,
        pixels=smooth(size),
        loop_ms=1.0,
        frames_per_second=rate if size.frames else None,
    )
