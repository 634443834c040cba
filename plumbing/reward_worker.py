"""The process in which rewards of your own run: own_reward.py starts it and talks to it over a socket pair.

It is a program of its own that nobody imports: reading a graded response brings in rollout.py, and thus
torch, when the first one comes. It imports a reward when it is told its name, and calls it when it gets a
response; whatever happens then is an answer, except the end of this process, which the parent notices.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import reprlib
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from plumbing.common import first_line

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Refused(Exception):
    """It is no reward, or gave no number; the message says all."""


def find(name: str) -> Callable[[Any], Any]:
    """The function `mymodule.myreward`; whatever the import raises goes on.

    Raises:
        Refused: it cannot be called.
    """
    module, _, function = name.rpartition(".")
    found = getattr(importlib.import_module(module), function)
    if not callable(found):
        raise Refused("not a function")
    return found


def number(value: Any) -> float:
    """A real number of any kind (Python's, numpy's, torch's) as a float; nan and inf are numbers too.

    Raises:
        Refused: it is none.
    """
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise Refused(f"returned {reprlib.repr(value)}, expected a number")
    return float(value)


def described(error: BaseException) -> str:
    """An error in one line, with the line of the reward's module that it came from."""
    text = first_line(error)
    if isinstance(error, Refused):
        return text
    kind = type(error).__name__
    text = kind if text == kind else f"{kind}: {text}"
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if file != __file__ and "importlib" not in file:
            return f"{text} ({Path(file).name}:{line})"
    return text


def end_with_parent() -> None:
    """Let the kernel end this process when the parent is gone, even within a long call in C.

    Only Linux can; elsewhere the end of the connection ends it, after the call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(connection: Connection) -> None:
    """Answer ("find", name) and ("value", name, graded) until the parent is gone."""
    sys.path[:], folder = connection.recv()
    os.chdir(folder)
    process, rewards = os.getpid(), {}
    while True:
        tag, name, *graded = connection.recv()
        connection.send("started")
        try:
            if tag == "find":
                rewards[name], answer = find(name), ("found", name)
            else:
                answer = ("value", number(rewards[name](*graded)))
        except BaseException as error:  # sys.exit too
            answer = ("error", described(error))
        if os.getpid() != process:  # a fork that the reward made and did not end
            os._exit(1)
        connection.send(answer)


if __name__ == "__main__":
    sys.stdout = sys.stderr
    end_with_parent()
    os.set_inheritable(int(sys.argv[1]), False)  # no program that a reward starts keeps it open
    try:
        serve(Connection(int(sys.argv[1])))
    except (EOFError, OSError):  # the parent closed its end or died
        os._exit(0)
