"""Does a speed reward make decoding faster, and does the exact likelihood matter for it?

    python benchmarks/speed_reward.py      # twelve runs, about an hour on two cores

One SFT checkpoint (the demo's config with blocks of 8 and no careless answers, made first); from it,
accuracy alone against accuracy + speed, each with both likelihoods and three seeds, each reward
normalised for itself. Every run is `dipo.py`, then `evaluate.py` (greedy, dynamic) on the test split.
Two runs at a time, one thread each. Prints tables, writes summary.json and speed.png to --out. Finished
runs are kept, so that it can be interrupted.

Why rollouts at a low threshold: whether a position is held is random only where its best token reaches
the threshold. Below it the position holds for sure (or is the most confident one), and no policy
gradient, exact or not, sees that a little more confidence would have revealed it. `why` measures that
share; at 0.9 it is a few per cent of all holds. So the rollouts decode at 0.6, where most holds are
random, and the result is evaluated there and at the usual 0.9.
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

import torch  # noqa: E402
from demo import run  # noqa: E402

from evaluate import EvalConfig, respond  # noqa: E402
from masking import HOLD, pack, replay  # noqa: E402
from model import Sampling  # noqa: E402
from plumbing.checkpoint import load_tokenizer  # noqa: E402
from plumbing.common import run_script, write_json  # noqa: E402
from plumbing.config import Parser  # noqa: E402
from reward import Question, read_questions  # noqa: E402
from rollout import Decoding, make_engine  # noqa: E402

REWARDS = {
    "accuracy": ["rewards={accuracy: 1.0}"],
    "accuracy + speed": ["rewards={accuracy: 1.0, speed: 1.0}"],
}
LIKELIHOODS = ("tokens", "exact")
THRESHOLDS = (0.6, 0.9)  # of the evaluation; rollouts use the first


def one_run(options: argparse.Namespace, rewards: str, likelihood: str, seed: int) -> dict:
    """Train and evaluate one condition; its figures."""
    folder = options.out / f"{rewards.replace(' + ', '-')}-{likelihood}-{seed}"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    train = [
        "dipo.py", "--config", "configs/demo_dipo.yaml", f"model={options.sft}",
        f"data={options.data}/rl.jsonl", f"out={folder}", f"seed={seed}", f"steps={options.steps}",
        f"lr={options.lr}", f"threshold={THRESHOLDS[0]}", f"likelihood={likelihood}",
        "normalize_each=true", "groups=20", "max_rounds=1", "eval_every=0", "save_every=10", "resume=true",
        *REWARDS[rewards],
    ]  # fmt: skip
    if not (folder / "eval_0.9" / "summary.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        tests = [test_command(f"{folder}/latest", options.data, folder, t) for t in THRESHOLDS]
        for command in [train, *tests]:
            with open(folder / "log.txt", "a") as log:
                subprocess.run(
                    [sys.executable, *command], cwd=ROOT, env=environment, stdout=log, stderr=log
                ).check_returncode()
    figures = {"rewards": rewards, "likelihood": likelihood, "seed": seed} | read_figures(folder)
    print(figures, flush=True)
    return figures


def test_command(checkpoint: str, data: Path, out: Path, threshold: float) -> list[str]:
    """Arguments of evaluate.py."""
    return [
        "evaluate.py", f"model={checkpoint}", f"data={data}/test.jsonl", "rules=[dynamic]",
        f"threshold={threshold}", "max_tokens=48", f"out={out}/eval_{threshold}",
    ]  # fmt: skip


def read_figures(folder: Path) -> dict[str, float]:
    """Accuracy and TPF at each threshold."""
    figures = {}
    for t in THRESHOLDS:
        summary = json.loads((folder / f"eval_{t}" / "summary.json").read_text())["dynamic"]
        figures |= {f"accuracy_{t}": summary["accuracy"], f"tpf_{t}": summary["tpf"]}
    return figures


def report(runs: list[dict], before: dict) -> str:
    """Markdown: every run, then mean and standard deviation per condition."""
    columns = [f"{name}_{t}" for t in THRESHOLDS for name in ("accuracy", "tpf")]
    lines = ["| rewards | likelihood | seed | " + " | ".join(columns) + " |"]
    lines.append("|---|---|---:|" + "---:|" * len(columns))

    def cells(values: list[str]) -> str:
        return " | ".join(values) + " |"

    lines.append("| SFT checkpoint | | | " + cells([f"{before[c]:.3f}" for c in columns]))
    for r in runs:
        name = f"| {r['rewards']} | {r['likelihood']} | {r['seed']} | "
        lines.append(name + cells([f"{r[c]:.3f}" for c in columns]))
    for condition in product(REWARDS, LIKELIHOODS):
        chosen = [r for r in runs if (r["rewards"], r["likelihood"]) == condition]
        means = [statistics.mean(r[c] for r in chosen) for c in columns]
        spreads = [statistics.stdev(r[c] for r in chosen) if len(chosen) > 1 else 0.0 for c in columns]
        figures = [f"{m:.3f} ± {s:.3f}" for m, s in zip(means, spreads, strict=True)]
        lines.append(f"| **{condition[0]}** | **{condition[1]}** | mean | " + cells(figures))
    return "\n".join(lines)


def why(checkpoint: Path, questions: list[Question]) -> str:
    """How much of the speed is random, hence can be learned: per threshold, a Markdown table.

    A hold of mass 1 was certain: it has no gradient, under either likelihood.
    """
    tokenizer = load_tokenizer(checkpoint)
    engine = make_engine(checkpoint, tokenizer, 0, EvalConfig(engine="torch"), checkpoint / "engine.log")
    b = engine.block_size
    lines = [
        "| threshold | TPF greedy | TPF sampled | holds | holds that were random |",
        "|---:|---:|---:|---:|---:|",
    ]
    for threshold in (0.5, 0.7, 0.9):
        tpf, rollouts = [], []
        for top_k in (1, 0):
            how = Decoding(threshold=threshold, max_tokens=48, top_k=top_k)
            graded = respond(engine, tokenizer, questions, how)
            rollouts = [group[0].rollout for group in graded]
            tpf.append(sum(len(r.response_ids) for r in rollouts) / sum(r.num_steps for r in rollouts))
        views = [replay(r, b, 1.0, exact=True) for r in rollouts]
        mass = []
        for row in pack(views, b, tokenizer.mask_token_id, 16384):
            with torch.no_grad():
                scores = engine.model.score(row, Sampling())
            mass.append(scores.logprobs[row.targets == HOLD].exp())
        mass = torch.cat(mass)
        random = (mass < 0.999).float().mean()
        lines.append(f"| {threshold} | {tpf[0]:.3f} | {tpf[1]:.3f} | {len(mass)} | {100 * random:.1f} % |")
    return "\n".join(lines)


def plot(runs: list[dict], before: dict, path: Path) -> None:
    """Plot accuracy against tokens per forward, a panel per threshold, a point per run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True)
    markers = dict(zip(product(REWARDS, LIKELIHOODS), ("o", "s", "^", "D"), strict=True))
    for axis, t in zip(panels, THRESHOLDS, strict=True):
        for condition, marker in markers.items():
            chosen = [r for r in runs if (r["rewards"], r["likelihood"]) == condition]
            x, y = [r[f"tpf_{t}"] for r in chosen], [r[f"accuracy_{t}"] for r in chosen]
            axis.scatter(x, y, marker=marker, s=60, label=", ".join(condition), alpha=0.8)
        axis.scatter(before[f"tpf_{t}"], before[f"accuracy_{t}"], marker="x", c="k", label="SFT")
        axis.set_title(f"decoded at threshold {t}")
        axis.set_xlabel("tokens per forward (greedy, dynamic)")
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on the test split")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run all conditions."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--sft", type=Path, help="checkpoint to start from; made if not given")
    parser.add_argument("--data", type=Path, help="folder of data/tiny.py; made if not given")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/speed")
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.data:
        options.data = options.out / "data"
        run("data/tiny.py", "--careless", "0", "--out", str(options.data))
    if not options.sft:
        options.sft = options.out / "sft" / "latest"
        data = [f"data={options.data}/sft.jsonl", f"eval_data={options.data}/validation.jsonl"]
        sft = ["--config", "configs/demo_sft.yaml", f"out={options.out}/sft", "block_size=8"]
        run("sft.py", *sft, *data, "resume=true")
    conditions = [(*pair, seed) for seed in range(options.seeds) for pair in product(REWARDS, LIKELIHOODS)]
    with ThreadPoolExecutor(options.parallel) as pool:
        runs = list(pool.map(lambda condition: one_run(options, *condition), conditions))
    folder = options.out / "before"
    for t in THRESHOLDS:
        if not (folder / f"eval_{t}" / "summary.json").exists():
            run(*test_command(str(options.sft), options.data, folder, t))
    before = read_figures(folder)
    write_json(options.out / "summary.json", {"sft": before, "runs": runs})
    plot(runs, before, options.out / "speed.png")
    print(report(runs, before))
    print("\n" + why(options.sft, read_questions(f"{options.data}/validation.jsonl")))


if __name__ == "__main__":
    run_script(main)
