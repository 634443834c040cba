"""Writes memory.md, the memory plan of the shipped configs, beside this file: python docs/memory.py"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import memory  # noqa: E402

from plumbing.gpu import GIB, Job, cache_bytes_per_token, plan, problem  # noqa: E402

GPUS = {"H200": 139.8, "H100": 79.1}
CONFIGS = {  # and the models that each is planned for
    "sdar_8b_sft": ("1.7B", "8B"),
    "sdar_8b_dipo": ("1.7B", "8B"),
    "sdar_8b_dipo_release": ("1.7B", "8B"),
    "sdar_8b_b32_dipo": ("8B",),
    "sdar_1.7b_sft": ("1.7B",),
    "sdar_1.7b_dipo": ("1.7B",),
}

HEAD = """# Memory: who has the GPU when

Made by `python docs/memory.py` from the code. **All of it is arithmetic: nothing here was measured on a
GPU.** What had to be estimated stands at the top of plumbing/gpu.py: CUDA contexts, libraries and
fragmentation of the trainer (3 GiB), context of the engine (0.6 GiB) and its captured graphs (1 GiB).

The trainer and the rollout engine of a rank take turns on one GPU:

| phase | the trainer | LMDeploy, in a process of its own |
|---|---|---|
| rollout | at rest: weights and AdamW's moments in float32, sharded | weights, cache, working memory |
| train | gradients, gathered units, activations, logits on top | asleep: its CUDA context |
| update | at rest; a bucket, into which the slices of all ranks are gathered | weights, not yet its cache |

- The engine is built when the trainer is at rest, with its moments, and takes as cache 95 % of what then
  remains beside its own working memory and room for writing a checkpoint. `cache_gib` sets it by hand.
- Before the engine wakes, `gpu.to_engine` gives back what PyTorch's allocator keeps: before the weights
  travel and, for their bucket, after. So the second step needs what the first one needed.
- On CUDA every step logs `gib_rollout`, `gib_train` and `gib_update`: what the GPU held in each phase, to be
  held against this plan.
- A config that cannot fit is refused before weights are loaded, with the fields that would make it fit;
  `check_memory=false` tries it all the same.

`python benchmarks/memory.py dipo --config configs/sdar_8b_dipo.yaml model=8B ranks=8` plans any command of
sft.py or dipo.py, part by part.

GiB per GPU, for SDAR-1.7B and 8B on one and eight H200 (139.8 GiB) or H100 (79.1 GiB):
"""
COLUMNS = ["model", "GPUs", "rollout", "of it cache", "full responses in it", "train", "update", ""]


def planned(stage: str, config: str, model: str, ranks: int) -> Job:
    """What gpu.plan needs to know of a shipped config."""
    file = ROOT / "configs" / f"{config}.yaml"
    return memory.planned_job(
        memory.parse([stage, "--config", str(file), f"model={model}", f"ranks={ranks}"])
    )


def overview(name: str) -> list[str]:
    """A table of one config: models and GPUs down, phases across."""
    stage = "sft" if "sft" in name else "dipo"
    lines = ["", f"## configs/{name}.yaml", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for model in CONFIGS[name]:
        for ranks in (1, 8):
            for gpu, gib in GPUS.items():
                job = planned(stage, name, model, ranks)
                phases = plan(job, gib * GIB)
                cells = {}
                for phase in ("rollout", "train", "update"):
                    cells[phase] = f"{sum(phases[phase].values()) / GIB:.1f}" if phase in phases else "-"
                cache = phases.get("rollout", {}).get("engine: cache", 0)
                full = cache / cache_bytes_per_token(job.shape, 2) / job.longest
                reason = problem(job, gib * GIB)
                verdict = f"no: {reason.rpartition('; ')[2]}" if reason else "fits"
                held = [f"{cache / GIB:.1f}", f"{full:.0f}"] if cache > 0 else ["-", "-"]
                row = [model, f"{ranks} {gpu}", cells["rollout"], *held, cells["train"], cells["update"]]
                lines.append(f"| {' | '.join([*row, verdict])} |")
    return lines


def parts() -> list[str]:
    """A table of one plan, part by part."""
    phases = plan(planned("dipo", "sdar_8b_dipo", "8B", 8), GPUS["H200"] * GIB)
    names = list(dict.fromkeys(name for part in phases.values() for name in part))
    lines = ["", "## Part by part: configs/sdar_8b_dipo.yaml, 8B, 8 H200", ""]
    lines += [f"| GiB per GPU | {' | '.join(phases)} |", "|---|" + "---:|" * len(phases)]
    for name in names:
        cells = [f"{of_phase[name] / GIB:.1f}" if name in of_phase else "" for of_phase in phases.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    totals = [f"**{sum(of_phase.values()) / GIB:.1f}**" for of_phase in phases.values()]
    return [*lines, f"| **together** | {' | '.join(totals)} |"]


def document() -> str:
    """All of memory.md."""
    lines = [HEAD.rstrip()]
    for name in CONFIGS:
        lines += overview(name)
    return "\n".join([*lines, *parts()]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("memory.md").write_text(document())
