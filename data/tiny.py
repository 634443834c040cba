r"""The tiny task: chained additions that a model of about a million parameters learns on a CPU.

    question   3+8+5?
    response   3+8=11 11+5=16 \boxed{16}

Terms are uniform in 1..max_term, the number of terms uniform in min_terms..max_terms. Test is drawn
first, then validation, then SFT and RL from the questions that neither holds, so test and
validation depend on the seed and on the shape of the task, not on how much training data is asked.

There are max_term ** min_terms questions of the shortest length. The splits may take half of them,
so that rejection ends quickly and no length is used up:

    test + validation <= half      or the task is refused
    all four splits   <= half      then no question occurs twice; else training rows may repeat

With `--ways W` SFT answers add the terms in many equally right orders: each next term is the first of
those that are left, or with probability W the last. The questions stay those of W = 0:

    question   3+8+5?
    responses  3+8=11 11+5=16 \boxed{16}        5+8=13 13+3=16 \boxed{16}        3+5=8 8+8=16 \boxed{16}

Then a position that is still masked may be one of several right tokens, and tokens that are revealed
together may belong to different orders: a low threshold makes mistakes, and a policy that settles for one
order can decode faster. It is the task of benchmarks/speed_reward.py.

Launch:  python data/tiny.py --out data/generated --seed 0
"""

import argparse
import json
import os
import random
import re
import sys
from itertools import accumulate, pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plumbing.common import InputError, run_script
from plumbing.config import Parser, folder_name


def solve(terms: list[int]) -> str:
    """The worked response: one step per addition, then the box, separated by single spaces."""
    sums = list(accumulate(terms))
    steps = [f"{left}+{term}={right}" for (left, right), term in zip(pairwise(sums), terms[1:], strict=True)]
    return " ".join([*steps, rf"\boxed{{{sums[-1]}}}"])


def solve_some_way(terms: list[int], rng: random.Random, ways: float) -> str:
    """`solve`, with each term taken from the right end of those left with probability `ways`."""
    rest = list(terms)

    def take() -> int:
        return rest.pop(-1 if rng.random() < ways else 0)

    text, total = "", take()
    while rest:
        term = take()
        text += f"{total}+{term}={total + term} "
        total += term
    return text + rf"\boxed{{{total}}}"


def is_derived(question: str, text: str) -> bool:
    """Whether a response adds the question's terms, each once, in some order, and every step of it is right.

    A right number in the box alone proves no derivation: it can be read off the question.
    """
    steps = re.fullmatch(r"((?:\d{1,4}\+\d{1,4}=\d{1,4} )+)\\boxed\{(\d{1,4})\}", text.strip())
    if not steps:
        return False
    total, used = None, []
    for step in steps[1].split():
        left, term, result = map(int, re.split(r"[+=]", step))
        if left + term != result or total not in (None, left):
            return False
        used += [term] if used else [left, term]
        total = result
    return total == int(steps[2]) and sorted(used) == sorted(map(int, question.rstrip("?").split("+")))


def make_example(
    rng: random.Random,
    num_terms: tuple[int, int],
    max_term: int,
    careless: float = 0.0,
    ways: float = 0.0,
    writer: random.Random | None = None,
) -> dict[str, str]:
    """One example: "question", "response", "ground_truth_answer". Both ends of num_terms count.

    With probability `careless` the response to a sum of the most terms leaves out the last of them.

    Args:
        ways, writer: see `solve_some_way`; the writer draws nothing if ways is 0.
    """
    terms = [rng.randint(1, max_term) for _ in range(rng.randint(*num_terms))]
    stops_early = rng.random() < careless and len(terms) == num_terms[1]
    used = terms[:-1] if stops_early else terms
    return {
        "question": "+".join(map(str, terms)) + "?",
        "response": solve_some_way(used, writer, ways) if ways else solve(used),
        "ground_truth_answer": str(sum(terms)),
    }


def make_splits(
    seed: int,
    sizes: dict[str, int],
    num_terms: tuple[int, int],
    max_term: int,
    careless: float = 0.0,
    ways: float = 0.0,
) -> dict[str, list[dict[str, str]]]:
    """Examples of "test", "validation", "sft" and "rl", as many as sizes says.

    Raises:
        InputError: the task has too few questions to hold test and validation out.
    """
    half = max_term ** num_terms[0] // 2
    held_out = sizes["test"] + sizes["validation"]
    if held_out > half:
        raise InputError(
            f"--max-term {max_term} is too small: test and validation may take {half} questions, "
            f"{held_out} are asked; raise --max-term or --min-terms, or lower --test or "
            "--validation"
        )
    training_may_repeat = sum(sizes.values()) > half
    rng, writer = random.Random(seed), random.Random(f"writer {seed}")
    taken: set[str] = set()
    splits: dict[str, list[dict[str, str]]] = {}
    for name in ("test", "validation", "sft", "rl"):
        examples = splits[name] = []
        while len(examples) < sizes[name]:
            example = make_example(rng, num_terms, max_term, careless, ways, writer)
            if example["question"] in taken:
                continue
            examples.append(example)
            if name in ("test", "validation") or not training_may_repeat:
                taken.add(example["question"])
    return splits


def to_row(example: dict[str, str], split: str) -> dict:
    """The row as the split's reader expects it: a chat for SFT, question and answer elsewhere."""
    if split == "sft":
        user = {"role": "user", "content": example["question"]}
        assistant = {"role": "assistant", "content": example["response"]}
        return {"messages": [user, assistant]}
    return {key: example[key] for key in ("question", "ground_truth_answer")}


def write_files(texts: dict[Path, str]) -> None:
    """Write each file completely or not at all; none is replaced before all are on disk.

    A run that dies while writing must not leave the test set of one seed beside the SFT set of
    another.
    """
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in texts}
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path].write_text(text, encoding="utf-8", newline="\n")
        for path in texts:
            os.replace(temporary[path], path)
    finally:
        for leftover in temporary.values():
            if leftover.exists():
                leftover.unlink()


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line.

    Raises:
        InputError: an unknown or a bad one.
    """
    parser = Parser(description="Generate the tiny arithmetic task.", allow_abbrev=False)
    parser.add_argument("--out", type=folder_name, default=Path("data/generated"), help="folder, created")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft", type=int, default=20000, help="rows of sft.jsonl")
    parser.add_argument("--rl", type=int, default=20000, help="rows of rl.jsonl")
    parser.add_argument("--validation", type=int, default=500, help="rows of validation.jsonl")
    parser.add_argument("--test", type=int, default=1000, help="rows of test.jsonl")
    parser.add_argument("--min-terms", type=int, default=4, help="fewest terms, at least 2")
    parser.add_argument("--max-terms", type=int, default=5, help="most terms")
    parser.add_argument("--max-term", type=int, default=9, help="terms are uniform in 1..this")
    parser.add_argument(
        "--careless", type=float, default=0.7, help="share of longest sums that SFT answers wrong"
    )
    parser.add_argument(
        "--ways", type=float, default=0.0, help="share of terms that SFT takes from the right end"
    )
    options = parser.parse_args(argv)
    for name in ("careless", "ways"):
        if not 0 <= getattr(options, name) <= 1:
            parser.error(f"--{name} must be between 0 and 1, got {getattr(options, name)}")
    smallest = {"seed": 0, "sft": 0, "rl": 0, "validation": 0, "test": 0}
    smallest |= {"min_terms": 2, "max_terms": options.min_terms, "max_term": 1}
    for name, bound in smallest.items():
        value, flag = getattr(options, name), "--" + name.replace("_", "-")
        if value < bound:
            why = " (--min-terms)" if name == "max_terms" else ""
            parser.error(f"{flag} must be at least {bound}{why}, got {value}")
    return options


def main(argv: list[str] | None = None) -> None:
    """Draw the splits, write them, say what was written."""
    options = parse_options(argv)
    sizes = {name: getattr(options, name) for name in ("sft", "rl", "validation", "test")}
    num_terms = (options.min_terms, options.max_terms)
    splits = make_splits(options.seed, sizes, num_terms, options.max_term, options.careless, options.ways)
    lines = {
        options.out / f"{name}.jsonl": [json.dumps(to_row(example, name)) for example in splits[name]]
        for name in sizes
    }
    write_files({path: "".join(f"{line}\n" for line in written) for path, written in lines.items()})
    for path, written in lines.items():
        print(f"{path}: {len(written)} rows, {len(set(written))} different")
        print(f"  {written[0]}" if written else "  (empty)")


if __name__ == "__main__":
    run_script(main)
