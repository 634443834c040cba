"""SDAR: a Qwen3 decoder that denoises blocks.

The network is transformers' Qwen3 (Qwen3-MoE for the 30B-A3B model) with published SDAR weights; what
makes it SDAR is who sees whom. A token sees every token of its own block of B and of earlier blocks,
and the logits at position i predict the token *at* i (no shift), where a mask token stands for what is
not known yet. Three things are added here:

    score    a packed training pass (masking.py): log-probability of every action, and entropy
    decode   one forward over some blocks of several sequences against a key/value cache
    load, save, tiny    Hugging Face folders, without trust_remote_code; a tiny one from scratch

Attention is one function that asks a `visible` object to attend: over a packed row (`FlexRow` on CUDA,
`JointRow` on CPU, `DenseRow` as the plain reference) or over the cache (`CachedBlocks`).

    python model.py runs/tiny    # writes a tiny random SDAR checkpoint with its tokenizer

Sources: SDAR (arXiv 2510.06303), BD3-LM (2503.09573), FlexAttention (2412.05496).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from masking import (
    HOLD,
    TILE,
    InputError,
    Packed,
    block_mask,
    dense_mask,
    noise,
    pack,
    padded,
    visible,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LOG_FLOOR = -20.7  # log(1e-9): no action is scored as less likely, so no ratio is infinite
FLOOR = math.exp(LOG_FLOOR)
LOGITS_KEPT = 2**24  # logits that plain autograd may hold at once: about 0.4 GiB with its copies
SCORING_BYTES = 2**30  # that ScoreRows may take for the logits of a chunk of rows and their copies


@dataclass
class Sampling:
    """What is done to the logits before a token is drawn. Rollout and training must agree on it."""

    temperature: float = 1.0
    top_k: int = 0  # 0: off; 1: greedy
    top_p: float = 1.0


@dataclass
class Scores:
    """What `score` returns for M rows."""

    logprobs: torch.Tensor  # [M] log-probability of the action: reveal this token, or hold
    entropy: torch.Tensor  # [M] of the distribution sampled from, in nats; a metric, without gradient


def sampling_logprobs(logits: torch.Tensor, how: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p, log g), each [..., V] in float32 or the logits' float64, from logits [..., V].

    p is the softmax over the whole vocabulary after temperature: confidences come from it.
    g is p after top-k, then top-p, renormalised: tokens are drawn from it. Same order and the same
    comparisons as LMDeploy 0.18.0 (pytorch/engine/logits_process.py).
    """
    log_p = F.log_softmax(_tempered(logits, how.temperature), dim=-1)
    if how.top_k == 0 and how.top_p == 1.0:
        return log_p, log_p
    ranked, order = log_p.detach().sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if how.top_k:
        keep[..., how.top_k :] = False
    if how.top_p < 1.0:
        kept = ranked.masked_fill(~keep, -torch.inf).softmax(-1)
        keep &= kept.cumsum(-1) - kept <= how.top_p
        keep[..., 0] = True
    dropped = torch.ones_like(keep).scatter(-1, order, ~keep)
    return log_p, F.log_softmax(log_p.masked_fill(dropped, -torch.inf), dim=-1)


def _tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """logits / temperature, in float32 at least; no copy that is not needed (they are the largest thing)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1.0 else logits / temperature


def score_logits(logits: torch.Tensor, targets: torch.Tensor, bounds: torch.Tensor, how: Sampling) -> Scores:
    """Log-probability of each action and entropy, from logits [M, V].

    A reveal of v has log g(v). A hold (target HOLD) has log of the mass of those draws that the rule
    would have held, sum of g(v) over v with p(v) < bound. Source: design, section 4. A policy that
    moved may leave no draw to hold: the floor then, without gradient.
    """
    log_p, log_g = sampling_logprobs(logits, how)
    logprobs = log_g.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    g = log_g.exp()
    held = targets == HOLD
    if held.any():
        p = g if log_p is log_g else log_p.exp()
        mass = torch.where(p < bounds[:, None], g, 0).sum(-1)
        logprobs = torch.where(held, mass.clamp(min=FLOOR).log(), logprobs)
    entropy = torch.special.entr(g.detach()).sum(-1)
    return Scores(logprobs.clamp(min=LOG_FLOOR), entropy)


# ------------------------------------------------------------------------ the network


class SDARConfig(Qwen3Config):
    """Qwen3's configuration under the published model type."""

    model_type = "sdar"


class SDARMoeConfig(Qwen3MoeConfig):
    """Qwen3-MoE's configuration under the published model type."""

    model_type = "sdar_moe"


class BlockDiffusion:
    """The two passes that SDAR adds to a Qwen3 language model."""

    def score(self, packed: Packed, how: Sampling, attention: str = "auto") -> Scores:
        """Score the rows of a packed row in one forward pass, gradient included.

        Logits are never held for all rows: chunks of rows go through the LM head one by one, and are
        computed again in the backward pass.
        """
        packed = padded(packed) if packed.ids.is_cuda else packed  # whole tiles, and fewer different lengths
        row = attention_over(packed, attention)
        if isinstance(row, FlexRow) and packed.ids.is_cuda:
            c = self.config
            heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
            row.options = flex_options(self.lm_head.weight.dtype, *heads) | row.options
        hidden = self.model(
            input_ids=packed.ids[None],
            position_ids=packed.positions[None],
            use_cache=False,
            visible=row,
        ).last_hidden_state[0]  # [N, hidden]
        return self.score_hidden(hidden.index_select(0, packed.rows), packed.targets, packed.bounds, how)

    def score_hidden(self, hidden, targets: torch.Tensor, bounds: torch.Tensor, how: Sampling) -> Scores:
        """Scores of M rows from their final hidden states [M, hidden], in whichever way is the leanest."""
        logits = len(hidden) * self.config.vocab_size
        if logits <= LOGITS_KEPT:
            return score_logits(self.lm_head(hidden), targets, bounds, how)
        if how.top_k == 0 and how.top_p == 1.0 and type(self.lm_head) is torch.nn.Linear:
            return Scores(*ScoreRows.apply(hidden, self.lm_head.weight, targets, bounds, how.temperature))

        def score_chunk(hidden, targets, bounds) -> tuple[torch.Tensor, torch.Tensor]:
            scores = score_logits(self.lm_head(hidden), targets, bounds, how)
            return scores.logprobs, scores.entropy

        parts = [t.tensor_split(-(-logits // LOGITS_KEPT)) for t in (hidden, targets, bounds)]
        scored = [checkpoint(score_chunk, *part, use_reentrant=False) for part in zip(*parts, strict=True)]
        return Scores(*(torch.cat(t) for t in zip(*scored, strict=True)))

    def prefill(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: BlockCache, slots: torch.Tensor
    ) -> torch.Tensor:
        """Final hidden states [S, T, hidden] of T neighbouring tokens (whole blocks) of S sequences.

        Their keys and values are written to the cache at their positions, replacing what an earlier
        step of the same block left there; so a last forward over the finished block leaves it clean.
        """
        seen = CachedBlocks(cache, slots, positions)
        compiled = self.model.layers[0]._compiled_call_impl is not None  # for `score`, see compile_layers
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            out = self.model(input_ids=ids, position_ids=positions, use_cache=False, visible=seen)
        return out.last_hidden_state

    def decode(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: BlockCache, slots: torch.Tensor
    ) -> torch.Tensor:
        """Logits [S, T, V]; otherwise like `prefill`."""
        return self.lm_head(self.prefill(ids, positions, cache, slots))


class SDARForCausalLM(BlockDiffusion, Qwen3ForCausalLM):
    """Published SDAR-1.7B to 8B checkpoints."""

    config_class = SDARConfig


class SDARMoeForCausalLM(BlockDiffusion, Qwen3MoeForCausalLM):
    """Published SDAR-30B-A3B checkpoints."""

    config_class = SDARMoeConfig

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers would look into this file for how Qwen3-MoE is written, not find it, and
        # compute one expert after the other instead of all in one grouped product


def attend(module, query, key, value, attention_mask, scaling, visible, **_):
    """transformers' attention hook: query [S, H, T, D], key and value [S, KV, T, D] -> [S, T, H, D]."""
    return visible.attend(module, query, key, value, scaling), None


AttentionInterface.register("sdar", attend)
for _config, _model in ((SDARConfig, SDARForCausalLM), (SDARMoeConfig, SDARMoeForCausalLM)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
# Published files keep one tensor per expert; transformers fuses them on loading, and splits on saving.
register_checkpoint_conversion_mapping(
    "sdar_moe", get_checkpoint_conversion_mapping("qwen3_moe"), overwrite=True
)


# -------------------------------------------------------------------------- attention


def attention_over(packed: Packed, backend: str = "auto") -> FlexRow | JointRow | DenseRow:
    """The attention for one packed row: `flex`, `joint` or `dense`; auto is flex on CUDA, else joint."""
    if backend == "auto":
        backend = "flex" if packed.ids.is_cuda else "joint"
    return {"flex": FlexRow, "joint": JointRow, "dense": DenseRow}[backend](packed)


class DenseRow:
    """SDPA with the N x N mask: the plain reference, for tests and short rows."""

    def __init__(self, packed: Packed):
        self.mask = dense_mask(packed)

    def attend(self, module, q, k, v, scaling: float) -> torch.Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=scaling)
        return out.transpose(1, 2)


class FlexRow:
    """FlexAttention over tiles; compiled on CUDA. (On CPU it has no backward pass in torch 2.13.)

    Compiled twice: for the first length, then for all lengths (torch's automatic dynamic shapes).
    """

    def __init__(self, packed: Packed, options: dict | None = None):
        self.mask = block_mask(packed)
        self.options = (options or {}) | {"IS_DIVISIBLE": len(packed) % TILE == 0}

    def attend(self, module, q, k, v, scaling: float) -> torch.Tensor:
        if not q.is_cuda:
            return _flex(q, k, v, self.mask, scaling, {}).transpose(1, 2)
        flex = _flex if torch.compiler.is_compiling() else _compiled(_flex)
        return flex(q, k, v, self.mask, scaling, self.options).transpose(1, 2)


class JointRow:
    """Exact attention on CPU without the N x N waste: view-to-view is almost all empty.

    Every group of B neighbours (a block of the clean copy, or a view) sees itself and the clean
    tokens of earlier blocks. So a query is scored against the L clean keys of its sequence and the B
    keys of its own group, under one softmax. Sequences are padded to the longest of the row.
    """

    def __init__(self, packed: Packed):
        device = packed.ids.device
        length = torch.bincount(packed.sequence)  # [S] tokens of each sequence, views included
        clean = torch.bincount(packed.sequence[packed.view == 0])
        self.group, self.num_keys = packed.block_size, int(clean.max())
        self.shape = (len(length), int(length.max()))  # S, T
        inside = torch.arange(self.shape[1], device=device)
        valid = inside < length[:, None]  # [S, T]
        gather = torch.where(valid, inside + (length.cumsum(0) - length)[:, None], 0)
        self.gather = gather.flatten()
        self.scatter = valid.flatten().nonzero()[:, 0]
        self.padded = self.scatter.numel() != self.gather.numel()
        tags = [t[gather] for t in (packed.sequence, packed.block, packed.view)]
        q_tags, kv_tags = [t[:, :, None] for t in tags], [t[:, None, : self.num_keys] for t in tags]
        own = (q_tags[1] == kv_tags[1]) & (q_tags[2] == kv_tags[2])  # scored with the group instead
        seen = visible(*q_tags, *kv_tags) & (kv_tags[2] == 0) & ~own & valid[:, None, : self.num_keys]
        self.bias = torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)

    def _split(self, t: torch.Tensor) -> torch.Tensor:
        """[1, H, N, D] -> [S, H, T, D]."""
        t = t[0].transpose(0, 1)  # [N, H, D]
        t = t.index_select(0, self.gather) if self.padded else t
        return t.view(*self.shape, *t.shape[1:]).transpose(1, 2)

    def attend(self, module, q, k, v, scaling: float) -> torch.Tensor:
        heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[3]
        (s, t), b, n = self.shape, self.group, self.num_keys
        q, k, v = self._split(q * scaling), self._split(k), self._split(v)
        q = q.reshape(s, kv_heads, -1, dim)  # heads that share a key head, one after the other
        bias = self.bias[:, None, None].to(q.dtype)  # [S, 1, 1, T, L]
        clean = (q @ k[:, :, :n].transpose(2, 3)).view(s, kv_heads, -1, t, n) + bias
        grouped_q = q.view(s, kv_heads, -1, t // b, b, dim)
        grouped_k, grouped_v = (x.reshape(s, kv_heads, 1, t // b, b, dim) for x in (k, v))
        own = (grouped_q @ grouped_k.transpose(-1, -2)).view(s, kv_heads, -1, t, b)
        weights = torch.cat([clean, own], dim=-1).softmax(-1, dtype=torch.float32).to(v.dtype)
        w_clean, w_own = weights.split([n, b], dim=-1)
        out = w_clean.reshape(s, kv_heads, -1, n) @ v[:, :, :n]
        own_out = w_own.reshape(s, kv_heads, -1, t // b, b, b) @ grouped_v
        out = out.view(s, heads, t, dim) + own_out.view(s, heads, t, dim)
        out = out.transpose(1, 2).reshape(s * t, heads, dim)
        return (out.index_select(0, self.scatter) if self.padded else out)[None]


class BlockCache:
    """Keys and values of `slots` sequences of at most `max_tokens` tokens."""

    def __init__(self, model: BlockDiffusion, slots: int, max_tokens: int, block_size: int):
        c = model.config
        shape = (c.num_hidden_layers, 2, slots, max_tokens, c.num_key_value_heads, c.head_dim)
        self.keys_values = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.block_size = block_size


@dataclass
class CachedBlocks:
    """Attention of T neighbouring tokens of S sequences over the cache, block-causally."""

    cache: BlockCache
    slots: torch.Tensor  # [S] which sequence of the cache each row is
    positions: torch.Tensor  # [S, T]

    def __post_init__(self):
        self.length = int(self.positions.max()) + 1
        kv_block = torch.arange(self.length, device=self.slots.device) // self.cache.block_size
        q_block = self.positions[:, :, None] // self.cache.block_size
        self.mask = visible(0, q_block, 0, 0, kv_block, torch.zeros_like(kv_block))  # [S, T, kv]

    def attend(self, module, q, k, v, scaling: float) -> torch.Tensor:
        s, heads, t, dim = q.shape
        for cached, new in zip(self.cache.keys_values[module.layer_idx], (k, v), strict=True):
            cached[self.slots[:, None], self.positions] = new.transpose(1, 2)
        k, v = self.cache.keys_values[module.layer_idx][:, self.slots, : self.length].transpose(2, 3)
        ratio = heads // k.shape[1]  # heads that share a key head become further queries
        mask = self.mask[:, None].repeat(1, 1, ratio, 1)
        q = q.reshape(s, k.shape[1], ratio * t, dim)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        return out.view(s, heads, t, dim).transpose(1, 2)


# ------------------------------------------------------------------------ checkpoints


def find_folder(name: str) -> Path:
    """The local folder of a checkpoint: a path, or a Hugging Face model id (fetched once)."""
    if Path(name).exists():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise InputError(f"{name}: no such checkpoint folder")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub raises many kinds; for the user they are one
        reason = str(error).splitlines()[0]
        raise InputError(f"{name}: neither a folder nor a model of the hub ({reason})") from error


def load(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> BlockDiffusion:
    """An SDAR model from a checkpoint folder or a hub id.

    Raises:
        InputError: no folder, no config, not an SDAR model, missing or damaged weights.
    """
    folder = find_folder(name)
    config = _read_config(folder)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="sdar",
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except Exception as error:  # a truncated file, a wrong shape: safetensors and torch differ
        raise InputError(f"{folder}: cannot read the weights ({_first(error)})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            name = min(k if isinstance(k, str) else k[0] for k in report[problem])
            raise InputError(f"{folder}: {problem.removesuffix('_keys')} tensor {name}")
    return model.to(device)


def _read_config(folder: Path) -> SDARConfig | SDARMoeConfig:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}/config.json: not a model config ({_first(error)})") from error
    if config.model_type not in ("sdar", "sdar_moe"):
        raise InputError(f"{folder}/config.json: model_type is {config.model_type}, expected sdar")
    if not list(folder.glob("*.safetensors")):
        raise InputError(f"{folder}: no weights, expected model.safetensors")
    return config


# From here to `fill`: for models that no single rank could hold. They are built without memory
# (`on_meta`), sharded (sft.py), then filled by every rank with its own rows of the files (`fill`).


class TensorFiles:
    """Tensors in the files FOLDER/STEM*.safetensors, read by rows; opening them reads their headers.

    A file may hold some rows of a tensor only. Its metadata then has `first_rows`, a JSON object of the
    first row that it has of each tensor.

    Raises:
        InputError: a file that cannot be read, a tensor or rows of it that are in none of them.
    """

    def __init__(self, folder: Path, stem: str):
        self.parts: dict[str, list[tuple[int, object]]] = {}  # of each tensor: first row, slice
        self.where = folder / f"{stem}.safetensors"
        for file in sorted(folder.glob(f"{stem}*.safetensors")):
            try:
                opened = safe_open(file, "pt")
                first = json.loads((opened.metadata() or {}).get("first_rows", "{}"))
                for name in opened.keys():  # noqa: SIM118, it is no mapping
                    self.parts.setdefault(name, []).append((first.get(name, 0), opened.get_slice(name)))
            except (OSError, SafetensorError, ValueError) as error:
                raise InputError(f"{file}: cannot read it ({_first(error)})") from error

    def shape(self, name: str) -> list[int]:
        """Of the whole tensor."""
        sizes = [[first + part.get_shape()[0], *part.get_shape()[1:]] for first, part in self.parts[name]]
        return max(sizes)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """[stop - start, ...] of the tensor; it may be memory of the mapped file, so copy it."""
        found = []
        for first, part in sorted(self.parts.get(name, []), key=lambda item: item[0]):
            end = min(stop, first + part.get_shape()[0])
            if first <= start < end:
                found.append(part[start - first : end - first])
                start = end
        if start < stop:
            raise InputError(f"{self.where}: no rows {start} to {stop} of tensor {name}")
        return torch.cat(found) if len(found) > 1 else found[0]


def own_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(what this rank holds of a tensor that fully_shard cut along its rows, the first row's number)."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    mesh = tensor.device_mesh  # as torch.chunk does: equal parts, the last ones shorter or empty
    per_rank = -(-len(tensor) // mesh.size())
    return tensor.to_local(), min(mesh.get_local_rank() * per_rank, len(tensor))


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor of a shard (a collective call), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_published(name: str, rows: torch.Tensor, first: int = 0) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Rows of a parameter as (name, view, first row) of the tensors that a checkpoint has for them.

    They are the same, except that transformers fuses what published files keep one by one: experts are
    [E, 2I, H] (gate above up) and [E, H, I] here, gate_proj, up_proj and down_proj of each there.
    """
    head, kind = name.rsplit(".", 1)
    if not head.endswith(".experts"):
        yield name, rows, first
        return
    kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
    for number, expert in enumerate(rows, start=first):
        for kind, view in zip(kinds, expert.chunk(len(kinds)), strict=True):
            yield f"{head}.{number}.{kind}.weight", view, 0


def on_meta(name: str, dtype: torch.dtype = torch.float32) -> BlockDiffusion:
    """The model of a checkpoint without its weights and without memory for them; then shard, `fill`.

    Raises:
        InputError: as `load`, all problems with names and shapes of tensors included.
    """
    folder = find_folder(name)
    config = _read_config(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdar")
    model.tie_weights()
    files = TensorFiles(folder, "model")
    wanted = {n: list(t.shape) for p in model.named_parameters() for n, t, _ in as_published(*p)}
    tied = {n for n, _ in model.named_parameters(remove_duplicate=False)} - wanted.keys()
    if missing := wanted.keys() - files.parts.keys():
        raise InputError(f"{folder}: missing tensor {min(missing)}")
    if unexpected := files.parts.keys() - wanted.keys() - tied:
        raise InputError(f"{folder}: unexpected tensor {min(unexpected)}")
    if mismatched := [n for n, shape in wanted.items() if files.shape(n) != shape]:
        raise InputError(f"{folder}: mismatched tensor {min(mismatched)}")
    return model


@torch.no_grad()
def fill(model: BlockDiffusion, name: str, device: torch.device | str, weights_on: str = "") -> None:
    """Give a model that was built `on_meta` its memory and its weights, of which a rank reads its own.

    Args:
        device: where it computes.
        weights_on: where the weights wait if not there (CPU offload).
    """
    model.to_empty(device=weights_on or device)
    model.tie_weights()
    rotary = model.model.rotary_emb  # the only one with buffers, which no file has
    model.model.rotary_emb = type(rotary)(model.config).to(device)
    files = TensorFiles(find_folder(name), "model")
    for parameter_name, parameter in model.named_parameters():
        for published, view, first in as_published(parameter_name, *own_rows(parameter)):
            if len(view):
                view.copy_(files.rows(published, first, first + len(view)))


@contextlib.contextmanager
def writing(path: Path):
    """Name the file that cannot be written; safetensors has an error of its own for a full disk."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot write it ({reason})") from error


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def is_block_diffusion(folder: Path) -> bool:
    """Whether a checkpoint is an SDAR model; if not, it is an autoregressive baseline for LMDeploy."""
    try:
        config = json.loads((folder / "config.json").read_text())
        return config["model_type"] in (SDARConfig.model_type, SDARMoeConfig.model_type)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/config.json: not a model config ({_first(error)})") from error


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint, checked for what its model needs.

    Raises:
        InputError: no tokenizer, no mask token, no chat template.
    """
    folder = find_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise InputError(f"{folder}: cannot read the tokenizer ({_first(error)})") from error
    if tokenizer.mask_token_id is None:
        tokenizer.mask_token = "<|MASK|>" if "<|MASK|>" in tokenizer.get_vocab() else None
    if tokenizer.mask_token_id is None and is_block_diffusion(folder):
        raise InputError(f"{folder}: the tokenizer has no mask token, expected <|MASK|>")
    if not tokenizer.chat_template:
        raise InputError(f"{folder}: the tokenizer has no chat template")
    return tokenizer


def stop_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens that end a response: the end of the turn and the end of the text."""
    names = [tokenizer.eos_token, "<|im_end|>", "<|endoftext|>"]
    vocabulary = tokenizer.get_vocab()
    return sorted({vocabulary[n] for n in names if n in vocabulary})


def add_adapters(model: BlockDiffusion, rank: int, seed: int = 0) -> None:
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


def base_parameters(model: BlockDiffusion) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of what a checkpoint holds: all but LoRA's adapters."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer", ""), parameter


def whole(model: BlockDiffusion, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """A tensor of `base_parameters` gathered from its shards, with its adapter's product added."""
    tensor = full(parameter.detach())
    layer = model.get_submodule(name.rpartition(".")[0])
    if hasattr(layer, "get_delta_weight"):
        tensor = tensor + layer.get_delta_weight("default").detach().to(tensor.dtype)
    return tensor


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], key: str, value: str) -> None:
    """A safetensors file with one entry of metadata (of several, the order would be by chance).

    It is on the disk when this returns.
    """
    with writing(file):
        save_file(tensors, file, {key: value})
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())


def save(
    model: BlockDiffusion,
    folder: Path,
    source: Path,
    rank: int = 0,
    ranks: int = 1,
    file_bytes: int = 4 * 2**30,
) -> None:
    """Write a Hugging Face folder that loads wherever `source` does; call on every rank.

    The weights go to files of about `file_bytes`, which the ranks write at the same time, `ranks` of them
    in a round: no rank holds more than one at once. Everything else (config.json, tokenizer, chat
    template, published modelling code) is copied from `source` byte for byte, so that no version of
    transformers rewrites it.
    """
    kept = (".json", ".txt", ".jinja", ".py")
    files = [f for f in source.iterdir() if f.suffix in kept and "safetensors" not in f.name]
    contents = {file.name: file.read_bytes() for file in files}  # `source` may be `folder`
    folder.mkdir(parents=True, exist_ok=True)
    parts, used = [], file_bytes
    for name, parameter in base_parameters(model):
        if used + parameter.nbytes > file_bytes:
            parts.append([])
            used = 0
        parts[-1].append((name, parameter))
        used += parameter.nbytes
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    names = names if len(parts) > 1 else ["model.safetensors"]
    weight_map = {}
    for start in range(0, len(parts), ranks):
        mine: dict[str, torch.Tensor] = {}
        for number, part in enumerate(parts[start : start + ranks]):
            for name, parameter in part:
                for published, view, _ in as_published(name, whole(model, name, parameter)):
                    weight_map[published] = names[start + number]
                    if number == rank:
                        mine[published] = view.to("cpu", copy=True).contiguous()
        if mine:
            write_tensors(folder / names[start + rank], mine, "format", "pt")
    if rank:
        return
    if len(parts) > 1:
        total = {"total_size": sum(p.nbytes for p in model.parameters())}
        index = json.dumps({"metadata": total, "weight_map": weight_map}, indent=2, sort_keys=True)
        contents["model.safetensors.index.json"] = (index + "\n").encode()
    for name, content in contents.items():
        with writing(folder / name):
            (folder / name).write_bytes(content)


# ----------------------------------------------------------------------- a tiny model


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, the special tokens of SDAR's tokenizer and the names of the roles: 263 tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"])
    core.add_tokens([AddedToken(name, normalized=False) for name in ("system", "user", "assistant")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        mask_token="<|MASK|>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny(folder: str | Path, seed: int = 0, **changes) -> Path:
    """Write a small random SDAR checkpoint (0.8 M parameters) with a byte-level tokenizer.

    Args:
        changes: fields of config.json to set otherwise, e.g. hidden_size=64 or block_size=8.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # the class name that transformers 4 knows as well
    known = settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
    settings.write_text(known)
    config = {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "attention_bias": False,
        "block_size": 4,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "hidden_act": "silu",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": 0.05,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 264,
    } | changes
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model_class = SDARMoeForCausalLM if config["model_type"] == "sdar_moe" else SDARForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(AutoConfig.from_pretrained(folder))
    save(model, folder, folder)
    return folder


# ----------------------------------- speed and memory: the same results, read it last


class ScoreRows(torch.autograd.Function):
    """score_logits(hidden @ weight.T) without top-k and top-p, in chunks of rows, gradient written out.

    Autograd would keep several copies [rows, V] in float32 for the backward pass, and hold two
    gradients [V, hidden] of the weight. Here only [M] vectors are kept; backward computes the logits
    of a chunk again. With p = softmax(logits / T), h the mass of the held draws, l the log-probability:

        reveal v   d l / d logits = (onehot(v) - p) / T
        hold       d l / d logits = (p [p < bound] / h - p) / T

    Chunks are of one size, so that both passes run the same kernels and p < bound falls the same way.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, targets, bounds, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [M, H], weight [V, H], targets and bounds [M] -> logprobs [M], entropy [M]."""
        # Bytes of a logit, as measured: it and its gradient where kernels are fused, else float32 copies.
        each = 2 * hidden.element_size() if hidden.is_cuda else 10
        chunks = -(-len(hidden) * len(weight) * each // SCORING_BYTES)
        ctx.rows, ctx.temperature = -(-len(hidden) // chunks), temperature
        held = targets == HOLD
        bounds = torch.where(held, bounds, 0) if held.any() else None  # no draw of a reveal is held
        score = _compiled(_score_chunk) if hidden.is_cuda else _score_chunk
        scored = []
        for at in _chunks(len(hidden), ctx.rows):
            hold = None if bounds is None else bounds[at]
            scored.append(score(hidden[at] @ weight.T, targets[at], hold, temperature))
        logprobs, entropy, lse = (torch.cat(t) for t in zip(*scored, strict=True))
        ctx.save_for_backward(hidden, weight, targets, bounds, logprobs, lse)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, slope, _):
        """slope [M] is d loss / d logprobs."""
        hidden, weight, targets, bounds, logprobs, lse = ctx.saved_tensors
        slope = torch.where(logprobs > LOG_FLOOR, slope / ctx.temperature, 0)
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        differentiate = _compiled(_score_chunk_gradient) if hidden.is_cuda else _score_chunk_gradient
        for at in _chunks(len(hidden), ctx.rows):
            hold = None if bounds is None else bounds[at]
            gradient = differentiate(
                hidden[at] @ weight.T, hold, logprobs[at], lse[at], slope[at], ctx.temperature
            )  # [rows, V]
            held, target = targets[at, None] == HOLD, targets[at, None].clamp(min=0)
            of_revealed = -(slope * logprobs.expm1())[at, None].to(gradient.dtype)  # slope * (1 - p)
            gradient.scatter_(1, target, torch.where(held, gradient.gather(1, target), of_revealed))
            if hidden_grad is not None:
                torch.mm(gradient, weight, out=hidden_grad[at])
            if weight_grad is not None:
                weight_grad.addmm_(gradient.T, hidden[at])
            del gradient  # before the logits of the next chunk are there
        return hidden_grad, weight_grad, None, None, None


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


@functools.cache
def _compiled(function: Callable) -> Callable:
    """`function` compiled, once per process. Sizes that change from call to call become symbolic."""
    return torch.compile(function)


def _score_chunk(logits, targets, bounds, temperature: float) -> tuple[torch.Tensor, ...]:
    """(log-probability, entropy, log-sum-exp), each [rows], from logits [rows, V]. bounds None: no holds.

    Names are used again and work is done in place: two copies in float32 are the most that is alive.
    """
    logits = _tempered(logits, temperature)
    lse = logits.logsumexp(-1)
    log_p = logits.sub_(lse[:, None])
    logprobs = log_p.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    p = log_p.exp()
    entropy = -log_p.mul_(p).sum(-1)
    if bounds is not None:
        mass = p.masked_fill_(p >= bounds[:, None], 0).sum(-1)
        logprobs = torch.where(targets == HOLD, mass.clamp(min=FLOOR).log(), logprobs)
    return logprobs.clamp(min=LOG_FLOOR), entropy, lse


def _score_chunk_gradient(logits, bounds, logprobs, lse, slope, temperature: float) -> torch.Tensor:
    """slope * d logprobs / d logits but for the revealed tokens, [rows, V] in the logits' dtype.

    slope [rows] has 1 / T in it. Element by element, so that it compiles to one kernel.
    """
    dtype = logits.dtype
    logits = _tempered(logits, temperature)
    p = logits.sub_(lse[:, None]).exp_()
    if bounds is None:
        return p.mul_(-slope[:, None]).to(dtype)
    of_held_draws = slope * ((-logprobs).exp() - 1)
    return p.mul_(torch.where(p < bounds[:, None], of_held_draws[:, None], -slope[:, None])).to(dtype)


def compile_layers(model: BlockDiffusion, **options) -> None:
    """Compile the decoder layers, one for all: norms, rotary and SwiGLU fuse, attention is FlexAttention.

    All layers share one code, so it is compiled for the first length and once more for all lengths; the
    rest of the model stays as it is. Decoding stays eager: there every cache length would be another
    case. Call it after `checkpoint_layers` and before FSDP2's `fully_shard`. `options`: of torch.compile.
    """
    for layer in model.model.layers:
        layer.compile(**options)


# What "selective" keeps: results of matrix products and attention, nearly all of the arithmetic.
KEPT_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}


def _keep(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_layers(model: BlockDiffusion, how: str) -> None:
    """Trade memory for arithmetic in the backward pass through the decoder layers.

    none: keep everything. selective: keep what KEPT_OPS return, compute norms, rotary and SwiGLU again.
    full: keep a layer's input only, compute it again: a third more arithmetic. FlexAttention is seen by
    "selective" where the layers are compiled too; otherwise it is computed again.

    Raises:
        InputError: another word.
    """
    if how not in ("none", "selective", "full"):
        raise InputError(f"checkpointing: expected none, selective or full, got {how}")
    if how == "none":
        return
    options = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
    if how == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep)

    def wrap(forward: Callable) -> Callable:
        def checkpointed(*args, **kwargs):  # a function of this file: torch.compile looks into it
            return checkpoint(forward, *args, **options, **kwargs)

        return checkpointed

    for layer in model.model.layers:
        layer.forward = wrap(layer.forward)


# Tile sizes, warps and stages are left to torch: for bfloat16 and head dimension 128 on Hopper it takes
# 128 x 64 with 8 warps and 3 stages forward, 64 x 128 and 128 x 64 backward (torch 2.13, in
# _inductor/template_heuristics/triton.py). ROWS_GUARANTEED_SAFE must stay off: every row sees itself,
# but not in the first tile that is processed for it, and would become nan there. IS_DIVISIBLE (rows of
# whole tiles: no border checks) is set by FlexRow; with symbolic lengths the compiler cannot see it.
KERNEL_OPTIONS: dict = {}


def _flex(query, key, value, mask, scaling: float, options: dict) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(
        query, key, value, block_mask=mask, scale=scaling, enable_gqa=True, kernel_options=options
    )


@functools.cache
def flex_options(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> dict:
    """KERNEL_OPTIONS on CUDA, with BACKEND="FLASH" where flash-attn's CuTe kernels are installed and right.

    They are experimental, so they are tried first: a small row, forward and backward, against SDPA.
    """
    found = importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute")
    if dtype == torch.float32 or not found:
        return KERNEL_OPTIONS
    flash = KERNEL_OPTIONS | {"BACKEND": "FLASH"}
    rng = np.random.default_rng(0)
    views = [noise(rng.integers(0, 9, n).tolist(), 8, 4, rng, views=2) for n in (36, 128)]
    packed = padded(pack(views, 4, 0, 10**9)[0].to("cuda"))
    shapes = [(1, h, len(packed), dim) for h in (heads, kv_heads, kv_heads)]
    try:
        results = []
        inputs = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
        with torch.enable_grad():
            for row in (FlexRow(packed, flash), DenseRow(packed)):
                out = row.attend(None, *inputs, dim**-0.5)
                results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))
        if error < 0.02:
            return flash
        reason = f"off by {error:.1%}"
    except Exception as caught:  # an experimental backend raises whatever it likes
        reason = f"{type(caught).__name__}: {_first(caught)}"
    print(f"FlexAttention without flash-attn's kernels ({reason})", file=sys.stderr)
    return KERNEL_OPTIONS


if __name__ == "__main__":
    where = tiny(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny")
    size = sum(p.numel() for p in load(str(where)).parameters())
    print(f"wrote {where}: {size:,} parameters, {len(load_tokenizer(str(where)))} tokens")
