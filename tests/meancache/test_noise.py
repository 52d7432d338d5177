"""Initial noise: published vectors, the golden file, statistics, and torch's own generator."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from meancache_trt.errors import InputError, RuntimeUnavailableError
from meancache_trt.meancache.noise import philox4x32, philox_normal, torch_normal

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "noise.txt"

SEEDS = st.integers(0, 2**64 - 1)
quick = settings(max_examples=40, deadline=None)

# Rows "philox4x32 10" of tests/kat_vectors in Random123 1.14, by the authors of Philox
# (github.com/DEShawResearch/random123): counter, key, words.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    found = philox4x32(np.array([counter], np.uint32), key)
    assert found.tolist() == [list(words)]


def literal_philox(counter: list[int], key: list[int]) -> list[int]:
    """Figure 2 of the paper in Python integers, one block."""
    for _ in range(10):
        even, odd = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            odd // 2**32 ^ counter[1] ^ key[0],
            odd % 2**32,
            even // 2**32 ^ counter[3] ^ key[1],
            even % 2**32,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@quick
@given(seed=SEEDS, size=st.integers(1, 21))
def test_normal_values_are_box_muller_of_the_blocks(seed: int, size: int) -> None:
    expected = []
    for block in range(math.ceil(size / 4)):
        words = literal_philox([block, 0, 0, 0], [seed % 2**32, seed // 2**32])
        uniform = [(word + 0.5) / 2**32 for word in words]
        for first, second in (uniform[:2], uniform[2:]):
            radius = math.sqrt(-2 * math.log(first))
            expected += [
                radius * math.cos(2 * math.pi * second),
                radius * math.sin(2 * math.pi * second),
            ]
    # NumPy's vector mathematics and Python's may differ in the last bit of a float64, which can
    # move the rounding to float32 by one unit.
    found = philox_normal(seed, (size,))
    np.testing.assert_array_max_ulp(found, np.array(expected[:size], np.float32), maxulp=1)


def read_golden() -> list[tuple[int, tuple[int, ...], list[str]]]:
    cases: list[tuple[int, tuple[int, ...], list[str]]] = []
    seed = 0
    for line in GOLDEN.read_text(encoding="utf-8").splitlines():
        kind, *values = line.split()
        if kind == "seed":
            seed = int(values[0])
        elif kind == "shape":
            cases.append((seed, tuple(map(int, values)), []))
        elif kind != "#":
            cases[-1][2].append(kind)
    return cases


@pytest.mark.parametrize(("seed", "shape", "values"), read_golden())
def test_noise_equals_the_golden_file_to_the_bit(
    seed: int, shape: tuple[int, ...], values: list[str]
) -> None:
    expected = np.array(values, np.float64).astype(np.float32).reshape(shape)
    np.testing.assert_array_equal(philox_normal(seed, shape), expected)


def test_golden_file_is_what_its_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("golden", ROOT / "scripts" / "write_golden.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert GOLDEN.read_text(encoding="utf-8") == script.noise_text()


def normal_distribution(values: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in values])


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63])
def test_noise_is_standard_normal(seed: int) -> None:
    values = np.sort(philox_normal(seed, (4, 64, 64)).ravel().astype(np.float64))
    count = len(values)
    # Fixed seeds, so this never flickers; each bound is four standard errors.
    assert abs(values.mean()) < 4 / math.sqrt(count)
    assert abs(values.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96 / count)
    ranks = (np.arange(count) + 0.5) / count
    distance = np.abs(normal_distribution(values) - ranks).max()
    assert distance < 1.63 / math.sqrt(count)  # Kolmogorov-Smirnov at 1 %


def test_neighbours_pairs_and_seeds_are_uncorrelated() -> None:
    values = philox_normal(7, (2**14,)).astype(np.float64)
    other = philox_normal(8, (2**14,)).astype(np.float64)
    high_word = philox_normal(7 + 2**32, (2**14,)).astype(np.float64)
    for left, right in (
        (values[::2], values[1::2]),
        (values[:-4], values[4:]),
        (values, other),
        (values, high_word),
    ):
        # Four standard errors of a correlation.
        assert abs(np.corrcoef(left, right)[0, 1]) < 4 / math.sqrt(len(left))


@quick
@given(seed=SEEDS, shape=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_noise_is_row_major_and_a_prefix_of_longer_noise(seed: int, shape: list[int]) -> None:
    found = philox_normal(seed, shape)
    assert found.dtype == np.float32
    assert found.shape == tuple(shape)
    longer = philox_normal(seed, (700,))
    np.testing.assert_array_equal(found.ravel(), longer[: found.size])


def test_extreme_words_give_finite_noise() -> None:
    # The smallest u is 2^-33, the largest 1 - 2^-33: neither log(0) nor an infinite radius.
    assert math.sqrt(-2 * math.log(0.5 / 2**32)) == pytest.approx(6.76, abs=0.01)
    assert (2**32 - 1 + 0.5) / 2**32 < 1


@pytest.mark.parametrize("make", [philox_normal, torch_normal])
@pytest.mark.parametrize("seed", [-1, 2**64, -(2**40)])
def test_seeds_beyond_64_bits_are_refused(make: type[object], seed: int) -> None:
    with pytest.raises(InputError, match=f"0 to 18446744073709551615 .*found {seed}"):
        make(seed, (4,))  # type: ignore[call-arg]


@pytest.mark.parametrize("shape", [(), (0,), (4, -1, 4)])
def test_empty_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="1 or more"):
        philox_normal(0, shape)


def test_numpy_integers_are_seeds() -> None:
    for seed in (np.uint64(2**64 - 1), np.int32(5)):
        expected = philox_normal(int(seed), (4,))
        np.testing.assert_array_equal(philox_normal(seed, (4,)), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 42, 2**40 + 3])
@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 2, 2), (2, 3, 4, 4)])
def test_torch_noise_equals_diffusers(seed: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator("cpu").manual_seed(seed)
    expected = randn_tensor((1, *shape), generator=generator, dtype=torch.float32)
    found = torch_normal(seed, shape)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected[0].numpy())


def test_missing_torch_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeUnavailableError, match=r"install meancache-trt\[text\]"):
        torch_normal(0, (4,))
