"""``python -m detkit_sagemaker.container.stand_ins object-detection|jumpstart train|serve``.

Or, for a script that the container is given: ``... jumpstart script --epochs 2``.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeAlias

from detkit.errors import DetkitError
from detkit.worker import leave
from detkit_sagemaker.container.__main__ import base_folder
from detkit_sagemaker.container.stand_ins import builtin, jumpstart
from detkit_sagemaker.container.stand_ins.engine import chosen
from detkit_sagemaker.container.stand_ins.service import Failure, TrainingFolder, log

Train: TypeAlias = Callable[[TrainingFolder], None]
Serve: TypeAlias = Callable[[Path], int]

IMAGES: Mapping[str, tuple[Train, Serve]] = {
    "object-detection": (builtin.train, builtin.serve),
    "jumpstart": (jumpstart.train, jumpstart.serve),
}


def main(arguments: list[str]) -> int:
    """Do what the platform asks of an image; returns the process's exit code."""
    is_script = arguments[:2] == ["jumpstart", "script"]
    if not is_script and (len(arguments) != 2 or arguments[0] not in IMAGES or arguments[1] not in ("train", "serve")):
        print(f"usage: python -m {__package__} {'|'.join(IMAGES)} train|serve", file=sys.stderr)
        return 2
    name, action, *more = arguments
    train, serve = IMAGES[name]
    print(f"detkit's stand-in for the image {name} of AWS: {chosen()} of detkit runs here, not AWS's algorithm")
    if action == "serve":
        return serve(base_folder() / "model")
    folder = TrainingFolder(base_folder())
    try:
        if is_script:
            jumpstart.run_script(folder, more)
        else:
            train(folder)
    except Failure as failure:
        log(str(failure), level="ERROR")
        folder.fail(str(failure))
        return 1
    except DetkitError as error:
        folder.fail(f"AlgorithmError: {error}")
        log(f"AlgorithmError: {error}", level="ERROR")
        return 1
    except Exception as error:
        folder.fail(f"InternalServerError: {type(error).__name__}: {error}")
        traceback.print_exc()
        return 1
    return 0


def _end(signum: int, frame: FrameType | None) -> NoReturn:
    sys.exit(0)


def run() -> NoReturn:
    """Do what the command line says and leave."""
    signal.signal(signal.SIGTERM, _end)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    os.environ.pop("DETKIT_PRINT_EVENTS", None)  # these images print lines of their own
    try:
        code = main(sys.argv[1:])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    leave(code)


if __name__ == "__main__":
    run()
