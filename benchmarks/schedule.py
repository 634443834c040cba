"""What the order of rollouts buys: seconds of an RL step's rollouts under several schedules, simulated.

    plain          a rank gets its questions in advance; the step waits for the slowest rank
    queue          a rank takes the next request when it has room (even ranks)
    partial N      nothing generates more than N new tokens in a step; the rest goes on in the next one
    extra X        X groups more than are wanted run at a time; when enough have finished, the step ends and
                   the others go on in the next one

A group is trained on when its last response has ended, so parts of it may have been written by older weights:
the age of a token is the number of updates between the policy that wrote it and the one that is trained.

Batches are simulated as rollout.TorchEngine runs them (tests/test_schedule.py counts its forward passes): a
slot that comes free is taken by the next request. A response of s denoising steps in n blocks takes s + n - 1
passes, since every block except the last is once more passed to the cache. Seconds are a model: a pass of n
requests takes A + B n, or what benchmarks/rollout.py measured; prompts, and what a request had before it goes
on, are prefilled at so much per token. Lengths are recorded ones (rollouts.jsonl of dipo.py, responses of
evaluate.py), or log-normal up to a limit, where questions differ and so do the answers to one question.

    python benchmarks/schedule.py                                          # assumed lengths, assumed costs
    python benchmarks/schedule.py vary=true picture=schedule.png           # and what the answer depends on
    python benchmarks/rollout.py --shape 8B --requests 1 16 64 128 256 --tokens 512 --json cost.json
    python benchmarks/schedule.py cost=cost.json lengths=runs/dipo/rollouts.jsonl block_size=4
"""

from __future__ import annotations

import dataclasses
import heapq
import math
import sys
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

from plumbing.common import (  # noqa: E402
    InputError,
    printable,
    progress,
    read_records,
    run_script,
    write_json,
    writing,
)
from plumbing.config import load_config, setting  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROMPT_TOKENS = 128  # of drawn requests
WARM_UP = 12  # steps that are left out: until as many groups end as begin


# ---------------------------------------------------------------------- requests and their groups


@dataclass(eq=False)
class Request:
    """A response that is to be generated, with the number of its steps known in advance."""

    prompt: int  # tokens
    steps: np.ndarray  # [blocks] denoising steps up to the end of each block
    block_size: int
    group: Group | None = None
    blocks: int = 0  # that it has already
    begun: int = 0  # passes of its rank before it joined

    def tokens(self, blocks: int) -> int:
        """New tokens in its first blocks; the prompt's last tokens may have opened the first one."""
        return blocks * self.block_size - self.prompt % self.block_size if blocks else 0

    def end(self, limit: int) -> int:
        """Blocks that it has after at most `limit` more tokens and the rest of a block; 0: no limit."""
        if not limit:
            return len(self.steps)
        wanted = self.tokens(self.blocks) + limit + self.prompt % self.block_size
        return min(len(self.steps), -(-wanted // self.block_size))

    def passes(self, blocks: int) -> int:
        """Forward passes from where it is up to so many blocks; the last one needs none for the cache."""
        before = self.steps[self.blocks - 1] if self.blocks else 0
        return int(self.steps[blocks - 1] - before) + blocks - self.blocks - 1

    def reached(self, passes: int) -> int:
        """Complete blocks that it has after so many passes: what is begun is lost."""
        before = self.steps[self.blocks - 1] if self.blocks else 0
        needed = self.steps[self.blocks :] - before + np.arange(len(self.steps) - self.blocks)
        return self.blocks + int(np.searchsorted(needed, passes, side="right"))


@dataclass(eq=False)
class Group:
    """The requests of a question."""

    number: int
    requests: list[Request]
    left: int = field(init=False)  # requests that have not ended
    written: Counter[int] = field(default_factory=Counter)  # tokens by training step

    def __post_init__(self):
        self.left = len(self.requests)
        for request in self.requests:
            request.group = self


def recorded_request(prompt: int, steps: list[int], block_size: int) -> Request:
    """The request of a response whose step map is known; see `Rollout.steps`.

    Raises:
        ValueError: the response does not end with a block, or steps go back: another block size.
    """
    ends = np.arange(block_size - prompt % block_size, len(steps) + 1, block_size) - 1
    if not steps or not len(ends) or ends[-1] != len(steps) - 1:
        raise ValueError(f"{prompt} + {len(steps)} tokens are no whole blocks of {block_size}")
    highest = np.maximum.accumulate(steps)
    first = np.minimum.reduceat(steps, np.concatenate([[0], ends[:-1] + 1]))
    if (first[1:] <= highest[ends[:-1]]).any():
        raise ValueError(f"a step of two blocks of {block_size}")
    return Request(prompt, highest[ends], block_size)


class DrawnLengths:
    """Log-normal response lengths up to a limit.

    Args:
        mean: of the lengths, those at the limit included. limit: tokens.
        sigma: standard deviation of log(length) without the limit.
        between: share of its variance that belongs to the question; the rest differs within a group.
        tpf: tokens per denoising step, the same everywhere.
    """

    def __init__(
        self, mean: float, limit: int, sigma: float, between: float, tpf: float, block_size: int, seed: int
    ):
        if not 0 < mean < limit:
            raise InputError(f"config key mean: {mean}, expected more than 0 and less than limit={limit}")
        self.limit, self.sigma, self.between, self.seed = limit, sigma, between, seed
        self.block_size = block_size
        blocks = np.arange(1, -(-limit // block_size) + 1)
        self._steps = np.maximum(np.ceil(blocks * block_size / tpf), blocks).astype(int)

        # The location for which the mean is right.
        spread = sigma * np.random.default_rng(seed).standard_normal(200_000)
        low, high = 0.0, math.log(limit) + 10 * sigma + 1
        for _ in range(50):
            self._location = (low + high) / 2
            found = np.minimum(np.exp(self._location + spread), limit).mean()
            low, high = (self._location, high) if found < mean else (low, self._location)

    def group(self, number: int, size: int) -> Group:
        """Group `number`: the same for the same seed."""
        rng = np.random.default_rng([self.seed, number])
        question = rng.standard_normal() * math.sqrt(self.between)
        answers = rng.standard_normal(size) * math.sqrt(1 - self.between)
        lengths = np.minimum(np.exp(self._location + self.sigma * (question + answers)), self.limit)
        blocks = np.ceil(lengths / self.block_size).astype(int)
        return Group(number, [Request(PROMPT_TOKENS, self._steps[:n], self.block_size) for n in blocks])


class RecordedLengths:
    """Responses of a file, drawn with replacement: within a question if it has several of most questions.

    Raises:
        InputError: a line without a step map of blocks of this size.
    """

    def __init__(self, path: str, block_size: int, seed: int):
        self.seed, by_question = seed, {}
        for where, record in read_records(path, interrupted=True):
            try:
                request = recorded_request(record["prompt_tokens"], record["steps"], block_size)
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(
                    f"{where}: {error}; expected a line of rollouts.jsonl or responses-*.jsonl, in blocks of "
                    f"block_size={block_size}"
                ) from error
            by_question.setdefault(record.get("question"), []).append(request)
        if not by_question:
            raise InputError(f"{path}: no responses")
        self.questions = list(by_question.values())
        if 2 * len(self.questions) > sum(map(len, self.questions)):
            self.questions = [sum(self.questions, [])]

    def group(self, number: int, size: int) -> Group:
        """Group `number`: the same for the same seed."""
        rng = np.random.default_rng([self.seed, number])
        responses = self.questions[rng.integers(len(self.questions))]
        drawn = [responses[i] for i in rng.integers(len(responses), size=size)]
        return Group(number, [dataclasses.replace(request) for request in drawn])


# ------------------------------------------------------------------------------- costs and ranks


@dataclass
class Cost:
    """Seconds of a forward pass of n requests: fixed + each * n, or measured; and of prefill."""

    fixed: float = 1.0
    each: float = 0.0
    prefill: float = 0.0  # per token
    measured: dict[int, float] = field(default_factory=dict)  # by n, in order; lines between them

    def seconds(self, running: int) -> float:
        """Of one pass."""
        if not self.measured:
            return self.fixed + self.each * running
        return float(np.interp(running, list(self.measured), list(self.measured.values())))


def measured_cost(path: str, engine: str, most: int, prefill: float) -> Cost:
    """The cost from the file that `benchmarks/rollout.py --json` wrote, whose requests are all the same work.

    There a block of 4 takes two steps and a pass to the cache: 3 passes for 4 tokens of every request.

    Raises:
        InputError: no figures of this engine, or none for as many requests as a batch may have.
    """
    measured = {}
    for where, record in read_records(path):
        try:
            if record["engine"] == engine:
                measured[int(record["requests"])] = record["requests"] * 4 / 3 / record["tokens_per_second"]
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise InputError(f"{where}: expected what benchmarks/rollout.py --json writes") from error
    if not measured or max(measured) < most:
        raise InputError(
            f"{path}: engine {engine} was measured with {sorted(measured)} requests; expected up to "
            f"max_batch={most}"
        )
    return Cost(prefill=prefill, measured=dict(sorted(measured.items())))


@dataclass
class Rank:
    """What a rank has done in this phase, and what it runs: a heap of (pass at whose end it ends, ...)."""

    queue: deque[Request]
    clock: float = 0.0
    passes: int = 0
    work: int = 0  # passes, each counted as often as requests took part in it
    running: list[tuple[int, int, Request, int]] = field(default_factory=list)

    def next_end(self, cost: Cost) -> float:
        """When the first of its requests will end."""
        return self.clock + (self.running[0][0] - self.passes) * cost.seconds(len(self.running))

    def advance(self, passes: int, cost: Cost) -> None:
        """Make so many passes with what is running."""
        self.clock += passes * cost.seconds(len(self.running))
        self.passes += passes
        self.work += passes * len(self.running)


def roll_out(
    queues: list[deque[Request]],
    slots: int,
    cost: Cost,
    limit: int = 0,
    ended: Callable[[Request, int], None] = lambda request, blocks: None,
    enough: Callable[[], bool] = lambda: False,
) -> list[Rank]:
    """One phase of rollouts: every rank runs its queue, until all are empty or it is enough.

    Args:
        queues: of each rank; all the same object: the ranks share it.
        slots: requests that a rank runs at a time.
        limit: new tokens of a request in this phase; 0: none.
        ended: sees every request that leaves, with the blocks that it has then.
        enough: whether to stop, asked whenever a request has left.
    """
    ranks, joined = [Rank(queue) for queue in queues], 0

    def join(rank: Rank) -> bool:
        """Put the next request into the batch, if there is one and room for it."""
        nonlocal joined
        if len(rank.running) == slots or not rank.queue:
            return False
        request = rank.queue.popleft()
        blocks, request.begun, joined = request.end(limit), rank.passes, joined + 1
        heapq.heappush(rank.running, (rank.passes + request.passes(blocks), joined, request, blocks))
        rank.clock += cost.prefill * (request.prompt + request.tokens(request.blocks))
        return True

    # At the beginning they take turns.
    while any([join(rank) for rank in ranks]):
        pass
    events = [(rank.next_end(cost), i) for i, rank in enumerate(ranks) if rank.running]
    heapq.heapify(events)

    # From then on, whenever a request ends, its rank takes others.
    while events:
        now, i = heapq.heappop(events)
        rank = ranks[i]
        rank.advance(rank.running[0][0] - rank.passes, cost)
        while rank.running and rank.running[0][0] == rank.passes:
            _, _, request, blocks = heapq.heappop(rank.running)
            ended(request, blocks)
        if enough():
            _interrupt(ranks, now, cost, ended)
            break
        while join(rank):
            pass
        if rank.running:
            heapq.heappush(events, (rank.next_end(cost), i))
    return ranks


def _interrupt(ranks: list[Rank], now: float, cost: Cost, ended: Callable[[Request, int], None]) -> None:
    """Stop all ranks at the end of the pass that they are in; requests leave with their complete blocks."""
    for rank in ranks:
        if not rank.running:
            continue
        passes = math.ceil((now - rank.clock) / cost.seconds(len(rank.running)) - 1e-6)
        rank.advance(min(max(passes, 0), rank.running[0][0] - rank.passes), cost)
        for _, _, request, blocks in rank.running:
            ended(request, min(blocks, request.reached(rank.passes - request.begun)))


# ------------------------------------------------------------------------------ training steps


@dataclass
class Job:
    """What a training step asks for, and where."""

    ranks: int = 8
    max_batch: int = 256  # requests that a rank runs at a time
    groups: int = 128
    group_size: int = 32
    cost: Cost = field(default_factory=Cost)


@dataclass
class Schedule:
    """One of those at the top of this file; `partial` and `extra` do not go together."""

    shared: bool = False
    partial: int = 0  # tokens; 0: no limit
    extra: int = 0  # groups beyond those wanted; 0: the step ends with its last request

    @property
    def name(self) -> str:
        """As in the table."""
        parts = ["queue"] * self.shared + [f"partial {self.partial}"] * bool(self.partial)
        parts += [f"extra {self.extra}"] * bool(self.extra)
        return " + ".join(parts) or "plain"


@dataclass
class Figures:
    """Means over training steps."""

    name: str
    seconds: float  # of rollouts, of the slowest rank
    passes: float  # likewise
    full: float  # share of the slots that were in use until the slowest rank had ended
    groups: float  # that finished
    age: float  # of a token that is trained on, in updates
    old: float  # share of tokens of age 1 or more
    oldest: int
    unfinished: float  # requests that go on in the next step


class Training:
    """Training steps under a schedule: what is alive, and who wrote what.

    A step begins as many groups as it wants, so that as many end in the long run: the number of those that
    end in one step varies. With `extra` it ends with the last one that it wants.
    """

    def __init__(self, schedule: Schedule, job: Job, lengths: DrawnLengths | RecordedLengths):
        self.schedule, self.job, self.lengths = schedule, job, lengths
        self.step = self.begun = self.finished = 0  # steps; groups; groups in this step
        self.alive: list[Group] = []  # oldest first

    def make_step(self) -> tuple[list[Rank], list[Group]]:
        """The ranks after the rollouts of a step, and the groups that it trains on."""
        self.step, self.finished = self.step + 1, 0
        missing = self.job.groups + (self.schedule.extra - len(self.alive) if self.schedule.extra else 0)
        for _ in range(missing):
            self.alive.append(self.lengths.group(self.begun, self.job.group_size))
            self.begun += 1
        job, limit = self.job, self.schedule.partial
        ranks = roll_out(self._queues(), job.max_batch, job.cost, limit, self._ended, self._enough)
        done = [group for group in self.alive if not group.left]
        self.alive = [group for group in self.alive if group.left]
        return ranks, done

    def _queues(self) -> list[deque[Request]]:
        """The queue of each rank: its own groups, or one for all. A group stays with its rank."""
        count = 1 if self.schedule.shared else self.job.ranks
        queues = [deque() for _ in range(count)]
        for group in self.alive:
            waiting = [r for r in group.requests if r.blocks < len(r.steps)]
            queues[group.number % count].extend(waiting)
        return queues * (self.job.ranks // count)

    def _ended(self, request: Request, blocks: int) -> None:
        request.group.written[self.step] += request.tokens(blocks) - request.tokens(request.blocks)
        request.blocks = blocks
        if blocks == len(request.steps):
            request.group.left -= 1
            self.finished += not request.group.left

    def _enough(self) -> bool:
        return self.schedule.extra > 0 and self.finished >= self.job.groups


def simulate(
    schedule: Schedule, job: Job, lengths: DrawnLengths | RecordedLengths, steps: int = 24
) -> Figures:
    """Run WARM_UP + steps training steps, and return the means over the latter."""
    training, per_step, ages = Training(schedule, job, lengths), [], Counter()
    for number in range(WARM_UP + steps):
        ranks, done = training.make_step()
        if number < WARM_UP:
            continue
        for group in done:
            for step, tokens in group.written.items():
                ages[training.step - step] += tokens
        passes = max(rank.passes for rank in ranks)
        full = sum(rank.work for rank in ranks) / (passes * job.ranks * job.max_batch)
        unfinished = sum(group.left for group in training.alive)
        per_step.append((max(rank.clock for rank in ranks), passes, full, len(done), unfinished))

    # Means over steps, and over tokens.
    seconds, passes, full, groups, unfinished = np.mean(per_step, axis=0).tolist()
    tokens = max(ages.total(), 1)
    age = sum(updates * count for updates, count in ages.items()) / tokens
    old = (tokens - ages[0]) / tokens
    return Figures(schedule.name, seconds, passes, full, groups, age, old, max(ages, default=0), unfinished)


def bound(job: Job, lengths: DrawnLengths | RecordedLengths, groups: int = 300) -> float:
    """Seconds per step if every pass of every rank were full and nothing were prefilled twice."""
    work = prompts = 0
    for number in range(groups):
        for request in lengths.group(number, job.group_size).requests:
            work += request.passes(len(request.steps))
            prompts += request.prompt
    of_pass = job.cost.seconds(job.max_batch) / job.max_batch
    return (work * of_pass + prompts * job.cost.prefill) / groups * job.groups / job.ranks


# ------------------------------------------------------------------------------- the program


@dataclass
class ScheduleConfig:
    """Fields of benchmarks/schedule.py. The costs are assumed; no GPU was measured for them."""

    ranks: int = setting(8, "GPUs, each with an engine", above=0, heading="A step")
    max_batch: int = setting(256, "requests that an engine runs at a time", above=0)
    groups: int = setting(128, "groups that a step trains on", above=0)
    group_size: int = setting(32, "rollouts of each", above=0)
    partial: list[int] = setting([1024, 2048, 4096], "values of N", above=0)
    extra: list[float] = setting([0.25, 0.5, 0.75, 1.0], "values of X, as shares of groups", above=0)
    steps: int = setting(24, f"training steps, after {WARM_UP} that are left out", above=0)
    seed: int = setting(0, "of the lengths")

    lengths: str = setting("", "a file of responses in place of the next five fields", heading="Lengths")
    mean: float = setting(2000.0, "tokens of a response", above=0)
    limit: int = setting(8192, "tokens of the longest response", above=0)
    sigma: float = setting(1.0, "standard deviation of the logarithm of the length", at_most=5)
    between: float = setting(0.5, "share of its variance that belongs to the question", at_most=1)
    tpf: float = setting(2.0, "tokens per denoising step", at_least=1)
    block_size: int = setting(4, "tokens", above=0)

    cost: str = setting("", "a file of rollout.py --json in place of the next two fields", heading="Costs")
    pass_ms: float = setting(20.0, "of a forward pass, whatever runs")
    request_ms: float = setting(0.1, "and of every request in it")
    prefill_ms: float = setting(0.03, "of a token that is prefilled")

    vary: bool = setting(False, "also print what the answer depends on", heading="Output")
    picture: str = setting("", "a PNG")
    json: str = setting("", "the figures, in a file")

    def check(self) -> None:
        """Refuse what the bounds of single fields do not say.

        Raises:
            InputError: naming the field.
        """
        if self.tpf > self.block_size:
            raise InputError(f"config key tpf: {self.tpf}, expected at most block_size")
        if not self.pass_ms + self.request_ms:
            raise InputError("config key pass_ms: 0, expected more than 0 if request_ms is 0")
        if self.picture and not self.picture.endswith(".png"):
            raise InputError(f"config key picture: {self.picture}, expected a name that ends with .png")

    def job(self) -> Job:
        """What a step asks for, and its costs."""
        if self.cost:
            cost = measured_cost(self.cost, "ours", self.max_batch, self.prefill_ms / 1000)
        else:
            cost = Cost(self.pass_ms / 1000, self.request_ms / 1000, self.prefill_ms / 1000)
        return Job(self.ranks, self.max_batch, self.groups, self.group_size, cost)

    def responses(self) -> DrawnLengths | RecordedLengths:
        """Where lengths come from."""
        if self.lengths:
            return RecordedLengths(self.lengths, self.block_size, self.seed)
        law = (self.mean, self.limit, self.sigma, self.between, self.tpf)
        return DrawnLengths(*law, self.block_size, self.seed)

    def schedules(self) -> list[Schedule]:
        """All that are compared; the first is plain."""
        found = [Schedule(shared, partial) for shared in (False, True) for partial in (0, *self.partial)]
        extras = [max(1, round(share * self.groups)) for share in self.extra]
        return found + [Schedule(True, extra=extra) for extra in extras]


VARIED = {  # what the answer depends on; a full pass takes 46 ms in the first ones, as it does by default
    "as above": {},
    "a request alone takes a tenth of a full pass": {"pass_ms": 4.4, "request_ms": 0.161},
    "a quarter of it": {"pass_ms": 11.3, "request_ms": 0.134},
    "two thirds": {"pass_ms": 30.0, "request_ms": 0.061},
    "all of it": {"pass_ms": 45.6, "request_ms": 0.0},
    "prefill costs nothing": {"prefill_ms": 0.0},
    "max_batch 128": {"max_batch": 128},
    "max_batch 512": {"max_batch": 512},
    "sigma 0.6": {"sigma": 0.6},
    "sigma 1.4": {"sigma": 1.4},
    "lengths do not depend on the question": {"between": 0.0},
    "lengths depend on the question alone": {"between": 1.0},
}


def table(found: list[Figures], least: float) -> Iterator[str]:
    """Lines of the table of schedules, the first of which is what the others are compared with."""
    yield (
        "| schedule | s per step | times as fast | passes, slowest rank | slots used | groups ended "
        "| age, mean | tokens of age > 0 | oldest | unfinished |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for f in found:
        yield (
            f"| {f.name} | {f.seconds:.1f} | {found[0].seconds / f.seconds:.2f} | {f.passes:.0f} "
            f"| {100 * f.full:.0f} % | {f.groups:.0f} | {f.age:.2f} | {100 * f.old:.0f} % | {f.oldest} "
            f"| {f.unfinished:.0f} |"
        )
    yield f"| every slot always used | {least:.1f} | {found[0].seconds / least:.2f} | | 100 % | | | | | |"


def varied_table(config: ScheduleConfig) -> tuple[list[str], dict[str, list[Figures]]]:
    """Lines of the table of what the answer depends on, and its figures."""
    found, lines = {}, []
    for name, changes in progress(VARIED.items(), desc="variants", unit="variant", leave=False):
        variant = dataclasses.replace(config, **changes)
        job, lengths = variant.job(), variant.responses()
        schedules = variant.schedules()
        schedules = schedules[:1] + [s for s in schedules if s.shared]
        found[name] = of_variant = [simulate(s, job, lengths, config.steps) for s in schedules]
        cells = [f"{of_variant[0].seconds / f.seconds:.2f} ({f.age:.2f})" for f in of_variant[1:]]
        least = of_variant[0].seconds / bound(job, lengths)
        if not lines:
            names = " | ".join(f.name for f in of_variant[1:])
            lines = [f"| times as fast (age) | plain, s | {names} | every slot used |"]
            lines.append("|---|---:|" + "---:|" * (len(cells) + 1))
        lines.append(f"| {name} | {of_variant[0].seconds:.0f} | {' | '.join(cells)} | {least:.2f} |")
    return lines, found


def plot(path: str, found: list[Figures], least: float) -> None:
    """Seconds per step against the age of tokens: a line for each kind of schedule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    kinds = {
        "partial": [f for f in found if f.name == "plain" or f.name.startswith("partial")],
        "queue + partial": [f for f in found if f.name == "queue" or f.name.startswith("queue + partial")],
        "queue + extra": [f for f in found if f.name == "queue" or f.name.startswith("queue + extra")],
    }
    for number, (kind, of_kind) in enumerate(kinds.items()):
        of_kind = sorted(of_kind, key=lambda f: f.age)
        axis.plot([f.age for f in of_kind], [f.seconds for f in of_kind], "o-", c=f"C{number}", label=kind)
        for f in of_kind:
            text = f.name.removeprefix("queue + ").removeprefix("partial ").removeprefix("extra ")
            place = {"xytext": (6, 6 if number < 2 else -12), "textcoords": "offset points"}
            axis.annotate(text, (f.age, f.seconds), fontsize=8, c=f"C{number}", **place)
    axis.axhline(least, c="0.5", ls="--", lw=1, label="every slot always used")
    axis.axvline(1, c="0.85", lw=1, zorder=0)
    axis.set(xlabel="mean age of a token that is trained on (updates)", ylabel="seconds of rollouts per step")
    axis.margins(x=0.08, y=0.1)
    axis.set_ylim(0)
    axis.legend(fontsize=8, loc="lower right")
    axis.grid(alpha=0.3)
    with writing(Path(path)):
        figure.savefig(path, dpi=120)
    plt.close(figure)


def main(config: ScheduleConfig) -> None:
    """Simulate, and print Markdown tables."""
    # What is simulated.
    job, lengths = config.job(), config.responses()
    alone, full = (1000 * job.cost.seconds(n) for n in (1, config.max_batch))
    origin = f"measured: {printable(config.cost)}" if config.cost else "ASSUMED, not measured"
    print(
        f"{config.groups} groups of {config.group_size} on {config.ranks} ranks. Forward pass: {alone:.3g} ms"
    )
    print(f"for 1 request, {full:.3g} ms for {config.max_batch} ({origin}).")
    print(f"Lengths: {printable(config.lengths) or 'log-normal, ASSUMED'}.\n")

    # Every schedule, over the same questions in the same order.
    found = []
    for schedule in progress(config.schedules(), desc="schedules", unit="schedule", leave=False):
        found.append(simulate(schedule, job, lengths, config.steps))
    least = bound(job, lengths)
    print("\n".join(table(found, least)))
    record = {"config": dataclasses.asdict(config), "schedules": list(map(dataclasses.asdict, found))}
    record["every_slot_used_seconds"] = least

    # What that depends on, and the files.
    if config.vary:
        lines, varied = varied_table(config)
        print("\n" + "\n".join(lines))
        record["varied"] = {name: list(map(dataclasses.asdict, of)) for name, of in varied.items()}
    if config.picture:
        plot(config.picture, found, least)
    if config.json:
        write_json(Path(config.json), record)


if __name__ == "__main__":
    run_script(lambda: main(load_config(ScheduleConfig, sys.argv[1:])))
