"""Does a speed reward make decoding faster, and does the exact likelihood matter for it?

    python benchmarks/speed_reward.py      # twelve runs, about an hour on two cores

One SFT checkpoint (the demo's config with blocks of 8, made first); from it, accuracy alone against
accuracy + speed, each with both likelihoods and three seeds, each reward normalised for itself. Every
run is `dipo.py`, then `evaluate.py` (greedy, dynamic) on the test split. Two runs at a time, one thread
each. Prints a table, writes summary.json and speed.png to --out. Finished runs are kept, so that it can
be interrupted.

Why blocks of 8 and a threshold of 0.7: whether a position is held is random only where its best token
reaches the threshold. Below it the position holds for sure (or is the most confident one), and no
policy gradient, exact or not, sees that a little more confidence would have revealed it. With blocks
of 4 and 0.9, greedy and sampled decoding differ by 1.5 % in TPF: that is all there is to learn from.
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

from demo import run  # noqa: E402

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
        f"lr={options.lr}", f"threshold={options.threshold}", f"likelihood={likelihood}",
        "normalize_each=true", "max_rounds=1", "eval_every=0", "save_every=10", "resume=true",
        *REWARDS[rewards],
    ]  # fmt: skip
    test = [
        "evaluate.py", f"model={folder}/latest", f"data={options.data}/test.jsonl", "rules=[dynamic]",
        f"threshold={options.threshold}", "max_tokens=48", f"out={folder}/eval",
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
    axis.set_xlabel("tokens per forward (greedy, dynamic)")
    axis.set_ylabel("accuracy on the test split, per cent")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run all conditions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sft", type=Path, help="checkpoint to start from; made if not given")
    parser.add_argument("--data", type=Path, help="folder of data/tiny.py; made if not given")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/speed")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--threshold", type=float, default=0.7, help="of the dynamic decoding")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.data:
        options.data = options.out / "data"
        run("data/tiny.py", "--out", str(options.data))
    if not options.sft:
        options.sft = options.out / "sft" / "latest"
        data = [f"data={options.data}/sft.jsonl", f"eval_data={options.data}/validation.jsonl"]
        sft = ["--config", "configs/demo_sft.yaml", f"out={options.out}/sft", "block_size=8"]
        run("sft.py", *sft, *data, "eval_threshold=0.7", "resume=true")
    conditions = list(product(REWARDS, LIKELIHOODS, range(options.seeds)))
    with ThreadPoolExecutor(options.parallel) as pool:
        runs = list(pool.map(lambda condition: one_run(options, *condition), conditions))
    before = options.out / "eval_sft" / "summary.json"
    if not before.exists():
        test = [f"data={options.data}/test.jsonl", "rules=[dynamic]", "max_tokens=48"]
        test += [f"threshold={options.threshold}", f"out={before.parent}"]
        run("evaluate.py", f"model={options.sft}", *test)
    before = json.loads(before.read_text())["dynamic"]
    write_json(options.out / "summary.json", {"sft": before, "runs": runs})
    draw(runs, before, options.out / "speed.png")
    print(report(runs, before))


if __name__ == "__main__":
    main()
