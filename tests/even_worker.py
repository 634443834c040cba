"""What test_even_ranks.py runs under torchrun, and in one process.

    python -m torch.distributed.run --nproc_per_node 2 tests/even_worker.py CASE FOLDER OUT

Every rank writes OUT/CASE-RANK.pt.
"""

import gc
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dipo import DiPOConfig, collect_groups, sample_groups
from model import load
from plumbing import common
from plumbing.checkpoint import load_tokenizer
from plumbing.common import DataOrder
from plumbing.config import load_config
from plumbing.open_groups import grow_older
from plumbing.queue import Request, SharedQueue
from plumbing.ranks import barrier, rank_and_world, start_distributed
from reward import Question
from rollout import Decoding, TorchEngine, generate_all

QUESTIONS = [Question(f"{i}+{i + 3}?", "0") for i in range(30)]
STOPS = list(range(0, 256, 9))  # many, so that answers end everywhere
ROOM = 3


def make_engine(folder: Path, tokenizer, room: int = ROOM) -> TorchEngine:
    """The embedded engine, counting its passes."""
    return counting_passes(TorchEngine(load(str(folder)), 4, tokenizer.mask_token_id, STOPS, room))


def counting_passes(engine: TorchEngine) -> TorchEngine:
    """The engine, whose `passes` then has the number of requests of every forward pass."""
    decode, engine.passes = engine.model.decode, []

    def counted(ids, *arguments):
        engine.passes.append(len(ids))
        return decode(ids, *arguments)

    engine.model.decode = counted
    return engine


def queue_of(count: int, room: int = ROOM) -> SharedQueue:
    """A queue of requests with the seeds 0, 1, ..., every world-th of them this rank's."""
    rank, world = rank_and_world()
    return SharedQueue([Request(i, i, [], None) for i in range(rank, count, world)], room)


def configured(folder: Path, **changes) -> DiPOConfig:
    fields = {"model": folder, "data": folder.with_name("rl.jsonl"), "threshold": 0.5, "max_tokens": 40}
    fields |= {"rewards.accuracy": 0.0, "rewards.speed": 1.0, "groups": 5, "group_size": 4} | changes
    return load_config(DiPOConfig, [f"{name}={value}" for name, value in fields.items()])


def run_collect(folder: Path, even: bool) -> dict:
    """Two rounds at most of collect_groups: this rank's groups, the figures over all, and its passes."""
    tokenizer = load_tokenizer(str(folder))
    engine = make_engine(folder, tokenizer)
    config = configured(folder, even_ranks=str(even).lower(), max_rounds=2, groups=7)
    order = DataOrder(len(QUESTIONS), 0)
    groups, metrics = collect_groups(engine, engine.model, tokenizer, QUESTIONS, order, config, [])
    return {"groups": groups, "metrics": metrics, "passes": engine.passes}


def run_partial(folder: Path, even: bool) -> list[dict]:
    """Four steps whose rollouts stop after 12 tokens, and go on in the next one."""
    tokenizer = load_tokenizer(str(folder))
    engine = make_engine(folder, tokenizer)
    config = configured(folder, even_ranks=str(even).lower(), partial_tokens=12)
    order, open_groups, steps = DataOrder(len(QUESTIONS), 0), [], []
    for _ in range(4):
        parts = (engine, engine.model, tokenizer, QUESTIONS, order, config, open_groups)
        groups, metrics = collect_groups(*parts)
        metrics |= grow_older(open_groups, 1, 0)
        waiting = [(group.number, group.unfinished) for group in open_groups]
        steps.append({"groups": groups, "metrics": metrics, "open": waiting})
    return steps


def run_slow(folder: Path) -> dict:
    """Rank 1 makes no pass before the queue is empty."""
    tokenizer, store = load_tokenizer(str(folder)), dist.distributed_c10d._get_default_store()
    rank, _ = rank_and_world()
    engine = make_engine(folder, tokenizer)
    decode = engine.model.decode

    def waiting(*arguments):
        store.get("empty")  # waits until it is there
        return decode(*arguments)

    def take() -> int | None:
        number = queue_take()
        if number is None and rank == 0:
            store.set("empty", "yes")
        return number

    if rank == 1:
        engine.model.decode = waiting
    queue = queue_of(20)
    queue_take, queue.take = queue.take, take
    prompts = [tokenizer.encode(f"question {i}") for i in range(20)]
    rollouts = generate_all(engine, prompts, list(range(20)), Decoding(max_tokens=24), queue=queue)
    made = [i for i, r in enumerate(rollouts) if r is not None]
    return {"taken": list(queue.taken), "made": made, "seeds": [r.seed for r in queue.requests]}


def run_paced(folder: Path, pace: bool = True) -> dict:
    """40 rollouts by a queue and dealt in advance. With `pace` a pass takes as long as schedule.Cost(1, 0.25)
    says, on a clock that all ranks share: of two passes the one that ends first is made first."""
    tokenizer, (rank, world) = load_tokenizer(str(folder)), rank_and_world()
    store, records = dist.distributed_c10d._get_default_store(), {}
    prompts = [tokenizer.encode(f"question {i}") for i in range(40)]
    for name in ("queue", "plain"):
        engine, ends = make_engine(folder, tokenizer), [0.0]
        decode = engine.model.decode

        def paced(ids, *arguments):
            ends.append(ends[-1] + 1 + 0.25 * len(ids))  # noqa: B023
            store.set(f"{name} {rank}", str(ends[-1]))  # noqa: B023
            others = [f"{name} {other}" for other in range(world) if other != rank]  # noqa: B023
            behind = [other < f"{name} {rank}" for other in others]  # noqa: B023
            for other, first in zip(others, behind, strict=True):
                while (end := float(store.get(other))) < ends[-1] or (end == ends[-1] and first):  # noqa: B023
                    time.sleep(0.0005)
            return decode(ids, *arguments)  # noqa: B023

        if pace:
            engine.model.decode = paced
        how, queue = Decoding(threshold=0.4, max_tokens=60), queue_of(40)
        mine = range(40) if name == "queue" else range(rank, 40, world)
        barrier()
        rollouts = engine.generate(
            [prompts[i] for i in mine], list(mine), how, take=queue.take if name == "queue" else None
        )
        store.set(f"{name} {rank}", "inf")
        barrier()
        maps = {r.seed: (len(r.prompt_ids), r.steps) for r in rollouts if r is not None}
        records[name] = {"maps": maps, "passes": engine.passes, "clock": ends[-1]}
    return records


def run_dies(folder: Path) -> None:
    """Rank 1 ends in the middle of its rollouts."""
    tokenizer, rank = load_tokenizer(str(folder)), rank_and_world()[0]
    engine = make_engine(folder, tokenizer)
    config = configured(folder, even_ranks="true")
    decode = engine.model.decode

    def dying(*arguments):
        if len(engine.passes) == 5:
            os._exit(3)
        return decode(*arguments)

    if rank == 1:
        engine.model.decode = dying
    sample_groups(engine, engine.model, tokenizer, QUESTIONS, [(i, i) for i in range(6)], config)


CASES = {
    "even": lambda folder: run_collect(folder, True),
    "plain": lambda folder: run_collect(folder, False),
    "partial-even": lambda folder: run_partial(folder, True),
    "partial-plain": lambda folder: run_partial(folder, False),
    "slow": run_slow,
    "paced": run_paced,
    "unpaced": lambda folder: run_paced(folder, pace=False),
    "dies": run_dies,
}


def main(names: str, folder: str, out: str) -> None:
    """Run the named cases (separated by commas)."""
    torch.set_num_threads(1)
    start_distributed("gloo")
    for name in names.split(","):
        torch.save(CASES[name](Path(folder)), Path(out) / f"{name}-{rank_and_world()[0]}.pt")
    if dist.is_initialized():
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    common.PATIENCE = 0.1
    common.run_script(main, *sys.argv[1:])
