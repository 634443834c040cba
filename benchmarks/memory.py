"""Will it fit, and how long will a step take? Predicted before any GPU is rented.

Memory of one GPU while it trains, as sft.py and dipo.py place it (FSDP2, a unit per decoder layer):

    weights, gradients, moments   float32 (moments: `moments`), each 1 / ranks of the model; gradients
                                  whole with `reduce_once`, if a step has several passes
    gathered units                embedding and head, and two layers (one in use, one on its way), in `dtype`;
                                  the largest unit's gradient in `dtype` and in float32 while it is reduced
    kept activations              what the backward pass of one micro-batch of token_budget tokens needs
    working memory                what comes on top at the worst moment: one layer's intermediate results
    logits                        one chunk of what is scored (plumbing.kernels.SCORING_BYTES)

and while it rolls out: weights and moments, the engine's copy of the weights and its key/value cache.

The activations are not a formula. The network itself runs forward and backward on the meta device,
where tensors have a shape and no memory, and `LiveBytes` adds up those that are alive; so the figure
follows the code. It is that of the operators one by one: a compiled layer needs less.

Time is the model FLOPs of the packed rows (`forward_backward_flops`) over what the GPUs are assumed to reach.
Rollouts, and the transfer of weights, are not in it.

    python benchmarks/memory.py model=8B ranks=8 token_budget=49152
    python benchmarks/memory.py model=path/to/config.json gpu_gib=79 checkpointing=full
"""

from __future__ import annotations

import json
import math
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3MoeConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import model as sdar
from plumbing.common import InputError, run_script
from plumbing.config import read_arguments, setting
from plumbing.kernels import SCORING_BYTES, checkpoint_layers

GIB = 2**30
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention.default


def qwen3(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int = 8, **more
) -> dict[str, Any]:
    """Fields of a config.json of Qwen3, which SDAR was trained from."""
    fields = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    fields |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128}
    return fields | {"vocab_size": 151936, "tie_word_embeddings": False} | more


SHAPES = {
    "1.7B": qwen3(2048, 6144, 28, 16, tie_word_embeddings=True),
    "4B": qwen3(2560, 9728, 36, 32, tie_word_embeddings=True),
    "8B": qwen3(4096, 12288, 36, 32),
    "30B-A3B": qwen3(
        2048, 6144, 48, 32, 4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768
    ),
    # for the CPU; wider weights, since flat distributions would hide an error
    "small": qwen3(256, 768, 4, 4, 2, head_dim=64, vocab_size=4096, initializer_range=0.1),
}


@dataclass
class PlanConfig:
    """Fields of benchmarks/memory.py."""

    model: str = setting(
        "8B", f"{', '.join(SHAPES)}, a config.json or a checkpoint folder", heading="Model and trajectories"
    )
    prompt: int = setting(1024, "tokens", above=0)
    response: int = setting(8192, "tokens", above=0)
    tpf: float = setting(2.0, "tokens per forward of the rollouts", at_least=1)
    block_size: int = setting(4, "tokens per block", above=0)
    trajectories: int = setting(512, "per optimizer step, over all ranks", above=0)

    ranks: int = setting(8, "GPUs", above=0, heading="Training, as in sft.py and dipo.py")
    token_budget: int = setting(49152, "packed tokens per forward pass and rank", above=0)
    checkpointing: Literal["none", "selective", "full"] = setting("full", "of the decoder layers")
    dtype: Literal["float32", "bfloat16"] = setting("bfloat16", "of the computation; weights stay float32")
    moments: Literal["float32", "bfloat16", "8bit"] = setting("float32", "of AdamW")
    reduce_once: bool = setting(True, "a rank holds the whole gradient till the last pass of a step")
    max_batch: int = setting(256, "answers that the engine of a rank generates at once", above=0)

    gpu_gib: float = setting(139.0, "memory; H200: 139, H100: 79", above=0, below=math.inf, heading="GPU")
    reserve_gib: float = setting(4.0, "CUDA context, NCCL, libraries, fragmentation", above=0, below=math.inf)
    tflops: float = setting(
        989.0, "dense peak in `dtype`; H100 and H200 in bfloat16: 989", above=0, below=math.inf
    )
    utilisation: float = setting(0.4, "model FLOPs over that peak, without recomputation", above=0)

    def check(self) -> None:
        """Refuse what the bounds of single fields do not say.

        Raises:
            InputError: naming the field.
        """
        if self.tpf > self.block_size:
            raise InputError(f"config key tpf: {self.tpf}, expected at most block_size")
        if self.utilisation > 1:
            raise InputError(f"config key utilisation: {self.utilisation}, expected at most 1")


def model_config(name: str) -> PreTrainedConfig:
    """The shape of a model by name, or from a config.json or the folder that holds one.

    Raises:
        InputError: no such name or file, not JSON, a field that is missing or no positive integer.
    """
    fields = SHAPES.get(name)
    if fields is None:
        path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"config key model: {name}, expected {', '.join(SHAPES)} or a file") from error
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error})") from error
        needed = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
        for field in needed + ["intermediate_size", "num_key_value_heads", "head_dim"]:
            value = fields.get(field) if isinstance(fields, dict) else None
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{path}: field {field} is {value!r}, expected a positive integer")
    fields = {k: v for k, v in fields.items() if k not in ("model_type", "architectures", "auto_map")}
    # transformers chooses the experts' kernel by looking at the file that a class is from: its own
    return (Qwen3MoeConfig if "num_experts" in fields else sdar.SDARConfig)(**fields)


def build(config: PreTrainedConfig, device: str, dtype: torch.dtype) -> sdar.BlockDiffusion:
    """A network of that shape with random weights, in training mode; on `meta` without memory."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdar", dtype=dtype)
    return model.train()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made while it is on: `now` alive, and at most (`peak`).

    A storage counts once, from the operator that made it until nothing refers to it. What an operator
    takes and gives back in between, such as the workspace of a kernel, is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._bytes: dict[int, int] = {}

    def _note(self, tree: Any, ours: bool) -> None:
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._bytes:
                self._bytes[key] = storage.nbytes() if ours else 0
                self.now += self._bytes[key]
                weakref.finalize(storage, self._forget, key)
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._bytes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._note((args, kwargs), ours=False)  # what was there before, weights for example
        out = func(*args, **(kwargs or {}))
        self._note(out, ours=True)
        return out


class MetaRow:
    """FlexAttention's stand-in: keeps q, k, v, the result and a float32 per row and head."""

    def attend(self, module, q, k, v, scaling: float) -> torch.Tensor:
        return ATTENTION(q, k, v, scale=scaling)[0].transpose(1, 2)


def activation_bytes(
    config: PreTrainedConfig, tokens: int, dtype: torch.dtype, checkpointing: str = "none"
) -> tuple[int, int]:
    """(kept, working) bytes of one packed row of `tokens` tokens; see the module docstring.

    kept: alive after the forward pass. working: what is alive on top of it at the worst moment of
    either pass. Gradients of weights are dropped at once, as FSDP2 does by sharding them.
    """
    experts = hasattr(config, "num_experts")  # their grouped products take bfloat16 only: scaled, then
    model = build(config, "meta", torch.bfloat16 if experts else dtype)
    scale = dtype.itemsize // model.dtype.itemsize
    checkpoint_layers(model, checkpointing)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with LiveBytes() as live:
        out = model.model(input_ids=ids, position_ids=ids, use_cache=False, attention=MetaRow())
        hidden = out.last_hidden_state
        kept = live.now
        hidden.backward(torch.empty_like(hidden))
    return scale * kept, scale * (live.peak - kept)


def parameters(config: PreTrainedConfig) -> dict[str, int]:
    """Parameters in all, of one decoder layer, outside the layers, and in matrices one token meets.

    The last is what FLOPs are counted from: of a mixture of experts the chosen ones, and no embedding.
    """
    c, d, q = config, config.hidden_size, config.num_attention_heads * config.head_dim
    attention = 2 * d * q + 2 * d * c.num_key_value_heads * c.head_dim
    norms = 2 * d + 2 * c.head_dim
    experts = getattr(c, "num_experts", 0)
    if experts:
        one, chosen, router = 3 * d * c.moe_intermediate_size, c.num_experts_per_tok, d * experts
    else:
        one, experts, chosen, router = 3 * d * c.intermediate_size, 1, 1, 0
    layer = attention + norms + experts * one + router
    rest = c.vocab_size * d * (1 if c.tie_word_embeddings else 2) + d
    used = c.num_hidden_layers * (attention + chosen * one + router)
    return {"all": c.num_hidden_layers * layer + rest, "layer": layer, "rest": rest, "used": used}


def forward_backward_flops(config: PreTrainedConfig, tokens: int, pairs: int, scored: int) -> int:
    """FLOPs that a training pass cannot do without: no recomputation, no invisible pairs.

    A matrix of P parameters costs a token 2 P forward and 4 P backward; a pair of tokens that see each
    other 4 D per head and layer (scores, then the weighted sum) forward and twice that backward.

    Args:
        pairs: (query, key) pairs that are visible, see `visible_pairs`.
        scored: positions that the LM head projects.
    """
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * pairs
    matrices = parameters(config)["used"] * tokens + config.hidden_size * config.vocab_size * scored
    return 6 * matrices + attention


def visible_pairs(block: torch.Tensor, block_size: int) -> int:
    """Pairs of a packed row, from the block of every token: clean tokens and views of block b alike
    see b blocks before theirs, and their own."""
    return int(((block + 1) * block_size).sum())


def packed_trajectory(prompt: int, response: int, tpf: float, block_size: int) -> tuple[int, int]:
    """(tokens, visible pairs) of one trajectory in the packed layout; the views spread evenly."""
    blocks = torch.arange(-(-(prompt + response) // block_size))
    generated = blocks[prompt // block_size :]
    views = block_size / tpf  # of each block
    pairs = block_size * (visible_pairs(blocks, block_size) + views * visible_pairs(generated, block_size))
    return round(block_size * (len(blocks) + views * len(generated))), round(pairs)


def predict(config: PlanConfig) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Bytes by part while training, bytes by part while rolling out, and figures of a step's time."""
    shape = model_config(config.model)
    size, dtype = parameters(shape), getattr(torch, config.dtype)
    item = dtype.itemsize
    moment = {"float32": 4, "bfloat16": 2, "8bit": 1}[config.moments]
    sharded = config.ranks > 1 or config.dtype != "float32"  # one rank in float32 runs without FSDP2
    largest = max(size["layer"], size["rest"])
    tokens, pairs = packed_trajectory(config.prompt, config.response, config.tpf, config.block_size)
    row = max(config.token_budget, tokens)
    kept, working = activation_bytes(shape, row, dtype, config.checkpointing)
    scored = row * config.response // tokens
    whole = config.reduce_once and config.trajectories * tokens > config.ranks * row
    logits = min(scored * shape.vocab_size * (item + 2 * 4), SCORING_BYTES)
    weights = {
        "weights, float32": 4 * size["all"] / config.ranks,
        f"AdamW's moments, {config.moments}": 2 * moment * size["all"] / config.ranks,
    }
    training = weights | {
        "gradients, float32": 4 * size["all"] / (1 if whole else config.ranks),
        "gathered units": sharded * (item * (size["rest"] + 2 * size["layer"]) + (item + 4) * largest),
        f"kept activations of {row:,} tokens": kept,
        "working memory of a layer": working,
        "logits": logits,  # in `dtype`, and two copies in float32
    }
    cached = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * item
    answers = min(config.max_batch, -(-config.trajectories // config.ranks))
    rollout = weights | {
        f"the engine's weights, {config.dtype}": item * size["all"],
        f"its cache for {answers} answers": cached * answers * (config.prompt + config.response),
    }
    flops = config.trajectories * forward_backward_flops(shape, tokens, pairs, config.response)
    time = {
        "packed tokens": config.trajectories * tokens,
        "PFLOP": flops / 1e15,
        "seconds": flops / (config.ranks * config.tflops * 1e12 * config.utilisation),
    }
    return training, rollout, time


def main(config: PlanConfig) -> None:
    """Print the parts, the verdict and the time."""
    *phases, time = predict(config)
    need = 0.0
    print("| part, per GPU | phase | GiB |\n|---|---|---:|")
    for phase, parts in zip(("training", "rollout"), phases, strict=True):
        parts["reserve"] = config.reserve_gib * GIB
        for name, size in parts.items():
            print(f"| {name} | {phase} | {size / GIB:.2f} |")
        print(f"| **{phase}** | | **{sum(parts.values()) / GIB:.2f}** |")
        need = max(need, sum(parts.values()) / GIB)
    verdict = "fits" if need <= config.gpu_gib else "does not fit"
    print(f"\n{config.model}, {config.ranks} GPUs: {verdict} in {config.gpu_gib:g} GiB (needs {need:.1f}).")
    print(
        f"Training part of a step: {time['packed tokens']:,} packed tokens, {time['PFLOP']:,.1f} PFLOP, "
        f"{time['seconds']:.1f} s at {100 * config.utilisation:.0f} % of {config.tflops:g} TFLOP/s per GPU."
    )


if __name__ == "__main__":
    run_script(main, read_arguments(PlanConfig))
