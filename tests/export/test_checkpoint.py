from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from meancache_trt.errors import ExportError
from meancache_trt.export.checkpoint import (
    Checkpoint,
    check_tensors,
    identity,
    read_json,
    resolve_checkpoint,
)
from meancache_trt.export.safetensors_file import StoredTensor


def stored(shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(Path("w.safetensors"), 0, 0, "float32", shape)


def test_folder_gives_configurations_of_every_kind(flux_folder: Path) -> None:
    configs = Checkpoint(flux_folder).configs(("transformer", "scheduler", "tokenizer_2"))

    assert configs["transformer"]["in_channels"] == 16
    assert configs["scheduler"]["shift"] == 3.0
    assert configs["tokenizer_2"]["model_max_length"] == 12


def test_text_encoder_weights_have_the_name_that_transformers_gives(flux_folder: Path) -> None:
    source = Checkpoint(flux_folder)

    assert [file.name for file in source.weight_files("text_encoder")] == ["model.safetensors"]
    assert "shared.weight" in source.tensors("text_encoder_2")
    assert source.weight_files("tokenizer") == []


def test_missing_folder_is_told_with_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"not a folder; expected a diffusers pipeline folder"):
        _ = Checkpoint(tmp_path / "none").index


def test_folder_without_model_index_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"model_index.json is missing"):
        _ = Checkpoint(tmp_path).index


@pytest.mark.parametrize("content", ["{", "\udcff"])
def test_damaged_json_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ExportError, match="cannot be read as JSON"):
        read_json(tmp_path / "config.json")


def test_json_of_another_kind_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ExportError, match="holds list; expected a JSON object"):
        read_json(tmp_path / "config.json")


def test_model_index_without_a_class_is_told(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ExportError, match="names no pipeline"):
        _ = Checkpoint(tmp_path).pipeline_class


def test_component_without_configuration_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"has none of config.json"):
        Checkpoint(tmp_path).config("vae")


def test_shard_index_without_a_map_is_told(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    index = tmp_path / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}}))
    with pytest.raises(ExportError, match="no weight_map"):
        Checkpoint(tmp_path).tensors("vae")


def test_missing_tensors_are_counted_and_named() -> None:
    with pytest.raises(ExportError, match="transformer weights lack 2 tensors: a, b; transformer/"):
        check_tensors("transformer", {}, {"a": (1,), "b": (2,)})


def test_unexpected_tensors_are_counted_and_named() -> None:
    extra = {name: stored((1,)) for name in "abcd"}
    with pytest.raises(ExportError, match="unexpected 4 tensors: a, b, c, …;"):
        check_tensors("vae", extra, {})


def test_shape_mismatch_gives_both_shapes() -> None:
    with pytest.raises(ExportError, match=r"a is \(2, 3\) in w.safetensors.*asks for \(3, 2\)"):
        check_tensors("vae", {"a": stored((2, 3))}, {"a": (3, 2)})


def test_local_folder_resolves_to_itself(flux_folder: Path) -> None:
    assert resolve_checkpoint(str(flux_folder)) == flux_folder


@pytest.mark.parametrize("name", ["/none/such", "none", "./none/such", "a/b/c"])
def test_name_that_cannot_be_a_hub_id_is_told_at_once(name: str) -> None:
    with pytest.raises(ExportError, match="neither a folder nor a hub id"):
        resolve_checkpoint(name)


def test_single_file_in_its_authors_layout_is_told_with_the_remedy(tmp_path: Path) -> None:
    file = tmp_path / "flux1-dev.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ExportError, match=r"single file.*from_single_file.*save_pretrained"):
        resolve_checkpoint(str(file))


def test_hub_id_is_looked_up_locally_before_the_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[dict[str, Any]] = []

    def snapshot(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)

    assert resolve_checkpoint("owner/model") == tmp_path
    assert [call["local_files_only"] for call in calls] == [True]


def test_hub_download_leaves_out_the_repeated_root_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    patterns: list[str] = []

    def snapshot(name: str, *, allow_patterns: list[str], local_files_only: bool = False) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError(name)
        patterns.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    resolve_checkpoint("owner/model")

    def is_fetched(path: str) -> bool:
        return any(fnmatch(path, pattern) for pattern in patterns)

    assert is_fetched("transformer/diffusion_pytorch_model-00001-of-00003.safetensors")
    assert is_fetched("tokenizer_2/spiece.model")
    assert is_fetched("tokenizer/chat_template.jinja")
    assert not is_fetched("flux1-dev.safetensors")


def test_unreachable_hub_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise LocalEntryNotFoundError(name)
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ExportError, match=r"cannot be had from the hub: no route to host; check"):
        resolve_checkpoint("owner/model")


def test_hub_snapshot_is_known_by_repository_and_revision(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--black-forest-labs--FLUX.1-dev" / "snapshots" / "3de623fc"
    snapshot.mkdir(parents=True)
    assert identity(snapshot) == ("black-forest-labs/FLUX.1-dev", "3de623fc")


def test_plain_folder_is_known_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "my-flux").mkdir()
    assert identity(tmp_path / "my-flux") == ("my-flux", None)
