"""Which questions fit into a model's positions: asked once for all of them, before a run begins."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from plumbing.checkpoint import encode_prompt
from plumbing.common import InputError, progress, tell
from plumbing.ranks import rank_and_world


class Placed(Protocol):
    """What stands in a file."""

    where: str  # file and line


class Asked(Placed, Protocol):
    """A question of a file."""

    text: str


class Roomy(Protocol):
    """A model, or an engine with one."""

    block_size: int
    positions: int  # that it was made for


Item = TypeVar("Item", bound=Placed)
Question = TypeVar("Question", bound=Asked)


def fitting(items: list[Item], lengths: list[int], limit: int, expected: str, too_long: str) -> list[Item]:
    """Those of the items that are no longer than `limit` tokens.

    Args:
        expected: what the limit is, for the message.
        too_long: what to do about the others: `error`, or `leave_out` and count them.

    Raises:
        InputError: one is too long and shall not be left out, or all are.
    """
    fits = [item for item, length in zip(items, lengths, strict=True) if length <= limit]
    if len(fits) == len(items):
        return items
    first = min(i for i, length in enumerate(lengths) if length > limit)
    where = items[first].where or f"item {first + 1}"
    if too_long == "error" or not fits:
        raise InputError(f"{where}: {lengths[first]} tokens, expected at most {limit}, {expected}")
    if rank_and_world()[0] == 0:
        left_out = len(items) - len(fits)
        tell(f"{left_out} of {len(items)} left out, longer than {limit} tokens, {expected}: first {where}")
    return fits


def fitting_questions(
    questions: list[Question], tokenizer: Any, engine: Roomy, config: Any, max_tokens: int
) -> list[Question]:
    """Those of the questions whose prompt and response fit into the engine's positions.

    Args:
        config: has prompt, the user's turn, in which {question} is replaced; perhaps too_long, see `fitting`.
        max_tokens: of the response; prompt and response are filled up to whole blocks.

    Raises:
        InputError: see `fitting`.
    """
    lengths = []
    quiet = rank_and_world()[0] > 0
    for question in progress(questions, desc="lengths", unit="question", leave=False, disable=quiet):
        lengths.append(len(encode_prompt(tokenizer, config.prompt.replace("{question}", question.text))))
    room = engine.positions // engine.block_size * engine.block_size - max_tokens
    if room < 1:
        raise InputError(f"max_tokens is {max_tokens}, and the model has {engine.positions} positions")
    expected = f"since the model has {engine.positions} positions and max_tokens is {max_tokens}"
    return fitting(questions, lengths, room, expected, getattr(config, "too_long", "error"))
