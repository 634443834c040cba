"""Who has the GPU when, and how much of it.

The GPU of a rank has two owners, which take turns. `to_trainer` and `to_engine` are the hand-overs, and
`plan` predicts what each phase needs, in order, from the config and the shape of the model alone:

    rollout   the trainer at rest (weights, moments); the engine's weights, cache and working memory
    train     the trainer: gradients, activations and so on; of the engine, asleep, only its CUDA context
    update    the trainer at rest, a bucket of weights on their way; the engine's weights, not yet its cache

At rest the trainer holds nothing else: what PyTorch's allocator keeps for later is given back before the
engine wakes, and the moments are made at the start, not in the middle of a step's activations. So the
engine's cache is what remains when the trainer is at rest (`room_for_cache`), on the first step and on
every other one. Checkpoints are written in the rollout phase; room for that is left as well.

What is estimated, since no GPU was there to measure it: CONTEXT, LIBRARIES, and what captured graphs take in
`engine_workspace`. docs/memory.md shows the plan of the shipped configs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig

from plumbing.checkpoint import read_config
from plumbing.common import InputError
from plumbing.kernels import SCORING_BYTES, checkpoint_layers
from plumbing.published import assumed_block_size
from plumbing.ranks import rank_and_world

GIB = 2**30
CONTEXT = 0.6 * GIB  # of a process on the GPU: CUDA's own, and loaded kernels (estimated)
LIBRARIES = 2.4 * GIB  # of the trainer: NCCL, workspaces of cuBLAS, fragmentation (estimated)
BUCKET_BYTES = 2**30  # weights travel to LMDeploy's process in pieces of this size, or one parameter
CACHE_PAGE = 64  # tokens of a cache block, LMDeploy's default
CACHE_SHARE = 0.95  # of what is left for the engine's cache; the rest is its allocator's
PREFILL_TOKENS = 8192  # that LMDeploy computes at once
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention.default


# --------------------------------------------------------------------------- the hand-overs


def used_bytes() -> int:
    """Of this rank's GPU, by all processes; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def rest() -> None:
    """Give back what PyTorch's allocator keeps for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reshard(*models: torch.nn.Module | None) -> None:
    """Give back what a pass without gradient gathered: FSDP2 keeps the root's weights for a backward pass."""
    for model in models:
        if isinstance(model, FSDPModule):
            model.reshard()


def to_trainer(engine: Any) -> dict[str, float]:
    """The rollouts are done: the engine sleeps.

    Returns:
        Metrics: gib_given_back, and on CUDA gib_rollout, what the GPU held till now.
    """
    figures = {"gib_rollout": used_bytes() / GIB} if torch.cuda.is_available() else {}
    figures["gib_given_back"] = engine.sleep() / GIB
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return figures


def to_engine(engine: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
    """The step is done: the trainer comes to rest, the engine gets the weights, then its cache.

    Args:
        weights: `named_weights` of the model; call this on every rank.

    Returns:
        Metrics, on CUDA only: gib_train and gib_update, the most that the GPU held while training and at
        the end of the update.
    """
    figures, cuda = {}, torch.cuda.is_available()
    if cuda:
        others = used_bytes() - torch.cuda.memory_reserved()
        figures["gib_train"] = (others + torch.cuda.max_memory_reserved()) / GIB
    rest()
    engine.update_weights(weights)
    if cuda:
        figures["gib_update"] = used_bytes() / GIB
    rest()  # the bucket goes before the cache comes
    engine.wake()
    return figures


# ------------------------------------------------------------------------ the engine's share


def cache_bytes_per_token(shape: Any, itemsize: int) -> int:
    """Bytes of a token's keys and values in all layers. `shape`: has the fields of config.json."""
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * itemsize


def engine_workspace(shape: Any, positions: int) -> int:
    """Bytes that LMDeploy takes beside weights and cache, summed up from its code.

    Args:
        shape: has the fields of config.json.
        positions: that one forward pass decodes, max_batch x block_size.
    """
    heads, kv_heads, dim = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    wide = getattr(shape, "num_experts_per_tok", 1) * getattr(shape, "moe_intermediate_size", 0)
    per_token = 4 * shape.hidden_size + 4 * (heads + 2 * kv_heads) * dim
    per_token += 6 * max(wide, shape.intermediate_size)
    layer = (PREFILL_TOKENS + positions) * per_token
    attention = 16 * positions * heads * (dim + 2)  # its parts, split over the cache
    logits = 2 * positions * shape.vocab_size + 42 * 64 * shape.vocab_size  # 64 rows at once are drawn from
    return layer + attention + logits + GIB  # captured graphs, and its allocator's rounding (estimated)


def checkpoint_bytes(largest: int) -> int:
    """Bytes that the trainer may take beside an engine that is awake, for its largest parameter's values.

    Writing a checkpoint gathers one parameter in float32 and looks for nan in it; an engine that was
    started again takes a bucket.
    """
    return max(5 * largest, BUCKET_BYTES)


def room_for_cache(free: float, weights: float, workspace: float, largest: int) -> int:
    """Bytes for the engine's cache, of `free` bytes before it starts, the trainer being at rest."""
    return int(CACHE_SHARE * (free - CONTEXT - weights - workspace - checkpoint_bytes(largest)))


# -------------------------------------------------------------------------------- the plan


@dataclass
class Job:
    """What decides how much memory a training script needs on each GPU."""

    shape: PreTrainedConfig  # of the model
    ranks: int
    dtype: str  # of the computation
    token_budget: int
    checkpointing: str
    reduce_once: bool
    cpu_offload: bool
    lora_rank: int
    reference: bool  # the KL's, a second model in float32
    engine: str  # lmdeploy, torch, or empty: there is none
    max_batch: int
    cache_gib: float
    block_size: int
    longest: int  # tokens of the longest prompt and response
    one_pass: bool = False  # a step has one row on every rank: no gradient waits for the next

    @property
    def row_tokens(self) -> int:
        """Of the largest packed row: a sequence is never cut, and has a view of every block at least."""
        return max(self.token_budget, 2 * self.longest)

    @classmethod
    def of(cls, config: Any, shape: PreTrainedConfig, ranks: int, longest: int, engine: str) -> Job:
        """The job of a config of sft.py or dipo.py."""
        names = {f.name for f in dataclasses.fields(cls)} & vars(config).keys()
        fields = {name: getattr(config, name) for name in names}
        rolls_out = config.eval_every or hasattr(config, "group_size")
        fields["engine"] = engine if rolls_out else ""
        block_size = config.block_size or getattr(shape, "block_size", None)
        fields["block_size"] = block_size or assumed_block_size(getattr(shape, "_name_or_path", ""))[0]
        fields["reference"] = bool(getattr(config, "kl_beta", 0))
        return cls(**fields | {"shape": shape, "ranks": ranks, "longest": longest})


def plan(job: Job, gpu_bytes: float) -> dict[str, dict[str, float]]:
    """Bytes by part, by phase, on each GPU of gpu_bytes.

    The engine's cache is what remains, or cache_gib; it is negative if nothing remains.
    """
    at_rest = parts_at_rest(job)
    train = at_rest | parts_of_training(job)
    if not job.engine:
        return {"train": train}

    # The embedded engine is in this process; while it sleeps its weights wait in the host's memory.
    size, positions = parameters(job.shape), job.max_batch * job.block_size
    item = 2 if job.engine == "lmdeploy" else getattr(torch, job.dtype).itemsize  # on a GPU: bfloat16
    update = at_rest | {"engine: weights": item * size["all"]}
    per_token = cache_bytes_per_token(job.shape, item)
    if job.engine == "torch":
        rollout = update | {
            "engine: logits and probabilities": 48 * positions * job.shape.vocab_size,  # estimated
            "engine: cache": per_token * job.max_batch * job.longest,
        }
        return {"rollout": rollout, "train": train, "update": update}

    # LMDeploy takes what remains as its cache, and leaves a context when it sleeps.
    workspace = engine_workspace(job.shape, positions)
    free = gpu_bytes - sum(at_rest.values())
    room = room_for_cache(free, update["engine: weights"], workspace, size["largest"])
    most = per_token * job.max_batch * job.shape.max_position_embeddings
    rollout = update | {
        "engine: context, working memory": CONTEXT + workspace,
        "writing a checkpoint": checkpoint_bytes(size["largest"]),
        "engine: cache": job.cache_gib * GIB or min(room, most),
    }
    train |= {"engine: context": CONTEXT}
    update |= {"engine: context": CONTEXT, "bucket": max(2 * size["largest"], BUCKET_BYTES)}
    return {"rollout": rollout, "train": train, "update": update}


def parts_at_rest(job: Job) -> dict[str, float]:
    """What the trainer holds all the time."""
    size = parameters(job.shape)["all"]
    parts = {"context, libraries": CONTEXT + LIBRARIES}
    if job.lora_rank:
        parts[f"frozen weights, {job.dtype}"] = getattr(torch, job.dtype).itemsize * size
        parts["adapters and their moments, float32"] = 12 * adapter_parameters(job.shape, job.lora_rank)
    elif not job.cpu_offload:
        parts["weights, float32"] = 4 * size / job.ranks
        parts["AdamW's moments, float32"] = 8 * size / job.ranks
    if job.reference and not job.cpu_offload:
        parts["reference, float32"] = 4 * size / job.ranks
    return parts


def parts_of_training(job: Job) -> dict[str, float]:
    """What a forward and backward pass takes beside `parts_at_rest`, at its worst moment."""
    # Gradients: whole ones wait for the next pass (reduce_once), else they are summed over the ranks.
    size, item = parameters(job.shape), getattr(torch, job.dtype).itemsize
    waits = job.reduce_once and not job.one_pass
    gradients = 4 * size["all"] / (1 if waits else job.ranks)
    if job.lora_rank:
        gradients = 4 * adapter_parameters(job.shape, job.lora_rank)
    elif job.cpu_offload and not waits:
        gradients = 0

    # FSDP2's units: embedding and head, two layers (one in use, one on its way), and the largest unit's
    # gradient in `dtype` and in float32 while it is reduced.
    sharded = not job.lora_rank and (job.ranks > 1 or job.dtype != "float32" or job.cpu_offload)
    largest = max(size["layer"], size["rest"])
    gathered = item * (size["rest"] + 2 * size["layer"]) + (item + 4) * largest
    kept, working = activation_bytes(job.shape, job.row_tokens, job.dtype, job.checkpointing)
    return {
        "gradients, float32": gradients,
        "gathered units": sharded * gathered,
        f"kept activations of {job.row_tokens:,} tokens": kept,
        "working memory of a layer": working,
        "logits": SCORING_BYTES,
    }


def shortage(job: Job, gpu_bytes: float) -> tuple[str, float] | None:
    """The first phase that does not fit, and the bytes that it needs; None: all fit.

    The engine's cache has to hold one response of full length at least.
    """
    least = cache_bytes_per_token(job.shape, 2) * job.longest
    for phase, parts in plan(job, gpu_bytes).items():
        if "engine: cache" in parts and not job.cache_gib and job.engine == "lmdeploy":
            parts["engine: cache"] = max(parts["engine: cache"], least)
        if sum(parts.values()) > gpu_bytes:
            return phase, sum(parts.values())
    return None


def remedies(job: Job) -> Iterator[dict[str, Any]]:
    """Changes of fields that need less memory, those that cost least first."""
    budgets = [job.token_budget // 2**i for i in range(1, 6)]
    budgets = [budget for budget in budgets if budget >= 2 * job.longest]
    batches = [job.max_batch // 2**i for i in range(1, 6) if job.max_batch // 2**i]

    # One field.
    yield {"cache_gib": 0.0}
    yield {"checkpointing": "selective"}
    yield {"checkpointing": "full"}
    yield {"reduce_once": False}
    for max_batch in batches:
        yield {"max_batch": max_batch}
    for token_budget in budgets:
        yield {"token_budget": token_budget}

    # Several, then those that change what is trained or where it waits.
    saving = {"checkpointing": "full", "reduce_once": False, "cache_gib": 0.0}
    for token_budget in [job.token_budget, *budgets]:
        for max_batch in [job.max_batch, *batches]:
            yield saving | {"token_budget": token_budget, "max_batch": max_batch}
    if job.ranks == 1:
        for token_budget in [job.token_budget, *budgets]:
            yield {"lora_rank": 16, "checkpointing": "full", "token_budget": token_budget}
    for token_budget in [job.token_budget, *budgets]:
        yield {"cpu_offload": True} | saving | {"token_budget": token_budget}


def problem(job: Job, gpu_bytes: float) -> str:
    """Why a job cannot run on GPUs of so many bytes, and which fields would make it fit; empty: it fits."""
    found = shortage(job, gpu_bytes)
    if not found:
        return ""
    phase, needed = found
    reason = f"{needed / GIB:.1f} GiB in the {phase} phase, the GPU has {gpu_bytes / GIB:.1f}"

    # Some fields of this script.
    for changes in remedies(job):
        changed = {name: value for name, value in changes.items() if getattr(job, name) != value}
        if changed and not shortage(dataclasses.replace(job, **changed), gpu_bytes):
            name = next(iter(changed))
            advice = " ".join(f"{key}={str(value).lower()}" for key, value in changed.items())
            return f"config key {name}: {getattr(job, name)} needs {reason}; {advice} would fit"

    # Or more GPUs.
    for ranks in (2 * job.ranks, 4 * job.ranks, 8 * job.ranks, 16 * job.ranks):
        if not shortage(dataclasses.replace(job, ranks=ranks), gpu_bytes):
            return f"config key model: it needs {reason}; {ranks} ranks would do (torchrun)"
    return f"config key model: it needs {reason}"


def check_memory(config: Any, folder: Any) -> None:
    """Refuse a config that cannot fit on this rank's GPU, before weights are loaded.

    Raises:
        InputError: naming the field that would make it fit.
    """
    if not torch.cuda.is_available() or not config.check_memory:
        return
    shape = read_config(folder)
    engine = config.engine if config.engine != "auto" else "lmdeploy"
    longest = max(config.eval_max_tokens, getattr(config, "max_tokens", 0))
    job = Job.of(config, shape, rank_and_world()[1], longest, engine)
    if found := problem(job, torch.cuda.mem_get_info()[0] + CONTEXT):  # of which this process has its own
        raise InputError(f"{found} (check_memory=false tries it all the same)")


# ----------------------------------------------------------------------- sizes of the parts


def parameters(shape: PreTrainedConfig) -> dict[str, int]:
    """Parameters in all, of one decoder layer, outside the layers, of the largest tensor, and in matrices
    that one token meets.

    The last is what FLOPs are counted from: of a mixture of experts the chosen ones, and no embedding.
    """
    c, d, q = shape, shape.hidden_size, shape.num_attention_heads * shape.head_dim
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
    fused = experts * one * 2 // 3 if experts > 1 else 0  # gate above up, of all experts
    largest = max(c.vocab_size * d, d * q, one // 3, fused)
    every = c.num_hidden_layers * layer + rest
    return {"all": every, "layer": layer, "rest": rest, "largest": largest, "used": used}


def adapter_parameters(shape: PreTrainedConfig, rank: int) -> int:
    """Parameters of LoRA's adapters (plumbing/lora.py)."""
    d, q = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    kv = shape.num_key_value_heads * shape.head_dim
    attention = 2 * (d + q) + 2 * (d + kv)
    return shape.num_hidden_layers * rank * (attention + 3 * (d + shape.intermediate_size))


def build(shape: PreTrainedConfig, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """A network of that shape with random weights, in training mode; on `meta` without memory."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape, attn_implementation="sdar", dtype=dtype)
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
    shape: PreTrainedConfig, tokens: int, dtype: str, checkpointing: str = "none"
) -> tuple[int, int]:
    """(kept, working) bytes of one packed row of `tokens` tokens.

    kept: alive after the forward pass. working: what is alive on top of it at the worst moment of
    either pass. Gradients of weights are dropped at once, as FSDP2 does by sharding them.

    No formula: the network itself runs forward and backward on the meta device, where tensors have a shape
    and no memory, so the figure follows the code. It is that of the operators one by one: a compiled layer
    needs less. Every further layer keeps as much as the fourth, and works in the same room.
    """
    layers = shape.num_hidden_layers
    if layers <= 4:
        return _pass_bytes(shape.to_json_string(), type(shape), tokens, dtype, checkpointing)
    kept = []
    for few in (3, 4):
        short = copy.deepcopy(shape)
        short.num_hidden_layers = few
        of_few, working = _pass_bytes(short.to_json_string(), type(shape), tokens, dtype, checkpointing)
        kept.append(of_few)
    return kept[1] + (layers - 4) * (kept[1] - kept[0]), working


@functools.cache
def _pass_bytes(
    fields: str, config_class: type, tokens: int, dtype: str, checkpointing: str
) -> tuple[int, int]:
    shape = config_class(**json.loads(fields))
    experts = hasattr(shape, "num_experts")  # their grouped products take bfloat16 only: scaled, then
    wanted = getattr(torch, dtype)
    model = build(shape, "meta", torch.bfloat16 if experts else wanted)
    scale = wanted.itemsize // model.dtype.itemsize
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
