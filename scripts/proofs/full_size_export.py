"""Export the three systems of the paper at full size: memory, new disk, time, shared weights.

Real configurations over sparse safetensors files of the true size (scripts/full_size); each export
is the command that a user would type, at two sizes. Needs 12 GB of free disk.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.full_size.checkpoint import write_checkpoint
from scripts.full_size.measure import export, files_of
from scripts.full_size.models import MODELS, FullSize

LIMITS = {"peak_bytes": 6 * 2**30, "new_bytes": 200_000_000, "seconds": 600}
SECOND_SIZE = {"height": 768, "width": 1280}


def main() -> None:
    """Export every model, or those named on the command line, and write what it took."""
    target = Path("docs/proof/full-size-export.json")
    models = json.loads(target.read_text())["models"] if target.exists() else {}
    for name in sys.argv[1:] or MODELS:
        with tempfile.TemporaryDirectory() as work:
            models[name] = _prove(Path(work), name, MODELS[name])
        print(json.dumps({name: models[name]}, indent=2), flush=True)
        record = {"limits": LIMITS, "models": models}
        target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(_table(models))
    over = [
        f"{name}: {key}"
        for name, model in models.items()
        for key, limit in LIMITS.items()
        if _reached(model["exports"], key) > limit
    ]
    sys.exit(f"over the limit: {', '.join(over)}" if over else 0)


def _table(models: dict[str, Any]) -> str:
    """The table of docs/families.md."""
    rows = [["", *models], ["---"] * (len(models) + 1)]
    facts = {
        "checkpoint, GB": lambda model: f"{model['checkpoint_bytes'] / 1e9:.1f}",
        "seconds, two sizes": lambda model: " / ".join(
            f"{export['seconds']:.0f}" for export in model["exports"]
        ),
        "peak memory, GiB": lambda model: f"{_reached(model['exports'], 'peak_bytes') / 2**30:.1f}",
        "new disk of both bundles, MB": lambda model: (
            f"{_reached(model['exports'], 'new_bytes') / 1e6:.1f}"
        ),
        "weights shared": lambda model: f"{_shared(model['exports'][0]):.3%}",
    }
    rows += [[name, *map(fact, models.values())] for name, fact in facts.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _shared(export: dict[str, Any]) -> float:
    """The least share of a graph's weight bytes that lie in the checkpoint."""
    parts = export["components"].values()
    return float(min(part["shared_bytes"] / part["weight_bytes"] for part in parts))


def _reached(exports: list[dict[str, Any]], key: str) -> float:
    """Both bundles' new bytes together, and the larger of the rest."""
    values = [export[key] for export in exports]
    return float(sum(values) if key == "new_bytes" else max(values))


def _prove(work: Path, name: str, model: FullSize) -> dict[str, Any]:
    checkpoint = work / name
    write_checkpoint(checkpoint, model)
    sizes = (model.size, {**model.size, **SECOND_SIZE})
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "checkpoint_bytes": sum(file.stat().st_size for file in files_of(checkpoint)),
        "exports": [
            export(checkpoint, work / f"{number}.mcb", size, "--parity-memory", "5")
            for number, size in enumerate(sizes)
        ],
    }


if __name__ == "__main__":
    main()
