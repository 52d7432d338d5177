"""The world the stand-in models know: captioned shapes, their vocabulary and prompt splits.

Every content word names one value of one attribute, and no word is shared between
attributes, so a caption may put its words in any order.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from itertools import product
from typing import Literal

Split = Literal["calibration", "evaluation", "heldout"]

SIZES = ("small", "large")
COLOUR_RGB = {
    "red": (0.88, 0.12, 0.13),
    "green": (0.12, 0.66, 0.22),
    "blue": (0.13, 0.30, 0.92),
    "yellow": (0.96, 0.86, 0.12),
    "purple": (0.56, 0.18, 0.78),
    "orange": (0.97, 0.52, 0.08),
    "cyan": (0.12, 0.80, 0.86),
    "white": (0.96, 0.96, 0.96),
}
BACKGROUND_RGB = {
    "black": (0.05, 0.05, 0.06),
    "navy": (0.06, 0.09, 0.30),
    "gray": (0.46, 0.46, 0.48),
    "brown": (0.36, 0.22, 0.12),
    "pink": (0.96, 0.70, 0.77),
    "mint": (0.66, 0.91, 0.76),
}
PATTERNS = ("plain", "striped", "dotted")
COLOURS = tuple(COLOUR_RGB)
SHAPES = ("circle", "square", "triangle", "ring", "cross", "star", "heart", "moon")
POSITIONS = ("left", "center", "right")
BACKGROUNDS = tuple(BACKGROUND_RGB)

SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "center": ("center", "middle", "centre"),
    "gray": ("gray", "grey"),
}
PLACES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "at the left", "to the left", "on the left side", "left"),
    "center": ("in the {}", "at the {}", "in the {} of the picture", "centered", "{}"),
    "right": ("on the right", "at the right", "to the right", "on the right side", "right"),
}
BACKDROPS = (
    "on a {} background",
    "against a {} background",
    "with a {} background",
    "in front of a {} background",
    "over a {} background",
    "on {}",
    "{} background",
)
PATTERN_ADJECTIVES = {
    "plain": ("plain", "solid", ""),
    "striped": ("striped",),
    "dotted": ("dotted", "spotted"),
}
PATTERN_SUFFIXES = {"striped": "with stripes", "dotted": "with dots"}
OPENINGS = (
    "",
    "",
    "",
    "a picture of",
    "an image of",
    "a drawing of",
    "a photo of",
    "there is",
    "draw",
)
ARTICLES = ("a", "the", "one", "")

PROMPTS_PER_SPLIT = 640
_SPLIT_SEED = 20251122
_SPLITS: tuple[Split, ...] = ("calibration", "evaluation", "heldout")


@dataclass(frozen=True)
class Scene:
    """One captioned picture: a value for each attribute, in the order of the bare caption."""

    size: str
    pattern: str
    colour: str
    shape: str
    position: str
    background: str


def all_scenes() -> list[Scene]:
    """Every combination of attribute values, in a fixed order."""
    values = product(SIZES, PATTERNS, COLOURS, SHAPES, POSITIONS, BACKGROUNDS)
    return [Scene(*combination) for combination in values]


def bare_caption(scene: Scene) -> str:
    """The shortest wording, such as ``large plain red circle left gray``."""
    return " ".join(astuple(scene))


def natural_caption(scene: Scene, rng: random.Random) -> str:
    """A random wording of the scene as a person might type it."""
    return sentence(natural_parts(scene, rng), OPENINGS, rng)


def natural_parts(scene: Scene, rng: random.Random) -> list[str]:
    """Subject, place and backdrop in random wordings."""
    return [_subject(scene, rng), _place(scene, rng), _backdrop(scene, rng)]


def sentence(parts: list[str], openings: Sequence[str], rng: random.Random) -> str:
    """The parts, at times in another order, after an opening and with punctuation."""
    if rng.random() < 0.3:
        rng.shuffle(parts)
    text = rng.choice((" ", ", ", ", ")).join(parts)
    text = f"{rng.choice(openings)} {text}".strip()
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + rng.choice(("", "", "", "."))


def shuffled_caption(scene: Scene, rng: random.Random) -> str:
    """The words of the bare caption in random order."""
    words = list(astuple(scene))
    rng.shuffle(words)
    return " ".join(words)


def random_caption(scene: Scene, rng: random.Random) -> str:
    """The wording distribution used for training: bare, shuffled or natural."""
    draw = rng.random()
    if draw < 0.35:
        return bare_caption(scene)
    return shuffled_caption(scene, rng) if draw < 0.5 else natural_caption(scene, rng)


@cache
def split_scenes(split: Split) -> tuple[Scene, ...]:
    """The scenes of one split; splits are disjoint, and ``heldout`` is never trained on."""
    return tuple(_shuffled_scenes()[split_range(split)])


def split_range(split: Split) -> slice:
    """Which of a world's shuffled scenes a split has."""
    if split not in _SPLITS:
        raise ValueError(f"expected a split in {_SPLITS}, found {split!r}")
    start = _SPLITS.index(split) * PROMPTS_PER_SPLIT
    return slice(start, start + PROMPTS_PER_SPLIT)


def training_scenes() -> list[Scene]:
    """Every scene outside ``heldout``."""
    heldout = set(split_scenes("heldout"))
    return [scene for scene in all_scenes() if scene not in heldout]


@cache
def split_prompts(split: Split) -> tuple[str, ...]:
    """One caption per scene of the split, bare and natural wordings alternating."""
    rng = random.Random(f"{_SPLIT_SEED}-{split}")
    scenes = split_scenes(split)
    return tuple(
        natural_caption(scene, rng) if index % 2 else bare_caption(scene)
        for index, scene in enumerate(scenes)
    )


def vocabulary() -> list[str]:
    """Every lower-case word that a caption may hold, sorted, without punctuation."""
    return sorted({word for phrase in _phrases() for word in phrase.replace("{}", " ").split()})


def _shuffled_scenes() -> list[Scene]:
    scenes = all_scenes()
    random.Random(_SPLIT_SEED).shuffle(scenes)
    return scenes


def _phrases() -> Iterator[str]:
    yield from (*SIZES, *PATTERNS, *COLOURS, *SHAPES, *POSITIONS, *BACKGROUNDS)
    for options in (SYNONYMS, PLACES, PATTERN_ADJECTIVES):
        for phrases in options.values():
            yield from phrases
    yield from (*BACKDROPS, *PATTERN_SUFFIXES.values(), *OPENINGS, *ARTICLES)


def _synonym(word: str, rng: random.Random) -> str:
    return rng.choice(SYNONYMS.get(word, (word,)))


def _subject(scene: Scene, rng: random.Random) -> str:
    suffix = PATTERN_SUFFIXES.get(scene.pattern, "") if rng.random() < 0.3 else ""
    pattern = "" if suffix else rng.choice(PATTERN_ADJECTIVES[scene.pattern])
    adjectives = [_synonym(scene.size, rng), pattern, scene.colour]
    rng.shuffle(adjectives)
    words = (rng.choice(ARTICLES), *adjectives, scene.shape, suffix)
    return " ".join(word for word in words if word)


def _place(scene: Scene, rng: random.Random) -> str:
    return rng.choice(PLACES[scene.position]).format(_synonym(scene.position, rng))


def _backdrop(scene: Scene, rng: random.Random) -> str:
    return rng.choice(BACKDROPS).format(_synonym(scene.background, rng))
