"""LoRA: frozen weights, and adapters whose product is added to them wherever they leave the trainer."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from plumbing.common import InputError


def add_adapters(model: torch.nn.Module, rank: int, seed: int = 0) -> None:
    """LoRA (arXiv 2106.09685) through peft: freeze the weights, give every projection B A of that rank.

    B starts as zeros, alpha is twice the rank. Adapters are float32 whatever the model is.

    Raises:
        InputError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise InputError("config key lora_rank: the package is missing, pip install peft") from error
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=kinds), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def base_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of what a checkpoint holds: all but LoRA's adapters."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer", ""), parameter


def delta_weight(model: torch.nn.Module, name: str) -> torch.Tensor | None:
    """What the adapter of a tensor of `base_parameters` adds to it; None if it has none."""
    layer = model.get_submodule(name.rpartition(".")[0])
    return layer.get_delta_weight("default").detach() if hasattr(layer, "get_delta_weight") else None
