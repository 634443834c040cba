"""What every script needs: errors of the user, files read and written, the clock, the order of data.

Nothing here imports torch, so that a bad argument is answered before anything heavy is loaded.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[1]  # of the repository: subprocesses start here


# ----------------------------------------------------------------------------------- errors


class InputError(ValueError):
    """Bad input from the user. Scripts print it as one line and exit with code 2."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def fail(message: str) -> None:
    """Print an error in one line, above open progress bars, and exit with code 2."""
    tqdm.write(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def run_script(main: Callable[..., None], *arguments: Any) -> None:
    """Call main; bad input and a full disk end in one line and exit code 2. Ends the process group."""
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # it would show one for every file that is read
    try:
        main(*arguments)
    except InputError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'file system'}: {error.strerror or error}")
    finally:
        dist = sys.modules.get("torch.distributed")
        if dist and dist.is_initialized():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------ files


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


def read_records(path: str | Path, interrupted: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """(where, record) pairs of a JSON list or JSON Lines file; `where` names file and line.

    Args:
        interrupted: a log that was perhaps cut off while it was written: what stands after the last
            line break is dropped, and the file may be empty.

    Raises:
        InputError: missing, empty or malformed file, or a record that is no object.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{path}: no such data file")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if interrupted:
        text = text[: text.rfind("\n") + 1]

    # One document that is a list, or a document per line.
    records = []
    if text.lstrip().startswith("["):
        try:
            records = [(f"{path}: row {i + 1}", record) for i, record in enumerate(json.loads(text))]
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON ({error})") from error
    else:
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                records.append((f"{path}:{number}", json.loads(line)))
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
    return records


def check_model(name: str) -> None:
    """Refuse a checkpoint that is neither a folder nor named as the hub names models, OWNER/NAME."""
    like_the_hub = name.count("/") == 1 and not name.startswith((".", "/"))
    if not like_the_hub and not Path(name).exists():
        raise InputError(f"{name}: no such checkpoint folder")


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
