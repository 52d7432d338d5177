"""Memory of a build, predicted and measured: FLUX.1-dev's width, fewer blocks, random weights.

Needs 6 GB of free memory and 6 GB of free disk.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from scripts.full_size.checkpoint import write_checkpoint
from scripts.full_size.models import MODELS, FullSize

from meancache_trt.bundle import Bundle
from meancache_trt.engine.tensorrt.library import load_library
from meancache_trt.engine.tensorrt.memory import predicted_peak_bytes
from meancache_trt.export.safetensors_file import read_tensors

CAPABILITY = "8.9"
LIMIT = 0.25  # a prediction is to be this close
LEAST_WEIGHT_BYTES = 50_000_000  # of smaller graphs the libraries are most of it

_COMMAND = (sys.executable, "-m", "meancache_trt.cli")


def main() -> None:
    """Export, plan, compare, and write the record."""
    with tempfile.TemporaryDirectory() as work:
        checkpoint, path = Path(work) / "flux", Path(work) / "flux.mcb"
        write_checkpoint(checkpoint, _model(), is_dense=True)
        parameters = _parameters(checkpoint / "transformer")
        export = ("export", str(checkpoint), "-o", str(path), "--precision", "bfloat16")
        _run(*export, "--skip-parity", "--height", "1024", "--width", "1024")
        found = json.loads(_run("plan", str(path), "--compute-capability", CAPABILITY, "--json"))
        rows = _rows(Bundle.open(path), found["bundles"][0]["plans"])
    record = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "library": f"tensorrt_rtx {load_library('tensorrt_rtx').version}",
        "compute_capability": CAPABILITY,
        "transformer_parameters": parameters,
        "builds": rows,
    }
    target = Path("docs/proof/plan-memory.json")
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))
    far = [row["component"] for row in rows if abs(row["predicted_to_measured"] - 1) > LIMIT]
    sys.exit(f"predicted too far from measured: {', '.join(far)}" if far else 0)


def _model() -> FullSize:
    """Three of FLUX.1-dev's 57 blocks, one of T5's 24."""
    whole = MODELS["FLUX.1-dev"]
    t5 = {**whole.encoders["text_encoder_2"], "num_layers": 1}
    return replace(
        whole,
        transformer={**whole.transformer, "num_layers": 1, "num_single_layers": 2},
        encoders={**whole.encoders, "text_encoder_2": t5},
    )


def _parameters(folder: Path) -> int:
    return sum(
        math.prod(tensor.shape)
        for file in folder.glob("*.safetensors")
        for tensor in read_tensors(file).values()
    )


def _run(*arguments: str) -> bytes:
    return subprocess.check_output([*_COMMAND, *arguments])


def _rows(bundle: Bundle, plans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for plan in plans:
        size = bundle.export.components[plan["key"]["component"]].weight_bytes
        if size >= LEAST_WEIGHT_BYTES:
            # The checkpoint is stored in the precision that is built.
            predicted, measured = predicted_peak_bytes(size, size), plan["peak_memory_bytes"]
            rows.append(
                {
                    "component": plan["key"]["component"],
                    "weight_bytes": size,
                    "predicted_peak_bytes": predicted,
                    "measured_peak_bytes": measured,
                    "predicted_to_measured": round(predicted / measured, 3),
                    "measured_to_weights": round(measured / size, 2),
                    "plan_bytes": plan["file"]["size_bytes"],
                    "seconds": plan["build_s"],
                }
            )
    return rows


if __name__ == "__main__":
    main()
