"""Does DiPO learn the same with either engine? Same checkpoint, questions and seeds; 20 steps each.

    make demo                              # or any SFT checkpoint with its questions
    python benchmarks/engines.py           # on a CPU with the stand-ins of tests/lmdeploy_on_cpu.py

The engines draw from different random streams, so their runs are two samples of one experiment: the
mean rewards of the last five steps should differ by no more than those of two seeds do.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import dipo  # noqa: E402
from plumbing.common import read_records, run_script  # noqa: E402
from plumbing.config import Parser, load_config  # noqa: E402
from rollout import LMDeployEngine  # noqa: E402


def main() -> None:
    """Train with each engine and seed; print a Markdown table."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/demo/sft/latest")
    parser.add_argument("--data", default="runs/demo/data/rl.jsonl")
    parser.add_argument("--out", default="runs/engines")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    options, overrides = parser.parse_known_args()
    if not torch.cuda.is_available():
        LMDeployEngine.setup = "lmdeploy_on_cpu:install"
        os.environ["PYTHONPATH"] = str(ROOT / "tests")
    lines = ["| engine | seed | reward, first 5 steps | last 5 | TPF, last 5 | largest gap |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for seed in range(options.seeds):
        for engine in ("torch", "lmdeploy"):
            out = Path(options.out) / f"{engine}-{seed}"
            argv = [
                "--config", str(ROOT / "configs/demo_dipo.yaml"), f"model={options.model}",
                f"data={options.data}", f"out={out}", f"engine={engine}", f"seed={seed}",
                f"steps={options.steps}", "eval_every=0", "save_every=0", *overrides,
            ]  # fmt: skip
            dipo.main(load_config(dipo.DiPOConfig, argv))
            metrics = [record for _, record in read_records(out / "metrics.jsonl")]
            first, last = ([m["reward"] for m in part] for part in (metrics[:5], metrics[-5:]))
            tpf = statistics.mean(m["tpf"] for m in metrics[-5:])
            lines.append(
                f"| {engine} | {seed} | {statistics.mean(first):.3f} | {statistics.mean(last):.3f} "
                f"| {tpf:.2f} | {max(m['gap_max'] for m in metrics):.1e} |"
            )
    print("\n" + "\n".join(lines))


if __name__ == "__main__":
    run_script(main)
