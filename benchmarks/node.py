"""The plan of runs.sh, what of the machine would stop it, and which of its stages are finished.

    DRY=1 bash runs.sh 8B | python benchmarks/node.py --size 8B --gpus 8 --out runs/8B --data data/hub

It reads the commands themselves, so it cannot say anything else than what they do. Memory is that of
plumbing/gpu.py. Times are arithmetic over the assumptions below, marked as predicted, until metrics.jsonl or
summary.json of a stage say how long it took here. Then a line `skipped: STAGE (why)` for each that is
finished, which runs.sh obeys. Problems of the machine go to standard error, one line each, with exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

import download
import memory
import torch
from packaging.requirements import Requirement

from dipo import DiPOConfig
from evaluate import PROTOCOLS, EvalConfig, benchmark_files
from plumbing import identity
from plumbing.checkpoint import tiny
from plumbing.common import ROOT, InputError, checkpoints, read_records, run_script, tell
from plumbing.config import Parser, load_config
from plumbing.gpu import CONTEXT, GIB, parameters, plan, problem
from plumbing.kept import read_settings
from plumbing.lmdeploy_engine import lmdeploy_problem
from reward import read_questions
from sft import SFTConfig

SCRIPTS = {"sft.py": SFTConfig, "dipo.py": DiPOConfig, "evaluate.py": EvalConfig}

# ------------------------------------------------------------- what is assumed, none of it measured here

UTILISATION = 0.3  # of a GPU's peak in training, counted without what is computed twice
ROLLOUTS_PER_USEFUL = 2.0  # half of the groups have no spread of rewards and are dropped (DAPO, DiRL: 2 to 6)
BYTES_PER_TOKEN = 20  # of a response on disk: text, token ids, step map
PUBLISHED = {  # questions; tokens of a response of SDAR-8B-Chat, of DiRL-8B-Instruct (2512.22234, Table 1)
    "math500": (500, 617, 2001), "gsm8k": (1319, 709, 730), "aime24": (30, 1274, 5469),
    "aime25": (30, 890, 5130), "olympiadbench": (674, 896, 3615),
}  # fmt: skip


@dataclass
class Assumed:
    """Of a size: its usual tokens, and how fast one device is."""

    tokens_per_second: float  # of rollouts at `tpf` tokens per forward
    prompt: int = 200
    sft: int = 4000  # of a training response
    rollout: int = 2000  # of a rollout in training
    tpf: float = 2.0
    tflops: float = 989.0  # dense peak, bfloat16: H100, H200


# Published: 5,000 tokens/s for SDAR-4B on an H200 at batch 128 (JetEngine's README), 1,600 for SDAR-8B on an
# H100 at batch 32 (SGLang, in I-DLM's repository). Here the batch is 256.
SIZES = {
    "1.7B": Assumed(10_000),
    "8B": Assumed(4_000),
    "tiny": Assumed(3_000, prompt=24, sft=40, rollout=16, tflops=0.05),
}

# ---------------------------------------------------------------------------------------- the commands


@dataclass
class Stage:
    """A command of runs.sh that runs one of the three scripts."""

    words: list[str]
    script: str
    arguments: list[str]
    config: Any
    out: Path


class EvalPlan(EvalConfig):
    """A command of evaluate.py whose data and model need not be there yet."""

    def check(self) -> None:
        """Nothing."""


def read_stage(words: list[str], planned: bool = True) -> Stage | None:
    """The stage of a command line; None: it runs none of the three scripts.

    Args:
        planned: its data and model need not be there yet.

    Raises:
        InputError: a bad field.
    """
    scripts = [i for i, word in enumerate(words) if word in SCRIPTS]
    if not scripts:
        return None
    script, arguments = words[scripts[0]], words[scripts[0] + 1 :]
    config_class = SCRIPTS[script]
    if planned and script == "evaluate.py":
        config_class = EvalPlan
    elif planned:
        config_class = memory.STAGES[script.removesuffix(".py")]
    config = load_config(config_class, arguments, PROTOCOLS if script == "evaluate.py" else None)
    return Stage(words, script, arguments, config, Path(config.out))


# -------------------------------------------------------------------------------- memory, time, disk


@dataclass
class Forecast:
    """A line of the plan."""

    what: str
    gib: float | None  # of one GPU while training; rollouts take what there is
    seconds: float
    measured: str  # of what the seconds were measured; empty: they are predicted
    disk: float  # bytes that it will have written in the end
    problem: str = ""  # why it does not fit


def forecast(stage: Stage, size: str, shape: str, ranks: int, gpu_bytes: float) -> Forecast:
    """What a stage takes: of memory, of time and of the disk.

    Args:
        shape: the model, as benchmarks/memory.py takes it.
        ranks: processes, over all machines.
        gpu_bytes: memory of one GPU.
    """
    assumed = SIZES[size]
    if stage.script == "evaluate.py":
        return forecast_evaluation(stage, assumed, ranks)

    # Memory, from the same fields with the model's shape in place of its folder.
    machine = [f"model={shape}", f"ranks={ranks}", f"gpu_gib={gpu_bytes / GIB:.3f}"]
    of_memory = memory.parse([stage.script.removesuffix(".py"), *stage.arguments, *machine])
    job = memory.planned_job(of_memory)
    of_training = sum(plan(job, gpu_bytes)["train"].values()) / GIB

    # Time: arithmetic of the packed tokens, and the tokens of the rollouts.
    usual = {"prompt_tokens": assumed.prompt, "utilisation": UTILISATION, "tflops": assumed.tflops}
    config = dataclasses.replace(of_memory, **usual, tpf=assumed.tpf)
    if stage.script == "sft.py":
        config.response_tokens = min(assumed.sft, config.max_tokens - config.prompt_tokens)
        seconds, what = 0.0, f"{config.steps} steps of {config.batch_size} sequences"
    else:
        config.response_tokens = min(assumed.rollout, config.max_tokens)
        rollouts = config.groups * config.group_size
        tokens = ROLLOUTS_PER_USEFUL * rollouts * config.response_tokens
        seconds = tokens / (ranks * assumed.tokens_per_second)
        what = f"{config.steps} steps of {config.groups} questions x {config.group_size} rollouts"
    seconds += memory.step_time(config)["seconds"]

    # What its steps really took, if there are any.
    measured = step_seconds(stage.out)
    note = f"of {len(measured)} steps" if measured else ""
    seconds = sum(measured) / len(measured) if measured else seconds

    # Checkpoints with moments, float32: those that stay, and one that is being written.
    disk = 12 * parameters(job.shape)["all"] * (config.keep_checkpoints + 1)
    return Forecast(what, of_training, config.steps * seconds, note, disk, problem(job, gpu_bytes))


def forecast_evaluation(stage: Stage, assumed: Assumed, ranks: int) -> Forecast:
    """`forecast` of evaluate.py: the tokens of all responses over the tokens per second."""
    config, seconds, tokens, questions = stage.config, 0.0, 0.0, 0
    trained = Path(config.model).name == "latest"  # longer responses than the published model's
    for item in config.data if isinstance(config.data, list) else [config.data]:
        default = (8, assumed.rollout, assumed.rollout)
        count, before, after = PUBLISHED.get(Path(item).stem, default)
        count = min(count, config.limit or count)
        each = min(after if trained else before, config.max_tokens)
        questions += count
        tokens += count * config.samples * each
    for rule in config.rules:  # static: one token per forward
        rate = assumed.tokens_per_second / (1 if rule == "dynamic" else assumed.tpf)
        seconds += tokens / (ranks * rate)
    what = (
        f"{questions * config.samples:,} responses to {questions:,} questions, {' and '.join(config.rules)}"
    )
    disk, summary = tokens * len(config.rules) * BYTES_PER_TOKEN, stage.out / "summary.json"
    if summary.exists():
        of_rules = json.loads(summary.read_text())["benchmarks"].values()
        spent = sum(figures["seconds"] for of_rule in of_rules for figures in of_rule.values())
        return Forecast(what, None, spent, "of its responses", disk)
    return Forecast(what, None, seconds, "", disk)


def step_seconds(run: Path) -> list[float]:
    """Seconds of each step that a run logged."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        return []
    records = [record for _, record in read_records(file, interrupted=True)]
    return [sum(v for name, v in r.items() if name.startswith("seconds/")) for r in records]


# ------------------------------------------------------------------------- what would stop it here


def package_problems(python: tuple[int, ...] = sys.version_info[:3]) -> Iterator[str]:
    """Packages of pyproject.toml that are missing or of another version."""
    if python < (3, 10):
        yield f"Python {'.'.join(map(str, python))}, expected 3.10 or newer"
    listed = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    for text in re.findall(r'"([^"]+)"', listed[1]):
        yield from version_problem(Requirement(text), "pip install -r requirements.txt")


def version_problem(wanted: Requirement, remedy: str) -> Iterator[str]:
    """Whether a package is there in a version that is wanted."""
    try:
        found = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        yield f"{wanted.name} is missing: {remedy}"
        return
    if not wanted.specifier.contains(found, prereleases=True):
        yield f"{wanted.name} {found} is installed, expected {wanted.specifier}: {remedy}"


def engine_problems() -> Iterator[str]:
    """LMDeploy, which rolls out on a GPU: is it there, and does it load with this torch and Triton?"""
    remedy = "pip install --no-deps -r requirements-lmdeploy.txt"
    found = lmdeploy_problem()
    if found and "CUDA" not in found:  # that is said elsewhere
        yield f"{found}: {remedy}"
        return
    yield from version_problem(Requirement("triton<3.8"), remedy)
    code = "import lmdeploy.pytorch.engine.engine, lmdeploy.pytorch.strategies.dllm.sequence"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield f"lmdeploy does not load with these packages ({reason}): {remedy}"

    # Triton compiles a launcher in C for every kernel.
    if not (shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        yield "no C compiler, which Triton needs: apt-get install gcc"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        yield "no Python.h, which Triton needs: apt-get install python3-dev"


def download_problems(names: list[str]) -> Iterator[str]:
    """Packages that reading these data sets takes."""
    parquet = [n for n in names if n in download.DATASETS and "parquet" in str(download.DATASETS[n].files)]
    if parquet and importlib.util.find_spec("pyarrow") is None:
        yield f"pyarrow is missing, which {parquet[0]} needs: pip install pyarrow"


@dataclass
class Gpu:
    """What this machine says of one."""

    name: str
    bytes: int
    free: int
    capability: tuple[int, int]


def find_gpus() -> list[Gpu]:
    """The GPUs that torch sees."""
    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        of_gpu, (free, total) = torch.cuda.get_device_properties(i), torch.cuda.mem_get_info(i)
        gpus.append(Gpu(of_gpu.name, total, free, (of_gpu.major, of_gpu.minor)))
    return gpus


def gpu_problems(gpus: list[Gpu], wanted: int, cuda: str | None = torch.version.cuda) -> Iterator[str]:
    """GPUs that are missing, too old, or in use.

    Args:
        wanted: on this machine.
        cuda: the version that torch was built for; None: for CPUs.
    """
    if not gpus:
        why = f"built for CUDA {cuda}; nvidia-smi shows GPUs and driver" if cuda else "built for CPUs"
        yield f"torch {torch.__version__} sees no GPU ({why})"
        return
    if len(gpus) < wanted:
        yield f"{len(gpus)} GPUs, expected {wanted}: GPUS={len(gpus)} runs on what is there"
    for number, gpu in enumerate(gpus[:wanted]):
        if gpu.capability < (8, 0):
            found = ".".join(map(str, gpu.capability))
            yield f"GPU {number} ({gpu.name}): compute capability {found}, expected 8.0 or more (bfloat16)"
        if gpu.bytes - gpu.free > 2 * CONTEXT:
            used = (gpu.bytes - gpu.free) / GIB
            yield f"GPU {number} ({gpu.name}): another process uses {used:.1f} GiB of it (nvidia-smi)"


def launch_problems(gpus: int, nodes: int, master: str) -> Iterator[str]:
    """What torchrun and NCCL need.

    Args:
        master: HOST:PORT of the first machine.
    """
    if nodes > 1 and not re.fullmatch(r"[\w.:\[\]-]+:\d+", master):
        yield f"environment variable MASTER: {master!r}, expected HOST:PORT of machine 0, as in node0:29500"
    if gpus * nodes == 1:
        return
    room = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").exists() else 0
    if torch.cuda.is_available() and room < GIB:
        yield f"/dev/shm has {room / GIB:.2f} GiB, which NCCL needs: docker run --shm-size 16g"


def disk_problems(needs: list[tuple[Path, float]]) -> Iterator[str]:
    """File systems with too little room.

    Args:
        needs: (folder, bytes that will lie there in the end).
    """
    by_disk: dict[int, tuple[list[Path], float]] = {}
    for folder, needed in needs:
        place = existing(folder)
        there = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink())
        folders, more = by_disk.get(place.stat().st_dev, ([], 0.0))
        by_disk[place.stat().st_dev] = ([*folders, folder], more + max(0, needed - there))
    for folders, more in by_disk.values():
        free = shutil.disk_usage(existing(folders[0])).free
        if free < more:
            names = " and ".join(map(str, folders))
            yield f"{names}: {free / GIB:.1f} GiB of the disk are free, expected {more / GIB:.1f}"


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return folder if folder.exists() else existing(folder.parent)


# --------------------------------------------------------------------------------------- the plan


def print_plan(options: argparse.Namespace, commands: list[list[str]]) -> None:
    """Print what will be done, then what would stop it; exit code 2 if anything would.

    Args:
        commands: of runs.sh, each as its words.
    """
    for name in ("out", "data"):
        if not re.fullmatch(r"[\w./-]+", getattr(options, name)):
            raise InputError(
                f"{name.upper()}: {getattr(options, name)!r}, expected letters, digits and . _ - /"
            )
    ranks, gpus, on_cpu = options.gpus * options.nodes, find_gpus(), options.size == "tiny"
    smallest = min((gpu.bytes for gpu in gpus), default=memory.Machine.gpu_gib * GIB)

    # Every stage, with memory, time and disk.
    stages = [stage for words in commands if (stage := read_stage(words))]
    downloads = [word for words in commands if "data/download.py" in words for word in words]
    with tempfile.TemporaryDirectory() as folder:
        shape = str(tiny(folder)) if on_cpu else options.size
        lines = [forecast(stage, options.size, shape, ranks, smallest) for stage in stages]
        weights = 2 * parameters(memory.model_config(shape))["all"]
    show_plan(options, stages, lines, gpus, smallest)

    # What would stop it.
    problems = list(package_problems())
    if not on_cpu:
        problems += [*gpu_problems(gpus, options.gpus), *engine_problems()]
        for stage, line in zip(stages, lines, strict=True):
            problems += [f"{stage.out.name}: {line.problem}"] if line.problem else []
    problems += launch_problems(options.gpus, options.nodes, options.master)
    problems += download_problems(downloads)
    written = sum(line.disk for line in lines)
    problems += disk_problems(
        [(Path(options.out), written), (Path(options.data), weights + GIB * (not on_cpu))]
    )
    for found in problems:
        tell(f"error: {found}")
    if problems:
        sys.exit(2)

    # What is finished, for runs.sh too.
    for name, reason in to_skip(stages).items():
        print(f"skipped: {name} ({reason})")


def show_plan(
    options: argparse.Namespace,
    stages: list[Stage],
    lines: list[Forecast],
    gpus: list[Gpu],
    gpu_bytes: float,
) -> None:
    """Print the table, and what it rests on."""
    size, assumed = options.size, SIZES[options.size]
    versions = [f"Python {sys.version.split()[0]}"]
    for name in ("torch", "transformers", "lmdeploy", "triton"):
        if importlib.util.find_spec(name):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    kinds = sorted({f"{gpu.name} ({gpu.bytes / GIB:.1f} GiB)" for gpu in gpus})
    print(f"machine: {f'{len(gpus)} x ' if gpus else 'no GPU'}{', '.join(kinds)}; {', '.join(versions)}")
    devices = options.gpus * options.nodes
    device = "a CPU" if size == "tiny" else f"{devices} GPUs of {gpu_bytes / GIB:.1f} GiB"
    print(f"plan of `bash runs.sh {size}` on {device}:\n")

    # A line per stage.
    print("| stage | what | training, GiB per GPU | time | GiB on disk |\n|---|---|---:|---:|---:|")
    for stage, line in zip(stages, lines, strict=True):
        gib = "" if line.gib is None else f"{line.gib:.1f}"
        note = f"measured ({line.measured})" if line.measured else "predicted"
        row = [stage.out.name, line.what, gib, f"{span(line.seconds)} {note}", f"{line.disk / GIB:.1f}"]
        print(f"| {' | '.join(row)} |")
    seconds, disk = sum(line.seconds for line in lines), sum(line.disk for line in lines) / GIB
    gpu_hours = "" if size == "tiny" else f"{seconds / 3600 * devices:.0f} GPU-hours"
    print(f"| **together** | {gpu_hours} | | **{span(seconds)}** | **{disk:.1f}** |")

    # Where it goes, and the arithmetic.
    print(f"\nRuns, checkpoints and report go to {options.out}, data and models to {options.data}.")
    print(
        f"Predicted means: training is the FLOPs of the packed tokens (benchmarks/memory.py) at "
        f"{100 * UTILISATION:.0f} % of {assumed.tflops:g} TFLOP/s; rollouts are "
        f"{assumed.tokens_per_second:,.0f} tokens/s per device at TPF {assumed.tpf:g}, and "
        f"{ROLLOUTS_PER_USEFUL:g} of them for each that is trained on; {assumed.sft:,} tokens per SFT "
        f"response, {assumed.rollout:,} per rollout. All of this is assumed, see docs/node.md.\n",
        flush=True,
    )


def span(seconds: float) -> str:
    """Seconds in hours, or in minutes if they are few."""
    return f"{seconds / 3600:.1f} h" if seconds > 1800 else f"{seconds / 60:.1f} min"


# ------------------------------------------------------------------------------- is a stage finished?


def finished(stage: Stage) -> str:
    """Why a stage need not run, in a line; empty: it has to.

    One that was finished with other settings has to run: it then says itself what differs.

    Args:
        stage: read with planned=False.
    """
    if stage.script == "evaluate.py":
        return finished_evaluation(stage)
    before = identity.read_identity(stage.out)
    done = checkpoints(stage.out)
    step = int(done[-1].name.removeprefix("step-")) if done else 0
    if before is None or step < stage.config.steps:
        return ""
    now = identity.identity(stage.config, before)
    if identity.differences(before, now, type(stage.config)):
        return ""
    return f"{stage.out} is at step {step} of {stage.config.steps}"


def finished_evaluation(stage: Stage) -> str:
    """`finished` of evaluate.py: the same settings, weights and questions have a summary."""
    config, summary, model = stage.config, stage.out / "summary.json", Path(stage.config.model).resolve()
    if not summary.exists():
        return ""
    now = dataclasses.asdict(config) | {"model": str(model), "questions": {}}
    files = sorted(model.glob("model*.safetensors"))
    now["weights"] = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    for name, path in benchmark_files(config.data).items():
        questions = read_questions(str(path))[: config.limit or None]
        text = json.dumps([(q.text, q.gold, q.tolerance) for q in questions])
        now["questions"][name] = hashlib.sha256(text.encode()).hexdigest()
    before = read_settings(stage.out / "config.json")
    compared = now.keys() - {"out", "max_batch", "cache_gib"}
    return f"{summary} is there" if all(before.get(name) == now[name] for name in compared) else ""


def to_skip(stages: list[Stage]) -> dict[str, str]:
    """The stages that need not run, by name, and why.

    None of those after a training stage that has to run: they are about the model that it makes.
    """
    reasons: dict[str, str] = {}
    for stage in stages:
        try:
            reason = finished(read_stage(stage.words, planned=False)) if stage.out.exists() else ""
        except InputError:  # such as data that is gone, which may be fetched again
            reason = ""
        if reason:
            reasons[stage.out.name] = reason
        elif stage.script != "evaluate.py":
            break
    return reasons


def main() -> None:
    """The plan of the commands on standard input."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--gpus", type=positive, required=True, help="of this machine")
    parser.add_argument("--nodes", type=positive, default=1, help="machines")
    parser.add_argument("--master", default="", help="HOST:PORT of the first of them")
    parser.add_argument("--out", required=True)
    parser.add_argument("--data", required=True)
    options = parser.parse_args()
    print_plan(options, [shlex.split(line, comments=False)[1:] for line in sys.stdin])


def positive(text: str) -> int:
    """A number of things."""
    if not re.fullmatch(r"[1-9]\d{0,5}", text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number above 0")
    return int(text)


if __name__ == "__main__":
    run_script(main)
