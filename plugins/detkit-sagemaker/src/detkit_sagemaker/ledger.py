"""What is made in an account, written down before it is created, so that no crash makes it forgotten.

A line of JSON is on the disk before the call that creates a thing, and another after the one that deletes it. A line
that nothing was created after is harmless: clean-up asks AWS what is there. What stays in an account, a bucket or a
role, has its line as well and keeps it: detkit deletes none of that. The ledger knows what this machine began; what
others began is found by tags, see `detkit_sagemaker.endpoints`.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from detkit.errors import StorageError, UsageError

if TYPE_CHECKING:
    from detkit_sagemaker.aws import Aws

Kind: TypeAlias = Literal[
    "schedule", "model", "endpoint-config", "endpoint", "transform-job", "training-job", "tuning-job",
    "bucket", "repository", "project", "role", "policy", "upload",
]  # fmt: skip


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One line: a thing is about to be created, or is gone."""

    t: float
    """Seconds since the epoch (POSIX)."""
    event: Literal["creating", "gone"]
    account: str
    region: str
    kind: str
    name: str
    host: str = ""
    """The machine that creates it."""
    process: int = 0
    """The process there."""

    @property
    def is_abandoned(self) -> bool:
        """Whether the process that began it was one of this machine and is no more."""
        return self.host == socket.gethostname() and not _lives(self.process)


def place() -> Path:
    """Return the ledger's file: ``$DETKIT_LEDGER``, else one where the platform keeps the state of programs.

    It is no cache, and is not removed with one. Raises `UsageError` where nobody's home is known.
    """
    chosen = os.environ.get("DETKIT_LEDGER", "")
    if sys.platform == "darwin":
        usual = "~/Library/Application Support/detkit"
    else:
        usual = f"{os.environ.get('XDG_STATE_HOME') or '~/.local/state'}/detkit"
    try:
        return Path(chosen or f"{usual}/ledger.jsonl").expanduser().absolute()
    except RuntimeError:
        raise UsageError(
            "no home folder is known; set DETKIT_LEDGER to a file where detkit may keep its ledger"
        ) from None


class Ledger:
    """The lines of one account and region. Raises `StorageError` where a line cannot be written."""

    def __init__(self, account: str, region: str, path: Path | None = None) -> None:
        self.account, self.region = account, region
        self.path = path or place()

    @classmethod
    def of(cls, aws: Aws) -> Ledger:
        """Return the ledger of the account that is used."""
        return cls(aws.account, aws.region)

    def creating(self, kind: Kind, name: str) -> None:
        """Note, before the call, that a thing is about to be created."""
        self._append("creating", kind, name)

    def gone(self, kind: Kind, name: str) -> None:
        """Note that a thing is no more, or never was."""
        self._append("gone", kind, name)

    def pending(self) -> list[Entry]:
        """Return what was begun and is not known to be gone, oldest first."""
        left: dict[tuple[str, str], Entry] = {}
        for entry in self._read():
            if entry.event == "creating":
                left[entry.kind, entry.name] = entry
            else:
                left.pop((entry.kind, entry.name), None)
        return list(left.values())

    def _read(self) -> list[Entry]:
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            try:
                entry = msgspec.json.decode(line, type=Entry)
            except msgspec.DecodeError:  # empty, or cut off by a crash: the call that it tells of was never made
                continue
            if (entry.account, entry.region) == (self.account, self.region):
                found.append(entry)
        return found

    def _append(self, event: Literal["creating", "gone"], kind: Kind, name: str) -> None:
        entry = Entry(
            t=time.time(),
            event=event,
            account=self.account,
            region=self.region,
            kind=kind,
            name=name,
            host=socket.gethostname(),
            process=os.getpid(),
        )
        # One write to a file opened for appending, so that processes do not mix their lines; it begins with a new
        # line, as the one before may have been cut off.
        line = b"\n" + msgspec.json.encode(entry) + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not self.path.exists()
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                if os.write(file, line) != len(line):
                    raise OSError("the disk is full")
                os.fsync(file)
            finally:
                os.close(file)
            if is_new:
                _sync_folder(self.path.parent)
        except OSError as error:
            raise StorageError(self.path, error) from error


def _sync_folder(folder: Path) -> None:
    """Make sure that a file's name is on the disk, too."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
