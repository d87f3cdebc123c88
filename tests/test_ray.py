"""The Ray engine on a local cluster of several nodes, with a worker killed in the middle: what the local engine says."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import tiny_model
from errata.bench.engines import RayEngine, WorkerPlan, _Actor
from errata.bench.rows import read_fits, read_rows
from errata.bench.runner import Progress
from errata.errors import ConfigError
from test_runner import LIFELONG, MEMIT, ROME_ALONE, SAKE_ALL, STREAM, besides, start

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
FLOATS = [
    "p_expected",
    "p_alternative",
    "p_expected_first",
    "p_alternative_first",
    "token_accuracy",
    "distance",
    "own_distance",
]
WORDS = ["method", "edits", "case", "probe", "prompt", "generated", "unedited", "first_token", "gate", "passed"]


@pytest.fixture
def place(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    tiny_model("gpt2", layers=3).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two nodes of one core each. Workers find the modules that the tests' cases are made of."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20})
    made.add_node(num_cpus=1, object_store_memory=80 << 20)
    ray.init(address=made.address, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()
        made.shutdown()


class Marked(_Actor):
    """A worker whose process id can be found."""

    def __init__(self, plan: WorkerPlan, threads: int):
        super().__init__(plan, threads)
        Path(plan.model_name).with_name(f"pid-{os.getpid()}").touch()


def test_a_cluster_whose_worker_is_killed_says_what_one_process_says(
    place: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = (ROME_ALONE, MEMIT, SAKE_ALL, LIFELONG, STREAM)
    local = start(place, "local", *methods, checkpoints=(2,), every=2, extra=besides)
    for patch in (place / "cache").glob("*/*"):  # the cluster fits by itself
        patch.unlink()
    killed: list[int] = []

    def kill_one(progress: Progress) -> None:
        if progress.done < 4 or killed:
            return
        killed.append(int(next(place.glob("pid-*")).name.removeprefix("pid-")))
        os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr("errata.bench.engines._Actor", Marked)
    engine = RayEngine()
    spread = start(place, "ray", *methods, checkpoints=(2,), every=2, extra=besides, engine=engine, progress=kill_one)
    assert killed and engine.workers == 2
    assert len(list(place.glob("pid-*"))) >= 2  # a third where it has its model before the other one is done
    a, b = (read_rows(run.path).drop(columns="run") for run in (local, spread))
    assert len(a) == len(b) > 60 and (a["method"] == STREAM.label).sum() > 10
    assert (spread.path / "said.json").read_text() == (local.path / "said.json").read_text()
    assert spread.read()["workers"] == 2
    for column in WORDS:
        assert a[column].fillna("").tolist() == b[column].fillna("").tolist(), column
    for column in FLOATS:
        assert b[column].tolist() == pytest.approx(a[column].tolist(), abs=1e-5, nan_ok=True), column
    a, b = (read_fits(run.path) for run in (local, spread))
    assert a[["method", "case", "edit", "nbytes", "error"]].equals(b[["method", "case", "edit", "nbytes", "error"]])


def test_an_address_where_no_cluster_is(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        start(place, "a", ROME_ALONE, engine=RayEngine(address="127.0.0.1:1"))
