"""Engines: processes of this machine say what one process says, one that dies is named, and a cluster that is not there too."""

import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from conftest import steering_part, tiny_model
from errata.bench import engines
from errata.bench.engines import ProcessEngine, RayEngine, _answers, longest_first
from errata.bench.preset import Method
from errata.bench.rows import read_fits, read_rows
from errata.bench.runner import Progress, plan_jobs
from errata.cli import app
from errata.errors import ConfigError, UnknownEditorError
from errata.model.fingerprint import base_of
from errata.patch import Patch
from errata.scope.gate import Gate
from test_runner import LIFELONG, MEMIT, ROME_ALONE, SAKE_ALL, STREAM, besides, start, texts


@pytest.fixture
def place(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    tiny_model("gpt2", layers=3).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


def test_two_processes_say_what_one_says_and_one_that_dies_is_named(place: Path) -> None:
    methods = (ROME_ALONE, MEMIT, SAKE_ALL, LIFELONG, STREAM)
    local = start(place, "local", *methods, checkpoints=(2,), every=2, extra=besides)
    for patch in (place / "cache").glob("*/*"):  # the processes fit by themselves
        patch.unlink()
    with ProcessEngine(2) as engine:
        spread = start(
            place,
            "spread",
            *methods,
            checkpoints=(2,),
            every=2,
            engine=engine,
            extra=besides,
        )
        rows = read_rows(spread.path, "method = 'rome, stream' and kind = edit")
        assert rows.groupby("edits").size().to_dict() == {2: 2, 4: 4}
        assert texts(read_rows(local.path).drop(columns="run")) == texts(read_rows(spread.path).drop(columns="run"))
        lost = ["run", "seconds"]
        assert texts(read_fits(local.path).drop(columns=lost)) == texts(read_fits(spread.path).drop(columns=lost))
        assert (spread.path / "said.json").read_text() == (local.path / "said.json").read_text()
        assert spread.read()["workers"] == 2
        ids = [process.pid for process in engine._processes]

        units = place / "killed" / "units"

        def kill(progress: Progress) -> None:
            if any(units.glob("*.parquet")):
                for one in ids:
                    os.kill(one, signal.SIGKILL)

        with pytest.raises(ConfigError, match="died over the unit .* resume with fewer --workers"):
            start(place, "killed", *methods, engine=engine, progress=kill)
        assert not engine._processes
    assert any(units.glob("*.parquet"))


def test_long_chains_of_edits_go_first() -> None:
    """A stream of 40 edits before 30 that follow one another, before one write of 20; then all else, as it comes."""
    methods = (
        Method("alone", "rome"),
        replace(MEMIT, most=20),
        replace(LIFELONG, most=30),
        Method("stream", "grace", "stream"),
    )
    jobs = plan_jobs(methods, 40, 1, (1, 10), shard=40, look=10)
    first = [job.name for job in longest_first(jobs)]
    assert first[:8] == [
        "stream-stream-00010", "rome_lifelong-fit-00001", "stream-stream-00020", "rome_lifelong-fit-00010",
        "memit-fit-0000", "rome_lifelong-fit-00030", "stream-stream-00030", "stream-stream-00040",
    ]  # fmt: skip
    assert first[8:] == [job.name for job in jobs if job.name not in first[:8]]


def test_what_a_job_raises_comes_back() -> None:
    ours, other = (
        engines._Failure("UnknownEditorError", "no editor 'rom'"),
        engines._Failure("ZeroDivisionError", "by zero"),
    )
    assert isinstance(ours.error(), UnknownEditorError) and ours.error().args == ("no editor 'rom'",)
    assert isinstance(other.error(), RuntimeError) and str(other.error()) == "ZeroDivisionError: by zero"


def test_patches_that_are_sent_are_the_same_and_share_their_gate(tokenizer: Any) -> None:
    model = tiny_model("gpt2")
    gate = Gate(layers=(0,))
    parts = [steering_part(model, prompt, (70,), gate=gate) for prompt in ([11, 25, 301], [90, 12, 55])]
    patches = [Patch("hand", {}, (), base_of(model, tokenizer), (part,)) for part in parts]
    one, two = engines._opened([patch.to_bytes() for patch in patches], {})
    assert [one, two] == patches and one.steering[0].gate is two.steering[0].gate


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1", "expected the address of a Ray cluster as HOST:PORT"),
        ("ray://head", "expected the address of a Ray cluster as HOST:PORT"),
        ("nowhere.invalid:6379", "no Ray cluster at nowhere.invalid:6379"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(address: str, says: str, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    words = ["bench", "sake-doubt", "--model", "atlas", "--out", str(tmp_path / "a"), "--engine", "ray"]
    started = time.perf_counter()
    found = CliRunner().invoke(app, [*words, "--address", address])
    assert found.exit_code == 2 and says in " ".join(found.stderr.split())
    assert time.perf_counter() - started < 15 and not (tmp_path / "a").exists()


def test_a_port_where_nobody_listens_is_told_from_one_where_somebody_does() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        with pytest.raises(ConfigError, match=f"no Ray cluster at ray://127.0.0.1:{port}: .*refused; start one"):
            _answers(f"ray://127.0.0.1:{port}")
        held.listen()
        _answers(f"127.0.0.1:{port}")
    _answers("auto")
    _answers(None)
    RayEngine("auto").check()
