"""Groups of rollouts that have not all ended: what dipo.py goes on with in a later step (partial_tokens)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from plumbing.ranks import sum_over_ranks


@dataclass
class OpenGroup:
    """The rollouts of a question, of which some have not ended."""

    number: int  # running number of the question
    index: int  # of the question
    rollouts: list[Any]  # None: not begun

    @property
    def unfinished(self) -> list[int]:
        """Indices of the rollouts that are to go on, or to begin."""
        return [i for i, r in enumerate(self.rollouts) if r is None or r.finish_reason == "unfinished"]


def more_questions(wanted: int, asked: int, ended: float, useful: float) -> int:
    """How many more questions a step of dipo.py asks.

    If a share u was useful, 1 / u times as many as are missing; one bad round must not ask for more than four
    times these. A group that was asked in this step and has not ended counts u. So in the long run as many
    are asked as end, wanted / u per step.

    Args:
        wanted: useful groups per step.
        asked: questions that the step has asked so far.
        ended: groups that have ended in it, whichever step asked them.
        useful: how many of these were useful.
    """
    share = max(useful, 1) / ended if ended else 1.0
    missing = wanted - useful - share * (asked - ended)
    return max(0, math.ceil(missing / max(share, 0.25)))


class Rounds:
    """The rounds of a step: how many questions each asks, and whether open groups go on in it.

    They do in the first one. Where that brings less than half of the groups, since most have not ended (as in
    the first steps of a run with partial_tokens), further rounds are like the first one, as many as a rollout
    can take steps: an update by few groups would be noise. Later rounds only ask what is missing.
    """

    def __init__(self, config: Any):
        """
        Args:
            config: has groups, max_rounds, max_tokens and partial_tokens.
        """
        self.config, self.done, self.asked = config, 0, 0
        self._filling = math.ceil(config.max_tokens / (config.partial_tokens or config.max_tokens))

    def next(self, ended: float, useful: float, open_groups: list[OpenGroup]) -> tuple[int, bool]:
        """How many more questions to ask, and whether open groups go on; 0, False: the step is over.

        Args:
            ended, useful: groups of all ranks so far, as for `more_questions`.
            open_groups: of this rank; call it on every one.
        """
        few = 2 * useful < self.config.groups
        goes_on = few and (self.done == 0 or count_unfinished(open_groups) > 0)
        self._filling = self._filling if goes_on else min(self._filling, self.done)
        more = self.config.groups
        if self.done >= self._filling:
            more = more_questions(self.config.groups, self.asked, ended, useful)
        if self.done >= self._filling + self.config.max_rounds - 1:
            more = 0
        self.done, self.asked = self.done + 1, self.asked + more
        return more, goes_on


def count_unfinished(groups: list[OpenGroup]) -> int:
    """Unfinished rollouts of all ranks; call it on every one."""
    count = sum(len(group.unfinished) for group in groups)
    return int(sum_over_ranks({"rollouts": count})["rollouts"])


def grow_older(groups: list[OpenGroup], updates: int, max_age: int) -> dict[str, int]:
    """The policy has made so many updates: all tokens are that much older. Call it on every rank.

    Args:
        groups: those with a token older than max_age are taken out of the list; 0: none is too old.

    Returns:
        Metrics over all ranks: how many were taken out, and unfinished rollouts of the others.
    """
    young = []
    for group in groups:
        begun = [rollout for rollout in group.rollouts if rollout]
        for rollout in begun:
            ages = rollout.ages or [0] * len(rollout.response_ids)
            rollout.ages = [age + updates for age in ages]
        if not max_age or max(max(rollout.ages) for rollout in begun) <= max_age:
            young.append(group)
    dropped = len(groups) - len(young)
    groups[:] = young
    dropped = int(sum_over_ranks({"groups": dropped})["groups"])
    return {"groups_too_old": dropped, "unfinished": count_unfinished(groups)}


def read_groups(records: list[dict[str, Any]], rollout: Callable[..., Any]) -> list[OpenGroup]:
    """Groups from what dataclasses.asdict made of them; `rollout` makes a rollout of its fields."""
    groups = [OpenGroup(**record) for record in records]
    for group in groups:
        group.rollouts = [rollout(**fields) if fields else None for fields in group.rollouts]
    return groups
