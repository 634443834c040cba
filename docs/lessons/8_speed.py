"""Lesson 8 of docs/afternoon.md: two right ways to write an answer, and what a threshold makes of them."""

from __future__ import annotations

import math
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from plumbing.common import run_script  # noqa: E402
from reward import Graded, Question, example, speed  # noqa: E402
from rollout import Decoding, reveal  # noqa: E402

SHARES = (0.5, 0.7, 0.95)  # of the way "ab"; the rest is "ba"
THRESHOLDS = (0.9, 0.6, 0.04)


def decode_all(share: float, how: Decoding) -> tuple[float, float]:
    """(accuracy, tokens per forward) of a block of two, by enumeration of all draws.

    Both ways are right. At first each position knows only its own share of them; once a token is known,
    the other is sure.
    """
    first = {"a": share, "b": 1 - share}, {"a": 1 - share, "b": share}
    right = steps = 0.0
    for draw in product("ab", repeat=2):
        p = [first[j][token] for j, token in enumerate(draw)]
        confidence = torch.tensor([math.log(c) for c in p])
        at_once = bool(reveal(confidence, torch.tensor([True, True]), how).all())
        steps += math.prod(p) * (1 if at_once else 2)
        if not at_once or draw[0] != draw[1]:  # revealed one by one, the second token follows the first
            right += math.prod(p)
    return right, 2 / steps


def main() -> None:
    """Print accuracy and tokens per forward, then the reward for speed."""
    print("share of one way  " + "".join(f"threshold {t:<11g}" for t in THRESHOLDS).rstrip())
    for share in SHARES:
        line = f"{share:<18g}"
        for threshold in THRESHOLDS:
            accuracy, tpf = decode_all(share, Decoding(threshold=threshold))
            line += f"{100 * accuracy:5.1f} %  TPF {tpf:.2f}   "
        print(line.rstrip())

    print("\nreward for speed, blocks of 4")
    for tpf in (1, 2, 3, 4):
        rollout = example("x" * 12, tpf)
        right, wrong = (Graded(rollout, Question("", ""), "", "", c, block_size=4) for c in (True, False))
        print(f"TPF {tpf}   right {speed(right):+.3f}   wrong {round(speed(wrong), 3) + 0.0:+.3f}")


if __name__ == "__main__":
    run_script(main)
