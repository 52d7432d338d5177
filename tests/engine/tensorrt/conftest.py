"""A tiny bundle, and runtimes of it on the fake TensorRT and CUDA."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from meancache_trt.bundle import Bundle
from meancache_trt.engine.onnxruntime import OnnxRuntime
from meancache_trt.engine.tensorrt.library import Flavour
from meancache_trt.engine.tensorrt.runtime import TensorRtRuntime
from meancache_trt.graphs import Graphs
from meancache_trt.manifest import batch_symbols
from meancache_trt.meancache.runtime import Runtime
from meancache_trt.meancache.schedule import Schedule, bake
from meancache_trt.meancache.sigmas import make_grid
from meancache_trt.session import Batch, Session
from tests.engine.tensorrt.add_engine import AddEngine
from tests.export.families import shared_export
from tests.fakes.cuda import FakeDevice
from tests.fakes.plans import plan_everything
from tests.fakes.tensorrt import fake_library
from tests.fakes.tensorrt_base import VERSION, World

SCALE = 3.5


@dataclass
class Opened:
    """A runtime on fakes. Leaving it asserts that nothing was freed wrongly."""

    bundle: Bundle
    device: FakeDevice
    world: World
    runtime: TensorRtRuntime

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.runtime.close()
        assert not self.device.violations

    def session(self, schedule: Schedule, batch: int = 1) -> Session:
        return session_on(self.bundle, self.runtime, schedule, batch)


Open = Callable[..., Opened]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_export("flux", tmp_path_factory).directory


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Bundle:
    """A copy without plans."""
    own = tmp_path / "own.mcb"
    shutil.copytree(exported, own, symlinks=True)
    return Bundle.open(own)


@pytest.fixture
def planned(bundle: Bundle) -> Bundle:
    plan_everything(bundle)
    return bundle


@pytest.fixture
def open_fake(bundle: Bundle, tmp_path: Path) -> Open:
    def opened(
        *,
        flavour: Flavour = "tensorrt_rtx",
        version: str = VERSION,
        device: FakeDevice | None = None,
        stream: object | None = None,
        is_old: bool = False,
    ) -> Opened:
        device = device or FakeDevice()
        library, world = fake_library(device, flavour, version, is_old=is_old)
        runtime = TensorRtRuntime(
            bundle, library, device, stream=stream, cache_directory=tmp_path / "cache"
        )
        return Opened(bundle, device, world, runtime)

    return opened


@pytest.fixture
def fake(planned: Bundle, open_fake: Open) -> Iterator[Opened]:
    """Everything planned, on TensorRT for RTX."""
    with open_fake() as opened:
        yield opened


def schedule_of(budget: int) -> Schedule:
    """A schedule whose later rows read history."""
    return bake("ab2", make_grid(2 * budget), range(0, 2 * budget, 2))


def session_on(bundle: Bundle, runtime: Runtime, schedule: Schedule, batch: int = 1) -> Session:
    return Session(Graphs(bundle, runtime), schedule, bundle.export.resolution, batch=batch)


def inputs_of(bundle: Bundle, batch: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Noise and conditioning."""
    random = np.random.default_rng(seed)
    size = bundle.export.resolution
    sizes = {**size.symbols, **batch_symbols(batch)}
    records = bundle.export.components["transformer"].inputs.items()
    conditioning = {
        name: random.standard_normal(record.resolved(sizes)).astype(record.dtype)
        for name, record in records
        if record.role in ("conditioning", "text_mask")
    }
    noise = random.standard_normal((batch, *size.noise_shape)).astype(np.float32)
    return noise, conditioning


def run(
    session: Session, bundle: Bundle, seed: int = 0, batch: int = 1, **options: object
) -> Batch:
    noise, conditioning = inputs_of(bundle, batch, seed)
    return session.run(noise, conditioning, SCALE, **options)  # type: ignore[arg-type]


_EXPECTED: dict[tuple[str, Schedule, int, int], Batch] = {}


def expected(bundle: Bundle, schedule: Schedule, seed: int = 0, batch: int = 1) -> Batch:
    """The same by ONNX Runtime on the CPU: the same kernels, so the same bits. Made once."""
    key = (bundle.manifest.bundle_id, schedule, seed, batch)
    if key not in _EXPECTED:
        with OnnxRuntime(1) as runtime:
            session = session_on(bundle, runtime, schedule, batch)
            _EXPECTED[key] = run(session, bundle, seed, batch)
    return _EXPECTED[key]


def assert_equal(found: Batch, wanted: Batch) -> None:
    assert np.array_equal(found.latents, wanted.latents)
    assert np.array_equal(found.pictures, wanted.pictures)


@pytest.fixture
def engine(tmp_path: Path) -> AddEngine:
    return AddEngine(tmp_path)
