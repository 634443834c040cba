"""The report of a run: report.html, one file that any browser opens from the disk, without a network.

    python plumbing/report.py runs/demo/dipo             # a run of sft.py or dipo.py, also while it goes
    python plumbing/report.py runs/eval                  # an evaluation
    python plumbing/report.py runs/eval_a runs/eval_b    # on which questions do two evaluations differ?

The scripts write it too, as they go and at their end. This file turns a folder into numbers and texts;
report.html, report.css and report.js beside it show them, and go into every report.

Folders may be large: files are read line by line, and a report stays below FILE_BYTES. Curves, figures and
histograms are of everything. Tables list what INDEX_BYTES have room for, and of the trajectories behind them
so many are kept as SAMPLE_BYTES have room for, in an order that the page states.

Texts come from a model, names from anywhere. They reach the page as data only: JSON without < > &, or
compressed; report.js makes text nodes of them, and the page's policy runs no script but that one.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import hashlib
import json
import math
import os
import re
import sys
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

if __name__ == "__main__":  # packages are found from the root: here lies a kernels.py, as elsewhere too
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from plumbing.common import InputError, first_line, progress, run_script, tell, writing
from plumbing.config import Parser, folder_name
from plumbing.figures import bootstrap_interval, majority, paired_bootstrap

FILE_BYTES = 20_000_000  # of a report
SAMPLE_BYTES = 15_000_000  # of the trajectories in it
INDEX_BYTES = 3_500_000  # of the rows of its tables
POINTS = 1000  # of a curve
LONGEST = 100_000  # tokens of a trajectory that a browser shows well
BARS = 30  # of a histogram
CUT = {"question": 240, "answer": 60, "name": 100, "reason": 300, "command": 3000}  # characters in tables

Record = dict[str, Any]


# --------------------------------------------------------------------------- what files hold


@dataclass(slots=True)
class Line:
    """Where a record stands, so that it can be read again."""

    key: str  # of its trajectory in the page: letters, digits and - only
    file: Path
    number: int  # of the line, from 1
    offset: int
    size: int  # bytes


@dataclass
class Page:
    """What becomes a report."""

    content: dict[str, Any]  # the data of report.js
    lines: list[Line] = field(default_factory=list)  # of trajectories, the first to be kept first
    rule: str = ""  # of that order, in words
    notes: list[str] = field(default_factory=list)  # what a reader should know
    block_sizes: dict[Path, int] = field(default_factory=dict)  # by file, where the records do not say it
    places: list[Any] = field(default_factory=list)  # folders that may have the tokenizer


def read_lines(file: Path, name: str, notes: list[str]) -> Iterator[tuple[Line, Record]]:
    """The records of a JSON Lines file with their places; lines that are none are counted in notes.

    Args:
        name: begins the keys.
    """
    if not file.is_file():
        return
    bad: list[int] = []
    offset = 0
    with (
        open(file, "rb") as opened,
        progress(
            total=file.stat().st_size, desc=f"read {file.name}", unit="byte", unit_scale=True, leave=False
        ) as bar,
    ):
        for number, line in enumerate(opened, start=1):
            bar.update(len(line))
            record = parse(line)
            if record is not None:
                yield Line(f"{name}-{number}", file, number, offset, len(line)), record
            elif line.strip() and line.endswith(b"\n"):  # else it is being written
                bad.append(number)
            offset += len(line)
    if bad:
        notes.append(f"{file.name}: {len(bad)} lines are no records (the first is line {bad[0]})")


def parse(line: bytes) -> Record | None:
    """The JSON object of a line; None: it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_object(file: Path, notes: list[str]) -> Record:
    """The JSON object of a file; empty if there is none."""
    if not file.is_file():
        return {}
    found = parse(file.read_bytes())
    if found is None:
        notes.append(f"{file.name} is damaged")
    return found or {}


def number(value: Any) -> float | None:
    """A finite number of JSON, rounded for a page; None: it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def whole(value: Any, least: int = 0) -> int | None:
    """A whole number of at least so much; None: it is none."""
    fits = isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**53
    return value if fits else None


def text(value: Any, kind: str = "name") -> str:
    """A text of JSON, shortened as CUT says; what is no text as JSON."""
    found = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    return found if len(found) <= CUT[kind] else found[: CUT[kind]] + "\u2026"


def each(value: Any) -> list[tuple[str, Any]]:
    """The entries of a JSON object; none if it is no object."""
    return list(value.items()) if isinstance(value, dict) else []


def numbers(values: Any, digits: int) -> list[float | None]:
    """The numbers of a list, rounded; empty if it is no list."""
    if not isinstance(values, list):
        return []
    found = (None if number(value) is None else round(value, digits) for value in values)
    return [0 if value == 0 else value for value in found]  # not -0.0


# ---------------------------------------------------------------------------- trajectories


class Words:
    """Texts of tokens, by the tokenizer of a run if one is at hand."""

    def __init__(self, folders: Iterable[Any]):
        """Look for tokenizer.json in these folders."""
        self.tokenizer = None
        for folder in folders:
            file = Path(folder, "tokenizer.json") if isinstance(folder, str | Path) and folder else None
            if file and file.is_file():
                from tokenizers import Tokenizer

                try:
                    self.tokenizer = Tokenizer.from_file(str(file))
                    return
                except Exception:  # of a kind that is not told; the next folder may have a better one
                    continue

    def split(self, ids: list[int]) -> list[str]:
        """A text per token. Joined they are the text of all: a character of several tokens is the last's."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        pieces = [stream.step(self.tokenizer, token) or "" for token in ids]
        joined, decoded = "".join(pieces), self.tokenizer.decode(ids, skip_special_tokens=False)
        if pieces and decoded.startswith(joined):
            pieces[-1] += decoded[len(joined) :]  # half of a character at the end
        return pieces


def trajectory(record: Record, words: Words, block_size: int) -> Record | None:
    """What the viewer shows of a response; None: it is too long for that.

    Args:
        block_size: of a record that does not say it.
    """
    # Lists that go together: without ids there are no texts of tokens, without steps no replay.
    ids, steps = record.get("response_ids"), record.get("steps")
    sound = isinstance(steps, list) and steps and all(whole(step, 1) is not None for step in steps)
    steps = steps if sound else []
    sound = isinstance(ids, list) and len(ids) == len(steps) and all(whole(i) is not None for i in ids)
    pieces = words.split(ids) if sound and words.tokenizer else []
    logprobs, bounds, held = (
        numbers(record.get(name), 4) for name in ("logprobs", "hold_bounds", "hold_logprobs")
    )
    if len(steps) > LONGEST:
        return None

    # Everything of the kind that the viewer expects, whatever the file says.
    found = {
        "question": clipped(record.get("question")),
        "gold": clipped(record.get("gold")),
        "answer": None if record.get("answer") is None else clipped(record.get("answer")),
        "correct": record.get("correct") is True,
        "finish": text(record.get("finish_reason")),
        "shown": whole(record.get("num_tokens")),
        "prompt": whole(record.get("prompt_tokens")),
        "block": whole(record.get("block_size"), 1) or block_size,
        "seed": whole(record.get("seed"), -(2**53)),
        "tpf": number(record.get("tpf")),
        "step": number(record.get("step")),
        "rewards": [[text(name), number(value)] for name, value in each(record.get("rewards"))[:30]],
        "advantage": number(record.get("advantage")),
        "steps": [now - before for before, now in zip([0, *steps], steps, strict=False)],  # packs well
        "logprobs": logprobs if len(logprobs) == len(steps) else [],
        "bounds": bounds,
        "held": held if len(held) == len(bounds) else [],
    }
    return found | ({"pieces": pieces} if pieces else {"text": clipped(record.get("text"))})


def clipped(value: Any) -> str:
    """A text of a trajectory: whole, unless it is of a length that nobody reads."""
    return (value if isinstance(value, str) else json.dumps(value))[:LONGEST]


def keep(page: Page, words: Words, most: int) -> dict[str, str]:
    """Trajectories by key, compressed, in the page's order until `most` bytes are full.

    What does not fit is left out and the next one tried, 50 times in a row at most.
    """
    kept, size, misses = {}, 0, 0
    bar = progress(total=most, desc="trajectories", unit="byte", unit_scale=True, leave=False)
    for line in page.lines:
        found = None
        if line.size < 50 * most:
            with open(line.file, "rb") as opened:
                opened.seek(line.offset)
                record = parse(opened.read(line.size))
            found = record and trajectory(record, words, page.block_sizes.get(line.file, 4))
        if found:
            found["where"] = f"{line.file.parent.name}/{line.file.name}, line {line.number}"
            packed = base64.b64encode(zlib.compress(dumps(found).encode())).decode()
            if size + len(packed) + 100 <= most:
                kept[line.key] = packed
                size, misses = size + len(packed) + 100, 0
                bar.update(len(packed) + 100)
                continue
        misses += 1
        if misses == 50:
            break
    bar.close()
    return kept


def spread(count: int) -> list[int]:
    """0 to count - 1 in an order whose every beginning is spread evenly: of 8: 0 4 2 6 1 5 3 7."""
    bits = max(count - 1, 1).bit_length()
    reversed_bits = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(2**bits))
    return [i for i in reversed_bits if i < count]


# ---------------------------------------------------------------------------- a training run


def training_page(folder: Path, running: bool | None) -> Page:
    """The page of a run of sft.py or dipo.py.

    Args:
        running: whether it goes on at this moment; None: look whether its directory is locked.
    """
    notes: list[str] = []
    run = read_object(folder / "run.json", notes)
    fields = dict(each(run.get("fields")))
    starts = run.get("starts") if isinstance(run.get("starts"), list) else []
    starts = [start for start in starts if isinstance(start, dict)]
    model = run.get("model") if isinstance(run.get("model"), dict) else {}

    # What it is.
    content = {
        "kind": "training",
        "title": folder.resolve().name,
        "folder": str(folder.resolve()),
        "script": text(run.get("script")) or "run",
        "running": is_locked(folder) if running is None else running,
        "wanted": whole(fields.get("steps")),
        "starts": [origin_of(start) for start in starts[-50:]],
        "fields": config_rows(fields, starts),
        "model": text(model.get("folder")) or text(model.get("name")),
    }
    if (folder / "summary.json").exists():
        notes.append("The evaluation in this folder has no report: give evaluate.py another out")
    if not starts:
        notes.append("run.json does not say the commit and the machine: an older version wrote it")

    # Its curves, and its rollouts.
    content |= read_metrics(folder / "metrics.jsonl", fields, starts, notes)
    content |= {"limits": {name: number(fields.get(name)) for name in ("max_grad_norm", "groups")}}
    gap = dict(each(fields.get("gap_limit")))
    content["limits"]["gap"] = number(gap.get("bfloat16" if fields.get("dtype") == "bfloat16" else "float32"))
    rows, lines = read_rollouts(folder / "rollouts.jsonl", notes)
    content["rows"] = rows
    rule = "spread evenly over the run"
    places = [folder / "latest", folder / "tiny", model.get("folder")]
    sizes = {folder / "rollouts.jsonl": block_of(fields, places)}
    return Page(content, [lines[i] for i in spread(len(lines))], rule, notes, sizes, places)


def is_locked(folder: Path) -> bool:
    """Whether a script writes there at this moment."""
    if not (folder / ".lock").exists():
        return False
    with open(folder / ".lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # some network disks have no locks
            return False
    return False


def origin_of(start: Record) -> dict[str, Any]:
    """A note of `identity.origin` for the page."""
    found = {name: text(start.get(name), "reason") for name in ("time", "commit", "machine")}
    return found | {"command": text(start.get("command"), "command"), "step": number(start.get("step"))}


def config_rows(fields: Record, starts: list[Record]) -> list[list[str | None]]:
    """[name, value, default] of every field of a config; the default is None where the value is that."""
    changed = dict(each(starts[-1].get("defaults"))) if starts else {}
    rows = []
    for name, value in list(fields.items())[:300]:
        default = as_text(changed[name]) if name in changed else None
        rows.append([text(name), as_text(value), default])
    return rows


def as_text(value: Any) -> str:
    """A value of a config as one would type it."""
    return text(value if isinstance(value, str) and value else json.dumps(value), "reason")


def block_of(fields: Record, places: list[Any]) -> int:
    """Tokens per block where the records do not say it: the config's, the checkpoint's, or 4."""
    size = whole(fields.get("block_size"), 1)
    for place in [] if size else places:
        if isinstance(place, str | Path) and place:
            size = size or whole(read_object(Path(place, "config.json"), []).get("block_size"), 1)
    return size or 4


def read_metrics(file: Path, fields: Record, starts: list[Record], notes: list[str]) -> dict[str, Any]:
    """Curves and marks of metrics.jsonl: {"steps", "curves": [[name, values], ...], "per", "marks"}."""
    # Columns of equal length, with nan where a step has no number.
    steps, columns, marks = array("d"), {}, []
    wanted = whole(fields.get("groups"))
    for _, record in read_lines(file, "m", notes):
        step = number(record.get("step"))
        if step is None:
            continue
        for name in record:
            if name not in columns and name not in ("step", "skipped") and len(columns) < 100:
                columns[name] = array("d", [math.nan] * len(steps))
        steps.append(step)
        for name, column in columns.items():
            value = number(record.get(name))
            column.append(math.nan if value is None else value)

        # What did not go as planned.
        if record.get("skipped"):
            reason = text(record["skipped"], "reason")
            marks.append(["gap" if "gap_limit" in reason else "skipped", step, reason])
        kept = number(record.get("groups_kept"))
        if wanted and kept is not None and kept < wanted:
            rounds = text(fields.get("max_rounds"))
            marks.append(["groups", step, f"{kept:g} of {wanted} useful groups after max_rounds={rounds}"])
    for start in starts[1:]:
        at = number(start.get("step")) or 0
        marks.append(["resume", at, f"resumed after step {at:g}, {text(start.get('time'))}"])

    # No more points than a screen shows.
    per = -(-len(steps) // POINTS) or 1
    counts = {kind: sum(m[0] == kind for m in marks) for kind in ("skipped", "gap", "groups", "resume")}
    return {
        "last": steps[-1] if steps else 0,
        "steps": thinned(steps, per),
        "curves": [[text(name), thinned(column, per)] for name, column in columns.items()],
        "per": per,
        "counts": counts,
        "marks": [mark for kind in counts for mark in [m for m in marks if m[0] == kind][-300:]],
    }


def thinned(values: array, per: int) -> list[float | None]:
    """Means of `per` neighbours each, without what is no number; None where none is."""
    padded = np.concatenate([np.asarray(values), np.full(-len(values) % per, np.nan)]).reshape(-1, per)
    there = ~np.isnan(padded)
    means = np.where(there, padded, 0).sum(1) / np.maximum(there.sum(1), 1)
    return [number(float(m)) if some else None for m, some in zip(means, there.any(1), strict=True)]


def read_rollouts(file: Path, notes: list[str]) -> tuple[list[Record], list[Line]]:
    """Rows of the table of rollouts, and the places of all of them."""
    rows, lines, size, every, count = [], [], 0, 1, 0
    for line, record in read_lines(file, "r", notes):
        count += 1
        if (count - 1) % every:
            continue
        row = {
            "key": line.key,
            "step": number(record.get("step")),
            "question": text(record.get("question"), "question"),
            "gold": text(record.get("gold"), "answer"),
            "answer": None if record.get("answer") is None else text(record["answer"], "answer"),
            "flags": flags(record),
            "rewards": [[text(name), number(v)] for name, v in each(record.get("rewards"))[:30]],
            "advantage": number(record.get("advantage")),
            "tpf": number(record.get("tpf")),
            "tokens": number(record.get("num_tokens")),
        }
        rows.append(row)
        lines.append(line)
        size += len(dumps(row))
        if size > INDEX_BYTES:  # every second one makes room for as many again
            rows, lines, size, every = rows[::2], lines[::2], size // 2, 2 * every
    if every > 1:
        notes.append(f"The table lists every {every}th of {count} rollouts: there is no room for more")
    return rows, lines


def flags(record: Record) -> int:
    """1: right, 2: truncated."""
    return (record.get("correct") is True) + 2 * (record.get("finish_reason") == "length")


# ---------------------------------------------------------------------------- an evaluation


@dataclass
class Asked:
    """A question with its responses under one decoding rule."""

    index: int
    question: int  # number of its text
    gold: str
    answers: list[str | None]
    samples: list[list[Any]]  # [number of the answer or -1, flags, tokens, TPF, key]
    lines: list[Line]
    identity: int  # equal for the same question and answer in another folder
    majority_wrong: bool = False

    @property
    def accuracy(self) -> float:
        """Share of right responses."""
        return fmean(sample[1] & 1 for sample in self.samples)

    def row(self) -> list[Any]:
        """What report.js gets."""
        return [self.question, self.gold, self.answers, int(self.majority_wrong), self.samples, self.index]


@dataclass
class Evaluation:
    """A finished evaluation that was read."""

    folder: Path
    summary: Record
    settings: Record  # config.json
    texts: list[str]  # of questions
    files: dict[tuple[str, str], list[Asked]]  # by benchmark and rule
    bars: dict[tuple[str, str], dict[str, Any]]  # histograms likewise
    notes: list[str]
    places: list[Any]  # of its tokenizer


def read_evaluation(folder: Path, name: str = "e", texts: dict[str, int] | None = None) -> Evaluation:
    """Read what evaluate.py wrote.

    Args:
        name: begins the keys of its trajectories.
        texts: numbers of questions that are known already.

    Raises:
        InputError: it is not finished.
    """
    notes: list[str] = []
    summary = read_object(folder / "summary.json", notes)
    if not isinstance(summary.get("benchmarks"), dict):
        raise InputError(f"{folder}: no finished evaluation (summary.json has no figures)")
    settings = read_object(folder / "config.json", notes)
    config = summary.get("config") if isinstance(summary.get("config"), dict) else {}
    texts = {} if texts is None else texts
    files, bars = {}, {}
    for rule, benchmarks in each(summary["benchmarks"])[:100]:
        for benchmark in dict(each(benchmarks)):
            file = folder / f"responses-{benchmark}-{rule}.jsonl"
            if file.parent != folder or not file.is_file():  # a name may hold /
                notes.append(f"no responses of {text(benchmark)}, {text(rule)}")
                continue
            asked, bars[benchmark, rule] = read_responses(file, f"{name}{len(files)}", texts, notes)
            files[benchmark, rule] = asked
    places = [config.get("model"), settings.get("model")]
    return Evaluation(folder, summary, settings, list(texts), files, bars, notes, places)


def read_responses(
    file: Path, name: str, texts: dict[str, int], notes: list[str]
) -> tuple[list[Asked], dict[str, Any]]:
    """The questions of a file of responses, and histograms of all responses."""
    asked: dict[int, Asked] = {}
    votes: dict[int, list[str | None]] = {}  # of each question; truncated samples have none
    tokens, tpf, right = array("d"), array("d"), array("b")
    for line, record in read_lines(file, name, notes):
        index, length, speed = whole(record.get("index")), number(record.get("num_tokens")), None
        speed = number(record.get("tpf"))
        if index is None or length is None or speed is None:
            notes.append(f"{file.name}: line {line.number} is no response") if len(notes) < 50 else None
            continue
        if index not in asked:
            question = text(record.get("question"), "question")
            gold = text(record.get("gold"), "answer")
            identity = hash((str(record.get("question")), str(record.get("gold"))))
            asked[index] = Asked(index, texts.setdefault(question, len(texts)), gold, [], [], [], identity)
            votes[index] = []
        of = asked[index]

        # The facts of this sample.
        found, answer = flags(record), None
        if isinstance(record.get("answer"), str):
            answer = text(record["answer"], "answer")
            if answer not in of.answers:
                of.answers.append(answer)
        votes[index].append(None if found & 2 or answer is None else record["answer"][:1000])
        place = -1 if answer is None else of.answers.index(answer)
        of.samples.append([place, found, length, round(speed, 2), line.key])
        of.lines.append(line)
        tokens.append(length)
        tpf.append(speed)
        right.append(found & 1)

    # Is the commonest answer right?
    for index, of in asked.items():
        first = majority(votes[index])
        of.majority_wrong = first is None or not of.samples[first][1] & 1
    bars = {"tokens": histogram(tokens, right), "tpf": histogram(tpf, right)}
    return [asked[index] for index in sorted(asked)], bars


def histogram(values: array, right: array) -> dict[str, Any]:
    """{"edges", "right", "wrong"}: how many right and wrong responses lie in each of BARS intervals."""
    found, correct = np.asarray(values), np.asarray(right, bool)
    if not len(found):
        return {"edges": [], "right": [], "wrong": []}
    low, high = float(found.min()), float(found.max())
    edges = np.linspace(low, high if high > low else low + 1, BARS + 1)
    counts = [np.histogram(found[which], edges)[0].tolist() for which in (correct, ~correct)]
    return {"edges": [number(float(e)) for e in edges], "right": counts[0], "wrong": counts[1]}


def in_order(questions: list[list[Asked]]) -> list[Line]:
    """Trajectories by worth: a wrong response of each question, a right one, the others.

    Args:
        questions: the same question in several files is one item.
    """
    rounds: dict[int, list[Line]] = {}
    for i in spread(len(questions)):
        for asked in questions[i]:
            # The first wrong one, the first right one, then the rest in turn.
            right = [sample[1] & 1 for sample in asked.samples]
            first = [right.index(verdict) for verdict in (0, 1) if verdict in right]
            rest = [j for j in range(len(right)) if j not in first]
            for j in first:
                rounds.setdefault(right[j], []).append(asked.lines[j])
            for turn, j in enumerate(rest):
                rounds.setdefault(2 + turn, []).append(asked.lines[j])
    return [line for turn in sorted(rounds) for line in rounds[turn]]


def evaluation_page(folder: Path) -> Page:
    """The page of what evaluate.py wrote."""
    found = read_evaluation(folder)
    files, size = [], 0
    for (benchmark, rule), questions in found.files.items():
        rows = []
        for asked in questions:
            row = asked.row()
            size += len(dumps(row)) + len(dumps(found.texts[asked.question]))
            if size > INDEX_BYTES:
                break
            rows.append(row)
        if len(rows) < len(questions):
            found.notes.append(
                f"{text(benchmark)}, {text(rule)}: the first {len(rows)} of {len(questions)} questions are "
                "listed: there is no room for more; figures and histograms are of all"
            )
        bars = found.bars[benchmark, rule]
        of_file = {"benchmark": text(benchmark), "rule": text(rule), "bars": bars}
        files.append(of_file | {"questions": rows, "count": len(questions)})
        del questions[len(rows) :]
    used = {row[0] for of_file in files for row in of_file["questions"]}
    texts = [question if i in used else "" for i, question in enumerate(found.texts)]

    # The same question under each rule is one to keep trajectories of.
    page = Page({"kind": "evaluation", "texts": texts, "files": files}, notes=found.notes)
    page.content |= about(found) | {"figures": figures_of(found.summary)}
    page.lines = in_order([[asked] for of in found.files.values() for asked in of])
    page.rule = "of each question a wrong response first, then a right one, then the others, questions spread"
    add_settings(page, found)
    return page


def add_settings(page: Page, found: Evaluation) -> None:
    """What `trajectory` needs of the files of an evaluation."""
    for benchmark, rule in found.files:
        file = found.folder / f"responses-{benchmark}-{rule}.jsonl"
        page.block_sizes[file] = block_of(found.settings, found.places)
    page.places += found.places


def about(found: Evaluation) -> dict[str, Any]:
    """What an evaluation is."""
    config = dict(each(found.summary.get("config")))
    starts = found.settings.get("starts")
    starts = [s for s in starts if isinstance(s, dict)] if isinstance(starts, list) else []
    if not starts:
        found.notes.append("config.json does not say the commit and the machine: an older version wrote it")
    return {
        "title": found.folder.resolve().name,
        "folder": str(found.folder.resolve()),
        "model": text(config.get("model")),
        "starts": [origin_of(start) for start in starts[-50:]],
        "fields": config_rows(config, starts),
    }


def figures_of(summary: Record) -> list[Record]:
    """A row per benchmark and rule of summary.json, numbers only."""
    rows = []
    for rule, benchmarks in each(summary["benchmarks"])[:100]:
        for benchmark, figures in each(benchmarks)[:100]:
            row = {name: number(value) for name, value in each(figures) if name != "pass_at"}
            rows.append({"benchmark": text(benchmark), "rule": text(rule)} | row)
    return rows


# -------------------------------------------------------------------------- two evaluations


def comparison_page(first: Path, second: Path) -> Page:
    """The page of the questions on which two evaluations differ.

    Raises:
        InputError: they have no benchmark and decoding rule in common, or no question.
    """
    texts: dict[str, int] = {}
    sides = [read_evaluation(first, "a", texts), read_evaluation(second, "b", texts)]
    common = [name for name in sides[0].files if name in sides[1].files]
    if not common:
        raise InputError(f"{first} and {second} have no benchmark and decoding rule in common")
    page = Page({"kind": "comparison", "sides": [about(side) for side in sides]})
    page.notes = [f"{side.folder.name}: {note}" for side in sides for note in side.notes]
    parts, differ = [], []
    for name in common:
        pairs = pair_up(sides, name, page.notes)
        parts.append(part_of(name, pairs))
        differ += [(parts[-1], pair) for pair in pairs if pair[0].accuracy != pair[1].accuracy]

    # Rows and trajectories, the largest differences first.
    differ.sort(key=lambda item: -abs(item[1][0].accuracy - item[1][1].accuracy))
    size, listed = 0, []
    for part, pair in differ:
        row = [side.row() for side in pair]
        size += len(dumps(row)) + len(dumps(sides[1].texts[pair[0].question]))
        if size > INDEX_BYTES:
            page.notes.append(f"{len(listed)} of {len(differ)} questions are listed: there is no more room")
            break
        part["rows"].append(row)
        listed.append(pair)
    used = {pair[0].question for pair in listed}
    page.content |= {"texts": [q if i in used else "" for i, q in enumerate(sides[1].texts)], "parts": parts}
    page.content["title"] = " and ".join(side["title"] for side in page.content["sides"])
    page.lines = in_order([list(pair) for pair in listed])
    page.rule = "of questions that differ, of each a wrong response first, then a right one, then the others"
    for side in sides:
        add_settings(page, side)
    return page


def pair_up(sides: list[Evaluation], name: tuple[str, str], notes: list[str]) -> list[tuple[Asked, Asked]]:
    """The questions of a benchmark under a rule that both sides were asked.

    Raises:
        InputError: there is none.
    """
    others = {asked.index: asked for asked in sides[1].files[name]}
    pairs = []
    for asked in sides[0].files[name]:
        other = others.get(asked.index)
        if other and other.identity == asked.identity:
            pairs.append((asked, other))
    if not pairs:
        folders = f"{sides[0].folder} and {sides[1].folder}"
        raise InputError(f"{folders}: no question of {name[0]} in common")
    alone = len(sides[0].files[name]) + len(others) - 2 * len(pairs)
    if alone:
        notes.append(f"{text(name[0])}, {text(name[1])}: {alone} questions are not in both")
    return pairs


def part_of(name: tuple[str, str], pairs: list[tuple[Asked, Asked]]) -> Record:
    """Figures of all pairs of a benchmark under a rule; rows are still missing."""
    sides = list(zip(*pairs, strict=True))
    accuracies = [[asked.accuracy for asked in side] for side in sides]
    return {
        "benchmark": text(name[0]),
        "rule": text(name[1]),
        "count": len(pairs),
        "differ": sum(a != b for a, b in zip(*accuracies, strict=True)),
        "accuracy": [number(fmean(of)) for of in accuracies],
        "interval": [[number(x) for x in bootstrap_interval(of)] for of in accuracies],
        "tpf": [number(fmean(sample[3] for asked in side for sample in asked.samples)) for side in sides],
        "difference": [number(x) for x in paired_bootstrap(*accuracies)],
        "rows": [],
    }


# ---------------------------------------------------------------------------------- the file


def dumps(content: Any) -> str:
    """JSON that may stand in a page: ASCII, short, without characters that HTML knows."""
    written = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_page(page: Page, target: Path) -> None:
    """Write the report, completely or not at all."""
    # The trajectories that there is room for.
    words = Words(page.places)
    if page.lines and not words.tokenizer:
        page.notes.append("No tokenizer is at hand: responses are shown as text, not token by token")
    room = FILE_BYTES - len(dumps(page.content)) - 500_000
    kept = keep(page, words, min(SAMPLE_BYTES, room))
    page.content["kept"] = {"count": len(kept), "of": len(page.lines), "rule": page.rule}
    page.content |= {"notes": page.notes[:50], "made": int(time.time()), "keys": list(kept)}

    # Style and script by their hashes: nothing else on the page may style or run.
    here = Path(__file__).parent
    template, style, script = ((here / f"report.{kind}").read_text("utf-8") for kind in ("html", "css", "js"))
    hashes = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in (script, style)]
    parts = {
        "SCRIPT-HASH": hashes[0],
        "STYLE-HASH": hashes[1],
        "STYLE": style,
        "DATA": dumps(page.content),
        "SCRIPT": script,
        "SAMPLES": "\n".join(
            f'<script type="text/plain" id="t-{key}">{packed}</script>' for key, packed in kept.items()
        ),
    }
    content = re.sub(r"\{\{([A-Z-]+)\}\}", lambda found: parts[found[1]], template)
    if len(content) > FILE_BYTES:
        raise InputError(f"{target}: {len(content)} bytes of figures alone, expected {FILE_BYTES} at most")
    part = target.with_name(f"{target.name}.part")
    with writing(target):
        part.write_text(content, encoding="utf-8")
        os.replace(part, target)


def make_report(folders: list[Path], target: Path | None = None, running: bool | None = None) -> Path:
    """Write the report of a run, or of the difference of two evaluations.

    Args:
        target: by default report.html in the folder; of two comparison.html in the second one.
        running: of a training run, see `training_page`.

    Returns:
        The file.

    Raises:
        InputError: a folder that is neither kind of run, or two that cannot be compared.
    """
    kinds = [kind_of(folder) for folder in folders]
    if len(folders) == 1:
        page = training_page(folders[0], running) if kinds[0] == "training" else evaluation_page(folders[0])
    elif kinds == ["evaluation"] * 2:
        page = comparison_page(*folders)
    else:
        raise InputError(f"{folders[kinds.index('training')]}: a training run; two are compared if they are "
                         "evaluations")  # fmt: skip
    target = target or folders[-1] / ("report.html" if len(folders) == 1 else "comparison.html")
    write_page(page, target)
    return target


def kind_of(folder: Path) -> str:
    """training or evaluation.

    Raises:
        InputError: neither.
    """
    if (folder / "run.json").is_file() or (folder / "metrics.jsonl").is_file():
        return "training"
    if (folder / "summary.json").is_file() and (folder / "config.json").is_file():
        return "evaluation"
    begun = next(folder.glob("responses-*.jsonl"), None) if folder.is_dir() else None
    if begun:
        raise InputError(f"{folder}: an evaluation that is not finished; the same command goes on with it")
    raise InputError(
        f"{folder}: no run, expected a folder of sft.py or dipo.py (with run.json) or of evaluate.py (with "
        "summary.json and config.json)"
    )


def try_to_write(folders: list[Path], running: bool | None = None) -> float:
    """`make_report` for a script that has more important things to do: a failure is one line.

    Returns:
        The seconds that it took.
    """
    start = time.monotonic()
    try:
        make_report(folders, running=running)
    except Exception as error:  # of whatever kind: no report is worth a run
        tell(f"{folders[-1]}: no report ({type(error).__name__}: {first_line(error)})")
    return time.monotonic() - start


def main() -> None:
    """Write the report of the folders that are named."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=folder_name, metavar="FOLDER", help="a run, or two")
    parser.add_argument(
        "--out", type=folder_name, metavar="FILE", help="where to; else into the (last) folder"
    )
    options = parser.parse_args()
    if len(options.folders) > 2:
        raise InputError(f"{len(options.folders)} folders, expected one, or two to compare")
    target = make_report(options.folders, options.out)
    tell(f"wrote {target} ({target.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run_script(main)
