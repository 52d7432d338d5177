"""Writes the tables of docs/schedules.md and README.md from the records in docs/proof/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SHOWN = (
    *("fitted", "official, best of 12", "official", "taylor1, path", "taylor1", "dpmpp2m"),
    *("unipc", "ab2", "threshold", "euler", "euler, own grid"),
)
STANDINS = {"flux": "FLUX.1", "qwen_image": "Qwen-Image", "hunyuan_video": "HunyuanVideo"}


def main() -> None:
    """Replace what stands between the markers."""
    proofs = {name: _proof(f"fitted-schedules-{name}") for name in STANDINS}
    parts = {
        "tables": "\n".join(_table(name, proof) for name, proof in proofs.items()),
        "goals": _goals(proofs),
        "transfer": _transfer(_proof("transfer")),
        "precision": _precision(_proof("precision-transfer")),
        "cost": _cost(_proof("calibration-cost")),
    }
    _write(DOCS / "schedules.md", parts)
    _write(ROOT / "README.md", {"schedules": _overview(proofs)})


def _write(path: Path, parts: dict[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = _replaced(text, name, part)
    path.write_text(text, encoding="utf-8")


def _replaced(text: str, name: str, part: str) -> str:
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    head, rest = text.split(start)
    tail = rest.split(end)[-1] if end in rest else rest
    return f"{head}{start}\n{part}\n{end}{tail}"


def _proof(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "proof" / f"{name}.json").read_text())
    return found


def _overview(proofs: dict[str, dict[str, Any]]) -> str:
    """Mean and 5th percentile of the best known of each kind, at a few budgets."""
    kinds = {
        "fitted": "**fitted**",
        "official, best of 12": "official MeanCache, best of 12 variants",
        "taylor1": "Taylor forecast of order 1",
        "dpmpp2m": "DPM-Solver++(2M)",
        "euler, own grid": "Euler with B steps",
    }
    shown = [(name, budget) for name in proofs for budget in ("6", "10", "15")]
    lines = [
        _line("PSNR dB, mean / 5 %", *(f"{STANDINS[name]} B = {budget}" for name, budget in shown)),
        _line("---", *["---:"] * len(shown)),
    ]
    for method, title in kinds.items():
        cells = [proofs[name]["psnr_db"][method][budget] for name, budget in shown]
        lines.append(_line(title, *(f"{cell['mean']:.1f} / {cell['p5']:.1f}" for cell in cells)))
    return "\n".join(lines)


def _table(name: str, proof: dict[str, Any]) -> str:
    budgets = [str(budget) for budget in proof["budgets"]]
    lines = [
        f"### {STANDINS[name]}",
        "",
        _line("PSNR dB", *(f"B = {budget}" for budget in budgets)),
        _line("---", *["---:"] * len(budgets)),
    ]
    for method in SHOWN:
        cells = [proof["psnr_db"][method][budget] for budget in budgets]
        shown = [f"{c['mean']:.1f} / {c['p5']:.1f} / {c['worst']:.1f}" for c in cells]
        lines.append(_line(method, *shown))
    ahead = [proof["fitted_ahead_db"]["official, best of 12"][budget] for budget in budgets]
    shown = [f"{a['mean']:+.1f} ± {a['standard_error']:.1f}" for a in ahead]
    lines.append(_line("*fitted above the best official, ± s.e.*", *shown))
    return "\n".join(
        [*lines, "", f"[All methods, and the nodes](proof/fitted-schedules-{name}.json).", ""]
    )


def _goals(proofs: dict[str, dict[str, Any]]) -> str:
    lines = [
        _line("stand-in", "goal", "evaluations", "untouched prompts", "holds in draws"),
        _line(*["---"] * 5),
    ]
    for name, proof in proofs.items():
        for goal in proof["goals"]:
            kept = goal["held_out_db"]
            lines.append(
                _line(
                    STANDINS[name],
                    goal["goal"],
                    str(goal["budget"]),
                    f"{kept['mean']:.1f} / {kept['p5']:.1f} / {kept['worst']:.1f} dB",
                    f"{goal['held_in_draws']:.0%}",
                )
            )
    return "\n".join(lines)


def _transfer(record: dict[str, Any]) -> str:
    columns = [key for key in record["guidance_scales"][0] if key not in ("scale", "budget")]
    lines = [
        _line("guidance scale", "B", *columns),
        _line(*["---"] * (2 + len(columns))),
    ]
    for row in record["guidance_scales"]:
        cells = [f"{row[column]['mean']:.1f}" for column in columns]
        lines.append(_line(f"{row['scale']:g}", str(row["budget"]), *cells))
    lines += ["", _line("elsewhere", "B", *_ELSEWHERE), _line(*["---"] * (2 + len(_ELSEWHERE)))]
    for question, title in _QUESTIONS.items():
        for row in record[question]:
            cells = [f"{row[column]['mean']:.1f}" for column in _ELSEWHERE]
            lines.append(_line(title, str(row["budget"]), *cells))
    sizes = sorted({row["samples"] for row in record["samples"]})
    budgets = sorted({row["budget"] for row in record["samples"]})
    found = {(r["samples"], r["budget"]): r["new prompts"]["mean"] for r in record["samples"]}
    lines += [
        "",
        _line("calibration samples", *map(str, sizes)),
        _line(*["---"] * (1 + len(sizes))),
    ]
    for budget in budgets:
        lines.append(_line(f"B = {budget}", *(f"{found[size, budget]:.1f}" for size in sizes)))
    lines += ["", _line("B", "sum of the edges' errors", "final error"), _line(*["---"] * 3)]
    for row in record["edge_errors"]:
        cells = (f"{row['sum of edge errors']:.4f}", f"{row['final error']:.4f}")
        lines.append(_line(str(row["budget"]), *cells))
    return "\n".join(lines)


_ELSEWHERE = ("euler", "calibrated at the usual setting", "calibrated there")
_QUESTIONS = {
    "resolution": "96 x 96 pixels instead of 64 x 64",
    "steps": "against 28 steps instead of 50",
    "fine_reference": "against 200 steps instead of 50",
}


def _precision(record: dict[str, Any]) -> str:
    lines = [
        _line("stand-in", "noise floor", "B", *_PRECISIONS.values(), "difference ± s.e."),
        _line("---", "---:", "---:", *["---:"] * (1 + len(_PRECISIONS))),
    ]
    for name, proof in record["standins"].items():
        floor = _mean_and_p5(proof["noise_floor_db"])
        for row in proof["rows"]:
            cells = [_mean_and_p5(row[column]) for column in _PRECISIONS]
            gap = row["gain of fitting in float32, run in bfloat16"]
            shown = f"{gap['mean']:+.1f} ± {gap['standard_error']:.1f}"
            lines.append(_line(STANDINS[name], floor, str(row["budget"]), *cells, shown))
    return "\n".join(lines)


_PRECISIONS = {
    "fitted in float32, run in float32": "float32, on float32",
    "fitted in float32, run in bfloat16": "float32, on bfloat16",
    "fitted in bfloat16, run in bfloat16": "bfloat16, on bfloat16",
    "fitted in float32 and bfloat16, run in bfloat16": "recorded in float32, fitted on bfloat16",
}


def _mean_and_p5(cell: dict[str, float]) -> str:
    return f"{cell['mean']:.1f} / {cell['p5']:.1f}"


def _cost(record: dict[str, Any]) -> str:
    bake, memory = record["bake"], record["peak_memory_mb"]
    (few, less), (many, more) = memory.items()
    solve = "; ".join(
        f"T = {row['steps']}: {row['costs_seconds']:.2f} s for edges and their costs over "
        f"{row['samples']} samples, {row['paths_seconds']:.2f} s for the paths"
        for row in record["solve"]
    )
    return (
        f"A schedule of {bake['budget']} evaluations from {bake['samples']} samples of "
        f"{bake['steps']} steps takes {bake['network_evaluations']} network evaluations "
        f"({bake['evaluations_allowed']} would be all steps and every candidate in full), and "
        f"{bake['seconds_outside_the_network']:.1f} s outside the network. {solve}. Peak memory of "
        f"`calibrate`: {less:.0f} MB with {few} samples, {more:.0f} MB with {many}. Printed by "
        "`scripts/prove calibration-cost` on two cores of an Intel Xeon, which other jobs shared."
    )


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
