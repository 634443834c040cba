"""Responses kept on disk: is a line of an interrupted evaluation what a rollout engine can have made?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from plumbing.common import InputError, parse_json
from plumbing.model_config import SIZES, is_whole, shown

STEPS = 2**31


def check_response(record: dict[str, Any], where: str, out: Path) -> None:
    """Refuse a damaged response.

    Args:
        where: its file and line.
        out: what to remove.

    Raises:
        InputError: a field that is missing or no value of a response.
    """
    if problem := problem_of_response(record):
        raise InputError(f"{where}: not a response ({problem}); remove {out} to start again")


def problem_of_response(record: dict[str, Any]) -> str:
    """What is wrong with the record of a response, in one line; empty: nothing."""
    # The lists, which go together.
    ids, steps = record.get("response_ids"), record.get("steps")
    tokens = SIZES["vocab_size"]
    if not isinstance(ids, list) or not ids or not all(is_whole(i, 0, tokens) for i in ids):
        return f"`response_ids` is {shown(record, 'response_ids')}, expected numbers of tokens"
    if not isinstance(steps, list) or not all(is_whole(step, 1, STEPS) for step in steps):
        return f"`steps` is {shown(record, 'steps')}, expected whole numbers from 1 on"
    if len(steps) != len(ids):
        return f"`steps` has {len(steps)} items, and `response_ids` has {len(ids)}"

    # What a response of an older version of this program does not have.
    logprobs = record.get("logprobs", [])
    numbers = isinstance(logprobs, list) and all(type(x) in (int, float) and abs(x) < 1e9 for x in logprobs)
    if not numbers or len(logprobs) not in (0, len(ids)):
        return f"`logprobs` is {shown(record, 'logprobs')}, expected a number for each token"

    # The numbers, and the reason to end.
    if not is_whole(record.get("num_tokens"), 1, len(ids)):
        return f"`num_tokens` is {shown(record, 'num_tokens')}, expected a whole number from 1 to {len(ids)}"
    if record.get("finish_reason") not in ("stop", "length"):
        return f"`finish_reason` is {shown(record, 'finish_reason')}, expected stop or length"
    if not is_whole(record.get("seed"), -(2**63), 2**63):
        return f"`seed` is {shown(record, 'seed')}, expected a whole number"
    seconds = record.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        return f"`seconds` is {shown(record, 'seconds')}, expected a number of 0 or more"
    return ""


def read_settings(file: Path) -> dict[str, Any]:
    """config.json of an evaluation that was begun; empty if it is not there.

    Raises:
        InputError: it is damaged.
    """
    if not file.exists():
        return {}
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({error}); remove {file.parent} to start again") from error
    if not isinstance(found, dict):
        raise InputError(f"{file}: expected an object; remove {file.parent} to start again")
    return found
