"""Measurements in stages, each in a process of its own with a time limit: the runner of gpu.py.

    stage = Stages(small=False)

    @stage(seconds=60, real={"size": 8192}, toy={"size": 64})
    def product(folder, size):
        yield Check("matrix product", ..., "TFLOP/s", at_least=400, soft=True)

    stage.main(stage.parser("...").parse_args(), machine="...")

A crash, a signal, a hang ends only that stage. Its checks are written down one by one; after every stage the
folder --out has results.json and results.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from plumbing.common import AT_END, ROOT, InputError, fail, run_script, write_json

FAILURES = ("FAILED", "crashed", "hung")
LAST_LINES = 20  # of a stage's log, shown if it does not end well


@dataclass
class Check:
    """A line of the table: a figure, and perhaps what it has to be."""

    name: str
    value: float | str
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None
    soft: bool = False  # a goal, of speed for example; a bound holds wherever the code is right

    @property
    def goal(self) -> str:
        """What is asked, in words."""
        bounds = {"at most": self.at_most, "at least": self.at_least}
        return " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None)

    @property
    def verdict(self) -> str:
        """ok, FAILED, missed (a soft bound), or - if nothing is asked."""
        if not self.goal:
            return "-"
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        if low <= self.value <= high:  # nan is not either
            return "ok"
        return "missed" if self.soft else "FAILED"


@dataclass
class Stage:
    """A function of a folder of its own, and of sizes, that yields checks."""

    function: Callable[..., Iterator[Check]]
    seconds: float  # expected
    real: dict[str, Any]
    toy: dict[str, Any] | None  # sizes without CUDA; None: there is nothing to run
    limit: float  # seconds until it is ended


@dataclass
class Stages:
    """All stages, in the order in which they were registered and run."""

    small: bool  # toy sizes, for which no soft bound counts
    program: str = sys.argv[0]  # what the process of a stage runs; it ends in `main`
    known: dict[str, Stage] = field(default_factory=dict)
    launch: Callable = subprocess.Popen  # starts that process; in tests a fork with the imports done

    def __call__(
        self,
        seconds: float,
        real: dict[str, Any],
        toy: dict[str, Any] | None,
        name: str = "",
        limit: float = 0,
    ) -> Callable:
        """Register a function, by its own name or another; it is ended after `limit` seconds, by default
        twice what is expected and a minute."""

        def register(function: Callable) -> Callable:
            of_name = name or function.__name__
            self.known[of_name] = Stage(function, seconds, real, toy, limit or 2 * seconds + 60)
            return function

        return register

    def parser(self, description: str) -> argparse.ArgumentParser:
        """The options; a bad one ends in one line and exit code 2."""
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.error = fail
        parser.add_argument("--stages", default="", help="names with commas between; default: all")
        parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing that will not fit")
        place = {"type": lambda text: Path(text).resolve(), "default": ROOT / "runs/gpu"}
        parser.add_argument("--out", **place, help="folder of the results; default: runs/gpu")
        parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # stage, its lines, folder, pipe
        return parser

    def main(self, options: argparse.Namespace, machine: str) -> None:
        """Run the stages that the options ask for; exit code 1 if one of them fails."""
        run_script(self._run_one, *options.one) if options.one else run_script(self.run, options, machine)

    # ------------------------------------------------------------------ in the process of a stage

    def checks(self, name: str, folder: Path, small: bool | None = None) -> Iterator[Check]:
        """The checks of a stage in this process. `folder` is empty and its own."""
        one, small = self.known[name], self.small if small is None else small
        return one.function(folder, **(one.toy if small else one.real))

    def _run_one(self, name: str, lines: str, folder: str, pipe: str) -> None:
        end_with(int(pipe))
        with open(lines, "w", buffering=1) as file:
            for check in self.checks(name, Path(folder)):
                if self.small and check.soft:
                    check.at_least = check.at_most = None
                about = {"goal": check.goal, "verdict": check.verdict}
                file.write(json.dumps(asdict(check) | about) + "\n")

    # --------------------------------------------------------------------------- around the stages

    def run(self, options: argparse.Namespace, machine: str) -> None:
        """Run them one after the other and save after each."""
        # What shall run, and what an earlier call found on the same machine and commit.
        chosen = options.stages.split(",") if options.stages else list(self.known)
        if unknown := [name for name in chosen if name not in self.known]:
            raise InputError(f"argument --stages: {unknown[0]!r}, expected of {', '.join(self.known)}")
        options.out.mkdir(parents=True, exist_ok=True)
        about = {"machine": machine, "date": str(date.today()), "commit": commit()}
        about["command"] = shlex.join(["python", *sys.argv])
        results = earlier_results(options.out / "results.json", about)

        # One that does not run leaves what is known of it.
        end, failed = time.monotonic() + 60 * options.minutes, False
        for name in chosen:
            one, left = self.known[name], max(0.0, end - time.monotonic())
            skipped = ""
            if one.toy is None and self.small:
                skipped = "needs CUDA"
            elif left < one.seconds:
                skipped = f"left out: expected {one.seconds:.0f} s, {left:.0f} s are left"
            result = {"verdict": skipped, "seconds": 0.0, "checks": [], "error": ""}
            if not skipped:
                limit = min(one.limit, left)
                print(f"{name}: begins, expected {one.seconds:.0f} s, at most {limit:.0f} s", flush=True)
                result = self._run_stage(name, options.out, limit)
            print(f"{name}: {result['verdict']}, {result['seconds']:.0f} s", flush=True)
            failed = failed or result["verdict"] in FAILURES
            if not skipped or not results.get(name, result)["checks"]:
                results[name] = result
            results = {known: results[known] for known in self.known if known in results}
            write_json(options.out / "results.json", about | {"stages": results})
            (options.out / "results.md").write_text(table(about, results))
        print(f"\n{table(about, results)}\n{options.out}: results.md, results.json")
        if failed:
            sys.exit(1)

    def _run_stage(self, name: str, out: Path, seconds: float) -> dict[str, Any]:
        """Run a stage in a process of its own for so many seconds at most; its result."""
        begin, lines, log = time.monotonic(), out / f"{name}.jsonl", out / f"{name}.log"
        lines.unlink(missing_ok=True)
        theirs, ours = os.pipe()
        with tempfile.TemporaryDirectory() as folder, open(log, "wb") as output:
            command = [sys.executable, self.program, "--one", name, str(lines), folder, str(theirs)]
            environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
            files = {"pass_fds": (theirs,), "stdout": output, "stderr": output}
            process = self.launch(command, cwd=ROOT, env=environment, **files)
            os.close(theirs)

            def end() -> None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()

            # Wait for it, and end what it leaves behind.
            AT_END.append(end)
            verdict, error = "", ""
            try:
                if code := process.wait(timeout=seconds):
                    verdict, error = "crashed", f"exit code {code}"
            except subprocess.TimeoutExpired:
                verdict, error = "hung", f"ended after {seconds:.0f} s"
                os.kill(process.pid, signal.SIGABRT)  # it writes to its log where it is
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5)
            end()
            process.wait()
            AT_END.remove(end)
            os.close(ours)

        # Its checks, as far as it came; the worst of them is its verdict. And its last words.
        checks = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
        found = {check["verdict"] for check in checks}
        worst = "FAILED" if "FAILED" in found or not checks else "missed" if "missed" in found else "ok"
        if verdict:
            said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            error = "\n".join([*said[-LAST_LINES:], error])
        taken = time.monotonic() - begin
        return {"verdict": verdict or worst, "seconds": taken, "checks": checks, "error": error}


def end_with(pipe: int) -> None:
    """From now on end this process and all that it starts when the other end of the pipe closes."""

    def wait() -> None:
        os.read(pipe, 1)
        os.killpg(0, signal.SIGKILL)

    if os.getpgrp() != os.getpid():
        os.setsid()
    threading.Thread(target=wait, daemon=True).start()


def commit() -> str:
    """Of the repository, if there is one."""
    describe = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(describe, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"


def earlier_results(file: Path, about: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Stages by name, if machine and commit were the same."""
    before = json.loads(file.read_text()) if file.exists() else {}
    same = all(before.get(name) == about[name] for name in ("machine", "commit"))
    return before["stages"] if same else {}


def table(about: dict[str, str], results: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown, and the last words of what did not end well."""
    out = ["`{command}`, {date}, {machine}, commit {commit}\n".format(**about)]
    out += ["| stage | check | figure | goal or limit | verdict | seconds |", "|---|---|---:|---|---|---:|"]
    for name, result in results.items():
        out.append(f"| **{name}** | | | | {result['verdict']} | {result['seconds']:.0f} |")
        for check in result["checks"]:
            value = check["value"]
            figure = f"{value:.4g}" if isinstance(value, float) else str(value)
            cells = [check["name"], f"{figure} {check['unit']}".strip(), check["goal"], check["verdict"]]
            out.append("| | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " | |")
    for name, result in results.items():
        if result["error"]:
            out.append(f"\n{name}:\n\n```\n{result['error']}\n```")
    return "\n".join(out) + "\n"
