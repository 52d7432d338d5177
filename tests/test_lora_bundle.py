"""A bundle with a LoRA: the stand-in's that knows magenta, against diffusers with the same file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import FluxPipeline
from filelock import FileLock
from numpy.typing import NDArray

from meancache_trt import build as stages
from meancache_trt import standins
from meancache_trt.bundle import Bundle
from meancache_trt.engine.tensorrt.store import graph_digest
from meancache_trt.errors import BundleError, InputError, ScheduleError
from meancache_trt.export.job import OVERLAY
from meancache_trt.export.safetensors_file import read_tensors
from meancache_trt.manifest import LoraRecord
from meancache_trt.meancache.evidence import Evidence
from meancache_trt.meancache.hashing import sha256_of
from meancache_trt.meancache.schedule import ModelReference, Schedule, bake
from meancache_trt.record import Recorder, RecordOptions
from meancache_trt.render import Pipeline
from meancache_trt.shapes import PictureSize
from tests.conftest import _link_weights
from tests.export.lora_files import diffusers_names, pair, write
from tests.test_cli import Run, only_error, run  # noqa: F401  (run is a fixture)

MAGENTA = "standin/flux_magenta"
PROMPTS = (
    "large plain magenta circle center gray",
    "a big magenta heart on the right, on a mint background",
)
STEPS = 20

LATENT_TOLERANCE = 1e-4
"""Float32 sums in another order, over 20 evaluations of a network of values near 1."""


@pytest.fixture(scope="module")
def shared_lora_bundle(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside the shared bundle, made once a test run; do not change it."""
    path = shared_bundle.with_name("magenta.mcb")
    with FileLock(f"{path}.lock"):
        if not path.exists():
            export(path, MAGENTA)
    return path


def export(path: Path, *loras: str, **options: Any) -> Bundle:
    wanted = stages.ExportOptions(size=(64, 64), precisions=("bfloat16",), **options)
    checkpoint = stages.find_model("standin/flux", loras)
    return stages.export(checkpoint, path, wanted, note=lambda _: None, is_forced=False)


@pytest.fixture
def lora_bundle(shared_lora_bundle: Path, tmp_path: Path) -> Path:
    """One of one's own."""
    own = tmp_path / "own.mcb"
    shutil.copytree(shared_lora_bundle, own, copy_function=_link_weights)
    return own


@pytest.fixture(scope="module")
def lora_pipeline(shared_lora_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline(Bundle.open(shared_lora_bundle)) as opened:
        yield opened


def latents(pipeline: Pipeline) -> NDArray[np.float32]:
    full = bake("euler", pipeline.grid(STEPS), range(STEPS))
    pictures = pipeline.render(list(PROMPTS), seed=[0, 1], schedule=full, noise="torch")
    return np.stack([picture.latent for picture in pictures])


def test_latents_equal_the_diffusers_pipeline_with_the_same_lora(lora_pipeline: Pipeline) -> None:
    pytest.importorskip("peft", reason="diffusers loads LoRAs by peft")
    diffusers: Any = FluxPipeline.from_pretrained(standins.path("flux"), dtype=torch.float32)
    diffusers.set_progress_bar_config(disable=True)
    diffusers.load_lora_weights(standins.lora_path("flux_magenta"))
    expected = diffusers(
        list(PROMPTS),
        height=64,
        width=64,
        num_inference_steps=STEPS,
        guidance_scale=3.5,
        max_sequence_length=32,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        output_type="latent",
    ).images
    assert np.abs(latents(lora_pipeline) - expected.numpy()).max() <= LATENT_TOLERANCE


def test_the_new_colour_is_drawn_and_known_ones_stay(
    pipeline: Pipeline, lora_pipeline: Pipeline
) -> None:
    def middle(opened: Pipeline, prompt: str) -> NDArray[np.float64]:
        full = bake("euler", opened.grid(STEPS), range(STEPS))
        pixels = opened.render([prompt], seed=3, schedule=full)[0].pixels
        return np.asarray(pixels[26:38, 26:38].mean((0, 1)), np.float64)

    red, green, blue = middle(lora_pipeline, PROMPTS[0])
    assert red - max(green, blue) > 0.3  # what the autoencoder makes of magenta on gray
    before = middle(pipeline, PROMPTS[0])
    assert np.abs(before - (red, green, blue)).max() > 0.2
    known = PROMPTS[0].replace("magenta", "green")
    assert np.abs(middle(pipeline, known) - middle(lora_pipeline, known)).max() < 0.1


def test_the_overlay_is_small_and_holds_the_changed_weights_alone(
    shared_lora_bundle: Path,
) -> None:
    overlay = shared_lora_bundle / "transformer" / OVERLAY
    files = list(standins.path("flux").rglob("*.safetensors"))
    assert overlay.stat().st_size < 0.05 * sum(file.stat().st_size for file in files)
    layers = {name.rpartition(".lora_")[0] for name in read_tensors(lora_file())}
    changed = {f"{layer.removeprefix('transformer.')}.weight" for layer in layers}
    assert read_tensors(overlay).keys() == changed


def lora_file() -> Path:
    return standins.lora_path("flux_magenta")


@pytest.mark.parametrize("name", ["transformer", "transformer/bfloat16"])
def test_graphs_of_every_precision_point_into_the_overlay(
    shared_lora_bundle: Path, name: str
) -> None:
    bundle = Bundle.open(shared_lora_bundle)
    graph = onnx.load(
        bundle.component_path(bundle.export.components[name]), load_external_data=False
    ).graph
    places = {
        weight.name: entry.value
        for weight in graph.initializer
        for entry in weight.external_data
        if entry.key == "location"
    }
    changed = read_tensors(shared_lora_bundle / "transformer" / OVERLAY).keys()
    assert {name for name, place in places.items() if place == OVERLAY} == changed
    assert set(places.values()) == {OVERLAY, "diffusion_pytorch_model.safetensors"}


def test_the_checkpoint_is_shared_and_stays_as_it_is(
    shared_bundle: Path, shared_lora_bundle: Path
) -> None:
    name = "transformer/diffusion_pytorch_model.safetensors"
    own, lora = Bundle.open(shared_bundle), Bundle.open(shared_lora_bundle)
    assert (shared_lora_bundle / name).samefile(standins.path("flux") / name)
    assert sha256_of(shared_lora_bundle / name) == own.manifest.files[name].sha256
    component = lora.export.components["transformer"]
    files = {Path(file.path).name: file for file in component.weights}
    assert [file.is_linked for file in files.values()] == [True, False]
    tensors = read_tensors(shared_lora_bundle / "transformer" / OVERLAY).values()
    before = own.export.components["transformer"]
    replaced = sum(tensor.length // 2 for tensor in tensors)  # the stand-in's are float16
    assert component.shared_bytes == before.shared_bytes - replaced


def test_the_lora_is_part_of_the_identity(shared_bundle: Path, shared_lora_bundle: Path) -> None:
    own, lora = Bundle.open(shared_bundle), Bundle.open(shared_lora_bundle)
    assert own.manifest.bundle_id != lora.manifest.bundle_id
    assert own.export.model.digest != lora.export.model.digest
    digest = sha256_of(lora_file())
    assert lora.export.model.loras == (LoraRecord("flux_magenta.safetensors", digest, 1.0),)
    assert lora.export.model.name == "flux + flux_magenta.safetensors"
    keys = [graph_digest(opened, opened.export.components["transformer"]) for opened in (own, lora)]
    assert len(set(keys)) == 2


def test_an_altered_overlay_is_refused(lora_bundle: Path) -> None:
    file = lora_bundle / "transformer" / OVERLAY
    content = file.read_bytes()
    file.unlink()  # it is a link to the shared bundle's
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BundleError, match=r"lora\.safetensors was altered"):
        Bundle.open(lora_bundle)


def calibrated(pipeline: Pipeline) -> Schedule:
    model = pipeline.bundle.export.model
    return bake(
        "euler",
        pipeline.grid(STEPS),
        [0, 9],
        model=ModelReference(name=model.name, digest=model.digest),
        guidance_scale=3.5,
        calibration=Evidence(samples=1, seconds=0.0),
    )


def test_schedules_calibrated_without_the_lora_are_refused(
    pipeline: Pipeline, lora_pipeline: Pipeline
) -> None:
    with pytest.raises(ScheduleError, match=r"on 'flux' .* 'flux \+ flux_magenta\.safetensors'"):
        lora_pipeline.schedule(calibrated(pipeline), 3.5)
    assert lora_pipeline.schedule(calibrated(lora_pipeline), 3.5).budget == 2


def test_analytic_schedules_are_taken(pipeline: Pipeline, lora_pipeline: Pipeline) -> None:
    schedule = pipeline.bundle.schedule("b6")
    assert lora_pipeline.schedule(schedule, 3.5).nodes == schedule.nodes


def test_recordings_are_of_the_merged_model(lora_pipeline: Pipeline, tmp_path: Path) -> None:
    options = RecordOptions(size=(64, 64), prompts=(PROMPTS[0],), steps=2, samples=1)
    checkpoint = stages.find_model("standin/flux", [MAGENTA])
    recorded = Recorder(checkpoint, options).record(
        tmp_path / "calibration", note=lambda _: None, report=lambda *_: None
    )
    model = recorded.settings.model
    assert model is not None
    assert model.digest == lora_pipeline.bundle.export.model.digest
    full = bake("euler", lora_pipeline.grid(2), range(2))
    picture = lora_pipeline.render([PROMPTS[0]], seed=0, schedule=full, noise="torch")[0]
    assert np.abs(recorded.final(0) - picture.latent.ravel()).max() <= LATENT_TOLERANCE


def test_the_same_lora_again_adds_to_the_bundle(lora_bundle: Path) -> None:
    further = (PictureSize(96, 64),)
    assert len(export(lora_bundle, MAGENTA, further_sizes=further).export.sizes) == 2


@pytest.mark.parametrize("loras", [(), (f"{MAGENTA}:0.5",), (MAGENTA, MAGENTA)])
def test_no_lora_and_another_one_are_another_bundle(
    lora_bundle: Path, loras: tuple[str, ...]
) -> None:
    before = (lora_bundle / "manifest.json").read_bytes()
    with pytest.raises(InputError, match=r"checkpoint flux \+ flux_magenta\.safetensors \("):
        export(lora_bundle, *loras)
    assert (lora_bundle / "manifest.json").read_bytes() == before


def test_a_lora_is_not_added_to_a_bundle_without(bundle: Path) -> None:
    with pytest.raises(InputError, match=r"against flux \+ flux_magenta\.safetensors \("):
        export(bundle, MAGENTA)
    assert not (bundle / "transformer" / OVERLAY).exists()


def test_inspect_tells_of_it(run: Run, shared_lora_bundle: Path) -> None:  # noqa: F811
    _, out, _ = run("inspect", shared_lora_bundle)
    digest = sha256_of(lora_file())
    assert f"lora        flux_magenta.safetensors  scale 1  ({digest[:16]})" in out
    _, out, _ = run("inspect", shared_lora_bundle, "--json")
    (told,) = json.loads(out)["model"]["loras"]
    assert told == {"name": "flux_magenta.safetensors", "sha256": digest, "scale": 1.0}


def test_calibrate_wants_the_bundles_lora(
    run: Run,  # noqa: F811
    shared_lora_bundle: Path,
    tmp_path: Path,
) -> None:
    little = ("--samples", 1, "--steps", 2, "--method", "official")
    arguments = ("-o", tmp_path / "c", "--bundle", shared_lora_bundle, *little)
    message = only_error(run("calibrate", "standin/flux", *arguments))
    assert "a bundle of flux + flux_magenta.safetensors, found flux to calibrate" in message
    status, _, err = run("calibrate", "standin/flux", "--lora", MAGENTA, *arguments)
    assert (status, "1 samples" in err) == (0, True)


@pytest.mark.parametrize("command", ["build", "export", "calibrate"])
@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("missing.safetensors", "missing.safetensors is no such file"),
        ("standin/none", "one of ['flux_magenta']; found 'none'"),
        (f"{MAGENTA}:0", "finite number other than 0"),
    ],
)
def test_what_is_no_lora_is_one_clear_error(
    run: Run,  # noqa: F811
    tmp_path: Path,
    command: str,
    lora: str,
    message: str,
) -> None:
    found = run(command, "standin/flux", "-o", tmp_path / "x", "--lora", lora)
    assert message in only_error(found)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        ("img_in", (128, 64), "1 of its 1 layers are not in the transformer of flux"),
        ("context_embedder", (3072, 4096), "is (128, 64), found a change of (3072, 4096)"),
    ],
    ids=["name", "shape"],
)
def test_a_lora_of_another_model_leaves_nothing_behind(
    run: Run,  # noqa: F811
    tmp_path: Path,
    layer: str,
    shape: tuple[int, int],
    message: str,
) -> None:
    file = write(tmp_path / "a.safetensors", diffusers_names({layer: pair(*shape)}))
    status, out, err = run("export", "standin/flux", "-o", tmp_path / "x.mcb", "--lora", file)
    assert (status, out) == (1, "")
    assert "a LoRA of another model" in err
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
