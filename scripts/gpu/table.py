"""A record as Markdown, for people."""

from __future__ import annotations

from collections.abc import Iterable

from scripts.gpu.record import Check, Record

_HEAD = ("check", "backend", "of", "value", "bound", "verdict", "")
_REHEARSAL = (
    "**A rehearsal**: ONNX Runtime on the CPU stood in the place of the GPU. Nothing here was "
    "measured on a GPU."
)


def markdown(record: Record) -> str:
    """The whole record: what it is of, a table a slice, and what was skipped and why."""
    subject = record.subject
    versions = ", ".join(f"{name} {version}" for name, version in subject.versions.items())
    lines = [
        f"# {subject.gpu}",
        "",
        *([_REHEARSAL, ""] if record.is_rehearsal else []),
        f"Compute capability {subject.compute_capability}, driver for CUDA "
        f"{subject.cuda_version}; {versions}; commit {subject.commit}.",
    ]
    for name, part in record.parts.items():
        lines += ["", f"## {name}", "", f"{part.started_at}, {part.seconds:.0f} s", ""]
        seen = [check for check in part.checks if check.verdict != "skipped"]
        lines += [*_table(seen), *_skipped(part.checks), *_reasons(seen)]
    return "\n".join(lines) + "\n"


def line(check: Check) -> str:
    """A check in one line, for a terminal."""
    where = " ".join(filter(None, (check.backend, check.subject)))
    note = " ".join(check.note.split())
    return f"{check.verdict:8} {where}: {check.name} {_value(check)} {note}".rstrip()


def _table(checks: Iterable[Check]) -> list[str]:
    rows = [
        (
            *(check.name, check.backend, check.subject, _value(check), _bound(check)),
            *(check.verdict, " ".join(check.note.split()).replace("|", "/")),
        )
        for check in checks
    ]
    if not rows:
        return []
    return [f"| {' | '.join(row)} |" for row in (_HEAD, ("---",) * len(_HEAD), *rows)]


def _skipped(checks: Iterable[Check]) -> list[str]:
    names: dict[str, list[str]] = {}
    for check in checks:
        if check.verdict == "skipped":
            where = " ".join(filter(None, (check.name, check.backend, check.subject)))
            names.setdefault(check.note, []).append(where)
    lines = [f"- {'; '.join(whats)}: {why}" for why, whats in names.items()]
    return ["", "Skipped:", "", *lines] if lines else []


def _reasons(checks: Iterable[Check]) -> list[str]:
    reasons = {(check.name, check.reason) for check in checks if check.reason}
    lines = [f"- {name}: {reason}" for name, reason in sorted(reasons)]
    return ["", "Why these bounds:", "", *lines] if lines else []


def _value(check: Check) -> str:
    return "" if check.value is None else f"{check.value:.4g} {check.unit}".strip()


def _bound(check: Check) -> str:
    if check.bound is None:
        return ""
    return f"{'≥' if check.is_lower else '≤'} {check.bound:.4g}"
