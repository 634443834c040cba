"""Lesson 6 of docs/afternoon.md: rewards of three groups, their advantages, and which groups are dropped."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dipo import DiPOConfig, make_group  # noqa: E402
from plumbing.common import run_script  # noqa: E402
from reward import Question, Utf8, example, grade  # noqa: E402

REWARDS = {"accuracy": 1.0}  # name: weight

# Three questions, four responses to each: what is in the box, and the tokens per forward (TPF).
GROUPS = {
    ("3+8?", "11"): [("11", 1), ("11", 4), ("12", 1), ("11", 2)],
    ("2+2?", "4"): [("4", 1), ("4", 4), ("4", 2), ("4", 1)],
    ("8+9?", "17"): [("15", 2), ("16", 2), ("18", 2), ("71", 2)],
}


def main() -> None:
    """Print the groups."""
    config, kept = DiPOConfig(rewards=REWARDS, group_size=4), 0
    for number, ((text, gold), responses) in enumerate(GROUPS.items()):
        rollouts = [example(rf"\boxed{{{box}}} " + "x" * (7 - len(box)), tpf) for box, tpf in responses]
        graded = grade(rollouts, [Question(text, gold)] * len(rollouts), Utf8(), block_size=4)
        group = make_group(number, graded, config)
        kept += group.useful
        print(f"{text}  {'kept' if group.useful else 'dropped'}")
        for g, total, advantage in zip(graded, group.totals, group.advantages, strict=True):
            tpf = g.rollout.tokens_per_forward
            print(
                f"    answer {g.answer:2}  TPF {tpf:.1f}   reward {total:+.3f}   advantage {advantage:+.3f}"
            )
    print(f"\n{kept} of {len(GROUPS)} groups are kept")


if __name__ == "__main__":
    run_script(main)
