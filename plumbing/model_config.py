"""config.json of a checkpoint, looked at before transformers reads it, whose errors name no field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers.activations import ACT2FN

from plumbing.common import InputError

MODEL_TYPES = ("sdar", "sdar_moe")
# Whole numbers, each with the most that is believed: who multiplies two damaged ones fills the memory.
SIZES = {
    "vocab_size": 10**7,
    "hidden_size": 10**6,
    "intermediate_size": 10**6,
    "num_hidden_layers": 10**3,
    "num_attention_heads": 10**4,
    "num_key_value_heads": 10**4,
    "head_dim": 10**4,
    "max_position_embeddings": 10**9,
}
POSITIVE = ("rms_norm_eps", "rope_theta")


def read_config_json(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder; the values of an SDAR model are checked.

    Raises:
        InputError: no such file, no JSON, no object with a model_type, a value that no model can have.
    """
    file = folder / "config.json"
    if not file.is_file():  # a pipe would be waited for
        raise InputError(f"{file}: no such file, so {folder} is no checkpoint")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a model config, expected JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"{file}: not a model config, expected an object with `model_type`")
    if config["model_type"] in MODEL_TYPES:
        problem = problem_of(config)
        if problem:
            raise InputError(f"{file}: {problem}")
    return config


def problem_of(config: dict[str, Any]) -> str:
    """What is wrong with the values of an SDAR model's config, in one line; empty: nothing."""
    # Sizes, all of which published configs have; block_size may be missing.
    for name, most in SIZES.items():
        if not is_whole(config.get(name), 1, most):
            return f"{name} is {shown(config, name)}, expected a whole number from 1 to {most}"
    if config["num_attention_heads"] % config["num_key_value_heads"]:
        return (
            f"num_attention_heads is {config['num_attention_heads']}, expected a multiple of "
            f"num_key_value_heads, which is {config['num_key_value_heads']}"
        )
    positions, block_size = config["max_position_embeddings"], config.get("block_size")
    if block_size is not None and not is_whole(block_size, 1, positions):
        found = shown(config, "block_size")
        return f"block_size is {found}, expected null or a whole number from 1 to {positions} (the positions)"

    # Other numbers, and names.
    for name in POSITIVE:
        value = config.get(name, 1.0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            return f"{name} is {shown(config, name)}, expected a number above 0"
    for name in ("dtype", "torch_dtype"):
        value = config.get(name)
        known = isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)
        if value is not None and not known:
            return f"{name} is {shown(config, name)}, expected a type of torch such as bfloat16"
    activation = config.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACT2FN:
        return f"hidden_act is {shown(config, 'hidden_act')}, expected one of transformers such as silu"
    return ""


def is_whole(value: Any, least: int, most: int) -> bool:
    """Whether a value from JSON is a whole number within these bounds; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def shown(record: dict[str, Any], name: str) -> str:
    """A value as it stands in the JSON, shortened, or that it is missing."""
    return json.dumps(record[name])[:60] if name in record else "missing"
