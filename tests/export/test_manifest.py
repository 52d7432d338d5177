from __future__ import annotations

import msgspec
import pytest

from meancache_trt.manifest import Exported


def test_export_survives_a_round_trip_through_json(exported: Exported) -> None:
    assert msgspec.json.decode(msgspec.json.encode(exported), type=Exported) == exported


@pytest.mark.parametrize(
    ("history", "path"),
    [(1, "h1"), (2, "h2"), (3, "h4"), (4, "h4"), (5, "h8"), (10, "h16"), (16, "h16")],
)
def test_smallest_update_graph_that_fits_is_chosen(
    exported: Exported, history: int, path: str
) -> None:
    assert exported.update_for(history).path == f"update/{path}.onnx"


def test_history_beyond_every_graph_is_a_key_error(exported: Exported) -> None:
    with pytest.raises(KeyError, match="65"):
        exported.update_for(65)


def test_tensors_are_found_by_role(exported: Exported) -> None:
    transformer = exported.components["transformer"]
    assert transformer.input_named("latent") == "hidden_states"
    assert transformer.input_named("timestep") == "timestep"
    assert transformer.output_named("velocity") == "velocity"
    with pytest.raises(KeyError, match="conditioning"):
        transformer.input_named("conditioning")
