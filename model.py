"""SDAR: a Qwen3 decoder that denoises blocks.

The network is transformers' Qwen3 (Qwen3-MoE for the 30B-A3B model) with published SDAR weights; what
makes it SDAR is who sees whom. A token sees every token of its own block of B and of earlier blocks,
and the logits at position i predict the token *at* i (no shift), where a mask token stands for what is
not known yet. Three things are added here:

    score    a packed training pass (masking.py): log-probabilities and entropies of actions
    decode   one forward over some blocks of several sequences against a key/value cache
    load     Hugging Face folders, for inference or for training (plumbing/checkpoint.py reads them)

Attention is one function that asks an object to attend: over a packed row (`FlexRow` on CUDA,
`JointRow` on CPU, `DenseRow` as the plain reference) or over the cache (`CachedBlocks`).

    python model.py runs/tiny    # writes a tiny random SDAR checkpoint with its tokenizer

Sources: SDAR (arXiv 2510.06303), BD3-LM (2503.09573), FlexAttention (2412.05496).
"""

from __future__ import annotations

import argparse
import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

import plumbing.checkpoint as checkpoints
from masking import HOLD, TILE, Packed, block_mask, dense_mask, padded, visible
from plumbing.common import InputError, run_script, tell
from plumbing.config import Parser, folder_name
from plumbing.kernels import (
    ScoreChunks,
    SegmentAttention,
    checkpoint_layers,
    compile_layers,
    dense_attention,
    flex_attention,
    flex_options,
    in_chunks,
    log_normalizer,
)
from plumbing.lora import add_adapters
from plumbing.published import assumed_block_size
from plumbing.ranks import rank_and_world, shard

if TYPE_CHECKING:
    from pathlib import Path

    from plumbing.config import TrainConfig

LOG_FLOOR = -20.7  # log(1e-9): no action is scored as less likely, so no ratio is infinite
FLOOR = math.exp(LOG_FLOOR)
LOGITS_KEPT = 2**24  # logits that plain autograd may hold at once: about 0.4 GiB with its copies


# -------------------------------------------------------------------- log-probabilities of actions


@dataclass
class Sampling:
    """How tokens are drawn from logits. Rollout and training must agree on it."""

    temperature: float = 1.0
    top_k: int = 0  # 0: off; 1: greedy
    top_p: float = 1.0
    threshold: float = 0.9  # rule "dynamic": confidence that is enough to reveal
    dither: float = 0.0  # dynamic: every position and step draws its threshold, up to so much lower

    def reach(self, log_p: torch.Tensor) -> torch.Tensor:
        """F(p): the probability that a draw of confidence p reaches its threshold, where that is dithered."""
        return ((log_p.exp() - (self.threshold - self.dither)) / self.dither).clamp(0, 1)


@dataclass
class Scores:
    """Log-probabilities and entropies of M actions."""

    logprobs: torch.Tensor  # [M] log-probability of the action: reveal this token, or hold
    entropy: torch.Tensor  # [M] of the distribution sampled from, in nats; a metric, without gradient


def sampling_logprobs(logits: torch.Tensor, how: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """(log p, log g), each [..., V], from logits [..., V]; float32, or float64 if the logits are.

    p is the softmax over the whole vocabulary after temperature: confidences come from it, so it does not
    saturate (`kernels.log_normalizer`).
    g is p after top-k, then top-p, renormalised: tokens are drawn from it. Same order and the same
    comparisons as LMDeploy 0.18.0 (pytorch/engine/logits_process.py).
    """
    # First p. The logits are the largest tensor here, so they are copied only if they must be.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits if how.temperature == 1.0 else logits / how.temperature
    shifted = logits - logits.amax(-1, keepdim=True)
    log_p = shifted - log_normalizer(shifted.exp())
    if how.top_k == 0 and how.top_p == 1.0:
        return log_p, log_p

    # Then g, from the probabilities in descending order. top-p looks at the mass *before* a token: of
    # 0.6 0.3 0.1 top_p=0.5 keeps the first only, which is kept in any case.
    ranked, order = log_p.detach().sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if how.top_k:
        keep[..., how.top_k :] = False
    if how.top_p < 1.0:
        share = ranked.masked_fill(~keep, -torch.inf).softmax(-1)
        keep &= share.cumsum(-1) - share <= how.top_p
        keep[..., 0] = True
    dropped = torch.ones_like(keep).scatter(-1, order, ~keep)
    return log_p, F.log_softmax(log_p.masked_fill(dropped, -torch.inf), dim=-1)


def score_logits(logits: torch.Tensor, targets: torch.Tensor, bounds: torch.Tensor, how: Sampling) -> Scores:
    """Log-probability of each action and entropy, from logits [M, V].

    A reveal of v has log g(v). A hold (target HOLD) has the log of the mass of all draws that the rule would
    have held, sum of g(v) over v with log p(v) < bound. Only if holds are scored too do the probabilities of
    all trajectories sum to 1 (derived here; tests/test_likelihood.py enumerates them). After an update no
    draw may be left below the bound: then it is LOG_FLOOR, without gradient.

    Args:
        targets: [M] token ids or HOLD.
        bounds: [M] float32, of holds, see `rollout.hold_bound`; elsewhere not looked at.
    """
    log_p, log_g = sampling_logprobs(logits, how)
    logprobs = log_g.gather(-1, targets.clamp(min=0)[:, None])[:, 0]  # HOLD is -1: replaced below
    g = log_g.exp()
    held = targets == HOLD
    if how.dither:
        confidence = log_p.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
        logprobs = logprobs + log_reached(confidence, bounds, how)
    if held.any():
        mass = torch.where(log_p.float() < bounds[:, None], held_draws(log_p, g, how), 0).sum(-1)
        logprobs = torch.where(held, mass.clamp(min=FLOOR).log(), logprobs)
    entropy = torch.special.entr(g.detach()).sum(-1)
    return Scores(logprobs.clamp(min=LOG_FLOOR), entropy)


def held_draws(log_p: torch.Tensor, g: torch.Tensor, how: Sampling) -> torch.Tensor:
    """[..., V]: the probability that a token is drawn and, if thresholds are dithered, misses its own."""
    return g * (1 - how.reach(log_p)) if how.dither else g


def log_reached(log_p: torch.Tensor, bounds: torch.Tensor, how: Sampling) -> torch.Tensor:
    """Of a revealed draw with dithered thresholds: log-probability that it did, or did not, reach its own.

    Args:
        log_p: [M] its confidence.
        bounds: [M] of its step. The upper threshold or more: it was reached; less: nothing reached its
            own, and this draw was the most confident one; infinity: the only masked position, which is
            revealed in any case.
    """
    reached = how.reach(log_p)
    forced = bounds < math.log(how.threshold)
    chance = torch.where(forced, 1 - reached, reached).clamp(min=FLOOR).log()
    return torch.where(bounds == torch.inf, 0.0, chance)


# ------------------------------------------------------------------------ the network


class SDARConfig(Qwen3Config):
    """Qwen3's configuration under the published model type."""

    model_type = "sdar"


class SDARMoeConfig(Qwen3MoeConfig):
    """Qwen3-MoE's configuration under the published model type."""

    model_type = "sdar_moe"


class BlockDiffusion:
    """What SDAR adds to a Qwen3 language model: `score` for training, `prefill` and `decode` for rollouts."""

    def score(self, packed: Packed, how: Sampling, backend: str = "auto") -> Scores:
        """Score the actions of a packed row in one forward pass, gradient included.

        Args:
            backend: of the attention, see `attention_over`.
        """
        # How the row attends. On CUDA it has whole tiles, and takes the kernels that prove right there.
        packed = padded(packed) if packed.ids.is_cuda else packed
        attention = attention_over(packed, backend)
        if isinstance(attention, FlexRow) and packed.ids.is_cuda:
            c = self.config
            heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
            attention.options |= flex_options(self.lm_head.weight.dtype, *heads)

        # The decoder.
        hidden = self.model(
            input_ids=packed.ids[None],
            position_ids=packed.positions[None],
            use_cache=False,
            attention=attention,
        ).last_hidden_state[0]  # [N, hidden]

        # Only what is scored goes through the LM head.
        scored = hidden.index_select(0, packed.scored)  # [M, hidden]
        return self.score_hidden(scored, packed.targets, packed.bounds, how)

    def score_hidden(self, hidden, targets: torch.Tensor, bounds: torch.Tensor, how: Sampling) -> Scores:
        """Scores of M actions from their final hidden states [M, hidden].

        The logits of many actions are never held all at once: chunk by chunk goes through the LM head,
        and is computed again in the backward pass.
        """
        # Few: plainly.
        num_logits = len(hidden) * self.config.vocab_size
        if num_logits <= LOGITS_KEPT:
            return score_logits(self.lm_head(hidden), targets, bounds, how)

        # Many, drawn from the whole softmax: with the gradient written out, which is the fastest.
        plain = how.top_k == 0 and how.top_p == 1.0 and not how.dither
        if plain and type(self.lm_head) is torch.nn.Linear:
            weight = self.lm_head.weight
            return Scores(*ScoreChunks.apply(hidden, weight, targets, bounds, how.temperature, LOG_FLOOR))

        # Many, after top-k or top-p, or with an adapter on the LM head: by autograd.
        def score_chunk(hidden, targets, bounds) -> tuple[torch.Tensor, torch.Tensor]:
            scores = score_logits(self.lm_head(hidden), targets, bounds, how)
            return scores.logprobs, scores.entropy

        chunks = math.ceil(num_logits / LOGITS_KEPT)
        return Scores(*in_chunks(score_chunk, [hidden, targets, bounds], chunks))

    def prefill(
        self, ids: torch.Tensor, positions: torch.Tensor, cache: BlockCache, slots: torch.Tensor
    ) -> torch.Tensor:
        """Final hidden states [S, T, hidden] of T neighbouring tokens (whole blocks) of S sequences.

        Their keys and values are written to the cache at their positions, replacing what an earlier
        step of the same block left there; so a last forward over the finished block leaves it clean.
        """
        attention = CachedBlocks(cache, slots, positions)
        # Layers may be compiled, for `score`. Here every cache length would compile them anew.
        compiled = self.model.layers[0]._compiled_call_impl is not None
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            out = self.model(input_ids=ids, position_ids=positions, use_cache=False, attention=attention)
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
        # By itself transformers searches this file for the experts' code, finds none, and would compute
        # one expert after the other instead of all in one grouped product.
        return True


def attend(module, query, key, value, attention_mask, scaling, attention, **_):
    """transformers' attention hook: query [S, H, T, D], key and value [S, KV, T, D] -> [S, T, H, D], None."""
    return attention.attend(module, query, key, value, scaling), None


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
        return dense_attention(q, k, v, self.mask, scaling).transpose(1, 2)


class FlexRow:
    """FlexAttention over tiles; compiled on CUDA. (On CPU it has no backward pass in torch 2.13.)"""

    def __init__(self, packed: Packed, options: dict | None = None):
        self.mask = block_mask(packed)
        self.options = (options or {}) | {"IS_DIVISIBLE": len(packed) % TILE == 0}

    def attend(self, module, q, k, v, scaling: float) -> torch.Tensor:
        return flex_attention(q, k, v, self.mask, scaling, self.options).transpose(1, 2)


class JointRow:
    """Exact attention for CPUs without N x N logits, of which those between views are nearly all masked.

    Every segment of B neighbours (a block of the clean copy, or a view) sees itself and the clean tokens
    of earlier blocks: one softmax over L + B keys (kernels.SegmentAttention).
    """

    def __init__(self, packed: Packed):
        self.attention = SegmentAttention(packed.sequence, packed.block, packed.view == 0, packed.block_size)

    def attend(self, module, q, k, v, scaling: float) -> torch.Tensor:
        return self.attention(q, k, v, scaling)


class BlockCache:
    """Keys and values of `slots` sequences of at most `max_tokens` tokens."""

    def __init__(self, model: BlockDiffusion, slots: int, max_tokens: int, block_size: int):
        c = model.config
        shape = (c.num_hidden_layers, 2, slots, max_tokens, c.num_key_value_heads, c.head_dim)
        self.keys_values = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.block_size = block_size


@dataclass
class CachedBlocks:
    """Attention of T neighbouring tokens of S sequences over the cache, to their own and earlier blocks."""

    cache: BlockCache
    slots: torch.Tensor  # [S] the slot of each sequence
    positions: torch.Tensor  # [S, T]

    def __post_init__(self):
        self.length = int(self.positions.max()) + 1
        kv_block = torch.arange(self.length, device=self.slots.device) // self.cache.block_size
        q_block = self.positions[:, :, None] // self.cache.block_size
        clean = {"q_sequence": 0, "kv_sequence": 0, "q_view": 0, "kv_view": torch.zeros_like(kv_block)}
        self.mask = visible(q_block=q_block, kv_block=kv_block, **clean)  # [S, T, length]

    def attend(self, module, q, k, v, scaling: float) -> torch.Tensor:
        # Write the new keys and values, then read all that there are.
        s, heads, t, dim = q.shape
        cached = self.cache.keys_values[module.layer_idx]  # [2, slots, max_tokens, KV, D]
        cached[0, self.slots[:, None], self.positions] = k.transpose(1, 2)
        cached[1, self.slots[:, None], self.positions] = v.transpose(1, 2)
        k, v = cached[:, self.slots, : self.length].transpose(2, 3)  # [S, KV, length, D] each
        ratio = heads // k.shape[1]  # heads that share a key head become further queries
        mask = self.mask[:, None].repeat(1, 1, ratio, 1)
        q = q.reshape(s, k.shape[1], ratio * t, dim)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
        return out.view(s, heads, t, dim).transpose(1, 2)


# ----------------------------------------------------------------------------- loading


def load(name: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> BlockDiffusion:
    """An SDAR model from a checkpoint folder or a hub id.

    Raises:
        InputError: no folder, no config, not an SDAR model, missing or damaged weights.
    """
    return checkpoints.load(name, dtype, device)


def load_for_training(name: str | Path, device: torch.device, config: TrainConfig) -> BlockDiffusion:
    """A checkpoint's model in float32, sharded over the ranks: with several, none ever holds all of it.

    With LoRA the frozen weights are in config.dtype, and nothing is sharded.

    Raises:
        InputError: as `load`; LoRA on several ranks.
    """
    world = rank_and_world()[1]
    if config.lora_rank and world > 1:
        raise InputError("config key lora_rank: LoRA is for one process; several shard the whole model")

    # One process loads the weights here; several build the model without memory, and fill it below.
    weights_on = "cpu" if config.cpu_offload else device  # FSDP2 brings what is needed to the device
    if config.lora_rank:
        model = load(name, getattr(torch, config.dtype), device)
        add_adapters(model, config.lora_rank, config.seed)
    else:
        model = load(name, torch.float32, weights_on) if world == 1 else checkpoints.on_meta(name)

    # Layers are wrapped from the inside out: checkpointing, compilation, FSDP2.
    checkpoint_layers(model, config.checkpointing)
    if config.compile:
        compile_layers(model)
    if not config.lora_rank:
        shard(model, config.dtype, config.cpu_offload)
        if world > 1:  # now every rank reads its own slices of the weights
            checkpoints.fill(model, name, device, weights_on)
    return model.train()


def choose_block_size(wanted: int, model_config: Any) -> int:
    """The block size to use: the wanted one, or config.json's; if it has none, see plumbing/published.py.

    Raises:
        InputError: both are given and differ, or there is none and the checkpoint's name suggests one.
    """
    trained = getattr(model_config, "block_size", None)
    if wanted and trained and wanted != trained:
        raise InputError(f"config key block_size: {wanted}, but the checkpoint has {trained}")
    if wanted or trained:
        return wanted or trained
    folder = getattr(model_config, "_name_or_path", "")
    size, reason = assumed_block_size(folder)
    if rank_and_world()[0] == 0:
        tell(f"{folder or 'model'}: no block_size in config.json, blocks of {size} tokens ({reason})")
    return size


def main() -> None:
    """Write a tiny checkpoint."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=folder_name, default="runs/tiny", help="where to write it")
    folder = checkpoints.tiny(parser.parse_args().folder)
    size = sum(p.numel() for p in load(folder).parameters())
    tokens = len(checkpoints.load_tokenizer(folder))
    print(f"wrote {folder}: {size:,} parameters, {tokens} tokens")


if __name__ == "__main__":
    run_script(main)
