"""What only a CUDA machine can show, in stages, with the goal of every figure beside it: `make gpu`.

    python benchmarks/gpu.py                                  # everything: 40 minutes expected on an H200
    python benchmarks/gpu.py --minutes 10                     # what fits, the best evidence first
    python benchmarks/gpu.py --stages flex,parity,loop        # these

Every stage is a process of its own with a time limit of its own: a crash, an out-of-memory or a hang ends
that stage, and the rest goes on. After each stage --out (runs/gpu) has results.json and results.md, a table
for RESULTS.md; STAGE.log there has what the stage printed. Stages that earlier calls measured on the same
machine and commit stay. A broken limit is FAILED (exit code 1), a goal of speed is only missed. The seconds
that are expected are estimates, not measurements.

Without CUDA it runs at toy size, LMDeploy on the stand-ins of tests/lmdeploy_on_cpu.py: all that this shows
is that the stages run.

On a machine without a network that has torch 2.11, triton 3.6, transformers 5.17, peft, pytest and Python
3.12, the packages of wheels.py are missing, 11 MB. With a network, then without:

    python benchmarks/gpu.py --collect-wheels wheels
    python benchmarks/gpu.py --wheels wheels                  # installs them to OUT/site, for the stages only
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
for place in ("benchmarks", "data", "tests", ""):
    sys.path.insert(0, str(ROOT / place))

import wheels  # noqa: E402
from stages import Check, Stages  # noqa: E402

from plumbing.common import first_line, run_script  # noqa: E402

stage = Stages(small=False, program=__file__)
if __name__ == "__main__":  # before the imports below, of which a bare machine lacks some
    parser = stage.parser(__doc__)
    wheels.add_options(parser)
    OPTIONS = parser.parse_args()
    run_script(wheels.prepare, OPTIONS)
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):  # one process needs no network
        os.environ.setdefault(variable, "lo")

import attention  # noqa: E402
import scoring  # noqa: E402
import torch  # noqa: E402
import train_step  # noqa: E402
from data_rows import write_task  # noqa: E402
from layout import random_trajectory  # noqa: E402

import dipo  # noqa: E402
import model as sdar  # noqa: E402
from masking import Packed, pack, replay  # noqa: E402
from plumbing import lmdeploy_engine  # noqa: E402
from plumbing.checkpoint import load_tokenizer, read_config, stop_ids, tiny  # noqa: E402
from plumbing.common import Stopwatch, read_records  # noqa: E402
from plumbing.config import load_config  # noqa: E402
from plumbing.gpu import GIB, Job, plan  # noqa: E402
from plumbing.kernels import KERNEL_OPTIONS  # noqa: E402
from plumbing.run_folder import RunFolder  # noqa: E402
from rollout import Decoding, LMDeployEngine, Rollout, TorchEngine  # noqa: E402

CUDA = torch.cuda.is_available()
stage.small = not CUDA
DEVICE, DTYPE = ("cuda", "bfloat16") if CUDA else ("cpu", "float32")


def load_benchmark(name: str) -> Any:
    """benchmarks/NAME.py as a module, where a file at the top has the same name."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rollout_speed = load_benchmark("rollout")


@stage(20, real={"gib": 4.0, "size": 8192}, toy={"gib": 0.01, "size": 256})
def machine(folder: Path, gib: float, size: int) -> Iterator[Check]:
    """What this is, and the two ceilings: bytes that a copy moves, and matrix products on random data."""
    yield Check("machine", machine_name())
    versions = [f"Python {sys.version.split()[0]}"]
    for name in ("torch", "triton", "transformers", "lmdeploy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    yield Check("versions", ", ".join(versions))
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    found = [bool(shutil.which("gcc") or shutil.which("cc")), header.exists()]  # Triton compiles with them
    yield Check("C compiler, Python.h", sum(found), "found", at_least=2 if CUDA else None)
    source = torch.randn(int(gib * GIB / 4), device=DEVICE)
    target = torch.empty_like(source)
    ms = attention.milliseconds(lambda: target.copy_(source), DEVICE)
    yield Check("copy, read and written", 2 * source.nbytes / ms / 1e9, "TB/s")
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    ms = attention.milliseconds(lambda: a @ b, DEVICE)
    yield Check(f"bfloat16 product of {size} x {size}", 2 * size**3 / ms / 1e9, "TFLOP/s")


def machine_name() -> str:
    """GPU with its memory and driver, without making a CUDA context; or the CPU."""
    if not CUDA:
        return train_step.machine("cpu")
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    with suppress(OSError, IndexError):
        return subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0]
    return "a GPU that nvidia-smi does not name"


# ------------------------------------------------------------------------------------ attention


def backward(m1: int, n1: int, m2: int, n2: int, stages: int) -> dict[str, int]:
    """Kernel options of the backward pass: tiles, 8 warps, stages."""
    tiles = {"bwd_BLOCK_M1": m1, "bwd_BLOCK_N1": n1, "bwd_BLOCK_M2": m2, "bwd_BLOCK_N2": n2}
    return tiles | {"bwd_num_warps": 8, "bwd_num_stages": stages}


VARIANTS = {  # what torch chooses for bfloat16 and head dimension 128 spills registers; the last three do not
    "as torch chooses": {},
    "2 stages": {"bwd_num_stages": 2},
    "64 x 64, 2 stages": backward(64, 64, 64, 64, 2),
    "32 x 128, 2 stages": backward(32, 128, 128, 32, 2),
    "32 x 128, 3 stages": backward(32, 128, 128, 32, 3),
}


def attention_over(packed: Packed, options: dict = KERNEL_OPTIONS) -> Any:
    """FlexAttention with these kernel options; on a CPU what is used there."""
    return sdar.FlexRow(packed, options) if CUDA else sdar.attention_over(packed)


def attention_errors(packed: Packed, dtype: torch.dtype, dim: int, options: dict) -> tuple[float, float]:
    """Relative error of the output and the largest of the three gradients, to dense attention in float64."""
    inputs = attention.random_inputs(packed, dtype, dim)
    slope, results = None, []
    exact = [t.detach().double().requires_grad_(True) for t in inputs]
    for row, tensors in ((attention_over(packed, options), inputs), (sdar.DenseRow(packed), exact)):
        out = row.attend(0, *tensors, dim**-0.5)
        slope = torch.randn_like(out) if slope is None else slope
        results.append([out, *torch.autograd.grad(out, tensors, slope.to(out.dtype))])
    errors = []
    for ours, theirs in zip(*results, strict=True):
        errors.append(((ours.detach().double() - theirs).norm() / theirs.norm()).item())
    return errors[0], max(errors[1:])


LENGTHS = (512, 1024, 1536, 768, 2048)
FLEX = {"short": 1024, "tokens": 32768, "dims": (128, 64), "lengths": LENGTHS, "variants": VARIANTS}
TOY_FLEX = {"short": 64, "tokens": 64, "dims": (32,), "lengths": (64,), "variants": {"as torch chooses": {}}}


@stage(240, real=FLEX, toy=TOY_FLEX)
def flex(
    folder: Path, short: int, tokens: int, dims: tuple, lengths: tuple, variants: dict[str, dict]
) -> Iterator[Check]:
    """FlexAttention over packed rows: right forward and backward, its time, how often it is compiled."""

    def row_of(size: int, mean: int) -> Packed:
        return attention.packed_rows(size, 1, mean=mean, limit=4 * mean)[0].to(DEVICE)

    few, many = row_of(short, short // 16), row_of(tokens, tokens // 16)

    def against_dense(dtype: torch.dtype, dim: int, limit: float) -> Iterator[Check]:
        torch._dynamo.reset()
        about = f"{str(dtype)[6:]}, head dimension {dim}"
        forward, gradient = attention_errors(few, dtype, dim, KERNEL_OPTIONS)
        yield Check(f"error of the output, {about}", forward, at_most=limit)
        yield Check(f"error of the gradients, {about}", gradient, at_most=2 * limit)
        inputs = attention.random_inputs(few, dtype, dim)
        for name, row in {"flex": attention_over(few), "dense": sdar.DenseRow(few)}.items():
            ms = attention.attend_milliseconds(row, inputs)
            yield Check(f"{name}, {len(few):,} tokens, {about}", ms, "ms")

    for dim in dims:
        yield from against_dense(torch.bfloat16, dim, 1e-2)

    # One compilation for the first length, one for all.
    torch._dynamo.reset()
    counters, made = torch._dynamo.utils.counters["stats"], []
    for size in lengths:
        row = row_of(size, 32)
        before = counters["unique_graphs"]
        attention.attend_milliseconds(attention_over(row), attention.random_inputs(row, torch.bfloat16))
        made.append(counters["unique_graphs"] - before)
    yield Check(f"compilations over {len(lengths)} lengths", sum(made), at_most=2)

    # Long rows, with other choices for the kernels.
    for name, options in variants.items():
        torch._dynamo.reset()
        try:
            _, error = attention_errors(few, torch.bfloat16, dims[0], options)
            inputs = attention.random_inputs(many, torch.bfloat16, dims[0])
            ms = attention.attend_milliseconds(attention_over(many, options), inputs)
            yield Check(f"{name}: {len(many):,} tokens, forward and backward", ms, "ms")
            yield Check(f"{name}: error of the gradients", error, at_most=2e-2)
        except Exception as error:  # options that a GPU has no room for
            yield Check(f"{name}: does not run here", first_line(error))

    # The checks of the trainer are in float32, whose kernels take the compiler long.
    for dim in dims:
        yield from against_dense(torch.float32, dim, 1e-4)


# -------------------------------------------------------------------------- LMDeploy on a small model

PROMPTS = [[(7 * i + j) % 250 for j in range(n)] for i, n in enumerate((3, 17, 30, 8, 64, 65) * 2)]
GAPS = {"float32": (1e-4, 1e-3), "bfloat16": (0.06, 0.5)}  # engine to trainer: mean, largest
# Percent of short answers that have to be equal. In bfloat16 near ties fall either way, after which nothing
# is the same: on a CPU both engines agree on a third of the answers of 64 tokens, and on 9 of 12 of 8 tokens.
SAME = {"float32": 100, "bfloat16": 30}[DTYPE]


def small_model(folder: Path, seed: int = 0) -> str:
    """A checkpoint with peaked distributions: a wrong mask, position or weight is no rounding error."""
    return str(tiny(folder / f"checkpoint{seed}", seed=seed, head_dim=64, initializer_range=0.2))


def start(checkpoint: str, log: Path) -> LMDeployEngine:
    """LMDeploy on this machine with a cache of 1 GiB."""
    rollout_speed.use_stand_ins()
    tokenizer = load_tokenizer(checkpoint)
    parts = (tokenizer.mask_token_id, stop_ids(tokenizer), 32, DTYPE)
    return LMDeployEngine(checkpoint, 4, *parts, cache_gib=1 if CUDA else 0.01, log=log)


def weights(checkpoint: str) -> Iterator[tuple[str, torch.Tensor]]:
    """What a trainer in float32 sends."""
    return sdar.load(checkpoint, torch.float32, DEVICE).named_parameters()


def greedy(engine: Any, tokens: int = 16) -> list[list[int]]:
    """Answers without chance."""
    rollouts = engine.generate(PROMPTS, [0] * len(PROMPTS), Decoding(top_k=1, max_tokens=tokens))
    return [rollout.response_ids for rollout in rollouts]


def percent_equal(answers: list, others: list) -> float:
    """How many are the same, one by one."""
    return 100 * sum(a == b for a, b in zip(answers, others, strict=True)) / len(answers)


@torch.no_grad()
def gaps(trainer: sdar.BlockDiffusion, rollouts: list[Rollout], mask_id: int) -> torch.Tensor:
    """|trainer - engine| log-probability of every revealed token."""
    found = []
    for row in pack([replay(r, 4, 1.0) for r in rollouts], 4, mask_id, 4096):
        row = row.to(DEVICE)
        found.append((trainer.score(row, sdar.Sampling()).logprobs - row.engine_logprobs).abs())
    return torch.cat(found)


@stage(80, real={"tokens": 64, "repeats": 3}, toy={"tokens": 12, "repeats": 1})
def parity(folder: Path, tokens: int, repeats: int) -> Iterator[Check]:
    """The trainer finds for every token the probability that the engine drew it with, for both engines."""
    checkpoint = small_model(folder)
    tokenizer, prompts = load_tokenizer(checkpoint), PROMPTS * repeats
    how, seeds = Decoding(max_tokens=tokens), list(range(len(prompts)))

    def compared(name: str, dtype: str, rollouts: list[Rollout]) -> Iterator[Check]:
        gap = gaps(trainers[dtype], rollouts, tokenizer.mask_token_id)
        yield Check(f"{name}, {dtype}: gap to the trainer, mean", gap.mean().item(), at_most=GAPS[dtype][0])
        yield Check(f"{name}, {dtype}: gap to the trainer, largest", gap.max().item(), at_most=GAPS[dtype][1])

    # The embedded engine.
    trainers, engines = {}, {}
    for dtype in ("float32", "bfloat16"):
        trainers[dtype] = sdar.load(checkpoint, getattr(torch, dtype), DEVICE)
        engines[dtype] = TorchEngine(trainers[dtype], 4, tokenizer.mask_token_id, stop_ids(tokenizer))
        yield from compared("embedded", dtype, engines[dtype].generate(prompts, seeds, how))

    # LMDeploy, and its greedy answers against the embedded engine's.
    lmdeploy = start(checkpoint, folder / "engine.log")
    yield from compared("LMDeploy", DTYPE, lmdeploy.generate(prompts, seeds, how))
    same = percent_equal(greedy(lmdeploy, 8), greedy(engines[DTYPE], 8))
    yield Check(f"greedy answers of 8 tokens as the embedded engine's, {DTYPE}", same, "%", at_least=SAME)
    lmdeploy.close()


@stage(40, real={"tokens": 16}, toy={"tokens": 12})
def copies(folder: Path, tokens: int) -> Iterator[Check]:
    """16 copies of a prompt get 16 answers, and the same ones for the same seeds."""
    engine = start(small_model(folder), folder / "engine.log")
    engine.stop_ids, answers = [], []
    for _ in range(2):
        rollouts = engine.generate([PROMPTS[1]] * 16, list(range(16)), Decoding(max_tokens=tokens))
        answers.append([rollout.response_ids for rollout in rollouts])
    engine.close()
    yield Check("different answers to 16 copies of a prompt", len(set(map(tuple, answers[0]))), at_least=16)
    yield Check("equal answers for equal seeds", percent_equal(*answers), "%", at_least=SAME)


@stage(70, real={"bucket": 300_000}, toy={"bucket": 300_000})
def update(folder: Path, bucket: int) -> Iterator[Check]:
    """New weights arrive in the running engine (CUDA IPC, several buckets), and its graphs use them."""
    first, second = small_model(folder), small_model(folder, seed=3)
    engine = start(second, folder / "other.log")
    expected = {second: greedy(engine)}
    engine.close()
    engine = start(first, folder / "engine.log")
    expected[first] = greedy(engine)
    same = percent_equal(*expected.values())
    yield Check("answers that two checkpoints have in common", same, "%", at_most=20)
    with patch.object(lmdeploy_engine, "BUCKET_BYTES", bucket):
        for turn, source in enumerate((second, first, second), start=1):
            engine.update_weights(weights(source))
            same = percent_equal(greedy(engine), expected[source])
            yield Check(f"answers of the new weights after update {turn}", same, "%", at_least=SAME)
    engine.close()


@stage(50, real={"rounds": 3}, toy={"rounds": 1})
def sleep(folder: Path, rounds: int) -> Iterator[Check]:
    """A sleeping engine gives its memory back, and answers as before with the weights that it gets."""
    checkpoint = small_model(folder)
    engine = start(checkpoint, folder / "engine.log")
    before = greedy(engine)
    for turn in range(1, rounds + 1):
        given_back = engine.sleep() / GIB
        least = 0.9 if CUDA else 0
        yield Check(f"given back, of a cache of 1 GiB, round {turn}", given_back, "GiB", at_least=least)
        engine.update_weights(weights(checkpoint))
        seconds = train_step.seconds_of(engine.wake)
        yield Check(f"wake-up, round {turn}", seconds, "s")
        same = percent_equal(greedy(engine), before)
        yield Check(f"answers as before, round {turn}", same, "%", at_least=SAME)
    engine.close()


# ---------------------------------------------------------------------------------- the whole loop


class MemoryWatch(threading.Thread):
    """Most bytes in use on the GPU in each phase, of all processes together; asked for every 50 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.phase, self.peaks, self.ended = "start", {}, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.05):
            free, total = torch.cuda.mem_get_info() if CUDA else (0, 0)
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), total - free)


@contextmanager
def watched() -> Iterator[tuple[MemoryWatch, list[float]]]:
    """dipo.main seen from outside: memory by phase, and when each step was logged. No checkpoint is saved."""
    memory_watch, logged = MemoryWatch(), []

    class Phases(Stopwatch):
        @contextmanager
        def __call__(self, phase: str) -> Iterator[None]:
            memory_watch.phase = phase
            with super().__call__(phase):
                yield
            memory_watch.phase = "between"

    class Unsaved(RunFolder):
        def log(self, *arguments: Any) -> None:
            super().log(*arguments)
            logged.append(time.perf_counter())

        def save(self, *_: Any) -> None:
            """20 GB that nobody would read."""

    memory_watch.start()
    with patch.object(dipo, "Stopwatch", Phases), patch.object(dipo, "RunFolder", Unsaved):
        yield memory_watch, logged
    memory_watch.ended.set()


def planned_phases(config: dipo.DiPOConfig) -> dict[str, float]:
    """GiB that plumbing/gpu.py plans for the phases of dipo.py's loop."""
    shape = read_config(Path(config.model))
    job = Job.of(config, shape, ranks=1, longest=16 + config.max_tokens, engine="lmdeploy")
    phases = plan(job, torch.cuda.mem_get_info()[1] if CUDA else 2**40)
    phases["update_weights"] = phases.pop("update")
    return {phase: sum(parts.values()) / GIB for phase, parts in phases.items()}


TOY_LOOP = {"groups": 1, "group_size": 4, "max_tokens": 16, "threshold": 0.0038, "cache_gib": 0.01}
LOOP = {"groups": 16, "group_size": 16, "max_tokens": 1024, "cache_gib": 32}
LARGE = {"groups": 4, "group_size": 8, "max_tokens": 512, "cache_gib": 16, "lora_rank": 16}
# Random weights of real width are nearly uniform over 151,936 tokens: about half reach this confidence.
UNIFORM = {"threshold": 1e-5}


@stage(210, real={"shape": "1.7B"} | LOOP | UNIFORM, toy={"shape": "tiny"} | TOY_LOOP)
def loop(folder: Path, shape: str, **fields: Any) -> Iterator[Check]:
    """Two DiPO steps with LMDeploy: seconds and memory of every phase, and the share of all the rest."""
    rollout_speed.use_stand_ins()
    rollout_speed.write_checkpoint(folder / "checkpoint", rollout_speed.SHAPES[shape])
    write_task(folder)
    fields |= {"model": folder / "checkpoint", "data": folder / "rl.jsonl", "out": folder / "run"}
    fields |= {"engine": "lmdeploy", "dtype": "bfloat16", "checkpointing": "full", "steps": 2}
    config = load_config(dipo.DiPOConfig, [f"{k}={v}" for k, v in fields.items()] + ["rewards.speed=1.0"])
    with watched() as (memory_watch, logged):
        dipo.main(config)

    # Both steps agree with the engine; the second has nothing left to compile.
    steps = [record for _, record in read_records(folder / "run" / "metrics.jsonl")]
    worst = max(metrics["gap_mean"] for metrics in steps)
    yield Check("gap to the trainer, mean, the worse step", worst, at_most=GAPS["bfloat16"][0])
    last, whole = steps[-1], logged[-1] - logged[-2]
    seconds = {k.partition("/")[2]: v for k, v in last.items() if k.startswith("seconds/")}
    for phase, value in seconds.items():
        yield Check(f"{phase}, step 2", value, "s")
    rest = 100 * (1 - (seconds["rollout"] + seconds["train"]) / whole)
    yield Check("besides rollout and train, step 2", rest, "% of the step", at_most=3, soft=True)
    yield Check("rollout tokens per second, step 2", last["rollout_tokens"] / seconds["rollout"], "/s")
    yield Check("packed tokens trained per second, step 2", last["train_tokens"] / seconds["train"], "/s")
    yield Check("given back by the sleeping engine", last["gib_given_back"], "GiB")
    planned = planned_phases(config)
    for phase, peak in memory_watch.peaks.items():
        bound = {"at_most": planned.get(phase), "soft": True}
        yield Check(f"memory, {phase}", peak / GIB, "GiB, both processes", **bound)


# ------------------------------------------------------------------------------------ speed

STEP = {"shape": "1.7B", "prompt": 1024, "response": 8192, "repeats": 3}
TOY_STEP = {"shape": "tiny", "prompt": 6, "response": 22, "repeats": 1}


@stage(200, real=STEP | {"checkpointing": "full"}, toy=TOY_STEP | {"checkpointing": "full"})
def step(
    folder: Path, shape: str, prompt: int, response: int, repeats: int, checkpointing: str
) -> Iterator[Check]:
    """A training step in packed rows against the published layout: same gradients, sooner."""
    if shape == "tiny":
        shape = str(tiny(folder / "tiny"))
    sizes = {"--prompt": prompt, "--response": response, "--repeats": repeats}
    argv = [str(word) for pair in sizes.items() for word in pair]
    options = train_step.parse(["--shape", shape, "--checkpointing", checkpointing, *argv])
    bench, kept = train_step.prepare(shape, options)
    rollouts = [random_trajectory(prompt, response, options.tpf, bench.block_size, bench.mask_id)]
    plain = bench.published(rollouts, "unpadded", "flex" if CUDA else "dense")
    ours, published = train_step.measure(bench, "", rollouts, [bench.packed(rollouts), plain])
    about = f"{prompt} + {response} tokens, checkpointing {checkpointing}, moments in {kept}"
    yield Check(f"trained tokens per second, {about}", ours["tokens_per_second"], "/s")
    mfu = 100 * ours["utilisation"]
    yield Check("model FLOPs of 989 TFLOP/s", mfu, "%", at_least=40, soft=True)
    ratio = published["seconds_ratio"]
    yield Check("the published layout, unpadded, takes", ratio, "times as long", at_least=2.5, soft=True)
    worst = train_step.TOLERANCE[DEVICE]
    yield Check("gradients apart, relative", ours["gradient_difference"], at_most=worst)
    yield Check("peak memory, packed", ours["peak_gib"], "GiB")
    yield Check("peak memory, published", published["peak_gib"], "GiB")


stage(200, real=STEP | {"checkpointing": "selective"}, toy=None, name="step_selective")(step)


TOY_SCORE = {"scored": 64, "vocab": 512, "hidden": 32, "dtype": "float32", "repeats": 1}


@stage(60, real=scoring.REAL, toy=TOY_SCORE)
def score(folder: Path, **sizes: Any) -> Iterator[Check]:
    """The LM head with its softmax, chunk by chunk: seconds and memory beside all logits at once."""
    for name, row in scoring.measure(**sizes).items():
        ours = name.startswith("model")
        yield Check(f"{name}: loss and gradients", 1000 * row["seconds"], "ms")
        yield Check(f"{name}: extra memory", row["MiB"], "MiB", at_most=1536 if ours else None)


PIPELINE = {"shape": "1.7B", "requests": (64, 256), "tokens": 512}


@stage(300, real=PIPELINE, toy={"shape": "tiny", "requests": (2,), "tokens": 8})
def pipeline(folder: Path, shape: str, requests: tuple[int, ...], tokens: int) -> Iterator[Check]:
    """Rollouts per second, with all that is recorded, beside LMDeploy's own pipeline."""
    sizes = ["--shape", shape, "--tokens", str(tokens), "--requests", *map(str, requests), "--repeats", "1"]
    command = [sys.executable, str(ROOT / "benchmarks/rollout.py"), "--engines", "pipeline", "ours", *sizes]
    subprocess.run([*command, "--json", str(folder / "rollout.json")], check=True)
    for line in json.loads((folder / "rollout.json").read_text()):
        about = f"{line['engine']}, {line['requests']} requests"
        yield Check(f"{about}: tokens per second", line["tokens_per_second"], "/s")
        if line["engine"] == "ours":
            yield Check(f"{about}: of the pipeline's", 100 * line["ratio"], "%", at_least=95, soft=True)


def engine_figures(engine: str, folder: Path, shape: str, requests: int, tokens: int) -> dict[str, float]:
    """What benchmarks/rollout.py measures of one engine with random weights of that shape."""
    rollout_speed.use_stand_ins()
    rollout_speed.write_checkpoint(folder / "checkpoint", rollout_speed.SHAPES[shape])
    return rollout_speed.measure(engine, folder / "checkpoint", requests, tokens, repeats=1)


ONE_ENGINE = {"shape": "1.7B", "requests": 64, "tokens": 128}
TOY_ENGINE = {"shape": "tiny", "requests": 2, "tokens": 8}


@stage(80, real=ONE_ENGINE, toy=TOY_ENGINE)
def transfer(folder: Path, **sizes: Any) -> Iterator[Check]:
    """Seconds per GB of a weight update, and what sleeping takes and gives."""
    figures = engine_figures("ours", folder, **sizes)
    per_gb = figures["update_seconds_per_gb"]
    yield Check(f"weight update of {figures['weights_gb']:.2f} GB", per_gb, "s/GB", at_most=0.1, soft=True)
    yield Check("falling asleep", figures["sleep_seconds"], "s")
    yield Check("given back", figures["gib_given_back"], "GiB")


@stage(60, real=ONE_ENGINE, toy=TOY_ENGINE)
def embedded(folder: Path, **sizes: Any) -> Iterator[Check]:
    """The embedded engine's speed."""
    figures = engine_figures("torch", folder, **sizes)
    about = f"{sizes['requests']} requests of {sizes['tokens']} tokens"
    yield Check(f"embedded engine, {about}", figures["tokens_per_second"], "/s")


stage(300, real={"shape": "8B"} | LARGE | UNIFORM, toy=None, name="large")(loop)


@stage(400, real={}, toy=None)
def tests(folder: Path) -> Iterator[Check]:
    """The tests that need CUDA."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--durations=0"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "4"]
    report = folder / "report.xml"
    subprocess.run([*command, "tests/test_gpu.py", f"--junitxml={report}"], cwd=ROOT)
    counts = ElementTree.parse(report).getroot().find("testsuite").attrib
    yield Check("tests", int(counts["tests"]), at_least=1)
    yield Check("tests that fail", int(counts["failures"]) + int(counts["errors"]), at_most=0)
    yield Check("tests that are skipped", int(counts["skipped"]))


if __name__ == "__main__":
    stage.main(OPTIONS, machine_name())
