"""Fewer steps of a grid of their own: stock Euler, and diffusers' UniPC and DPM-Solver++.

The two multistep solvers feed the network whole timesteps, where the stock scheduler feeds
fractions, and converge to the exact flow and not to Euler's 50 steps: for them the comparison with
a fine integration is there too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from scripts.rivals.rival import Rival
from scripts.rivals.subject import Subject

BUDGETS = (5, 6, 8, 10, 12, 15, 20, 25)
ORDERS = {2: BUDGETS, 3: (5, 8, 12, 20)}
SOLVERS = {"UniPC": UniPCMultistepScheduler, "DPM-Solver++": DPMSolverMultistepScheduler}


def rivals() -> Iterator[Rival]:
    """Every solver at every budget, one evaluation a step."""
    for budget in BUDGETS:
        yield Rival("Euler, own grid", f"{budget} steps", partial(_euler, budget))
    for name, solver in SOLVERS.items():
        for order, budgets in ORDERS.items():
            for budget in budgets:
                applied = partial(_multistep, solver, order, budget)
                yield Rival(f"{name}, order {order}", f"{budget} steps", applied)


@contextlib.contextmanager
def _euler(budget: int, _subject: Subject) -> Iterator[int]:
    yield budget


@contextlib.contextmanager
def _multistep(solver: Any, order: int, budget: int, subject: Subject) -> Iterator[int]:
    with subject.scheduler(flow_solver(solver, order, subject.pipeline.scheduler)):
        yield budget


def flow_solver(solver: Any, order: int, stock: Any) -> Any:
    """`solver` on the flow of a pipeline whose flow-matching Euler scheduler is `stock`.

    Without `prediction_type` it would take the velocity for noise, and diverge without a word.
    Pipelines hand over `mu`, which DPM-Solver++ takes with dynamic shifting only: a static shift s
    becomes the μ = ln s of every resolution.
    """
    # Without the list of defaults, for which the other class's own would be taken.
    config = {key: value for key, value in stock.config.items() if key != "_use_default_values"}
    is_static = not config["use_dynamic_shifting"]
    if is_static and solver is DPMSolverMultistepScheduler:
        mu = math.log(config["shift"])
        config |= {"use_dynamic_shifting": True, "base_shift": mu, "max_shift": mu}
    return solver.from_config(
        config,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=config["shift"],
        solver_order=order,
    )
