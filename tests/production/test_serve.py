from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from meancache_trt.cli import main
from meancache_trt.production.hosting import listen
from tests.production.serving import Client

TOKEN = "0123456789abcdef"
END_S = 120


@dataclass(frozen=True)
class Process:
    process: subprocess.Popen[str]
    client: Client


@contextlib.contextmanager
def serving(bundle: Path, *options: str) -> Iterator[Process]:
    """The command on a free port, once it serves."""
    command = [sys.executable, "-m", "meancache_trt.cli", "serve", str(bundle)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--threads", "1", "--embedding-cache", "off", *options],
        env=os.environ | {"SERVICE_TOKEN": TOKEN},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    with process:
        try:
            assert process.stderr is not None
            said = process.stderr.readline()
            found = re.search(r"http://127\.0\.0\.1:(\d+)/", said)
            assert found is not None, said + process.stderr.read()
            yield Process(process, Client(int(found[1]), TOKEN))
        finally:
            process.kill()


def test_sigterm_finishes_what_is_in_flight_and_exits_0(shared_bundle, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    options = ("--schedule", "full", "--token-file", str(tmp_path / "token"))
    with serving(shared_bundle, *options) as served:
        replies = []
        asking = threading.Thread(target=lambda: replies.append(served.client.generate(n=3)))
        asking.start()
        while not rendering(served.client):
            assert asking.is_alive()
        served.process.send_signal(signal.SIGTERM)
        asking.join(END_S)
        assert served.process.wait(END_S) == 0
        with pytest.raises(ConnectionError):
            served.client.ask("GET", "/health")
    (reply,) = replies
    assert reply.status == 200
    assert len(reply.json["data"]) == 3


def rendering(client: Client) -> bool:
    lines = client.ask("GET", "/metrics").body.decode().splitlines()
    return "meancache_rendering_jobs 0.0" not in lines


def test_limits_and_token_of_the_command_line_hold(shared_bundle):
    limits = ("--prompt-limit", "21", "--images-limit", "2", "--deadline", "0.001")
    others = ("--token-env", "SERVICE_TOKEN", "--max-batch", "2", "--batch-wait", "5")
    with serving(shared_bundle, "--schedule", "b6", *limits, *others) as served:
        assert served.client.generate().error["param"] == "prompt"
        assert served.client.generate(prompt="a", n=3).error["param"] == "n"
        assert served.client.generate(prompt="a").status == 504
        assert replace(served.client, token=TOKEN[:-1]).generate().status == 401
        assert replace(served.client, token=None).generate().status == 401


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--host", "0.0.0.0"), "on 0.0.0.0 others can reach the service; give --token-file"),
        (("--host", "::"), "on :: others can reach the service"),
        (("--host", "example.org"), "on example.org others can reach the service"),
        (("--replicas", "2"), "--replicas are those of --ray"),
        (("--ray", "--port", "0"), "--ray needs a --port"),
        (("--token-file", "a", "--token-env", "b"), "but not both"),
    ],
)
def test_what_cannot_be_meant_has_status_2(shared_bundle, capsys, arguments, message):
    assert run("serve", shared_bundle, *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_token_that_is_missing_or_could_be_guessed_is_refused(
    shared_bundle, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("SHORT", "0123456789abcde")
    (tmp_path / "blank").write_text("0123456789 abcdef")
    for option, message in (
        (("--token-env", "SHORT"), "at least 16"),
        (("--token-env", "ABSENT_VARIABLE"), "found no such variable"),
        (("--token-file", tmp_path / "blank"), "at least 16"),
        (("--token-file", tmp_path / "absent"), "found nothing"),
    ):
        assert run("serve", shared_bundle, *option) == 1
        assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_one_clear_error(shared_bundle, capsys):
    with listen("127.0.0.1", 0) as taken:
        assert run("serve", shared_bundle, "--port", taken.getsockname()[1]) == 1
    assert "choose another --port or --host" in capsys.readouterr().err


def test_a_missing_package_is_named_with_its_extra(shared_bundle):
    script = (
        "import sys; sys.modules['prometheus_client'] = None; from meancache_trt.cli import main; "
        f"main(['serve', {str(shared_bundle)!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "prometheus_client" in done.stderr
    assert "meancache-trt[serve]" in done.stderr


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)
