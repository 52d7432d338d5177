"""EngineTransformer called as the diffusers modules are: what it answers, and what it refuses."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from meancache_trt.bundle import Bundle
from meancache_trt.engine_transformer import EngineTransformer
from meancache_trt.errors import BundleError, InputError
from tests.engine_transformer.subjects import (
    CALLS,
    Subject,
    assert_equal_velocities,
    flux_call,
    hunyuan_call,
    mask,
    qwen_call,
    random,
    sd3_call,
    z_image_call,
)
from tests.numpy_runtime import Arrays


@pytest.mark.parametrize("size", [(1, 2, 5, 7), (2, 9, 4, 13), (3, 3, 3, 3)], ids=str)
@pytest.mark.parametrize("family", CALLS)
def test_forward_is_the_modules_at_any_size_and_batch(
    family: str, size: tuple[int, int, int, int], request: pytest.FixtureRequest
) -> None:
    assert_equal_velocities(request.getfixturevalue(family), CALLS[family](*size))


def test_ids_that_text_to_image_does_not_have_are_followed(flux: Subject) -> None:
    call = flux_call(2, 3, 4, 5)
    ordinary = assert_equal_velocities(flux, call)
    # a second picture to look at, as editing has it, beginning elsewhere; and text that is numbered
    call["img_ids"] = call["img_ids"] + torch.tensor([1.0, 20.0, 3.5])
    call["txt_ids"] = torch.arange(15.0).reshape(5, 3)
    assert (assert_equal_velocities(flux, call) - ordinary).abs().max() > 1e-2
    batched = {**call, "img_ids": call["img_ids"][None].expand(2, -1, -1)}
    (found,) = flux.engine()(**batched, return_dict=False)
    (expected,) = flux.engine()(**call, return_dict=False)
    assert torch.equal(found, expected)


def test_several_pictures_a_sample_are_followed(qwen: Subject) -> None:
    call = {**qwen_call(2, 4, 5, 6), "img_shapes": [[(1, 3, 4), (2, 2, 2)]] * 2}
    other = assert_equal_velocities(qwen, call)
    call["img_shapes"] = [(1, 4, 5)] * 2
    assert (assert_equal_velocities(qwen, call) - other).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_text_masks_of_any_kind_are_followed(qwen: Subject, dtype: torch.dtype) -> None:
    call = qwen_call(2, 3, 4, 8)
    unmasked = assert_equal_velocities(qwen, call)
    call["encoder_hidden_states_mask"] = mask([8, 3], 8).to(dtype)
    masked = assert_equal_velocities(qwen, call)
    differs = (masked - unmasked).abs().amax(dim=(1, 2)) > 1e-3
    assert differs.tolist() == [False, True]


@pytest.mark.parametrize("family", CALLS)
def test_tables_of_the_pipelines_positions_are_the_prepare_graphs_bit_for_bit(
    family: str, request: pytest.FixtureRequest
) -> None:
    subject, call = request.getfixturevalue(family), CALLS[family](2, 4, 6, 9)
    export = subject.bundle.export
    wrapper, component = subject.engine()._wrapper, export.components["prepare"]
    tables = wrapper.position_tables(
        {"transformer": subject.engine().config}, *wrapper.positions(call)
    )
    noise = {
        "flux": (2, 4, 8, 12),
        "qwen": (1, 1, 4, 8, 12),
        "hunyuan": (2, 4, 3, 8, 12),
        "z_image": (1, 4, 8, 12),
        "sd3": (1, 16, 8, 12),
        "flux2": (2, 16, 4, 6),
        "wan": (2, 4, 3, 8, 12),
    }
    given = {
        "noise": random(*noise[family]),
        "encoder_hidden_states": random(2, 9, 48),
        "encoder_hidden_states_mask": mask([9, 39], 39),
    }
    expected = run_graph(subject.bundle, {name: given[name].numpy() for name in component.inputs})
    assert tables.keys() <= expected.keys()
    for name, table in tables.items():
        assert np.array_equal(table.numpy(), expected[name]), name


def run_graph(bundle: Bundle, feeds: Arrays) -> Arrays:
    import onnxruntime  # noqa: PLC0415

    component = bundle.export.components["prepare"]
    session = onnxruntime.InferenceSession(bundle.component_path(component))
    return dict(zip(component.outputs, session.run(list(component.outputs), feeds), strict=True))


def test_it_is_called_and_answers_as_the_module(flux: Subject) -> None:
    engine, network, call = flux.engine(), flux.pipeline.transformer, flux_call(1, 2, 3, 4)
    positional = [
        call.get(name) for name in list(inspect.signature(network.forward).parameters)[:7]
    ]
    wrapped = engine(*positional)
    assert isinstance(wrapped, Transformer2DModelOutput)
    (bare,) = engine.forward(**call, return_dict=False)
    assert torch.equal(wrapped.sample, bare)
    neutral: dict[str, Any] = {"joint_attention_kwargs": {}, "controlnet_block_samples": None}
    assert torch.equal(engine(**call, **neutral).sample, bare)


@pytest.mark.parametrize("family", CALLS)
def test_configuration_is_the_modules(family: str, request: pytest.FixtureRequest) -> None:
    subject = request.getfixturevalue(family)
    engine, network = subject.engine(), subject.pipeline.transformer
    plain = {name: value for name, value in network.config.items() if not name.startswith("_")}
    assert {name: as_list(engine.config[name]) for name in plain} == {
        name: as_list(value) for name, value in plain.items()
    }
    assert engine.config.in_channels == network.config.in_channels
    assert (engine.dtype, engine.device) == (network.dtype, network.device)
    with engine.cache_context("cond", step_index=0, sigma=1.0):
        pass


def as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # JSON has no tuples


@pytest.mark.parametrize(
    "extra",
    [
        {"joint_attention_kwargs": {"scale": 0.5}},
        {"joint_attention_kwargs": {"ip_adapter_image_embeds": [random(1, 4)]}},
        {"controlnet_block_samples": [random(1, 12, 64)]},
        {"controlnet_single_block_samples": [random(1, 12, 64)]},
        {"controlnet_blocks_repeat": True},
    ],
    ids=str,
)
def test_what_acts_inside_the_network_is_refused(flux: Subject, extra: dict[str, Any]) -> None:
    (name,) = extra
    with pytest.raises(InputError, match=f"not followed {name}; for LoRA scales, ControlNet"):
        flux.engine()(**flux_call(1, 3, 4, 5), **extra)


@pytest.mark.parametrize("name", ["skip_layers", "block_controlnet_hidden_states"])
def test_layers_are_neither_skipped_nor_added_to(sd3: Subject, name: str) -> None:
    extra: dict[str, Any] = {name: [1]}
    with pytest.raises(InputError, match=f"not followed {name}"):
        sd3.engine()(**sd3_call(1, 3, 4, 5), **extra)


def test_a_latent_that_the_positions_do_not_cover_is_refused(sd3: Subject) -> None:
    with pytest.raises(InputError, match=r"at most 48 x 48, .* found 50 x 8"):
        sd3.engine()(**sd3_call(1, 25, 4, 5))


def test_a_guidance_that_the_graph_does_not_have_is_refused(qwen: Subject) -> None:
    with pytest.raises(InputError, match="not followed guidance"):
        qwen.engine()(**qwen_call(1, 3, 4, 5), guidance=torch.tensor([3.5]))


def test_a_guidance_that_the_module_ignores_is_ignored(hunyuan: Subject) -> None:
    wrapper = hunyuan.engine()._wrapper
    call = hunyuan_call(1, 3, 4, 5)
    without = wrapper.graph_inputs({"transformer": {"guidance_embeds": False}}, call)
    assert call.keys() - without.keys() == {"guidance"}


@pytest.mark.parametrize("name", ["guidance", "img_ids", "encoder_hidden_states", "hidden_states"])
def test_what_is_missing_is_named(flux: Subject, name: str) -> None:
    with pytest.raises(InputError, match=f"missing {name}, not followed nothing"):
        flux.engine()(**{**flux_call(1, 3, 4, 5), name: None})


def test_a_pipeline_of_another_family_is_told(flux: Subject, qwen: Subject) -> None:
    with pytest.raises(
        InputError, match=r"as a FluxTransformer2DModel: .*img_shapes.*FluxPipeline"
    ):
        flux.engine()(**qwen_call(1, 3, 4, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": random(1, 11, 16)}, r"image_rope has shape \(12, 64\).*'image_tokens'"),
        ({"hidden_states": random(2, 12, 16)}, r"has shape \(1, .*'batch': 2"),
        ({"hidden_states": random(12, 16)}, r"hidden_states has shape \(12, 16\), expected"),
        ({"pooled_projections": random(1, 41)}, r"has shape \(1, 41\), expected \('batch', 40\)"),
        ({"timestep": 0.5}, "timestep is a tensor, found float"),
        ({"hidden_states": random(1, 12, 16).requires_grad_()}, r"gradient.*torch\.no_grad"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    flux: Subject, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        flux.engine()(**{**flux_call(1, 3, 4, 5), **changes})


@pytest.mark.parametrize(
    "pictures",
    [
        [random(4, 1, 6, 8), random(4, 1, 8, 6)],
        [random(4, 2, 6, 8)] * 2,
        [[random(4, 1, 6, 8)]] * 2,
    ],
    ids=["sizes", "frames", "editing"],
)
def test_lists_that_the_graph_cannot_follow_are_refused(z_image: Subject, pictures: Any) -> None:
    with pytest.raises(InputError, match=r"latents \(C, 1, Hl, Wl\) of one size"):
        z_image.engine()(**{**z_image_call(2, 3, 4, 5), "x": pictures})


def test_another_patch_and_pictures_to_look_at_are_refused(z_image: Subject) -> None:
    call = z_image_call(1, 3, 4, 5)
    for extra in ({"patch_size": 4}, {"siglip_feats": [[random(4, 8)]]}):
        with pytest.raises(InputError, match=f"not followed {next(iter(extra))}"):
            z_image.engine()(**call, **extra)


def test_pictures_of_different_sizes_in_a_batch_are_refused(qwen: Subject) -> None:
    call = {**qwen_call(2, 3, 4, 5), "img_shapes": [[(1, 3, 4)], [(1, 4, 3)]]}
    with pytest.raises(InputError, match="pictures of one size"):
        qwen.engine()(**call)


def test_a_directory_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="expected a bundle"):
        EngineTransformer.load(tmp_path)


def test_a_bundle_is_loaded_from_its_directory(flux: Subject) -> None:
    call = flux_call(1, 3, 4, 5)
    with EngineTransformer.load(flux.bundle.directory, threads=1) as engine:
        found = engine(**call).sample
    assert torch.equal(found, flux.engine()(**call).sample)
