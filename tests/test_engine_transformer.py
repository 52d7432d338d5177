"""EngineTransformer in unmodified diffusers pipelines, against the pipelines' own transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    QwenImageImg2ImgPipeline,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from PIL import Image

from meancache_trt.bundle import Bundle, create_bundle
from meancache_trt.engine.onnxruntime import HostTensor, OnnxRuntime
from meancache_trt.engine_transformer import EngineTransformer
from meancache_trt.errors import BundleError, InputError
from meancache_trt.export import export_components, flux_torch, graphs
from meancache_trt.export.job import Job
from meancache_trt.manifest import Component
from meancache_trt.meancache.diffusers_scheduler import MeanCacheScheduler
from meancache_trt.meancache.runtime import Graph, TensorSpec
from meancache_trt.meancache.schedule import bake
from meancache_trt.meancache.sigmas import make_grid
from tests.export import tiny_flux, tiny_hunyuan_video, tiny_qwen_image
from tests.numpy_runtime import Arrays, FunctionGraph, NumpyRuntime

HEIGHT, WIDTH, STEPS = 32, 48, 6

VELOCITY_TOLERANCE = 1e-5
"""Float32 kernels unlike torch's, on velocities near 1; measured 1e-6, and the issue asks for 1e-4.
"""

LATENT_TOLERANCE = 2e-5
"""Six such evaluations, guidance over their differences among them; measured 2e-6. The issue asks
for 1e-3."""


@dataclass(frozen=True)
class Subject:
    """A diffusers pipeline and a bundle of its transformer."""

    pipeline: Any
    bundle: Bundle

    def engine(self) -> EngineTransformer:
        return EngineTransformer(self.bundle)


def made(pipeline: Any, root: Path, **size: int) -> Subject:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(root / "checkpoint")

    def fill(target: Path) -> Any:
        return export_components(
            root / "checkpoint", target, height=32, width=32, check_parity=False, **size
        )

    write_graphs = graphs.write_graphs

    def up_to_the_transformer(job: Job) -> Iterator[tuple[str, Component]]:
        """Without the decoder and what follows it, which takes most of the time."""
        for name, component in write_graphs(job):
            yield name, component
            if name == "transformer":
                return

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "write_graphs", up_to_the_transformer)
        return Subject(pipeline, create_bundle(root / "tiny.mcb", fill, {}))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    root = tmp_path_factory.mktemp("flux")
    return made(tiny_flux.tiny_pipeline(), root, text_tokens=tiny_flux.TEXT_TOKENS)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return made(tiny_qwen_image.tiny_pipeline(), tmp_path_factory.mktemp("qwen"), text_tokens=9)


@pytest.fixture(scope="module")
def hunyuan(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    root = tmp_path_factory.mktemp("hunyuan")
    return made(tiny_hunyuan_video.tiny_pipeline(), root, text_tokens=9, frames=5)


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    found: Subject = request.getfixturevalue(request.param)
    return found


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mask(lengths: list[int], tokens: int) -> torch.Tensor:
    return torch.arange(tokens) < torch.tensor(lengths)[:, None]


def flux_call(batch: int, rows: int, columns: int, text: int) -> dict[str, Any]:
    ids = FluxPipeline._prepare_latent_image_ids(batch, rows, columns, "cpu", torch.float32)
    return {
        "hidden_states": random(batch, rows * columns, 16),
        "encoder_hidden_states": random(batch, text, 48, seed=1),
        "pooled_projections": random(batch, 40, seed=2),
        "timestep": torch.linspace(0.3, 0.9, batch),
        "guidance": torch.full([1], 3.5).expand(batch),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }


def qwen_call(batch: int, rows: int, columns: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, rows * columns, 16),
        "encoder_hidden_states": random(batch, text, 48, seed=1),
        "timestep": torch.linspace(0.3, 0.9, batch),
        "img_shapes": [[(1, rows, columns)]] * batch,
    }


def hunyuan_call(batch: int, rows: int, columns: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": random(batch, 4, 3, 2 * rows, 2 * columns),
        "encoder_hidden_states": random(batch, text, 48, seed=1),
        "encoder_attention_mask": mask([text - index for index in range(batch)], text).float(),
        "pooled_projections": random(batch, 40, seed=2),
        "timestep": torch.linspace(300, 900, batch),
        "guidance": torch.full([batch], 4500.0),
    }


CALLS: dict[str, Callable[[int, int, int, int], dict[str, Any]]] = {
    "flux": flux_call,
    "qwen": qwen_call,
    "hunyuan": hunyuan_call,
}


def assert_equal_velocities(subject: Subject, call: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        (expected,) = subject.pipeline.transformer(**call, return_dict=False)
        (found,) = subject.engine()(**call, return_dict=False)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=VELOCITY_TOLERANCE)
    velocity: torch.Tensor = found
    return velocity


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
    noise = {"flux": (2, 4, 8, 12), "qwen": (1, 1, 4, 8, 12), "hunyuan": (2, 4, 3, 8, 12)}
    given = {"noise": random(*noise[family]), "encoder_hidden_states": random(2, 9, 48)}
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
    with engine.cache_context("cond"):
        pass


def as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # JSON has no tuples


# Whole pipelines. Each entry: the fixture, the class if not the fixture's own, the arguments.


def picture() -> Image.Image:
    values = np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    return Image.fromarray(values)


def half() -> Image.Image:
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[:, WIDTH // 2 :] = 255
    return Image.fromarray(values)


FLUX = {"prompt": "a red dog", "max_sequence_length": tiny_flux.TEXT_TOKENS, "guidance_scale": 3.0}
QWEN = {"prompt": ["a red dog", "two cats, at night"], "negative_prompt": ["blurry", ""]}
RUNS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "flux": ("flux", None, FLUX),
    "flux true guidance": ("flux", None, {**FLUX, "negative_prompt": "b", "true_cfg_scale": 2.0}),
    "flux image to image": (
        "flux",
        FluxImg2ImgPipeline,
        {**FLUX, "image": picture(), "strength": 0.7},
    ),
    "flux inpaint": (
        "flux",
        FluxInpaintPipeline,
        {**FLUX, "image": picture(), "mask_image": half(), "strength": 0.7},
    ),
    "qwen": ("qwen", None, {**QWEN, "true_cfg_scale": 4.0}),
    "qwen image to image": (
        "qwen",
        QwenImageImg2ImgPipeline,
        {**QWEN, "image": picture(), "true_cfg_scale": 4.0, "strength": 0.7},
    ),
    "hunyuan": (
        "hunyuan",
        None,
        {
            "prompt_embeds": random(2, 12, 48),
            "pooled_prompt_embeds": random(2, 40),
            "prompt_attention_mask": mask([5, 12], 12),
            "num_frames": 9,
        },
    ),
}


def build(name: str, request: pytest.FixtureRequest) -> tuple[Any, Subject, dict[str, Any]]:
    """A pipeline of its own, with components that are shared."""
    family, kind, arguments = RUNS[name]
    subject: Subject = request.getfixturevalue(family)
    pipeline = (kind or type(subject.pipeline))(**subject.pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, subject, arguments


def render(pipeline: Any, arguments: Mapping[str, Any], **changes: Any) -> Any:
    settings = {
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": STEPS,
        "generator": torch.Generator().manual_seed(4),
        "output_type": "latent",
        "return_dict": False,
    }
    return pipeline(**{**settings, **arguments, **changes})[0]


def both(
    name: str, request: pytest.FixtureRequest, **changes: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pipeline makes with its own transformer, and with the engine."""
    pipeline, subject, arguments = build(name, request)
    expected = render(pipeline, arguments, **changes)
    pipeline.transformer = subject.engine()
    return expected, render(pipeline, arguments, **changes)


@pytest.mark.parametrize("name", RUNS)
def test_a_pipeline_ends_where_it_does_with_its_own_transformer(
    name: str, request: pytest.FixtureRequest
) -> None:
    expected, found = both(name, request)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=LATENT_TOLERANCE)


@pytest.mark.parametrize("name", ["flux", "qwen", "hunyuan"])
def test_a_schedule_evaluates_the_engine_at_its_nodes_alone(
    name: str, request: pytest.FixtureRequest
) -> None:
    pipeline, subject, arguments = build(name, request)
    schedule = bake("official", make_grid(STEPS), [0, 1, 3, 4], [1, 2, 1])
    pipeline.scheduler = MeanCacheScheduler.from_schedule(schedule, pipeline.scheduler)
    expected = render(pipeline, arguments)
    pipeline.transformer = subject.engine()
    torch.testing.assert_close(render(pipeline, arguments), expected, rtol=0, atol=LATENT_TOLERANCE)
    assert pipeline.num_timesteps == 4


def test_a_schedule_begun_midway_runs_on_the_engine(request: pytest.FixtureRequest) -> None:
    pipeline, subject, arguments = build("flux image to image", request)
    schedule = bake("official", make_grid(STEPS), [0, 1, 3, 4], [1, 2, 1])
    scheduler = MeanCacheScheduler.from_schedule(schedule, pipeline.scheduler)
    pipeline.scheduler = scheduler.for_strength(0.7)
    expected = render(pipeline, arguments, strength=1.0)
    pipeline.transformer = subject.engine()
    found = render(pipeline, arguments, strength=1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=LATENT_TOLERANCE)


def test_two_pictures_of_one_prompt(request: pytest.FixtureRequest) -> None:
    for name in ("flux", "qwen"):
        expected, found = both(name, request, num_images_per_prompt=2)
        assert len(found) in (2, 4)
        assert not torch.equal(found[0], found[1])
        torch.testing.assert_close(found, expected, rtol=0, atol=LATENT_TOLERANCE)


def test_pictures_are_the_same_to_a_level(request: pytest.FixtureRequest) -> None:
    expected, found = both("flux inpaint", request, output_type="pil")
    pixels = [np.asarray(images[0]).astype(int) for images in (expected, found)]
    assert pixels[0].shape == (HEIGHT, WIDTH, 3)
    # a level is 4e-3, so that what differs by 1e-5 rounds otherwise here and there
    assert np.abs(pixels[0] - pixels[1]).max() <= 1
    assert pixels[0].std() > 10


def test_a_callback_sees_and_changes_every_step(request: pytest.FixtureRequest) -> None:
    seen: list[int] = []

    def halve(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": tensors["latents"] / 2}

    expected, found = both("flux", request, callback_on_step_end=halve)
    assert seen == list(range(STEPS)) * 2
    torch.testing.assert_close(found, expected, rtol=0, atol=LATENT_TOLERANCE)
    plain, _ = both("flux", request)
    assert (plain - expected).abs().max() > 0.1


def test_a_half_precision_pipeline_gets_its_own_dtype(flux: Subject) -> None:
    engine, call = flux.engine(), flux_call(2, 3, 4, 5)
    low = {
        name: value.bfloat16() if name not in ("img_ids", "txt_ids") else value
        for name, value in call.items()
    }
    found = engine(**low).sample
    assert found.dtype == torch.bfloat16
    # computed in float32 all the same, and rounded once
    exact = engine(**{name: value.float() for name, value in low.items()}).sample
    assert torch.equal(found, exact.bfloat16())


def test_another_pipeline_is_made_from_one_with_an_engine(flux: Subject) -> None:
    pipeline = FluxPipeline(**flux.pipeline.components)
    pipeline.transformer = flux.engine()
    other = FluxImg2ImgPipeline.from_pipe(pipeline)
    assert other.transformer is pipeline.transformer
    assert other.to("cpu").device == torch.device("cpu")


def test_a_pipeline_is_loaded_without_the_transformers_weights(flux: Subject) -> None:
    checkpoint = flux.bundle.directory.parent / "checkpoint"
    pipeline = FluxPipeline.from_pretrained(checkpoint, transformer=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer = flux.engine()
    expected = render(FluxPipeline(**flux.pipeline.components), FLUX)
    torch.testing.assert_close(render(pipeline, FLUX), expected, rtol=0, atol=LATENT_TOLERANCE)


# Memory.


class Watched(OnnxRuntime):
    """ONNX Runtime that remembers the addresses of the foreign memory that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[tuple[int, int]] = []

    def from_dlpack(self, value: Any) -> HostTensor:
        tensor = super().from_dlpack(value)
        self.addresses.append((value.data_ptr(), tensor.array.ctypes.data))
        return tensor


def test_nothing_is_copied_on_its_way_in_or_out(flux: Subject) -> None:
    runtime = Watched()
    engine = EngineTransformer(flux.bundle, runtime=runtime)
    call = flux_call(1, 3, 4, 5)
    velocity = engine(**call).sample
    assert all(theirs == bound for theirs, bound in runtime.addresses)
    bound = {address for _, address in runtime.addresses}
    assert len(bound) == len(flux.bundle.export.components["transformer"].inputs) + 1
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep"):
        assert call[name].data_ptr() in bound, name
    assert velocity.data_ptr() == runtime.addresses[-1][1]


def test_velocities_of_two_calls_are_apart(flux: Subject) -> None:
    engine = flux.engine()
    first = engine(**flux_call(1, 3, 4, 5)).sample
    before = first.clone()
    second = engine(**{**flux_call(1, 3, 4, 5), "guidance": torch.tensor([1.0])}).sample
    assert torch.equal(first, before)
    assert not torch.equal(first, second)


def test_inputs_are_left_as_they_were(flux: Subject) -> None:
    call = flux_call(2, 3, 4, 5)
    before = {name: value.clone() for name, value in call.items()}
    flux.engine()(**call)
    assert all(torch.equal(call[name], value) for name, value in before.items())


def test_memory_that_is_not_contiguous_is_copied(flux: Subject) -> None:
    call = flux_call(2, 3, 4, 5)
    strided = {**call, "hidden_states": call["hidden_states"].mT.contiguous().mT}
    assert not strided["hidden_states"].is_contiguous()
    engine = flux.engine()
    assert torch.equal(engine(**strided).sample, engine(**call).sample)


def test_tables_are_made_once_for_equal_ids(flux: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = flux_torch.position_tables

    def counted(*arguments: Any) -> Any:
        made.append(len(arguments[1]))
        return original(*arguments)

    monkeypatch.setattr(flux_torch, "position_tables", counted)
    engine, call = flux.engine(), flux_call(1, 3, 4, 5)
    short = flux_call(1, 3, 4, 2)
    for _ in range(3):
        engine(**{**call, "img_ids": call["img_ids"].clone()})
        engine(**short)  # as a negative prompt of another length
    assert made == [12, 12]
    before = engine(**call).sample
    call["img_ids"] += 1  # the same memory, other ids
    after = engine(**call).sample
    assert made == [12, 12, 12]
    assert not torch.equal(before, after)


class Doubling(NumpyRuntime):
    """A runtime whose only graph gives 2 x latent + timestep, to show that any runtime serves."""

    def __init__(self, bundle: Bundle) -> None:
        self._component = bundle.export.components["transformer"]
        self.fed: Arrays = {}

    def load(self, path: Path, *, is_light: bool = False) -> Graph:
        assert path.is_file()
        assert not is_light
        specs = [
            {name: TensorSpec(name, record.dtype, record.shape) for name, record in part.items()}
            for part in (self._component.inputs, self._component.outputs)
        ]
        return FunctionGraph(self._run, *specs)

    def _run(self, feed: Arrays) -> Arrays:
        self.fed = feed
        return {"velocity": 2 * feed["hidden_states"] + feed["timestep"][:, None, None]}


def test_any_runtime_executes_it_and_stays_its_owners(flux: Subject) -> None:
    runtime = Doubling(flux.bundle)
    call = flux_call(2, 3, 4, 5)
    with EngineTransformer(flux.bundle, runtime=runtime) as engine:
        found = engine(**call).sample
    assert torch.equal(found, 2 * call["hidden_states"] + call["timestep"][:, None, None])
    assert runtime.fed["image_rope"].shape == (12, 64)


# Errors.


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
