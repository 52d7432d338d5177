"""What LoRA files add to a checkpoint's weights, merged as diffusers' `fuse_lora` does.

The `lora_state_dict` of the checkpoint's own pipeline turns foreign names into diffusers', a layer
at a time, so that what it would drop in silence is known by name.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from meancache_trt.errors import InputError
from meancache_trt.export.checkpoint import Checkpoint
from meancache_trt.export.lora import Lora
from meancache_trt.export.safetensors_file import StoredTensor, read_tensors, stream_tensors
from meancache_trt.export.weights import load_tensors
from meancache_trt.meancache.schedule import TRANSFORMERS

_TENSOR = re.compile(
    r"(?P<layer>.+?)\.(?:(?:lora[._])?(?:(?P<down>A|down)|(?P<up>B|up))"
    r"(?:\.(?!lora)\w+)?\.weight|alpha)"
)
_TEXT_LAYER = re.compile(r"lora_te\d*_|text_encoder")
_METADATA = "lora_adapter_metadata"  # the header's entry that diffusers' save_lora_weights writes
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"  # what diffusers calls them

Note = Callable[[str], None]


@dataclass(frozen=True)
class Change:
    """What is added to a weight: factor * up @ down, of (outputs, rank) and (rank, inputs)."""

    up: Tensor
    down: Tensor
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def is_empty(self) -> bool:
        """Whether it adds nothing, as where a layer was never trained."""
        return not (self.factor and self.up.any() and self.down.any())


def merge(
    checkpoint: Checkpoint, part: str, note: Note = lambda _: None
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a part that the checkpoint's LoRAs change, by name.

    LoRAs are added up in float32, in order. What is stored in bfloat16 is rounded to that, once;
    all else stays float32. One weight is in memory at a time. All LoRAs are checked before.

    Raises `InputError` for a LoRA that is not of this model, changes nothing, or is of a kind that
    cannot be merged, and `ExportError` for files that are no safetensors.
    """
    changes, stored = _changes(checkpoint, part, note), checkpoint.tensors(part)
    return ((name, _merged(stored[name], added)) for name, added in changes.items())


def write_overlay(checkpoint: Checkpoint, part: str, file: Path, note: Note) -> None:
    """Write what `merge` gives to a safetensors file."""
    changes, stored = _changes(checkpoint, part, note), checkpoint.tensors(part)
    kinds = {name: (_dtype(stored[name]), stored[name].shape) for name in changes}
    file.parent.mkdir(parents=True, exist_ok=True)
    merged = (_merged(stored[name], added) for name, added in changes.items())
    stream_tensors(file, kinds, (tensor.view(torch.uint8).numpy() for tensor in merged))


def merge_into(network: nn.Module, checkpoint: Checkpoint, part: str) -> None:
    """Put the merged weights into the part as diffusers loaded it."""
    if checkpoint.loras:
        with torch.no_grad():
            for name, tensor in merge(checkpoint, part):
                network.get_parameter(name).copy_(tensor)


def _merged(tensor: StoredTensor, added: Sequence[Change]) -> Tensor:
    (weight,) = load_tensors({"": tensor}).values()
    for change in added:
        weight.addmm_(change.up, change.down, alpha=change.factor)
    return weight.to(getattr(torch, _dtype(tensor)))


def _dtype(tensor: StoredTensor) -> str:
    """What a merged weight is kept in.

    Of a bfloat16 checkpoint there is a graph that would round it so in any case. Others have a
    float32 graph, in which what a LoRA adds, often less than float16's steps, is then whole.
    """
    return "bfloat16" if tensor.dtype == "bfloat16" else "float32"


def _changes(checkpoint: Checkpoint, part: str, note: Note) -> dict[str, list[Change]]:
    """What is added to each weight, by its name, sorted."""
    if checkpoint.loras and checkpoint.has(TRANSFORMERS[1]):
        raise InputError(
            f"expected a model of one transformer, found two in {checkpoint.path.name}, which take "
            "a LoRA each; merge them by diffusers' fuse_lora, save the pipeline and export that"
        )
    found: dict[str, list[Change]] = defaultdict(list)
    for lora in checkpoint.loras:
        for name, change in _changes_of(lora, checkpoint, part, note).items():
            found[name].append(change)
    return dict(sorted(found.items()))


def _changes_of(lora: Lora, checkpoint: Checkpoint, part: str, note: Note) -> dict[str, Change]:
    """What one LoRA adds to each weight of a part."""
    layers, text = _read_layers(lora.path)
    stored, config = checkpoint.tensors(part), _config(lora.path, part)
    if text:
        note(
            f"{lora.path.name}: {len(text)} layers of text encoders are left out, such as "
            f"{text[0]}; prompts are encoded as without it"
        )
    found: dict[str, Change] = {}
    foreign: list[str] = []
    for layer in layers:
        named = _named(layer, lora, checkpoint.pipeline_class, part)
        for module, (up, down) in named.items():
            strength = _strength(lora, config, module, layer) * lora.scale
            _add(found, f"{module}.weight", Change(up, down, strength), lora)
        if not named or any(f"{module}.weight" not in stored for module in named):
            foreign.append(layer.name)
    if foreign:
        raise _of_another_model(lora, foreign, len(layers), checkpoint, part)
    _check_shapes(found, stored, lora, part)
    kept = {name: change for name, change in found.items() if not change.is_empty}
    if not kept:
        raise InputError(
            f"{lora.path} changes nothing in the {part} of {checkpoint.path.name}: expected layers "
            f"of it that are not zero, found {len(found)} layers of zeros and {len(text)} of text "
            "encoders; leave it out"
        )
    return kept


def _of_another_model(
    lora: Lora, foreign: Sequence[str], count: int, checkpoint: Checkpoint, part: str
) -> InputError:
    return InputError(
        f"{lora.path} is a LoRA of another model: {len(foreign)} of its {count} layers are not in "
        f"the {part} of {checkpoint.path.name}, such as {', '.join(foreign[:3])}; give one that "
        f"was trained on a {checkpoint.config(part)['_class_name']} like this"
    )


def _add(found: dict[str, Change], name: str, change: Change, lora: Lora) -> None:
    if name in found:
        raise InputError(f"{lora.path} changes {name} twice, under two of its names; remove either")
    found[name] = change


def _check_shapes(
    found: Mapping[str, Change], stored: Mapping[str, StoredTensor], lora: Lora, part: str
) -> None:
    for name, change in found.items():
        if change.shape != stored[name].shape:
            raise InputError(
                f"{lora.path} is a LoRA of another model: {name} of the {part} is "
                f"{stored[name].shape}, found a change of {change.shape}; give one that was "
                "trained on a checkpoint of these sizes"
            )


@dataclass(frozen=True)
class _Layer:
    """One layer of a LoRA: its tensors as the file names them, in float32."""

    name: str
    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float | None


def _read_layers(file: Path) -> tuple[list[_Layer], list[str]]:
    """The layers of a file but those of text encoders, and the names of these."""
    read_tensors(file)  # which says what is wrong with the file
    grouped: dict[str, dict[str, Tensor]] = defaultdict(dict)
    others = []
    for name, tensor in _loaded(file).items():
        if (match := _TENSOR.fullmatch(name)) is None:
            others.append(name)
        else:
            grouped[match["layer"]][name] = tensor.float()
    if others or not grouped:
        raise InputError(
            f"{file} holds {len(others)} tensors that are no LoRA's"
            f"{'' if grouped else ', and none of one'}, such as {', '.join(sorted(others)[:3])}; "
            "expected pairs of matrices and their alphas. DoRA, LoHa, LoKr and changes of norms "
            "and biases cannot be merged"
        )
    text = sorted(name for name in grouped if _TEXT_LAYER.match(name))
    return [_layer(file, name, grouped[name]) for name in sorted(grouped.keys() - {*text})], text


def _loaded(file: Path) -> dict[str, Tensor]:
    """Raises `InputError` for what safetensors cannot read, and for numbers that are none."""
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} is damaged: {error}; download it again") from error
    broken = [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]
    if broken:
        raise InputError(
            f"{file} has values that are not finite, in {', '.join(sorted(broken)[:3])}; its "
            "training diverged or it is damaged: use another"
        )
    return tensors


def _layer(file: Path, name: str, tensors: dict[str, Tensor]) -> _Layer:
    """Raises `InputError` unless there are two matrices of one rank."""
    roles: dict[str, list[Tensor]] = {"down": [], "up": [], "alpha": []}
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        assert match is not None
        role = next((role for role in ("down", "up") if match[role]), "alpha")
        roles[role].append(tensor)
    down, up, alphas = roles.values()
    shapes = [tuple(tensor.shape) for tensor in down + up]
    is_pair = len(down) == len(up) == 1 and all(len(shape) == 2 for shape in shapes)
    if not is_pair or shapes[0][0] != shapes[1][1] or any(alpha.numel() != 1 for alpha in alphas):
        raise InputError(
            f"{file}: expected two matrices of {name}, (rank, inputs) and (outputs, rank), and at "
            f"most one number as alpha, found {', '.join(map(str, shapes)) or 'no matrices'}; give "
            "a whole LoRA of linear layers"
        )
    return _Layer(name, tensors, shapes[0][0], float(alphas[0]) if alphas else None)


def _named(layer: _Layer, lora: Lora, pipeline: str, part: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The layer's matrices, up and down, by what diffusers calls its modules.

    Fused projections become several modules. Alphas are taken as the rank, so that they change
    nothing: `_strength` has them.
    """
    rank = torch.tensor(float(layer.rank))
    neutral = {
        name: rank if name.endswith(".alpha") else tensor for name, tensor in layer.tensors.items()
    }
    try:
        named = getattr(diffusers, pipeline).lora_state_dict(neutral)
    except Exception as error:  # conversions fail by whatever they happen to meet
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in layer.tensors.values())
        raise InputError(
            f"{lora.path} is a LoRA of another model, or in names that are not known here: "
            f"diffusers cannot turn {layer.name}, of {shapes}, into layers of a {pipeline} "
            f"({type(error).__name__}: {error}); give one that was trained on this model, in "
            "diffusers' names"
        ) from error
    if not any(name.endswith(_DOWN) for name in named):
        named = convert_unet_state_dict_to_peft(named)
    return {
        name.removeprefix(f"{part}.").removesuffix(_DOWN): (
            named[f"{name.removesuffix(_DOWN)}{_UP}"],
            named[name],
        )
        for name in named
        if name.endswith(_DOWN)
    }


def _config(file: Path, part: str) -> dict[str, Any]:
    """What the file's header says of the LoRA's strength, as peft's `LoraConfig` has it."""
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get(_METADATA, "{}")
    try:
        entries = json.loads(text).items()
    except (ValueError, AttributeError):
        raise InputError(f"{file} has a damaged header: {_METADATA} is {text[:40]!r}") from None
    return {name.removeprefix(f"{part}."): value for name, value in entries}


def _strength(lora: Lora, config: Mapping[str, Any], module: str, layer: _Layer) -> float:
    """The quotient alpha / rank, by the layer's own alpha, or by the header's; else 1."""
    if layer.alpha is not None:
        return layer.alpha / layer.rank
    try:
        alpha = _header_alpha(config, module)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise InputError(
            f"{lora.path} has a damaged header: its alphas cannot be read ({error}); save it again"
        ) from error
    if alpha is None:
        return 1.0
    return alpha / (math.sqrt(layer.rank) if config.get("use_rslora") else layer.rank)


def _header_alpha(config: Mapping[str, Any], module: str) -> float | None:
    patterns = config.get("alpha_pattern") or {}
    fitting = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = next(fitting, config.get("lora_alpha"))
    return None if alpha is None else float(alpha)
