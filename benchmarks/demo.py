"""The whole method on two CPU cores: data, SFT, DiPO, evaluation of both, one table, curves.

    python benchmarks/demo.py                 # under ten minutes; make demo sets up and calls this
    python benchmarks/demo.py --quick         # a minute: does everything run? (figures mean nothing)

Writes to --out (runs/demo): data/, sft/, dipo/ (run directories), eval_sft/, eval_dipo/, summary.json
and curves.png. Interrupted, it goes on where it stopped. Every stage is the command that a user would
type, and it is printed; after each stage the model is seen decoding a question.
"""

from __future__ import annotations

import json
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plumbing.common import InputError, read_records, run_script, write_json  # noqa: E402
from plumbing.config import Parser, folder_name  # noqa: E402
from plumbing.figures import table  # noqa: E402

QUESTION = "1+8+8+7+6?"  # of the longest kind, whose last term SFT teaches to leave out
QUICK = {
    "sft": ["steps=6", "batch_size=32", "eval_every=3", "eval_limit=20"],
    # an untrained model is never right: it is rewarded for speed, at a threshold that it reaches
    "dipo": ["steps=3", "groups=2", "eval_every=3", "eval_limit=20", "rewards.speed=1.0", "threshold=0.01"],
    "eval": ["limit=50"],
}


def run(*command: str) -> None:
    """Print and run a command in the repository root; leave with its exit code if it fails."""
    print("\n$ " + shlex.join(["python", *command]), flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def read_metrics(run_folder: Path) -> list[dict]:
    """What a run logged, step by step."""
    return [record for _, record in read_records(run_folder / "metrics.jsonl")]


def plot_curves(out: Path) -> None:
    """Plot SFT in the left column, DiPO in the right one, to curves.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4, 2, figsize=(10, 11), sharex="col")
    sampled = {"accuracy": "accuracy", "tpf": "tpf", "tokens": "response_tokens"}
    titles = ("accuracy", "tokens per forward", "response tokens")
    for column, stage in enumerate(("sft", "dipo")):
        metrics = read_metrics(out / stage)
        steps = [m["step"] for m in metrics]
        for (name, column_name), title, (left, right) in zip(sampled.items(), titles, axes, strict=False):
            axis = (left, right)[column]
            points = [(m["step"], m[f"eval/{name}"]) for m in metrics if f"eval/{name}" in m]
            if stage == "dipo":
                values = [m[column_name] for m in metrics]
                axis.plot(steps, values, lw=0.8, c="grey", label="rollouts, sampled")
                axis.sharey(left)
            axis.plot(*zip(*points, strict=True), "o-", ms=3, label="validation, greedy")
            axis.set_title(f"{stage.replace('sft', 'SFT').replace('dipo', 'DiPO')}: {title}")
        if stage == "sft":
            axes[3, 0].plot(steps, [m["loss"] for m in metrics], label="loss")
            axes[3, 0].set_title("SFT: loss per response token")
        else:
            for name in ("gap_max", "gap_mean"):
                axes[3, 1].plot(steps, [m[name] for m in metrics], label=name)
            axes[3, 1].axhline(1e-4, color="red", lw=0.8, ls="--", label="limit in float32")
            axes[3, 1].set_title("DiPO: |engine - trainer| log-probability")
        axes[3, column].set_yscale("log")
        axes[3, column].set_xlabel("step")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=110)


def main() -> None:
    """Run the demo."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=folder_name, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="only see that everything runs")
    options = parser.parse_args()
    out = options.out if options.out.is_absolute() else ROOT / options.out
    extra = QUICK if options.quick else {stage: [] for stage in QUICK}
    if (out / "summary.json").exists():
        raise InputError(f"{out} holds a finished demo; remove it, or give another --out")
    resumed, start = out.exists(), time.perf_counter()

    data, seed = f"{out}/data", f"seed={options.seed}"
    run("data/tiny.py", "--out", data, "--seed", str(options.seed))
    common = [seed, "resume=true", f"eval_data={data}/validation.jsonl"]
    sft = ["--config", "configs/demo_sft.yaml", f"out={out}/sft", f"data={data}/sft.jsonl"]
    run("sft.py", *sft, *common, *extra["sft"])
    run("rollout.py", f"{out}/sft/latest", QUESTION)
    dipo = ["--config", "configs/demo_dipo.yaml", f"out={out}/dipo", f"data={data}/rl.jsonl"]
    run("dipo.py", *dipo, f"model={out}/sft/latest", *common, *extra["dipo"])
    run("rollout.py", f"{out}/dipo/latest", QUESTION)
    for stage in ("sft", "dipo"):
        test = [f"data={data}/test.jsonl", "max_tokens=48", f"out={out}/eval_{stage}"]
        run("evaluate.py", f"model={out}/{stage}/latest", *test, *extra["eval"])

    figures = {
        f"{stage}, {rule}": json.loads((out / f"eval_{stage}/summary.json").read_text())[rule]
        for stage in ("sft", "dipo")
        for rule in ("static", "dynamic")
    }
    before, after = figures["sft, dynamic"], figures["dipo, dynamic"]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    summary = {
        "sft_accuracy": before["accuracy"],
        "rl_accuracy": after["accuracy"],
        "sft_tpf": before["tpf"],
        "rl_tpf": after["tpf"],
        "seconds": time.perf_counter() - start,
        "seed": options.seed,
        "questions": after["questions"],
        "gap_max": max(m["gap_max"] for m in read_metrics(out / "dipo")),
        "peak_memory_gib": peak,
        "resumed": resumed,
    }
    plot_curves(out)
    write_json(out / "summary.json", summary)
    print("\n" + table(figures))
    print(f"\n{summary['seconds']:.0f} s, at most {peak:.1f} GiB in one process.")
    print(f"Curves: {out}/curves.png. Open it in a browser: {out}/dipo/report.html.")
    print(f"All figures: {out}/summary.json, {out}/dipo/metrics.jsonl.")


if __name__ == "__main__":
    run_script(main)
