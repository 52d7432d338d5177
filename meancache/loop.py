"""The denoising loop: B times (network, update), with every address fixed beforehand.

    v_n = network(x, timestep_n, conditioning)
    x   = x + Σ_j weights[n][j] · v_{n−j}

A model of two transformers has both in one loop: each node is bound to the network that its
schedule row names. They are halves of one velocity field, so that latent and history go on across
the boundary, as they do where a diffusers pipeline has one scheduler step with both velocities.

Under classifier-free guidance the network runs once on twice the batch, and the update graph makes
one velocity of the two and copies the next latent for both halves.

The latent ping-pongs between two tensors. The velocity of node n goes to slot n mod H of H
rotating tensors, and the update of each node is bound to the slots in order of age, so that no
history is ever copied. Where a row reads less history, a tensor of zeros is bound that nothing
writes: NaN left by a failed image cannot reach the next one through a zero weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from meancache_trt.errors import RenderError
from meancache_trt.meancache.runtime import Call, Graph, Runtime, Tensor
from meancache_trt.meancache.schedule import Schedule

_MODEL_INPUT = "model_input"  # an output of update graphs that guide

OnEvaluation = Callable[[int, int], None]
"""(evaluations done, B), called after each evaluation; an exception raised in it cancels."""


@dataclass(frozen=True)
class Network:
    """A transformer graph and the names of what the loop itself feeds and reads.

    The network is fed `timestep_scale` x the scheduler's timestep, multiplied in float64 and
    rounded to float32, one for each of its samples. `update_constants` are what the updates that
    follow it are bound with: a tensor for every input of the update graph that the loop does not
    make (the guidance scale, where the update guides).
    """

    graph: Graph
    latent: str
    timestep: str
    output: str
    timestep_scale: float
    update_constants: Mapping[str, Tensor] = field(default_factory=dict)


class DenoisingLoop:
    """One schedule at one shape: all memory is allocated and bound at construction.

    Fill `initial` (and `initial_input` where that is another tensor), call `run`, read `result`.
    Not thread-safe: one loop runs one batch at a time.

    Args:
        runtime: owns all tensors; must outlive the loop.
        networks: those of `schedule.transformers()`, by name.
        update: the update graph, with room for at least the schedule's history.
        schedule: what to evaluate and how to move.
        latent_shape: packed latent with its batch, such as (batch, tokens, channels).
        constants: a tensor for every other input of the networks (conditioning, guidance scale,
            position tables), which have the same ones. The caller may write to them between runs,
            as to the networks' `update_constants`.

    Attributes:
        initial: where the loop starts from, float32 of `latent_shape`; the run overwrites it.
        initial_input: what the first evaluation reads: `initial` itself or, where the update
            graph gives the `model_input` of the next evaluation, a tensor with `initial` twice.
        final: where the result is after `run`.
    """

    def __init__(
        self,
        runtime: Runtime,
        networks: Mapping[str, Network],
        update: Graph,
        *,
        schedule: Schedule,
        latent_shape: tuple[int, ...],
        constants: Mapping[str, Tensor],
    ) -> None:
        self.schedule = schedule
        self._runtime = runtime
        self._latents = [runtime.zeros(latent_shape, "float32") for _ in range(2)]
        self.initial = self._latents[0]
        self.final = self._latents[schedule.budget % 2]
        self.initial_input = self.initial
        if _MODEL_INPUT in update.outputs:
            twice = (2 * latent_shape[0], *latent_shape[1:])
            self.initial_input = runtime.zeros(twice, "float32")
        history = _history_of(update)
        self._velocities = [runtime.zeros(latent_shape, "float32") for _ in range(history)]
        evaluations = self._bind_evaluations(networks, update, constants)
        self._evaluations = [runtime.sequence(pair) for pair in evaluations]
        self._all = runtime.sequence(list(itertools.chain.from_iterable(evaluations)))

    def run(self, on_evaluation: OnEvaluation | None = None) -> None:
        """Integrate from `initial` to `final`.

        Without a callback nothing is read back and nothing waits; the work may be under way when
        this returns. With one, each evaluation is waited for.
        """
        if on_evaluation is None:
            with self._runtime.turn():
                self._all.enqueue()
            return
        for done, evaluation in enumerate(self._evaluations, start=1):
            with self._runtime.turn():
                evaluation.enqueue()
            self._runtime.synchronize()
            on_evaluation(done, self.schedule.budget)

    def evaluate(self, node: int, latent: NDArray[np.float32]) -> NDArray[np.float32]:
        """The velocity at `latent` and the timestep of a node, after guidance; waits.

        Both are float32 of `latent_shape`. Latents and history of a run are lost.
        """
        self._latents[node % 2].write(latent)
        if self.initial_input is not self.initial:
            self.initial_input.write(np.concatenate([latent, latent]))
        self._evaluations[node].enqueue()
        return self._velocities[node % len(self._velocities)].read()

    def result(self) -> NDArray[np.float32]:
        """The final latent, float32; waits. Raises `RenderError` where it is not finite."""
        latent = self.final.read()
        check_finite(latent)
        return latent

    def _bind_evaluations(
        self, networks: Mapping[str, Network], update: Graph, constants: Mapping[str, Tensor]
    ) -> list[tuple[Call, Call]]:
        runtime, shape, input_shape = self._runtime, self.initial.shape, self.initial_input.shape
        velocities, history = self._velocities, len(self._velocities)
        rows = self.schedule.table(history)
        output = runtime.zeros(input_shape, "float32")
        zeros = runtime.zeros(shape, "float32")
        # One tensor serves all: an update writes it when the network call before has read it.
        copies = {_MODEL_INPUT: self.initial_input} if _MODEL_INPUT in update.outputs else {}
        calls = []
        parts = self.schedule.transformers()
        for node, timestep in enumerate(self.schedule.timesteps()):
            network = networks[parts[node]]
            here, there = self._latents[node % 2], self._latents[(node + 1) % 2]
            fed = np.full(input_shape[0], float(timestep) * network.timestep_scale, np.float32)
            evaluate = network.graph.bind(
                {
                    **constants,
                    network.latent: copies.get(_MODEL_INPUT, here),
                    network.timestep: runtime.tensor(fed),
                    network.output: output,
                }
            )
            used = len(self.schedule.weights[node])
            past = {
                f"history_{age}": velocities[(node - age) % history] if age < used else zeros
                for age in range(1, history)
            }
            move = update.bind(
                {
                    **network.update_constants,
                    **past,
                    **copies,
                    "latent": here,
                    "model_output": output,
                    "weights": runtime.tensor(rows[node]),
                    "next_latent": there,
                    "velocity": velocities[node % history],
                }
            )
            calls.append((evaluate, move))
        return calls


def check_finite(latent: NDArray[np.float32]) -> None:
    """Raise `RenderError` where a final latent is not finite."""
    if not np.isfinite(latent).all():
        raise RenderError(
            "the latent is not finite after the last evaluation, so no picture was made; the "
            "network overflowed or its weights are damaged. Check the bundle with "
            "`meancache-trt inspect --verify`, and the prompt and guidance scale"
        )


def _history_of(update: Graph) -> int:
    (size,) = update.inputs["weights"].shape
    if not isinstance(size, int):
        raise RenderError(f"the update graph has a fixed number of weights, found {size!r}")
    return size
