"""Pictures of an evaluation on disk: small ones for its report, whole ones on request."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from meancache_trt.calibration.evaluation import Pictures
from meancache_trt.calibration.trajectories import Prompt
from meancache_trt.meancache.files import atomic_write

THUMBNAIL = 192
"""Longest side in pixels: twelve pictures a row of a report stay below a megabyte."""

STRIP_FRAMES = 6
STRIP_SIDE = 112
"""Frames of a video's strip, evenly spaced with both ends, and the longest side of each."""

_GAP = 3


def frames_of(pixels: Pictures) -> list[Image.Image]:
    """A picture (H, W, 3), or a video's frames (F, H, W, 3), in 8 bits as diffusers rounds."""
    frames = pixels.reshape(-1, *pixels.shape[-3:])
    return [Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in frames]


def thumbnail(pixels: Pictures) -> Image.Image:
    """A picture at most `THUMBNAIL` long, or a strip of a video's frames; never enlarged."""
    frames = frames_of(pixels)
    if pixels.ndim == 3:
        return _shrunk(frames[0], THUMBNAIL)
    chosen = np.linspace(0, len(frames) - 1, min(STRIP_FRAMES, len(frames))).round().astype(int)
    parts = [_shrunk(frames[index], STRIP_SIDE) for index in chosen]
    width, height = parts[0].size
    strip = Image.new("RGBA", (len(parts) * (width + _GAP) - _GAP, height), (0, 0, 0, 0))
    for place, part in enumerate(parts):
        strip.paste(part, (place * (width + _GAP), 0))
    return strip


def _shrunk(image: Image.Image, longest: int) -> Image.Image:
    factor = min(1.0, longest / max(image.size))
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image if factor == 1 else image.resize(size, Image.Resampling.LANCZOS)


class PictureStore:
    """Where pictures of each row lie: `thumbnails/KEY/0000.png`, and whole ones in `pictures/`."""

    def __init__(self, directory: Path, *, keeps_whole: bool = False) -> None:
        self._directory, self._keeps_whole = directory, keeps_whole

    def thumbnail_path(self, key: str, index: int) -> Path:
        """Where the thumbnail of picture `index` of a row is, or will be."""
        return self._directory / "thumbnails" / key / f"{index:04d}.png"

    def has(self, key: str, count: int) -> bool:
        """Whether all that is to be kept of a row is there."""
        folders = ["thumbnails", *(["pictures"] if self._keeps_whole else [])]
        return all(
            (self._directory / folder / key / f"{index:04d}.png").exists()
            for folder in folders
            for index in range(count)
        )

    def save(self, key: str, first: int, prompts: list[Prompt], pictures: Pictures) -> None:
        """Keep a batch whose first picture has index `first` in the row."""
        for index, (prompt, pixels) in enumerate(zip(prompts, pictures, strict=True), start=first):
            path = self.thumbnail_path(key, index)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary:
                thumbnail(pixels).save(temporary, format="PNG")
            if self._keeps_whole:
                self._save_whole(key, index, prompt, pixels)

    def _save_whole(self, key: str, index: int, prompt: Prompt, pixels: Pictures) -> None:
        info = PngInfo()
        info.add_itxt("prompt", prompt.text)
        info.add_text("seed", str(prompt.seed))
        path = self._directory / "pictures" / key / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        first, *others = frames_of(pixels)
        with atomic_write(path) as temporary:
            first.save(
                temporary,
                format="PNG",
                pnginfo=info,
                save_all=bool(others),
                append_images=others,
            )
