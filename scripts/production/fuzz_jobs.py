"""Job files by hostile hands: valid lines mutated at random, read, and checked against a bundle."""

from __future__ import annotations

import csv
import io
import json
import random
import string
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from meancache_trt.errors import InputError, MeanCacheError
from meancache_trt.production.job_files import Line, read_jobs
from meancache_trt.production.jobs import Job, Limits
from meancache_trt.production.tickets import Checker

LIMITS = Limits(line_bytes=4096, prompt_characters=500)
"""Small, so that lines that are too long are common and cheap."""

_LINES_A_FILE = 20
_SAFE = frozenset(string.ascii_letters + string.digits + "._-")

_DEVICES = frozenset(
    ["CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10))]
)

_HOSTILE: tuple[object, ...] = (
    *("../../etc/passwd", "/abs", "a/b", "a\\b", "..", ".", ".hidden", "a.", "C:evil", "~", ""),
    *(
        "CON",
        "nul.png",
        "com1",
        "\u202egnp",
        "a\0b",
        "\ud800",
        "\udfff tail",
        "é",
        "%2e%2e",
        "$(id)",
    ),
    *("x" * 129, "x" * 5000, "\r\n", "\n", "\ufeff", "'; drop table jobs", "file:///etc/passwd"),
    *(
        "/etc/passwd",
        "schedule.json",
        "b10.JSON",
        "../b10",
        "b10",
        "10",
        "007",
        "٣",
        "²",
        "1" * 4400,
    ),
    *("64x64", "0x0", "64x64x64", "9" * 30 + "x1", "64X64", "64x64\0"),
    *(0, 1, -1, 2**63, 2**64 - 1, 2**64, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(True, False, None, [], {}, [[[]]], {"prompt": {"prompt": "x"}}),
)
"""Values for any field."""

_FIELDS = (*Job.__struct_fields__, "ID", "promt", "__class__", "")

_BYTES = (
    b"\0",
    b"\n",
    b"\r",
    b'"',
    b",",
    b"{",
    b"}",
    b"\\",
    b"\\u",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\x80",
)


def fuzz(count: int, seed: int, checker: Checker | None = None) -> Counter[str]:
    """Read `count` mutated job lines in files of every kind; how many were what.

    "lines" were written; of what was read, "accepted" and "faults" are lines, "tickets" passed
    `checker`, and "refused" are whole files. Raises whatever is no `MeanCacheError`, and
    `AssertionError` for an accepted job that could reach outside its directory.
    """
    source, counts = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as directory:
        while counts["lines"] < count:
            kind = source.choice(list(_WRITERS))
            size = min(_LINES_A_FILE, count - counts["lines"])
            path = Path(directory, f"jobs{kind}")
            path.write_bytes(_WRITERS[kind](source, size))
            counts["lines"] += size
            try:
                lines = read_jobs(path, LIMITS)
            except InputError:
                counts["refused"] += 1
                continue
            for index, line in enumerate(lines):
                counts[_judged(index, line, checker)] += 1
    counts["accepted"] += counts["tickets"]
    return counts


def _judged(index: int, line: Line, checker: Checker | None) -> str:
    if line.job is None:
        assert line.fault.isprintable(), line.fault
        assert len(line.fault) < 500, line.fault
        return "faults"
    _assert_harmless(line.job)
    if checker is None:
        return "accepted"
    try:
        checker.check(index, line.job)
    except MeanCacheError:
        return "accepted"
    return "tickets"


def _assert_harmless(job: Job) -> None:
    """The id is one plain component of a path anywhere, and nothing names a file."""
    assert set(job.id) <= _SAFE, job.id
    assert PurePosixPath("out", job.id).parts == ("out", job.id)
    assert PureWindowsPath("out", job.id).parts == ("out", job.id)
    assert job.id.split(".")[0].upper() not in _DEVICES
    assert job.id[0] not in ".-"
    assert job.id[-1] != "."
    assert len(job.id) <= 128
    assert not set(str(job.schedule)) & set("/\\")
    assert not str(job.schedule).lower().endswith(".json")
    assert 0 < len(job.prompt.encode()) <= 4 * LIMITS.prompt_characters
    assert "\0" not in job.prompt


def _valid(source: random.Random, index: int) -> dict[str, object]:
    """A job that is sound, with some of the fields."""
    fields: dict[str, object] = {
        "id": f"job-{index:03d}",
        "prompt": source.choice(["a red circle", 'says "hi", twice', "two\nlines", "ein Stück 円"]),
        "seed": source.randrange(2**64),
        "resolution": "64x64",
        "guidance_scale": 3.5,
        "schedule": source.choice(["b10", 6, "full"]),
    }
    for name in list(fields)[2:]:
        if source.random() < 0.5:
            del fields[name]
    return fields


def _fields(source: random.Random, index: int) -> dict[str, object]:
    """A job of which none to three fields are something hostile."""
    fields = _valid(source, index)
    for _ in range(source.choice([0, 0, 1, 1, 2, 3])):
        fields[source.choice(_FIELDS)] = source.choice(_HOSTILE)
    return fields


def _damaged(source: random.Random, line: bytes) -> bytes:
    """A line with bytes flipped, cut, doubled or put in, or as it was."""
    place = source.randrange(len(line) + 1)
    match source.randrange(8):
        case 0 if line:
            place = source.randrange(len(line))
            flipped = line[place] ^ (1 << source.randrange(8))
            return line[:place] + bytes([flipped]) + line[place + 1 :]
        case 1:
            return line[:place]
        case 2:
            return line[:place] + source.choice(_BYTES) + line[place:]
        case 3:
            return line + line[place:]
    return line


def _json_file(source: random.Random, count: int) -> bytes:
    return _joined(source, [_json_line(source, index) for index in range(count)])


def _json_line(source: random.Random, index: int) -> bytes:
    fields = _fields(source, index)
    line = json.dumps(fields, ensure_ascii=source.random() < 0.7).encode(errors="surrogatepass")
    match source.randrange(12):
        case 0:
            return line[:-1] + b', "prompt": "again"}'
        case 1:
            depth = source.choice([10, 1000, 4000])
            return b'{"prompt": ' + b"[" * depth + b"]" * source.choice([0, depth])
        case 2:
            return b'{"prompt": "x", "seed": ' + b"9" * source.choice([19, 20, 400, 4000]) + b"}"
        case 3:
            return b'{"prompt": "' + b"x" * source.choice([499, 501, 4095, 9000]) + b'"}'
    return _damaged(source, line)


def _csv_file(source: random.Random, count: int) -> bytes:
    names = list(Job.__struct_fields__)
    source.shuffle(names)
    text = io.StringIO()
    quoting = source.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    writer = csv.writer(text, quoting=quoting, lineterminator=source.choice(["\n", "\r\n"]))
    for index in range(count):
        fields = _fields(source, index)
        writer.writerow([fields.get(name, "") for name in names])
    rows = text.getvalue().encode(errors="surrogatepass").split(b"\n")
    header = ",".join(names).encode()
    head = _damaged(source, header) if source.random() < 0.1 else header
    return _joined(source, [head, *(_damaged(source, row) for row in rows)])


def _text_file(source: random.Random, count: int) -> bytes:
    prompts = [str(source.choice(_HOSTILE)) for _ in range(count)]
    lines = [prompt.encode(errors="surrogatepass") for prompt in prompts]
    return _joined(source, [_damaged(source, line) for line in lines])


def _joined(source: random.Random, lines: Sequence[bytes]) -> bytes:
    start = source.choice([b"", b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\n"])
    return start + source.choice([b"\n", b"\n", b"\r\n", b"\n\n", b"\r"]).join(lines)


_WRITERS: dict[str, Callable[[random.Random, int], bytes]] = {
    ".jsonl": _json_file,
    ".csv": _csv_file,
    ".txt": _text_file,
}
