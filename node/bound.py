"""Run as a script: become a Python that is told to stop when its parent dies, whatever kills it.

    python bound.py PARENT_PID -m scp --config vigil.toml

Standard library only: the supervisor starts it isolated and without site packages, which costs
15 ms. A `preexec_fn` could deadlock, for the supervisor has threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h; it survives execve


def main() -> None:
    parent, *arguments = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):  # it died before we asked
        sys.exit(1)
    os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    main()
