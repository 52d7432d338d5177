"""Write the JSON Schema of the schedule file, meancache/schedule.schema.json, from its type."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import msgspec

from meancache_trt.meancache.schedule import Schedule

SCHEMA = Path(__file__).parents[1] / "meancache" / "schedule.schema.json"


def schema_text() -> str:
    """All of `schedule.schema.json`."""
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "meancache-trt schedule file",
        **msgspec.json.schema(Schedule),
    }
    for definition in schema["$defs"].values():  # Python 3.13 dedents docstrings, 3.11 does not
        definition["description"] = inspect.cleandoc(definition["description"])
    # The type has a default for it, so that code need not name it; a file has to.
    schema["$defs"]["Schedule"]["required"].insert(0, "schema")
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
