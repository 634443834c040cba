"""Which of two finished evaluations is better? Accuracy on the same questions, with a paired bootstrap.

    python benchmarks/compare.py runs/a runs/b
    python benchmarks/compare.py runs/a-seed* --with runs/b-seed* --picture curves.png --names base tuned
    python benchmarks/compare.py runs/a runs/b runs/c --picture curves.png

A run is the folder that evaluate.py wrote. For every benchmark and decoding rule that both runs have, a
line of a Markdown table: the accuracy of each run (mean over questions and samples; the two may have
different numbers of samples), the difference, its 95 % interval, and the p-value of no difference. What
is resampled is questions, each with its difference between the runs: plumbing/figures.py.

If both are sweeps over thresholds, a second table says how far apart their curves of accuracy against
tokens per forward are, and a sentence whether the second lies outside the first: plumbing/frontier.py.
Several runs per side, for example training seeds, are averaged; each --with is a side that is compared with
the first. With more than two runs and no --with, each is a side of its own and only a picture is made.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plumbing.common import InputError, printable, read_records, run_script, writing
from plumbing.config import Parser, folder_name, picture_name
from plumbing.figures import comparison_table, frontier_table, plot_frontiers
from plumbing.frontier import Sweep, compare_sweeps
from plumbing.model_config import is_whole

Side = list[Path]  # runs that are averaged


def responses(folder: Path) -> dict[str, Path]:
    """Files of responses of a finished run by BENCHMARK-RULE.

    Raises:
        InputError: the run is not finished.
    """
    if not (folder / "summary.json").exists():
        raise InputError(f"{folder}: no finished evaluation (no summary.json)")
    return {f.stem.removeprefix("responses-"): f for f in folder.glob("responses-*.jsonl")}


def compare(first: Path, second: Path) -> str:
    """Accuracy of two finished runs on the same questions, Markdown, with a paired bootstrap.

    Raises:
        InputError: a run is not finished; no benchmark and rule in common, or its questions differ.
    """
    runs = [responses(folder) for folder in (first, second)]
    common = sorted(runs[0].keys() & runs[1].keys())
    if not common:
        raise InputError(f"{first} and {second} have no benchmark and decoding rule in common")
    accuracies = {}
    for name in common:
        a, b = (correct_by_question(run[name]) for run in runs)
        if a.keys() != b.keys():
            raise InputError(f"{runs[1][name]}: other questions than {runs[0][name]}")
        accuracies[name] = [fmean(a[q]) for q in a], [fmean(b[q]) for q in a]
    return comparison_table(str(first), str(second), accuracies)


Questions = dict[tuple[int, str, str], list[dict[str, Any]]]  # records by index, question, gold answer


def by_question(file: Path) -> Questions:
    """Responses by (index, question, gold answer).

    Raises:
        InputError: a line that is no graded response, with its number and field.
    """
    found: Questions = {}
    for where, record in read_records(file):
        try:
            question = (record["index"], record["question"], record["gold"])
            found.setdefault(question, []).append(record | {"where": where})
            correct = record["correct"]
        except KeyError as error:
            raise InputError(f"{where}: no {error} in this answer") from error
        except TypeError as error:
            raise InputError(f"{where}: `question` or `gold` is no text") from error
        if not isinstance(correct, bool):
            raise InputError(f"{where}: `correct` is {correct!r}, expected true or false")
    return found


def correct_by_question(file: Path) -> dict[tuple[int, str, str], list[bool]]:
    """Verdicts of the samples by (index, question, gold answer)."""
    return {q: [record["correct"] for record in records] for q, records in by_question(file).items()}


# ------------------------------------------------------------------------------------ sweeps


def thresholds_of(folder: Path) -> dict[str, dict[float, Path]]:
    """Files of responses of a run by benchmark and threshold; empty if it is no sweep."""
    found: dict[str, dict[float, Path]] = {}
    for name, file in responses(folder).items():
        benchmark, dynamic, threshold = name.rpartition("-dynamic-")
        try:
            if dynamic:
                found.setdefault(benchmark, {})[float(threshold)] = file
        except ValueError:  # a benchmark with such a name
            continue
    return found


def read_sweeps(sides: list[Side]) -> dict[str, list[list[Sweep]]]:
    """Sweeps of every side's runs, by the benchmarks that all of them have.

    Raises:
        InputError: a run that is no sweep, lacks a threshold that another one has, or has other questions.
    """
    # What there is, and that all have the same thresholds.
    folders = [folder for side in sides for folder in side]
    files = {folder: thresholds_of(folder) for folder in folders}
    for folder in folders:
        if not files[folder]:
            raise InputError(f"{folder}: no sweep (no responses-BENCHMARK-dynamic-THRESHOLD.jsonl)")
    benchmarks = sorted(set.intersection(*(set(files[folder]) for folder in folders)))
    if not benchmarks:
        raise InputError(f"{' and '.join(map(str, folders))} have no benchmark in common")

    # Each run's responses, with the first run's order of the questions.
    sweeps: dict[str, list[list[Sweep]]] = {}
    for benchmark in benchmarks:
        thresholds = sorted({t for folder in folders for t in files[folder][benchmark]}, reverse=True)
        for folder in folders:
            for threshold in thresholds:
                if threshold not in files[folder][benchmark]:
                    raise InputError(f"{folder}: no responses-{benchmark}-dynamic-{threshold:g}.jsonl")
        example = files[folders[0]][benchmark][thresholds[0]]
        order = list(by_question(example))
        sweeps[benchmark] = []
        for side in sides:
            read = [read_sweep(str(folder), files[folder][benchmark], order, example) for folder in side]
            sweeps[benchmark].append(read)
    return sweeps


def read_sweep(
    name: str, files: dict[float, Path], order: list[tuple[int, str, str]], example: Path
) -> Sweep:
    """One run's sweep over one benchmark.

    Args:
        files: by threshold.
        order: of the questions, which are those of the file `example`.

    Raises:
        InputError: other questions, or a line that is no response.
    """
    thresholds = sorted(files, reverse=True)
    correct, tokens, forwards = (np.zeros((len(thresholds), len(order))) for _ in range(3))
    for t, threshold in enumerate(thresholds):
        found = by_question(files[threshold])
        if found.keys() != set(order):
            raise InputError(f"{files[threshold]}: other questions than {example}")
        for q, question in enumerate(order):
            for record in found[question]:
                steps = record.get("steps")
                if not isinstance(steps, list) or not steps or not all(is_whole(s, 1, 2**31) for s in steps):
                    raise InputError(f"{record['where']}: `steps` is no list of whole numbers from 1 on")
                tokens[t, q] += len(steps)
                forwards[t, q] += len(set(steps))  # no two blocks share the number of a step
            correct[t, q] = fmean(record["correct"] for record in found[question])
    return Sweep(name, thresholds, correct, tokens, forwards)


def report_sweeps(sweeps: dict[str, list[list[Sweep]]], names: list[str]) -> str:
    """Markdown: every further side's curves compared with the first side's, by benchmark."""
    parts = []
    for benchmark, sides in sweeps.items():
        for i in range(1, len(sides)):
            pair = (names[0], names[i])
            comparison = compare_sweeps(sides[0], sides[i], pair, [*sides[1:i], *sides[i + 1 :]])
            averaged = len(sides[0]) * len(sides[i]) > 1
            title = f"{benchmark}, sweep over {len(sides[0][0].thresholds)} thresholds"
            title += f" ({len(sides[0])} and {len(sides[i])} runs, averaged)" if averaged else ""
            parts.append(f"{printable(title)}:\n\n{frontier_table(*pair, comparison)}")
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------ the script


def read_command() -> tuple[list[Side], list[str], argparse.Namespace]:
    """(sides, their names, all arguments) of the command line.

    Raises:
        InputError: runs that make no comparison, or names that are not one per side.
    """
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run = {"nargs": "+", "type": folder_name, "metavar": "RUN"}
    parser.add_argument("runs", help="folder of a finished evaluation", **run)
    parser.add_argument("--with", dest="further", action="append", default=[], help="another side", **run)
    parser.add_argument("--picture", type=picture_name, help="draw the curves of sweeps to this PNG")
    parser.add_argument("--names", nargs="+", default=[], help="of the sides, instead of their folders")
    arguments = parser.parse_args()

    # The sides.
    runs = arguments.runs
    sides = [runs, *arguments.further] if arguments.further else [[folder] for folder in runs]
    if len(sides) == 1:
        raise InputError("one RUN, expected two, or --with RUN")
    if len(sides) > 2 and not arguments.further and not arguments.picture:
        raise InputError(f"{runs[2]}: a third RUN, expected two, or --with or --picture")
    names = arguments.names or [" ".join(map(str, side)) for side in sides]
    if len(names) != len(sides):
        raise InputError(f"--names: {len(names)}, expected {len(sides)}, one per side")
    return sides, names, arguments


def main() -> None:
    """Compare the runs of the command line."""
    sides, names, arguments = read_command()

    # Two runs, whatever they are.
    two_runs = len(sides) == 2 and len(sides[0]) == len(sides[1]) == 1
    if two_runs:
        print(compare(sides[0][0], sides[1][0]))
        if not arguments.picture and not all(thresholds_of(folder) for (folder,) in sides):
            return

    # Sweeps.
    sweeps = read_sweeps(sides)
    if two_runs or arguments.further:
        print(("\n" if two_runs else "") + report_sweeps(sweeps, names))
    if arguments.picture:
        with writing(Path(arguments.picture)):
            plot_frontiers(arguments.picture, sweeps, names)
        print(f"\nwrote {printable(arguments.picture)}")


if __name__ == "__main__":
    run_script(main)
