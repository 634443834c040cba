"""Which of two finished evaluations is better? Accuracy on the same questions, with a paired bootstrap.

    python benchmarks/compare.py runs/a runs/b

A run is the folder that evaluate.py wrote. For every benchmark and decoding rule that both runs have, a
line of a Markdown table: the accuracy of each run (mean over questions and samples; the two may have
different numbers of samples), the difference, its 95 % interval, and the p-value of no difference. What
is resampled is questions, each with its difference between the runs: plumbing/report.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plumbing.common import InputError, read_records, run_script
from plumbing.config import Parser, folder_name
from plumbing.report import comparison_table


def compare(first: Path, second: Path) -> str:
    """Accuracy of two finished runs on the same questions, Markdown, with a paired bootstrap.

    Raises:
        InputError: a run is not finished; no benchmark and rule in common, or its questions differ.
    """
    runs = []
    for folder in (first, second):
        if not (folder / "summary.json").exists():
            raise InputError(f"{folder}: no finished evaluation (no summary.json)")
        runs.append({f.stem.removeprefix("responses-"): f for f in folder.glob("responses-*.jsonl")})
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


def correct_by_question(file: Path) -> dict[tuple[int, str, str], list[bool]]:
    """Verdicts of the samples by (index, question, gold answer)."""
    correct: dict[tuple[int, str, str], list[bool]] = {}
    for where, record in read_records(file):
        try:
            question = (record["index"], record["question"], record["gold"])
            correct.setdefault(question, []).append(record["correct"])
        except KeyError as error:
            raise InputError(f"{where}: no {error} in this answer") from error
        except TypeError as error:
            raise InputError(f"{where}: `question` or `gold` is no text") from error
        if not isinstance(record["correct"], bool):
            raise InputError(f"{where}: `correct` is {record['correct']!r}, expected true or false")
    return correct


def main() -> None:
    """Compare the two runs of the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs=2, type=folder_name, metavar="RUN", help="folder of a finished evaluation"
    )
    print(compare(*parser.parse_args().runs))


if __name__ == "__main__":
    run_script(main)
