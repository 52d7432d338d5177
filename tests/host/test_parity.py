"""The C++ host makes what the Python host makes, from the same noise."""

from __future__ import annotations

import concurrent.futures

import numpy as np
import pytest

from meancache_trt.bundle import Bundle
from meancache_trt.engine.native import NativeBundle, NativeLibrary, NativeSession
from meancache_trt.meancache.noise import philox_normal
from meancache_trt.render import Pipeline
from tests.host.conftest import Subject

# Two libraries run the same float32 graphs: measured 1e-6 to 6e-6 over 50 evaluations.
LATENT_TOLERANCE = 1e-4
PIXEL_TOLERANCE = 1 / 255


@pytest.mark.parametrize("schedule", ["full", "b10"])
def test_latents_and_pictures_equal_the_python_hosts(
    subject: Subject, library: NativeLibrary, schedule: str
) -> None:
    with Pipeline(Bundle.open(subject.bundle), threads=1) as pipeline:
        chosen = pipeline.schedule(schedule)
        session = pipeline.session(chosen)
        noise = philox_normal(7, pipeline.resolution().noise_shape)[None]
        expected = session.run(noise, subject.tensors, pipeline.guidance(None, chosen))
    with (
        NativeBundle(subject.bundle, library=library) as bundle,
        bundle.session(schedule, threads=1) as native,
    ):
        native.set_conditioning(subject.tensors)
        latents = native.run(noise)
        pictures, rgb = native.decode(), native.decode_rgb()
    np.testing.assert_allclose(latents, expected.latents, rtol=0, atol=LATENT_TOLERANCE)
    np.testing.assert_allclose(pictures, expected.pictures, rtol=0, atol=PIXEL_TOLERANCE)
    assert np.abs(rgb - expected.pictures * 255.0).max() <= 1.0


def test_a_seed_gives_the_noise_of_the_python_host(flux: Subject, library: NativeLibrary) -> None:
    with (
        NativeBundle(flux.bundle, library=library) as bundle,
        bundle.session("b6", batch=2, threads=1) as native,
    ):
        native.set_conditioning({name: twice(value) for name, value in flux.tensors.items()})
        seeds = [3, 2**64 - 1]
        noise = np.stack([philox_normal(seed, native.noise_shape[1:]) for seed in seeds])
        # Equal but for one value in 10^8 (meancache/noise.py), so that latents are equal.
        np.testing.assert_array_equal(native.run(seeds=seeds), native.run(noise))


def twice(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values, values])


def test_a_batch_equals_its_samples(subject: Subject, library: NativeLibrary) -> None:
    with (
        NativeBundle(subject.bundle, library=library) as bundle,
        bundle.session("b10", threads=1) as single,
        bundle.session("b10", batch=2, threads=1) as pair,
    ):
        single.set_conditioning(subject.tensors)
        # Guided: two prompts, then two negative prompts.
        pair.set_conditioning(
            {name: np.repeat(value, 2, axis=0) for name, value in subject.tensors.items()}
        )
        together = pair.run(seeds=[1, 2])
        alone = np.concatenate([single.run(seeds=[1]), single.run(seeds=[2])])
    # OpenVINO may choose other kernels for another batch.
    np.testing.assert_allclose(together, alone, rtol=0, atol=LATENT_TOLERANCE)


def test_token_ids_give_the_conditioning_of_the_python_host(
    flux: Subject, library: NativeLibrary
) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="it makes the token ids")
    (prompt,) = flux.conditioning.prompts
    with (
        NativeBundle(flux.bundle, library=library) as bundle,
        bundle.session("b6", threads=1) as given,
        bundle.session("b6", threads=1) as encoding,
    ):
        given.set_conditioning(flux.tensors)
        for name, shape in bundle.text_encoders().items():
            path = flux.bundle / "pipeline" / name / "tokenizer.json"
            ids = tokenizers.Tokenizer.from_file(str(path)).encode(prompt).ids
            assert (len(ids),) == shape
            encoding.set_token_ids(name, np.array([ids]))
        found, expected = encoding.run(seeds=[5]), given.run(seeds=[5])
    np.testing.assert_allclose(found, expected, rtol=0, atol=LATENT_TOLERANCE)


@pytest.mark.parametrize("schedule", ["b10"])
def test_tiled_decoding_equals_the_python_hosts(
    subject: Subject, library: NativeLibrary, schedule: str
) -> None:
    with Pipeline(Bundle.open(subject.bundle), threads=1) as pipeline:
        session = pipeline.session(pipeline.schedule(schedule))
        latent = philox_normal(1, session.loop.final.shape)
        expected = {tiled: session.decode(latent, vae_tiling=tiled) for tiled in (False, True)}
    with (
        NativeBundle(subject.bundle, library=library) as bundle,
        bundle.session(schedule, threads=1) as native,
    ):
        for tiled, pictures in expected.items():
            found = native.decode(latent, vae_tiling=tiled)
            np.testing.assert_allclose(found, pictures, rtol=0, atol=PIXEL_TOLERANCE)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_eight_threads_give_the_serial_results(
    flux: Subject, library: NativeLibrary, concurrency: int
) -> None:
    with NativeBundle(flux.bundle, library=library) as bundle:
        sessions = [bundle.session("b6", threads=1, concurrency=concurrency) for _ in range(8)]
        for session in sessions:
            session.set_conditioning(flux.tensors)

        def rendered(session: NativeSession, seed: int) -> np.ndarray:
            session.run(seeds=[seed])
            return session.decode()

        serial = [rendered(session, seed) for seed, session in enumerate(sessions)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            parallel = list(pool.map(rendered, sessions, range(8)))
        for session in sessions:
            session.close()
    np.testing.assert_array_equal(parallel, serial)
