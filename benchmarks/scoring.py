"""Scoring: seconds, peak memory and error of the LM head with its softmax, side by side.

    model       ScoreChunks of plumbing/kernels.py: log-probability of reveals, entropy; gradients written out
    + holds     the same with every other action a hold: its held mass is scored too
    plain       all logits at once, score_logits under autograd
    torch       torch.nn.functional.linear_cross_entropy (torch 2.13): cross-entropy only, no entropy
    liger       Liger's fused linear cross-entropy, where it is installed and CUDA is there: the same

One pass is the loss, a weighted sum of the M log-probabilities, and its backward pass. The weights are
those of an SFT batch; torch and Liger get them as they can: torch by reduction="none", Liger cannot.
Peak memory is what is allocated on top of hidden states, head and *their gradients*, which every way has
to return. On the CPU it is summed from the allocator's own events, on CUDA read from it.
Error: relative, gradient of the head and of the hidden states, to float32 logits under autograd.

    python benchmarks/scoring.py                                # small on the CPU, real on CUDA
    python benchmarks/scoring.py scored=8192 vocab=151936 hidden=4096 dtype=bfloat16
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from masking import HOLD
from model import LOG_FLOOR, Sampling, score_logits
from plumbing.kernels import ScoreChunks

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = {"scored": 1024, "vocab": 16384, "hidden": 64, "dtype": "bfloat16", "repeats": 3}
REAL = {"scored": 8192, "vocab": 151936, "hidden": 4096, "dtype": "bfloat16", "repeats": 5}


class Problem:
    """Hidden states [M, H], head [V, H], targets and weights [M], half of the targets holds if asked."""

    def __init__(self, scored: int, vocab: int, hidden: int, dtype: torch.dtype, device: str):
        generator = torch.Generator(device).manual_seed(0)
        normal = {"generator": generator, "device": device}
        self.hidden = torch.randn(scored, hidden, **normal).to(dtype).requires_grad_(True)
        self.head = (torch.randn(vocab, hidden, **normal) / hidden**0.5).to(dtype).requires_grad_(True)
        self.targets = torch.randint(0, vocab, (scored,), **normal)
        self.bounds = torch.rand(scored, **normal).log()
        self.weights = torch.rand(scored, **normal)
        self.some_held = torch.where(torch.arange(scored, device=device) % 2 == 0, self.targets, HOLD)

    def model(self, targets: torch.Tensor) -> torch.Tensor:
        logprobs, _ = ScoreChunks.apply(self.hidden, self.head, targets, self.bounds, 1.0, LOG_FLOOR)
        return -(self.weights * logprobs).sum()

    def plain(self, targets: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        hidden, head = (t.to(dtype or t.dtype) for t in (self.hidden, self.head))
        logprobs = score_logits(hidden @ head.T, targets, self.bounds, Sampling()).logprobs
        return -(self.weights * logprobs).sum()

    def torch(self) -> torch.Tensor:
        losses = F.linear_cross_entropy(
            self.hidden, self.head, self.targets, reduction="none",
            options=torch.nn.LinearCrossEntropyOptions(),
        )  # fmt: skip
        return (self.weights * losses).sum()

    def liger(self) -> torch.Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss(reduction="sum")(self.head, self.hidden, self.targets)

    def sides(self) -> dict[str, Callable[[], torch.Tensor]]:
        """What can run here, by name."""
        found = {
            "model": lambda: self.model(self.targets),
            "model + holds": lambda: self.model(self.some_held),
            "plain": lambda: self.plain(self.targets),
            "plain + holds": lambda: self.plain(self.some_held),
        }
        if hasattr(F, "linear_cross_entropy"):
            found["torch"] = self.torch
        if self.hidden.is_cuda and importlib.util.find_spec("liger_kernel"):
            found["liger"] = self.liger
        return found

    def gradients(self, loss: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        self.hidden.grad = self.head.grad = None
        loss().backward()
        return [self.hidden.grad, self.head.grad]


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """Most bytes that `run` had allocated at one time."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def seconds(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(scored: int, vocab: int, hidden: int, dtype: str, repeats: int) -> dict[str, dict[str, float]]:
    """For every side: seconds, peak extra MiB, relative error of the gradients of hidden states and head."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = Problem(scored, vocab, hidden, getattr(torch, dtype), device)
    results = problem.hidden.nbytes + problem.head.nbytes
    sides, table = problem.sides(), {}
    truth = {}
    for name, loss in sides.items():
        targets = problem.some_held if "holds" in name else problem.targets
        held = "holds" in name
        if held not in truth and scored * vocab <= 2**27:
            found = problem.gradients(lambda t=targets: problem.plain(t, torch.float32))
            truth[held] = [g.float() for g in found]
        problem.gradients(loss)  # warm-up: compiles
        problem.hidden.grad = problem.head.grad = None
        table[name] = {"MiB": (peak_bytes(lambda f=loss: problem.gradients(f), device) - results) / 2**20}
        if held in truth and name != "liger":
            found = [problem.hidden.grad, problem.head.grad]
            for what, a, b in zip(("hidden", "head"), found, truth[held], strict=True):
                table[name][what] = float((a.float() - b).norm() / b.norm())
    times = {name: [] for name in sides}
    for _ in range(repeats):  # the sides take turns, so that none has the quiet machine for itself
        for name, loss in sides.items():
            times[name].append(seconds(lambda f=loss: problem.gradients(f), device))
    for name, t in times.items():
        table[name]["seconds"] = statistics.median(t)
    return table


def main(arguments: list[str]) -> None:
    """Print the table."""
    sizes = dict(REAL if torch.cuda.is_available() else SMALL)
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in sizes:
            raise SystemExit(f"{argument}: expected one of {', '.join(sizes)}, as name=value")
        sizes[name] = value if name == "dtype" else int(value)
    table = measure(**sizes)
    print("| side | seconds | of plain | peak extra MiB | error, hidden | error, head |")
    print("|---" * 6 + "|")
    for name, row in table.items():
        plain = table["plain + holds" if "holds" in name else "plain"]["seconds"]
        errors = [f"{row[k]:.1e}" if k in row else "-" for k in ("hidden", "head")]
        cells = [
            name,
            f"{row['seconds']:.3f}",
            f"{row['seconds'] / plain:.2f}",
            f"{row['MiB']:,.0f}",
            *errors,
        ]
        print("|", " | ".join(cells), "|")
    where = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"\n{where}, torch {torch.__version__}, {sizes}")


if __name__ == "__main__":
    main(sys.argv[1:])
