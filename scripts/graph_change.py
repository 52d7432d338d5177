"""Another graph under the name of one that a bundle has, as a later export might make it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import onnx

from meancache_trt.bundle import MANIFEST, Bundle, FileRecord
from meancache_trt.meancache.files import write_json
from meancache_trt.meancache.hashing import sha256_of


def change_graph(directory: Path, component: str) -> None:
    """Change the bytes of a component's graph, not what it computes, and the manifest with it."""
    bundle = Bundle.open(directory)
    path = bundle.export.components[component].path
    file = directory / path
    model = onnx.load(file, load_external_data=False)
    model.doc_string += "changed"
    file.unlink()  # perhaps a hard link
    onnx.save(model, file)
    files = {**bundle.manifest.files, path: FileRecord(file.stat().st_size, sha256_of(file))}
    changed = msgspec.structs.replace(bundle.manifest, files=files)
    write_json(directory / MANIFEST, changed.sealed())
