r"""Rewards: is the answer right, and how many tokens did each denoising step reveal?

A response is graded in three steps:

1. extract    the content of the last `\boxed{...}` that closes
2. compare    with the gold answer: as strings, as plain numbers, else with math-verify (symbolic)
3. reward     named functions of the graded response; the total is their weighted sum

`accuracy` is 1 or 0. `speed` pays a right answer for arriving in few denoising steps, and charges a
wrong one for having rushed. With TPF the tokens revealed per forward pass, between 1 and B (the
block size), a half cosine maps TPF to s in [0, 1] and

    s = (1 - cos(pi * (TPF - 1) / (B - 1))) / 2
    speed = 0.5 + 0.5 * s    right: 0.5 one token at a time, 1.0 a whole block at once
    speed = -0.5 * s         wrong: 0.0 one token at a time, -0.5 a whole block at once

so that the slowest right answer still beats every wrong one. Source: OpenMOSS/DiRL, speed reward.

The policy writes the answers, so they are hostile sooner or later: `9^{9^{9^{9}}}` never finishes.
Symbolic comparison therefore runs in one worker process which the kernel kills at a time limit; a
Python-level timeout would not interrupt a single long multiplication in C. POSIX only.

Left out on purpose: threads and forks of this process (they would share the worker's pipes), and
answers outside a box.

    python reward.py    # grades a few examples and prints why
"""

import atexit
import contextlib
import functools
import json
import logging
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal

MAX_CHARS = 2_000  # a longer answer is no final answer, and parsing time grows with the length
MEMORY_BYTES = 4 * 2**30  # address space of the worker; math-verify itself needs about 0.1 GiB
START_SECONDS = 120.0  # importing sympy from a cold network disk can take a while

# A backslash and what follows it are one token, so `\{` and `\}` do not count as braces. Two
# backslashes before `boxed` are allowed: a line break, or an answer that was escaped twice.
TOKEN = re.compile(r"(?P<box>\\\\?boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
# An optional sign, at least one digit, commas only between groups of three.
PLAIN_NUMBER = re.compile(r"[+-]?(?=\.?[0-9])(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]*)?")


@dataclass(frozen=True)
class Graded:
    """What a reward function may look at: one response after grading."""

    text: str  # the response, decoded, up to its stop token
    answer: str | None  # content of its last closed box
    gold: str  # the reference answer
    correct: bool  # answer and gold are equivalent, and the response is complete
    num_tokens: int  # tokens of the response the user sees
    truncated: bool  # stopped by the length limit
    tokens_per_forward: float  # TPF, between 1 and block_size
    block_size: int  # tokens


# ------------------------------------------------------------------------------ extract and compare


def extract_answer(text: str) -> str | None:
    r"""Content of the `\boxed{...}` that closes last, exactly as written; None if no box closes.

    A box that never closes is no answer, but does not hide a closed one before or inside it. Of
    nested boxes the outer one counts. One pass over the text: linear time for any input.
    """
    last = None  # span of the box that closed last
    stack: list[int | None] = []  # one entry per open brace: where a box's content starts, or None
    for token in TOKEN.finditer(text):
        if token["box"]:
            stack.append(token.end())
        elif token["open"]:
            stack.append(None)
        elif token["close"] and stack:
            start = stack.pop()
            if start is not None:
                last = start, token.start()
    return text[slice(*last)] if last else None  # cut once: nested boxes would be copied per level


def is_equivalent(answer: str, gold: str, seconds: float = 5.0) -> bool:
    r"""Whether two answers, LaTeX without the box around it, mean the same.

    Equal strings are right, plain numbers are compared exactly (`1,234` is 1234, not a list), and
    everything else goes to math-verify, which ignores units and percent signs, reads `1,2` as a
    set and `x=5` as 5. Not symmetric: some rewriting depends on which of the two is the gold one.

    Args:
        seconds: limit for one comparison, wall clock. An answer that exceeds it is wrong, as is
            one that is empty, longer than MAX_CHARS, or makes the parser fail.

    Raises:
        ValueError: seconds is not positive.
        RuntimeError: the worker cannot start, for example because math-verify is missing.
    """
    if seconds <= 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    answer, gold = _normalise(answer), _normalise(gold)
    if answer == gold:
        return answer != ""
    if not answer or max(len(answer), len(gold)) > MAX_CHARS:
        return False
    numbers = _plain_number(answer), _plain_number(gold)
    if None not in numbers:
        return numbers[0] == numbers[1]
    return _is_equivalent_symbolically(answer, gold, seconds)


def _normalise(text: str) -> str:
    """Drop what never carries meaning: outer white space, outer `$`, negative space, `{,}`."""
    text = text.strip()
    if text.count("$") == 2 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    return text.replace("\\!", "").replace("{,}", ",")


def _plain_number(text: str) -> Decimal | None:
    """The value of an integer or a decimal, commas between thousands allowed; None otherwise."""
    return Decimal(text.replace(",", "")) if PLAIN_NUMBER.fullmatch(text) else None


@functools.lru_cache(maxsize=2**14)  # the rollouts of one group mostly give the same few answers
def _is_equivalent_symbolically(answer: str, gold: str, seconds: float) -> bool:
    return _worker().compare(answer, gold, seconds)


# ----------------------------------------------------------------------------------- worker process


class Worker:
    """The process that runs math-verify: started on first use, replaced when it has died.

    It speaks JSON lines over pipes. It cannot outlive this process: it is killed at exit, and sees
    the end of its standard input if this process goes without saying so.
    """

    process: subprocess.Popen | None = None

    def compare(self, answer: str, gold: str, seconds: float) -> bool:
        """Ask for a verdict; False if the time limit kills the worker, or two workers in a row die.

        A worker that dies of anything but the time limit may have been dead or dying before (the
        kernel was short of memory, someone killed it), so the question is asked once more.
        """
        for _ in range(2):
            reply = self._ask(json.dumps([answer, gold, seconds]))
            if reply:
                return json.loads(reply)
            if self.close() == -signal.SIGALRM:
                break
        return False

    def close(self) -> int | None:
        """End the process, if there is one, and return its exit status."""
        process, self.process = self.process, None
        if process is None:
            return None
        process.kill()  # no effect on a process that has ended, whose status stays what it was
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):  # the last task may still be in the buffer
                pipe.close()
        return process.wait()

    def _ask(self, task: str) -> str:
        """Send one line and read one line; an empty reply means that the worker is dead."""
        try:
            if self.process is None:
                self._start()
            self.process.stdin.write(task + "\n")
            self.process.stdin.flush()
            return self.process.stdout.readline()
        except BrokenPipeError:
            return ""
        except BaseException:  # Ctrl-C: the next task must not read the reply to this one
            self.close()
            raise

    def _start(self) -> None:
        command = [sys.executable, __file__, "--worker"]
        pipe, devnull = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=devnull, text=True)
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError(f"no grading worker; for the reason run: {' '.join(command)}")


@functools.cache
def _worker() -> Worker:
    """The one worker of this process."""
    worker = Worker()
    atexit.register(worker.close)
    return worker


def _serve() -> None:
    """Body of the worker: answer tasks from standard input until it closes."""
    import resource

    hard_limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    with contextlib.suppress(ValueError):  # the limit in force is already lower
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, hard_limit))
    # The default action of SIGALRM ends the process without asking Python, hence also within C.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, START_SECONDS)
    # A library that prints must not break the protocol.
    replies, sys.stdout = sys.stdout, sys.stderr
    logging.disable()
    _verify("x^2", "x*x")  # loads the grammar and sympy, so that no task pays for it
    signal.setitimer(signal.ITIMER_REAL, 0)
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        answer, gold, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            verdict = _verify(answer, gold)
        except Exception:  # noqa: BLE001  whatever an answer provokes, it is not a right answer
            verdict = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(verdict), file=replies, flush=True)


def _verify(answer: str, gold: str) -> bool:
    """math-verify, without its own timeouts, and on LaTeX only: nothing is evaluated as Python."""
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig(boxed_match_priority=0)]
    gold_parsed, answer_parsed = (
        parse(f"\\boxed{{{text}}}", latex, parsing_timeout=None) for text in (gold, answer)
    )
    return verify(gold_parsed, answer_parsed, timeout_seconds=None)


# ------------------------------------------------------------------------------------------ rewards


def grade(
    text: str,
    gold: str,
    *,
    num_tokens: int,
    truncated: bool,
    tokens_per_forward: float,
    block_size: int,
) -> Graded:
    """Extract the answer of one response and check it; see Graded for the fields.

    A truncated response is wrong even if it holds the right answer: it did not stop by itself.
    """
    answer = extract_answer(text)
    correct = not truncated and answer is not None and is_equivalent(answer, gold)
    return Graded(text, answer, gold, correct, num_tokens, truncated, tokens_per_forward, block_size)


def accuracy(graded: Graded) -> float:
    """1 for a right answer, else 0."""
    return 1.0 if graded.correct else 0.0


def speed(graded: Graded) -> float:
    """From 0.5 (slow) to 1 (fast) if right, from 0 (slow) to -0.5 (fast) if wrong.

    The formula stands at the top of this file. Blocks of one token have one speed, the slow one.
    """
    progress = 0.0
    if graded.block_size > 1:
        progress = (graded.tokens_per_forward - 1) / (graded.block_size - 1)
    s = (1 - math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
    return 0.5 + 0.5 * s if graded.correct else -0.5 * s


REWARDS: dict[str, Callable[[Graded], float]] = {
    "accuracy": accuracy,
    "speed": speed,
}


def check_names(weights: Mapping[str, float]) -> None:
    """Raise ValueError unless weights names at least one reward and only rewards that exist."""
    available = ", ".join(REWARDS)
    if not weights:
        raise ValueError(f"no reward is named; available: {available}")
    for name in weights:
        if name not in REWARDS:
            raise ValueError(f"unknown reward {name!r}; available: {available}")


def score(graded: Graded, weights: Mapping[str, float]) -> dict[str, float]:
    """The value of each reward named in weights, not yet weighted; names as for check_names."""
    return {name: REWARDS[name](graded) for name in weights}


def total(rewards: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Weighted sum of the rewards that score returned."""
    return sum(weights[name] * value for name, value in rewards.items())


def main() -> None:
    """Grade a few responses to one question and print the reasons."""
    gold, weights = r"\frac{1}{2}", {"accuracy": 1.0, "speed": 1.0}
    responses = [
        (r"Half of it: \boxed{\dfrac{1}{2}}", 1.0, False),
        (r"Half of it: \boxed{0.5}", 4.0, False),
        (r"Not \boxed{0.5} but \boxed{2}", 4.0, False),
        (r"One half.", 2.5, False),
        (r"\boxed{0.5} because because because", 2.5, True),
        (r"A tower: \boxed{9^{9^{9^{9}}}}", 2.0, False),
    ]
    print(f"gold {gold!r}, block size 4, weights {weights}\n")
    for text, tpf, truncated in responses:
        graded = grade(text, gold, num_tokens=16, truncated=truncated, tokens_per_forward=tpf, block_size=4)
        rewards = score(graded, weights)
        values = " ".join(f"{name} {value:+.2f}" for name, value in rewards.items())
        print(f"{text}\n  answer {graded.answer!r}, truncated {truncated}, TPF {tpf}")
        print(f"  correct {graded.correct}: {values}, total {total(rewards, weights):+.2f}\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        _serve()
    else:
        main()
