"""Which process this is, what it has of a batch, and what torchrun is told."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detkit import launching
from detkit.checkpoints import PROCESSES
from detkit.errors import InvalidValue, UsageError
from detkit.job import Job, Workspace
from detkit.launching import Machine
from detkit.processes import worker_environment
from detkit.ranks import VARIABLES, Alone, Place, Ranks
from detkit.timing import Clock, tell

LAUNCHED = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_MAX_RESTARTS": "3",
}
OPTIONS = {"gpus": None, "processes": 1, "nodes": 1, "rendezvous": "", "max_restarts": 3, "device": "auto"}


class Numbered(Alone):
    """A rank whose others are not there: what it has of a batch is known without them."""

    def __init__(self, rank: int, size: int) -> None:
        self.place = Place(rank, size)


def test_place_is_what_torchrun_says() -> None:
    assert Place.here(LAUNCHED) == Place(3, 4, 1, 2, 1, 3, launched=True)
    assert Place.here({"RANK": "3", "WORLD_SIZE": "4"}) == Place(), "those are another program's"


def test_a_worker_does_not_see_what_torchrun_told_its_starter(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, LAUNCHED.get(name, "0"))
    assert Place.here(worker_environment(sys.executable)) == Place()


@given(num_images=st.integers(1, 40), passes=st.integers(1, 5), size=st.integers(1, 6))
def test_ranks_have_each_row_once(num_images: int, passes: int, size: int) -> None:
    passes = min(passes, num_images)
    ranks: list[Ranks] = [Numbered(rank, size) for rank in range(size)]
    shares = [rank.shares(num_images, passes) for rank in ranks]
    taken = [row for number in range(passes) for own in shares for row in own[number][0] if own[number][1]]
    assert taken == list(range(num_images))
    assert sum(share for own in shares for _, share in own) == pytest.approx(1)
    assert all(rows for own in shares for rows, _ in own), "a rank without a row could not take part"
    assert sorted(itertools.chain(*(rank.mine(num_images) for rank in ranks))) == list(range(num_images))


def test_alone_is_what_it_was() -> None:
    assert Alone().shares(5, 2) == [([0, 1, 2], 0.6), ([3, 4], 0.4)]
    assert Alone().sum([1.5]) == [1.5]
    assert Alone().gather(b"x") == [b"x"]


def said(options: dict[str, Any], machine: Machine | None = None) -> str:
    return " ".join(launching.command("python", ["worker"], {**OPTIONS, **options}, Path("runs/big"), machine=machine))


def test_torchrun_is_told_what_was_asked_for() -> None:
    alone = said({"processes": 2})
    assert "--nnodes=1 --nproc-per-node=2 --max-restarts=3 --rdzv-backend=c10d" in alone
    assert "--rdzv-endpoint=runs/big/.rendezvous --rdzv-conf=store_type=file --rdzv-id=big --no-python worker" in alone
    assert "--nproc-per-node=gpu" in said({"gpus": "all"})
    several = said({"gpus": 8, "nodes": 2, "rendezvous": "node0:29400"})
    assert "--nnodes=2 --nproc-per-node=8 --max-restarts=0" in several
    assert "--rdzv-backend=c10d --rdzv-endpoint=node0:29400 --rdzv-id=big" in several
    numbered = said({"nodes": 2}, Machine(1, "algo-1", 29400))
    assert "--max-restarts=0 --node-rank=1 --master-addr=algo-1 --master-port=29400" in numbered


def test_one_process_needs_no_launcher() -> None:
    assert not launching.launches(OPTIONS)
    assert not launching.launches({"device": "cpu"})
    assert not launching.launches({**OPTIONS, "gpus": 1})
    assert launching.launches({**OPTIONS, "gpus": "all"})


def auto_job(batch_size: int | str, passes: int = 1, **options: Any) -> Job:
    params = {"batch_size": batch_size, "grad_accumulation": passes}
    asked = {**OPTIONS, "processes": "auto", "device": "cpu", **options}
    return Job(backend="b", engine="e", model="m", params=params, options=asked, classes=["a"])


@pytest.mark.parametrize(
    ("cores", "batch_size", "tried"), [(2, 16, 2), (8, 16, 4), (8, "auto", 1), (8, 7, 1), (8, 3, 1), (1, 16, 1)]
)
def test_processes_that_are_tried(
    cores: int, batch_size: int | str, tried: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a core and four images of a pass, until one has written what they chose."""
    monkeypatch.setattr(launching, "count_cores", lambda: cores)
    workspace, job = Workspace(tmp_path), auto_job(batch_size)
    assert launching.decided(job, workspace) == {**job.options, "processes": tried}
    workspace.checkpoints.mkdir()
    for written, expected in {"": tried, "5": 5, "1": 1}.items():
        (workspace.checkpoints / PROCESSES).write_text(written)
        assert launching.decided(job, workspace)["processes"] == expected
        assert launching.decided(auto_job(batch_size, processes=3), workspace)["processes"] == 3


def test_each_pass_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "count_cores", lambda: 4)
    for passes, tried in {1: 4, 2: 2, 4: 1}.items():
        assert launching.decided(auto_job(16, passes), Workspace(tmp_path))["processes"] == tried


def test_a_gpu_is_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "count_cores", lambda: 4)
    monkeypatch.setattr(launching, "_GPUS", (str(tmp_path),))
    for device, expected in {"auto": 1, "cpu": 4}.items():
        assert launching.decided(auto_job(16, device=device), Workspace(tmp_path))["processes"] == expected


def test_processes_are_measured_on_one_machine() -> None:
    auto = {**OPTIONS, "processes": "auto"}
    launching.check(auto)
    assert not launching.launches(auto), "a place where nobody measures"
    with pytest.raises(UsageError, match="say how many of each"):
        launching.check({**auto, "nodes": 2, "rendezvous": "node0:29400"})
    with pytest.raises(UsageError, match="leave processes out"):
        launching.check({**auto, "gpus": 1})
    with pytest.raises(UsageError, match="say gpus="):
        launching.check({**auto, "device": "cuda"})


def test_rendezvous_without_a_port() -> None:
    with pytest.raises(InvalidValue, match="node0:29400"):
        launching.check({**OPTIONS, "nodes": 2, "rendezvous": "node0"})
    with pytest.raises(UsageError, match="rendezvous=HOST:PORT"):
        launching.check({**OPTIONS, "nodes": 2})
    launching.check({"device": "cpu"})


def test_parts_of_the_time_sum_up() -> None:
    clock = Clock()
    clock.started()
    for _ in clock.each(range(3), "data"):
        with clock.part("forward"):
            pass
        clock.add("backward", 2.0)
    clock.move("backward", "communication", 1.5)
    times = clock.report()
    assert times["backward"] == pytest.approx(4.5)
    assert times["communication"] == 1.5
    assert times["not_scaling"] == pytest.approx(times["total"] - times["data"] - times["forward"] - 4.5, abs=0.01)
    line = tell(times, Place(0, 2), 2_000_000)
    assert "2 processes; 2.0 MB of gradients a step" in line


def test_a_device_of_its_own_is_waited_for_now_and_then() -> None:
    """The first step, which may compile and warm up, stands for no other."""
    waits: list[int] = []
    clock = Clock(lambda: waits.append(clock.steps))
    for step in range(34):
        with clock.part("forward", on_device=True):
            time.sleep(0.0 if step else 0.2)
        clock.steps += 1
    assert sorted(set(waits)) == [0, 1, 17, 33]
    times = clock.report()
    assert 0.2 <= times["forward"] < 0.4
    assert times["not_scaling"] >= 0
