"""A training step in the published layout and in ours: tokens, FLOPs, seconds, memory, same gradients.

Both sides take the same trajectories, network, weights, optimizer and code (`model.score`). Published:
rounds of [noisy | clean] (layout.py), B of them per trajectory with a forward and backward pass each,
unpadded or padded to the longest allowed length as in DiRL. Ours: rows packed under a token budget
(masking.py). Before anything is timed, the gradients of every side are held against those of the
unpadded rounds; where they differ the benchmark refuses to go on.

On a CPU the rounds are timed with the plain 2L x 2L mask (`dense`) and with the attention of the packed
rows (`joint`), so that what the layout saves is told apart from what the attention saves. `B rounds a
batch` keeps the graphs of all rounds of a trajectory until its backward pass, as a packed row does.

    python benchmarks/train_step.py                   # CPU: a small network, 126 + 898 tokens
    python benchmarks/train_step.py --device cuda     # 1.7B, 4B, 8B in bfloat16, 1024 + 8192 tokens
    python benchmarks/train_step.py --rollouts runs/dipo/rollouts.jsonl    # lengths of your own run

TFLOP and utilisation are model FLOPs: no recomputation, only visible pairs (forward_backward_flops);
`done` is what torch's counter saw over that. Peak memory includes weights, gradients and moments.
"""

from __future__ import annotations

import dataclasses
import gc
import platform
import statistics
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters
from torch.utils import flop_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import memory
from layout import log_normal, random_trajectory, read_rollouts, rounds

import model as sdar
from masking import Packed, block_mask, pack, replay
from plumbing import gpu
from plumbing.checkpoint import gathered
from plumbing.common import InputError, run_script, write_json
from plumbing.config import Parser
from plumbing.kernels import checkpoint_layers, compile_layers
from plumbing.ranks import shard
from rollout import Rollout

DEFAULTS = {
    "cpu": {"shape": ["small"], "prompt": 126, "response": 898, "trajectories": 64}
    | {"token_budget": 4096, "repeats": 3},
    "cuda": {"shape": ["1.7B", "4B", "8B"], "prompt": 1024, "response": 8192, "trajectories": 4}
    | {"token_budget": 32768, "repeats": 1},
}
PEAK_FLOPS = 989e12  # per second, of an H100 or H200 in dense bfloat16
# Largest relative difference of gradients. In bfloat16, 28 layers differ by about 0.01 from rounding alone.
TOLERANCE = {"cpu": 1e-4, "cuda": 0.05}
SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch's counter knows CUDA's only
SDPA_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
CPU_ATTENTION = {
    SDPA: lambda *shapes, **_: flop_counter.sdpa_flop_count(*shapes[:3]),
    SDPA_BACKWARD: lambda *shapes, **_: flop_counter.sdpa_backward_flop_count(*shapes[:4]),
}
COLUMNS = {  # of the table: heading and format
    "case": ("case", ""),
    "side": ("layout", ""),
    "attention": ("attention", ""),
    "tokens": ("tokens", ","),
    "tflop": ("TFLOP", ".3g"),
    "flop_done": ("done", ".2f"),
    "seconds": ("seconds", ".3f"),
    "seconds_ratio": ("x", ".2f"),
    "peak_gib": ("peak GiB", ".3f"),
    "peak_ratio": ("x", ".2f"),
    "tokens_per_second": ("trained tokens/s", ",.0f"),
    "utilisation": ("utilisation", ".0%"),
    "gradient_difference": ("gradient difference", ".1e"),
}


class NotExact(RuntimeError):
    """The sides do not compute the same gradients: there is nothing to compare."""


@dataclass
class Side:
    """One way to lay trajectories out: the rows of a step, one pass each."""

    name: str
    rows: list[Packed]
    attention: str
    rows_per_backward: int = 1


@dataclass
class Bench:
    """What all cases share."""

    model: sdar.BlockDiffusion
    optimizer: torch.optim.Optimizer
    block_size: int
    token_budget: int
    repeats: int
    peak_flops: float  # per second

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def mask_id(self) -> int:
        return self.model.config.vocab_size - 1

    def packed(self, rollouts: list[Rollout]) -> Side:
        """Ours."""
        views = [replay(r, self.block_size, weight=1.0) for r in rollouts]
        rows = pack(views, self.block_size, self.mask_id, self.token_budget)
        return Side("packed", [weigh(row).to(self.device) for row in rows], "auto")

    def published(
        self, rollouts: list[Rollout], name: str, attention: str, limit: int = 0, together: bool = False
    ) -> Side:
        """B rounds per trajectory, padded to `limit` tokens if it is given."""
        rows = []
        for i, rollout in enumerate(rollouts):
            for one in rounds(rollout, self.block_size, self.mask_id, True, limit):
                one.source.fill_(i)
                rows.append(weigh(one).to(self.device))
        return Side(f"published, {name}", rows, attention, self.block_size if together else 1)


def weigh(row: Packed) -> Packed:
    """The row with a weight of its own for every token, positive or negative, the same in every layout."""
    angle = row.positions[row.scored] + 7.0 * row.source
    return dataclasses.replace(row, weights=row.weights * angle.cos())


def run_passes(model: sdar.BlockDiffusion, side: Side) -> None:
    """Forward and backward of every row; gradients add up."""
    for start in range(0, len(side.rows), side.rows_per_backward):
        loss = 0.0
        for row in side.rows[start : start + side.rows_per_backward]:
            scores = model.score(row, sdar.Sampling(), side.attention)
            loss = loss + (row.weights * scores.logprobs).sum()
        loss.backward()


def gradient(model: sdar.BlockDiffusion, side: Side) -> list[torch.Tensor]:
    """The gradient of every parameter after one step's passes."""
    model.zero_grad()
    run_passes(model, side)
    gradients = [gathered(p.grad) for p in model.parameters()]
    model.zero_grad()
    return gradients


def check_exact(
    model: sdar.BlockDiffusion, reference: Side, sides: list[Side], tolerance: float
) -> list[float]:
    """Relative difference of each side's gradient to that of the reference, over all parameters.

    Raises:
        NotExact: one is larger than the tolerance, or no number.
    """
    wanted, differences = gradient(model, reference), []
    norm = sum(g.double().square().sum() for g in wanted).sqrt()
    for side in sides:
        pairs = zip(gradient(model, side), wanted, strict=True)
        differences.append(float(sum((a - b).double().square().sum() for a, b in pairs).sqrt() / norm))
        if not differences[-1] <= tolerance:
            raise NotExact(f"{side.name}: gradients differ from the rounds' by {differences[-1]:.1e}")
    return differences


def seconds_of(work: Callable[..., Any], *args) -> float:
    """Wall time of work(*args), with the queue of the GPU empty before and after."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    work(*args)
    wait()
    return time.perf_counter() - start


def training_step(bench: Bench, side: Side) -> None:
    """Forward, backward, optimizer."""
    run_passes(bench.model, side)
    bench.optimizer.step()
    bench.optimizer.zero_grad()


def count_step(bench: Bench, side: Side) -> tuple[int, int]:
    """Peak bytes of a step on the CPU, weights and moments included, and the FLOPs done."""
    moments = [t for state in bench.optimizer.state.values() for t in state.values()]
    held = sum(t.nbytes for t in [*bench.model.parameters(), *moments])
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with counter, gpu.LiveBytes() as live:
        training_step(bench, side)
    return held + live.peak, counter.get_total_flops()


def needed_flops(bench: Bench, row: Packed) -> int:
    """Model FLOPs of a row."""
    pairs = memory.visible_pairs(row.block, bench.block_size)
    return memory.forward_backward_flops(bench.model.config, len(row), pairs, len(row.scored))


def measure(bench: Bench, case: str, rollouts: list[Rollout], sides: list[Side]) -> list[dict[str, Any]]:
    """A line of the table per side; the first is ours, the second the reference for the gradients."""
    cuda = bench.device.type == "cuda"
    differences = check_exact(bench.model, sides[1], sides, TOLERANCE[bench.device.type])  # and the warm-up
    times: list[list[float]] = [[] for _ in sides]
    peaks, done = [0] * len(sides), [None] * len(sides)  # compiled kernels hide their FLOPs
    for _ in range(bench.repeats):
        for i, side in enumerate(sides):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            times[i].append(seconds_of(training_step, bench, side))
            if cuda:
                peaks[i] = torch.cuda.max_memory_allocated()
    if not cuda:
        peaks, done = zip(*(count_step(bench, side) for side in sides), strict=True)
    lines: list[dict[str, Any]] = []
    for i, side in enumerate(sides):
        seconds, needed = statistics.median(times[i]), sum(needed_flops(bench, row) for row in side.rows)
        line = {"case": case, "side": side.name, "attention": side.attention}
        line |= {
            "tokens": sum(map(len, side.rows)),
            "tflop": needed / 1e12,
            "flop_done": done[i] and done[i] / needed,
        }
        line |= {"seconds": seconds, "peak_gib": peaks[i] / gpu.GIB}
        line["tokens_per_second"] = sum(len(r.response_ids) for r in rollouts) / seconds
        line["utilisation"] = needed / seconds / bench.peak_flops
        line["gradient_difference"] = differences[i]
        lines.append(line)
        line["seconds_ratio"] = seconds / lines[0]["seconds"]
        line["peak_ratio"] = peaks[i] / peaks[0]
    return lines


def linear_cost(bench: Bench, rollouts: list[Rollout], counts: list[int]) -> dict[str, Any]:
    """Seconds of a packed step over the number of trajectories, the straight line through them, and the
    share of the largest step that building masks, and laying rows out on the CPU, takes."""
    seconds = []
    for count in counts:
        side = bench.packed(rollouts[:count])
        run_passes(bench.model, side)
        runs = [seconds_of(training_step, bench, side) for _ in range(bench.repeats)]
        seconds.append(statistics.median(runs))
    slope, start = np.polyfit(counts, seconds, 1)
    off = np.array(seconds) - (start + slope * np.array(counts))

    def fastest(build: Callable[[Packed], Any]) -> float:
        return min(seconds_of(lambda: [build(row) for row in side.rows]) for _ in range(3))

    mask = fastest(lambda row: sdar.attention_over(row, side.attention))
    return {
        "trajectories": counts,
        "seconds": seconds,
        "fit": [start, slope],
        "r_squared": 1 - off.var() / np.var(seconds),
        "mask_share": mask / seconds[-1],
        "block_mask_share": fastest(block_mask) / seconds[-1],  # FlexAttention's, wherever this runs
        "mask_ms_per_row": 1e3 * mask / len(side.rows),
        "tokens_per_row": statistics.mean(len(row) for row in side.rows),
        "layout_share": seconds_of(bench.packed, rollouts[: counts[-1]]) / seconds[-1],
    }


def recompilations(bench: Bench, rollouts: list[Rollout]) -> int:
    """Graphs that torch.compile makes after the third batch, each batch of another length."""
    for i, rollout in enumerate(rollouts):
        run_passes(bench.model, bench.packed([rollout]))
        if i == 2:
            before = counters["stats"]["unique_graphs"]
    bench.model.zero_grad()
    return counters["stats"]["unique_graphs"] - before


def matmul_peak() -> float:
    """FLOP/s of a large float32 matrix product on this CPU, the best of five."""
    a = torch.randn(1536, 1536)
    return 2 * 1536**3 / min(seconds_of(torch.mm, a, a) for _ in range(5))


def prepare(shape: str, options: Namespace) -> tuple[Bench, str]:
    """The network of that shape with random weights and its optimizer, and the precision of the two.

    On CUDA in bfloat16, after a check in float32 on a short trajectory; weights and moments stay in
    float32 if that leaves room for activations.
    """
    config, cuda = memory.model_config(shape), options.device == "cuda"
    torch.manual_seed(0)
    torch.compiler.reset()  # every shape has the whole recompile limit
    model = gpu.build(config, options.device, torch.float32)
    bench = Bench(model, None, options.block_size, options.token_budget, options.repeats, PEAK_FLOPS)
    kept = "float32"
    if cuda:
        checkpoint_layers(model, options.checkpointing)
        compile_layers(model)
        short = [random_trajectory(130, 510, options.tpf, options.block_size, bench.mask_id)]
        check_exact(model, bench.published(short, "", "dense"), [bench.packed(short)], 1e-3)
        torch.compiler.reset()
        room = torch.cuda.get_device_properties(0).total_memory
        if 16 * gpu.parameters(config)["all"] < 0.6 * room:
            shard(model, "bfloat16")  # FSDP2 on one GPU: mixed precision
        else:
            model.to(torch.bfloat16)
            kept = "bfloat16"
    else:
        bench.peak_flops = matmul_peak()
    bench.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=cuda)
    return bench, kept


def run_shape(shape: str, options: Namespace) -> dict[str, Any]:
    """All cases of one shape."""
    bench, kept = prepare(shape, options)
    b, cuda = options.block_size, options.device == "cuda"
    plain = ["flex"] if cuda else ["dense", "joint"]  # the first is the reference

    def trajectories(lengths: list[int]) -> list[Rollout]:
        how = (options.tpf, b, bench.mask_id)
        return [random_trajectory(options.prompt, n, *how, seed=i) for i, n in enumerate(lengths)]

    def compare(case: str, rollouts: list[Rollout], limit: int) -> list[dict[str, Any]]:
        sides = [bench.packed(rollouts)]
        sides += [bench.published(rollouts, "unpadded", attention) for attention in plain]
        if not cuda:
            sides.append(bench.published(rollouts, f"{b} rounds a batch", plain[-1], together=True))
        if limit:
            sides += [bench.published(rollouts, f"padded to {limit}", a, limit) for a in plain]
        return measure(bench, case, rollouts, sides)

    result: dict[str, Any] = {"shape": shape, "kept": kept, "peak_tflops": bench.peak_flops / 1e12}
    if options.rollouts:
        recorded = read_rollouts(options.rollouts, b, bench.mask_id, options.trajectories)
        longest = max(len(r.prompt_ids) + len(r.response_ids) for r in recorded)
        if (options.limit or longest) < longest:
            raise InputError(f"argument --limit: a recorded trajectory has {longest} tokens")
        result["lines"] = compare(f"{len(recorded)} recorded", recorded, options.limit or longest)
        return result
    equal = trajectories([options.response] * options.trajectories)
    once = not cuda or shape == options.shape[0]  # what would take long with every shape
    if cuda and once:  # first, so that the third batch is the third
        lengths = [options.response - 36 * b * i for i in range(6)]
        result["recompilations"] = recompilations(bench, trajectories(lengths))
    result["lines"] = compare(f"{options.prompt} + {options.response}", equal[:1], 0)
    if once:
        spread = trajectories(log_normal(options.trajectories, options.response, b))
        title = f"{len(spread)} log-normal up to {options.response}"
        result["lines"] += compare(title, spread, options.prompt + options.response)
        counts = [2**i for i in range(20) if 2**i <= options.trajectories]
        result["linear"] = linear_cost(bench, equal, counts) if len(counts) > 1 else None
    return result


def report(result: dict[str, Any]) -> str:
    """The Markdown of one shape."""

    def row(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    out = [f"### {result['shape']}, weights and moments in {result['kept']}\n"]
    out += [row(heading for heading, _ in COLUMNS.values()), row("---" for _ in COLUMNS)]
    for line in result["lines"]:
        cells = ((line[name], form) for name, (_, form) in COLUMNS.items())
        out.append(row("-" if value is None else format(value, form) for value, form in cells))
    if line := result.get("linear"):
        out.append(
            "\n{} to {} trajectories, packed: {:.3f} s + {:.3f} s each, R^2 {:.4f}. ".format(
                *line["trajectories"][:: len(line["trajectories"]) - 1], *line["fit"], line["r_squared"]
            )
            + f"At the most, building masks takes {line['mask_share']:.2%} of the step "
            f"({line['mask_ms_per_row']:.1f} ms per row of {line['tokens_per_row']:,.0f} tokens), "
            f"a BlockMask {line['block_mask_share']:.2%}, laying rows out {line['layout_share']:.2%}."
        )
    if "recompilations" in result:
        out.append(f"\nGraphs compiled after the third batch: {result['recompilations']}.")
    return "\n".join(out)


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text}, expected a positive integer")
    return int(text)


def parse(argv: list[str]) -> Namespace:
    """The options; those that are not given get the device's value.

    Raises:
        InputError: an unknown option, or an impossible value.
    """
    parser = Parser(description="A training step, published layout against packed.")
    parser.add_argument("--device", choices=list(DEFAULTS), help="default: cuda if there is one")
    parser.add_argument("--shape", nargs="+", help=f"{', '.join(memory.SHAPES)} or a config.json")
    parser.add_argument("--prompt", type=positive, help="tokens")
    parser.add_argument("--response", type=positive, help="tokens at most")
    parser.add_argument("--trajectories", type=positive, help="of the cases with several, at most")
    parser.add_argument("--token-budget", type=positive, help="of a packed row")
    parser.add_argument("--repeats", type=positive, help="timed steps per side; the median counts")
    parser.add_argument("--block-size", type=positive, default=4)
    parser.add_argument("--tpf", type=float, default=2.0, help="tokens per forward")
    modes = {"choices": ["none", "selective", "full"], "default": "full"}
    parser.add_argument("--checkpointing", **modes, help="of the decoder layers, on CUDA")
    parser.add_argument("--rollouts", metavar="FILE", help="lengths and step maps from a rollouts.jsonl")
    parser.add_argument("--limit", type=positive, help="padded length of those; default: the longest")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    options = parser.parse_args(argv)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("argument --device: cuda, but there is none")
    given = {name: value for name, value in vars(options).items() if value is not None}
    options = Namespace(**vars(options) | DEFAULTS[options.device] | given)
    if not 1 <= options.tpf <= options.block_size:
        raise InputError("argument --tpf: expected between 1 and the block size")
    if (options.prompt + options.response) % options.block_size:
        raise InputError("argument --response: prompt and response are no whole blocks")
    return options


def machine(device: str) -> str:
    """What this runs on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in about if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def main(argv: list[str]) -> None:
    """Print a table per shape."""
    options = parse(argv)
    about = {"command": " ".join(["python benchmarks/train_step.py", *argv]), "date": str(date.today())}
    about |= {"machine": machine(options.device), "torch": torch.__version__}
    print("`{command}`, {date}, {machine}, torch {torch}\n".format(**about))
    results = []
    for shape in options.shape:
        results.append(run_shape(shape, options))
        print(report(results[-1]) + "\n", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if options.json:
        write_json(Path(options.json), about | {"shapes": results})


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
