"""Pictures at a shorter text length are those at the full one, whatever stands beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from meancache_trt.bundle import Bundle
from meancache_trt.conditioning import Conditioning
from meancache_trt.meancache.schedule import bake
from meancache_trt.render import Pipeline
from meancache_trt.rendering import Rendering
from meancache_trt.shapes import Range
from meancache_trt.text_length import cut_to_bucket
from tests.export.families import TEXT_TOKENS, TinyExport, shared_export

STEPS = 6
BUCKETS = (8, TEXT_TOKENS)

TOLERANCE = 1e-5
"""Float32 sums in another order, over 6 evaluations of values up to 4; measured 1e-6."""


@pytest.fixture(scope="module", params=["qwen_image", "hunyuan_video", "z_image"])
def masked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyExport:
    return shared_export(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def pipeline(masked: TinyExport) -> Iterator[Pipeline]:
    with Pipeline(masked.bundle, embedding_cache="off") as opened:
        yield opened


@pytest.fixture(scope="module")
def uncut(masked: TinyExport) -> Iterator[Pipeline]:
    """The same bundle, made before there were text lengths to choose from."""
    export = msgspec.structs.replace(masked.exported, text_buckets=())
    manifest = msgspec.structs.replace(masked.bundle.manifest, export=export)
    with Pipeline(Bundle(masked.directory, manifest), embedding_cache="off") as opened:
        yield opened


def embeddings(bundle: Bundle, lengths: Sequence[int]) -> Conditioning:
    """Random embeddings of prompts of so many tokens, with random ones behind them."""
    tensors: dict[str, NDArray[Any]] = {}
    for name, record in bundle.export.components["transformer"].inputs.items():
        if record.role == "conditioning":
            shape = record.resolved({"text_tokens": bundle.export.text_tokens}, skip=1)
            drawn = [np.random.default_rng(length).standard_normal(shape) for length in lengths]
            tensors[name] = np.array(drawn, np.float32)
        if record.role == "text_mask":
            tensors[name] = np.arange(bundle.export.text_tokens) < np.array(lengths)[:, None]
    return Conditioning(tuple(f"{length} tokens" for length in lengths), tensors)


def rendered(
    pipeline: Pipeline, prompts: Conditioning, seeds: Sequence[int], negative: int = 2
) -> list[Rendering]:
    is_guided = pipeline.bundle.export.guidance.is_classifier_free
    return pipeline.render(
        prompts,
        negative_prompt=embeddings(pipeline.bundle, [negative]) if is_guided else "",
        seed=seeds,
        schedule=bake("euler", pipeline.grid(STEPS), range(STEPS)),
    )


def mask_name(bundle: Bundle) -> str:
    return bundle.export.components["transformer"].input_named("text_mask")


@pytest.mark.parametrize("length", [1, 3, 8, 9])
def test_a_picture_is_that_of_the_full_length(
    pipeline: Pipeline, uncut: Pipeline, length: int
) -> None:
    prompts = embeddings(pipeline.bundle, [length])
    ((found,), (expected,)) = (rendered(each, prompts, [5]) for each in (pipeline, uncut))
    np.testing.assert_allclose(found.latent, expected.latent, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(found.pixels, expected.pixels, rtol=0, atol=TOLERANCE)


def test_a_token_of_the_prompt_itself_would_be_missed(uncut: Pipeline) -> None:
    prompts = embeddings(uncut.bundle, [8])
    (whole,) = rendered(uncut, prompts, [5])
    prompts.tensors[mask_name(uncut.bundle)][0, 7] = False
    (shorter,) = rendered(uncut, prompts, [5])
    assert np.abs(whole.latent - shorter.latent).max() > 10 * TOLERANCE


def test_a_picture_does_not_depend_on_the_lengths_of_its_neighbours(pipeline: Pipeline) -> None:
    prompts = embeddings(pipeline.bundle, [3, 12, 5])
    together = rendered(pipeline, prompts, [7, 8, 9])
    for index, picture in enumerate(together):
        (alone,) = rendered(pipeline, prompts.select(index), [7 + index])
        np.testing.assert_array_equal(alone.latent, picture.latent)


@pytest.mark.parametrize(
    ("lengths", "bucket"), [([1], 8), ([8], 8), ([9], 12), ([12], 12), ([3, 9], 12), ([3, 8], 8)]
)
def test_the_shortest_length_that_holds_every_prompt_is_taken(
    masked: TinyExport, lengths: list[int], bucket: int
) -> None:
    given = embeddings(masked.bundle, lengths)
    found, tensors = cut_to_bucket(masked.exported, given)
    assert (found, masked.exported.text_buckets) == (bucket, BUCKETS)
    for name, tensor in tensors.items():
        has_tokens = given.tensors[name].shape[1] == TEXT_TOKENS  # and no pooled features
        expected = given.tensors[name][:, :bucket] if has_tokens else given.tensors[name]
        np.testing.assert_array_equal(tensor, expected)


def test_a_mask_with_a_gap_takes_the_full_length(masked: TinyExport) -> None:
    given = embeddings(masked.bundle, [4, 4])
    given.tensors[mask_name(masked.bundle)][1, :3] = False  # the fourth token alone
    found, tensors = cut_to_bucket(masked.exported, given)
    assert found == TEXT_TOKENS
    assert all(tensors[name] is tensor for name, tensor in given.tensors.items())


def test_a_prompt_without_any_token_takes_the_shortest_length(masked: TinyExport) -> None:
    assert cut_to_bucket(masked.exported, embeddings(masked.bundle, [0]))[0] == BUCKETS[0]


def test_a_bundle_whose_network_has_no_mask_has_one_length(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tiny = shared_export("flux", tmp_path_factory)
    assert tiny.exported.text_buckets == ()
    assert tiny.exported.text_lengths == (TEXT_TOKENS,)
    assert tiny.exported.ranges.text_tokens == Range(TEXT_TOKENS, TEXT_TOKENS, TEXT_TOKENS)
    given = embeddings(tiny.bundle, [3])
    assert cut_to_bucket(tiny.exported, given) == (TEXT_TOKENS, given.tensors)


def test_sessions_are_kept_by_text_length(pipeline: Pipeline) -> None:
    schedule = bake("euler", pipeline.grid(STEPS), [0, 3])
    full = pipeline.session(schedule)
    assert pipeline.session(schedule, text_tokens=TEXT_TOKENS) is full
    short = pipeline.session(schedule, text_tokens=BUCKETS[0])
    assert short is not full
    assert pipeline.session(schedule, text_tokens=BUCKETS[0]) is short


def test_a_plan_is_asked_to_cover_every_length(masked: TinyExport) -> None:
    assert masked.exported.ranges.text_tokens == Range(8, 12, 12)
    buckets = (16, 32, 64, 128)
    longer = msgspec.structs.replace(masked.exported, text_tokens=128, text_buckets=buckets)
    assert longer.ranges.text_tokens == Range(16, 64, 128)
