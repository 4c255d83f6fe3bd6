"""Runs a command that ends when the process that started it ends, however it ends.

    python -I -S leash.py SIGNAL UID COMMAND...

The kernel sends SIGNAL to the command when its parent dies (PR_SET_PDEATHSIG), `kill -9` of the parent included; on
systems without it the parent's own clean-up must do. UID -1 stays the same user; another one gives up root, which
Postgres refuses to run as. This is a program of its own, and not a function run between fork and exec, because Python
code after a fork of a process with threads can deadlock.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Drop privileges, ask for the signal, become the command."""
    signal_number, uid, *command = arguments
    parent = os.getppid()
    if int(uid) >= 0:
        os.setgroups([])
        os.setgid(int(uid))
        os.setuid(int(uid))
    # After setuid, which would reset it.
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)
        if os.getppid() != parent:
            raise SystemExit("The process that started this one is already gone.")
    os.execv(command[0], command)  # noqa: S606 — the command is our parent's own.


if __name__ == "__main__":
    main(sys.argv[1:])
