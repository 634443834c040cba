"""Curves of accuracy against tokens per forward: areas, bootstrap and verdicts against slow definitions."""

import json
import math
import sys
from pathlib import Path
from statistics import fmean

import compare
import numpy as np
import pytest

from plumbing import figures, frontier
from plumbing.common import InputError, run_script
from plumbing.frontier import Sweep, compare_sweeps

THRESHOLDS = [0.99, 0.9, 0.7, 0.5, 0.3]


def slow_aup(points: list[tuple[float, float]], best: float) -> float:
    """The formula of the source, point by point."""
    points = sorted(points, key=lambda point: point[0])
    points = [(rho, y) for rho, y in points if y >= points[0][1] - 5 - 1e-9]  # 5 exactly are kept
    total = points[0][0] * points[0][1]
    for (rho_before, y_before), (rho, y) in zip(points, points[1:], strict=False):
        weights = [min(math.exp(-3 * (1 - value / best)), 1) for value in (y_before, y)]
        total += (rho - rho_before) * (y * weights[1] + y_before * weights[0]) / 2
    return total


def slow_height(points: list[tuple[float, float]], at: float) -> float:
    """The most at x = at or farther right, on the lines between neighbours in x."""
    points = sorted(points)
    found = [y for x, y in points if x >= at] or [points[-1][1]]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= at < x1:
            found.append(y0 + (y1 - y0) * (at - x0) / (x1 - x0))
    return max(found)


def slow_reach(points: list[tuple[float, float]], least: float) -> float:
    """The largest x with so much y at least."""
    points = sorted(points)
    if points[-1][1] >= least:
        return points[-1][0]
    for (x0, y0), (x1, y1) in reversed(list(zip(points, points[1:], strict=False))):
        if y0 >= least > y1:
            return x0 + (x1 - x0) * (y0 - least) / (y0 - y1)
    raise AssertionError("nowhere")


def slow_means(a: list, b: list, places: int = 4_000) -> tuple[tuple[float, float], tuple[float, float]]:
    """Mean heights over the TPFs in common, and mean TPFs over the accuracies: many small pieces."""
    low = max(min(x for x, _ in points) for points in (a, b))
    high = min(max(x for x, _ in points) for points in (a, b))
    if low > high:
        low = min(min(x for x, _ in points) for points in (a, b))
    at = [low + (high - low) * (i + 0.5) / places for i in range(places)]
    vertical = fmean(slow_height(a, x) for x in at), fmean(slow_height(b, x) for x in at)

    of_fastest = [max(points)[1] for points in (a, b)]
    low, high = max(of_fastest), min(max(y for _, y in points) for points in (a, b))
    if low > high:
        low = min(of_fastest)
    at = [low + (high - low) * (i + 0.5) / places for i in range(places)]
    return vertical, (fmean(slow_reach(a, y) for y in at), fmean(slow_reach(b, y) for y in at))


def random_points(rng: np.random.Generator, n: int) -> list[tuple[float, float]]:
    """Some of them with equal coordinates, some beaten by others."""
    return [(rng.integers(10, 25) / 5, 70 + rng.integers(0, 12) / 1.0) for _ in range(n)]


def as_arrays(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.array(points).T
    return x[None], y[None]


# ------------------------------------------------------------------------------------ areas


def test_aup_by_hand():
    tpf, accuracy = np.array([4.0, 1.0, 2.0, 3.0]), np.array([70.0, 80.0, 80.0, 76.0])
    weight = math.exp(-3 * (1 - 76 / 80))
    by_hand = 80 + 80 + (80 + 76 * weight) / 2  # 70 is more than 5 below 80: left out
    assert frontier.aup(tpf, accuracy, 80.0) == pytest.approx(by_hand)
    first, last = 80 * math.exp(-3 * (1 - 80 / 90)), 76 * math.exp(-3 * (1 - 76 / 90))
    assert frontier.aup(tpf, accuracy, 90.0) == pytest.approx(80 + first + (first + last) / 2)
    assert frontier.aup(tpf, accuracy, 60.0) == pytest.approx(80 + 80 + 78), "no weight is above 1"


def test_the_ends_of_aup():
    assert frontier.aup(np.array([2.5]), np.array([60.0]), 60.0) == pytest.approx(150)
    assert frontier.aup(np.array([1.0, 3.0]), np.zeros(2), 0.0) == 0, "all wrong"
    exactly_5_less = frontier.aup(np.array([1.0, 2.0]), np.array([80.0, 75.0]), 80.0)
    assert exactly_5_less == pytest.approx(80 + (80 + 75 * math.exp(-3 / 16)) / 2)


def test_aup_is_the_formula_and_an_integral():
    rng = np.random.default_rng(0)
    for _ in range(200):
        points = random_points(rng, rng.integers(1, 7))
        best = 70 + rng.random() * 15
        value = float(frontier.aup(*as_arrays(points), best)[0])
        assert value == pytest.approx(slow_aup(points, best))

        # By small pieces: weighted accuracy against TPF, behind a rectangle to the first point.
        points.sort(key=lambda point: point[0])
        points = [point for point in points if point[1] >= points[0][1] - 5]
        total, pieces = points[0][0] * points[0][1], 500
        for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
            ends = [y * min(math.exp(-3 * (1 - y / best)), 1) for y in (y0, y1)]
            for piece in range(pieces):
                total += (ends[0] + (ends[1] - ends[0]) * (piece + 0.5) / pieces) * (x1 - x0) / pieces
        assert value == pytest.approx(total)


def test_heights_are_the_most_that_can_be_had():
    corners = frontier.envelope(as_arrays([(1.0, 90.0), (2.0, 60.0), (3.0, 75.0)]))
    assert [row.tolist() for row in corners] == [[[1, 1.5, 2, 2, 3]], [[90, 75, 75, 75, 75]]]
    by_hand = frontier.envelope(as_arrays([(1.0, 70.0), (2.0, 90.0), (3.0, 60.0), (4.0, 80.0)]))
    at = np.array([[0.5, 1.0, 2.0, 2.2, 3.0, 4.0, 5.0]])
    assert frontier.heights(by_hand, at)[0] == pytest.approx([90, 90, 90, 84, 80, 80, 80])
    rng = np.random.default_rng(1)
    for _ in range(300):
        points = random_points(rng, rng.integers(1, 7))
        at = np.sort(rng.uniform(1.5, 5.5, (1, 20)))
        curve = frontier.envelope(as_arrays(points))
        assert frontier.heights(curve, at)[0] == pytest.approx([slow_height(points, x) for x in at[0]])
        least = np.sort(rng.uniform(65, max(y for _, y in points), (1, 20)))
        reached = frontier.heights(frontier.exchanged(curve), least)[0]
        assert reached == pytest.approx([slow_reach(points, y) for y in least[0]])


def test_a_little_more_accuracy_moves_the_curve_a_little():
    """Also where a point begins to be better than the one before it."""
    rng, at = np.random.default_rng(4), np.linspace(1, 4, 50)[None]
    for _ in range(50):
        points = [(float(x), 70 + 5 * rng.random()) for x in range(1, 5)]
        points[2] = (3.0, points[1][1] - 1e-6)
        moved = [*points[:2], (3.0, points[1][1] + 1e-6), points[3]]
        before, after = (frontier.heights(frontier.envelope(as_arrays(p)), at) for p in (points, moved))
        assert np.abs(before - after).max() < 3e-6


def test_mean_heights_are_exact():
    rng = np.random.default_rng(2)
    apart = 0
    for _ in range(60):
        a, b = random_points(rng, rng.integers(1, 5)), random_points(rng, rng.integers(1, 5))
        apart += max(min(a), min(b))[0] > min(max(a), max(b))[0]
        curves = [frontier.envelope(as_arrays(points)) for points in (a, b)]
        vertical = frontier.mean_heights(*curves)
        horizontal = frontier.mean_heights(*map(frontier.exchanged, curves))
        for found, wanted in zip((vertical, horizontal), slow_means(a, b, 1_000), strict=True):
            assert (found[0][0], found[1][0]) == pytest.approx(wanted, abs=0.02)
    assert apart > 3, "no TPF in common: over the slower one's range"


# -------------------------------------------------------------------------------- bootstrap


def made_up(
    seed: int, questions: int = 200, shift: float = 0.0, faster: float = 1.0, tilt: float = 0.0
) -> Sweep:
    """A run on questions whose difficulty does not depend on the seed.

    Args:
        shift: of the log odds of a right answer; `tilt`: more of it at the slow end, less at the fast one.
        faster: factor of the tokens per forward.
    """
    rng, hard = np.random.default_rng([seed, 1]), np.random.default_rng(5).normal(0, 1.5, questions)
    slope = np.linspace(tilt, -tilt, len(THRESHOLDS))[:, None]
    odds = np.array([1.6, 1.5, 1.3, 1.0, 0.5])[:, None] + hard + shift + slope
    tpf = np.array([1.6, 2.2, 2.8, 3.3, 3.7])[:, None] * faster * np.exp(rng.normal(0, 0.2, odds.shape))
    tokens = rng.integers(40, 200, odds.shape)
    correct = rng.random((4, *odds.shape)) < 1 / (1 + np.exp(-odds))
    forwards = np.ceil(tokens / tpf)
    return Sweep(f"run {seed}", THRESHOLDS, correct.mean(axis=0), tokens.astype(float), forwards)


def slow_values(first: list[Sweep], second: list[Sweep], drawn: list[int], best: float | None = None) -> list:
    """All figures of both sides on the drawn questions, by loops: [(first, second), ...]."""
    sides = []
    for side in (first, second):
        points = []
        for t in range(len(THRESHOLDS)):
            tpf = [sum(r.tokens[t, q] for q in drawn) / sum(r.forwards[t, q] for q in drawn) for r in side]
            accuracy = [100 * fmean(r.correct[t, q] for q in drawn) for r in side]
            points.append((fmean(tpf), fmean(accuracy)))
        sides.append(points)
    if best is None:
        best = max(y for points in sides for _, y in points)
    values = [(slow_aup(sides[0], best), slow_aup(sides[1], best)), *slow_means(*sides)]
    for a, b in zip(*sides, strict=True):
        values += [(a[1], b[1]), (a[0], b[0])]
    return values


def test_the_bootstrap_is_the_slow_one():
    """Questions are drawn for all runs and thresholds together; runs of a side are averaged."""
    first, second = [made_up(1, 30), made_up(2, 30)], [made_up(3, 30, 0.4), made_up(4, 30, 0.4, 1.1)]
    comparison = compare_sweeps(first, second, ("a", "b"), draws=12, seed=3)
    counts = frontier.resample(30, draws=12, seed=3)
    assert counts.sum(axis=1).tolist() == [30.0] * 13 and len({tuple(row) for row in counts}) == 13
    slow = []
    for row in counts.astype(int):
        slow.append(slow_values(first, second, [q for q in range(30) for _ in range(row[q])]))
    pairs = []
    best = max(
        100 * np.mean([r.correct.mean(axis=1) for r in side], axis=0).max() for side in (first, second)
    )
    for one in first:
        pairs += [slow_values([one], [other], list(range(30)), best) for other in second]
    assert len(comparison.figures) == 13 and comparison.pairs == 4
    for i, figure in enumerate(comparison.figures):
        assert (figure.first, figure.second) == pytest.approx(slow[0][i], abs=2e-3)
        assert figure.difference == pytest.approx(slow[0][i][1] - slow[0][i][0], abs=2e-3)
        differences = [b - a for a, b in (values[i] for values in slow[1:])]
        wanted = np.quantile(differences, [0.025, 0.975])
        assert (figure.low, figure.high) == pytest.approx(wanted, abs=2e-3)
        of_pairs = [values[i][1] - values[i][0] for values in pairs]
        assert (figure.least, figure.greatest) == pytest.approx((min(of_pairs), max(of_pairs)), abs=2e-3)


def test_resamples_are_draws_with_replacement():
    counts = frontier.resample(50, draws=4_000)
    assert counts[0].tolist() == [1.0] * 50
    assert counts[1:].mean(axis=0) == pytest.approx(np.ones(50), abs=5 * (0.98 / 4_000) ** 0.5)
    assert counts[1:].var() == pytest.approx(1 - 1 / 50, abs=0.03)


def test_the_best_accuracy_is_that_of_all_sides():
    first, second, third = ([made_up(seed, shift=shift)] for seed, shift in ((1, 0), (2, 0), (3, 2)))
    alone = compare_sweeps(first, second, ("a", "b"), draws=10)
    together = compare_sweeps(first, second, ("a", "b"), [third], draws=10)
    assert together.figures[0].first < alone.figures[0].first
    assert together.figures[1] == alone.figures[1], "only AUP depends on it"


def test_a_curve_that_was_shifted_lies_outside():
    for seed in range(20):
        a, b = [made_up(2 * seed)], [made_up(2 * seed + 1, shift=1.0, faster=1.1)]
        there, back = (compare_sweeps(*sides, ("a", "b"), draws=300) for sides in ((a, b), (b, a)))
        assert (there.verdict, back.verdict) == ("outside", "inside")
        assert all(f.low > 0 for f in there.figures[1:3])
        assert all(f.high < 0 for f in back.figures[1:3])


def test_curves_that_cross_are_told():
    found = [
        compare_sweeps([made_up(s)], [made_up(s + 50, tilt=1.0)], ("a", "b"), draws=300) for s in range(8)
    ]
    assert [comparison.verdict for comparison in found] == ["crosses"] * 8


def test_intervals_of_runs_alike_hold_0():
    """In about 95 % of the repetitions; and hardly ever is one found to lie outside, or to cross."""
    held, verdicts, repetitions = np.zeros(13), [], 120
    for seed in range(repetitions):
        sides = [made_up(2 * seed + 1000)], [made_up(2 * seed + 1001)]
        comparison = compare_sweeps(*sides, ("a", "b"), draws=200, seed=seed)
        held += [f.low <= 0 <= f.high for f in comparison.figures]
        verdicts.append(comparison.verdict)
    assert (held / repetitions >= 0.87).all(), held / repetitions
    assert 0.91 <= held.mean() / repetitions <= 0.985
    assert verdicts.count("cannot tell") >= 0.95 * repetitions


# ----------------------------------------------------------------------------------- verdicts


def with_noise(points: list[tuple[float, float]], noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Points as they are, and 400 resamples in which every accuracy differs by as much as this, at random."""
    x, y = np.array(points).T
    errors = np.random.default_rng(len(points) + int(1000 * noise)).normal(0, noise, (401, len(points)))
    errors[0] = 0
    return np.tile(x, (401, 1)), y + errors


@pytest.mark.parametrize(
    ("a", "b", "noise", "sentence"),
    [
        (
            [(1, 80), (3, 70)], [(1, 84), (3, 76)], 0.5,
            "b lies outside a: at every TPF that both reach (1.00 to 3.00) it is more accurate.",
        ),
        (
            [(1, 80), (3, 70)], [(1, 75), (2, 70)], 0.5,
            "b lies inside a: at every TPF that both reach (1.00 to 2.00) it is less accurate. "
            "Only a reaches more, up to 3.00.",
        ),
        (
            [(1, 80), (3, 70)], [(4, 85), (5, 83)], 0.5,
            "b lies outside a: at every TPF of the slower one (1.00 to 3.00; they have none in common) it is "
            "more accurate. Only b reaches more, up to 5.00.",
        ),
        (
            [(1, 80), (5, 70)], [(1, 90), (5, 60)], 0.01,
            "b crosses a: it is more accurate at TPF 1.00 to 2.90 and it is less accurate at TPF 3.10 "
            "to 5.00.",
        ),
        (
            [(1, 80), (2, 79), (3, 60), (4, 59)], [(1, 80), (2, 79), (3, 70), (4, 69)], 0.01,
            "cannot tell whether b lies outside a: it is more accurate at TPF 2.05 to 4.00; elsewhere it is "
            "open.",
        ),
        (
            [(1, 80), (2, 70), (3, 60)], [(1, 81), (2, 70), (3, 61)], 0.01,
            "cannot tell whether b lies outside a: it is more accurate in parts of TPF 1.00 to 3.00; "
            "elsewhere it is open.",
        ),
        (
            [(1, 80), (3, 70)], [(1, 81), (3, 71)], 3.0,
            "cannot tell whether b lies outside a: no difference is certain at the TPF that both reach "
            "(1.00 to 3.00).",
        ),
    ],
)  # fmt: skip
def test_the_verdict_is_a_sentence(a, b, noise, sentence):
    curves = frontier.envelope(with_noise(a, noise)), frontier.envelope(with_noise(b, noise * 1.01))
    verdict, found = frontier.judge(*curves, ("a", "b"))
    assert found == sentence
    words = {"outside": "b lies outside", "inside": "b lies inside", "crosses": "b crosses"}
    assert found.startswith(words.get(verdict, "cannot tell"))


# -------------------------------------------------------------------------------- the program


def write_sweep(out: Path, sweep: Sweep, question: str = "?") -> Path:
    """A folder as evaluate.py leaves it, four samples per question."""
    out.mkdir(parents=True)
    (out / "summary.json").write_text("{}")
    for t, threshold in enumerate(sweep.thresholds):
        lines = []
        for q in range(sweep.correct.shape[1]):
            for sample in range(4):
                share, rest = divmod(int(sweep.tokens[t, q]), 4)
                tokens = share + (rest if sample == 0 else 0)
                forwards = int(sweep.forwards[t, q]) // 4 + (int(sweep.forwards[t, q]) % 4 > sample)
                steps = [1 + place * forwards // tokens for place in range(tokens)]
                record = {"index": q, "sample": sample, "question": f"{question}{q}", "gold": "1"}
                lines.append(
                    json.dumps(record | {"correct": bool(sample < 4 * sweep.correct[t, q]), "steps": steps})
                )
        (out / f"responses-x-dynamic-{threshold:g}.jsonl").write_text("\n".join(lines) + "\n")
    return out


def run_main(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
    code = 0
    try:
        run_script(compare.main)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def runs(tmp_path) -> dict[str, Path]:
    sweeps = {"a": made_up(1, 40), "a2": made_up(2, 40), "b": made_up(3, 40, 1.0), "b2": made_up(4, 40, 1.0)}
    return {name: write_sweep(tmp_path / name, sweep) for name, sweep in sweeps.items()}


def test_what_is_read_is_what_was_written(runs):
    (((read,),),) = compare.read_sweeps([[runs["a"]]]).values()
    wanted = made_up(1, 40)
    assert read.thresholds == THRESHOLDS
    for name in ("correct", "tokens", "forwards"):
        assert (getattr(read, name) == getattr(wanted, name)).all()


def test_two_sweeps_are_compared_by_the_program(runs, monkeypatch, capsys):
    code, out, err = run_main(monkeypatch, capsys, runs["a"], runs["b"])
    assert (code, err) == (0, "")
    wanted = compare_sweeps([made_up(1, 40)], [made_up(3, 40, 1.0)], (str(runs["a"]), str(runs["b"])))
    assert compare.compare(runs["a"], runs["b"]) in out, "the table of every rule"
    assert figures.frontier_table(str(runs["a"]), str(runs["b"]), wanted) in out
    assert "x, sweep over 5 thresholds:" in out and f"Verdict: {wanted.sentence}" in out


def test_several_runs_per_side(runs, monkeypatch, capsys):
    sides = [[runs["a"], runs["a2"]], [runs["b"], runs["b2"]]]
    code, out, _ = run_main(monkeypatch, capsys, *sides[0], "--with", *sides[1], "--names", "base", "tuned")
    assert code == 0
    read = compare.read_sweeps(sides)["x"]
    assert figures.frontier_table("base", "tuned", compare_sweeps(*read, ("base", "tuned"))) in out
    assert "(2 and 2 runs, averaged)" in out and "In 4 of 4 pairs of runs" in out
    code, out, _ = run_main(monkeypatch, capsys, runs["a"], "--with", runs["b"], "--with", runs["b2"])
    assert code == 0 and out.count("Verdict:") == 2, "each side is compared with the first"


def test_the_order_of_lines_does_not_matter(runs, monkeypatch, capsys):
    before = run_main(monkeypatch, capsys, runs["a"], runs["b"])
    file = runs["b"] / "responses-x-dynamic-0.7.jsonl"
    file.write_text("\n".join(reversed(file.read_text().splitlines())))
    assert run_main(monkeypatch, capsys, runs["a"], runs["b"]) == before


def test_the_picture(runs, tmp_path, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr("matplotlib.pyplot.close", shown.append)
    picture = tmp_path / "p.png"
    names = ["one $x$", "two", "three"]
    three = [runs["a"], runs["a2"], runs["b"]]
    code, out, _ = run_main(monkeypatch, capsys, *three, "--picture", picture, "--names", *names)
    assert code == 0 and "Verdict" not in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    ((axis,),) = (figure.axes for figure in shown)
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [r"one \$x\$", "two", "three"]
    labels = [text.get_text() for text in axis.texts]
    assert labels == [f"{t:g}" for t in THRESHOLDS] * 3
    sweep = made_up(1, 40)
    line, _, (across, upright) = axis.containers[0]
    assert line.get_xdata() == pytest.approx(sweep.tokens.sum(axis=1) / sweep.forwards.sum(axis=1))
    assert line.get_ydata() == pytest.approx(100 * sweep.correct.mean(axis=1))
    for row, segment in zip(sweep.correct, upright.get_segments(), strict=True):
        interval = figures.bootstrap_interval(row)
        assert segment[:, 1] == pytest.approx([100 * end for end in interval]), "as in the table"
    counts = frontier.resample(40)[1:]
    for t, segment in enumerate(across.get_segments()):
        tpf = counts @ sweep.tokens[t] / (counts @ sweep.forwards[t])
        assert segment[:, 0] == pytest.approx(np.quantile(tpf, [0.025, 0.975]))


def test_a_side_of_several_runs_is_drawn_with_its_runs(runs, tmp_path, monkeypatch):
    sweeps = compare.read_sweeps([[runs["a"], runs["a2"]], [runs["b"]]])
    shown = []
    monkeypatch.setattr("matplotlib.pyplot.close", shown.append)
    figures.plot_frontiers(str(tmp_path / "p.png"), sweeps, ["a", "b"])
    ((axis,),) = (figure.axes for figure in shown)
    assert "thin: single runs" in shown[0].get_suptitle()
    ys = [[100 * run.correct[t].mean() for run in sweeps["x"][0]] for t in range(5)]
    assert axis.containers[0][0].get_ydata() == pytest.approx([fmean(y) for y in ys])
    thin = [list(line.get_ydata()) for line in axis.lines if line.get_linewidth() == 0.7]
    assert thin == [pytest.approx([y[i] for y in ys]) for i in range(2)]


def no_sweep(runs):
    (runs["b"] / "responses-x-dynamic.jsonl").write_bytes(
        (runs["b"] / "responses-x-dynamic-0.9.jsonl").read_bytes()
    )
    for file in runs["b"].glob("responses-x-dynamic-*"):
        file.unlink()


def one_threshold_less(runs):
    (runs["b"] / "responses-x-dynamic-0.7.jsonl").unlink()


def one_threshold_more(runs):
    (runs["b"] / "responses-x-dynamic-0.1.jsonl").write_bytes(
        (runs["b"] / "responses-x-dynamic-0.9.jsonl").read_bytes()
    )


def other_questions(runs):
    file = runs["b"] / "responses-x-dynamic-0.5.jsonl"
    file.write_text(file.read_text().replace('"?7"', '"!7"'))


def damaged(old, new):
    def damage(runs):
        file = runs["b"] / "responses-x-dynamic-0.5.jsonl"
        lines = file.read_text().splitlines()
        assert old in lines[2]
        lines[2] = lines[2].replace(old, new)
        file.write_text("\n".join(lines))

    return damage


def unfinished(runs):
    (runs["b"] / "summary.json").unlink()


def another_benchmark(runs):
    for file in runs["b"].glob("responses-*"):
        file.rename(file.with_name(file.name.replace("-x-", "-y-")))


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (no_sweep, ["{b}: no sweep"]),
        (one_threshold_less, ["{b}: no responses-x-dynamic-0.7.jsonl"]),
        (one_threshold_more, ["{a}: no responses-x-dynamic-0.1.jsonl"]),
        (other_questions, ["{b}/responses-x-dynamic-0.5.jsonl: other questions than {a}/"]),
        (damaged('"steps": [1,', '"steps": ['), None),
        (damaged('"steps": [1,', '"steps": [0,'), ["{b}/responses-x-dynamic-0.5.jsonl:3: `steps`"]),
        (damaged('"steps": [1,', '"steps": [true,'), ["{b}/responses-x-dynamic-0.5.jsonl:3: `steps`"]),
        (damaged('"steps"', '"stepz"'), ["{b}/responses-x-dynamic-0.5.jsonl:3: `steps`"]),
        (damaged('"correct"', '"right"'), ["{b}/responses-x-dynamic-0.5.jsonl:3: no 'correct'"]),
        (damaged("{", ""), ["{b}/responses-x-dynamic-0.5.jsonl:3: not JSON"]),
        (unfinished, ["{b}: no finished evaluation"]),
        (another_benchmark, ["no benchmark in common"]),
    ],
)
def test_what_is_no_sweep_is_named_in_one_line(runs, tmp_path, monkeypatch, capsys, damage, wanted):
    damage(runs)
    code, out, err = run_main(
        monkeypatch, capsys, runs["a"], runs["a2"], "--with", runs["b"], "--picture", tmp_path / "p.png"
    )
    if wanted is None:  # a response that is one token shorter is a response
        assert code == 0
        return
    assert (code, out) == (2, "") and err.count("\n") == 1
    for text in wanted:
        assert text.format(**runs) in err
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["a"], "one RUN"),
        (["a", "b", "a2"], "a2: a third RUN"),
        (["a", "b", "--names", "one"], "--names: 1, expected 2"),
        (["a", "b", "--picture", "x.svg"], "--picture"),
        (["a", "b", "--picture", "/nowhere/x.png"], "/nowhere/x.png: cannot write it"),
        (["a", "--with", ""], "--with"),
    ],
)
def test_what_the_command_line_lacks_is_named(runs, monkeypatch, capsys, arguments, wanted):
    code, _, err = run_main(monkeypatch, capsys, *(runs.get(argument, argument) for argument in arguments))
    assert code == 2 and err.count("\n") == 1 and wanted in err


def test_two_runs_without_sweeps_are_still_compared(runs, monkeypatch, capsys):
    no_sweep(runs)
    (runs["a"] / "responses-x-dynamic.jsonl").write_bytes(
        (runs["a"] / "responses-x-dynamic-0.9.jsonl").read_bytes()
    )
    code, out, _ = run_main(monkeypatch, capsys, runs["a"], runs["b"])
    assert code == 0 and "| x-dynamic | 40 |" in out and "Verdict" not in out
    with pytest.raises(InputError, match="no sweep"):
        compare.read_sweeps([[runs["a"]], [runs["b"]]])


# --------------------------------------------------------------------------- in an evaluation


def test_the_area_of_an_evaluation():
    def of_one(tpf, accuracy):
        more = {
            "questions": 9,
            "samples": 1,
            "pass_at_k": 0.5,
            "maj_at_k": 0.5,
            "tokens": 9.0,
            "seconds": 1.0,
        }
        return more | {"tpf": tpf, "accuracy": accuracy, "truncated": 0.0, "tokens_per_second": 9.0}

    results = {
        "static": {"x": of_one(1.0, 0.99), "y": of_one(1.0, 0.99)},
        "dynamic-0.3": {"x": of_one(3.0, 0.76), "y": of_one(1.0, 0.3)},
        "dynamic-0.9": {"x": of_one(1.5, 0.80), "y": of_one(1.0, 0.4)},
    }
    areas = figures.sweep_areas(results)["aup"]
    x = 1.5 * 80 + 1.5 * (80 + 76 * math.exp(-0.15)) / 2
    assert areas == pytest.approx({"x": x, "y": 40}), "of equal TPFs the higher threshold is the first"
    text, _ = figures.tables("m", "none", results)
    assert f"as y_max (plumbing/frontier.py): x {x:.1f}, y 40.0, mean {(x + 40) / 2:.1f}\n" in text
    assert figures.sweep_areas({"static": results["static"]}) == {}
    assert "AUP" not in figures.tables("m", "none", {"static": results["static"]})[0]
