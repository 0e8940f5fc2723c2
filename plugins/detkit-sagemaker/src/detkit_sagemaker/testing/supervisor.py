"""``python -IS supervisor.py FOLDER COMMAND ...``: run a command as a container, with no more life than its simulator.

Stdin is a pipe from the simulator. When it ends, because the simulator closed it or was killed, the command and all
that it started are killed. SIGTERM is passed on. The exit code is the command's, 128 + n after signal n. FOLDER, the
container's place for temporary files, is gone at the end.

Only a few modules are imported: this runs once for each container, without ``site``.
"""

import _thread
import contextlib
import os
import shutil
import signal
import sys

_TERM = {signal.SIGTERM}


def main(folder: str, command: list[str]) -> int:
    """Run the command; return its exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _TERM)  # until there is someone to pass it on to
    child = os.fork()
    if child == 0:
        _become(command)

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)

    def watch() -> None:
        while os.read(0, 1):
            pass
        kill()

    with contextlib.suppress(OSError):  # the child has done it, too: whoever is first
        os.setpgid(child, child)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TERM)
    _thread.start_new_thread(watch, ())
    _, status = os.waitpid(child, 0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    kill()  # what it has left behind
    shutil.rmtree(folder, ignore_errors=True)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _become(command: list[str]) -> None:
    try:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _TERM)
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(127)


if __name__ == "__main__":
    sys.stdout.flush()
    os._exit(main(sys.argv[1], sys.argv[2:]))
