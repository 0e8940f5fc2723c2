"""The ledger: on the disk before anything is created, and never in the way of what is."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from detkit.errors import StorageError
from detkit_sagemaker.ledger import Ledger, place

ACCOUNT, REGION = "123456789012", "eu-west-1"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(ACCOUNT, REGION, tmp_path / "state" / "ledger.jsonl")


def test_what_was_begun_is_pending_until_it_is_gone(ledger: Ledger) -> None:
    ledger.creating("model", "detkit-a")
    ledger.creating("endpoint", "detkit-a")
    ledger.gone("model", "detkit-a")
    assert [(entry.kind, entry.name) for entry in ledger.pending()] == [("endpoint", "detkit-a")]
    ledger.gone("endpoint", "detkit-a")
    assert ledger.pending() == []


def test_another_account_and_another_region_have_lines_of_their_own(ledger: Ledger) -> None:
    ledger.creating("model", "detkit-a")
    assert Ledger(ACCOUNT, "us-east-1", ledger.path).pending() == []
    assert Ledger("999999999999", REGION, ledger.path).pending() == []


def test_a_line_cut_off_by_a_crash_hides_no_other(ledger: Ledger) -> None:
    ledger.creating("model", "detkit-a")
    with ledger.path.open("ab") as file:
        file.write(b'{"t": 1.0, "event": "creat')
    ledger.creating("endpoint", "detkit-b")
    assert [entry.name for entry in ledger.pending()] == ["detkit-a", "detkit-b"]


def append(path: str, number: int) -> None:
    for i in range(50):
        Ledger(ACCOUNT, REGION, Path(path)).creating("model", f"detkit-{number}-{i}")


def test_processes_that_write_at_once_lose_no_line(ledger: Ledger) -> None:
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(append, [str(ledger.path)] * 4, range(4)))
    assert {entry.name for entry in ledger.pending()} == {f"detkit-{n}-{i}" for n in range(4) for i in range(50)}


def test_the_line_is_there_when_the_process_is_killed_right_after(ledger: Ledger) -> None:
    script = f"""
        import os, signal
        from pathlib import Path
        from detkit_sagemaker.ledger import Ledger
        Ledger({ACCOUNT!r}, {REGION!r}, Path({str(ledger.path)!r})).creating("endpoint", "detkit-a")
        os.kill(os.getpid(), signal.SIGKILL)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert ended.returncode == -signal.SIGKILL
    [entry] = ledger.pending()
    assert (entry.kind, entry.name, entry.is_abandoned) == ("endpoint", "detkit-a", True)


def test_what_this_process_began_is_not_abandoned(ledger: Ledger) -> None:
    ledger.creating("endpoint", "detkit-a")
    [entry] = ledger.pending()
    assert entry.process == os.getpid()
    assert not entry.is_abandoned


def test_what_another_machine_began_is_not_said_to_be_abandoned(ledger: Ledger) -> None:
    ledger.creating("endpoint", "detkit-a")
    record = json.loads(ledger.path.read_bytes())
    ledger.path.write_text(json.dumps({**record, "host": "elsewhere", "process": 2**22 + 1}))
    [entry] = ledger.pending()
    assert not entry.is_abandoned


def test_nothing_is_created_where_the_ledger_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        Ledger(ACCOUNT, REGION, tmp_path / "file" / "ledger.jsonl").creating("endpoint", "detkit-a")


def test_the_ledger_is_kept_beside_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DETKIT_LEDGER", str(tmp_path / "mine.jsonl"))
    assert place() == tmp_path / "mine.jsonl"
    monkeypatch.delenv("DETKIT_LEDGER")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert place().is_relative_to(tmp_path)
    assert "cache" not in str(place().relative_to(tmp_path)).lower()
