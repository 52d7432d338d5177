from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from meancache_trt import load
from meancache_trt.bundle import Bundle
from meancache_trt.cli import main
from meancache_trt.engine import select
from meancache_trt.engine.onnxruntime import OnnxRuntime
from meancache_trt.engine.probe import Gpu, probe
from meancache_trt.engine.select import available_backends, check_backend, choose, open_runtime
from meancache_trt.errors import InputError, RuntimeUnavailableError
from tests.export.families import shared_export
from tests.fakes.plans import add_plan, plan_everything

GPU = Gpu(0, "Fake GPU", "8.9", 8 << 30, 8 << 30)
ON_A_GPU = ["onnxruntime_cuda", "tensorrt", "tensorrt_rtx"]

without_gpu = pytest.mark.skipif(bool(probe().gpus), reason="there is a GPU: nothing is refused")


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose driver sees a GPU; nothing is opened on it."""
    monkeypatch.setattr(select, "find_gpu", lambda *_: GPU)


@pytest.fixture
def bundle(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    own = tmp_path / "own.mcb"
    shutil.copytree(shared_export("flux", tmp_path_factory).directory, own, symlinks=True)
    return Bundle.open(own)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="one of auto, onnxruntime, onnxruntime_cuda, tensorrt"):
        open_runtime("cuda")


@without_gpu
@pytest.mark.parametrize("backend", ON_A_GPU)
def test_a_gpu_backend_without_a_gpu_says_so_and_what_to_use(backend: str) -> None:
    message = "expected an NVIDIA GPU, but .*; use `--backend onnxruntime`, which runs on the CPU"
    with pytest.raises(RuntimeUnavailableError, match=message):
        open_runtime(backend)


@without_gpu
@pytest.mark.parametrize("backend", ON_A_GPU)
def test_it_says_so_before_the_bundle_is_read(backend: str, tmp_path: Path) -> None:
    """Of a bundle that is not there nothing could be said but that."""
    with pytest.raises(RuntimeUnavailableError, match="expected an NVIDIA GPU"):
        load(tmp_path / "absent.mcb", backend=backend)


@without_gpu
def test_the_command_line_ends_with_that_message_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "pictures"
    arguments = ["render", str(tmp_path / "absent.mcb"), "--backend", "tensorrt_rtx"]
    with pytest.raises(SystemExit, match="1"):
        main([*arguments, "--prompt", "x", "-o", str(output)])
    assert "error: expected an NVIDIA GPU" in capsys.readouterr().err
    assert not output.exists()


@without_gpu
def test_without_a_gpu_auto_is_the_cpu_and_says_why() -> None:
    choice = choose()
    assert choice.backend == "onnxruntime"
    assert "there is no GPU to use: expected an NVIDIA GPU" in choice.why
    with open_runtime() as runtime:
        assert isinstance(runtime, OnnxRuntime)


def test_auto_takes_a_tensorrt_that_has_plans_of_everything(bundle: Bundle, with_gpu: None) -> None:
    plan_everything(bundle)
    choice = choose(bundle)
    assert choice.backend == "tensorrt_rtx"
    assert "plans of every graph for the Fake GPU" in choice.why


@pytest.mark.parametrize("missing", ["transformer", "prepare", "vae_decoder", "update/h1"])
def test_auto_leaves_a_tensorrt_that_lacks_a_plan_and_says_which(
    bundle: Bundle, with_gpu: None, missing: str
) -> None:
    part = missing.partition("/")[0]
    names = [name for name in bundle.export.components if name.partition("/")[0] != part]
    plan_everything(bundle, only=names)
    choice = choose(bundle)
    assert choice.backend == "onnxruntime"  # this ONNX Runtime has no CUDA provider
    assert f"not tensorrt_rtx: expected a plan of {part}" in choice.why
    assert "has no CUDA provider" in choice.why


def test_one_precision_and_one_update_graph_are_enough(bundle: Bundle, with_gpu: None) -> None:
    names = [name for name in bundle.export.components if not name.startswith("update/")]
    plan_everything(bundle, only=[*names, "update/h4"])
    assert choose(bundle).backend == "tensorrt_rtx"


def test_a_plan_for_another_gpu_does_not_count(bundle: Bundle, with_gpu: None) -> None:
    for name, component in bundle.export.components.items():
        if component.precision == "float32":
            add_plan(bundle, name, compute_capability="12.0")
    choice = choose(bundle)
    assert choice.backend == "onnxruntime"
    assert "for 12.0" in choice.why


def test_auto_takes_onnx_runtime_on_the_gpu_where_it_can(
    with_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "_has_cuda_provider", lambda: True)
    choice = choose()
    assert choice.backend == "onnxruntime_cuda"
    assert "runs on the Fake GPU" in choice.why


def test_a_flavour_that_is_not_installed_is_refused(with_gpu: None) -> None:
    with pytest.raises(RuntimeUnavailableError, match="the backend tensorrt needs the package"):
        check_backend("tensorrt")
    assert check_backend("tensorrt_rtx") == GPU


def test_tensorrt_needs_a_bundle(with_gpu: None) -> None:
    with pytest.raises(InputError, match="runs the plans of a bundle; give one"):
        open_runtime("tensorrt_rtx")


@without_gpu
def test_onnx_runtime_without_its_provider_says_what_to_install(with_gpu: None) -> None:
    with pytest.raises(RuntimeUnavailableError, match="found one without; run `pip install onnx"):
        open_runtime("onnxruntime_cuda")


@without_gpu
def test_every_backend_says_whether_it_can_run_and_why_not() -> None:
    states = {state.name: state for state in available_backends()}
    assert [name for name, state in states.items() if state.is_available] == ["onnxruntime"]
    assert states["tensorrt_rtx"].state.startswith("no GPU: expected an NVIDIA GPU, but")
    assert "is not installed" in states["tensorrt"].state
