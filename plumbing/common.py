"""What every script needs: how it ends and what it shows, files read and written, clock, order of data.

Nothing here imports torch, so that a bad argument is answered before anything heavy is loaded.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]  # of the repository: subprocesses start here


# ------------------------------------------------------------------------ what a person sees


def printable(text: str) -> str:
    """A text that others wrote (files, models, libraries) without what moves or rewrites a terminal.

    Control characters, also those that turn the direction of writing, become escapes as in Python.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def tell(message: str) -> None:
    """Print one line to standard error, above open progress bars."""
    _stay_if_ending()
    tqdm.write(printable(" ".join(message.split())), file=sys.stderr)


class Forgiving:
    """A stream that loses what it cannot write: a full disk under the log is no reason to end."""

    def __init__(self, stream: IO[str]):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write, if there is room."""
        with suppress(OSError):
            self.stream.write(text)
            self.stream.flush()
        return len(text)

    def flush(self) -> None:
        """Write what waits, if there is room."""
        with suppress(OSError):
            self.stream.flush()


class progress(tqdm):  # noqa: N801, it stands where tqdm would
    """tqdm on a terminal. In a pipe or a file: a plain line now and then, and one at the end."""

    line_seconds = 30.0  # between the plain lines of a bar

    def __init__(self, *arguments: Any, **options: Any):
        self._plain = not sys.stderr.isatty()
        self._next_line = time.monotonic() + self.line_seconds
        if options.get("desc"):  # perhaps the name of a file
            options["desc"] = printable(options["desc"])
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the bar as it is now."""
        if not self._plain:
            super().display(msg, pos)
        elif time.monotonic() > self._next_line:
            self._line()

    def _line(self) -> None:
        self._next_line = time.monotonic() + self.line_seconds
        bar = "{desc}: {n_fmt}/{total_fmt} {unit}s, {elapsed}, {rate_fmt}{postfix}"
        shown = self.format_meter(**self.format_dict | {"ncols": None, "bar_format": bar})
        print(shown, file=sys.stderr, flush=True)

    def clear(self, *arguments: Any, **options: Any) -> None:
        """Take the bar away, so that a line can be printed."""
        if not self._plain:
            super().clear(*arguments, **options)

    def close(self) -> None:
        """End the bar; one with leave=False goes without a trace."""
        if self._plain and not self.disable:
            if self.leave and self.n:
                self._line()
            self.disable = True
            self._decr_instances(self)
        else:
            super().close()


# ----------------------------------------------------------------------------- how a process ends

PATIENCE = 10.0  # seconds that a rank waits for another one to say the same
AT_END: list[Callable[[], None]] = []  # what ends the processes that this one started
_waiting: list[int] = []  # the pipe by which signals arrive, once there is one
_ending: list[int] = []  # the thread that ends this process after a signal, once there was one


class InputError(ValueError):
    """Bad input from the user. Scripts print it as one line and exit with code 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none. A missing key alone says little."""
    lines = str(error).strip().splitlines()
    if isinstance(error, KeyError):
        return f"unknown name {error}"
    return lines[0] if lines else type(error).__name__


def fail(message: str) -> None:
    """Print an error in one line and exit with code 2.

    Of several ranks on a machine the first one speaks: its exit ends the others while they wait. If it
    does not, the error is theirs alone, and they speak.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE)
    tell(f"error: {message}")
    _end_children()
    if _world() > 1:  # leaving the process group in order needs the others, who do not know yet
        sys.stdout.flush()
        os._exit(2)
    sys.exit(2)


def run_script(main: Callable[..., None], *arguments: Any) -> None:
    """Call main; bad input, a full disk and a lost rank end in one line and exit code 2.

    Ctrl-C and SIGTERM do in one line too, see `end_on_signals`. Ends the process group.
    """
    if main.__module__ == "__main__":
        end_on_signals()
        sys.stdout, sys.stderr = Forgiving(sys.stdout), Forgiving(sys.stderr)
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()  # its report on a checkpoint would precede our one line
        logging.disable_progress_bar()  # it would show one for every file that is read
    try:
        try:
            main(*arguments)
        except BaseException:
            _stay_if_ending()
            raise
    except InputError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'file system'}: {error.strerror or error}")
    except RuntimeError as error:
        if _world() == 1 or not _is_lost_rank(error):
            raise
        time.sleep(PATIENCE)  # the launcher ends this rank too, and then the line is another one
        fail(f"another rank has ended ({first_line(error)})")
    finally:
        _end_children()
        if "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
            sys.modules["torch.distributed"].destroy_process_group()


def end_on_signals(last_words: Callable[[], str] = lambda: "") -> None:
    """From now on Ctrl-C and SIGTERM end this process at once, in one line, with exit code 130 or 143.

    A thread does that, since Python's own handlers wait until the main thread leaves C code, for example a
    collective call that another rank never joins. Nothing is lost: a run's files are right at any moment.

    Args:
        last_words: what the line says after `interrupted`: how to go on.
    """
    if _waiting:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    _waiting.extend((reading, writing))
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda *_: None)

    def wait() -> None:
        number = 0
        while number not in (signal.SIGINT, signal.SIGTERM):
            number = os.read(reading, 1)[0]
        _ending.append(threading.get_ident())
        _end_children()
        if os.environ.get("RANK", "0") == "0":
            tell(f"interrupted ({signal.Signals(number).name}){last_words()}")
        sys.stdout.flush()
        os._exit(128 + number)

    threading.Thread(target=wait, daemon=True).start()


def _stay_if_ending() -> None:
    """Say and do nothing more: what fails now does so because the children have been ended."""
    if _ending and threading.get_ident() not in _ending:
        time.sleep(PATIENCE)


def _end_children() -> None:
    while AT_END:
        with suppress(Exception):  # the main thread may be busy with it at this moment
            AT_END.pop()()


def _world() -> int:
    dist = sys.modules.get("torch.distributed")
    return dist.get_world_size() if dist and dist.is_initialized() else 1


def _is_lost_rank(error: RuntimeError) -> bool:
    """Whether the process group says that one of its members does not answer any more."""
    text = f"{type(error).__name__} {error}".lower()
    signs = ("gloo", "connection closed", "connection reset", "remote process", "distnetwork")
    return any(sign in text for sign in signs)


# ------------------------------------------------------------------------------------ files


@contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Bad input that is met in here goes to `problems`, and the process goes on, since other ranks wait."""
    try:
        yield
    except InputError as error:
        problems.append(str(error) or "bad input")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file that cannot be written; safetensors has an error of its own for a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot write it ({reason})") from error


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is there completely or not at all."""
    part = path.with_name(path.name + ".part")
    with writing(part):
        part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(path)


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run directory, oldest first; a `step-000003-backup` is none of them."""
    found = [f for f in run.glob("checkpoints/step-*") if re.fullmatch(r"step-\d{6,}", f.name) and f.is_dir()]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def lock(folder: Path) -> IO[str]:
    """Make a folder and take it for this process: until the file that is returned is closed, or it ends.

    Raises:
        InputError: another process has it, or it cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / ".lock"):
        file = open(folder / ".lock", "w")  # noqa: SIM115, it stays open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{folder}: another run is writing there; wait for it, or give another out"
        ) from None
    except OSError as error:  # some network disks have no locks
        tell(f"{folder}: cannot lock it ({error.strerror}): start no second run there")
    return file


def read_records(path: str | Path, interrupted: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """(where, record) pairs of a JSON list or JSON Lines file; `where` names file and line.

    Args:
        interrupted: a log that was perhaps cut off while it was written: what stands after the last
            line break is dropped, and the file may be empty.

    Raises:
        InputError: missing, empty or malformed file, or a record that is no object.
    """
    file = Path(path)
    if not file.is_file():  # a pipe would be waited for
        raise InputError(f"{path}: {'a folder, expected a' if file.is_dir() else 'no such'} data file")
    try:
        text = file.read_text(encoding="utf-8-sig")  # the mark that editors on Windows begin with is dropped
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if interrupted:
        text = text[: text.rfind("\n") + 1]

    # One document that is a list, or a document per line.
    records = []
    if text.lstrip().startswith("["):
        try:
            records = [(f"{path}: row {i + 1}", record) for i, record in enumerate(parse_json(text))]
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON ({error})") from error
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                records.append((f"{path}:{number}", parse_json(line)))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{number}: not JSON ({getattr(error, 'msg', error)})") from error

    # Objects whose text can be written again.
    if not records and not interrupted:
        raise InputError(f"{path}: no rows")
    for where, record in records:
        if not isinstance(record, dict):
            raise InputError(f"{where}: expected an object, found {type(record).__name__}")
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: half of a surrogate pair is no text") from error
        except RecursionError as error:
            raise InputError(f"{where}: nested too deeply") from error
    return records


def parse_json(text: str) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is no JSON, or an object has a key twice, so that one of the two would be lost.
        RecursionError: it is nested too deeply.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"twice the key {max(names, key=names.count)!r}")
        return found

    return json.loads(text, object_pairs_hook=once)


def check_model(name: str) -> None:
    """Refuse a checkpoint that is neither a folder nor named as the hub names models, OWNER/NAME."""
    like_the_hub = name.count("/") == 1 and not name.startswith((".", "/"))
    if Path(name).is_file():
        raise InputError(f"{name}: a file, expected a checkpoint folder")
    if not name or (not like_the_hub and not Path(name).exists()):
        raise InputError(f"{name or 'an empty name'}: no such checkpoint folder")


def decisions(
    logprobs: Iterable[float],
    hold_bounds: Iterable[Iterable[float]] = (),
    hold_logprobs: Iterable[Iterable[float]] = (),
) -> dict[str, list[float]]:
    """How sure the decisions of a response were, for its record: flat lists, 4 significant digits.

    Args:
        logprobs: [R] of each token at its reveal; empty if they are not known.
        hold_bounds, hold_logprobs: R lists, of the earlier steps of the token's block, in order. How many a
            token has follows from the step map: as many as its block has smaller numbers of steps.

    Returns:
        The lists that are not empty.
    """
    named = {
        "logprobs": logprobs,
        "hold_bounds": chain.from_iterable(hold_bounds),
        "hold_logprobs": chain.from_iterable(hold_logprobs),
    }
    lists = {name: [float(f"{value:.4g}") for value in values] for name, values in named.items()}
    return {name: values for name, values in lists.items() if values}


# --------------------------------------------------------------------------- clock and order


@dataclass
class Stopwatch:
    """Seconds per named phase of a step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[f"seconds/{phase}"] = time.perf_counter() - start


class DataOrder:
    """Endless order of `size` items, shuffled anew every epoch: a function of the seed alone.

    `cursor` counts what was taken so far. It is all that a checkpoint has to keep.
    """

    def __init__(self, size: int, seed: int, cursor: int = 0):
        self.size, self.seed, self.cursor = size, seed, cursor
        self._epoch, self._order = -1, []

    def take(self, count: int) -> list[tuple[int, int]]:
        """The next `count` as (running number, index below `size`)."""
        taken = []
        for number in range(self.cursor, self.cursor + count):
            epoch, place = divmod(number, self.size)
            if epoch != self._epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([self.seed, epoch]).permutation(self.size).tolist()
            taken.append((number, self._order[place]))
        self.cursor += count
        return taken
