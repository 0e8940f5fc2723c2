"""``python -m detkit_sagemaker.container train|serve``, as SageMaker starts an image.

``check BACKEND...`` is for those who build one. ``SAGEMAKER_BASE_DIR`` moves ``/opt/ml``, as it does for AWS's own
toolkit.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

USAGE = "usage: python -m detkit_sagemaker.container train|serve, or: check BACKEND..."


def base_folder() -> Path:
    """Return ``/opt/ml``, or what stands for it."""
    return Path(os.environ.get("SAGEMAKER_BASE_DIR") or "/opt/ml").absolute()


def main(arguments: list[str]) -> int:
    """Do what the platform asks for; returns the process's exit code."""
    if arguments == ["train"]:
        from detkit_sagemaker.container.training import train

        return train(base_folder())
    if arguments == ["serve"]:
        from detkit_sagemaker.container.serving import serve

        return serve(base_folder())
    if len(arguments) > 1 and arguments[0] == "check":
        from detkit_sagemaker.container.engines import check

        return check(arguments[1:])
    print(USAGE, file=sys.stderr)
    return 2


def run() -> NoReturn:
    """Do what the command line says and leave, without the clean-up that crashes in some frameworks."""
    # Process 1 of a container ignores the signals that it has no handler for, and imports take seconds.
    signal.signal(signal.SIGTERM, _leave_at_once)
    os.environ["DETKIT_PRINT_EVENTS"] = "1"  # the log is all that the platform looks at

    from detkit.worker import leave

    try:
        code = main(sys.argv[1:])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    leave(code)


def _leave_at_once(signum: int, frame: FrameType | None) -> NoReturn:
    os._exit(128 + signum)


if __name__ == "__main__":
    run()
