"""One picture or video that was rendered, and the file that it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from meancache_trt.meancache.files import atomic_write
from meancache_trt.media.encoding import encode_frames, encode_latent
from meancache_trt.media.formats import OutputFormat
from meancache_trt.shapes import PictureSize

if TYPE_CHECKING:
    from PIL.Image import Image

NoiseSource = Literal["philox", "torch"]

_PROVENANCE = (
    "prompt",
    "negative_prompt",
    "seed",
    "noise",
    "schedule",
    "schedule_digest",
    "guidance_scale",
    "bundle_id",
    "vae_tiling",
)
"""What a file says of its making; together it determines the pixels."""


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

        return [Image.fromarray(frame) for frame in self._frames()]

    @property
    def image(self) -> Image:
        """The picture, or a video's first frame."""
        return self.images[0]

    @property
    def metadata(self) -> dict[str, str]:
        """What a file says of its making, as texts; a negative prompt only where there was one."""
        facts = {key: str(getattr(self, key)) for key in _PROVENANCE}
        if self.negative_prompt is None:
            del facts["negative_prompt"]
        return facts

    def encode(self, form: OutputFormat, job_id: str | None = None) -> bytes:
        """The bytes of a file that holds this and `metadata`, with `id` where a job is named.

        `form` was checked to take it (`OutputFormat.check`). Of latents, the pixels are not read.
        Raises `InputError` where a JPEG or WebP has no room for the prompts, and
        `RuntimeUnavailableError` for an MP4 without PyAV.
        """
        metadata = self.metadata | ({} if job_id is None else {"id": job_id})
        if not form.needs_pixels:
            return encode_latent(self.latent, metadata)
        return encode_frames(form, self._frames(), self.frames_per_second, metadata)

    def save(self, path: Path | str) -> None:
        """Write a file atomically, in the format of its suffix, with `metadata` in it.

        A video as .png becomes an animated PNG, which loses nothing and which browsers play.
        Raises `InputError` for a suffix of no format, or of one that does not take this; and
        `RuntimeUnavailableError` for .mp4 without PyAV.
        """
        form = OutputFormat.of_suffix(Path(path))
        form.check(self._size())
        content = self.encode(form)
        with atomic_write(Path(path)) as temporary:
            temporary.write_bytes(content)

    def _frames(self) -> list[NDArray[np.uint8]]:
        frames = self.pixels.reshape(-1, *self.pixels.shape[-3:])
        return [(frame * 255).round().astype(np.uint8) for frame in frames]

    def _size(self) -> PictureSize:
        *frames, height, width, _ = self.pixels.shape
        return PictureSize(height, width, *frames)
