"""Rewards of your own: called in a process of their own, so that none of them can end or stop a run unheard.

An exception, a value that is no number, a call that takes too long, sys.exit, a crash: each becomes an
InputError of one line with the name of the reward and the question. The process, reward_worker.py, is
started by the first request and shared by all rewards, imports modules also from the current folder, and
ends with this process. What rewards print goes to standard error.

Left out on purpose: a limit of memory, several calls at once.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from plumbing.common import AT_END, PATIENCE, ROOT, InputError

IMPORT_SECONDS = 120.0  # for imports: those of a module of yours, torch from a cold network disk
LONGEST_SECONDS = 1e6  # of a limit; the system's clocks do not take any number


class _Failed(Exception):
    """No value: the reward raised an error, its process ended or does not answer; the message says which."""


class RewardWorker:
    """The process in which rewards run, started when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None
        self._found: set[str] = set()  # rewards that this process has imported

    def find(self, name: str) -> None:
        """Import the reward `mymodule.myreward`, unless it is there already.

        Raises:
            InputError: there is no such reward, or its module cannot be imported.
        """
        try:
            if self._process is None or self._process.poll() is not None:
                self._start()
            if name not in self._found:
                self._ask(("find", name), IMPORT_SECONDS)
                self._found.add(name)
        except _Failed as reason:
            raise InputError(f"unknown reward {name!r}: {reason}") from None

    def value(self, name: str, graded: Any, seconds: float) -> float:
        """The reward of a graded response.

        Args:
            graded: has a `question` with its `text` and `where`, the file and line it comes from.
            seconds: limit for the call; the imports for reading `graded` do not count.

        Raises:
            InputError: the call gave no number; or as for find, if the process had to be started again.
        """
        self.find(name)
        try:
            return self._ask(("value", name, graded), seconds)
        except _Failed as reason:
            text, where = graded.question.text, graded.question.where
            question = where or repr(text if len(text) <= 60 else text[:57] + "...")
            raise InputError(f"reward {name}: question {question}: {reason}") from None

    def close(self) -> None:
        """End the process and those that it started."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._connection.close()

    def _start(self) -> None:
        self.close()
        folder = os.getcwd()
        ours, theirs = socket.socketpair()
        self._connection, self._found = Connection(ours.detach()), set()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "plumbing.reward_worker", str(theirs.fileno())],
                cwd=ROOT,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard error
                start_new_session=True,  # Ctrl-C is the parent's affair
            )
        if self.close not in AT_END:
            AT_END.append(self.close)
        self._send(([*sys.path, folder], folder))

    def _ask(self, request: tuple, seconds: float) -> Any:
        """The answer to a request. After anything except an answer the process is ended.

        Raises:
            _Failed: the answer is an error, or there is none within so many seconds.
        """
        try:
            self._send(request)
            self._receive(IMPORT_SECONDS)  # it has read the request, and begins
            tag, content = self._receive(seconds)
        except BaseException:  # Ctrl-C too: the next request must not get the answer to this one
            self.close()
            raise
        if tag == "error":
            raise _Failed(content)
        return content

    def _send(self, message: tuple) -> None:
        try:
            self._connection.send(message)
        except OSError:
            raise _Failed(self._last_words()) from None

    def _receive(self, seconds: float) -> Any:
        try:
            if self._connection.poll(min(seconds, LONGEST_SECONDS)):
                return self._connection.recv()
        except (EOFError, OSError):
            raise _Failed(self._last_words()) from None
        raise _Failed(f"no answer within {seconds:g} s")

    def _last_words(self) -> str:
        """How the process ended."""
        process = self._process
        if process is None:  # a signal has ended it, and ends this process in one line
            time.sleep(PATIENCE)
            return "interrupted"
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return "it closed the connection of its process"
        return f"its process ended ({signal.strsignal(-code) if code < 0 else f'exit code {code}'})"


WORKER = RewardWorker()
atexit.register(WORKER.close)


def find(name: str, seconds: float) -> Callable[[Any], float]:
    """The reward `mymodule.myreward` as a function of a graded response; see `RewardWorker.value`.

    Raises:
        InputError: there is no such reward, or its module cannot be imported.
    """
    WORKER.find(name)
    return functools.partial(WORKER.value, name, seconds=seconds)
