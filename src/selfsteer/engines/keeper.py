"""Runs a command and ends it, with everything that it has started, when standard input ends.

    python keeper.py COMMAND ARGUMENT ...

A server that we start must not outlive us, not even when we are killed: the end of our process closes the pipe, which no
signal handler of ours could do better. Imports nothing but the standard library, so that it starts at once.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

GRACE = 30.0
"""Seconds between asking and killing."""

_PR_SET_PDEATHSIG = 1
"""Linux, prctl(2): a signal at the end of the parent, here for the case that someone kills the keeper itself."""


def main() -> int:
    """Run the command; returns its exit status, as a shell would say it."""
    try:
        process = subprocess.Popen(
            sys.argv[1:],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_keeper() if sys.platform == "linux" else None,  # there are no threads yet
        )
    except OSError as error:
        print(error, file=sys.stderr)
        return 127
    threading.Thread(target=_end_with_input, args=(process,), daemon=True).start()
    status = process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return status if status >= 0 else 128 - status


def _end_with_keeper() -> Callable[[], object]:
    prctl = ctypes.CDLL(None).prctl  # before the fork: there only the call itself is safe
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_with_input(process: subprocess.Popen[bytes]) -> None:
    sys.stdin.read()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
