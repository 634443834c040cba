"""Accuracy against tokens per forward (TPF): does one decoder's curve lie outside another's? No torch.

A sweep is a run of `evaluate.py sweep=[...]`: a point (TPF, accuracy) for every confidence threshold. The
points make a curve, and three figures say how far apart two curves are:

    AUP          area under the accuracy-parallelism curve, with a weight for lost accuracy: `aup`
    vertical     accuracy at equal TPF, mean over the TPFs that both curves reach: `mean_heights`. Times the
                 length of that range it is the difference of the plain, unweighted areas
    horizontal   TPF at equal accuracy, mean over the accuracies that both reach: the same, axes exchanged

A curve is what a user can have: its height at TPF x is the best accuracy at x or more tokens per forward,
on the straight lines between points that are neighbours in TPF. So it never rises, and a threshold that is
slower and less accurate than another one does not count against a run (`envelope`). AUP takes all points,
and jumps where one gets more than 5 points below the slowest one: of the three it has the widest intervals.

Intervals are of a paired bootstrap: a resample draws questions, the same ones for all runs and thresholds,
and everything above is computed anew. They say what other questions would change. Where a side has
several runs (training seeds), each of its points is the mean over them; what another seed would change is
not in the intervals: the spread over all pairs of runs, one of each side, stands beside them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2_000  # resamples of the bootstrap
POSITIONS = np.linspace(0, 1, 41)  # in the common range: where the difference of two curves is looked at
Points = tuple[np.ndarray, np.ndarray]  # x and y, each [resamples, thresholds] or [resamples, corners]


@dataclass
class Sweep:
    """What one run did at each threshold with each question; every array is [thresholds, questions]."""

    name: str
    thresholds: list[float]  # falling: from the slowest to the fastest, as a rule
    correct: np.ndarray  # share of the question's samples that are right
    tokens: np.ndarray  # tokens of all its samples together
    forwards: np.ndarray  # forwards of all its samples together


@dataclass
class Figure:
    """A figure of two sides, and their difference, second less first."""

    name: str
    first: float
    second: float
    low: float  # 95 % interval of the difference
    high: float
    least: float  # of the differences of all pairs of runs, one of each side
    greatest: float

    @property
    def difference(self) -> float:
        """Second less first."""
        return self.second - self.first


@dataclass
class Comparison:
    """Two sweeps compared; `verdict`: outside, inside, crosses or cannot tell, of the second's curve."""

    figures: list[Figure]
    pairs: int  # of runs, one of each side
    verdict: str
    sentence: str


# ------------------------------------------------------------------------------------ curves


def aup(tpf: np.ndarray, accuracy: np.ndarray, best: np.ndarray | float) -> np.ndarray:
    """Accuracy under parallelism, in per cent x tokens per forward.

    Points in the order of their TPFs rho_1 <= rho_2 ...; those with an accuracy below y_1 - 5 are left out:

        AUP = rho_1 y_1 + sum over i > 1 of (rho_i - rho_(i-1)) (y_i W(y_i) + y_(i-1) W(y_(i-1))) / 2
        W(y) = min(exp(-3 (1 - y / y_max)), 1)

    Source: Qian et al., "AUP: when Accuracy Meets Parallelism in Diffusion Language Models", blog of Hao AI
    Lab, github hao-ai-lab/hao-ai-lab.github.io, content/blogs/text-diffusion/index.md. Read there, in
    several versions with the same definition; not read: the paper, d3LLM, arXiv 2601.07568. Their program
    (get_aup, read in a copy of their repository) computes the same and refuses a curve whose fastest point
    lies below y_1 - 5; here that point is left out, as their text says.

    Args:
        tpf, accuracy: [..., thresholds], accuracy in per cent. Points of equal TPF stay in their order.
        best: [...] y_max, the highest accuracy on this task: in a comparison, of all the runs. Of a run
            alone it is its own, so that AUPs of runs which were evaluated alone cannot be compared.

    Returns:
        [...]
    """
    # Points by TPF; a point that is left out takes the place of the one before it, which adds no area.
    order = np.argsort(tpf, axis=-1, kind="stable")
    tpf, accuracy = np.take_along_axis(tpf, order, -1), np.take_along_axis(accuracy, order, -1)
    counts = accuracy >= accuracy[..., :1] - 5 - 1e-9
    last = np.maximum.accumulate(np.where(counts, np.arange(tpf.shape[-1]), 0), axis=-1)
    tpf, accuracy = np.take_along_axis(tpf, last, -1), np.take_along_axis(accuracy, last, -1)

    best = np.maximum(np.asarray(best, float), 1e-12)[..., None]  # all wrong: 0, not 0 / 0
    weight = np.minimum(np.exp(-3 * (1 - accuracy / best)), 1)
    weighted = accuracy * weight
    trapezoids = np.diff(tpf) * (weighted[..., 1:] + weighted[..., :-1]) / 2
    return tpf[..., 0] * accuracy[..., 0] + trapezoids.sum(-1)


def envelope(points: Points) -> Points:
    """Corners of the curve: [resamples, 2 * thresholds - 1], x rising and y falling, or equal.

    Args:
        points: TPF and accuracy.

    Between two points the curve follows their line as long as no point farther right is higher, and is
    level from there on: (1, 90), (2, 60), (3, 75) gives (1, 90), (1.5, 75), (2, 75), (2, 75), (3, 75).
    """
    order = np.lexsort((points[1], points[0]), axis=-1)
    x, y = np.take_along_axis(points[0], order, -1), np.take_along_axis(points[1], order, -1)
    best = np.maximum.accumulate(y[:, ::-1], axis=-1)[:, ::-1]  # of this point and all to the right
    falls = y[:, :-1] > best[:, 1:]
    share = (best[:, 1:] - y[:, 1:]) / np.where(falls, y[:, :-1] - y[:, 1:], 1)
    level_from = x[:, 1:] - np.where(falls, share, 1) * (x[:, 1:] - x[:, :-1])
    corners_x, corners_y = (np.empty((len(x), 2 * x.shape[1] - 1)) for _ in range(2))
    corners_x[:, ::2], corners_x[:, 1::2] = x, level_from
    corners_y[:, ::2], corners_y[:, 1::2] = best, best[:, 1:]
    return corners_x, corners_y


def exchanged(curve: Points) -> Points:
    """A curve with its axes exchanged: x rising again."""
    return curve[1][:, ::-1], curve[0][:, ::-1]


def heights(curve: Points, at: np.ndarray) -> np.ndarray:
    """y of a curve at x = `at`: [resamples, positions], like `at`. Level to the left and right of it."""
    rows = zip(at, *curve, strict=True)
    return np.stack([np.interp(-x, -of_x[::-1], of_y[::-1]) for x, of_x, of_y in rows])  # a drop's upper end


def common_range(a: Points, b: Points) -> tuple[np.ndarray, np.ndarray]:
    """[resamples] smallest and largest x that both curves reach.

    If all x of one are larger than all of the other, it is the range of the other: the curve with the
    larger x can be had there too.
    """
    smallest = a[0][:, 0], b[0][:, 0]
    low, high = np.maximum(*smallest), np.minimum(a[0][:, -1], b[0][:, -1])
    return np.where(low > high, np.minimum(*smallest), low), high


def mean_heights(a: Points, b: Points) -> tuple[np.ndarray, np.ndarray]:
    """[resamples] mean height of each of two curves over their common range of x; exact."""
    low, high = common_range(a, b)
    corners = np.sort(np.clip(np.concatenate([a[0], b[0]], axis=-1), low[:, None], high[:, None]))
    middles, widths = (corners[:, 1:] + corners[:, :-1]) / 2, np.diff(corners)  # straight lines in between
    widths[high == low] = 1  # one x in common: all middles are there
    first, second = ((widths * heights(curve, middles)).sum(-1) / widths.sum(-1) for curve in (a, b))
    return first, second


# --------------------------------------------------------------------------------- bootstrap


def resample(questions: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """[1 + draws, questions] how often each question counts: first once each, then as it was drawn."""
    drawn = np.random.default_rng(seed).multinomial(questions, np.full(questions, 1 / questions), draws)
    return np.concatenate([np.ones((1, questions)), drawn])


def points_of(runs: Sequence[Sweep], counts: np.ndarray) -> Points:
    """Tokens per forward, and accuracy in per cent: [resamples, thresholds], each the mean over the runs.

    Args:
        counts: [resamples, questions] how often each question counts.
    """
    tpf = [(counts @ run.tokens.T) / (counts @ run.forwards.T) for run in runs]
    accuracy = [100 * (counts @ run.correct.T) / counts.sum(-1, keepdims=True) for run in runs]
    return np.mean(tpf, axis=0), np.mean(accuracy, axis=0)


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval over the first axis of resampled values."""
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    return low, high


def values_of(
    a: Points, b: Points, best: np.ndarray | float, thresholds: Sequence[float]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All figures of two sides' points by name, each [resamples] of the first and of the second side."""
    curves = envelope(a), envelope(b)
    turned = exchanged(curves[0]), exchanged(curves[1])
    low, high = (ends[0] for ends in common_range(*curves))
    least, most = (ends[0] for ends in common_range(*turned))
    values = {
        "AUP": (aup(*a, best), aup(*b, best)),
        f"accuracy at equal TPF, {low:.2f} to {high:.2f}": mean_heights(*curves),
        f"TPF at equal accuracy, {least:.1f} to {most:.1f} %": mean_heights(*turned),
    }
    for i, threshold in enumerate(thresholds):
        values[f"accuracy at threshold {threshold:g}"] = a[1][:, i], b[1][:, i]
        values[f"TPF at threshold {threshold:g}"] = a[0][:, i], b[0][:, i]
    return values


def compare_sweeps(
    first: Sequence[Sweep],
    second: Sequence[Sweep],
    names: tuple[str, str],
    others: Sequence[Sequence[Sweep]] = (),
    draws: int = DRAWS,
    seed: int = 0,
) -> Comparison:
    """Compare two sides, each of one or several runs with the same questions and thresholds.

    Args:
        names: of the sides.
        others: further sides of the comparison; only AUP's y_max depends on them.
    """
    # The curves as they are (row 0) and resampled, and the best accuracy of all sides.
    thresholds = first[0].thresholds
    counts = resample(first[0].correct.shape[1], draws, seed)
    a, b = points_of(first, counts), points_of(second, counts)
    best = np.max([points_of(side, counts)[1].max(-1) for side in (first, second, *others)], axis=0)
    values = values_of(a, b, best, thresholds)

    # The same figures of every pair of runs.
    pairs = []
    for one, other in itertools.product(first, second):
        pair = values_of(points_of([one], counts[:1]), points_of([other], counts[:1]), best[:1], thresholds)
        pairs.append([y[0] - x[0] for x, y in pair.values()])
    least, greatest = np.min(pairs, axis=0), np.max(pairs, axis=0)

    figures = []
    for i, (name, (x, y)) in enumerate(values.items()):
        low, high = interval((y - x)[1:])
        figures.append(Figure(name, x[0], y[0], float(low), float(high), least[i], greatest[i]))
    verdict, sentence = judge(envelope(a), envelope(b), names)
    if len(pairs) > 1:
        share = sum(pair[1] > 0 for pair in pairs)
        sentence += f" In {share} of {len(pairs)} pairs of runs, accuracy at equal TPF is higher on average."
    return Comparison(figures, len(pairs), verdict, sentence)


def judge(a: Points, b: Points, names: tuple[str, str]) -> tuple[str, str]:
    """(verdict, sentences about it): does the second curve lie outside the first? Row 0 is as measured.

    The difference of accuracies is looked at in 41 places of the common TPF range. Outside: in each of
    them the 95 % interval lies above 0. (As all have to, no place needs a wider interval on account of
    the others.) Inside: below 0. Crosses: above 0 in one place and below 0 in another, by a band that holds
    the whole difference with 95 %, its width in standard errors of each place.
    """
    # The difference in each place, [resamples, places], its intervals, and the band around it.
    low, high = common_range(a, b)
    at = low[:, None] + POSITIONS * (high - low)[:, None]
    difference = heights(b, at) - heights(a, at)
    lower, upper = interval(difference[1:])
    error = np.maximum(difference[1:].std(axis=0), 1e-9)
    width = error * np.quantile((np.abs(difference[1:] - difference[0]) / error).max(axis=-1), 0.95)
    above, below = difference[0] > width, difference[0] < -width

    # In words.
    one, other = names
    places = f"TPF that both reach ({low[0]:.2f} to {high[0]:.2f})"
    if max(a[0][0, 0], b[0][0, 0]) > high[0]:
        places = f"TPF of the slower one ({low[0]:.2f} to {high[0]:.2f}; they have none in common)"
    farthest, name = max((a[0][0, -1], one), (b[0][0, -1], other))
    beyond = f" Only {name} reaches more, up to {farthest:.2f}." if farthest > high[0] + 0.005 else ""
    if (lower > 0).all():
        return "outside", f"{other} lies outside {one}: at every {places} it is more accurate.{beyond}"
    if (upper < 0).all():
        return "inside", f"{other} lies inside {one}: at every {places} it is less accurate.{beyond}"
    found = []
    for word, where in (("more", above), ("less", below)):
        if where.any():
            first, last = np.flatnonzero(where)[[0, -1]]
            part = "at" if where[first : last + 1].all() else "in parts of"
            found.append(f"it is {word} accurate {part} TPF {at[0, first]:.2f} to {at[0, last]:.2f}")
    if len(found) == 2:
        return "crosses", f"{other} crosses {one}: {' and '.join(found)}.{beyond}"
    certain = f"{found[0]}; elsewhere it is open" if found else f"no difference is certain at the {places}"
    return "cannot tell", f"cannot tell whether {other} lies outside {one}: {certain}.{beyond}"
