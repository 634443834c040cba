"""benchmarks/schedule.py against the embedded engine, whose forward passes are counted, and by hand."""

import dataclasses
import json
import random
import subprocess
import sys
from collections import deque

import numpy as np
import pytest
import schedule
from conftest import TINY
from even_worker import counting_passes
from schedule import Cost, DrawnLengths, Job, Request, Schedule, recorded_request, roll_out, simulate

import model
from plumbing.checkpoint import tiny
from plumbing.common import ROOT, InputError
from rollout import Decoding, TorchEngine

B, VOCABULARY, MASK = 4, 24, 23
HOW = Decoding(threshold=0.6, max_tokens=40)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Uneven lengths: a stop token that is drawn now and then. `passes` has the requests of every pass."""
    folder = tiny(tmp_path_factory.mktemp("schedule") / "tiny", seed=3, **TINY | {"vocab_size": VOCABULARY})
    engine = TorchEngine(model.load(str(folder)), B, MASK, [5], max_batch=3)
    return counting_passes(engine)


def some_prompts(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(MASK) for _ in range(rng.randint(1, 11))] for _ in range(count)]


def as_requests(prompts, step_maps) -> list[Request]:
    return [recorded_request(len(p), steps, B) for p, steps in zip(prompts, step_maps, strict=True)]


def test_a_batch_takes_the_passes_of_the_engine(engine):
    prompts = some_prompts(14)
    engine.passes.clear()
    rollouts = engine.generate(prompts, list(range(14)), HOW)
    assert len({len(r.response_ids) for r in rollouts}) > 4, "uneven lengths, or this tests little"
    requests = as_requests(prompts, [r.steps for r in rollouts])
    (rank,) = roll_out([deque(requests)], slots=3, cost=Cost())
    assert (rank.passes, rank.work) == (len(engine.passes), sum(engine.passes))
    assert rank.passes > max(r.passes(len(r.steps)) for r in requests)
    assert sum(r.passes(len(r.steps)) for r in requests) == rank.work


@pytest.mark.parametrize("limit", [4, 10, 16])
def test_partial_rollouts_take_the_passes_of_the_engine(engine, limit):
    """Known are the step maps of rollouts without a pause; the engine makes the same ones in parts."""
    prompts, seeds = some_prompts(9), list(range(9))
    whole = engine.generate(prompts, seeds, HOW)
    requests, how = as_requests(prompts, [r.steps for r in whole]), dataclasses.replace(HOW)
    how.partial_tokens = limit
    begun, open_ones, calls = [None] * 9, seeds, 0
    while open_ones:
        engine.passes.clear()
        some = [begun[i] for i in open_ones]
        rollouts = engine.generate([prompts[i] for i in open_ones], open_ones, how, begun=some)
        for i, rollout in zip(open_ones, rollouts, strict=True):
            begun[i] = rollout

        waiting = deque(r for r in requests if r.blocks < len(r.steps))
        (rank,) = roll_out([waiting], 3, Cost(), limit, lambda r, blocks: setattr(r, "blocks", blocks))
        assert (rank.passes, rank.work) == (len(engine.passes), sum(engine.passes))
        assert [r.tokens(r.blocks) for r in requests] == [len(r.response_ids) for r in begun]
        open_ones, calls = [i for i in seeds if begun[i].finish_reason == "unfinished"], calls + 1
        assert open_ones == [i for i in seeds if requests[i].blocks < len(requests[i].steps)]
    assert calls > 2 and [r.steps for r in begun] == [r.steps for r in whole]


def by_the_pass(requests: list[list[tuple[int, int]]], shared: bool, slots: int, cost: Cost) -> list[float]:
    """Clocks of ranks that run (context, passes) requests, pass by pass: whoever is behind goes first."""
    queues = [deque(of_rank) for of_rank in requests]
    if shared:
        queues = [deque(r for of_rank in requests for r in of_rank)] * len(requests)
    clocks, running = [0.0] * len(queues), [[] for _ in queues]

    def fill(i: int, most: int = slots) -> None:
        while queues[i] and len(running[i]) < most:
            context, passes = queues[i].popleft()
            clocks[i] += cost.prefill * context
            running[i].append(passes)

    for room in range(1, slots + 1):
        for i in range(len(queues)):
            fill(i, room)
    while any(running):
        # The rank whose pass ends first; what ends in it makes room.
        ends = {i: clocks[i] + cost.seconds(len(r)) for i, r in enumerate(running) if r}
        i = min(ends, key=lambda i: (ends[i], i))
        clocks[i] = ends[i]
        running[i] = [left - 1 for left in running[i] if left > 1]
        fill(i)
    return clocks


@pytest.mark.parametrize("shared", [False, True])
def test_clocks_are_those_of_pass_by_pass(shared):
    rng = random.Random(1)
    for _ in range(30):
        cost = Cost(rng.random(), rng.random(), rng.choice([0.0, 0.013]))
        slots, sizes = rng.randint(1, 4), []
        for _ in range(rng.randint(1, 4)):
            sizes.append([(rng.randint(1, 9), rng.randint(1, 12)) for _ in range(rng.randint(0, 6))])
        queues = [deque(Request(n, np.array([p]), 100) for n, p in of_rank) for of_rank in sizes]
        if shared:
            queues = [deque(r for queue in queues for r in queue)] * len(queues)
        clocks = [rank.clock for rank in roll_out(queues, slots, cost)]
        assert clocks == pytest.approx(by_the_pass(sizes, shared, slots, cost))


# ----------------------------------------------------------------------- training steps, by hand


def write_responses(path, *responses: tuple[str, int, list[int]]) -> str:
    """A file of (question, prompt tokens, step map)."""
    lines = []
    for question, prompt, steps in responses:
        lines.append(json.dumps({"question": question, "prompt_tokens": prompt, "steps": steps}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def two_blocks(tmp_path):
    """Every response is two blocks of two steps each: five passes."""
    path = write_responses(tmp_path / "rollouts.jsonl", ("q", 4, [1, 2, 2, 2, 3, 3, 3, 4]))
    return schedule.RecordedLengths(path, B, seed=0)


def test_plain_and_partial_steps_by_hand(two_blocks):
    job = Job(ranks=1, max_batch=1, groups=1, group_size=1, cost=Cost(1.0, 0.5, 0.01))
    plain = simulate(Schedule(), job, two_blocks)
    assert (plain.passes, plain.groups, plain.full) == (5, 1, 1)
    assert plain.seconds == pytest.approx(5 * 1.5 + 4 * 0.01)
    assert (plain.age, plain.old, plain.oldest, plain.unfinished) == (0, 0, 0, 0)
    assert schedule.bound(job, two_blocks) == pytest.approx(plain.seconds)

    # Two ranks share two groups; the work that is there is as much for each.
    two = simulate(Schedule(), dataclasses.replace(job, ranks=2, groups=2), two_blocks)
    assert (two.passes, two.full, two.seconds) == (5, 1, pytest.approx(plain.seconds))
    assert schedule.bound(dataclasses.replace(job, ranks=2, groups=2), two_blocks) == pytest.approx(
        two.seconds
    )

    # A block per step: two passes of the one that goes on and two of the new one, one after the other.
    half = simulate(Schedule(partial=4), job, two_blocks)
    assert (half.name, half.passes, half.groups, half.unfinished) == ("partial 4", 4, 1, 1)
    assert half.seconds == pytest.approx(4 * 1.5 + (4 + 8) * 0.01)
    assert (half.age, half.old, half.oldest) == (0.5, 0.5, 1)


def test_a_step_that_ends_when_enough_have(tmp_path):
    """Long and short responses in turn by question; the short ones end steps, the long ones go on."""
    long, short = [1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4], [1, 1, 1, 1]
    path = write_responses(tmp_path / "r.jsonl", *[("long", 4, long)] * 3, *[("short", 4, short)] * 3)
    lengths = schedule.RecordedLengths(path, B, seed=0)
    long_share = np.mean([len(lengths.group(n, 1).requests[0].steps) > 1 for n in range(200)])
    assert 0.3 < long_share < 0.7
    job = Job(ranks=1, max_batch=3, groups=2, group_size=1)
    found = simulate(Schedule(shared=True, extra=1), job, lengths, steps=200)
    plain = simulate(Schedule(shared=True), job, lengths, steps=200)
    assert found.groups >= 2 and plain.groups == 2
    assert found.unfinished == pytest.approx(3 - found.groups), "two end, one is left"
    assert found.seconds < plain.seconds and found.full > plain.full
    assert 0 < found.age < 1 and found.old < 1


def test_an_interrupted_request_keeps_its_complete_blocks():
    """Passes of a response of blocks of 2, 1 and 3 steps: each but the last has one more for the cache."""
    request = recorded_request(4, [1, 1, 2, 2, 3, 3, 3, 3, 4, 5, 6, 6], B)
    assert request.passes(3) == 2 + 1 + 1 + 1 + 3
    assert [request.reached(n) for n in range(9)] == [0, 0, 1, 1, 2, 2, 2, 2, 3]
    request.blocks = 1
    assert [request.reached(n) for n in range(6)] == [1, 2, 2, 2, 2, 3]
    assert request.passes(2) == 1 and request.passes(3) == 5


def test_all_ranks_stop_when_it_is_enough():
    """When the one of 5 s ends, the other rank is in its second pass of 4 s, and one block is complete."""
    short, long = recorded_request(4, [1, 1, 2, 2, 3, 3, 3, 4], B), recorded_request(4, [1] * 4 + [2] * 4, B)
    slow = [long, *(Request(4, np.arange(1, 40) * 4, B) for _ in range(3))]
    left, cost = [], Cost(measured={1: 1.0, 4: 4.0})
    ranks = roll_out(
        [deque(slow), deque([short])], 4, cost, 0, lambda *end: left.append(end), lambda: short in dict(left)
    )
    assert [(rank.passes, rank.work, rank.clock) for rank in ranks] == [(2, 8, 8.0), (5, 5, 5.0)]
    assert left[0] == (short, 2) and sorted(blocks for _, blocks in left[1:]) == [0, 0, 0, 1]


def test_where_a_part_ends():
    """The prompt's last two tokens opened the first block; a part is whole blocks of at least its limit."""
    request = recorded_request(6, [1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4], B)
    assert [request.end(limit) for limit in (0, 1, 2, 3, 6, 7, 14, 99)] == [4, 1, 1, 2, 2, 3, 4, 4]
    request.blocks = 1
    assert [request.end(limit) for limit in (0, 1, 4, 5, 99)] == [4, 2, 2, 3, 4]


def test_every_token_is_trained_on_once(tmp_path):
    lengths = DrawnLengths(100, 400, 0.8, 0.5, 2.0, B, seed=0)
    for way in (Schedule(), Schedule(partial=60), Schedule(True, 60), Schedule(True, extra=3)):
        training = schedule.Training(way, Job(2, 5, 4, 3), lengths)
        done, written = [], 0
        for _ in range(20):
            done += training.make_step()[1]
        for group in done:
            wanted = sum(request.tokens(len(request.steps)) for request in group.requests)
            assert sum(group.written.values()) == wanted
            assert max(group.written) - min(group.written) <= (6 if way.partial else 19)
            written += wanted
        assert written > 0 and len({group.number for group in done}) == len(done)
        assert way.partial or way.extra or len(done) == 80


# -------------------------------------------------------------------------- lengths and costs


def test_drawn_lengths_have_the_mean_and_the_limit():
    lengths = DrawnLengths(2000, 8192, 1.0, 0.5, 2.0, B, seed=0)
    groups = [lengths.group(n, 16) for n in range(1500)]
    tokens = np.array([[r.tokens(len(r.steps)) for r in group.requests] for group in groups])
    assert tokens.mean() == pytest.approx(2000, rel=0.04)
    assert tokens.max() == 8192 and 0.02 < (tokens == 8192).mean() < 0.05
    logs = np.log(tokens)
    assert 0.35 < logs.mean(1).var() / logs.var() < 0.65, "half of the variance is the question's"
    assert all(r.steps[-1] == 2 * len(r.steps) for r in groups[0].requests), "two steps per block: TPF 2"
    same = lengths.group(7, 16).requests
    assert [len(r.steps) for r in same] == [len(r.steps) for r in groups[7].requests]
    for between, spread in ((0.0, 1 / 16), (1.0, 1.0)):
        lengths = DrawnLengths(2000, 10**6, 1.0, between, 2.0, B, seed=0)
        drawn = [[len(r.steps) for r in lengths.group(n, 16).requests] for n in range(400)]
        assert np.log(drawn).mean(1).var() == pytest.approx(spread, rel=0.2)


def test_recorded_lengths_stay_with_their_question(tmp_path):
    one, two = [1, 1, 1, 1], [1, 1, 1, 1, 2, 2, 2, 2]
    within = write_responses(tmp_path / "a", ("a", 4, one), ("a", 4, one), ("b", 4, two), ("b", 4, two))
    single = write_responses(tmp_path / "b", ("a", 4, one), ("b", 4, two), ("c", 4, two))
    for path, mixed in ((within, False), (single, True)):
        lengths = schedule.RecordedLengths(path, B, seed=0)
        found = [{len(r.steps) for r in lengths.group(n, 8).requests} for n in range(50)]
        assert (set.union(*found), any(len(sizes) > 1 for sizes in found)) == ({1, 2}, mixed)


def test_a_measured_cost(tmp_path):
    """What benchmarks/rollout.py writes: 3 passes for 4 tokens of every request."""
    lines = [{"engine": "torch", "requests": 512, "tokens_per_second": 9}]
    for requests, seconds in ((1, 0.02), (64, 0.03), (256, 0.05)):
        rate = requests * 4 / (3 * seconds)
        lines.append({"engine": "ours", "requests": requests, "tokens_per_second": rate})
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(lines))
    cost = schedule.measured_cost(str(path), "ours", 256, 0.0)
    assert cost.seconds(1) == pytest.approx(0.02) and cost.seconds(256) == pytest.approx(0.05)
    assert cost.seconds(160) == pytest.approx(0.04), "half-way between 64 and 256"
    with pytest.raises(InputError, match=r"with \[1, 64, 256\] requests; expected up to max_batch=300"):
        schedule.measured_cost(str(path), "ours", 300, 0.0)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([1, 1, 1], "no whole blocks"),
        ([], "no whole blocks"),
        ([1, 2, 2, 2, 2, 3, 3, 3], "a step of two blocks"),
    ],
)
def test_a_step_map_of_other_blocks_is_refused(steps, reason):
    with pytest.raises(ValueError, match=reason):
        recorded_request(4, steps, B)


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/schedule.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_program_prints_a_table_and_draws(tmp_path):
    small = ["groups=4", "group_size=2", "ranks=2", "max_batch=3", "mean=60", "limit=200", "steps=3"]
    small += ["partial=[32]", "extra=[0.5]"]
    files = [tmp_path / "figure.png", tmp_path / "figures.json"]
    done = run(*small, f"picture={files[0]}", f"json={files[1]}", "vary=true")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ")]
    names = ["plain", "partial 32", "queue", "queue + partial 32", "queue + extra 2"]
    assert [row[2:] for row in rows[1:7]] == [*names, "every slot always used"]
    assert len(rows) == 7 + 1 + len(schedule.VARIED)
    assert "ASSUMED" in done.stdout and files[0].read_bytes().startswith(b"\x89PNG")
    record = json.loads(files[1].read_text())
    assert [s["name"] for s in record["schedules"]] == names
    assert record["varied"]["as above"][0] == record["schedules"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tpf=5"], "config key tpf: 5.0, expected at most block_size"),
        (["mean=9000"], "config key mean: 9000.0, expected more than 0 and less than limit=8192"),
        (["lengths=LINES"], "LINES:1: 'steps'; expected a line of rollouts.jsonl"),
        (["cost=LINES"], "LINES:1: expected what benchmarks/rollout.py --json writes"),
        (["pass_ms=0", "request_ms=0"], "config key pass_ms: 0"),
        (["picture=a.jpg"], "config key picture: a.jpg, expected a name that ends with .png"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt_tokens": 4}\n')
    done = run(*(a.replace("LINES", str(lines)) for a in arguments))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and message.replace("LINES", str(lines)) in done.stderr
