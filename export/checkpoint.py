"""A diffusers folder: its configurations, and where each stored tensor lies in its files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from meancache_trt.errors import ExportError, RuntimeUnavailableError
from meancache_trt.export.lora import Lora
from meancache_trt.export.safetensors_file import StoredTensor, read_tensors

_MODEL_WEIGHTS = "diffusion_pytorch_model.safetensors"  # what diffusers writes
_ENCODER_WEIGHTS = "model.safetensors"  # what transformers writes

_HUB_PATTERNS = (
    "model_index.json",
    *("*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model"),
    "*/*.jinja",  # chat templates, which FLUX.2 cannot encode without
)
# FLUX.1's repositories repeat the transformer as one file at the root: 24 GB that nothing reads.


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers pipeline folder on disk, and LoRAs that are merged into its transformer.

    Everything is read on demand; a missing or damaged file raises `ExportError` when it is asked
    for. What is read is the folder's alone: `lora_merge` has the merged weights.
    """

    path: Path
    loras: tuple[Lora, ...] = ()

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json."""
        if not self.path.is_dir():
            raise ExportError(
                f"{self.path} is not a folder; expected a diffusers pipeline folder (with "
                "model_index.json) or a hub id such as black-forest-labs/FLUX.1-dev"
            )
        return read_json(self.path / "model_index.json")

    @property
    def pipeline_class(self) -> str:
        name = self.index.get("_class_name")
        if not isinstance(name, str):
            raise ExportError(
                f"{self.path / 'model_index.json'} names no pipeline (_class_name is {name!r})"
            )
        return name

    def config(self, component: str) -> dict[str, Any]:
        """A component's JSON: config.json, or a scheduler's or tokenizer's own file."""
        folder = self.path / component
        names = ("config.json", "scheduler_config.json", "tokenizer_config.json")
        for name in names:
            if (folder / name).exists():
                return read_json(folder / name)
        raise ExportError(
            f"{folder} has none of {', '.join(names)}; the checkpoint is incomplete, "
            "download it again"
        )

    def configs(self, components: Iterable[str]) -> dict[str, Mapping[str, Any]]:
        """`config` of several components, by name."""
        return {name: self.config(name) for name in components}

    def has(self, component: str) -> bool:
        """Whether model_index.json says of what class a component is."""
        kind = self.index.get(component)
        return isinstance(kind, list) and None not in kind

    def model_configs(self, text_components: Iterable[str]) -> dict[str, Mapping[str, Any]]:
        """`configs` of all that a model is made of; "model_index" is that file itself."""
        networks = ("transformer", *(part for part in ("transformer_2",) if self.has(part)))
        parts = self.configs((*networks, "vae", "scheduler", *text_components))
        return {**parts, "model_index": self.index}

    def weight_files(self, component: str) -> list[Path]:
        """The safetensors files of a component, as named in its folder.

        Empty where the component is no model, as a tokenizer.
        """
        folder = self.path / component
        if not (folder / "config.json").exists():
            return []
        for name in (_MODEL_WEIGHTS, _ENCODER_WEIGHTS):
            if (folder / f"{name}.index.json").exists():
                return _shards(folder / f"{name}.index.json")
        is_encoder = (folder / _ENCODER_WEIGHTS).exists()
        return [folder / (_ENCODER_WEIGHTS if is_encoder else _MODEL_WEIGHTS)]

    def tensors(self, component: str) -> dict[str, StoredTensor]:
        """Every tensor of a component by name, from the headers of its files alone."""
        found: dict[str, StoredTensor] = {}
        for file in self.weight_files(component):
            found.update(read_tensors(file))
        return found


def _shards(index: Path) -> list[Path]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ExportError(f"{index} has no weight_map; download it again")
    return [index.parent / str(name) for name in sorted(set(shards.values()))]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `ExportError` where the file is missing or is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(
            f"{path} is missing; expected a diffusers pipeline folder, as save_pretrained writes it"
        ) from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ExportError(f"{path} holds {type(content).__name__}; expected a JSON object")
    return content


def check_tensors(
    component: str, stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise `ExportError` unless names and shapes are those that config.json leads to."""
    hint = f"{component}/config.json and the weights do not belong together"
    _check_names(f"{component} weights lack", expected.keys() - stored.keys(), hint)
    _check_names(f"{component} weights have unexpected", stored.keys() - expected.keys(), hint)
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise ExportError(
                f"{component} tensor {name} is {_shape(stored[name].shape)} in "
                f"{stored[name].file.name}; config.json asks for {_shape(shape)}; {hint}"
            )


def check_libraries(source: Checkpoint, parts: Collection[str] | None = None) -> None:
    """Raise `RuntimeUnavailableError` where a class of transformers lacks what it needs to run.

    `parts` are those to look at, by default all. A stand-in then has the class's name, which
    diffusers takes for a damaged checkpoint.
    """
    import transformers  # noqa: PLC0415  needed where a pipeline is loaded, and nowhere else

    for part, kind in source.index.items():
        if not isinstance(kind, list) or kind[0] != "transformers":
            continue
        if parts is not None and part not in parts:
            continue
        try:
            getattr(getattr(transformers, kind[1], None), "from_pretrained", None)
        except ImportError as error:
            lacking = str(error).strip().split(" but it was not found")[0]
            raise RuntimeUnavailableError(
                f"{part} of {source.path} cannot be loaded: {lacking}, which is not installed; "
                "install it as well"
            ) from error


def _check_names(problem: str, names: Collection[str], hint: str) -> None:
    if names:
        shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
        raise ExportError(f"{problem} {len(names)} tensors: {shown}; {hint}")


def _shape(shape: Iterable[int]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def resolve_checkpoint(name: str) -> Path:
    """A local folder as it stands; otherwise a hub id's snapshot, downloaded where needed.

    Raises `ExportError` where it is neither, or the hub cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise ExportError(
            f"{name} is a single file; expected a diffusers pipeline folder, whose weights can be "
            "shared as they are. Load the file with the pipeline's from_single_file and write the "
            "folder with save_pretrained"
        )
    if Path(name).is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise ExportError(
            f"{name} is neither a folder nor a hub id of the form owner/name; expected a diffusers "
            "pipeline folder"
        )
    return _snapshot(name)


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  only for checkpoints not here
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    patterns = list(_HUB_PATTERNS)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises its HTTP library's errors as well
        raise ExportError(
            f"{name} is not a local folder and cannot be had from the hub: "
            f"{str(error).splitlines()[0]}; check the name and the network, log in with "
            "`hf auth login` for gated models, or give the path of a downloaded folder"
        ) from error


def identity(path: Path) -> tuple[str, str | None]:
    """Name and revision of a checkpoint folder: of the hub snapshot that it is, or its own name."""
    resolved = path.resolve()
    repository = resolved.parent.parent.name
    if resolved.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/"), resolved.name
    return resolved.name, None
