"""Plans in a bundle: found by their key, checked before use, never in the way of anything else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from meancache_trt.bundle import Bundle
from meancache_trt.engine.tensorrt.record import (
    BuildOptions,
    PlanFile,
    PlanKey,
    PlanRecord,
    PlanTensor,
    ShapeRange,
)
from meancache_trt.engine.tensorrt.store import PlanStore, graph_digest
from meancache_trt.errors import InputError, PlanMismatchError
from meancache_trt.meancache.hashing import digest_of
from tests.engine.tensorrt.jobs import make_bundle

COMPONENT = "update/h1"
KEY = PlanKey(
    component=COMPONENT,
    graph="0" * 64,
    precision="float32",
    profile={"latent": ShapeRange((1, 64, 32), (1, 64, 32), (4, 64, 32))},
    flavour="tensorrt_rtx",
    version="1.7.1",
    compute_capability="8.9",
)


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return PlanStore(make_bundle(tmp_path / "small.mcb", 1, 2))


def unplaced(key: PlanKey = KEY, content: bytes = b"a plan") -> PlanRecord:
    """The record of a plan that is in no bundle yet."""
    return PlanRecord(
        key=key,
        inputs={"latent": PlanTensor("float32", (-1, -1, 32))},
        outputs={},
        file=PlanFile("", len(content), digest_of(content)),
        fused_attention=0,
        build_s=1.0,
        peak_memory_bytes=1,
        built_at="2026-01-01T00:00:00.000000+00:00",
    )


def add(store: PlanStore, key: PlanKey = KEY, content: bytes = b"a plan") -> PlanRecord:
    """Add a plan as a build would."""
    with store.lock(key), store.building(key) as file:
        file.write_bytes(content)
        return store.add(unplaced(key, content), file)


def options(**changes: object) -> Callable[[PlanKey], PlanKey]:
    return lambda key: msgspec.structs.replace(
        key, options=msgspec.structs.replace(key.options, **changes)
    )


def field(**changes: object) -> Callable[[PlanKey], PlanKey]:
    return lambda key: msgspec.structs.replace(key, **changes)


CHANGES = {
    "component": field(component="update/h2"),
    "graph": field(graph="1" * 64),
    "precision": field(precision="bfloat16"),
    "profile": field(profile={"latent": ShapeRange((1, 64, 32), (1, 64, 32), (8, 64, 32))}),
    "flavour": field(flavour="tensorrt"),
    "version": field(version="1.7.2"),
    "compute_capability": field(compute_capability="12.0"),
    "builder_optimization_level": options(builder_optimization_level=3),
    "workspace_bytes": options(workspace_bytes=1 << 20),
    "weight_streaming": options(weight_streaming=True),
    "hardware_compatibility": options(hardware_compatibility="ampere_plus"),
    "tiling_optimization_level": options(tiling_optimization_level="fast"),
    "max_aux_streams": options(max_aux_streams=1),
}


def test_every_field_of_a_key_is_covered_below() -> None:
    fields = {*PlanKey.__struct_fields__, *BuildOptions.__struct_fields__}
    assert {*CHANGES} == fields - {"options"}


@pytest.mark.parametrize("name", CHANGES)
def test_a_key_that_differs_in_one_field_is_another_plan(store: PlanStore, name: str) -> None:
    other = CHANGES[name](KEY)
    assert other.digest != KEY.digest
    add(store)
    assert store.find(other) is None
    add(store, other, b"another plan")
    assert {record.key.digest for record in store.records()} == {KEY.digest, other.digest}


def test_the_order_of_a_profile_does_not_matter() -> None:
    one = ShapeRange((1,), (1,), (1,))
    keys = [
        msgspec.structs.replace(KEY, profile=profile)
        for profile in ({"a": one, "b": one}, {"b": one, "a": one})
    ]
    assert keys[0].digest == keys[1].digest


def test_a_plan_is_found_by_its_key_in_another_process_too(store: PlanStore) -> None:
    record = add(store)
    assert store.find(KEY) == record
    assert PlanStore(Bundle.open(store.bundle.directory)).find(KEY) == record
    assert store.checked_path(record).read_bytes() == b"a plan"


def test_an_opened_bundle_sees_what_others_add(store: PlanStore) -> None:
    other = PlanStore(Bundle.open(store.bundle.directory))
    record = add(other)
    assert store.find(KEY) == record


def test_a_plan_built_again_takes_the_place_of_the_first(store: PlanStore) -> None:
    first, second = add(store), add(store, content=b"built again")
    assert store.records() == [second]
    assert not (store.bundle.directory / first.file.path).exists()
    assert store.checked_path(second).read_bytes() == b"built again"


@pytest.mark.parametrize("content", [None, b"", b"a PLAN", b"a plan and more"])
def test_an_altered_plan_is_refused_and_the_bundle_still_opens(
    store: PlanStore, content: bytes | None
) -> None:
    record = add(store)
    path = store.bundle.directory / record.file.path
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    opened = PlanStore(Bundle.open(store.bundle.directory, is_full_check=True))
    with pytest.raises(PlanMismatchError, match="meancache-trt plan"):
        opened.checked_path(opened.records()[0])


def test_a_bundle_whose_folder_goes_meanwhile_is_said(store: PlanStore) -> None:
    with store.lock(KEY), store.building(KEY) as file:
        shutil.rmtree(file.parent)
        with pytest.raises(InputError, match="cannot add plans to"):
            store.add(unplaced(), file)


def test_the_same_bytes_again_stay_where_they_are(store: PlanStore) -> None:
    first = add(store)
    assert add(store) == first
    assert store.checked_path(first).read_bytes() == b"a plan"


def test_what_a_killed_build_left_behind_is_cleaned_up(store: PlanStore) -> None:
    record = add(store)
    folder = store.bundle.directory / "plans"
    stem = record.file.path.removeprefix("plans/").rpartition(".")[0].rpartition(".")[0]
    orphans = {
        folder / f".{stem}.abcd1234.building",  # killed while it wrote
        folder / f"{stem}.0badc0de.plan",  # killed before the manifest knew of it
        folder / f"{stem}.0badc0de.json",
    }
    others = {folder / "notes.txt", folder / "mine.plan"}
    for path in orphans | others:
        path.write_bytes(b"left")
    assert {*store.clean()} == orphans
    assert all(path.exists() for path in others)
    assert store.checked_path(record)
    assert store.clean() == []


def test_a_build_in_progress_is_not_cleaned_up(store: PlanStore) -> None:
    other = PlanStore(Bundle.open(store.bundle.directory))
    with store.lock(KEY), store.building(KEY) as file:
        assert other.clean() == []
        assert file.exists()
    assert not file.exists()


def test_whoever_waits_for_a_key_says_so(store: PlanStore) -> None:
    other = PlanStore(Bundle.open(store.bundle.directory))

    class WaitsError(Exception):
        pass

    def wait() -> None:
        raise WaitsError

    with store.lock(KEY):
        with pytest.raises(WaitsError), other.lock(KEY, wait):
            pass
        with other.lock(CHANGES["version"](KEY), wait):  # another key is nobody's business
            pass
    with other.lock(KEY, wait):
        pass


def test_a_bundle_that_cannot_be_written_is_said(store: PlanStore) -> None:
    (store.bundle.directory / "plans").write_text("a file is in the way")  # also for root
    with (
        pytest.raises(InputError, match=r"cannot add plans to .*make it writable"),
        store.lock(KEY),
    ):
        pass
    assert store.records() == store.clean() == []


def loadable(store: PlanStore, *, capability: str = "8.9", version: str = "1.7.1") -> PlanRecord:
    component = store.bundle.export.components[COMPONENT]
    found = store.loadable(
        COMPONENT, component, flavour="tensorrt_rtx", version=version, capability=capability
    )
    return found[0]


def test_a_plan_is_loadable_where_its_graph_library_and_gpu_are(store: PlanStore) -> None:
    graph = graph_digest(store.bundle, store.bundle.export.components[COMPONENT])
    record = add(store, msgspec.structs.replace(KEY, graph=graph))
    assert loadable(store) == record
    with pytest.raises(PlanMismatchError, match=r"capability 12\.0, found tensorrt_rtx .* 8\.9"):
        loadable(store, capability="12.0")
    with pytest.raises(PlanMismatchError, match=r"1\.8\.0 .*found tensorrt_rtx 1\.7\.1"):
        loadable(store, version="1.8.0")


def test_a_plan_of_another_graph_is_not_loadable(store: PlanStore) -> None:
    add(store)
    with pytest.raises(PlanMismatchError, match="build it with `meancache-trt plan"):
        loadable(store)


def test_a_hardware_compatible_plan_serves_ampere_and_later(store: PlanStore) -> None:
    graph = graph_digest(store.bundle, store.bundle.export.components[COMPONENT])
    key = msgspec.structs.replace(
        KEY, graph=graph, options=BuildOptions(hardware_compatibility="ampere_plus")
    )
    record = add(store, key)
    assert loadable(store, capability="12.0") == loadable(store, capability="8.0") == record
    with pytest.raises(PlanMismatchError):
        loadable(store, capability="7.5")
