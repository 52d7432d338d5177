"""Bundles that are damaged in one place, each of which a host has to refuse."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Damage = Callable[[bytes, random.Random], bytes]

_FREE = ("tools", "scheduler", "digest")
"""Members of a manifest whose contents are anybody's, or written anew."""

_REQUIRED = ("dtype", "shape", "role", "sha256", "size_bytes", "family", "rule", "height")
"""Members without a default, wherever they are."""


def flip(content: bytes, chance: random.Random) -> bytes:
    """One bit is another."""
    place = chance.randrange(len(content))
    changed = content[place] ^ (1 << chance.randrange(8))
    return content[:place] + bytes([changed]) + content[place + 1 :]


def cut(content: bytes, chance: random.Random) -> bytes:
    """The end is missing."""
    return content[: chance.randrange(len(content))]


def extend(content: bytes, chance: random.Random) -> bytes:
    """There is more behind it."""
    return content + chance.randbytes(1 + chance.randrange(64))


def shuffle(content: bytes, chance: random.Random) -> bytes:
    """A stretch of it lies elsewhere; a byte is added, so that equal stretches count too."""
    first, second = sorted(chance.randrange(len(content)) for _ in range(2))
    return content[second:] + content[:second][first:] + content[:first] + b"\0"


DAMAGES: dict[str, Damage] = {"flip": flip, "cut": cut, "extend": extend, "shuffle": shuffle}


def sealed(manifest: dict[str, Any]) -> bytes:
    """A manifest as the Python host writes it, with its digest."""
    text = json.dumps({**manifest, "digest": ""}, indent=1, ensure_ascii=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    return text.replace('"digest": ""', f'"digest": "{digest}"').encode()


def mistyped(manifest: dict[str, Any], chance: random.Random) -> str:
    """Give one value another type, drop a member or add one, in place; says what."""
    container, key = chance.choice(list(_places(manifest)))
    match chance.choice(["type", "drop", "add"]):
        case "drop" if isinstance(container, dict) and key in _REQUIRED:
            del container[key]
            return f"without {key}"
        case "add" if isinstance(container[key], dict) and _is_record(container[key]):
            container[key]["surplus"] = 1
            return f"{key} with a surplus member"
        case _:
            container[key] = [] if isinstance(container[key], dict) else {}
            return f"{key} of another type"


def _is_record(value: dict[str, Any]) -> bool:
    return bool({"dtype", "sha256", "rule", "height", "path", "digest"} & value.keys())


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every member and item below `value`, but for what is anybody's."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in keys:
        if key in _FREE:
            continue
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def copied(bundle: Path, target: Path) -> None:
    """A copy whose files are hard links: replace, never edit them."""
    shutil.copytree(bundle, target, copy_function=os.link)


def mutate(bundle: Path, chance: random.Random) -> str:
    """Damage one file of a bundle that `copied` made; says how."""
    if chance.random() < 0.4:
        return _mutate_manifest(bundle / "manifest.json", chance)
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    names = [*manifest["files"], *(entry["path"] for entry in manifest["additions"].values())]
    name = chance.choice(names)
    path, content = bundle / name, (bundle / name).read_bytes()
    path.unlink()
    if chance.random() < 0.1:
        return f"{name} is gone"
    kind = chance.choice(list(DAMAGES))
    path.write_bytes(DAMAGES[kind](content, chance))
    return f"{kind} {name}"


def _mutate_manifest(path: Path, chance: random.Random) -> str:
    content = path.read_bytes()
    path.unlink()
    if chance.random() < 0.5:
        kind = chance.choice(list(DAMAGES))
        path.write_bytes(DAMAGES[kind](content, chance))
        return f"{kind} manifest.json"
    manifest = json.loads(content)
    what = mistyped(manifest, chance)
    path.write_bytes(sealed(manifest))
    return f"manifest.json, {what}"
