r"""How many answers a second does batch grading decide, and do hostile ones hold it up?

    python benchmarks/grading.py                                        # as many workers as cores
    python benchmarks/grading.py --workers 2 --questions 250 --samples 16

A batch is what a rollout step brings: `samples` responses to each of `questions` questions. Three in
four questions have a number for an answer, the others an expression, a tuple, a set, an interval, a
matrix or a quantity with its unit. Of the responses to one question about half are right, in several
spellings; the wrong ones are drawn from a few, as models err alike. Measured, in one run on one
machine, workers started beforehand, every batch of its own questions:

    answers per second of `extract_answer` and `judge_all`, which is what `reward.grade` does with texts,
    with all workers and with one, without and with hostile answers (4 in 1,000, no two alike; some are
    refused at a glance, some cost the whole time limit)
    the share of answers that no worker had to see
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plumbing.answers import extract_answer, judge_all, quick_verdict
from plumbing.common import run_script
from plumbing.config import Parser


def question(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """A gold answer, spellings of it, and wrong answers."""
    a, b, c = rng.randint(2, 999), rng.randint(2, 99), rng.randint(2, 9)
    if rng.random() < 0.75:
        kinds = [
            (f"{a}", [f"{a}", f"${a}$", f"{a}.0", f"x={a}"], [f"{a + c}", f"{b}", f"-{a}"]),
            (rf"\frac{{{a}}}{{{b}}}", [f"{a}/{b}", rf"\dfrac{{{a}}}{{{b}}}"], [f"{b}/{a}", f"{c}"]),
            (f"{a * 1000}", [f"{a},000", rf"{a}{{,}}000"], [f"{a}", f"{a}0,000"]),
        ]
    else:
        kinds = [
            (
                rf"{c}\sqrt{{{b}}}",
                [rf"\sqrt{{{c * c * b}}}", rf"{c} \sqrt {{{b}}}"],
                [f"{c * b}"],
            ),
            (f"x^2+{b}x+{a}", [f"{a}+x^2+{b}x", f"x(x+{b})+{a}"], [f"x^2-{b}x+{a}", f"x^2+{a}x+{b}"]),
            (f"({a},{b})", [rf"\left({a}, {b}\right)"], [f"({b},{a})", f"({a},{c})"]),
            (f"{a}, {b}", [f"{b}, {a}", rf"\{{{a}, {b}\}}"], [f"{a}", f"{a}, {c + b}"]),
            (rf"(-\infty,{b}]", [rf"(-\infty, {b}]"], [rf"(-\infty,{b})"]),
            (
                rf"\begin{{pmatrix}} {a} \\ {b} \end{{pmatrix}}",
                [rf"\begin{{bmatrix}}{a}\\{b}\end{{bmatrix}}"],
                [rf"\begin{{pmatrix}}{b}\\{a}\end{{pmatrix}}"],
            ),
            (rf"{b} \text{{ km}}", [f"{b}", f"{b} km", rf"{b * 1000} \text{{ m}}"], [f"{b} miles", f"{a}"]),
        ]
    return rng.choice(kinds)


def hostile(number: int) -> str:
    """An answer that sympy would work on for long, or for ever."""
    forms = [
        f"(x+y+z+w+{number})^{{100}}",  # the whole time limit; the others are refused sooner
        rf"\prod_{{k=1}}^{{10^8}} (k+{number})",
        f"(x+{number})^{{10000}}",
        "(" * 900 + f"{number}" + ")" * 900,
        rf"{number}^{{9^{{9^{{9}}}}}}",
    ]
    return forms[number % len(forms)]


def make_batch(seed: int, questions: int, samples: int, share: float) -> tuple[list[str], list[str]]:
    """Responses and their gold answers, in random order."""
    rng, pairs = random.Random(seed), []
    for _ in range(questions):
        gold, right, wrong = question(rng)
        for _ in range(samples):
            pairs.append((rng.choice(right if rng.random() < 0.5 else wrong), gold))
    for number in range(round(len(pairs) * share)):
        place = rng.randrange(len(pairs))
        pairs[place] = hostile(5 * seed + number + 5), pairs[place][1]
    rng.shuffle(pairs)
    texts = [f"We first note that 1+1=2. Hence the answer is $\\boxed{{{answer}}}$." for answer, _ in pairs]
    return texts, [gold for _, gold in pairs]


def rate(texts: list[str], golds: list[str], workers: int) -> float:
    """Answers per second of one batch."""
    start = time.perf_counter()
    pairs = [(extract_answer(text), gold, None) for text, gold in zip(texts, golds, strict=True)]
    judge_all(pairs, workers=workers)
    return len(texts) / (time.perf_counter() - start)


def main() -> None:
    """Print the figures."""
    parser = Parser(description="Measure batch grading.")
    parser.add_argument("--questions", type=int, default=250)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"{options.questions} questions x {options.samples} answers, {options.workers} workers\n")
    warm = [(f"{i}x", f"x+{i}x", None) for i in range(4 * options.workers)]
    judge_all(warm, 60.0, options.workers)
    print("| batch | answers/s, all workers | one worker | ratio | decided without a worker |")
    print("|---|---|---|---|---|")
    for name, share in (("typical", 0.0), ("with 4 hostile in 1,000", 0.004)):
        measured = []
        for repeat in range(options.repeats):
            rates = []
            for workers in (options.workers, 1):
                seed = 2 * repeat + (workers > 1) + 1000 * (share > 0)
                texts, golds = make_batch(seed, options.questions, options.samples, share)
                rates.append(rate(texts, golds, workers))
            answers = [extract_answer(text) for text in texts]
            quick = sum(quick_verdict(a, g, None) is not None for a, g in zip(answers, golds, strict=True))
            measured.append((*rates, quick / len(texts)))
        fast, slow, quick = (sorted(column)[len(column) // 2] for column in zip(*measured, strict=True))
        print(f"| {name} | {fast:,.0f} | {slow:,.0f} | {fast / slow:.2f} | {quick:.0%} |")


if __name__ == "__main__":
    run_script(main)
