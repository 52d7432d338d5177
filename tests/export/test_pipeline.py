from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import FluxPipeline
from numpy.typing import NDArray

from meancache_trt.errors import ExportError, InputError
from meancache_trt.export import export_components
from meancache_trt.manifest import Component, Exported
from tests.export.conftest import HEIGHT, WIDTH
from tests.export.tiny_flux import tiny_pipeline

Arrays = dict[str, NDArray[Any]]


class Graphs:
    """An export's graphs in ONNX Runtime."""

    def __init__(self, folder: Path, exported: Exported) -> None:
        self.components = exported.components
        self.sessions = {
            name: onnxruntime.InferenceSession(folder / part.path)
            for name, part in exported.components.items()
        }

    def run(self, name: str, feeds: Arrays) -> Arrays:
        part = self.components[name]
        given = {key: feeds[key] for key in part.inputs}
        outputs = self.sessions[name].run(list(part.outputs), given)
        return dict(zip(part.outputs, outputs, strict=True))


@pytest.fixture(scope="module")
def graphs(exported: Exported, export_folder: Path) -> Graphs:
    return Graphs(export_folder, exported)


def random_feeds(batch: int, rows: int = 4, columns: int = 6, text_tokens: int = 12) -> Arrays:
    generator = np.random.default_rng(0)
    feeds = {
        "noise": generator.standard_normal((batch, 4, 2 * rows, 2 * columns)),
        "hidden_states": generator.standard_normal((batch, rows * columns, 16)),
        "encoder_hidden_states": generator.standard_normal((batch, text_tokens, 48)),
        "pooled_projections": generator.standard_normal((batch, 40)),
        "timestep": generator.uniform(0, 1, batch),
        "guidance": generator.uniform(1, 6, batch),
    }
    return {name: value.astype(np.float32) for name, value in feeds.items()}


def test_batch_of_two_equals_two_singles(graphs: Graphs) -> None:
    feeds = random_feeds(2)
    feeds |= graphs.run("prepare", feeds)
    both = graphs.run("transformer", feeds)["velocity"]
    per_sample = ("image_rope", "text_rope")
    for index in range(2):
        single = {
            name: value if name in per_sample else value[index : index + 1]
            for name, value in feeds.items()
        }
        velocity = graphs.run("transformer", single)["velocity"]
        # float32 matrix products may be blocked otherwise at another batch
        np.testing.assert_allclose(velocity[0], both[index], rtol=0, atol=2e-6)


def test_guidance_and_timestep_reach_the_network(graphs: Graphs) -> None:
    feeds = random_feeds(1)
    feeds |= graphs.run("prepare", feeds)
    base = graphs.run("transformer", feeds)["velocity"]
    for name in ("guidance", "timestep", "pooled_projections", "encoder_hidden_states"):
        moved = graphs.run("transformer", {**feeds, name: feeds[name] * 0.5})["velocity"]
        assert np.abs(moved - base).max() > 1e-4, name


@pytest.mark.parametrize(("rows", "columns", "text_tokens"), [(4, 6, 12), (40, 24, 77), (1, 1, 1)])
def test_prepare_graph_has_the_pipelines_bits(
    graphs: Graphs, pipeline: FluxPipeline, rows: int, columns: int, text_tokens: int
) -> None:
    feeds = random_feeds(2, rows, columns, text_tokens)
    noise = torch.from_numpy(feeds["noise"])
    packed, image_ids = pipeline.prepare_latents(
        2, 4, 8 * rows, 8 * columns, torch.float32, "cpu", None, noise
    )
    packed = pipeline._pack_latents(packed, *noise.shape)
    image_rope = torch.cat(pipeline.transformer.pos_embed(image_ids), dim=-1)
    text_rope = torch.cat(pipeline.transformer.pos_embed(torch.zeros(text_tokens, 3)), dim=-1)

    made = graphs.run("prepare", feeds)

    assert np.array_equal(made["latent"], packed.numpy())
    assert np.array_equal(made["image_rope"], image_rope.numpy())
    assert np.array_equal(made["text_rope"], text_rope.numpy())


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (5, 3)])
def test_decoder_graph_is_what_the_pipeline_does_after_its_loop(
    graphs: Graphs, pipeline: FluxPipeline, rows: int, columns: int
) -> None:
    packed = torch.randn(2, rows * columns, 16, generator=torch.Generator().manual_seed(0))
    vae = pipeline.vae
    latents = pipeline._unpack_latents(packed, 8 * rows, 8 * columns, pipeline.vae_scale_factor)
    latents = (latents / vae.config.scaling_factor) + vae.config.shift_factor
    with torch.inference_mode():
        decoded = vae.decode(latents, return_dict=False)[0]
    expected = pipeline.image_processor.postprocess(decoded, output_type="pt")

    grid = packed.unflatten(1, (rows, columns)).numpy()
    image = graphs.run("vae_decoder", {"latent": grid})["image"]

    # other float32 convolution kernels than torch's; measured 1.2e-6
    np.testing.assert_allclose(np.clip(image, 0, 1), expected.numpy(), rtol=0, atol=1e-5)
    # where the pipeline clips, the graph leaves it to the host, which may have to blend first
    assert image.min() < 0


def test_loop_over_the_graphs_ends_where_the_pipeline_does(
    graphs: Graphs, pipeline: FluxPipeline, exported: Exported
) -> None:
    steps, scale = 4, 3.5
    feeds = random_feeds(1)
    feeds["guidance"][:] = scale
    prepared = graphs.run("prepare", feeds)
    expected = pipeline(
        prompt_embeds=torch.from_numpy(feeds["encoder_hidden_states"]),
        pooled_prompt_embeds=torch.from_numpy(feeds["pooled_projections"]),
        latents=torch.from_numpy(prepared["latent"]),
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=steps,
        guidance_scale=scale,
        output_type="latent",
        return_dict=False,
    )[0]
    sigmas = pipeline.scheduler.sigmas.numpy()
    timesteps = pipeline.scheduler.timesteps.numpy().astype(np.float64) * exported.timestep_scale

    latent, zeros = prepared["latent"], np.zeros_like(prepared["latent"])
    for step in range(steps):
        timestep = timesteps[step : step + 1].astype(np.float32)
        output = graphs.run(
            "transformer", {**feeds, **prepared, "hidden_states": latent, "timestep": timestep}
        )
        weights = np.array([sigmas[step + 1] - sigmas[step], 0, 0, 0], dtype=np.float32)
        history = {f"history_{age}": zeros for age in (1, 2, 3)}
        update = {"latent": latent, "model_output": output["velocity"], "weights": weights}
        latent = graphs.run("update/h4", {**update, **history})["next_latent"]

    # four evaluations that agree to about 1e-6 each
    np.testing.assert_allclose(latent, expected.numpy(), rtol=0, atol=2e-5)


def test_almost_all_weight_bytes_stay_in_the_checkpoint(exported: Exported) -> None:
    for name in ("transformer", "vae_decoder"):
        part = exported.components[name]
        assert part.shared_bytes >= 0.95 * part.weight_bytes > 0


def test_weights_are_hard_links_beside_the_graph(
    exported: Exported, flux_folder: Path, export_folder: Path
) -> None:
    for name, part in (("transformer", "transformer"), ("vae_decoder", "vae")):
        (file,) = exported.components[name].weights
        assert file.is_linked
        placed = export_folder / file.path
        assert placed.parent == (export_folder / exported.components[name].path).parent
        assert placed.samefile(flux_folder / part / placed.name)


def dimensions(values: Any) -> dict[str, tuple[int | str, ...]]:
    return {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in values
    }


def test_graph_files_have_the_recorded_names_and_dimensions(
    exported: Exported, export_folder: Path
) -> None:
    for part in exported.components.values():
        graph = onnx.load(export_folder / part.path, load_external_data=False).graph
        assert dimensions(graph.input) == {name: r.shape for name, r in part.inputs.items()}
        assert dimensions(graph.output) == {name: r.shape for name, r in part.outputs.items()}


def test_graph_files_name_no_path_of_this_machine(
    exported: Exported, export_folder: Path, flux_folder: Path
) -> None:
    for part in exported.components.values():
        content = (export_folder / part.path).read_bytes()
        assert str(flux_folder.parent).encode() not in content
        assert str(Path.cwd()).encode() not in content


def test_record_holds_what_a_host_needs(exported: Exported) -> None:
    assert exported.family == "flux"
    assert exported.model.name == "tiny-flux"
    assert exported.guidance.rule == "embedded"
    assert exported.text_tokens == 12
    assert exported.scheduler["shift"] == 3.0
    assert exported.num_train_timesteps == 1000
    assert {file.path for file in exported.encoder_weights} == {
        "pipeline/text_encoder/model.safetensors",
        "pipeline/text_encoder_2/model.safetensors",
    }


@pytest.fixture(scope="module")
def half_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub snapshot (links to blobs), float16, sharded, without a guidance embedding."""
    root = tmp_path_factory.mktemp("half") / "models--owner--tiny-schnell"
    half = tiny_pipeline(has_guidance=False).to(torch.float16)
    half.save_pretrained(root / "saved", max_shard_size="200KB")
    (root / "blobs").mkdir()
    for file in sorted((root / "saved").rglob("*.*")):
        blob = root / "blobs" / file.relative_to(root / "saved").as_posix().replace("/", "-")
        entry = root / "snapshots" / "c0ffee" / file.relative_to(root / "saved")
        entry.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob)
        entry.symlink_to(blob)
    return root / "snapshots" / "c0ffee"


@pytest.fixture(scope="module")
def half_exported(half_folder: Path) -> Exported:
    return export_components(half_folder, half_folder.parent / "exported", height=16, width=16)


def casts(folder: Path, component: Component) -> int:
    graph = onnx.load(folder / component.path, load_external_data=False).graph
    stored = {weight.name for weight in graph.initializer if weight.external_data}
    return sum(node.op_type == "Cast" and node.input[0] in stored for node in graph.node)


def test_sharded_float16_checkpoint_is_cast_inside_the_graph(
    half_exported: Exported, half_folder: Path
) -> None:
    transformer = half_exported.components["transformer"]
    folder = half_folder.parent / "exported"
    graph = onnx.load(folder / transformer.path, load_external_data=False).graph
    stored = [weight for weight in graph.initializer if weight.external_data]

    assert len(transformer.weights) > 1
    assert {weight.data_type for weight in stored} == {onnx.TensorProto.FLOAT16}
    assert casts(folder, transformer) == len(stored)
    assert transformer.shared_bytes >= 0.95 * transformer.weight_bytes
    assert max(record.max_abs_error for record in half_exported.parity) <= 1e-4


def test_hub_snapshot_is_linked_through_to_its_blobs(
    half_exported: Exported, half_folder: Path
) -> None:
    assert half_exported.model.name == "owner/tiny-schnell"
    assert half_exported.model.revision == "c0ffee"
    for file in half_exported.components["transformer"].weights:
        placed = half_folder.parent / "exported" / file.path
        assert file.is_linked
        assert not placed.is_symlink()
        assert placed.samefile(half_folder / "transformer" / placed.name)


def test_model_without_guidance_embedding_takes_no_scale(half_exported: Exported) -> None:
    assert half_exported.guidance.rule == "none"
    assert "guidance" not in half_exported.components["transformer"].inputs


@pytest.fixture
def altered(flux_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "altered"
    shutil.copytree(flux_folder, folder)
    return folder


def change_config(folder: Path, component: str, **settings: Any) -> None:
    path = folder / component / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def export(folder: Path, target: Path, *, height: int = HEIGHT) -> Exported:
    return export_components(folder, target, height=height, width=WIDTH, check_parity=False)


def test_impossible_size_is_refused_before_anything_is_written(
    flux_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="multiple of 8"):
        export(flux_folder, tmp_path / "out", height=33)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder_2"])
def test_truncated_weights_are_refused_before_anything_is_written(
    altered: Path, tmp_path: Path, component: str
) -> None:
    (file,) = (altered / component).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ExportError, match="truncated"):
        export(altered, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_refused(altered: Path, tmp_path: Path) -> None:
    (altered / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"diffusion_pytorch_model.safetensors is missing"):
        export(altered, tmp_path / "out")


def test_configuration_with_more_layers_than_the_weights_is_refused(
    altered: Path, tmp_path: Path
) -> None:
    change_config(altered, "transformer", num_layers=2)
    with pytest.raises(ExportError, match=r"lack \d+ tensors: transformer_blocks.1"):
        export(altered, tmp_path / "out")


def test_configuration_of_another_width_is_refused(altered: Path, tmp_path: Path) -> None:
    change_config(altered, "transformer", joint_attention_dim=64)
    with pytest.raises(ExportError, match=r"context_embedder.weight is \(64, 48\).*\(64, 64\)"):
        export(altered, tmp_path / "out")


def test_transformer_of_another_class_is_refused(altered: Path, tmp_path: Path) -> None:
    change_config(altered, "transformer", _class_name="SD3Transformer2DModel")
    with pytest.raises(ExportError, match="expected FluxTransformer2DModel"):
        export(altered, tmp_path / "out")


def test_text_encoder_of_another_class_is_refused(altered: Path, tmp_path: Path) -> None:
    path = altered / "model_index.json"
    index = {**json.loads(path.read_text()), "text_encoder": ["transformers", "SiglipTextModel"]}
    path.write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"text_encoder is .*SiglipTextModel.*CLIPTextModel"):
        export(altered, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_encoder_of_another_width_is_refused(altered: Path, tmp_path: Path) -> None:
    change_config(altered, "text_encoder_2", d_model=64)
    with pytest.raises(ExportError, match=r"text_encoder_2 tensor .* is \(.*\(.*64.*\)"):
        export(altered, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_target_that_cannot_be_written_is_told(flux_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match="cannot write"):
        export(flux_folder, tmp_path / "file" / "out")
