"""Which of a network's graphs is run: the one asked for, else what the runtime prefers."""

from __future__ import annotations

import pytest

from meancache_trt.bundle import Bundle
from meancache_trt.errors import BundleError
from meancache_trt.graphs import Graphs
from tests.export.families import shared_export
from tests.numpy_runtime import NumpyRuntime


class Bfloat16Runtime(NumpyRuntime):
    precisions = ("bfloat16", "float32")


@pytest.fixture
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return shared_export("flux", tmp_path_factory).bundle


@pytest.mark.parametrize(
    ("runtime", "asked", "transformer"),
    [
        (NumpyRuntime(), None, "float32"),
        (Bfloat16Runtime(), None, "bfloat16"),
        (Bfloat16Runtime(), "float32", "float32"),
        (NumpyRuntime(), "bfloat16", "bfloat16"),
    ],
)
def test_the_transformer_is_what_was_asked_for_or_is_preferred(
    bundle: Bundle, runtime: NumpyRuntime, asked: str | None, transformer: str
) -> None:
    graphs = Graphs(bundle, runtime, asked)
    assert graphs.network("transformer").precision == transformer


def test_a_transformer_that_is_not_there_is_no_other(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="expected a graph of transformer in float16"):
        Graphs(bundle, NumpyRuntime(), "float16").network("transformer")


def test_networks_that_are_not_there_in_it_are_what_the_runtime_prefers(bundle: Bundle) -> None:
    graphs = Graphs(bundle, NumpyRuntime(), "float16")
    assert graphs.network("vae_decoder").precision == "float32"
