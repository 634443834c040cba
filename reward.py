r"""Rewards: is the answer right, and what other qualities of the response count?

A response is graded in three steps:

1. extract    the content of the last `\boxed{...}` that closes                      plumbing/answers.py
2. compare    with the gold answer: the same spelling, number, list of parts, or
              equal by math-verify                                                  plumbing/answers.py
3. reward     named functions of the graded response; the total is their weighted sum

    python reward.py                  # grades a few examples and prints why
    python reward.py --check FILE     # grades JSON Lines with `text` and `gold`, explains each verdict
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plumbing import own_reward
from plumbing.answers import GOLD_NAMES, explain_file, extract_answer, gold_answer, judge_all, tolerance_of
from plumbing.common import InputError, decisions, read_records, run_script
from plumbing.config import Parser

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rollout import Rollout


# ------------------------------------------------------------------------------- questions


@dataclass
class Question:
    """A question with its gold answer."""

    text: str
    gold: str
    tolerance: float | None = None  # how far a number may be from the gold one, absolutely
    where: str = ""  # file and line


def read_questions(path: str) -> list[Question]:
    """Questions of a file in any of the formats of data/README.md.

    Raises:
        InputError: a record without a question or without an answer, or with a tolerance that is none.
    """
    questions = []
    for where, record in read_records(path):
        text = record.get("question", record.get("problem"))
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: no question (expected a text in `question` or `problem`)")
        gold = gold_answer(record)
        if not gold:
            raise InputError(f"{where}: no answer (expected one of {', '.join(GOLD_NAMES)})")
        try:
            tolerance = tolerance_of(record.get("error"))
        except ValueError:
            raise InputError(f"{where}: `error` is {record['error']!r}, expected a tolerance") from None
        questions.append(Question(text, gold, tolerance, where))
    return questions


# --------------------------------------------------------------------------------- grading


@dataclass
class Graded:
    """A rollout with its verdict: all that a reward function may look at."""

    rollout: Rollout
    question: Question
    text: str  # the response, decoded, up to its stop token
    answer: str | None  # content of its last closed box
    correct: bool  # answer and gold are equivalent, and the response is complete
    block_size: int  # tokens
    max_tokens: int = 0  # the length limit; 0: unknown, then rewards that need it raise ValueError

    @property
    def truncated(self) -> bool:
        """Whether it was stopped by the length limit."""
        return self.rollout.finish_reason == "length"

    def to_record(self) -> dict[str, Any]:
        """The part of it that is kept on disk."""
        r = self.rollout
        return {
            "question": self.question.text,
            "gold": self.question.gold,
            "answer": self.answer,
            "correct": self.correct,
            "text": self.text,
            "tpf": r.tokens_per_forward,
            "prompt_tokens": len(r.prompt_ids),
            "num_tokens": r.num_tokens,
            "finish_reason": r.finish_reason,
            "seed": r.seed,
            "block_size": self.block_size,
            "response_ids": r.response_ids,
            "steps": r.steps,
            **decisions(r.logprobs, r.hold_bounds, r.hold_logprobs),
        }


def grade(
    rollouts: list[Rollout],
    questions: list[Question],
    tokenizer: Any,
    block_size: int,
    max_tokens: int = 0,
) -> list[Graded]:
    """Decode each rollout and compare the answer in its last box with the gold one.

    A truncated response is wrong even if it holds the right answer: it did not stop by itself.

    Args:
        questions: as many as rollouts.
        tokenizer: has decode(ids, skip_special_tokens).
        max_tokens: the limit that all were generated under; 0: unknown.
    """
    # The answer of each.
    graded = []
    for rollout, question in zip(rollouts, questions, strict=True):
        text = tokenizer.decode(rollout.shown_ids, skip_special_tokens=True)
        answer = extract_answer(text)
        graded.append(Graded(rollout, question, text, answer, False, block_size, max_tokens))

    # Only a complete response with an answer can be right; all of these are judged at once.
    candidates = [g for g in graded if g.answer is not None and not g.truncated]
    cases = [(g.answer, g.question.gold, g.question.tolerance) for g in candidates]
    for g, verdict in zip(candidates, judge_all(cases), strict=True):
        g.correct = verdict.equal
    return graded


# --------------------------------------------------------------------------------- rewards


def accuracy(graded: Graded) -> float:
    """1 for a right answer, else 0. Source: DiRL, MathAccuracy."""
    return 1.0 if graded.correct else 0.0


def binary(graded: Graded) -> float:
    """1 for a right answer, else -1. Source: DiRL, BinaryReward."""
    return 1.0 if graded.correct else -1.0


def boxed(graded: Graded) -> float:
    """0.1 for any closed box, else 0. Source: DiRL, Boxed."""
    return 0.1 if graded.answer is not None else 0.0


def think_only(graded: Graded) -> float:
    """`format`: 1 if the text opens with `<think>` and ends with `</think>`, else 0. Source: DiRL, Format."""
    opens, ends = graded.text.startswith("<think>"), graded.text.rstrip().endswith("</think>")
    return 1.0 if opens and ends else 0.0


def think_format(graded: Graded) -> float:
    """1 if a `</think>` ends a line; the prompt may have opened it. Source: DiRL, ThinkFormat."""
    return 1.0 if re.search(r"</think>[^\S\n]*$", graded.text, re.MULTILINE) else 0.0


def think_first(graded: Graded) -> float:
    """Ours: 1 if the text opens with one `<think> ... </think>` and goes on after it, else 0."""
    found = re.fullmatch(r"\s*<think>(.*?)</think>\s*(\S.*)", graded.text, re.DOTALL)
    once = found and "think>" not in found[1] + found[2]
    return 1.0 if once else 0.0


def cosine(graded: Graded) -> float:
    """By length: right from 1 (short) to 0.5 (long), wrong from -0.5 (short) to 0, at the limit -0.5.

    A half cosine of num_tokens / max_tokens in between: a wrong response loses less, the longer it
    thought. Source: arXiv 2502.03373, equation 1, with the values of DiRL, CosineReward.
    """
    if graded.truncated or graded.rollout.num_tokens >= _limit(graded):
        return -0.5
    shortness = (1 + math.cos(math.pi * graded.rollout.num_tokens / _limit(graded))) / 2
    return 0.5 + 0.5 * shortness if graded.correct else -0.5 * shortness


def repetition(graded: Graded, n: int = 3, penalty: float = -1.0) -> float:
    """`penalty` times the share of n-grams (n words running) that came before. Source: as for cosine."""
    words = graded.text.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return penalty * (1 - len(set(grams)) / len(grams)) if grams else 0.0


def soft_overlong(graded: Graded) -> float:
    """0 up to half of the limit, then a line through -1 at the limit and on. Source: DiRL, SoftOverlong."""
    limit = _limit(graded)
    cache = max(limit // 2, 1)
    return min((limit - cache - graded.rollout.num_tokens) / cache, 0.0)


def dapo_overlong(graded: Graded, share: float = 0.5) -> float:
    """Ours: 0 until the last `share` of the limit begins, from there down to -1 at the limit, no further.

    Source: DAPO, arXiv 2503.14476, equation 13, L_cache = share * L_max.
    """
    limit = _limit(graded)
    over = graded.rollout.num_tokens - (1 - share) * limit
    return -min(max(over / (share * limit), 0.0), 1.0)


def length(graded: Graded) -> float:
    """num_tokens / max_tokens, right or wrong: long is good; at the limit 0. Source: DiRL, LengthReward."""
    share = graded.rollout.num_tokens / _limit(graded)
    return share if share < 1 else 0.0


def brevity(graded: Graded) -> float:
    """Ours: 0.5 - num_tokens / max_tokens; no more than 0 if wrong: no wrong answer gains by being short.

    Source: Kimi k1.5, arXiv 2501.12599, section 2.3.3. There the extremes are the shortest and longest of
    the group; here they are 0 and the limit, since a reward sees one response.
    """
    value = 0.5 - min(graded.rollout.num_tokens / _limit(graded), 1.0)
    return value if graded.correct else min(value, 0.0)


def speed(graded: Graded) -> float:
    """By TPF: right from 0.5 (slow) to 1 (fast), wrong from 0 (slow) to -0.5 (fast).

    With s = (1 - cos(pi * (TPF - 1) / (B - 1))) / 2 in [0, 1]: 0.5 + 0.5 s or -0.5 s, so that the
    slowest right answer beats every wrong one. Source: DiRL, SpeedReward.
    """
    return 0.5 + 0.5 * _speed(graded) if graded.correct else -0.5 * _speed(graded)


def speed_penalty(graded: Graded) -> float:
    """0.5 if right; wrong from 0 (slow) to -0.5 (fast) as in `speed`. Source: DiRL, SpeedPenalty."""
    return 0.5 if graded.correct else -0.5 * _speed(graded)


def speed_if_right(graded: Graded, alpha: float = 1.0) -> float:
    """Accuracy times speed. Right: ((L - steps + 1) / L) ** alpha of L tokens; wrong: 0.

    No wrong answer gains by its speed, and a right one of a token per step, with 1 / L, hardly by being
    right. Blocks of B in one step each: 1 - 1 / B + 1 / L. Source: Jazbec et al., arXiv 2512.09106.
    """
    tokens = len(graded.rollout.response_ids)
    return ((tokens - graded.rollout.num_steps + 1) / tokens) ** alpha if graded.correct else 0.0


def _speed(graded: Graded) -> float:
    """s of `speed`. Blocks of one token have one speed, the slow one."""
    progress = (graded.rollout.tokens_per_forward - 1) / max(graded.block_size - 1, 1)
    return (1 - math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2 if graded.block_size > 1 else 0.0


def _limit(graded: Graded) -> int:
    if graded.max_tokens <= 0:
        raise ValueError("a reward of length needs the limit: grade with max_tokens")
    return graded.max_tokens


# A docstring that begins with "Ours" marks our own, and speed_if_right is from elsewhere. The others have the
# names, forms and values of DiRL, github.com/OpenMOSS/DiRL: train/orm.py, made in
# train/rollout_dapo_server.py; see docs/differences.md.
REWARDS: dict[str, Callable[[Graded], float]] = {
    "accuracy": accuracy,
    "speed": speed,
    "speed_penalty": speed_penalty,
    "speed_if_right": speed_if_right,
    "binary": binary,
    "boxed": boxed,
    "format": think_only,
    "think_format": think_format,
    "think_first": think_first,
    "cosine": cosine,
    "repetition": repetition,
    "soft_overlong": soft_overlong,
    "dapo_overlong": dapo_overlong,
    "length": length,
    "brevity": brevity,
}


def find_reward(name: str, seconds: float = 30.0) -> Callable[[Graded], float]:
    """The reward of that name, or your own by dotted path, `mymodule.myreward`: plumbing/own_reward.py.

    Raises:
        ValueError: there is no such reward.
    """
    if "." in name:
        return own_reward.find(name, seconds)
    if name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}; available: {', '.join(REWARDS)}, or mymodule.myreward")
    return REWARDS[name]


def check_names(weights: Mapping[str, float]) -> None:
    """Raise ValueError unless weights names at least one reward and only rewards that exist."""
    if not weights:
        raise ValueError(f"no reward is named; available: {', '.join(REWARDS)}")
    for name, weight in weights.items():
        if not isinstance(weight, int | float):
            raise ValueError(f"{name}: {weight}, expected a number as in mymodule.myreward: 1.0")
        find_reward(name)


def values(graded: Graded, weights: Mapping[str, float], seconds: float = 30.0) -> dict[str, float]:
    """The value of each reward named in weights, not yet weighted; names as for check_names.

    Raises:
        InputError: a reward of your own gave no number within so many seconds.
    """
    return {name: find_reward(name, seconds)(graded) for name in weights}


def total(rewards: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Weighted sum of the rewards that `values` returned."""
    return sum(weights[name] * value for name, value in rewards.items())


# ------------------------------------------------------------------------------- the program


class Utf8:
    """The simplest tokenizer there is: a token is a byte."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of some bytes."""
        return bytes(ids).decode()


def example(text: str, tokens_per_forward: float = 1.0, truncated: bool = False) -> Rollout:
    """A rollout of a text in `Utf8` tokens, for examples and tests."""
    from rollout import Rollout  # which loads torch; rewards and grading do without it

    ids = list(text.encode())
    n = len(ids)
    return Rollout(
        prompt_ids=[],
        response_ids=ids,
        steps=[1 + int(i / tokens_per_forward) for i in range(n)],  # at 2.5: 1 1 1 2 2 3 3 3 4 4
        logprobs=[0.0] * n,
        num_tokens=n,
        finish_reason="length" if truncated else "stop",
    )


def show_examples() -> None:
    """Grade a few responses to one question and print the reasons."""
    question, weights = Question("1 - 1/2?", r"\frac{1}{2}"), {"accuracy": 1.0, "speed": 1.0}
    rollouts = [
        example(r"Half of it: \boxed{\dfrac{1}{2}}", 1.0),
        example(r"Half of it: \boxed{0.5}", 4.0),
        example(r"Not \boxed{0.5} but \boxed{2}", 4.0),
        example(r"One half.", 2.5),
        example(r"\boxed{0.5} because because because", 2.5, truncated=True),
        example(r"A tower: \boxed{9^{9^{9^{9}}}}", 2.0),
    ]
    print(f"gold {question.gold!r}, block size 4, weights {weights}\n")
    for graded in grade(rollouts, [question] * len(rollouts), Utf8(), block_size=4):
        rewards, tpf = values(graded, weights), graded.rollout.tokens_per_forward
        each = " ".join(f"{name} {value:+.2f}" for name, value in rewards.items())
        print(f"{graded.text}\n  answer {graded.answer!r}, truncated {graded.truncated}, TPF {tpf:.2f}")
        print(f"  correct {graded.correct}: {each}, total {total(rewards, weights):+.2f}\n")


def main() -> None:
    """Show examples, or explain the verdicts on a file."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", metavar="FILE", help="JSON Lines with text and gold")
    options = parser.parse_args()
    if options.check:
        explain_file(options.check)
    else:
        show_examples()


if __name__ == "__main__":
    run_script(main)
