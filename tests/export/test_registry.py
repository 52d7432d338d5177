from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from meancache_trt.errors import ExportError
from meancache_trt.export import FAMILIES, detect


def test_flux_pipeline_is_detected(flux_folder: Path) -> None:
    assert detect(flux_folder) is FAMILIES["flux"]


def test_unknown_pipeline_gets_the_supported_ones_and_how_to_add_one(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionXLPipeline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"XLPipeline; .* FluxPipeline, .*\. CONTRIBUTING"):
        detect(tmp_path)


def test_importing_the_package_imports_no_heavy_library() -> None:
    heavy = ["torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxruntime"]
    code = f"import sys, meancache_trt.export; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
