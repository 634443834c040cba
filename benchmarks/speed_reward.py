"""Does a speed reward make decoding faster, and does the exact likelihood matter for it?

    python benchmarks/speed_reward.py           # after make demo; twelve runs, under an hour on 2 cores

From one SFT checkpoint: accuracy alone against accuracy + speed, each with both likelihoods and three
seeds. Every run is `dipo.py` with the config below, then `evaluate.py` (greedy, dynamic) on the test
split. Two runs at a time, one thread each. Prints the table of all runs and of the means, writes
summary.json and speed.png to --out. Finished runs are kept, so it can be interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluate import write_json  # noqa: E402

REWARDS = {
    "accuracy": ["rewards={accuracy: 1.0}"],
    "accuracy + speed": ["rewards={accuracy: 1.0, speed: 1.0}"],
}
LIKELIHOODS = ("tokens", "exact")


def one_run(options: argparse.Namespace, rewards: str, likelihood: str, seed: int) -> dict:
    """Train and evaluate one condition; its figures."""
    folder = options.out / f"{rewards.replace(' + ', '-')}-{likelihood}-{seed}"
    result = folder / "eval" / "summary.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    train = [
        "dipo.py", "--config", "configs/demo_dipo.yaml", f"model={options.sft}",
        f"data={options.data}/rl.jsonl", f"out={folder}", f"seed={seed}", f"steps={options.steps}",
        f"lr={options.lr}", f"likelihood={likelihood}", "normalize_each=true", "eval_every=0",
        "save_every=10", "resume=true", *REWARDS[rewards],
    ]  # fmt: skip
    test = [
        "evaluate.py", f"model={folder}/latest", f"data={options.data}/test.jsonl", "rules=[dynamic]",
        "max_tokens=48", f"out={folder}/eval",
    ]  # fmt: skip
    for command in [] if result.exists() else [train, test]:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "a") as log:
            subprocess.run(
                [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log
            ).check_returncode()
    figures = json.loads(result.read_text())["dynamic"]
    print(f"{rewards}, {likelihood}, seed {seed}: {figures['accuracy']:.3f} {figures['tpf']:.3f}")
    return {"rewards": rewards, "likelihood": likelihood, "seed": seed} | {
        name: figures[name] for name in ("accuracy", "tpf", "tokens")
    }


def report(runs: list[dict], before: dict) -> str:
    """Markdown: every run, then mean and standard deviation per condition."""
    lines = ["| rewards | likelihood | seed | accuracy | TPF |", "|---|---|---:|---:|---:|"]
    lines += [f"| SFT checkpoint | | | {100 * before['accuracy']:.1f} % | {before['tpf']:.3f} |"]
    for r in runs:
        name = f"| {r['rewards']} | {r['likelihood']} | {r['seed']} |"
        lines.append(f"{name} {100 * r['accuracy']:.1f} % | {r['tpf']:.3f} |")
    for rewards, likelihood in product(REWARDS, LIKELIHOODS):
        chosen = [r for r in runs if (r["rewards"], r["likelihood"]) == (rewards, likelihood)]
        cells = []
        for name, scale, digits in (("accuracy", 100, 1), ("tpf", 1, 3)):
            values = [scale * r[name] for r in chosen]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
        lines.append(f"| **{rewards}** | **{likelihood}** | mean | {cells[0]} % | {cells[1]} |")
    return "\n".join(lines)


def draw(runs: list[dict], before: dict, path: Path) -> None:
    """Accuracy against tokens per forward, a point per run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 5))
    markers = dict(zip(product(REWARDS, LIKELIHOODS), ("o", "s", "^", "D"), strict=True))
    for condition, marker in markers.items():
        chosen = [r for r in runs if (r["rewards"], r["likelihood"]) == condition]
        x, y = [r["tpf"] for r in chosen], [100 * r["accuracy"] for r in chosen]
        axis.scatter(x, y, marker=marker, s=60, label=f"{condition[0]}, {condition[1]}", alpha=0.8)
    axis.scatter([before["tpf"]], [100 * before["accuracy"]], marker="x", c="k", label="SFT")
    axis.set_xlabel("tokens per forward (greedy, dynamic, threshold 0.9)")
    axis.set_ylabel("accuracy on the test split, per cent")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run all conditions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sft", type=Path, default=ROOT / "runs/demo/sft/latest")
    parser.add_argument("--data", type=Path, default=ROOT / "runs/demo/data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/speed")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2)
    options = parser.parse_args()
    if not options.sft.exists():
        sys.exit(f"error: {options.sft}: no such checkpoint; run make demo first, or give --sft")
    options.out.mkdir(parents=True, exist_ok=True)
    conditions = list(product(REWARDS, LIKELIHOODS, range(options.seeds)))
    with ThreadPoolExecutor(options.parallel) as pool:
        runs = list(pool.map(lambda condition: one_run(options, *condition), conditions))
    before = options.out / "sft" / "summary.json"
    if not before.exists():
        test = [f"data={options.data}/test.jsonl", "rules=[dynamic]", "max_tokens=48"]
        command = ["evaluate.py", f"model={options.sft}", *test, f"out={before.parent}"]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    before = json.loads(before.read_text())["dynamic"]
    write_json(options.out / "summary.json", {"sft": before, "runs": runs})
    draw(runs, before, options.out / "speed.png")
    print(report(runs, before))


if __name__ == "__main__":
    main()
