from __future__ import annotations

from pathlib import Path

from meancache_trt.bundle import Bundle
from meancache_trt.engine.tensorrt.runtime_cache import RuntimeCache
from tests.engine.tensorrt.conftest import Open, run, schedule_of
from tests.fakes.cuda import FakeDevice
from tests.fakes.tensorrt import VERSION, fake_library


def render(open_fake: Open, **options: object) -> tuple[int, tuple[str, ...]]:
    """How many graphs were compiled for a render, and what was noted."""
    with open_fake(**options) as fake:
        session = fake.session(schedule_of(2))
        run(session, fake.bundle)
        compiled = len(fake.world.compiled)
    return compiled, fake.runtime.notes


def only_file(directory: Path) -> Path:
    (path,) = directory.glob("*.cache")
    return path


def test_kernels_are_compiled_once_on_a_machine(
    planned: Bundle, open_fake: Open, tmp_path: Path
) -> None:
    assert render(open_fake) == (4, ())
    name = f"tensorrt_rtx-{VERSION}-Fake-GPU-8.9.cache"
    assert only_file(tmp_path / "cache").name == name
    assert render(open_fake) == (0, ())


def test_each_gpu_and_version_has_a_file_of_its_own(tmp_path: Path) -> None:
    paths = set()
    for product, capability, version in (("A", "8.9", "1"), ("B", "8.9", "1"), ("A", "8.9", "2")):
        library, _ = fake_library(FakeDevice(), version=version)
        paths.add(RuntimeCache(library, product, capability, tmp_path).path)
    assert len(paths) == 3


def test_a_damaged_cache_is_said_and_replaced(
    planned: Bundle, open_fake: Open, tmp_path: Path
) -> None:
    render(open_fake)
    path = only_file(tmp_path / "cache")
    path.write_bytes(b"nonsense")
    compiled, notes = render(open_fake)
    assert compiled == 4
    (note,) = notes
    assert "was made elsewhere or is damaged; it will be replaced" in note
    assert render(open_fake) == (0, ())


def test_a_cache_that_cannot_be_written_is_noted_and_does_no_harm(
    planned: Bundle, open_fake: Open, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("in the way")
    compiled, (note,) = render(open_fake)
    assert compiled == 4
    assert "compiled kernels could not be kept in" in note


def test_the_data_centre_flavour_has_none(planned: Bundle, tmp_path: Path) -> None:
    library, world = fake_library(FakeDevice(), "tensorrt")
    cache = RuntimeCache(library, "A GPU", "8.9", tmp_path)
    cache.attach(object())  # a configuration without caches
    cache.save()
    cache.close()
    assert not list(tmp_path.glob("*.cache"))
    assert cache.problem is None
    assert not world.compiled
