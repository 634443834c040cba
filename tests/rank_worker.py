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

import model
import sft
from dipo import DiPOConfig, Group, is_useful, pack_groups, sample_groups, update_policy
from evaluate import Question, load_config
from masking import pack, replay
from rollout import Decoding, Rollout
from sft import Example, Run, SFTConfig, sft_step

HOW = Decoding(rule="dynamic", threshold=0.5, max_tokens=8)
SETTINGS = {"lr": 1e-3, "max_grad_norm": 1e9, "steps": 10}


class Case:
    """A run that keeps its gradients; `packs` are the rows of every rank in the last step."""

    def __init__(self, config_class, folder, out, **changes):
        overrides = [f"{k}={v}" for k, v in (SETTINGS | changes).items()]
        self.config = load_config(config_class, [f"model={folder}", f"out={out}", *overrides])
        self.run = Run(self.config)
        self.record, self.gradients = [], []

        def keep(*_):
            named = self.run.model.named_parameters()
            self.gradients.append({n: sft.full(p.grad.detach()).clone() for n, p in named})

        self.run.optimizer.register_step_pre_hook(keep)

    def add(self, metrics: dict, sizes: list[list[int]]) -> None:
        """Record a finished step; `sizes`: (sequences, tokens) of each of this rank's rows."""
        per_rank = [sizes]
        if self.run.world > 1:
            per_rank = [None] * self.run.world
            dist.all_gather_object(per_rank, sizes)
        weights = {n: t.detach().clone() for n, t in self.run.named_weights()}
        self.record.append(
            {
                "metrics": metrics,
                "gradients": self.gradients,  # of each update
                "weights": weights,
                "sizes": per_rank,
                "sharded": any(hasattr(p, "placements") for p in self.run.model.parameters()),
            }
        )
        self.gradients = []


def examples(step: int) -> list[Example]:
    """Five of very different lengths: the ranks get unequal numbers of them, and of rows."""
    rng = np.random.default_rng(step)
    sizes = ((3, 9), (8, 8), (1, 47), (6, 2), (10, 34))
    return [Example(rng.integers(0, 250, p + r).tolist(), p) for p, r in sizes]


def run_sft(folder: Path, out: Path, resume: bool = False, **changes) -> list[dict]:
    """Two steps with a checkpoint after the first, or the second alone after resuming."""
    case = Case(SFTConfig, folder, out / "run", token_budget=60, resume=str(resume).lower(), **changes)
    for step in range(case.run.step, 2):
        batch = examples(step)
        metrics = sft_step(case.run, case.config, batch, [5 * step + i for i in range(5)])
        case.run.step += 1
        case.run.cursor += 5
        if step == 0:
            case.run.save()
        case.add(metrics, [])
    return case.record


def make_groups(case: Case, folder: Path, count: int) -> list[Group]:
    """`count` useful groups of two rollouts, the same in every process."""
    engine = case.run.make_engine()
    questions = [Question(f"{i}+{i + 3}?", "0") for i in range(30)]
    numbers = [(i, i) for i in range(30)]
    groups = sample_groups(case.run, engine, questions, numbers, case.config, HOW)
    useful = [g for g in groups if is_useful(g, case.config)]
    assert len(useful) >= count
    return useful[:count]


def run_dipo(
    folder: Path, out: Path, likelihood: str = "exact", count: int = 3, budget: int = 1
) -> list[dict]:
    """One batch of groups, two updates. A budget of one sequence per row: a rank with fewer sequences
    than another has to keep step by rows that count nothing."""
    speed = {"rewards.accuracy": 0, "rewards.speed": 1.0, "group_size": 2, "likelihood": likelihood}
    case = Case(DiPOConfig, folder, out / "run", token_budget=budget, updates=2, **speed)
    mine = make_groups(case, folder, count)[case.run.rank :: case.run.world]
    packs = pack_groups(case.run, mine, case.config)[0]
    sizes = [[len(p.trajectory.unique()), len(p)] for p in packs]
    case.add(update_policy(case.run, mine, case.config, HOW), sizes)
    return case.record


def run_lone(folder: Path, out: Path) -> list[dict]:
    """One useful group: with two ranks, one of them has none."""
    return run_dipo(folder, out, "tokens", count=1)


def private_bytes() -> int:
    """Memory of this process that is no mapped file, so not the checkpoint's pages."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return int(line.split()[1]) * 1024


def run_load(folder: Path, out: Path, file_bytes: int = 20_000) -> dict:
    """Load FOLDER as training does, score a row, save it again in files of about `file_bytes`."""
    config = load_config(SFTConfig, [f"model={folder}", f"out={out}"])
    rank, world, device = sft.start_distributed()
    stop, peak, before = threading.Event(), [0], private_bytes()

    def watch() -> None:
        while not stop.wait(0.001):
            peak[0] = max(peak[0], private_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    network = sft.load_for_training(str(folder), world, device, config)
    stop.set()
    thread.join()
    record = {"peak": [peak[0] - before]}
    if world > 1:
        record["peak"] = [0] * world
        dist.all_gather_object(record["peak"], peak[0] - before)
    if file_bytes:
        rows = [replay(Rollout.of(list(range(5, 11)), list(range(20, 30))), 4, 1.0)]
        packed = pack(rows, 4, 260, 1000)[0]
        record["logprobs"] = network.score(packed, model.Sampling()).logprobs.detach()
        record["buffers"] = {n: b.cpu() for n, b in network.named_buffers()}
        record["weights"] = {n: model.full(p.detach()).clone() for n, p in network.named_parameters()}
        model.save(network, out, folder, rank, world, file_bytes)
    return record


FRUGAL = {"cpu_offload": "true", "checkpointing": "full", "reduce_once": "false"}

CASES = {
    "frugal": lambda folder, out: run_sft(folder, out, **FRUGAL),
    "resume": lambda folder, out: run_sft(folder, out, resume=True),
    "load-tied": lambda folder, out: run_load(folder.with_name("tied"), out),
    "load-moe": lambda folder, out: run_load(folder.with_name("moe"), out),
    "load-large": lambda folder, out: run_load(folder.with_name("large"), out, file_bytes=0),
    "sft": run_sft,
    "exact": run_dipo,
    "tokens": lambda folder, out: run_dipo(folder, out, "tokens"),
    "lone": run_lone,
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
