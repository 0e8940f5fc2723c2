"""Where a network runs, and what makes it run fast there."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detkit.errors import UsageError
from detkit.ranks import LOAD_BEFORE

CHANNELS_LAST, CONTIGUOUS = "channels_last", "contiguous"
"""Layouts of images and of what is made of them: by pixels, as torch calls it, and in planes."""

_BUSY = 0.75
"""Share of the cores that others may have before a step is slowed down."""

_FORMATS = {CHANNELS_LAST: torch.channels_last, CONTIGUOUS: torch.contiguous_format}


def choose_device(wanted: str) -> torch.device:
    """Return the device; ``auto`` is the first GPU, else the CPU. Raises `UsageError` for one that is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise UsageError(f"device={wanted!r} is no device; choose auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device={wanted!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA device(s); "
            "choose device=cpu or device=auto"
        )
    return device


def describe_device(device: torch.device) -> str:
    """Return a device's name as people know it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.processor() or platform.machine()})"


def to_device(network: Any, device: torch.device, layout: str = CHANNELS_LAST) -> None:
    """Move a network, in a layout of its tensors in memory; the default is the fastest nearly everywhere."""
    network.to(device, memory_format=_FORMATS[layout])
    network.transform.channels_last = layout == CHANNELS_LAST


def begin_reading(values: Tensor) -> Callable[[], list[float]]:
    """Begin to copy numbers from their device; what is returned waits for that, and not for what was begun since."""
    if values.device.type != "cuda":
        return values.tolist
    here = values.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        numbers: list[float] = here.tolist()
        return numbers

    return read


def compile_backbone(network: Any, device: torch.device, how: bool | str) -> None:
    """Compile a network's backbone, whose weights keep their names.

    With ``graphs``, its kernels are recorded in CUDA graphs too, one for each size of input: a GPU then starts them at
    once, and not one by one as the processor asks for them. Raises `UsageError` without a GPU for those, and without a
    C++ compiler.
    """
    if how == "graphs" and device.type != "cuda":
        raise UsageError(f"compile=graphs records CUDA graphs, and this run is on {device.type}; say compile=true")
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None and shutil.which("clang++") is None:
        raise UsageError(f"compile= needs a C++ compiler, and there is no {compiler}; install one, or leave it out")
    network.backbone.compile(mode="reduce-overhead" if how == "graphs" else "default")


def keep_freed_memory() -> None:
    """Tell glibc to keep the activations' memory between steps: fewer page faults, 2 to 24 % faster steps on CPUs.

    Constants of ``malloc.h``: M_TRIM_THRESHOLD -1, which -1 turns off, M_TOP_PAD -2, M_MMAP_THRESHOLD -3.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for name, value in ((-3, 1 << 30), (-1, -1), (-2, 128 << 20)):
        libc.mallopt(name, value)


def use_threads(wanted: int | str) -> str | None:
    """Set torch's threads, ``auto`` leaving them as they are; return a warning where others keep the cores busy.

    Threads that share a core wait for each other at the end of every operation: with one busy process beside it, a
    step on two threads took twice as long as on one, and where OpenMP's own patience is kept, four to ten times
    (measured with fcos_small and fcos_tiny on two cores; see `detkit.processes.for_speed`).
    """
    if wanted != "auto":
        torch.set_num_threads(int(wanted))
        return None
    if torch.get_num_threads() == 1 or (busy := business()) is None:
        return None
    return f"{busy}; one thread may be much faster: --threads 1, or DETKIT_THREADS=1 for any command"


def business() -> str | None:
    """Say that others keep this machine's cores busy; None where they do not."""
    load, cores = float(os.environ.get(LOAD_BEFORE) or os.getloadavg()[0]), os.cpu_count() or 1
    return None if load < _BUSY * cores else f"this machine is busy (load {load:.1f} on {cores} cores)"


def describe_processor() -> str:
    """Return the name of the machine's processor as its maker has it, else its architecture."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else []
    return str(names[0]) if names else platform.processor() or platform.machine()
