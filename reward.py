r"""Rewards: is the answer right, and what else about the response is worth something?

A response is graded in three steps:

1. extract    the content of the last `\boxed{...}` that closes
2. compare    with the gold answer: same spelling, number, parts, or math-verify    answers.py
3. reward     named functions of the graded response; the total is their weighted sum

The policy writes the answers, so they are hostile sooner or later: `9^{9^{9^{9}}}` never finishes.
Comparing therefore runs in worker processes which the kernel ends at a limit of processor time; a
Python-level timeout would not interrupt a single long multiplication in C. POSIX only.

Left out on purpose: threads and forks of this process (they would share the workers' pipes).

    python reward.py                  # grades a few examples and prints why
    python reward.py --check FILE     # grades JSON Lines with `text` and `gold`, explains each verdict
    python reward.py --draw FILE      # the curves of the length and speed rewards
"""

import argparse
import atexit
import contextlib
import dataclasses
import functools
import importlib
import json
import logging
import math
import os
import re
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Overflow

from answers import MAX_CHARS, Verdict, compare, extract_answer, normal_form, quick_verdict

MEMORY_BYTES = 4 * 2**30  # address space of a worker; math-verify itself needs about 0.1 GiB
START_SECONDS = 120  # importing sympy from a cold network disk can take a while
SECONDS = 2.0  # processor time for one comparison; honest ones take a few hundredths


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
    max_tokens: int = 0  # the length limit; 0: unknown, and the rewards of length refuse


def is_equivalent(answer: str, gold: str, seconds: float = SECONDS, tolerance: float | None = None) -> bool:
    """Whether an answer, LaTeX without the box around it, means the same as the gold one.

    Args:
        seconds: limit of processor time for the comparison. An answer that exceeds it is wrong, as
            is one that is empty, longer than MAX_CHARS, or makes the parser fail.
        tolerance: a number is right if it is no further from the gold one, absolutely
            (OlympiadBench's `error`); None: exact.

    Raises:
        ValueError: seconds is not positive.
        RuntimeError: no worker can start, for example because math-verify is missing.
    """
    return judge_all([(answer, gold, tolerance)], seconds)[0].equal


def judge_all(
    pairs: Sequence[tuple[str, str, float | None]], seconds: float = SECONDS, workers: int = 0
) -> list[Verdict]:
    """Verdicts on (answer, gold, tolerance) triples: equal ones once, hard ones in the workers.

    Args:
        workers: processes; 0: one per core this process may use.
    """
    if seconds <= 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    quick = {pair: quick_verdict(*pair) for pair in pairs}
    cache = _cache(seconds)
    hard = [pair for pair, verdict in quick.items() if verdict is None and pair not in cache]
    if hard:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        found = _pool().run([json.dumps([*pair, seconds]) for pair in hard], workers or cores or 1)
        cache |= dict(zip(hard, found, strict=True))
    verdicts = [quick[pair] or cache[pair] for pair in pairs]
    if len(cache) > 2**18:
        cache.clear()
    return verdicts


@functools.cache
def _cache(seconds: float) -> dict[tuple, Verdict]:
    """Verdicts of the workers: the rollouts of one group mostly give the same few answers."""
    return {}


# ---------------------------------------------------------------------------------- worker processes


@dataclass
class Worker:
    """One process that compares; it speaks JSON lines over pipes, one task at a time."""

    process: subprocess.Popen
    ready: bool = False  # it has said so, thus what ends it now is a task
    task: int | None = None


class Pool:
    """Workers, started on first use. They end at exit, and with their standard input in any case."""

    def __init__(self) -> None:
        self.idle: list[Worker] = []
        self.busy: list[Worker] = []

    def run(self, tasks: list[str], workers: int) -> list[Verdict]:
        """Verdicts on the tasks, by at most so many workers; a hostile task holds up only its own.

        A worker that dies of anything but the time limit may have been dead or dying before (the
        kernel was short of memory, someone killed it), so its task is tried once more.
        """
        verdicts: list[Verdict | None] = [None] * len(tasks)
        todo = deque(enumerate(tasks))
        retried = set()
        try:
            while todo or self.busy:
                while todo and len(self.busy) < workers:
                    self._give(*todo.popleft())
                for worker in self._answered():
                    line = worker.process.stdout.readline()
                    if line == "ready\n":
                        worker.ready = True
                        continue
                    self.busy.remove(worker)
                    if not line and not worker.ready:
                        _end(worker)
                        command = " ".join(worker.process.args)
                        raise RuntimeError(f"no grading worker; for the reason run: {command}")
                    if not line:
                        _end(worker)
                    else:
                        self.idle.append(worker)
                    reply = json.loads(line) if line else None
                    if reply is None and worker.task not in retried:
                        retried.add(worker.task)
                        todo.append((worker.task, tasks[worker.task]))
                    else:
                        verdicts[worker.task] = Verdict(*(reply or (False, "the worker died twice")))
        except BaseException:  # Ctrl-C: the next task must not read the reply to this one
            self.close()
            raise
        return verdicts

    def close(self) -> None:
        """End all processes."""
        while self.idle or self.busy:
            _end((self.idle or self.busy).pop())

    def _give(self, number: int, task: str) -> None:
        worker = self.idle.pop() if self.idle else _start()
        worker.task = number
        self.busy.append(worker)
        with contextlib.suppress(BrokenPipeError):  # a dead worker shows when its reply is read
            worker.process.stdin.write(task + "\n")
            worker.process.stdin.flush()

    def _answered(self) -> list[Worker]:
        """Those of the busy workers that have something to read; waits for one."""
        with selectors.DefaultSelector() as selector:
            for worker in self.busy:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            return [key.data for key, _ in selector.select()]


def _start() -> Worker:
    command = [sys.executable, __file__, "--worker"]
    pipe = subprocess.PIPE
    return Worker(
        subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
    )


def _end(worker: Worker) -> None:
    with contextlib.suppress(ProcessLookupError):  # the process and the child that compares
        os.killpg(worker.process.pid, signal.SIGKILL)
    for stream in (worker.process.stdin, worker.process.stdout):
        with contextlib.suppress(BrokenPipeError):  # the last task may still be in the buffer
            stream.close()
    worker.process.wait()


@functools.cache
def _pool() -> Pool:
    """The workers of this process."""
    pool = Pool()
    atexit.register(pool.close)
    return pool


def _serve() -> None:
    """Body of a worker: load sympy once, then compare in a child, and in the next when that dies."""
    import resource

    hard_limit = resource.getrlimit(resource.RLIMIT_AS)[1]
    with contextlib.suppress(ValueError):  # the limit in force is already lower
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, hard_limit))
    # Their default action ends the process without asking Python, hence also within C.
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {alarm})
    signal.setitimer(signal.ITIMER_REAL, START_SECONDS)
    # A library that prints must not break the protocol.
    replies, sys.stdout = sys.stdout, sys.stderr
    logging.disable()
    compare("x^{2}", r"x\cdot x")  # loads the grammar and sympy, so that no task pays for it
    signal.setitimer(signal.ITIMER_REAL, 0)
    print("ready", file=replies, flush=True)
    while True:
        child = os.fork()
        if child == 0:
            _serve_tasks(replies)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            return
        late = os.WTERMSIG(status) == signal.SIGPROF
        print(json.dumps((False, "time limit") if late else None), file=replies, flush=True)


def _serve_tasks(replies) -> None:
    """Answer tasks from standard input until it closes, or until the kernel ends the process."""
    for line in sys.stdin:
        answer, gold, tolerance, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            verdict = compare(normal_form(answer), normal_form(gold), tolerance)
        except Exception as error:  # noqa: BLE001  whatever an answer provokes, it is not a right answer
            too_large = isinstance(error, Overflow)
            verdict = False, "too large to compute" if too_large else f"no verdict ({type(error).__name__})"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=replies, flush=True)


# ------------------------------------------------------------------------------------------ grading


def grade(
    text: str,
    gold: str,
    *,
    num_tokens: int,
    truncated: bool,
    tokens_per_forward: float,
    block_size: int,
    max_tokens: int = 0,
    tolerance: float | None = None,
) -> Graded:
    """Extract the answer of one response and check it; see Graded for the fields.

    A truncated response is wrong even if it holds the right answer: it did not stop by itself.
    """
    return grade_all(
        [text], [gold], num_tokens=[num_tokens], truncated=[truncated],
        tokens_per_forward=[tokens_per_forward], block_size=block_size, max_tokens=max_tokens,
        tolerances=[tolerance],
    )[0]  # fmt: skip


def grade_all(
    texts: Sequence[str],
    golds: Sequence[str],
    *,
    num_tokens: Sequence[int],
    truncated: Sequence[bool],
    tokens_per_forward: Sequence[float],
    block_size: int,
    max_tokens: int = 0,
    tolerances: Sequence[float | None] | None = None,
    workers: int = 0,
    seconds: float = SECONDS,
) -> list[Graded]:
    """`grade` for many responses at once, in parallel; every sequence has one entry per response.

    Args:
        max_tokens: the limit that all were generated under; 0: unknown.
        workers, seconds: see `judge_all`.
    """
    answers = [extract_answer(text) for text in texts]
    tolerances = tolerances or [None] * len(texts)
    asked = [a is not None and not cut for a, cut in zip(answers, truncated, strict=True)]
    triples = [t for t, ask in zip(zip(answers, golds, tolerances, strict=True), asked, strict=True) if ask]
    verdicts = iter(judge_all(triples, seconds, workers))
    return [
        Graded(text, answer, gold, ask and next(verdicts).equal, tokens, cut, tpf, block_size, max_tokens)
        for text, answer, gold, ask, tokens, cut, tpf in zip(
            texts, answers, golds, asked, num_tokens, truncated, tokens_per_forward, strict=True
        )
    ]


# ------------------------------------------------------------------------------------------ rewards


def accuracy(graded: Graded) -> float:
    """1 for a right answer, else 0."""
    return 1.0 if graded.correct else 0.0


def binary(graded: Graded) -> float:
    """1 for a right answer, else -1."""
    return 1.0 if graded.correct else -1.0


def boxed(graded: Graded) -> float:
    """0.1 for any closed box, else 0. Source: OpenMOSS/DiRL."""
    return 0.1 if graded.answer is not None else 0.0


def think_format(graded: Graded) -> float:
    """1 if the text opens with one `<think> ... </think>` and goes on after it, else 0."""
    found = re.fullmatch(r"\s*<think>(.*?)</think>\s*(\S.*)", graded.text, re.DOTALL)
    once = found and "think>" not in found[1].replace("</think>", "think>") + found[2]
    return 1.0 if once else 0.0


def cosine(graded: Graded) -> float:
    """By length: right from 1 (short) to 0.5 (long), wrong from -0.5 (short) to 0, truncated -0.5.

    A half cosine of num_tokens / max_tokens in between, so that long thought is cheap where it
    fails. Source: arXiv 2502.03373, equation 1, with OpenMOSS/DiRL's values.
    """
    if graded.truncated:
        return -0.5
    short = (1 + math.cos(math.pi * min(graded.num_tokens / _limit(graded), 1.0))) / 2
    return 0.5 + 0.5 * short if graded.correct else -0.5 * short


def repetition(graded: Graded, n: int = 3, penalty: float = -1.0) -> float:
    """`penalty` times the share of n-grams of words that came before. Source: as for cosine."""
    words = graded.text.lower().split()
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return penalty * (1 - len(set(grams)) / len(grams)) if grams else 0.0


def soft_overlong(graded: Graded, share: float = 0.5) -> float:
    """0 until the last `share` of the limit begins, from there down to -1 at the limit.

    Source: DAPO, arXiv 2503.14476, equation 13, L_cache = share * L_max.
    """
    limit = _limit(graded)
    over = graded.num_tokens - (1 - share) * limit
    return -min(max(over / (share * limit), 0.0), 1.0)


def length(graded: Graded) -> float:
    """0.5 - num_tokens / max_tokens; no more than 0 if wrong, so that no wrong answer gains by brevity.

    Source: Kimi k1.5, arXiv 2501.12599, section 2.3.3, whose shortest and longest of the group are
    0 and the limit here, since a reward sees one response.
    """
    value = 0.5 - min(graded.num_tokens / _limit(graded), 1.0)
    return value if graded.correct else min(value, 0.0)


def speed(graded: Graded) -> float:
    """By TPF: right from 0.5 (slow) to 1 (fast), wrong from 0 (slow) to -0.5 (fast).

    With s = (1 - cos(pi * (TPF - 1) / (B - 1))) / 2 in [0, 1]: 0.5 + 0.5 s or -0.5 s, so that the
    slowest right answer beats every wrong one. Source: OpenMOSS/DiRL, speed reward.
    """
    return 0.5 + 0.5 * _speed(graded) if graded.correct else -0.5 * _speed(graded)


def speed_penalty(graded: Graded) -> float:
    """0.5 if right; wrong from 0 (slow) to -0.5 (fast) as in `speed`. Source: OpenMOSS/DiRL."""
    return 0.5 if graded.correct else -0.5 * _speed(graded)


def _speed(graded: Graded) -> float:
    """s of `speed`. Blocks of one token have one speed, the slow one."""
    progress = (graded.tokens_per_forward - 1) / max(graded.block_size - 1, 1)
    return (1 - math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2 if graded.block_size > 1 else 0.0


def _limit(graded: Graded) -> int:
    if graded.max_tokens <= 0:
        raise ValueError("a reward of length needs the limit: grade with max_tokens")
    return graded.max_tokens


REWARDS: dict[str, Callable[[Graded], float]] = {
    "accuracy": accuracy,
    "speed": speed,
    "speed_penalty": speed_penalty,
    "binary": binary,
    "boxed": boxed,
    "format": think_format,
    "cosine": cosine,
    "repetition": repetition,
    "soft_overlong": soft_overlong,
    "length": length,
}


def find_reward(name: str) -> Callable[[Graded], float]:
    """The reward of that name, or your own by dotted path: `mymodule.myreward`, importable from here.

    Raises:
        ValueError: there is no such reward.
    """
    if name in REWARDS:
        return REWARDS[name]
    module, dot, function = name.rpartition(".")
    if not dot:
        raise ValueError(f"unknown reward {name!r}; available: {', '.join(REWARDS)}, or mymodule.myreward")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"unknown reward {name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"unknown reward {name!r}: not a function")
    return found


def check_names(weights: Mapping[str, float]) -> None:
    """Raise ValueError unless weights names at least one reward and only rewards that exist."""
    if not weights:
        raise ValueError(f"no reward is named; available: {', '.join(REWARDS)}")
    for name in weights:
        find_reward(name)


def score(graded: Graded, weights: Mapping[str, float]) -> dict[str, float]:
    """The value of each reward named in weights, not yet weighted; names as for check_names."""
    return {name: find_reward(name)(graded) for name in weights}


def total(rewards: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Weighted sum of the rewards that score returned."""
    return sum(weights[name] * value for name, value in rewards.items())


# ------------------------------------------------------------------------------------- command line


def show_examples() -> None:
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


def read_responses(path: str) -> list[tuple[str, str, float | None]]:
    """(text, gold, tolerance) of each row of a JSON Lines file.

    Raises:
        ValueError: a row without a text or a gold answer; the message names file and line.
        OSError: the file cannot be read.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for count, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = next(row[name] for name in ("text", "response") if name in row)
                gold = next(row[n] for n in ("gold", "ground_truth_answer", "answer") if n in row)
            except (ValueError, TypeError, StopIteration) as error:
                message = (
                    f"{path}:{count}: expected an object with `text` or `response`, and `gold` or `answer`"
                )
                raise ValueError(message) from error
            rows.append((str(text), str(gold), row.get("tolerance")))
    return rows


def check_file(path: str) -> None:
    """Grade a file of responses and explain each verdict."""
    rows = read_responses(path)
    answers = [extract_answer(text) for text, _, _ in rows]
    triples = [(answer or "", *row[1:]) for answer, row in zip(answers, rows, strict=True)]
    verdicts = judge_all(triples)
    for count, (answer, (_, gold, _), verdict) in enumerate(
        zip(answers, rows, verdicts, strict=True), start=1
    ):
        print(f"{count} {'right' if verdict.equal else 'wrong'}: {verdict.why}")
        for name, text in (("answer", answer), ("gold", gold)):
            form = (
                "no closed box"
                if text is None
                else f"{text!r}, normal form {normal_form(text[:MAX_CHARS])!r}"
            )
            print(f"  {name} {form}")
    print(f"{sum(verdict.equal for verdict in verdicts)} of {len(rows)} right")


def draw(path: str) -> None:
    """Draw the curves of the length and the speed rewards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = Graded("", "1", "1", True, 0, False, 1.0, 4, 8192)
    lengths, speeds = range(0, 8193, 32), [1 + i / 50 for i in range(151)]
    panels = [
        ("tokens of the response (limit 8,192)", lengths, "num_tokens", (cosine, length, soft_overlong)),
        ("tokens per forward (block size 4)", speeds, "tokens_per_forward", (speed, speed_penalty)),
    ]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (label, xs, field, rewards) in zip(axes, panels, strict=True):
        for color, reward in enumerate(rewards):
            for correct in (True, False) if reward is not soft_overlong else (True,):
                cases = [dataclasses.replace(base, correct=correct, **{field: x}) for x in xs]
                name = reward.__name__.replace("_", " ")
                which = "" if reward is soft_overlong else ", right" if correct else ", wrong"
                dashes, width = "-" if correct else "--", 5 - 1.8 * color  # what coincides stays visible
                style = {"color": f"C{color}", "linestyle": dashes, "linewidth": width}
                axis.plot(xs, [reward(case) for case in cases], label=name + which, **style)
        axis.set_xlabel(label)
        axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("reward")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Examples, --check or --draw; bad input ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Grade examples, check a file, or draw the curves.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", metavar="FILE", help="JSON Lines with text and gold")
    choice.add_argument("--draw", metavar="FILE", help="picture to write")
    options = parser.parse_args()
    try:
        if options.check:
            check_file(options.check)
        elif options.draw:
            draw(options.draw)
        else:
            show_examples()
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        _serve()
    else:
        main()
