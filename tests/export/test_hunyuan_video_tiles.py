"""Videos that diffusers decodes in pieces, from a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoPipeline
from numpy.typing import NDArray

from meancache_trt.bundle import Bundle, create_bundle
from meancache_trt.conditioning import Conditioning
from meancache_trt.decoder import Decoder
from meancache_trt.errors import InputError
from meancache_trt.export import export_components, hunyuan_video_torch
from meancache_trt.export.tiles import space_axes
from meancache_trt.manifest import Tiling
from meancache_trt.meancache.noise import torch_normal
from meancache_trt.meancache.schedule import bake
from meancache_trt.render import Pipeline
from meancache_trt.rendering import Rendering
from meancache_trt.tiling import levels
from tests.export.tiny_hunyuan_video import tiny_pipeline

HEIGHT, WIDTH, FRAMES, TEXT_TOKENS = 48, 32, 21, 12
STEPS, SCALE, SEED = 3, 4.5, 3

TILE, STRIDE = 32, 16
"""Pixels; diffusers' own 256 and 192 would need larger videos than a test should decode."""

TOLERANCE = 2e-5
"""Other float32 convolution kernels than torch's; measured 5e-6."""

Array = NDArray[np.float32]


@pytest.fixture(scope="module")
def diffusers_pipeline() -> HunyuanVideoPipeline:
    built = tiny_pipeline()
    built.set_progress_bar_config(disable=True)
    return built


@pytest.fixture(scope="module")
def bundle(
    diffusers_pipeline: HunyuanVideoPipeline, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    folder = tmp_path_factory.mktemp("hunyuan") / "tiny-hunyuan"
    diffusers_pipeline.save_pretrained(folder)
    return create_bundle(
        folder.parent / "tiny.mcb",
        lambda target: export_components(
            folder,
            target,
            height=HEIGHT,
            width=WIDTH,
            frames=FRAMES,
            text_tokens=TEXT_TOKENS,
            check_parity=False,  # test_hunyuan_video.py has it
        ),
        {},
    )


@pytest.fixture(scope="module")
def host(bundle: Bundle) -> Iterator[Pipeline]:
    """The bundle, with tiles in space that are small."""
    with Pipeline(with_tiling(bundle, small_tiles(bundle))) as opened:
        yield opened


def small_tiles(bundle: Bundle) -> Tiling:
    assert bundle.export.tiling is not None
    space = space_axes(TILE, STRIDE, unit=8, latent_axis=3, image_axis=3)
    return msgspec.structs.replace(bundle.export.tiling, space=space)


def with_tiling(bundle: Bundle, tiling: Tiling | None) -> Bundle:
    export = msgspec.structs.replace(bundle.export, tiling=tiling)
    return Bundle(bundle.directory, msgspec.structs.replace(bundle.manifest, export=export))


@pytest.fixture
def vae(diffusers_pipeline: HunyuanVideoPipeline) -> Iterator[AutoencoderKLHunyuanVideo]:
    """diffusers' autoencoder, with tiles in space that are small once they are enabled."""
    vae = diffusers_pipeline.vae
    vae.enable_tiling(TILE, TILE, None, STRIDE, STRIDE)
    vae.disable_tiling()
    yield vae
    vae.disable_tiling()


def decoded(host: Pipeline, latent: Array, frames: int, *, vae_tiling: bool = False) -> Array:
    component, runtime = host.bundle.export.components["vae_decoder"], host.runtime
    return Decoder(
        runtime,
        host.graphs.graph(component),
        component,
        latent=runtime.tensor(latent),
        image_shape=(len(latent), 3, frames, 8 * latent.shape[-2], 8 * latent.shape[-1]),
        levels=levels(host.bundle.export.tiling, is_space_tiled=vae_tiling),
    ).run()


def random_latent(batch: int, frames: int, rows: int, columns: int) -> Array:
    shape = (batch, 4, (frames - 1) // 4 + 1, rows, columns)
    generator = np.random.default_rng(frames)
    return (2 * generator.standard_normal(shape)).astype(np.float32)


def reference(vae: AutoencoderKLHunyuanVideo, latent: Array) -> Array:
    with torch.inference_mode():
        found: Array = hunyuan_video_torch.reference_image(
            vae, torch.from_numpy(latent), {}
        ).numpy()
    return found


# One tile up to 13 frames. At 25 and 37 diffusers decodes a last piece and drops all of it.
@pytest.mark.parametrize("frames", [1, 13, 17, 21, 25, 33, 37, 45])
def test_video_is_decoded_in_time_as_diffusers_does_by_default(
    host: Pipeline, vae: AutoencoderKLHunyuanVideo, frames: int
) -> None:
    latent = random_latent(1, frames, 2, 3)
    found = decoded(host, latent, frames)
    assert found.shape == (1, 3, frames, 16, 24)
    np.testing.assert_allclose(found, reference(vae, latent), rtol=0, atol=TOLERANCE)


# In latent rows and columns, of which a tile has 4: a side too long, both, and one that would fit
# but is divided with the other; then in time too, and with a batch.
@pytest.mark.parametrize(
    ("batch", "frames", "rows", "columns"),
    [(1, 1, 6, 4), (1, 1, 6, 9), (1, 5, 3, 8), (1, 1, 4, 4), (1, 17, 5, 3), (2, 21, 2, 5)],
)
def test_video_is_decoded_in_space_as_diffusers_does_where_tiling_is_enabled(
    host: Pipeline,
    vae: AutoencoderKLHunyuanVideo,
    batch: int,
    frames: int,
    rows: int,
    columns: int,
) -> None:
    latent = random_latent(batch, frames, rows, columns)
    vae.use_tiling = True
    found = decoded(host, latent, frames, vae_tiling=True)
    np.testing.assert_allclose(found, reference(vae, latent), rtol=0, atol=TOLERANCE)


def test_the_models_own_tiles_in_space_are_diffusers_own(
    bundle: Bundle, diffusers_pipeline: HunyuanVideoPipeline
) -> None:
    vae = AutoencoderKLHunyuanVideo.from_config(diffusers_pipeline.vae.config)
    vae.load_state_dict(diffusers_pipeline.vae.state_dict())
    vae.enable_tiling()
    latent = random_latent(1, 1, 34, 4)
    with Pipeline(bundle) as opened:
        found = decoded(opened, latent, 1, vae_tiling=True)
    np.testing.assert_allclose(found, reference(vae, latent), rtol=0, atol=TOLERANCE)


def test_memory_of_tiles_is_made_once_for_each_shape(
    host: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    component, runtime = host.bundle.export.components["vae_decoder"], host.runtime
    shapes: list[tuple[int, ...]] = []
    make = runtime.zeros

    def zeros(shape: tuple[int, ...], dtype: str) -> object:
        shapes.append(tuple(shape))
        return make(shape, dtype)

    monkeypatch.setattr(runtime, "zeros", zeros)
    decoder = Decoder(
        runtime,
        host.graphs.graph(component),
        component,
        latent=runtime.tensor(random_latent(1, 33, 2, 2)),
        image_shape=(1, 3, 33, 16, 16),
        levels=levels(host.bundle.export.tiling, is_space_tiled=False),
    )
    first, second = decoder.run(), decoder.run()
    # Five latent frames twice, then three; a tile's latent and its video each time.
    assert sorted(shape[2] for shape in shapes) == [3, 5, 9, 17]
    assert np.array_equal(first, second)


def conditioning() -> Conditioning:
    generator = np.random.default_rng(0)
    tensors = {
        "encoder_hidden_states": generator.standard_normal((1, TEXT_TOKENS, 48)),
        "pooled_projections": generator.standard_normal((1, 40)),
    }
    mask = np.arange(TEXT_TOKENS)[None] < 7
    floats = {name: value.astype(np.float32) for name, value in tensors.items()}
    return Conditioning(("a prompt",), {**floats, "encoder_attention_mask": mask})


def diffusers_video(pipeline: HunyuanVideoPipeline, noise: Array) -> Array:
    given = {name: torch.from_numpy(value) for name, value in conditioning().tensors.items()}
    videos = pipeline(
        prompt_embeds=given["encoder_hidden_states"],
        prompt_attention_mask=given["encoder_attention_mask"],
        pooled_prompt_embeds=given["pooled_projections"],
        latents=torch.from_numpy(noise),
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        output_type="np",
        return_dict=False,
    )[0]
    return np.asarray(videos)


def rendered(host: Pipeline, *, vae_tiling: bool) -> Rendering:
    schedule = bake("euler", host.grid(STEPS), range(STEPS))
    (rendering,) = host.render(
        conditioning(),
        seed=SEED,
        schedule=schedule,
        guidance_scale=SCALE,
        noise="torch",
        vae_tiling=vae_tiling,
    )
    return rendering


@pytest.mark.parametrize("vae_tiling", [False, True])
def test_long_video_is_the_pipelines_own(
    host: Pipeline,
    diffusers_pipeline: HunyuanVideoPipeline,
    vae: AutoencoderKLHunyuanVideo,
    vae_tiling: bool,
) -> None:
    vae.use_tiling = vae_tiling
    noise = torch_normal(SEED, host.resolution().noise_shape)[None]
    (expected,) = diffusers_video(diffusers_pipeline, noise)
    found = rendered(host, vae_tiling=vae_tiling)
    assert found.pixels.shape == (FRAMES, HEIGHT, WIDTH, 3)
    # what is left of the latents' difference after float32 convolutions
    np.testing.assert_allclose(found.pixels, expected, rtol=0, atol=1e-4)
    vae.use_tiling = not vae_tiling
    (other,) = diffusers_video(diffusers_pipeline, noise)
    assert np.abs(other - expected).max() > 1e-2


def test_file_tells_whether_tiles_were_asked_for(host: Pipeline, tmp_path: Path) -> None:
    for vae_tiling in (False, True):
        rendered(host, vae_tiling=vae_tiling).save(tmp_path / "video.png")
        assert f"vae_tiling\0{vae_tiling}".encode() in (tmp_path / "video.png").read_bytes()


def test_tiles_are_refused_before_the_work_where_the_bundle_has_none(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pipeline(with_tiling(bundle, None)) as opened:
        session = opened.session(bake("euler", opened.grid(STEPS), range(STEPS)))
        monkeypatch.setattr(session.loop, "run", lambda *_: pytest.fail("it ran"))
        with pytest.raises(InputError, match="render without it"):
            rendered(opened, vae_tiling=True)
