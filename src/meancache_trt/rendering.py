"""One picture or video that was rendered, and the file that it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from meancache_trt.meancache.files import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image

NoiseSource = Literal["philox", "torch"]

_PROVENANCE = ("seed", "noise", "schedule", "schedule_digest", "guidance_scale", "bundle_id")
"""What a file says of its making, besides the prompts and whether the VAE's tiles were asked for;
together they determine its pixels."""


@dataclass(frozen=True)
class Rendering:
    """One picture or video, and what it was made from.

    `latent` is the packed result (S, C), `pixels` (H, W, 3) float32 in [0, 1]; of a video
    (C, F, Hl, Wl) and (frames, H, W, 3). `schedule_digest` is the SHA-256 of the schedule's file;
    `loop_ms` is the denoising loop alone.
    """

    prompt: str
    seed: int
    noise: NoiseSource
    schedule: str
    schedule_digest: str
    guidance_scale: float | None
    bundle_id: str
    latent: NDArray[np.float32]
    pixels: NDArray[np.float32]
    loop_ms: float
    frames_per_second: float | None = None
    negative_prompt: str | None = None
    vae_tiling: bool = False

    @property
    def images(self) -> list[Image]:
        """The picture, or a video's frames in order, as 8-bit RGB, rounded as diffusers does."""
        from PIL import Image  # noqa: PLC0415  (only pictures need it)

        frames = self.pixels.reshape(-1, *self.pixels.shape[-3:])
        return [Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in frames]

    @property
    def image(self) -> Image:
        """The picture, or a video's first frame."""
        return self.images[0]

    def save(self, path: Path | str) -> None:
        """Write a PNG atomically, with prompt, seed, schedule and bundle as text chunks.

        A video becomes an animated PNG, which loses nothing and which browsers play.
        """
        from PIL.PngImagePlugin import PngInfo  # noqa: PLC0415

        info = PngInfo()
        info.add_itxt("prompt", self.prompt)
        if self.negative_prompt is not None:
            info.add_itxt("negative_prompt", self.negative_prompt)
        for key in _PROVENANCE:
            info.add_text(key, str(getattr(self, key)))
        info.add_text("vae_tiling", str(self.vae_tiling))
        first, *others = self.images
        with atomic_write(Path(path)) as temporary:
            first.save(
                temporary,
                format="PNG",
                pnginfo=info,
                save_all=bool(others),
                append_images=others,
                duration=1000 / (self.frames_per_second or 1),
            )
