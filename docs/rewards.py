"""Plots rewards.png, the curves of the length and speed rewards, beside this file: python docs/rewards.py"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import reward  # noqa: E402
from plumbing import figures  # noqa: E402

TEXT = "x" * 600


def curves() -> list[tuple[str, list[figures.Curve]]]:
    """The panels: a response in blocks of 4 under a limit of 8,192 tokens, of which one fact changes."""
    question, limits = reward.Question("", "1"), {"block_size": 4, "max_tokens": 8192}
    base = reward.Graded(reward.example(TEXT), question, TEXT, "1", True, **limits)
    by_length = [(n, dataclasses.replace(base.rollout, num_tokens=n)) for n in range(0, 8193, 32)]
    by_speed = []
    for steps in range(600, 149, -3):  # from 1 to 4 tokens per forward
        by_speed.append((600 / steps, reward.example(TEXT, tokens_per_forward=600 / steps)))
    panels = []
    tokens, tpf = "tokens of the response (limit 8,192)", "tokens per forward (block size 4)"
    blind = (reward.length, reward.soft_overlong, reward.dapo_overlong)  # to right and wrong
    for label, cases, functions in (
        (f"{tokens}: DiRL's", by_length, (reward.cosine, reward.length, reward.soft_overlong)),
        (f"{tokens}: ours", by_length, (reward.brevity, reward.dapo_overlong)),
        (f"{tpf}: DiRL's", by_speed, (reward.speed, reward.speed_penalty)),
        (f"{tpf}: accuracy times speed", by_speed, (reward.speed_if_right,)),
    ):
        found = []
        for function in functions:
            for correct in (True,) if function in blind else (True, False):
                name = function.__name__.replace("_", " ")
                if function not in blind:
                    name += ", right" if correct else ", wrong"
                graded = [dataclasses.replace(base, correct=correct, rollout=r) for _, r in cases]
                found.append((name, [x for x, _ in cases], [function(g) for g in graded]))
        panels.append((label, found))
    return panels


if __name__ == "__main__":
    figures.plot_curves(curves(), "reward", str(Path(__file__).with_name("rewards.png")))
