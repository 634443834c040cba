"""Published checkpoints of this architecture, and how many tokens their blocks have.

Most of them do not say so in config.json, where the engines that serve them expect it as an option. Not one
of them could be downloaded where this was written. What stands here is known from the repositories of their
authors and from copies of their config.json in other public repositories; tests/test_published.py has these,
each with its source.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from plumbing.common import InputError

USUAL = 4  # tokens per block of SDAR, where nothing says otherwise
# By the name on the hub without its owner, in small letters.
BLOCK_SIZES = {
    # github JetAstra/SDAR, README: "our default model (block size=4)", and models of 8, 16, 32, 64.
    "sdar-1.7b-chat": 4, "sdar-4b-chat": 4, "sdar-8b-chat": 4, "sdar-30b-a3b-chat": 4,
    "sdar-30b-a3b-sci": 4,  # the same README: evaluated with block_length = 4
    "trado-4b-instruct": 4, "trado-8b-instruct": 4,  # arXiv 2512.22234, Table 1
    "trado-8b-thinking": 4,  # github LuLuLuyi/TDAR, README
    "dirl-8b-instruct": 4,  # github OpenMOSS/DiRL, models/sdar/config.json
    "tdar-8b-thinking": 16,  # github LuLuLuyi/TDAR, configs/eval_config; trained at 4 first, then at larger
}  # fmt: skip
OF_THE_NAME = re.compile(r"sdar-(1\.7b|4b|8b|30b-a3b)-chat-b(8|16|32|64)")
PERHAPS = re.compile(r"[-_.]b(4|8|16|32|64|128)(?=[-_.]|$)")  # a batch size, or that of the blocks


def hub_name(folder: str | Path) -> str:
    """The last part of a checkpoint's name, in small letters: of its folder, or of the hub's cache."""
    if not str(folder):
        return ""
    path = Path(folder).resolve()
    for part in path.parts:  # models--JetLM--SDAR-8B-Chat/snapshots/0123abc
        if part.startswith("models--"):
            return part.rpartition("--")[2].lower()
    return path.name.lower()


def assumed_block_size(folder: str | Path) -> tuple[int, str]:
    """(tokens per block, how that is known) of a checkpoint whose config.json does not say it.

    Raises:
        InputError: its name only suggests it.
    """
    name = hub_name(folder)
    if name in BLOCK_SIZES:
        return BLOCK_SIZES[name], "the published checkpoint of this name has them"
    if found := OF_THE_NAME.fullmatch(name):
        return int(found[2]), "the published checkpoint of this name has them"
    if found := PERHAPS.search(name):
        raise InputError(
            f"config key block_size: expected a number, since {folder}/config.json has no block_size; if the "
            f"name means blocks of {found[1]} tokens, block_size={found[1]}"
        )
    return USUAL, "that is the usual size; block_size=N if it was trained with another"


def with_block_size(copied: dict[str, bytes], wanted: int, folder: str | Path) -> dict[str, bytes]:
    """The files of a checkpoint, config.json with the block size that it is trained with; else unchanged.

    Without it the next to load what is trained here would have to know, or would guess.

    Args:
        copied: files by name, as `plumbing.checkpoint.read_copied` has them.
        wanted: the block size if config.json has none; 0: the one of `assumed_block_size`.
    """
    try:
        config = json.loads(copied["config.json"])
        if config.get("block_size"):
            return copied
    except (KeyError, ValueError, AttributeError, RecursionError):  # refused by who loads the model
        return copied
    size = wanted or assumed_block_size(folder)[0]
    return copied | {"config.json": (json.dumps(config | {"block_size": size}, indent=2) + "\n").encode()}
