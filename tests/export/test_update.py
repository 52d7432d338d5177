from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from meancache_trt.errors import ExportError
from meancache_trt.export.update import HISTORIES, update_graph, update_signature
from meancache_trt.manifest import GuidanceRule, TensorRecord

LATENT = TensorRecord("float32", ("batch", "image_tokens", 16), "latent")


def run(rule: GuidanceRule, history: int, feeds: dict[str, Any]) -> list[NDArray[np.float32]]:
    model = update_graph(rule, update_signature(rule, LATENT, history), opset=20)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found: list[NDArray[np.float32]] = session.run(["next_latent", "velocity"], feeds)
    return found


def feeds(history: int, batch: int = 2, tokens: int = 5) -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(history)
    names = ["latent", "model_output", *(f"history_{age}" for age in range(1, history))]
    made = {name: generator.standard_normal((batch, tokens, 16)) for name in names}
    made["weights"] = generator.standard_normal(history)
    return {name: value.astype(np.float32) for name, value in made.items()}


@pytest.mark.parametrize("history", HISTORIES)
def test_update_adds_the_weighted_velocities(history: int) -> None:
    given = feeds(history)
    exact = {name: value.astype(np.float64) for name, value in given.items()}
    velocities = [exact["model_output"], *(exact[f"history_{age}"] for age in range(1, history))]
    weighted = (w * v for w, v in zip(exact["weights"], velocities, strict=True))
    expected = exact["latent"] + sum(weighted)

    next_latent, velocity = run("embedded", history, given)

    # float32 rounding of at most 17 terms of magnitude below 10
    np.testing.assert_allclose(next_latent, expected, rtol=0, atol=17 * 10 * 2**-24)
    assert np.array_equal(velocity, given["model_output"])


@pytest.mark.parametrize("history", HISTORIES)
def test_update_with_one_weight_is_bitwise_an_euler_step(history: int) -> None:
    given = feeds(history, batch=1, tokens=64)
    given["weights"][1:] = 0
    sample, output = torch.from_numpy(given["latent"]), torch.from_numpy(given["model_output"])
    step = torch.tensor(given["weights"][0])

    next_latent, _ = run("none", history, given)

    assert np.array_equal(next_latent, (sample + step * output).numpy())


def test_classifier_free_guidance_extrapolates_each_sample_by_its_own_scale() -> None:
    given = feeds(4)
    generator = np.random.default_rng(0)
    outputs = generator.standard_normal((4, 5, 16)).astype(np.float32)
    scale = np.array([1.5, 4.0], dtype=np.float32)
    conditional, unconditional = np.split(outputs.astype(np.float64), 2)
    guided = unconditional + scale[:, None, None] * (conditional - unconditional)
    history = [given[f"history_{age}"].astype(np.float64) for age in (1, 2, 3)]
    velocities = [guided, *history]
    steps = (float(w) * v for w, v in zip(given["weights"], velocities, strict=True))

    next_latent, velocity = run(
        "classifier_free", 4, {**given, "model_output": outputs, "guidance_scale": scale}
    )

    tolerance = 5 * 20 * 2**-24  # float32 rounding of five terms of magnitude below 20
    np.testing.assert_allclose(velocity, guided, rtol=0, atol=tolerance)
    np.testing.assert_allclose(next_latent, given["latent"] + sum(steps), rtol=0, atol=tolerance)


def test_classifier_free_guidance_at_scale_one_is_the_conditional_velocity() -> None:
    given = feeds(4, batch=1)
    same = np.concatenate([given["model_output"]] * 2)
    scale = np.ones(1, dtype=np.float32)

    _, velocity = run(
        "classifier_free", 4, {**given, "model_output": same, "guidance_scale": scale}
    )

    assert np.array_equal(velocity, given["model_output"])


def test_guidance_from_the_conditional_velocity_is_the_arithmetic_of_the_z_image_pipeline() -> None:
    given = rescaled_feeds(4.0)
    pos, neg = torch.from_numpy(given["model_output"]).chunk(2)
    _, velocity = run("classifier_free_from_conditional", 4, given)
    assert np.array_equal(velocity, (pos + 4.0 * (pos - neg)).numpy())
    _, unguided = run("classifier_free_from_conditional", 4, rescaled_feeds(0.0))
    assert np.array_equal(unguided, pos.numpy())


def rescaled_feeds(scale: float) -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(7)
    outputs = generator.standard_normal((4, 5, 16)).astype(np.float32)
    scales = np.full(2, scale, np.float32)
    return {**feeds(4), "model_output": outputs, "guidance_scale": scales}


def test_rescaled_guidance_gives_each_token_the_length_of_its_conditional_velocity() -> None:
    given = rescaled_feeds(4.0)
    exact = {name: value.astype(np.float64) for name, value in given.items()}
    conditional, unconditional = np.split(exact["model_output"], 2)
    guided = unconditional + 4.0 * (conditional - unconditional)
    lengths = (np.sqrt((v**2).sum(-1, keepdims=True)) for v in (conditional, guided))
    expected = guided * next(lengths) / next(lengths)
    velocities = [expected, *(exact[f"history_{age}"] for age in (1, 2, 3))]
    steps = (w * v for w, v in zip(exact["weights"], velocities, strict=True))

    next_latent, velocity = run("classifier_free_rescaled", 4, given)

    tolerance = 20 * 20 * 2**-24  # float32 rounding of some twenty terms of magnitude below 20
    np.testing.assert_allclose(velocity, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(next_latent, exact["latent"] + sum(steps), rtol=0, atol=tolerance)


def test_rescaled_guidance_is_the_arithmetic_of_the_qwen_image_pipeline() -> None:
    given = rescaled_feeds(4.0)
    noise_pred, neg_noise_pred = torch.from_numpy(given["model_output"]).chunk(2)
    comb_pred = neg_noise_pred + 4.0 * (noise_pred - neg_noise_pred)
    cond_norm = torch.norm(noise_pred, dim=-1, keepdim=True)
    noise_norm = torch.norm(comb_pred, dim=-1, keepdim=True)

    _, velocity = run("classifier_free_rescaled", 4, given)

    # the same operations in float32; only the norms add sixteen squares in another order
    expected = comb_pred * (cond_norm / noise_norm)
    np.testing.assert_allclose(velocity, expected.numpy(), rtol=4 * 2**-23, atol=0)


@pytest.mark.parametrize(
    "rule",
    ["classifier_free", "classifier_free_rescaled", "classifier_free_from_conditional"],
)
def test_guiding_update_gives_the_next_model_input_for_both_halves(rule: GuidanceRule) -> None:
    signature = update_signature(rule, LATENT, 4)
    model = update_graph(rule, signature, opset=20)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    outputs = session.run(list(signature.outputs), rescaled_feeds(3.0))
    made = dict(zip(signature.outputs, outputs, strict=True))
    assert signature.outputs["model_input"].shape == ("two_batch", "image_tokens", 16)
    assert np.array_equal(made["model_input"], np.concatenate([made["next_latent"]] * 2))


@pytest.mark.parametrize("rule", ["embedded", "none"])
def test_update_without_guidance_leaves_the_model_input_to_the_loop(rule: GuidanceRule) -> None:
    assert list(update_signature(rule, LATENT, 4).outputs) == ["next_latent", "velocity"]


@pytest.mark.parametrize("history", [-1, 0])
def test_update_graph_rejects_a_history_without_room(history: int) -> None:
    with pytest.raises(ExportError, match="at least 1"):
        update_graph("none", update_signature("none", LATENT, history), opset=20)
