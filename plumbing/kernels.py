"""Speed and memory: the same results, sooner or in less room. Read it last, or not at all.

ScoreChunks          the LM head and the scores after it, chunk by chunk, gradient written out
compile_layers       decoder layers through torch.compile
checkpoint_layers    activations computed twice instead of kept
SegmentAttention     packed rows on CPUs
flex_attention       FlexAttention, compiled on CUDA; flash-attn's kernels where they are right
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from plumbing.common import InputError, first_line

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

CERTAIN = 1e-30  # the least mass that a sure token leaves to the others
SCORING_BYTES = 2**30  # that ScoreChunks may take for the logits of a chunk and their copies


# -------------------------------------------------------------------- scoring without logits


def tempered(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """logits / temperature, in float32 at least; no copy that is not needed (they are the largest thing).

    Compiled, a copy costs nothing, and the result is never the argument itself: what is then done to it in
    place would be written back (and torch 2.11 for CPUs reads such an argument after it was written to).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    in_place = temperature == 1.0 and not torch.compiler.is_compiling()
    return logits if in_place else logits / temperature


def log_normalizer(shifted_exp: torch.Tensor) -> torch.Tensor:
    """log of the sum [..., 1] over the last dimension of exp(logits - their largest) [..., V].

    A softmax in float32 saturates: from p = 1 - 6e-8 on it is 1, and so is the confidence of every sure
    position. What is left to the others, `rest`, is the sum without the largest term, which is 1; log p of
    the largest is -log1p(rest), which tells sure positions apart down to a rest of CERTAIN. Below that they
    are equal.
    """
    if shifted_exp.is_cuda or shifted_exp.requires_grad or torch.compiler.is_compiling():
        return _rest(shifted_exp).clamp(min=CERTAIN).log1p()
    rest = shifted_exp.sum(-1, keepdim=True) - 1
    sure = rest[..., 0] < 1e-3  # only there the plain sum is not precise enough
    if sure.any():
        rest[sure] = _rest(shifted_exp[sure])
    return rest.clamp_(min=CERTAIN).log1p_()


def _rest(shifted_exp: torch.Tensor) -> torch.Tensor:
    largest = shifted_exp == 1  # one, or several equal ones
    return shifted_exp.masked_fill(largest, 0).sum(-1, keepdim=True) + largest.sum(-1, keepdim=True) - 1


class ScoreChunks(torch.autograd.Function):
    """Log-probabilities of tokens and of sets of them from hidden @ weight.T, chunk by chunk.

    Autograd would keep several copies [M, V] in float32 for the backward pass, and hold two
    gradients [V, hidden] of the weight. Here only [M] vectors are kept; backward computes the logits
    of a chunk again. With p = softmax(logits / T), h the mass of the held draws, l the log-probability:

        reveal v   d l / d logits = (onehot(v) - p) / T
        hold       d l / d logits = (p [log p < bound] / h - p) / T

    Both passes cut the same chunks, so that they run the same kernels and log p < bound falls the same way.
    The head's gradient is summed over chunks in its own dtype: of 25 chunks in bfloat16 it is 0.6 % off, as
    one product 0.2 % (CPU, 4,096 x 512 logits), where a whole pass in bfloat16 is 1 to 4 % off. A sum in
    float32 would take 4 bytes more per weight when memory is scarcest.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, targets, bounds, temperature: float, log_floor: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [M, H], weight [V, H], targets and bounds [M] -> logprobs [M], entropy [M].

        A target is a token, or negative: then the action was to hold one of the draws with log p < bound.
        No log-probability is below log_floor.
        """
        # Bytes of a logit, as measured: it and its gradient where kernels are fused, else float32 copies.
        each = 2 * hidden.element_size() if hidden.is_cuda else 10
        ctx.chunks = -(-len(hidden) * len(weight) * each // SCORING_BYTES)
        ctx.temperature, ctx.log_floor = temperature, log_floor

        # A reveal holds no draw. Whether there are any holds is not asked on CUDA: the answer would have to
        # be waited for, and comparing costs nothing in a fused kernel.
        held = targets < 0
        bounds = torch.where(held, bounds, -torch.inf)
        bounds = bounds if hidden.is_cuda or held.any() else None

        score = _fused(_score_chunk, hidden)
        scored = []
        for at in _slices(len(hidden), ctx.chunks):
            target, hold = _cut(targets, at), _cut(bounds, at)
            scored.append(score(hidden[at] @ weight.T, target, hold, temperature, log_floor))
        logprobs, entropy, best, norm = (torch.cat(t) for t in zip(*scored, strict=True))
        ctx.save_for_backward(hidden, weight, targets, bounds, logprobs, best, norm)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, slope, _):
        """slope [M] is d loss / d logprobs."""
        hidden, weight, targets, bounds, logprobs, best, norm = ctx.saved_tensors
        slope = torch.where(logprobs > ctx.log_floor, slope / ctx.temperature, 0)
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        differentiate = _fused(_score_chunk_gradient, hidden)
        for at in _slices(len(hidden), ctx.chunks):
            hold, normalizer = _cut(bounds, at), (_cut(best, at), _cut(norm, at))
            gradient = differentiate(
                hidden[at] @ weight.T, hold, _cut(logprobs, at), normalizer, _cut(slope, at), ctx.temperature
            )  # [size, V]
            held, target = targets[at, None] < 0, targets[at, None].clamp(min=0)
            of_revealed = -(slope * logprobs.expm1())[at, None].to(gradient.dtype)  # slope * (1 - p)
            gradient.scatter_(1, target, torch.where(held, gradient.gather(1, target), of_revealed))
            if hidden_grad is not None:
                torch.mm(gradient, weight, out=hidden_grad[at])
            if weight_grad is not None:
                weight_grad.addmm_(gradient.T, hidden[at])
            del gradient  # before the logits of the next chunk are there
        return hidden_grad, weight_grad, None, None, None, None


def in_chunks(function: Callable, tensors: list[torch.Tensor], chunks: int) -> tuple[torch.Tensor, ...]:
    """What function(*tensors) returns, computed for so many chunks of the first dimension, one by one.

    Nothing inside is kept for the backward pass, which computes each chunk again.
    """
    results = []
    split = [t.tensor_split(chunks) for t in tensors]
    for part in zip(*split, strict=True):
        results.append(checkpoint(function, *part, use_reentrant=False))
    return tuple(torch.cat(t) for t in zip(*results, strict=True))


def _slices(length: int, chunks: int) -> list[slice]:
    """Of sizes that differ by one at most: a last chunk of a single row would be a case of its own."""
    edges = [length * i // chunks for i in range(chunks + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(edges)]


def _cut(tensor: torch.Tensor | None, at: slice) -> torch.Tensor | None:
    """A copy of a slice: torch.compile has other graphs for tensors that begin inside another one."""
    return None if tensor is None else tensor[at].clone()


def _fused(function: Callable, tensor: torch.Tensor) -> Callable:
    """`function`, compiled if it is for tensors on CUDA: once for the first size, once more for all sizes."""
    return _compiled(function) if tensor.is_cuda else function


@functools.cache
def _compiled(function: Callable) -> Callable:
    """`function` compiled, once per process. Sizes that change from call to call become symbolic."""
    return torch.compile(function)


def _score_chunk(logits, targets, bounds, temperature: float, log_floor: float) -> tuple[torch.Tensor, ...]:
    """(log-probability, entropy, largest logit, log_normalizer), [size] or [size, 1], from logits [size, V].

    bounds None: no holds. Names are used again and work is done in place: two copies in float32 are the
    most that is alive.
    """
    logits = tempered(logits, temperature)
    best = logits.amax(-1, keepdim=True)
    p = logits.sub_(best).exp()
    norm = log_normalizer(p)
    log_p, p = logits.sub_(norm), p.mul_((-norm).exp())
    logprobs = log_p.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    revealing = None if bounds is None else log_p >= bounds[:, None]
    entropy = -log_p.mul_(p).sum(-1)
    if bounds is not None:
        mass = p.masked_fill_(revealing, 0).sum(-1)
        logprobs = torch.where(targets < 0, mass.clamp(min=math.exp(log_floor)).log(), logprobs)
    return logprobs.clamp(min=log_floor), entropy, best, norm


def _score_chunk_gradient(logits, bounds, logprobs, normalizer, slope, temperature: float) -> torch.Tensor:
    """slope * d logprobs / d logits but for the revealed tokens, [size, V] in the logits' dtype.

    slope [size] has 1 / T in it. Element by element, so that it compiles to one kernel.
    """
    dtype, (best, norm) = logits.dtype, normalizer
    logits = tempered(logits, temperature)
    if bounds is None:
        return logits.sub_(best + norm).exp_().mul_(-slope[:, None]).to(dtype)
    log_p = logits.sub_(best).sub_(norm)
    of_held_draws = slope * ((-logprobs).exp() - 1)
    held = log_p < bounds[:, None]
    return log_p.exp_().mul_(torch.where(held, of_held_draws[:, None], -slope[:, None])).to(dtype)


# ------------------------------------------------------------------------ decoder layers


def compile_layers(model: torch.nn.Module, **options) -> None:
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


def checkpoint_layers(model: torch.nn.Module, mode: str) -> None:
    """Trade memory for arithmetic in the backward pass through the decoder layers.

    none: keep everything. selective: keep what KEPT_OPS return, compute norms, rotary and SwiGLU again.
    full: keep a layer's input only, compute it again: a third more arithmetic. FlexAttention is seen by
    "selective" where the layers are compiled too; otherwise it is computed again.

    Raises:
        InputError: another word.
    """
    if mode not in ("none", "selective", "full"):
        raise InputError(f"checkpointing: expected none, selective or full, got {mode}")
    if mode == "none":
        return

    # Wrap every layer's forward.
    options = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep)

    def wrap(forward: Callable) -> Callable:
        def checkpointed(*args, **kwargs):  # a function of this file: torch.compile looks into it
            return checkpoint(forward, *args, **options, **kwargs)

        return checkpointed

    for layer in model.model.layers:
        layer.forward = wrap(layer.forward)


# --------------------------------------------------------------------------------- attention


def dense_attention(q, k, v, mask: torch.Tensor, scaling: float) -> torch.Tensor:
    """SDPA: q [S, H, T, D], k and v [S, KV, T, D], mask broadcastable to [S, H, T, T] -> [S, H, T, D]."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)


class SegmentAttention:
    """Attention in a row where a query sees its own segment, and the clean tokens of earlier blocks.

    A query meets the L clean keys of its sequence and the B keys of its segment, under one softmax: no
    [N, N] logits. Sequences are padded to the longest of the row.

    Args:
        sequence, block, clean: [N] numbers of the sequence and of the block, and whether it is a clean
            token; in every sequence the clean ones come first, in order.
        segment: B neighbours are a segment.
    """

    def __init__(self, sequence: torch.Tensor, block: torch.Tensor, clean: torch.Tensor, segment: int):
        # The row [N] as a grid [S, T] of its S sequences, each filled up to the longest; and back again.
        length = torch.bincount(sequence)  # [S] tokens of each sequence, all included
        self.num_keys = int(torch.bincount(sequence[clean]).max())  # L
        self.segment, self.shape = segment, (len(length), int(length.max()))  # B, (S, T)
        start = length.cumsum(0) - length  # [S] where each begins: lengths 5 3 -> 0 5
        inside = torch.arange(self.shape[1], device=length.device)  # [T]
        valid = inside < length[:, None]  # [S, T]
        grid = torch.where(valid, start[:, None] + inside, 0)  # [S, T] indices into N
        self.to_grid = grid.flatten()
        self.from_grid = valid.flatten().nonzero()[:, 0]  # [N] indices into S * T
        self.has_padding = len(self.from_grid) != len(self.to_grid)

        # [S, T, L] which of the first L tokens a query sees beside its own segment. (In a sequence shorter
        # than the longest these L hold others than clean tokens as well, which are no keys here.)
        q_block, kv_block = block[grid][:, :, None], block[grid][:, None, : self.num_keys]
        is_key = (clean[grid] & valid)[:, None, : self.num_keys]
        seen = is_key & (kv_block < q_block)
        self.bias = torch.zeros(seen.shape, device=length.device).masked_fill_(~seen, -torch.inf)

    def _split(self, t: torch.Tensor) -> torch.Tensor:
        """[1, H, N, D] -> [S, H, T, D]."""
        t = t[0].transpose(0, 1)  # [N, H, D]
        t = t.index_select(0, self.to_grid) if self.has_padding else t  # [S * T, H, D]
        return t.view(*self.shape, *t.shape[1:]).transpose(1, 2)

    def __call__(self, q, k, v, scaling: float) -> torch.Tensor:
        """q [1, H, N, D], k and v [1, KV, N, D] -> [1, N, H, D]."""
        heads, kv_heads, dim = q.shape[1], k.shape[1], q.shape[3]
        (s, t), b, keys = self.shape, self.segment, self.num_keys

        # Logits against the clean keys; the R heads that share a key head come one after the other.
        q, k, v = self._split(q * scaling), self._split(k), self._split(v)  # [S, H or KV, T, D]
        q = q.reshape(s, kv_heads, -1, dim)  # [S, KV, R T, D]
        bias = self.bias[:, None, None].to(q.dtype)  # [S, 1, 1, T, L]
        clean = (q @ k[:, :, :keys].transpose(2, 3)).view(s, kv_heads, -1, t, keys) + bias  # [S, KV, R, T, L]

        # Logits against the own segment, which is never empty: no softmax is over -inf alone.
        q_segments = q.view(s, kv_heads, -1, t // b, b, dim)  # [S, KV, R, T / B, B, D]
        k_segments, v_segments = (x.reshape(s, kv_heads, 1, t // b, b, dim) for x in (k, v))
        own = (q_segments @ k_segments.transpose(-1, -2)).view(s, kv_heads, -1, t, b)  # [S, KV, R, T, B]

        # One softmax over both, and the values that it weights.
        weights = torch.cat([clean, own], dim=-1).softmax(-1, dtype=torch.float32).to(v.dtype)
        w_clean, w_own = weights.split([keys, b], dim=-1)
        out = w_clean.reshape(s, kv_heads, -1, keys) @ v[:, :, :keys]  # [S, KV, R T, D]
        own_out = w_own.reshape(s, kv_heads, -1, t // b, b, b) @ v_segments  # [S, KV, R, T / B, B, D]
        out = out.view(s, heads, t, dim) + own_out.view(s, heads, t, dim)

        # Back to the row.
        out = out.transpose(1, 2).reshape(s * t, heads, dim)
        return (out.index_select(0, self.from_grid) if self.has_padding else out)[None]


def tiles_of_ranges(
    ranges: list[tuple[torch.Tensor, torch.Tensor]], mask_mod: Callable, tile: int
) -> BlockMask:
    """FlexAttention's BlockMask where every query sees some ranges of keys that do not overlap.

    Per tile of queries, how many of its tokens have some of a tile of keys in a range, and how many have
    all of it, are sums over where ranges begin and end: no N x N tensor, exact, on the ranges' device.

    Args:
        ranges: (first, one past the last), each [N] by query.
        mask_mod: the same rule for single tokens, as FlexAttention calls it.
    """
    from torch.nn.attention.flex_attention import BlockMask

    n, device = len(ranges[0][0]), ranges[0][0].device
    num_tiles = -(-n // tile)
    index = torch.arange(n, device=device)

    def count(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """[tiles, tiles]: how many tokens of a query tile have the key tile in [first, last)."""
        edges = torch.zeros(num_tiles * (num_tiles + 1), dtype=torch.int32, device=device)
        line, one = index // tile * (num_tiles + 1), torch.ones_like(index, dtype=torch.int32)
        edges.index_add_(0, line + first, one)
        edges.index_add_(0, line + torch.maximum(first, last), -one)
        return edges.view(num_tiles, -1).cumsum(1, dtype=torch.int32)[:, :-1]

    def up(t: torch.Tensor) -> torch.Tensor:
        return (t + tile - 1) // tile

    # Tiles that some range touches, and those that are covered for every token.
    touched = sum(count(start // tile, torch.where(end > start, up(end), 0)) for start, end in ranges)
    covered = sum(count(up(start), end // tile) for start, end in ranges)
    some, full = touched > 0, covered == tile

    def listed(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(how many, which) key tiles per query tile, as FlexAttention wants them: [1, 1, ...]."""
        count = tiles.sum(-1, dtype=torch.int32)
        order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return count[None, None], order.to(torch.int32)[None, None]

    return BlockMask.from_kv_blocks(
        *listed(some & ~full), *listed(full), BLOCK_SIZE=tile, mask_mod=mask_mod, seq_lengths=(n, n)
    )


# Tile sizes, warps and stages are left to torch: for bfloat16 and head dimension 128 on Hopper it takes
# 128 x 64 with 8 warps and 3 stages forward, 64 x 128 and 128 x 64 backward (torch 2.13, in
# _inductor/template_heuristics/triton.py). ROWS_GUARANTEED_SAFE must stay off: every row sees itself,
# but not in the first tile that is processed for it, and would become nan there. IS_DIVISIBLE (rows of
# whole tiles: no border checks) is set by the caller; with symbolic lengths the compiler cannot see it.
KERNEL_OPTIONS: dict = {}


def flex_attention(q, k, v, mask: BlockMask, scaling: float, options: dict) -> torch.Tensor:
    """FlexAttention, compiled on CUDA: q [S, H, T, D], k and v [S, KV, T, D] -> [S, H, T, D].

    Compiled twice: for the first length, then for all lengths (torch's automatic dynamic shapes).
    """
    if not q.is_cuda:
        return _flex(q, k, v, mask, scaling, {})
    flex = _flex if torch.compiler.is_compiling() else _compiled(_flex)
    return flex(q, k, v, mask, scaling, options)


def _flex(q, k, v, mask, scaling: float, options: dict) -> torch.Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=mask, scale=scaling, enable_gqa=True, kernel_options=options)


def example_masks(device: str, n: int = 512, b: int = 4) -> tuple[BlockMask, torch.Tensor]:
    """Masks of a small row, by tiles and dense [n, n]: two sequences, half of each clean, half views of it.

    Some tiles are empty, some full, some partial.
    """
    index = torch.arange(n, device=device)
    begin = index // (n // 2) * (n // 2)
    inside, length = index - begin, n // 4
    clean = inside < length
    end = begin + torch.where(clean, inside // b + 1, (inside - length) // b) * b
    own = index // b * b

    def mask_mod(batch, head, i, j):
        return ((begin[i] <= j) & (j < end[i])) | (i // b == j // b)

    tiles = tiles_of_ranges([(begin, end), (own, torch.where(clean, own, own + b))], mask_mod, 128)
    return tiles, mask_mod(0, 0, index[:, None], index[None, :])


@functools.cache
def flex_options(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> dict:
    """KERNEL_OPTIONS on CUDA, with BACKEND="FLASH" where flash-attn's CuTe kernels are installed and right.

    They are experimental, so they are tried first: forward and backward on a small row, against SDPA.
    """
    found = importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute")
    if dtype == torch.float32 or not found:
        return KERNEL_OPTIONS
    flash = KERNEL_OPTIONS | {"BACKEND": "FLASH"}

    # The same outputs and gradients as SDPA's, or the reason why not.
    try:
        tiles, dense = example_masks("cuda")
        shapes = [(1, h, len(dense), dim) for h in (heads, kv_heads, kv_heads)]
        inputs = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]
        with torch.enable_grad():
            ours = flex_attention(*inputs, tiles, dim**-0.5, flash | {"IS_DIVISIBLE": True})
            theirs = dense_attention(*inputs, dense, dim**-0.5)
            results = []
            for out in (ours, theirs):
                results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))
        if error < 0.02:
            return flash
        reason = f"off by {error:.1%}"
    except Exception as caught:  # an experimental backend raises whatever it likes
        reason = f"{type(caught).__name__}: {first_line(caught)}"
    print(f"FlexAttention without flash-attn's kernels ({reason})", file=sys.stderr)
    return KERNEL_OPTIONS
