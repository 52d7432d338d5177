"""What is not for this GPU, library, graph or size is refused, in our words."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import tensorrt_rtx

from meancache_trt.bundle import Bundle
from meancache_trt.engine.cuda.tensors import DeviceTensor
from meancache_trt.engine.tensorrt.engines import EngineLoader
from meancache_trt.engine.tensorrt.library import Flavour, Library
from meancache_trt.engine.tensorrt.record import PlanRecord, PlanTensor, ShapeRange
from meancache_trt.engine.tensorrt.runtime_cache import RuntimeCache
from meancache_trt.errors import PlanMismatchError, RenderError
from meancache_trt.meancache.files import encode_json
from tests.engine.tensorrt.conftest import Open, Opened
from tests.fakes.cuda import FakeDevice
from tests.fakes.plans import Change, add_plan, addition_name

NAME = "vae_decoder"


def load(fake: Opened, name: str = NAME):
    component = fake.bundle.export.components[name]
    return fake.runtime.load(fake.bundle.component_path(component))


def tensors(fake: Opened, batch: int = 1, rows: int = 2) -> dict[str, DeviceTensor]:
    component = fake.bundle.export.components[NAME]
    latent = component.inputs[component.input_named("latent_grid")].shape
    grid = (batch, rows, 3, latent[-1])
    image = (batch, 3, 8 * rows, 24)
    shapes = {component.input_named("latent_grid"): grid, component.output_named("image"): image}
    return {name: fake.runtime.zeros(shape, "float32") for name, shape in shapes.items()}


def changed(**changes: object) -> Change:
    return lambda plan: msgspec.structs.replace(plan, **changes)


def test_a_bundle_without_a_plan_says_how_to_make_one(open_fake: Open) -> None:
    with open_fake() as fake, pytest.raises(PlanMismatchError, match="found none; build it with"):
        load(fake)


@pytest.mark.parametrize(
    ("made", "found"),
    [
        ({"compute_capability": "12.0"}, "found tensorrt_rtx 1.7.1.116 for 12.0"),
        ({"version": "1.6.0.1"}, "found tensorrt_rtx 1.6.0.1 for 8.9"),
        ({"flavour": "tensorrt"}, "found tensorrt 1.7.1.116 for 8.9"),
    ],
)
def test_a_plan_for_something_else_is_named(
    bundle: Bundle, open_fake: Open, made: dict[str, str], found: str
) -> None:
    add_plan(bundle, NAME, **made)  # type: ignore[arg-type]
    with open_fake() as fake, pytest.raises(PlanMismatchError, match=found):
        load(fake)


def test_a_plan_of_another_graph_is_not_used(bundle: Bundle, open_fake: Open) -> None:
    record = add_plan(bundle, NAME)
    other = msgspec.structs.replace(record.key, graph="0" * 64)
    name = addition_name(record.key)
    bundle.add_file(name, encode_json(msgspec.structs.replace(record, key=other)))
    with open_fake() as fake, pytest.raises(PlanMismatchError, match="expected a plan of"):
        load(fake)


def test_altered_bytes_are_refused_before_tensorrt_sees_them(
    bundle: Bundle, open_fake: Open
) -> None:
    record = add_plan(bundle, NAME)
    path = bundle.directory / record.file.path
    path.write_bytes(path.read_bytes().replace(b"fake", b"fakf"))
    with open_fake() as fake, pytest.raises(PlanMismatchError, match="was altered: expected SHA"):
        load(fake).bind(tensors(fake))


@pytest.mark.parametrize(
    ("flavour", "change", "words"),
    [
        ("tensorrt", {"magic": "other"}, "deserialisation failed: no magic tag"),
        ("tensorrt", {"compute_capability": "7.5"}, "failed: made for compute capability 7.5"),
        ("tensorrt", {"version": "0.1"}, "deserialisation failed: made by version 0.1"),
        ("tensorrt_rtx", {"magic": "other"}, "MALFORMED_ENGINE, it does not say why"),
        ("tensorrt_rtx", {"compute_capability": "7.5"}, "UNSUPPORTED_CC"),
    ],
)
def test_what_tensorrt_refuses_is_a_mismatch_in_its_words(
    bundle: Bundle, open_fake: Open, flavour: Flavour, change: dict[str, str], words: str
) -> None:
    """A sidecar that fits, and a plan that does not: None is never taken for an engine."""
    add_plan(bundle, NAME, flavour=flavour, change=changed(**change))
    with open_fake(flavour=flavour) as fake, pytest.raises(PlanMismatchError, match=words):
        load(fake).bind(tensors(fake))


@pytest.mark.parametrize(
    "wrong",
    [
        {"inputs": {"other": PlanTensor("float32", (-1,))}},
        {"outputs": {"image": PlanTensor("float16", (-1, 3, -1, -1))}},
        {"outputs": {"image": PlanTensor("float32", (-1, 4, -1, -1))}},
        {"outputs": {"image": PlanTensor("float32", (-1, 3, -1))}},
    ],
)
def test_an_engine_with_other_tensors_than_its_record_is_refused(
    bundle: Bundle, open_fake: Open, wrong: dict[str, dict[str, PlanTensor]]
) -> None:
    record = add_plan(bundle, NAME)
    name = addition_name(record.key)
    bundle.add_file(name, encode_json(msgspec.structs.replace(record, **wrong)))
    with open_fake() as fake, pytest.raises(PlanMismatchError, match="is not what its record says"):
        load(fake).bind(tensors(fake))


def limited(bundle: Bundle, batch: int) -> dict[str, ShapeRange]:
    name = bundle.export.components[NAME].input_named("latent_grid")
    channels = bundle.export.components[NAME].inputs[name].shape[-1]
    assert isinstance(channels, int)
    return {name: ShapeRange((1, 1, 1, channels), (1, 2, 3, channels), (batch, 8, 8, channels))}


def test_a_shape_outside_every_profile_names_shapes_ranges_and_options(
    bundle: Bundle, open_fake: Open
) -> None:
    add_plan(bundle, NAME, profile=limited(bundle, 1))
    add_plan(bundle, NAME, profile=limited(bundle, 2))
    with open_fake() as fake:
        graph = load(fake)
        asked = r"no plan of vae_decoder holds the shapes \w+ 3×2×3×\d+; planned is \w+ 1×1×1×\d+ "
        options = r"to 2×8×8×\d+; or .* to 1×8×8×\d+. Build one with `meancache-trt plan` and wider"
        with pytest.raises(PlanMismatchError, match=asked + options):
            graph.bind(tensors(fake, batch=3))


def test_the_newest_plan_that_holds_the_shapes_is_used_and_only_it_is_deserialised(
    bundle: Bundle, open_fake: Open
) -> None:
    wide, narrow = (add_plan(bundle, NAME, profile=limited(bundle, size)) for size in (4, 2))
    with open_fake() as fake:
        graph = load(fake)
        assert fake.world.alive["engine"] == 0
        calls = [graph.bind(tensors(fake, batch=batch)) for batch in (1, 2)]
        assert all(call.context.engine.record == narrow for call in calls)
        assert fake.world.alive["engine"] == 1
        calls.append(graph.bind(tensors(fake, batch=3)))
        assert calls[-1].context.engine.record == wide


def test_one_engine_serves_all_who_load_its_graph(bundle: Bundle, open_fake: Open) -> None:
    add_plan(bundle, NAME)
    with open_fake() as fake:
        calls = [load(fake).bind(tensors(fake)) for _ in range(2)]
        assert fake.world.alive["engine"] == 1
        assert len({call.context.engine for call in calls}) == 1


def test_an_engine_that_fails_to_run_says_why(bundle: Bundle, open_fake: Open) -> None:
    add_plan(bundle, NAME, change=changed(fails="a kernel is missing"))
    with open_fake() as fake:
        call = load(fake).bind(tensors(fake))
        with pytest.raises(RenderError, match="could not be started: a kernel is missing"):
            call.enqueue()
        sequence = fake.runtime.sequence([call])
        for _ in range(2):
            with pytest.raises(RenderError, match="a kernel is missing"):
                sequence.enqueue()


def test_binding_refuses_wrong_names_shapes_types_and_addresses(
    bundle: Bundle, open_fake: Open
) -> None:
    add_plan(bundle, NAME)
    with open_fake() as fake:
        graph, fit = load(fake), tensors(fake)
        (latent, image) = fit
        shape = fit[latent].shape
        held = np.zeros(1000, np.float32)
        pointer = fake.device.adopt(held)
        skewed = fake.runtime.from_pointer(pointer + 4, shape, "float32", owner=held)
        wrongs = {
            r"missing \['image'\]": {latent: fit[latent]},
            "is float32 of shape": {**fit, latent: fake.runtime.zeros(shape, "int64")},
            "multiples of 256, found": {**fit, latent: skewed},
            "gives 'image' in shape": {**fit, image: fake.runtime.zeros((1, 3, 32, 32), "float32")},
        }
        for message, wrong in wrongs.items():
            with pytest.raises(RenderError, match=message):
                graph.bind(wrong)


def test_a_graph_of_another_bundle_is_refused(bundle: Bundle, open_fake: Open) -> None:
    with open_fake() as fake, pytest.raises(PlanMismatchError, match="expected a graph of"):
        fake.runtime.load(Path("elsewhere.onnx"))


def test_only_precisions_with_plans_are_preferred(bundle: Bundle, open_fake: Open) -> None:
    with open_fake() as fake:
        assert fake.runtime.precisions == ("bfloat16", "float16", "float32")
    add_plan(bundle, "transformer")
    with open_fake() as fake:
        assert fake.runtime.precisions == ("float32", "bfloat16", "float16")
    add_plan(bundle, "transformer/bfloat16")
    with open_fake() as fake:
        assert fake.runtime.precisions == ("bfloat16", "float32", "float16")


def test_the_real_library_refuses_a_foreign_file_in_its_own_words(
    bundle: Bundle, tmp_path: Path
) -> None:
    """TensorRT for RTX itself: its runtime opens without a GPU, and refuses."""
    record: PlanRecord = add_plan(bundle, NAME, version=tensorrt_rtx.__version__)
    library = Library("tensorrt_rtx", tensorrt_rtx.__version__, tensorrt_rtx)
    device = FakeDevice()
    cache = RuntimeCache(library, device.product, device.compute_capability, tmp_path)
    loader = EngineLoader(bundle, library, device, cache)
    with pytest.raises(PlanMismatchError, match=r"does not take .*MALFORMED_ENGINE"):
        loader.engine(record)
    loader.close()
