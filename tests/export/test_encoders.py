from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from meancache_trt.errors import ExportError
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.encoders import build_encoder, load_encoder, named_as_in_module
from meancache_trt.export.family import Size, TextGraph
from meancache_trt.export.flux import FLUX
from meancache_trt.export.graphs import write_graph
from meancache_trt.export.job import F32, Job, WeightPlacement
from meancache_trt.export.networks import text_encoders
from meancache_trt.export.safetensors_file import StoredTensor
from meancache_trt.export.weights import place_weights
from meancache_trt.manifest import Component
from tests.export.tiny_flux import TEXT_TOKENS, randomize, tiny_pipeline

CLIP, T5 = FLUX.text_graphs
COMPONENTS = ("transformer", "vae", "scheduler", *FLUX.text_components)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline whose encoders are not at their initial values."""
    pipeline = tiny_pipeline()
    randomize(pipeline.text_encoder, seed=3)
    randomize(pipeline.text_encoder_2, seed=4)
    folder = tmp_path_factory.mktemp("encoders") / "tiny"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Links to the pipeline, to replace files in; `rewrite` does."""
    copy = tmp_path / "copy"
    for file in saved.rglob("*.*"):
        target = copy / file.relative_to(saved)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(file)
    return copy


def rewrite(folder: Path, part: str, tensors: dict[str, torch.Tensor]) -> None:
    path = folder / part / "model.safetensors"
    path.unlink()
    save_file(tensors, path, {"format": "pt"})


def tensors_of(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / part / "model.safetensors"))


def export(
    folder: Path, text: TextGraph, placement: WeightPlacement = "link"
) -> tuple[Path, Component]:
    source, root = Checkpoint(folder), folder.parent / "out"
    configs = source.configs(COMPONENTS)
    job = Job(source, FLUX, configs, Size(32, 48, TEXT_TOKENS), root, "link", lambda _: None)
    (model,) = (model for model in text_encoders(job) if model.text is text)
    model.check()
    files = place_weights(source.weight_files(model.part), root, model.folder, placement)
    return root, write_graph(model, F32, files)


def ids_for(text: TextGraph, batch: int, tokens: int) -> torch.Tensor:
    ids = torch.randint(1, 28, (batch, tokens), generator=torch.Generator().manual_seed(0))
    if text is CLIP:
        ids[torch.arange(batch), torch.arange(batch) % tokens + 1] = 53  # the end token
    return ids


def error(root: Path, part: Component, network: nn.Module, text: TextGraph, *shape: int) -> float:
    ids = ids_for(text, *shape)
    with torch.inference_mode():
        expected = getattr(network(ids), text.field).numpy()
    session = onnxruntime.InferenceSession(root / part.path)
    (found,) = session.run(None, {"input_ids": ids.numpy()})
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize(("text", "lengths"), [(CLIP, (16,)), (T5, (1, 12, 300))])
def test_graph_equals_the_encoder_at_any_batch_and_length(
    folder: Path, text: TextGraph, lengths: tuple[int, ...]
) -> None:
    root, part = export(folder, text)
    network = load_encoder(text, folder)
    for batch in (1, 3):
        for tokens in lengths:  # 300 tokens: beyond the distances that T5 tells apart
            # float32 sums in another order over one layer; measured at most 4.4e-6
            assert error(root, part, network, text, batch, tokens) <= 2e-5


@pytest.mark.parametrize(("text", "tokens"), [(CLIP, 16), (T5, 300)])
def test_another_runtime_gives_the_same(folder: Path, text: TextGraph, tokens: int) -> None:
    """T5 chooses buckets of distances by a logarithm, which a runtime might round otherwise."""
    root, part = export(folder, text)
    ids = ids_for(text, 2, tokens).numpy()
    (expected,) = onnxruntime.InferenceSession(root / part.path).run(None, {"input_ids": ids})
    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # its own default is bfloat16 on some processors
    model = openvino.Core().compile_model(root / part.path, "CPU", exact)
    (found,) = model(ids).values()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)  # as with torch, above


def stored(root: Path, part: Component) -> set[str]:
    graph = onnx.load(root / part.path, load_external_data=False).graph
    return {weight.name for weight in graph.initializer if weight.external_data}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", [CLIP, T5])
def test_half_precision_shards_are_cast_inside_the_graph(
    folder: Path, text: TextGraph, dtype: torch.dtype
) -> None:
    path = folder / text.component / "model.safetensors"
    half = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    path.unlink()
    names = sorted(half)
    weight_map = {}
    for index, shard in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{index:05d}-of-00002.safetensors"
        save_file({name: half[name] for name in shard}, path.with_name(file), {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    index_file = path.with_name("model.safetensors.index.json")
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    root, part = export(folder, text)

    assert len(part.weights) == 2
    assert part.shared_bytes >= 0.95 * part.weight_bytes
    network = load_encoder(text, folder)
    tokens = 16 if text is CLIP else 12
    assert error(root, part, network, text, 2, tokens) <= 2e-5  # as in float32, above


def test_names_and_constants_of_older_clip_checkpoints_are_understood(folder: Path) -> None:
    older = {
        f"text_model.{name}": value for name, value in tensors_of(folder, "text_encoder").items()
    }
    older["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    rewrite(folder, "text_encoder", older)
    root, part = export(folder, CLIP)
    assert error(root, part, load_encoder(CLIP, folder), CLIP, 2, 16) <= 2e-5
    assert "embeddings.token_embedding.weight" in stored(root, part)


def test_end_token_of_older_clip_configurations_is_the_largest_id(folder: Path) -> None:
    """FLUX.1's own config.json says eos_token_id 2, which means the largest id."""
    path = folder / "text_encoder" / "config.json"
    config = {**json.loads(path.read_text()), "eos_token_id": 2}
    path.unlink()
    path.write_text(json.dumps(config))
    root, part = export(folder, CLIP)
    assert error(root, part, load_encoder(CLIP, folder), CLIP, 3, 16) <= 2e-5


@pytest.mark.parametrize(
    "names",
    [
        ["shared.weight"],
        ["encoder.embed_tokens.weight"],
        ["shared.weight", "encoder.embed_tokens.weight"],
    ],
)
def test_shared_embedding_is_found_under_any_of_its_names(folder: Path, names: list[str]) -> None:
    tensors = tensors_of(folder, "text_encoder_2")
    embedding = tensors.pop("shared.weight")
    rewrite(folder, "text_encoder_2", {**tensors, **{name: embedding.clone() for name in names}})
    root, part = export(folder, T5)
    assert error(root, part, load_encoder(T5, folder), T5, 2, 12) <= 2e-5


def test_a_decoder_in_the_checkpoint_is_left_out(folder: Path) -> None:
    tensors = tensors_of(folder, "text_encoder_2")
    rewrite(
        folder, "text_encoder_2", {**tensors, "decoder.final_layer_norm.weight": torch.ones(48)}
    )
    _, part = export(folder, T5)
    assert part.weight_bytes > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.final_layer_norm.weight": None}, "lack 1 tensors: encoder.final_layer_norm"),
        ({"surplus": torch.ones(1)}, "have unexpected 1 tensors: surplus"),
        ({"encoder.final_layer_norm.weight": torch.ones(47)}, r"\(47\) .*\(48\)"),
    ],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    tensors = {**tensors_of(folder, "text_encoder_2"), **change}
    kept = {name: value for name, value in tensors.items() if value is not None}
    rewrite(folder, "text_encoder_2", kept)
    with pytest.raises(ExportError, match=message):
        export(folder, T5)


def test_an_unmodified_network_is_built_without_weights(saved: Path) -> None:
    network = build_encoder("T5EncoderModel", saved / "text_encoder_2", "bfloat16")
    parameters = list(network.parameters())
    assert {str(parameter.device) for parameter in parameters} == {"meta"}
    assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}


def test_unknown_names_stay_for_the_check_to_see(saved: Path) -> None:
    network = build_encoder("CLIPTextModel", saved / "text_encoder", "float32")
    tensor = StoredTensor(saved, 0, 4, "float32", (1,))
    assert named_as_in_module({"else": tensor}, network, "text_model.") == {"else": tensor}


@pytest.mark.parametrize("text", [CLIP, T5])
def test_graph_file_has_the_recorded_names_and_dimensions(folder: Path, text: TextGraph) -> None:
    root, part = export(folder, text)
    graph = onnx.load(root / part.path, load_external_data=False).graph
    for values, records in ((graph.input, part.inputs), (graph.output, part.outputs)):
        found = {
            value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
            for value in values
        }
        assert found == {name: record.shape for name, record in records.items()}


def test_copied_weights_are_not_counted_as_shared(folder: Path) -> None:
    _, linked = export(folder, CLIP)
    _, copied = export(folder, CLIP, "copy")
    assert linked.shared_bytes >= 0.95 * linked.weight_bytes
    assert (copied.weight_bytes, copied.shared_bytes) == (linked.weight_bytes, 0)


def test_graph_and_tokenizer_lie_beside_the_weights(folder: Path) -> None:
    root, part = export(folder, T5)
    assert part.tokenizer is not None
    places = {Path(part.path).parent, Path(part.tokenizer.path).parent}
    assert places == {Path(file.path).parent for file in part.weights}
    assert part.tokenizer.length == TEXT_TOKENS
    assert (root / part.tokenizer.path).is_file()


def test_every_text_graph_of_a_family_is_one_of_its_text_components() -> None:
    for text in FLUX.text_graphs:
        assert {text.component, text.tokenizer} <= set(FLUX.text_components)
