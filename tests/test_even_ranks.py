"""Ranks that take requests from one queue, against ranks that get them in advance: the same rollouts.

even_worker.py runs the cases in processes over gloo. Which rank makes which rollout depends on how fast they
are; nothing else does, up to the rounding of batches of another composition.
"""

import os
import subprocess
import sys
import threading
from collections import deque

import even_worker
import pytest
import schedule
import torch
from conftest import TINY
from data_rows import write_task
from even_worker import QUESTIONS, ROOM, configured, make_engine, queue_of, run_collect

import dipo
from plumbing.checkpoint import load_tokenizer, tiny
from plumbing.common import ROOT
from plumbing.queue import Ahead
from rollout import Decoding, Rollout, generate_all

HANG_GUARD = 240.0  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("even")
    write_task(place)
    return tiny(place / "tiny", **TINY)


def on_ranks(zygote, ranks: int, names: str, folder, out) -> dict[str, list]:
    """What every rank recorded of each case."""
    script = even_worker.__file__
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, names, str(folder), str(out)]
    done = zygote.torchrun(ranks, command, env=env, timeout=HANG_GUARD)
    assert done.returncode == 0, done.stderr[-8000:]
    files = {name: [out / f"{name}-{rank}.pt" for rank in range(ranks)] for name in names.split(",")}
    return {name: [torch.load(f, weights_only=False) for f in of] for name, of in files.items()}


def rollouts_of(record: dict) -> dict[int, Rollout]:
    return {g.rollout.seed: g.rollout for group in record["groups"] for g in group.graded}


def as_shown(rollout: Rollout) -> tuple:
    return rollout.prompt_ids, rollout.response_ids, rollout.steps, rollout.num_tokens, rollout.finish_reason


def as_records(group) -> tuple:
    verdicts = [(g.rollout.seed, as_shown(g.rollout), g.text, g.answer, g.correct) for g in group.graded]
    return group.number, verdicts, group.rewards, group.advantages, group.useful


# ------------------------------------------------------------------------------- one process


def test_a_process_alone_computes_the_same_bit_for_bit(folder):
    even, plain = run_collect(folder, True), run_collect(folder, False)
    assert even["passes"] == plain["passes"] and len(plain["passes"]) > 50
    assert even["metrics"] == plain["metrics"]
    assert even["groups"] == plain["groups"], "log-probabilities too"
    assert len({len(r.response_ids) for r in rollouts_of(plain).values()}) > 4


def test_a_queue_gives_each_number_once_and_again_what_came_to_nothing():
    queue = queue_of(5, room=2)
    assert [queue.take() for _ in range(3)] == [0, 1, 2]
    queue.put_back([0, 2])
    assert [queue.take() for _ in range(6)] == [0, 2, 3, 4, None, None]
    assert list(queue.taken) == [0, 1, 2, 3, 4]
    queue.put_back([3])
    assert [queue.take(), queue.take()] == [3, None]
    other = queue_of(2, room=9)
    assert [other.take() for _ in range(3)] == [0, 1, None]


class Forgetful:
    """The embedded engine, whose first calls end early: they take `most` requests and lose the last one.

    As a subprocess that dies, and is started again with weights that are not the trainer's.
    """

    def __init__(self, engine, most: list[int]):
        self.engine, self.most, self.updates = engine, most, 0
        self.max_batch = engine.max_batch

    def generate(self, prompts, seeds, how, done, begun, take):
        if not self.most:
            return self.engine.generate(prompts, seeds, how, done, begun, take)
        left, lost = [self.most.pop(0)], []

        def few() -> int | None:
            if not left[0]:
                return None
            left[0] -= 1
            number = take()
            if not left[0]:
                lost.append(number)
            return number

        def unless_lost(rollout) -> None:
            if seeds.index(rollout.seed) not in lost:
                done(rollout)

        rollouts = self.engine.generate(prompts, seeds, how, unless_lost, begun, few)
        for i in lost:
            rollouts[i] = None
        return rollouts

    def update_weights(self, tensors) -> None:
        self.updates += 1

    def sleep(self) -> int:
        return 0

    def wake(self) -> None:
        pass


@pytest.mark.parametrize("most", [[0], [5], [1, 4, 2], [0, 0, 7]])
def test_an_engine_that_dies_loses_no_request(folder, most):
    tokenizer = load_tokenizer(str(folder))
    engine, how = make_engine(folder, tokenizer), Decoding(max_tokens=24)
    prompts, seeds = [tokenizer.encode(f"question {i}") for i in range(11)], list(range(30, 41))
    expected = generate_all(engine, prompts, seeds, how)
    ended, queue = [], queue_of(11)
    forgetful = Forgetful(engine, list(most))
    rollouts = generate_all(forgetful, prompts, seeds, how, ended.append, lambda: iter(()), queue=queue)
    assert [as_shown(r) for r in rollouts] == [as_shown(r) for r in expected]
    assert sorted(r.seed for r in ended) == seeds, "one lost, or done twice"
    assert forgetful.updates == len(most)


def test_answers_are_graded_while_others_are_generated(folder, monkeypatch):
    """No pass is made between the end of the first rollout and its verdict; others end after it."""
    tokenizer, events, graded = load_tokenizer(str(folder)), [], threading.Event()
    engine = make_engine(folder, tokenizer)
    decode, grade = engine.model.decode, dipo.grade

    def decode_when_graded(*arguments):
        if "ended" in events:
            assert graded.wait(HANG_GUARD)
        return decode(*arguments)

    def grade_and_say(rollouts, *arguments):
        found = grade(rollouts, *arguments)
        events.extend(["graded"] * len(rollouts))
        graded.set()
        return found

    def generate_and_say(engine, prompts, seeds, how, done, *more):
        def ended(rollout) -> None:
            events.append("ended")
            done(rollout)

        return generate_all(engine, prompts, seeds, how, ended, *more)

    engine.model.decode = decode_when_graded
    monkeypatch.setattr(dipo, "grade", grade_and_say)
    monkeypatch.setattr(dipo, "generate_all", generate_and_say)
    asked = [(i, i) for i in range(3)]
    groups = dipo.sample_groups(engine, engine.model, tokenizer, QUESTIONS, asked, configured(folder))
    assert events.count("ended") == events.count("graded") == 12 == sum(len(g.graded) for g in groups)
    last = len(events) - 1 - events[::-1].index("ended")
    assert events.index("graded") < last


def test_what_waits_is_looked_at_together_and_errors_come_out():
    gate, calls = threading.Event(), []

    def look(items):
        calls.append(items)
        assert gate.wait(HANG_GUARD)
        return [10 * item for item in items]

    ahead = Ahead(look)
    for number in range(5):
        ahead.add(f"item {number}", number)
        while number == 0 and not calls:
            pass
    gate.set()
    assert ahead.results() == {f"item {number}": 10 * number for number in range(5)}
    assert calls == [[0], [1, 2, 3, 4]]

    ahead = Ahead(lambda items: [1 / item for item in items])
    ahead.add("a", 0)
    with pytest.raises(ZeroDivisionError):
        ahead.results()
    assert Ahead(look).results() == {}


# --------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_same_groups_whoever_made_them(folder, tmp_path, zygote, ranks):
    records = on_ranks(zygote, ranks, "even,plain", folder, tmp_path)
    alone = rollouts_of(run_collect(folder, False))
    for even, plain in zip(records["even"], records["plain"], strict=True):
        assert list(map(as_records, even["groups"])) == list(map(as_records, plain["groups"]))
        assert even["metrics"] == plain["metrics"]
        logprobs = {seed: r.logprobs for seed, r in rollouts_of(plain).items()}
        for seed, rollout in rollouts_of(even).items():
            assert rollout.logprobs == pytest.approx(logprobs[seed], abs=1e-4)
            assert as_shown(rollout) == as_shown(alone[seed])
    found = [seed for record in records["even"] for seed in rollouts_of(record)]
    assert sorted(found) == sorted(alone)
    assert sum(map(sum, (r["passes"] for r in records["even"]))) == sum(
        map(sum, (r["passes"] for r in records["plain"]))
    ), "the same work, dealt out otherwise"


def test_partial_rollouts_go_on_at_any_rank(folder, tmp_path, zygote):
    """Step by step the same groups end, on the same ranks, and the same ones stay open."""
    names = ("partial-even", "partial-plain")
    records = on_ranks(zygote, 2, ",".join(names), folder, tmp_path)
    for even, plain in zip(*(records[name] for name in names), strict=True):
        for one, other in zip(even, plain, strict=True):
            assert list(map(as_records, one["groups"])) == list(map(as_records, other["groups"]))
            assert one["metrics"] == other["metrics"] and one["open"] == other["open"]
            ages = [[r.ages for r in rollouts_of(step).values()] for step in (one, other)]
            assert ages[0] == ages[1]
        assert sum(bool(step["open"]) for step in even) >= 2, "some go on"
        assert any(max(r.ages, default=0) > 0 for step in even for r in rollouts_of(step).values())


def test_a_slow_rank_takes_fewer(folder, tmp_path, zygote):
    first, second = on_ranks(zygote, 2, "slow", folder, tmp_path)["slow"]
    assert first["seeds"] == second["seeds"] == list(range(20)), "one order on all ranks: older ones first"
    assert second["taken"] == [1, 3, 5], "what it began with"
    assert first["taken"] == [0, 2, 4, *range(6, 20)]
    assert (first["made"], second["made"]) == (first["taken"], second["taken"])


@pytest.mark.parametrize("ranks", [2, 3])
def test_forward_passes_are_those_of_the_simulator(folder, tmp_path, zygote, ranks):
    """On one clock for all ranks, where a pass of n requests takes 1 + n / 4."""
    records = on_ranks(zygote, ranks, "paced", folder, tmp_path)["paced"]
    slowest = {}
    for name in ("queue", "plain"):
        maps = {}
        for record in records:
            maps |= record[name]["maps"]
        assert sorted(maps) == list(range(40))
        requests = [schedule.recorded_request(*maps[i], 4) for i in range(40)]
        queues = [deque(requests)] * ranks
        if name == "plain":
            queues = [deque(requests[rank::ranks]) for rank in range(ranks)]
        simulated = schedule.roll_out(queues, ROOM, schedule.Cost(1.0, 0.25))
        found = [record[name] for record in records]
        assert [len(r["passes"]) for r in found] == [rank.passes for rank in simulated]
        assert [sum(r["passes"]) for r in found] == [rank.work for rank in simulated]
        assert [r["clock"] for r in found] == pytest.approx([rank.clock for rank in simulated])
        slowest[name] = max(len(r["passes"]) for r in found)
    print(f"{ranks} ranks, passes of the slowest: {slowest}")
    assert slowest["queue"] < slowest["plain"]


def test_a_rank_that_dies_ends_the_others(folder, tmp_path):
    """Without a launcher that would end them: each in one line, by itself."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": store.host,
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    command = [sys.executable, even_worker.__file__, "dies", str(folder), str(tmp_path)]
    ranks = []
    for rank in ("0", "1"):
        own = env | {"RANK": rank, "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen(command, env=own, stderr=subprocess.PIPE, text=True))
    try:
        (_, said), (_, nothing) = (process.communicate(timeout=HANG_GUARD) for process in ranks)
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [2, 3]
    assert "another rank has ended" in said and said.count("\n") == 1
    assert nothing == ""
