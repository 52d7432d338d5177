"""The world of the video stand-ins: the pictures' simpler shapes, plain, and how they move.

Motion is vertical and has words of its own, so that "left" and "right" still name places.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import product

from meancache_trt.standins import captions
from meancache_trt.standins.captions import Scene, Split

SHAPES = ("circle", "square", "triangle", "ring", "cross")
MOTIONS = ("still", "rising", "falling")
MOTION_PHRASES: dict[str, tuple[str, ...]] = {
    "still": ("still", "standing still", "at rest"),
    "rising": ("rising", "moving up", "going up"),
    "falling": ("falling", "moving down", "going down"),
}
OPENINGS = ("", "", "", "a video of", "a clip of", "a film of", "there is", "show")

_SPLIT_SEED = 20251123


@dataclass(frozen=True)
class VideoScene:
    """One captioned video: a shape as in a picture, and its motion."""

    picture: Scene
    motion: str


def all_scenes() -> list[VideoScene]:
    """Every combination of attribute values, in a fixed order."""
    return [VideoScene(*combination) for combination in product(_pictures(), MOTIONS)]


def bare_caption(scene: VideoScene) -> str:
    """The shortest wording, such as ``large plain red circle left gray rising``."""
    return f"{captions.bare_caption(scene.picture)} {scene.motion}"


def natural_caption(scene: VideoScene, rng: random.Random) -> str:
    """A random wording of the scene as a person might type it."""
    parts = captions.natural_parts(scene.picture, rng)
    parts.insert(rng.choice((1, len(parts))), rng.choice(MOTION_PHRASES[scene.motion]))
    return captions.sentence(parts, OPENINGS, rng)


def shuffled_caption(scene: VideoScene, rng: random.Random) -> str:
    """The words of the bare caption in random order."""
    words = bare_caption(scene).split()
    rng.shuffle(words)
    return " ".join(words)


def random_caption(scene: VideoScene, rng: random.Random) -> str:
    """The wording distribution used for training: bare, shuffled or natural."""
    draw = rng.random()
    if draw < 0.35:
        return bare_caption(scene)
    return shuffled_caption(scene, rng) if draw < 0.5 else natural_caption(scene, rng)


@cache
def split_scenes(split: Split) -> tuple[VideoScene, ...]:
    """The scenes of one split; splits are disjoint, and ``heldout`` is never trained on."""
    scenes = all_scenes()
    random.Random(_SPLIT_SEED).shuffle(scenes)
    return tuple(scenes[captions.split_range(split)])


def training_scenes() -> list[VideoScene]:
    """Every scene outside ``heldout``."""
    heldout = set(split_scenes("heldout"))
    return [scene for scene in all_scenes() if scene not in heldout]


@cache
def split_prompts(split: Split) -> tuple[str, ...]:
    """One caption per scene of the split, bare and natural wordings alternating."""
    rng = random.Random(f"{_SPLIT_SEED}-{split}")
    return tuple(
        natural_caption(scene, rng) if index % 2 else bare_caption(scene)
        for index, scene in enumerate(split_scenes(split))
    )


def vocabulary() -> list[str]:
    """Every lower-case word that a caption may hold, sorted, without punctuation."""
    phrases = (*OPENINGS, *(phrase for options in MOTION_PHRASES.values() for phrase in options))
    words = {word for phrase in phrases for word in phrase.split()}
    return sorted(words.union(captions.vocabulary()))


def _pictures() -> list[Scene]:
    scenes = captions.all_scenes()
    return [scene for scene in scenes if scene.pattern == "plain" and scene.shape in SHAPES]
