"""How far a run is: what progress lines, metrics and the summary are made of."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Snapshot:
    """How far a run is. `earlier` were done before it began; `done` and `failed` are its own.

    `others` were done meanwhile by other processes. `busy` is the share of a stage's threads' time
    in which they worked, `waiting` the items before it.
    """

    jobs: int
    earlier: int
    done: int
    failed: int
    others: int
    elapsed_s: float
    busy: dict[str, float] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)
    is_stopped: bool = False

    @property
    def left(self) -> int:
        """Jobs that nobody has finished or failed yet."""
        return max(self.jobs - self.earlier - self.done - self.failed - self.others, 0)

    @property
    def pictures_per_s(self) -> float:
        """Of this process, since it began."""
        return self.done / self.elapsed_s if self.elapsed_s else 0.0
