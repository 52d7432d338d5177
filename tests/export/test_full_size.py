"""A smaller version of scripts/prove full-size-export: full width, few blocks, all holes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from scripts.full_size.checkpoint import write_checkpoint
from scripts.full_size.measure import export, files_of
from scripts.full_size.models import MODELS


def test_export_loads_and_copies_none_of_the_weights(tmp_path: Path) -> None:
    whole = MODELS["FLUX.1-dev"]
    model = replace(
        whole,
        transformer={**whole.transformer, "num_layers": 3, "num_single_layers": 3},
        encoders={
            **whole.encoders,
            "text_encoder_2": {**whole.encoders["text_encoder_2"], "num_layers": 2},
        },
    )
    checkpoint = tmp_path / "flux"
    write_checkpoint(checkpoint, model, has_values=False)
    checkpoint_bytes = sum(file.stat().st_size for file in files_of(checkpoint))
    found = export(
        checkpoint,
        tmp_path / "flux.mcb",
        {"height": 256, "width": 256},
        "--skip-parity",
        "--precision",
        "bfloat16",
    )
    assert checkpoint_bytes > 3.5e9
    # Libraries and graphs; a third of the weights in memory would be more.
    assert found["peak_bytes"] < checkpoint_bytes / 3
    assert found["new_bytes"] < 20e6
    assert set(found["components"]) >= {"transformer", "transformer/bfloat16", "text_encoder_2"}
    for name, part in found["components"].items():
        assert part["shared_bytes"] >= 0.95 * part["weight_bytes"], name
