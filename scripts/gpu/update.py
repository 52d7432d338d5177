"""The update graph alone against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scripts.gpu import bounds
from scripts.gpu.bench import Pair
from scripts.gpu.record import Check, judged

from meancache_trt.manifest import Component, GuidanceRule, batch_symbols, is_classifier_free

Arrays = dict[str, NDArray[Any]]
_HISTORY = 4


def update_equals_numpy(pair: Pair) -> Check:
    """One move of a batch of two with all of a history of four, of random numbers."""
    export = pair.tested.bundle.export
    component = export.update_for(_HISTORY)
    feeds = _feeds(component, {**export.resolution.symbols, **batch_symbols(2)})
    runtime = pair.tested.runtime
    inputs = {name: runtime.tensor(value) for name, value in feeds.items()}
    expected = _moved(feeds, export.guidance.rule)
    outputs = {
        name: runtime.zeros(_shape_of(name, expected), record.dtype)
        for name, record in component.outputs.items()
    }
    pair.tested.graphs.graph(component).bind({**inputs, **outputs}).enqueue()
    runtime.synchronize()
    found = outputs["next_latent"].read().astype(np.float64)
    unit = np.spacing(np.float32(np.abs(expected["largest"]).max()))
    ulps = float(np.abs(found - expected["next_latent"]).max() / unit)
    bound = bounds.UPDATE_ULPS
    value = bound.value * _HISTORY
    return judged("update against NumPy", ulps, value, unit="ulp", reason=bound.reason)


def _feeds(component: Component, sizes: dict[str, int]) -> Arrays:
    generator = np.random.default_rng(0)
    return {
        name: generator.standard_normal(record.resolved(sizes)).astype(record.dtype)
        for name, record in component.inputs.items()
    }


def _shape_of(name: str, expected: Arrays) -> tuple[int, ...]:
    latent = expected["next_latent"].shape
    return (2 * latent[0], *latent[1:]) if name == "model_input" else latent


def _moved(feeds: Arrays, rule: GuidanceRule) -> Arrays:
    """`next_latent`, and the largest of the sums on the way there, in float64."""
    feeds = {name: value.astype(np.float64) for name, value in feeds.items()}
    velocities = [_guided(feeds, rule)]
    ages = range(1, len(feeds["weights"]))
    velocities += [feeds[f"history_{age}"] for age in ages]
    total = largest = feeds["latent"]
    for weight, velocity in zip(feeds["weights"], velocities, strict=True):
        total = total + weight * velocity
        largest = np.maximum(np.abs(largest), np.abs(total))
    return {"next_latent": total, "largest": largest}


def _guided(feeds: Arrays, rule: GuidanceRule) -> NDArray[np.float64]:
    output: NDArray[np.float64] = feeds["model_output"]
    if not is_classifier_free(rule):
        return output
    conditional, unconditional = np.split(output, 2)
    scale = feeds["guidance_scale"].reshape(-1, *[1] * (conditional.ndim - 1))
    origin = conditional if rule == "classifier_free_from_conditional" else unconditional
    guided = origin + scale * (conditional - unconditional)
    if rule != "classifier_free_rescaled":
        return guided
    wanted, found = (np.linalg.norm(each, axis=-1, keepdims=True) for each in (conditional, guided))
    rescaled: NDArray[np.float64] = guided * wanted / found
    return rescaled
