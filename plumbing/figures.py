"""Statistics, tables and pictures of evaluations: pure functions of numbers, no torch.

A benchmark is a sample of questions, and every question has k sampled answers. The k answers to one
question are alike, so what is resampled for an interval or a test is the questions:

    mean@k     mean accuracy over questions and samples; its interval by bootstrap over the questions
    pass@k     1 - C(n - c, k) / C(n, k) with c of n samples right; mean over the questions
    maj@k      is the commonest of the k answers right; mean over the questions
    a or b?    paired bootstrap of the per-question differences

The concept files make the figures, this file shows them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from plumbing import frontier
from plumbing.common import printable

Results = dict[str, dict[str, dict[str, Any]]]  # figures by decoding rule and benchmark
BOOTSTRAP_DRAWS = 10_000

# Benchmarks by name, with their titles in published tables; data/download.py fetches them.
BENCHMARKS = {
    "math500": "MATH500", "gsm8k": "GSM8K", "aime24": "AIME2024", "aime25": "AIME2025",
    "olympiadbench": "OlympiadBench",
}  # fmt: skip
# Accuracy in per cent / tokens per forward / mean response tokens, and the mean of the accuracies.
PUBLISHED_SOURCE = "DiRL, arXiv 2512.22234, Table 1"
PUBLISHED = """
Qwen2.5-7B-Instruct (AR) | 73.8/1.0/628.1 | 89.8/1.0/308.9 | 9.0/1.0/1005.5 | 5.6/1.0/970.5 | 36.6/1.0/862.0 | 42.9
Qwen2.5-32B-Instruct (AR) | 81.1/1.0/554.6 | 94.0/1.0/291.2 | 12.9/1.0/831.7 | 11.9/1.0/839.7 | 45.7/1.0/742.4 | 49.1
SDAR-8B-Chat, static | 71.5/1.0/603.4 | 89.5/1.0/712.9 | 5.6/1.0/1342.4 | 8.5/1.0/920.8 | 35.6/1.0/890.4 | 42.2
SDAR-8B-Chat, dynamic | 71.9/2.4/616.6 | 89.9/2.8/708.8 | 9.2/2.4/1274.2 | 9.4/2.1/889.8 | 36.0/2.4/896.4 | 43.3
TraDo-8B-Instruct, static | 76.7/1.0/618.1 | 90.4/1.0/324.7 | 11.5/1.0/1036.1 | 13.5/1.0/988.0 | 40.2/1.0/864.3 | 46.5
TraDo-8B-Instruct, dynamic | 75.6/2.3/618.6 | 91.1/2.1/315.2 | 11.7/2.0/1091.4 | 15.0/1.9/996.2 | 40.3/2.1/868.0 | 46.7
DiRL-8B-Instruct, static | 85.1/1.0/1917.2 | 93.1/1.0/707.4 | 21.5/1.0/5434.2 | 22.9/1.0/5019.0 | 47.3/1.0/3556.4 | 54.0
DiRL-8B-Instruct, dynamic | 83.1/2.0/2000.7 | 93.0/2.2/730.1 | 20.6/1.7/5468.5 | 20.8/1.7/5129.6 | 46.4/1.8/3614.5 | 52.8
"""  # noqa: E501


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold one of the c right ones.

    1 - C(n - c, k) / C(n, k): the unbiased estimator of arXiv 2107.03374, eq. 1.
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority(answers: Sequence[str | None]) -> int | None:
    """Where the commonest answer occurs first; of equally common ones, the first. None: no answer.

    Answers are equal if they are the same string but for white space and $, so `0.5` and `1/2` are
    two. None is no answer and has no vote.
    """
    votes = [None if a is None else "".join(a.replace("$", "").split()) for a in answers]
    counts = Counter(vote for vote in votes if vote is not None)  # most_common keeps the order among equals
    return votes.index(counts.most_common(1)[0][0]) if counts else None


def resampled_means(values: Sequence[float], draws: int = BOOTSTRAP_DRAWS, seed: int = 0) -> np.ndarray:
    """[draws] means, each of as many values as there are, drawn with replacement: the bootstrap."""
    values, rng = np.asarray(values, float), np.random.default_rng(seed)
    return np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(draws)])


def bootstrap_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean; one value per question, since samples of one are not independent."""
    tail = (1 - level) / 2
    low, high = np.quantile(resampled_means(values), [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def paired_bootstrap(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float, float]:
    """(mean of b - a, its 95 % interval, p-value), from one value per question under a and under b.

    p: how often differences with mean 0, the observed ones less their mean, give a mean at least as far
    from 0 (two-sided). Source: Efron and Tibshirani, An Introduction to the Bootstrap, section 16.4.
    """
    differences = np.asarray(b, float) - np.asarray(a, float)
    mean = differences.mean()
    away = np.abs(resampled_means(differences) - mean) >= abs(mean) - 1e-12
    return float(mean), *bootstrap_interval(differences), float((away.sum() + 1) / (len(away) + 1))


def cell(text: str) -> str:
    """A name as it may stand in a table: without what breaks its lines and columns, or moves a terminal."""
    return printable(text).replace("|", "\\|")


def average(benchmarks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of several benchmarks as one, each benchmark with the same weight, as papers do."""
    if len(benchmarks) == 1:
        return benchmarks[0]
    names = ("accuracy", "pass_at_k", "maj_at_k", "tpf", "tokens", "truncated")
    total = {name: sum(f[name] for f in benchmarks) for name in ("questions", "seconds")}
    tokens = sum(f["tokens_per_second"] * f["seconds"] for f in benchmarks)
    return {
        **{name: fmean(f[name] for f in benchmarks) for name in names},
        **total,
        "samples": benchmarks[0]["samples"],
        "tokens_per_second": tokens / total["seconds"],
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A Markdown table with a line per decoding rule (or checkpoint)."""
    lines = [
        "| | questions | k | accuracy | 95 % | pass@k | maj@k | TPF | tokens | truncated | tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, s in rows.items():
        interval = "-"
        if "accuracy_low" in s:
            interval = f"{100 * s['accuracy_low']:.1f} to {100 * s['accuracy_high']:.1f}"
        lines.append(
            f"| {cell(name)} | {s['questions']} | {s['samples']} | {100 * s['accuracy']:.1f} % | {interval} "
            f"| {100 * s['pass_at_k']:.1f} % | {100 * s['maj_at_k']:.1f} % | {s['tpf']:.2f} "
            f"| {s['tokens']:.1f} | {100 * s['truncated']:.1f} % | {s['tokens_per_second']:.0f} |"
        )
    return "\n".join(lines)


def tables(model: str, protocol: str, results: Results) -> tuple[str, dict[str, Any]]:
    """(all tables as Markdown, the means over benchmarks by decoding rule and the AUPs) of an evaluation."""
    # A line per benchmark and rule, and their means if there are several benchmarks.
    means = {rule: average(list(figures.values())) for rule, figures in results.items()}
    lines = {}
    for rule, figures in results.items():
        for name in figures:
            lines[f"{name}, {rule}"] = figures[name]
    if len(lines) > len(means):
        lines |= {f"mean, {rule}": figures for rule, figures in means.items()}
    else:
        lines = means

    # The area under a sweep. Named benchmarks are shown under the published figures too.
    found = [table(lines)]
    swept = sweep_areas(results)
    if swept:
        areas = swept["aup"] | ({"mean": fmean(swept["aup"].values())} if len(swept["aup"]) > 1 else {})
        shown = ", ".join(f"{cell(name)} {area:.1f}" for name, area in areas.items())
        found.append(
            f"AUP, the weighted area under accuracy (%) against TPF over the thresholds, with the best "
            f"accuracy of this run as y_max (plumbing/frontier.py): {shown}"
        )
    if any(name in BENCHMARKS for figures in results.values() for name in figures):
        found.append(published_table(model, protocol, results))
    return "\n\n".join(found) + "\n", means | swept


def sweep_areas(results: Results) -> dict[str, dict[str, float]]:
    """{"aup": AUP by benchmark} of a sweep, with the best accuracy of its thresholds as y_max; else {}.

    Args:
        results: figures by decoding rule and benchmark; `dynamic-T` for every threshold T.
    """
    labels = [label for label in results if label.startswith("dynamic-")]
    labels.sort(key=lambda label: -float(label.removeprefix("dynamic-")))
    areas = {}
    for name in results[labels[0]] if labels else ():
        tpf = np.array([results[label][name]["tpf"] for label in labels])
        accuracy = np.array([100 * results[label][name]["accuracy"] for label in labels])
        areas[name] = float(frontier.aup(tpf, accuracy, accuracy.max()))
    return {"aup": areas} if areas else {}


def published_table(model: str, protocol: str, results: Results) -> str:
    """The table of the paper, Markdown: what was measured here, under what was published.

    Args:
        results: figures by decoding rule and benchmark.
    """
    lines = [
        f"Accuracy in % / tokens per forward / mean response tokens. Published: {PUBLISHED_SOURCE}, not "
        f"measured here. **Measured**: this run, protocol {printable(protocol)}.",
        "",
        f"| | model | {' | '.join(BENCHMARKS.values())} | mean accuracy |",
        "|---|---|" + "---:|" * (len(BENCHMARKS) + 1),
    ]
    for row in PUBLISHED.strip().splitlines():
        lines.append(f"| published | {row.replace('/', ' / ')} |")
    for rule, benchmarks in results.items():
        cells = [
            f"{100 * f['accuracy']:.1f} / {f['tpf']:.1f} / {f['tokens']:.1f}" if f else "-"
            for f in map(benchmarks.get, BENCHMARKS)
        ]
        complete = benchmarks.keys() >= BENCHMARKS.keys()
        mean = f"{100 * fmean(benchmarks[n]['accuracy'] for n in BENCHMARKS):.1f}" if complete else "-"
        lines.append(f"| **measured** | **{cell(model)}, {rule}** | {' | '.join(cells)} | {mean} |")
    return "\n".join(lines)


def comparison_table(
    first: str, second: str, rows: dict[str, tuple[Sequence[float], Sequence[float]]]
) -> str:
    """Markdown: by name of a benchmark and rule, the accuracies per question of the first and second run."""
    lines = [
        f"| | questions | {cell(first)} | {cell(second)} | difference | 95 % | p |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, (a, b) in rows.items():
        difference, low, high, p = paired_bootstrap(a, b)
        lines.append(
            f"| {cell(name)} | {len(a)} | {100 * fmean(a):.1f} % | {100 * fmean(b):.1f} % "
            f"| {100 * difference:+.1f} | {100 * low:+.1f} to {100 * high:+.1f} | {p:.4f} |"
        )
    return "\n".join(lines)


def frontier_table(first: str, second: str, comparison: frontier.Comparison) -> str:
    """Markdown: the figures of two sweeps, their differences, and the verdict below."""
    lines = [
        f"| | {cell(first)} | {cell(second)} | difference | 95 % | pairs of runs |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for f in comparison.figures:
        spread = f"{f.least:+.2f} to {f.greatest:+.2f}" if comparison.pairs > 1 else "-"
        lines.append(
            f"| {f.name} | {f.first:.2f} | {f.second:.2f} | {f.difference:+.2f} "
            f"| {f.low:+.2f} to {f.high:+.2f} | {spread} |"
        )
    return "\n".join([*lines, "", f"Verdict: {cell(comparison.sentence)}"])


def plot_frontiers(
    path: str, panels: dict[str, list[list[frontier.Sweep]]], names: Sequence[str], draws: int = 2_000
) -> None:
    """Plot accuracy against TPF to a PNG: a panel per benchmark, a line through the thresholds per side.

    Crosses are 95 % intervals by bootstrap over the questions. A side of several runs is drawn as the mean
    over them at each threshold, its runs as thin lines.

    Args:
        panels: the runs of every side, by benchmark.
        names: of the sides.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(max(7.5, 6 * len(panels)), 5.5), squeeze=False)
    for axis, (benchmark, sides) in zip(axes[0], panels.items(), strict=True):
        for number, (name, runs) in enumerate(zip(names, sides, strict=True)):
            # The line of the side, with a cross at each point, and the lines of its runs.
            counts, color = frontier.resample(runs[0].correct.shape[1], draws), f"C{number}"
            tpf, accuracy = frontier.points_of(runs, counts)
            ends = [bootstrap_interval(row) for row in np.mean([run.correct for run in runs], axis=0)]
            low, high = frontier.interval(tpf[1:])
            middle = accuracy[0]
            up_down = np.abs(100 * np.array(ends).T - middle)
            left_right = np.maximum(0, [tpf[0] - low, high - tpf[0]])
            style = {"fmt": "o-", "ms": 5, "c": color, "capsize": 2, "lw": 1.2, "label": _plain(name)}
            _, caps, bars = axis.errorbar(tpf[0], middle, up_down, left_right, **style)
            for artist in (*caps, *bars):
                artist.set_alpha(0.35)
            for run in runs if len(runs) > 1 else ():
                x, y = frontier.points_of([run], counts[:1])
                axis.plot(x[0], y[0], "-", c=color, lw=0.7, alpha=0.5)

            # Thresholds beside the points: of the first side to the right above, of the second left below.
            side, place = ("left", (6, 4)) if number % 2 == 0 else ("right", (-6, -11))
            for x, y, threshold in zip(tpf[0], middle, runs[0].thresholds, strict=True):
                shown = {"textcoords": "offset points", "fontsize": 8, "color": color, "ha": side}
                axis.annotate(f"{threshold:g}", (x, y), place, **shown)
        axis.set(xlabel="tokens per forward", ylabel="accuracy (%)", title=_plain(benchmark))
        axis.margins(x=0.1)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    thin = "; thin: single runs" if any(len(runs) > 1 for sides in panels.values() for runs in sides) else ""
    title = f"Accuracy against TPF by threshold; crosses: 95 %, bootstrap over questions{thin}"
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plain(text: str) -> str:
    """A name as matplotlib may get it: what stands between $ would be set as mathematics."""
    return printable(text).replace("$", "\\$")


def plot_sweep(path: Path, thresholds: list[float], results: Results) -> None:
    """Accuracy and TPF against the threshold, and accuracy against throughput, to a PNG.

    Args:
        results: figures by decoding rule and benchmark; `dynamic-T` for every threshold T.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.5))

    # A colour per benchmark; static decoding as a dashed line or a star.
    thresholds = sorted(thresholds)
    for number, name in enumerate(next(iter(results.values()))):
        rows = [results[f"dynamic-{t:g}"][name] for t in thresholds]
        static, color = results.get("static", {}).get(name), f"C{number}"
        benchmark = _plain(name)
        _accuracies(axes[0, 0], thresholds, rows, "o-", color, benchmark)
        axes[1, 0].plot(thresholds, [row["tpf"] for row in rows], "o-", ms=5, lw=1.2, c=color)
        if static:
            label = f"{benchmark}, static"
            axes[0, 0].axhline(100 * static["accuracy"], c=color, ls="--", lw=1, label=label)
            axes[1, 0].axhline(static["tpf"], c=color, ls="--", lw=1)
        for axis, x in ((axes[0, 1], "tpf"), (axes[1, 1], "tokens_per_second")):
            _accuracies(axis, [row[x] for row in rows], rows, "o-", color, benchmark)
            if static:
                _accuracies(axis, [static[x]], [static], "*", color, label)
            best = max(range(len(rows)), key=lambda i: rows[i]["accuracy"])
            for i in {0, best, len(rows) - 1}:  # all of them would overlap
                at = (rows[i][x], 100 * rows[i]["accuracy"])
                axis.annotate(f"{thresholds[i]:g}", at, (6, 3), textcoords="offset points", fontsize=9)
            axis.margins(x=0.1)

    # What the axes are.
    for axis, x, y in (
        (axes[0, 0], "threshold", "accuracy (%)"),
        (axes[1, 0], "threshold", "tokens per forward"),
        (axes[0, 1], "tokens per forward (labels: first, best, last threshold)", "accuracy (%)"),
        (axes[1, 1], "tokens per second (labels: first, best, last threshold)", "accuracy (%)"),
    ):
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    axes[0, 1].legend(fontsize=8)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle("Dynamic decoding by threshold; bars: 95 % interval, bootstrap over questions")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _accuracies(axis: Any, x: list[float], rows: list[dict[str, Any]], style: str, color: str, label: str):
    middle, low, high = (
        np.array([100 * row[name] for row in rows]) for name in ("accuracy", "accuracy_low", "accuracy_high")
    )
    bars, size = (middle - low, high - middle), 12 if style == "*" else 5
    _, caps, lines = axis.errorbar(
        x, middle, bars, fmt=style, ms=size, c=color, capsize=2, lw=1.2, label=label
    )
    for artist in (*caps, *lines):
        artist.set_alpha(0.35)


def plot_row(
    colour: np.ndarray, tags: list[tuple[int, int, int]], labels: list[str], scored: list[int], path: str
) -> None:
    """Plot who sees whom in a packed row to a PNG: queries from top to bottom, keys from left to right.

    Args:
        colour: [N, N] 0 not visible, 1 clean sees clean, 2 view sees clean, 3 view sees itself.
        tags: N times (sequence, view, block).
        labels: N short token names.
        scored: positions whose names stand out.
    """
    plt = _pyplot()
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(figsize=(11, 11.6))
    palette = ["#f4f4f4", "#4878a8", "#8fbf7f", "#e08a3c"]
    axes.imshow(colour, cmap=ListedColormap(palette), vmin=0, vmax=3)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.xaxis.tick_top()

    # Lines and names where a sequence, a view or a block begins.
    starts = [0]
    for i in range(1, len(labels)):
        if tags[i] != tags[i - 1]:
            new_segment = tags[i][:2] != tags[i - 1][:2]
            starts += [i] if new_segment else []
            for line in (axes.axhline, axes.axvline):
                line(i - 0.5, color="black" if new_segment else "white", lw=0.8)
    for start, end in zip(starts, starts[1:] + [len(labels)], strict=True):
        sequence, view, block = tags[start]
        name = f"sequence {sequence}: clean copy" if view == 0 else f"view {view} (block {block})"
        axes.text(len(labels) - 0.2, (start + end - 1) / 2, name, va="center", fontsize=9)
    for position in scored:
        axes.get_yticklabels()[position].set_color("#c03030")
        axes.get_yticklabels()[position].set_fontweight("bold")

    names = ["not visible", "clean sees clean: block(kv) <= block(q)"]
    names += ["view sees clean: block(kv) < block(q)", "view sees itself"]
    patches = [Patch(facecolor=c, edgecolor="grey", label=n) for c, n in zip(palette, names, strict=True)]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.01), "ncol": 4}
    axes.legend(handles=patches, frameon=False, fontsize=9, **place)
    axes.set_title(
        "One packed row: each sequence once clean, then one view per (block, denoising step).\n"
        "Rows are queries, columns keys; _ is the mask token; red positions are scored by the LM head.",
        fontsize=11,
        pad=12,
    )
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


Curve = tuple[str, list[float], list[float]]  # name, x, y


def plot_curves(panels: list[tuple[str, list[Curve]]], ylabel: str, path: str) -> None:
    """Plot curves to a PNG, one panel per label of the x axis; names that end in "wrong" are dashed."""
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5 * len(panels), 4), sharey=True, layout="constrained"
    )
    for axis, (label, curves) in zip(axes, panels, strict=True):
        colors: dict[str, int] = {}
        for name, x, y in curves:
            number = colors.setdefault(name.split(",")[0], len(colors))
            style = "--" if name.endswith("wrong") else "-"
            width = 5 - 1.8 * number  # what coincides stays visible
            axis.plot(x, y, label=name, color=f"C{number}", linestyle=style, linewidth=width)
        axis.set_xlabel(label)
        axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(ylabel)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pyplot() -> Any:
    """matplotlib's pyplot, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
