"""What a session refuses and survives, and that it says so in the words of the Python host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from meancache_trt.bundle import MANIFEST, Bundle
from meancache_trt.engine.native import NativeBundle, NativeLibrary, NativeSession
from meancache_trt.errors import (
    InputError,
    MeanCacheError,
    RenderError,
    RuntimeUnavailableError,
)
from meancache_trt.meancache.evidence import Evidence
from meancache_trt.meancache.files import write_json
from meancache_trt.meancache.schedule import Schedule, bake, save_schedule
from meancache_trt.meancache.sigmas import make_grid
from meancache_trt.render import Pipeline
from tests.host.conftest import Host, Subject


@pytest.fixture(scope="module")
def opened(flux: Subject, library: NativeLibrary) -> Iterator[NativeBundle]:
    with NativeBundle(flux.bundle, library=library) as bundle:
        yield bundle


@pytest.fixture(scope="module")
def session(flux: Subject, opened: NativeBundle) -> Iterator[NativeSession]:
    with opened.session("b6", threads=1) as made:
        made.set_conditioning(flux.tensors)
        yield made


class StopAsked(Exception):  # noqa: N818  a request, not an error
    pass


def test_cancelling_stops_at_once_and_leaves_the_session_usable(session: NativeSession) -> None:
    expected = session.run(seeds=[1])
    seen: list[tuple[int, int]] = []

    def stop(done: int, budget: int) -> None:
        seen.append((done, budget))
        if done == 2:
            raise StopAsked

    with pytest.raises(StopAsked):
        session.run(seeds=[1], on_evaluation=stop)
    assert seen == [(1, 6), (2, 6)]
    with pytest.raises(RenderError, match="run the session first"):
        session.decode()
    np.testing.assert_array_equal(session.run(seeds=[1]), expected)


def test_progress_counts_every_evaluation(session: NativeSession) -> None:
    seen: list[tuple[int, int]] = []
    session.run(seeds=[1], on_evaluation=lambda done, budget: seen.append((done, budget)))
    assert seen == [(done, 6) for done in range(1, 7)]


def test_noise_that_is_not_finite_is_no_picture(session: NativeSession) -> None:
    expected = session.run(seeds=[1])
    bad = np.full(session.noise_shape, np.nan, np.float32)
    with pytest.raises(RenderError, match="the latent is not finite after the last evaluation"):
        session.run(bad)
    np.testing.assert_array_equal(session.run(seeds=[1]), expected)


def test_what_is_missing_or_of_another_size_is_named(
    opened: NativeBundle, session: NativeSession
) -> None:
    with pytest.raises(InputError, match="unknown conditioning 'text'; expected one of encoder"):
        session.set_conditioning({"text": np.zeros(3, np.float32)})
    with pytest.raises(InputError, match="pooled_projections of 256 bytes, found 12"):
        session.set_conditioning({"pooled_projections": np.zeros(3, np.float32)})
    with pytest.raises(InputError, match="a batch of 1 needs as many seeds, found 2"):
        session.run(seeds=[1, 2])
    with pytest.raises(InputError, match="from seeds or from noise: give one of the two"):
        session.run()
    with pytest.raises(InputError, match="expected noise of 8192 bytes, found 4"):
        session.run(np.zeros(1, np.float32))
    with pytest.raises(InputError, match=r"no text encoder 'clip'.*text_encoder, text_encoder_2"):
        session.set_token_ids("clip", np.zeros((1, 32), np.int64))
    with (
        opened.session("b6", threads=1) as fresh,
        pytest.raises(RenderError, match="the conditioning lacks 'encoder_hidden_states'"),
    ):
        fresh.run(seeds=[1])


def test_a_backend_on_the_cpu_refuses_streams_and_device_memory(
    session: NativeSession, library: NativeLibrary
) -> None:
    from meancache_trt.engine import native_abi as abi  # noqa: PLC0415

    handle = session._handle
    seeds = np.zeros(1, np.uint64)
    options = abi.RunOptions(seeds=seeds.ctypes.data, seed_count=1, stream=1234)
    with pytest.raises(InputError, match="openvino runs on the CPU and has no streams"):
        library.call("mct_session_run", handle, abi.ctypes.byref(options))
    name, count = b"pooled_projections", abi.c_size_t(256)
    with pytest.raises(InputError, match=r"takes no device memory.*pass host memory"):
        library.call("mct_session_set_conditioning", handle, name, abi.c_void_p(16), count, 1)


def test_unknown_backends_are_named(opened: NativeBundle) -> None:
    with pytest.raises(InputError, match="unknown backend 'cuda'; expected one of openvino"):
        opened.session("b6", backend="cuda")


def test_bundles_are_described(flux: Subject, opened: NativeBundle) -> None:
    bundle = Bundle.open(flux.bundle)
    assert opened.info["bundle_id"] == bundle.manifest.bundle_id
    assert opened.info["family"] == "flux"
    assert opened.info["model_digest"] == bundle.export.model.digest
    names = [schedule["name"] for schedule in opened.schedules()]
    assert names == bundle.schedule_names()
    (resolution,) = opened.resolutions()
    assert resolution["noise_shape"] == bundle.export.resolution.noise_shape
    assert resolution["image_shape"] == (64, 64, 3)
    assert opened.conditioning() == {
        name: tensor.shape[1:] for name, tensor in sorted(flux.tensors.items())
    }


def test_a_session_outlives_its_bundle(flux: Subject, library: NativeLibrary) -> None:
    bundle = NativeBundle(flux.bundle, library=library)
    session = bundle.session("b6", threads=1)
    bundle.close()
    session.set_conditioning(flux.tensors)
    assert np.isfinite(session.run(seeds=[1])).all()
    session.close()
    session.close()


def test_sessions_of_one_bundle_share_graphs(
    bundle: Path, flux: Subject, library: NativeLibrary
) -> None:
    with (
        NativeBundle(bundle, library=library) as opened,
        opened.session("b6", threads=1) as first,
    ):
        first.set_conditioning(flux.tensors)
        expected = first.run(seeds=[1])
        for graph in bundle.glob("**/*.onnx"):
            graph.unlink()  # nothing is loaded again
        with opened.session("b6", threads=1) as second:
            second.set_conditioning(flux.tensors)
            np.testing.assert_array_equal(second.run(seeds=[1]), expected)


def test_symbolic_links_are_refused_with_what_to_do(
    bundle: Path, library: NativeLibrary, tmp_path: Path
) -> None:
    weights = next((bundle / "transformer").glob("*.safetensors"))
    target = tmp_path / "elsewhere.safetensors"
    weights.rename(target)
    weights.symlink_to(target)
    with (
        NativeBundle(bundle, library=library) as opened,
        pytest.raises(RuntimeUnavailableError, match=r"symbolic links.*--weights copy"),
    ):
        opened.session("b6")


def test_a_shorter_text_length_takes_shorter_conditioning(
    flux: Subject, opened: NativeBundle
) -> None:
    tensors = dict(flux.tensors)
    tensors["encoder_hidden_states"] = tensors["encoder_hidden_states"][:, :16]
    with opened.session("b6", text_tokens=16, threads=1) as session:
        session.set_conditioning(tensors)
        assert np.isfinite(session.run(seeds=[1])).all()
    with pytest.raises(
        InputError, match="a text length is 1 to 32 tokens in this bundle, found 33"
    ):
        opened.session("b6", text_tokens=33)


# What the two hosts are asked for, and both refuse.
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("no schedule of that name", {"schedule": "b7"}),
    ("no schedule of that budget", {"schedule": "7"}),
    ("a size that is not in the bundle", {"schedule": "b6", "height": 128}),
    ("frames of a picture", {"schedule": "b6", "frames": 9}),
    ("a scale beyond all", {"schedule": "b6", "guidance_scale": 1001.0}),
    ("a negative scale", {"schedule": "b6", "guidance_scale": -1.0}),
]


@pytest.mark.parametrize("options", [o for _, o in REFUSED], ids=[name for name, _ in REFUSED])
def test_requests_are_refused_in_the_same_words(
    flux: Subject, opened: NativeBundle, pipeline: Pipeline, options: dict[str, Any]
) -> None:
    def python() -> object:
        given = dict(options)
        size = {key: given.pop(key) for key in ("height", "frames") if key in given}
        return pipeline.render(flux.conditioning, **given, **size)

    assert_same_error(python, lambda: opened.session(**options))


def calibrated(shift: float = 3.0, **changes: Any) -> dict[str, Any]:
    """A fitted schedule of the stand-in as plain values, with changes."""
    grid = make_grid(50, shift=shift)
    made = bake("euler", grid, (0, 10, 20), name="fit", guidance_scale=3.5)
    values: dict[str, Any] = msgspec.to_builtins(made)
    return {**values, "method": "fitted", "calibration": {"samples": 2, "seconds": 1.0}, **changes}


def plain_grid(*sigmas: float) -> dict[str, Any]:
    """A grid of these sigmas, whether or not it could be one."""
    steps = len(sigmas) - 1
    return {"steps": steps, "sigmas": sigmas, "timesteps": sigmas[:-1]}


MODEL = {"name": "another", "digest": "0" * 64}
FILES: list[tuple[str, dict[str, Any]]] = [
    ("another family", calibrated(family="qwen_image")),
    ("another checkpoint", calibrated(model=MODEL)),
    ("another precision", calibrated(precision="float8")),
    ("another grid", calibrated(shift=1.5)),
    ("another guidance scale", calibrated(guidance_scale=2.0)),
    ("another guidance range", calibrated(guidance_scale=None, guidance_range=[4.0, 6.5])),
    ("an upside-down range", calibrated(guidance_scale=None, guidance_range=[4.0, 2.0])),
    ("a scale beyond all", calibrated(guidance_scale=2000.0)),
    ("no first node", calibrated(nodes=[1, 10, 20])),
    ("nodes out of order", calibrated(nodes=[0, 20, 10])),
    ("nodes off the grid", calibrated(nodes=[0, 10, 50])),
    ("a row too few", calibrated(weights=[[-0.5], [-0.2]])),
    ("a row too long", calibrated(weights=[[-0.5, 0.1], [-0.2], [-0.3]])),
    ("an infinite weight", calibrated(weights=[[-1e39], [-0.2], [-0.3]])),
    ("a wrong history", calibrated(history=2)),
    ("an unknown method", calibrated(method="magic")),
    ("altered weights", calibrated(method="euler")),
    ("an unknown field", calibrated(extra=1)),
    ("a text for a number", calibrated(history="1")),
    ("a number for a text", calibrated(name=3)),
    ("no grid", {key: value for key, value in calibrated().items() if key != "grid"}),
    ("another version", calibrated(schema="meancache-trt/schedule/2")),
    ("unknown evidence", calibrated(calibration={"samples": 1, "seconds": 1, "x": 1})),
    ("sigmas that rise", calibrated(grid=plain_grid(1.0, 0.5, 0.6))),
    ("sigmas above one", calibrated(grid=plain_grid(2.0, 0.5))),
    ("a sigma too few", calibrated(grid={"steps": 2, "sigmas": [1, 0.5], "timesteps": [1, 2]})),
]  # fmt: skip


@pytest.mark.parametrize("values", [v for _, v in FILES], ids=[name for name, _ in FILES])
def test_schedule_files_are_refused_in_the_same_words(
    opened: NativeBundle, pipeline: Pipeline, tmp_path: Path, values: dict[str, Any]
) -> None:
    values = {**values}
    if values.get("method") == "euler":
        values["weights"] = [[-0.5], [-0.3], [-0.1]]
    path = tmp_path / "given.json"
    path.write_bytes(msgspec.json.encode(values))
    assert_same_error(
        lambda: pipeline.schedule(path, 3.5),
        lambda: opened.session(str(path), guidance_scale=3.5),
    )


def assert_same_error(python: Callable[[], object], native: Callable[[], object]) -> None:
    with pytest.raises(MeanCacheError) as expected:
        python()
    with pytest.raises(MeanCacheError) as found:
        native()
    assert str(found.value) == str(expected.value)
    assert found.type is expected.type


@pytest.mark.parametrize("method", ["euler", "official", "unipc"])
def test_analytic_schedules_of_another_grid_are_folded_again(
    opened: NativeBundle, pipeline: Pipeline, flux: Subject, tmp_path: Path, method: str
) -> None:
    spans = (1, 3, 3) if method == "official" else None
    baked = bake(method, make_grid(50, shift=1.5), (0, 10, 20, 35), spans)
    path = tmp_path / f"{method}.json"
    save_schedule(baked, path)
    assert pipeline.schedule(path).weights != baked.weights
    expected = pipeline.render(flux.conditioning, seed=3, schedule=path)[0].latent
    with opened.session(str(path), threads=1) as session:
        session.set_conditioning(flux.tensors)
        found = session.run(seeds=[3])[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)  # as in test_parity


def test_a_mu_that_depends_on_the_steps_is_that_of_the_python_host(
    bundle: Path, library: NativeLibrary, tmp_path: Path
) -> None:
    manifest = Bundle.open(bundle).manifest
    scheduler = {**manifest.export.scheduler, "use_dynamic_shifting": True}
    export = msgspec.structs.replace(manifest.export, scheduler=scheduler, mu="empirical")
    write_json(bundle / MANIFEST, msgspec.structs.replace(manifest, export=export).sealed())
    evidence, fit = Evidence(samples=1, seconds=1.0), tmp_path / "fit.json"
    with (
        Pipeline(Bundle.open(bundle), threads=1) as pipeline,
        NativeBundle(bundle, library=library) as opened,
    ):
        own = pipeline.grid(12)
        save_schedule(bake("euler", own, (0, 4), name="fit", calibration=evidence), fit)
        with opened.session(str(fit)) as session:  # refused where the grid were another
            assert session.info["schedule"] == "fit"
        wrong = make_grid(12, mu=pipeline.grid(13).mu)
        save_schedule(bake("euler", wrong, (0, 4), name="fit", calibration=evidence), fit)
        assert_same_error(lambda: pipeline.schedule(fit), lambda: opened.session(str(fit)))


def test_the_largest_calibrated_schedule_is_the_default(
    bundle: Path, library: NativeLibrary
) -> None:
    written = Bundle.open(bundle)
    fit = msgspec.json.decode(msgspec.json.encode(calibrated(family="flux")), type=Schedule)
    written.add_schedule(fit)
    with NativeBundle(bundle, library=library) as opened, opened.session() as session:
        assert session.info["schedule"] == "fit"
        assert session.info["guidance_scale"] == 3.5


def test_a_library_that_is_not_there_is_a_runtime_error(tmp_path: Path, host: Host) -> None:
    with pytest.raises(RuntimeUnavailableError, match="cannot be loaded"):
        NativeLibrary(tmp_path / "nothing.so")
    assert host.library.is_file()
