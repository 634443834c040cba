"""The whole method on two CPU cores: data, SFT, DiPO, evaluation of both, one table, curves.

    python benchmarks/demo.py                 # under ten minutes; make demo sets up and calls this
    python benchmarks/demo.py --quick         # a minute: does everything run? (figures mean nothing)

Writes to --out (runs/demo): data/, sft/, dipo/ (run directories), eval_sft/, eval_dipo/, summary.json
and curves.png. Interrupted, it goes on where it stopped. Every stage is the command that a user would
type, and it is printed.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluate import table, write_json  # noqa: E402

QUICK = {
    "sft": ["steps=6", "batch_size=32", "eval_every=3", "eval_limit=20"],
    "dipo": ["steps=3", "groups=2", "eval_every=3", "eval_limit=20", "rewards.speed=1.0"],
    "eval": ["limit=50"],
}


def run(*command: str) -> None:
    """Print and run a command in the repository root; leave with its exit code if it fails."""
    print("\n$ " + shlex.join(["python", *command]), flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw_curves(out: Path) -> None:
    """Four panels to curves.png: accuracy, tokens per forward, response length, engine gap."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sft, dipo = (read_metrics(out / stage / "metrics.jsonl") for stage in ("sft", "dipo"))
    shift = sft[-1]["step"]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True)
    panels = [
        ("accuracy", "accuracy", axes[0, 0]),
        ("tpf", "tokens per forward", axes[0, 1]),
        ("tokens", "response tokens", axes[1, 0]),
    ]
    for name, title, axis in panels:
        for rows, offset, stage in ((sft, 0, "SFT"), (dipo, shift, "DiPO")):
            points = [(offset + r["step"], r[f"eval/{name}"]) for r in rows if f"eval/{name}" in r]
            axis.plot(*zip(*points, strict=True), "o-", ms=3, label=f"{stage}, validation (greedy)")
        sampled = "response_tokens" if name == "tokens" else name
        x, y = zip(*[(shift + r["step"], r[sampled]) for r in dipo], strict=True)
        axis.plot(x, y, lw=0.8, alpha=0.6, color="grey", label="DiPO, rollouts (sampled)")
        axis.set_title(title)
    gap = axes[1, 1]
    for name, label in (("gap_max", "maximum"), ("gap_mean", "mean")):
        gap.plot([shift + r["step"] for r in dipo], [r[name] for r in dipo], label=label)
    gap.axhline(1e-4, color="red", lw=0.8, ls="--", label="limit in float32")
    gap.set_yscale("log")
    gap.set_title("|engine - trainer| log-probability")
    for axis in axes.flat:
        axis.axvline(shift, color="black", lw=0.8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step (SFT, then DiPO after the line)")
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=120)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="only see that everything runs")
    options = parser.parse_args()
    out = options.out if options.out.is_absolute() else ROOT / options.out
    extra = QUICK if options.quick else {stage: [] for stage in QUICK}
    if (out / "summary.json").exists():
        sys.exit(f"{out} holds a finished demo; remove it, or give another --out")
    resumed, start = out.exists(), time.perf_counter()

    data, seed = f"{out}/data", f"seed={options.seed}"
    run("data/tiny.py", "--out", data, "--seed", str(options.seed))
    common = [seed, "resume=true", f"eval_data={data}/validation.jsonl"]
    sft = ["--config", "configs/demo_sft.yaml", f"out={out}/sft", f"data={data}/sft.jsonl"]
    run("sft.py", *sft, *common, *extra["sft"])
    dipo = ["--config", "configs/demo_dipo.yaml", f"out={out}/dipo", f"data={data}/rl.jsonl"]
    run("dipo.py", *dipo, f"model={out}/sft/latest", *common, *extra["dipo"])
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
        "gap_max": max(r["gap_max"] for r in read_metrics(out / "dipo/metrics.jsonl")),
        "peak_memory_gib": peak,
        "resumed": resumed,
    }
    draw_curves(out)
    write_json(out / "summary.json", summary)
    print("\n" + table(figures))
    print(f"\n{summary['seconds']:.0f} s, at most {peak:.1f} GiB in one process.")
    print(f"Curves: {out}/curves.png. Rollouts with their step maps: {out}/dipo/rollouts.jsonl.")
    print(f"All figures: {out}/summary.json, {out}/dipo/metrics.jsonl.")


if __name__ == "__main__":
    main()
