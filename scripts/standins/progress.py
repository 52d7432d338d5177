"""Time budgets, learning rates and running losses of the training scripts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Budget:
    """A wall-clock budget that counts steps and prints progress every `every_s` seconds.

    Time moves only in `tick`, so that every decision within a step sees the same time.
    """

    seconds: float
    clock: Callable[[], float] = time.monotonic
    every_s: float = 30.0
    steps: int = 0
    elapsed_s: float = 0.0
    _printed_s: float = 0.0

    def __post_init__(self) -> None:
        self._started = self.clock()

    @property
    def is_spent(self) -> bool:
        """Whether the time is over."""
        return self.elapsed_s >= self.seconds

    def rate(self, warmup_steps: int, flat: float = 0.3, floor: float = 0.02) -> float:
        """Learning-rate factor: linear warm-up, flat, then linear decay over elapsed time."""
        warm = min(1.0, (self.steps + 1) / warmup_steps)
        fraction = min(1.0, self.elapsed_s / self.seconds)
        decay = 1.0 if fraction < flat else max(floor, (1 - fraction) / (1 - flat))
        return warm * decay

    def tick(self, message: str) -> None:
        """Counts one step and prints `message` when it is due."""
        self.steps += 1
        self.elapsed_s = self.clock() - self._started
        if self.elapsed_s - self._printed_s >= self.every_s:
            self._printed_s = self.elapsed_s
            print(f"{self.elapsed_s:6.0f} s  step {self.steps:6d}  {message}", flush=True)


@dataclass
class RunningMean:
    """An exponential running mean of a loss."""

    decay: float = 0.98
    value: float = float("nan")

    def add(self, sample: float) -> None:
        """Folds one sample in."""
        is_first = self.value != self.value
        self.value = sample if is_first else self.decay * self.value + (1 - self.decay) * sample
