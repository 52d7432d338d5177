"""Initialisers that point into the checkpoint's own safetensors files."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensor

from meancache_trt.errors import ExportError
from meancache_trt.export.dtypes import onnx_dtype
from meancache_trt.export.job import Job, WeightPlacement
from meancache_trt.export.safetensors_file import StoredTensor
from meancache_trt.manifest import WeightFile
from meancache_trt.meancache.hashing import sha256_of, verified_sha256

_PREFIX = "network."  # a wrapper's modules hold diffusers' own model under this name

# What a link(2) may fail with where another way works: other file system, another's file, no links
# there, or too many.
_NOT_LINKABLE = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}


def reference_weights(model: ir.Model, stored: Mapping[str, StoredTensor]) -> None:
    """Name the initialisers as the checkpoint does and point them at its files' bytes.

    A stored dtype other than the graph's gets a Cast node. Constants that the module computed for
    itself keep their values inside the graph.
    """
    for name, value in list(model.graph.initializers.items()):
        tensor = stored.get(name.removeprefix(_PREFIX))
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
        elif tensor is not None:
            _point(model.graph, value, name.removeprefix(_PREFIX), tensor)
        elif isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            raise ExportError(f"{name} has no value: the checkpoint does not store it")


def _point(graph: ir.Graph, value: ir.Value, name: str, tensor: StoredTensor) -> None:
    wanted = value.dtype
    del graph.initializers[value.name or ""]
    external = _external(name, tensor)
    replacement = ir.Value(
        name=name,
        shape=external.shape,
        type=ir.TensorType(external.dtype),
        const_value=external,
    )
    graph.register_initializer(replacement)
    if external.dtype == wanted:
        value.replace_all_uses_with(replacement)
        return
    cast = ir.node("Cast", [replacement], {"to": wanted})
    cast.outputs[0].shape, cast.outputs[0].type = external.shape, value.type
    graph.insert_before(graph[0], cast)
    value.replace_all_uses_with(cast.outputs[0])


def _external(name: str, tensor: StoredTensor) -> ir.ExternalTensor:
    dtype = onnx_dtype(tensor.dtype)
    return ir.ExternalTensor(
        location=tensor.file.name,
        offset=tensor.offset,
        length=tensor.length,
        dtype=dtype,
        shape=ir.Shape(tensor.shape),
        name=name,
        base_dir=tensor.file.parent,
    )


def point_elsewhere(model: ir.Model, stored: Mapping[str, StoredTensor]) -> None:
    """Point what lies in a checkpoint's files at tensors of the same names, types and shapes."""
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _external(name, stored[name])


def load_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
    """Stored tensors in float32, by name."""
    return {name: _load(tensor) for name, tensor in stored.items()}


def _load(tensor: StoredTensor) -> torch.Tensor:
    mapped = np.memmap(tensor.file, np.uint8, "c", tensor.offset, (tensor.length,))
    typed = torch.from_numpy(mapped).view(getattr(torch, tensor.dtype)).reshape(tensor.shape)
    return typed.to(torch.float32, copy=True)


def count_bytes(model: ir.Model, files: Iterable[WeightFile]) -> tuple[int, int]:
    """Bytes of all initialisers, and of those that lie in linked ones of these files."""
    linked = {PurePosixPath(file.path).name for file in files if file.is_linked}
    tensors = [value.const_value for value in model.graph.initializers.values()]
    external = [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
    shared = sum(tensor.nbytes for tensor in external if tensor.location in linked)
    return sum(tensor.nbytes for tensor in tensors if tensor is not None), shared


def place(source: Path, target: Path, placement: WeightPlacement) -> bool:
    """Put a weight file at `target`; true where its bytes stay the checkpoint's.

    "link" makes a hard link, which every runtime reads and which outlives the checkpoint's folder;
    to another file system a symbolic link; where there are neither, a copy. Links are made to the
    real file, since a hub snapshot's entries are symbolic links themselves.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    if placement == "link":
        for link in (os.link, os.symlink):
            if _linked(link, source.resolve(), target):
                return True
    shutil.copyfile(source, target)
    return False


def _linked(link: Callable[[Path, Path], None], source: Path, target: Path) -> bool:
    try:
        link(source, target)
    except OSError as error:
        if error.errno in _NOT_LINKABLE:
            return False
        raise
    return True


def place_part(job: Job, part: str, folder: str) -> tuple[WeightFile, ...]:
    """Put the weights of one of the checkpoint's parts into a folder of the export.

    The overlay of LoRAs, if any, is there already.
    """
    files = place_weights(job.source.weight_files(part), job.root, folder, job.placement)
    if job.placement == "link" and not all(file.is_linked for file in files):
        job.report(f"{part}: weights copied, since they cannot be linked to here")
    overlay = job.overlays.get(part)
    return files if overlay is None else (*files, _weight_file(overlay, job.root))


def place_weights(
    sources: list[Path], root: Path, folder: str, placement: WeightPlacement
) -> tuple[WeightFile, ...]:
    """Put weight files under root/folder by their own names, and hash them."""
    files = []
    for source in sources:
        target = root / folder / source.name
        is_linked = place(source, target, placement)
        files.append(_weight_file(target, root, source if is_linked else None))
    return tuple(files)


def _weight_file(target: Path, root: Path, source: Path | None = None) -> WeightFile:
    """The record of a file, which is linked to `source` if that is given."""
    return WeightFile(
        path=target.relative_to(root).as_posix(),
        size_bytes=target.stat().st_size,
        sha256=sha256_of(target) if source is None else verified_sha256(source),
        is_linked=source is not None,
    )
