"""``python -m detkit_sagemaker.testing --image mine:latest="python -m mine"``: a simulated AWS until Ctrl-C."""

from __future__ import annotations

import argparse
import shlex

from detkit.errors import UsageError
from detkit_sagemaker.testing.simulator import serve_forever


def main() -> None:
    """Read the arguments and serve."""
    parser = argparse.ArgumentParser(prog="python -m detkit_sagemaker.testing", description=__doc__)
    parser.add_argument("--port", type=int, default=4566, help="port on the loopback, 0 for any free one")
    parser.add_argument("--folder", help="where the containers' /opt/ml folders are, and stay; without one, temporary")
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help='a container and the command that stands for it, e.g. mine:latest="python -m mine"; may be repeated',
    )
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="FAULT[=VALUE]",
        help="something that goes wrong there, e.g. throttle=3; may be repeated",
    )
    arguments = parser.parse_args()
    images = {}
    for image in arguments.image:
        name, equals, command = image.partition("=")
        if not (name and equals and command):
            parser.error(f'--image {image}: expected NAME=COMMAND, e.g. mine:latest="python -m mine"')
        images[name] = shlex.split(command)
    try:
        serve_forever(arguments.port, images, arguments.folder, arguments.fault)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
