"""What test_ranks.py runs in one process and under torchrun; only the number of ranks differs.

    python -m torch.distributed.run --nproc_per_node 2 tests/rank_worker.py CASE FOLDER OUT

Every process makes the same examples and the same groups (one seeded engine); of the groups it takes
every world-th. Rank 0 writes OUT/CASE.pt: metrics, whole gradients and weights after each step.
"""

import gc
import sys
import threading
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from conftest import Trainer, rollout_of

import model
from dipo import (
    DiPOConfig,
    Group,
    accumulate_certainty,
    accumulate_gradients,
    pack_certainty,
    pack_groups,
    sample_groups,
    score_rows,
)
from masking import HOLD, Packed, noise, pack, replay
from plumbing.checkpoint import gather_into, gathered, named_weights, read_copied, save
from plumbing.config import load_config
from plumbing.gpu import LiveBytes
from plumbing.ranks import gather, start_distributed
from reward import Question
from sft import Example, SFTConfig

SETTINGS = {"lr": 1e-3, "max_grad_norm": 1e9, "steps": 10}
DECODING = {"threshold": 0.5, "max_tokens": 8}  # of the rollouts


def configured(config_class, folder: Path, out: Path, **changes):
    """A config for a checkpoint, which has sft.jsonl and rl.jsonl beside it."""
    own = {"data": folder.with_name("sft.jsonl")}
    if config_class is DiPOConfig:
        own = DECODING | {"data": folder.with_name("rl.jsonl")}
    overrides = [f"{k}={v}" for k, v in (SETTINGS | own | changes).items()]
    return load_config(config_class, [f"model={folder}", f"out={out}", *overrides])


class Case:
    """A trainer and what is recorded of its steps."""

    def __init__(self, config_class, folder, out, **changes):
        self.trainer = Trainer(configured(config_class, folder, out, **changes))
        self.record = []

    def add(self, metrics: dict, sizes: list[list[int]]) -> None:
        """Record a finished step; `sizes`: (sequences, tokens) of each of this rank's rows."""
        trainer = self.trainer
        weights = {n: gathered(t).clone() for n, t in named_weights(trainer.model)}
        self.record.append(
            {
                "metrics": metrics,
                "gradients": trainer.gradients,  # of each update
                "weights": weights,
                "sizes": gather(sizes),
                "sharded": any(hasattr(p, "placements") for p in trainer.model.parameters()),
            }
        )
        trainer.gradients = []


def examples(step: int) -> list[Example]:
    """Five of very different lengths: the ranks get unequal numbers of them, and of rows."""
    rng = np.random.default_rng(step)
    sizes = ((3, 9), (8, 8), (1, 47), (6, 2), (10, 34))
    return [Example(rng.integers(0, 250, p + r).tolist(), p) for p, r in sizes]


def run_sft(folder: Path, out: Path, resume: bool = False, **changes) -> list[dict]:
    """Two steps with a checkpoint after the first, or the second alone after resuming."""
    case = Case(SFTConfig, folder, out / "run", token_budget=60, resume=str(resume).lower(), **changes)
    trainer = case.trainer
    for step in range(trainer.step, 2):
        metrics = trainer.sft_step(list(enumerate(examples(step), start=5 * step)))
        trainer.step += 1
        if step == 0:
            trainer.folder.save(1, 5, trainer.model, trainer.optimizer)
        case.add(metrics, [])
    return case.record


def useful_groups(trainer: Trainer, count: int) -> list[Group]:
    """`count` useful groups of two rollouts, the same in every process."""
    questions = [Question(f"{i}+{i + 3}?", "0") for i in range(30)]
    asked = [(i, i) for i in range(30)]
    groups = sample_groups(
        trainer.engine(), trainer.model, trainer.tokenizer, questions, asked, trainer.config
    )
    useful = [g for g in groups if g.useful]
    assert len(useful) >= count
    return useful[:count]


def run_dipo(
    folder: Path, out: Path, likelihood: str = "exact", count: int = 3, budget: int = 1
) -> list[dict]:
    """One batch of groups, two updates. A budget of one sequence per row: a rank with fewer sequences
    than another has to keep step by rows that count nothing."""
    speed = {"rewards.accuracy": 0, "rewards.speed": 1.0, "group_size": 2, "likelihood": likelihood}
    case = Case(DiPOConfig, folder, out / "run", token_budget=budget, updates=2, **speed)
    trainer = case.trainer
    mine = useful_groups(trainer, count)[trainer.rank :: trainer.world]
    packs = pack_groups(mine, trainer.config, trainer.block_size, trainer.mask_id)
    sizes = [[len(p.source.unique()), len(p)] for p in packs]
    case.add(trainer.dipo_step(mine), sizes)
    return case.record


def run_lone(folder: Path, out: Path) -> list[dict]:
    """One useful group: with two ranks, one of them has none."""
    return run_dipo(folder, out, "tokens", count=1)


def run_certainty(folder: Path, out: Path, at: str = "first", budget: int = 1) -> list[dict]:
    """The policy gradient and the loss of certainty in one update. Of three groups of two the first has two
    right answers and the last one: two ranks find three and none, four find two, none, one and none."""
    settings = {"rewards.accuracy": 0, "rewards.speed": 1.0, "group_size": 2, "certainty": 0.7}
    case = Case(DiPOConfig, folder, out / "run", token_budget=budget, certainty_at=at, **settings)
    trainer = case.trainer
    config, sizes = trainer.config, (trainer.block_size, trainer.mask_id)
    groups = useful_groups(trainer, 3)
    mine = groups[trainer.rank :: trainer.world]
    assert pack_certainty(mine, config, *sizes) == [], "no answer is right: no rows, on any rank"
    for graded in (*groups[0].graded, groups[2].graded[0]):
        graded.correct = True
    rows = score_rows(pack_groups(mine, config, *sizes), trainer.model, None, config)
    sure = pack_certainty(mine, config, *sizes)
    accumulate_gradients(trainer.model, rows, config, first_update=True)
    metrics = {"certainty_nll": accumulate_certainty(trainer.model, sure, config)}
    metrics["grad_norm"] = trainer.optimizer_step()
    case.add(metrics, [[len(p.source.unique()), len(p)] for p in sure])
    return case.record


def private_bytes() -> int:
    """Memory of this process that is no mapped file, so not the checkpoint's pages."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return int(line.split()[1]) * 1024


def run_load(folder: Path, out: Path, file_bytes: int = 20_000) -> dict:
    """Load `folder` as training does, score a row, save it again in files of about `file_bytes`."""
    config = configured(SFTConfig, folder, out)
    rank, world, device = start_distributed()
    stop, peak, before = threading.Event(), [0], private_bytes()

    def watch() -> None:
        while not stop.wait(0.001):
            peak[0] = max(peak[0], private_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    network = model.load_for_training(folder, device, config)
    stop.set()
    thread.join()
    record = {"peak": gather(peak[0] - before)}
    if file_bytes:
        views = [replay(rollout_of(list(range(5, 11)), list(range(20, 30))), 4, 1.0)]
        packed = pack(views, 4, 260, 1000)[0]
        record["logprobs"] = network.score(packed, model.Sampling()).logprobs.detach()
        record["buffers"] = {n: b.cpu() for n, b in network.named_buffers()}
        record["weights"] = {n: gathered(p.detach()).clone() for n, p in network.named_parameters()}
        record["sent"], record["extra"] = {}, {}
        for name, tensor in named_weights(network):
            place = torch.empty(tensor.shape, dtype=torch.bfloat16)
            with LiveBytes() as live:
                gather_into(place, tensor)
            record["sent"][name], record["extra"][name] = place, live.peak / place.nbytes
        save(network, out, read_copied(folder), rank, world, file_bytes)
    return record


def held_row() -> Packed:
    """Every action a hold, with bounds among the many unlikely tokens: rounding one moves it past some."""
    rng = np.random.default_rng(0)
    views = [noise(rng.integers(0, 250, 40).tolist(), 5, 4, rng, "block")]
    row = pack(views, 4, 260, 1000)[0]
    row.targets[:] = HOLD
    row.bounds = torch.linspace(-12, -4, len(row.bounds))
    return row


def run_holds(folder: Path, out: Path) -> torch.Tensor:
    """Their log-probabilities as training in bfloat16 scores them."""
    config = configured(SFTConfig, folder, out, dtype="bfloat16")
    network = model.load_for_training(folder, start_distributed()[2], config)
    return network.score(held_row(), model.Sampling()).logprobs.detach()


FRUGAL = {"cpu_offload": "true", "checkpointing": "full", "reduce_once": "false"}

CASES = {
    "frugal": lambda folder, out: run_sft(folder, out, **FRUGAL),
    "holds": run_holds,
    "resume": lambda folder, out: run_sft(folder, out, resume=True),
    "load-tied": lambda folder, out: run_load(folder.with_name("tied"), out),
    "load-moe": lambda folder, out: run_load(folder.with_name("moe"), out),
    "load-large": lambda folder, out: run_load(folder.with_name("large"), out, file_bytes=0),
    "sft": run_sft,
    "exact": run_dipo,
    "tokens": lambda folder, out: run_dipo(folder, out, "tokens"),
    "lone": run_lone,
    "certainty": run_certainty,
    "certainty-noise": lambda folder, out: run_certainty(folder, out, "noise", budget=100_000),
}


def main(names: str, folder: str, out: str) -> None:
    """Run the named cases (separated by commas) and write what they recorded."""
    torch.set_num_threads(1)
    for name in names.split(","):
        record = CASES[name](Path(folder), Path(out) / name)
        if not dist.is_initialized() or dist.get_rank() == 0:
            torch.save(record, Path(out) / f"{name}.pt")
    if dist.is_initialized():
        gc.collect()  # what still refers to the process group in a cycle would abort the exit
        dist.barrier()  # no rank leaves while the other may still talk to it
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
