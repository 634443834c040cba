"""What stands between a gradient and the weights: numbers that are none, and an engine that disagrees.

A step is trained on if its loss and its gradient are finite, and if the rollout engine's probabilities are
the trainer's. Else it is skipped: nothing moves, metrics.jsonl has the reason, and after a few such steps in
a row the run ends with its last good checkpoint untouched. Every rank decides alike, since all that is looked
at is summed over the ranks already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from plumbing.common import InputError, collecting, tell
from plumbing.ranks import first_problem, gather, rank_and_world

NOTES: list[str] = []  # what was no number in this step, in this process
NOTES_SHOWN = 3


def noted(value: float, what: str) -> float:
    """The value; if it is nan or infinite, that is noted under the name `what`, for the step's reason."""
    note = f"{what} is {value}"
    if not math.isfinite(value) and note not in NOTES:
        NOTES.append(note)
    return value


@contextmanager
def together() -> Iterator[None]:
    """Bad input that one rank meets in here ends all of them, so that none waits for another; for every rank.

    Nothing in here may wait for the other ranks.
    """
    problems: list[str] = []
    with collecting(problems):
        yield
    if problem := first_problem(problems):
        raise InputError(problem)


class Guard:
    """Decides before every optimizer step whether it may be made.

    Args:
        config: has max_skipped, and of dipo.py gap_limit and dtype.
        engine_dtype: of the rollout engine; empty: no engine, no gap.
    """

    def __init__(self, config: Any, engine_dtype: str = ""):
        self.max_skipped = config.max_skipped
        coarser = "bfloat16" if "bfloat16" in (config.dtype, engine_dtype) else "float32"
        self.gap_limit = config.gap_limit.get(coarser, 0.0) if engine_dtype else 0.0
        self._skipped: list[int] = []  # steps in a row

    def allows(self, step: int, metrics: dict[str, Any]) -> bool:
        """Whether to make an optimizer step; call it on every rank.

        Args:
            metrics: loss and grad_norm, the same on every rank; perhaps gap_capped. If the answer is no,
                `skipped` is added, the reason.

        Raises:
            InputError: config.max_skipped steps in a row were skipped, or two because of the gap: between
                them the engine got the weights again.
        """
        # What is wrong, and on which rank what was noted about it.
        numbers = {name: metrics[name] for name in ("loss", "grad_norm")}
        wrong = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
        gap = metrics.get("gap_capped", 0.0)
        if not math.isfinite(gap) or 0 < self.gap_limit < gap:
            wrong.append(f"engine and trainer are {gap:.3g} apart per token, gap_limit is {self.gap_limit}")
        if not wrong:
            NOTES.clear()
            self._skipped.clear()
            return True
        notes = [note for of_rank in gather(NOTES[:NOTES_SHOWN]) for note in of_rank][:NOTES_SHOWN]
        NOTES.clear()

        # Once it is told, several times in a row it ends the run.
        metrics["skipped"] = "; ".join(wrong + notes)
        if step not in self._skipped:
            self._skipped.append(step)
        of_gap = len(wrong) == 1 and wrong[0].startswith("engine")
        if len(self._skipped) >= (min(2, self.max_skipped) if of_gap else self.max_skipped):
            cure = "; sending the weights again did not help" if of_gap else ""
            raise InputError(f"step {step}: {metrics['skipped']}; {len(self._skipped)} in a row{cure}")
        if rank_and_world()[0] == 0:
            tell(f"step {step} is skipped: {metrics['skipped']}")
        return False
