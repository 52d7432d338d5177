"""The build itself: CTest, what is exported and installed, the examples, and memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from scripts.host.building import ROOT, build, openvino_folder, run
from scripts.host.memory import valgrind
from scripts.host.mutations import copied

from meancache_trt.bundle import Bundle
from meancache_trt.meancache.noise import philox_normal
from meancache_trt.meancache.schedule import bake
from meancache_trt.meancache.sigmas import make_grid
from meancache_trt.render import Pipeline
from tests.export.families import shared_export
from tests.host.conftest import Host, Subject, require_tools

STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only")


def test_ctest_passes(host: Host) -> None:
    passed = run("ctest", "--output-on-failure", "--no-tests=error", cwd=host.build)
    assert "100% tests passed" in passed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose networks are a few kilobytes of random values."""
    bundle = tmp_path_factory.mktemp("tiny") / "tiny.mcb"
    copied(shared_export("flux", tmp_path_factory).directory, bundle)
    Bundle.open(bundle).add_schedule(bake("ab2", make_grid(8, shift=3.0), (0, 2, 5), name="b3"))
    return bundle


def test_sanitizers_find_nothing_in_tests_and_sessions(host: Host, tiny: Path) -> None:
    folder = host.build.with_name("host-sanitized")
    folder.mkdir(parents=True, exist_ok=True)
    options = [
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DMEANCACHE_TRT_SANITIZE=ON",
        "-DMEANCACHE_TRT_OPENVINO=ON",
        f"-DOpenVINO_DIR={openvino_folder()}",
        "-DBUILD_SHARED_LIBS=OFF",
    ]
    with FileLock(folder / ".lock"):
        build(folder, options)
        assert "100% tests passed" in run("ctest", "--output-on-failure", cwd=folder)
    # TBB loads a part of itself in a way that the sanitizers refuse, unless it is told of them.
    environment = {**os.environ, "TBB_ENABLE_SANITIZERS": "1"}
    done = subprocess.run(
        [folder / "engine/host/tests/cycles", tiny, "2"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    ("compiler", "language", "standard", "header"),
    [
        ("cc", "c", "c99", "meancache_trt.h"),
        ("c++", "c++", "c++17", "meancache_trt.h"),
        ("c++", "c++", "c++17", "meancache_trt.hpp"),
    ],
)
def test_headers_compile_without_a_warning(
    compiler: str, language: str, standard: str, header: str
) -> None:
    require_tools()
    include = ROOT / "engine" / "include"
    source = f'#include "{header}"\n#include "{header}"\n'
    done = subprocess.run(
        [compiler, *STRICT, f"-std={standard}", "-x", language, f"-I{include}", "-"],
        input=source, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_exactly_the_c_functions_are_exported(host: Host) -> None:
    if shutil.which("nm") is None:
        pytest.skip("binutils' nm lists the symbols; it is not installed")
    listed = run("nm", "-D", "--defined-only", host.library).splitlines()
    exported = {line.split()[-1] for line in listed}
    declared = {
        word.removesuffix("(").split("(")[0]
        for line in (ROOT / "engine/include/meancache_trt.h").read_text().splitlines()
        if line.startswith("MCT_API")
        for word in line.split()
        if word.startswith("mct_") and "(" in word
    }
    assert len(declared) >= 20
    assert exported == declared


def test_pkg_config_gives_what_a_program_needs(host: Host, tmp_path: Path) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed")
    environment = {**os.environ, "PKG_CONFIG_PATH": str(host.prefix / "lib" / "pkgconfig")}
    flags = subprocess.run(
        ["pkg-config", "--cflags", "--libs", "meancache_trt"],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    program = tmp_path / "minimal"
    source = ROOT / "examples" / "c" / "minimal.c"
    # The linker asks for what the library itself needs, which lies where OpenVINO is.
    run("cc", "-std=c99", source, "-o", program, *flags, "-Wl,--allow-shlib-undefined")
    assert program.is_file()


def test_the_static_library_links_by_find_package(
    host: Host, flux: Subject, tmp_path: Path
) -> None:
    """By the name that it has beside the shared one; what it is made of comes along."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(ROOT / "examples" / "c" / "minimal.c", source)
    (source / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\n"
        "project(program C CXX)\n"
        "find_package(meancache_trt 0.1 REQUIRED CONFIG)\n"
        "add_executable(program minimal.c)\n"
        "set_target_properties(program PROPERTIES LINKER_LANGUAGE CXX)\n"
        "target_link_libraries(program PRIVATE meancache_trt::meancache_trt_static)\n"
    )
    build(tmp_path / "build", [f"-DCMAKE_PREFIX_PATH={host.prefix}"], source=source)
    program = tmp_path / "build" / "program"
    done = subprocess.run([program, flux.bundle], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"P6\n64 64\n255\n")


def test_minimal_c_program_renders(host: Host, flux: Subject, tmp_path: Path) -> None:
    picture = tmp_path / "picture.ppm"
    with picture.open("wb") as out:
        subprocess.run([host.examples / "minimal", flux.bundle], stdout=out, check=True)
    assert np.asarray(Image.open(picture)).shape == (64, 64, 3)


def example(host: Host, *arguments: str | Path) -> str:
    if not (host.examples / "render").is_file():
        pytest.skip("examples/cpp/render needs libpng-dev and nlohmann-json3-dev")
    return run(host.examples / "render", *arguments, "--threads", "1")


def expected_picture(subject: Subject, seed: int) -> np.ndarray:
    with Pipeline(Bundle.open(subject.bundle), threads=1) as pipeline:
        chosen = pipeline.schedule("b10")
        noise = philox_normal(seed, pipeline.resolution().noise_shape)[None]
        scale = pipeline.guidance(None, chosen)
        return pipeline.session(chosen).run(noise, subject.tensors, scale).pictures[0]


def test_render_example_writes_the_python_hosts_pictures(
    host: Host, subject: Subject, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompt.safetensors"
    subject.conditioning.select(0).save(prompts)
    more: list[str | Path] = []
    if len(subject.conditioning.prompts) == 2:
        negative = tmp_path / "negative.safetensors"
        subject.conditioning.select(1).save(negative)
        more = ["--negative", negative]
    out = tmp_path / "out.png"
    written = example(host, subject.bundle, prompts, out, "--schedule", "b10", "--seed", "7", *more)
    expected = expected_picture(subject, 7)
    frames = expected if expected.ndim == 4 else expected[None]
    paths = written.split()
    assert len(paths) == len(frames)
    for path, frame in zip(paths, frames, strict=True):
        # One step of 255: floats that differ by 1e-6 may round to either side.
        assert np.abs(np.asarray(Image.open(path)) - frame * 255.0).max() <= 1.5


def test_render_example_takes_token_ids(host: Host, flux: Subject, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="it makes the token ids")
    lines = []
    for name in ("text_encoder", "text_encoder_2"):
        path = flux.bundle / "pipeline" / name / "tokenizer.json"
        ids = tokenizers.Tokenizer.from_file(str(path)).encode(flux.conditioning.prompts[0]).ids
        lines.append(" ".join([name, *map(str, ids)]))
    prompts, out = tmp_path / "ids.txt", tmp_path / "out.png"
    prompts.write_text("\n".join(lines) + "\n")
    example(host, flux.bundle, prompts, out, "--schedule", "b10", "--seed", "7")
    found = np.asarray(Image.open(out))
    assert np.abs(found - expected_picture(flux, 7) * 255.0).max() <= 1.5


def test_render_example_says_what_is_wrong(host: Host, flux: Subject, tmp_path: Path) -> None:
    program = host.examples / "render"
    if not program.is_file():
        pytest.skip("examples/cpp/render needs libpng-dev and nlohmann-json3-dev")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 20)
    done = subprocess.run(
        [program, flux.bundle, broken, tmp_path / "out.png"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "its header is longer than the file" in done.stderr


@pytest.mark.slow
def test_valgrind_finds_no_leak_in_cycles_of_create_run_destroy(host: Host, tiny: Path) -> None:
    """A few of the hundred cycles of `scripts/prove host`."""
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    found = valgrind(host.build / "engine/host/tests/cycles", tiny, "3")
    assert found.status == 0, found.report[-4000:]
