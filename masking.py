"""The packed layout: one clean pass plus only the views that happened.

A block-diffusion model decides the tokens of a block over several denoising steps. To score those
decisions exactly, each must be seen as the decoder saw it: the block with the tokens of earlier
steps known and the rest masked, over the *clean* earlier blocks. BD3-LM and DiRL run the network up to B
times on [noisy | clean], 2L tokens each: in pass k every block stands as it was before its k-th step.
Here every sequence is laid out once:

    clean copy   all L tokens                                                            view 0
    views        B tokens per (block, step) that happened, still-unknown tokens masked   view 1, 2, ...

with the absolute positions of the originals. Who sees whom is one rule, `visible`:

    clean q sees clean kv       iff same sequence and block(kv) <= block(q)
    view  q sees clean kv       iff same sequence and block(kv) <  block(q)
    view  q sees kv of a view   iff it is the same view
    nothing else

A trajectory costs L + R * B / TPF tokens instead of B * 2L (R response tokens, TPF tokens per
forward). The same layout serves SFT, where the views are drawn by noise instead of by a step map.

    python masking.py            # plots a small example to masking.png

Sources: BD3-LM (arXiv 2503.09573) for block diffusion and its noise, DiRL (2512.22234) and TraceRL
(2509.06949) for replaying step maps, FlexAttention (2412.05496) for BlockMask.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from plumbing import figures
from plumbing.balance import plan_packs
from plumbing.common import run_script
from plumbing.config import Parser, picture_name
from plumbing.kernels import tiles_of_ranges

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TILE = 128  # queries and keys of a FlexAttention tile
HOLD = -1  # the target where the action was to hold: keep the mask, throw the draw away


# ----------------------------------------------------------------------- the row and its rule


@dataclass
class Packed:
    """Sequences in one row of N tokens, and the M positions in it to score.

    Every sequence is its clean copy followed by its views in block order, so the row falls into
    segments of `block_size` neighbours that see each other: a clean block or a view. N is a multiple of
    `block_size`.
    """

    ids: torch.Tensor  # [N] token ids, mask id where a view does not know the token yet
    positions: torch.Tensor  # [N] position in the original sequence
    sequence: torch.Tensor  # [N] which sequence of this row
    block: torch.Tensor  # [N] positions // block_size
    view: torch.Tensor  # [N] 0 = clean copy, otherwise unique in the row
    scored: torch.Tensor  # [M] index into N of the positions that the LM head scores
    targets: torch.Tensor  # [M] the token revealed there, or HOLD
    bounds: torch.Tensor  # [M] a hold: draws whose log p is below this were thrown away
    weights: torch.Tensor  # [M] weight of the action in the loss
    advantages: torch.Tensor  # [M] advantage of the action (DiPO)
    source: torch.Tensor  # [M] index of the sequence in the list given to `pack`
    engine_logprobs: torch.Tensor  # [M] of the action by the rollout engine; nan: it recorded none
    ages: torch.Tensor  # [M] of the action's policy, in updates: 0, or more where a rollout spans steps
    block_size: int

    def to(self, device: torch.device | str) -> Packed:
        """The same row with every tensor on `device`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in fields.items()}
        return Packed(**moved)

    def __len__(self) -> int:
        return len(self.ids)


def visible(q_sequence, q_block, q_view, kv_sequence, kv_block, kv_view):
    """The visibility rule of the module docstring, for ints or integer tensors.

    Returns booleans of the shape that its arguments broadcast to: does q see kv?
    """
    clean_kv = (kv_view == 0) & ((kv_block < q_block) | ((kv_block == q_block) & (q_view == 0)))
    same_view = (kv_view == q_view) & (q_view != 0)
    return (q_sequence == kv_sequence) & (clean_kv | same_view)


def dense_mask(packed: Packed) -> torch.Tensor:
    """[N, N] boolean mask, True where query i sees key j at [i, j]. For CPUs and for tests."""
    tags = (packed.sequence, packed.block, packed.view)
    return visible(*(t[:, None] for t in tags), *(t[None, :] for t in tags))


def padded(packed: Packed, multiple: int = TILE) -> Packed:
    """The same row, filled up to a multiple of `multiple` tokens with a sequence of its own.

    Nobody else sees that sequence and nothing of it is scored. FlexAttention then skips its checks of
    the borders.

    Args:
        multiple: of tokens; of the block size too.
    """
    spare = -len(packed) % multiple
    filler = torch.arange(spare, device=packed.ids.device)
    tail = {
        "ids": packed.ids[:1].expand(spare),
        "positions": filler,
        "sequence": packed.sequence[-1:].expand(spare) + 1,
        "block": filler // packed.block_size,
        "view": torch.zeros_like(filler),
    }
    filled = {}
    for name, more in tail.items():
        filled[name] = torch.cat([getattr(packed, name), more])
    return dataclasses.replace(packed, **filled)


def block_mask(packed: Packed, tile: int = TILE) -> BlockMask:
    """FlexAttention's BlockMask, built per tile of `tile` x `tile` without an N x N tensor.

    In a row as `Packed` lays it out, a token sees two ranges of neighbours: clean tokens from the start of
    its sequence on, and its own segment. With ranges the rule for a pair is begin <= j < end, and the ends
    alone say which tiles are empty, full or partial (`kernels.tiles_of_ranges`): O(N + tiles^2) time and
    memory, on the row's device, without waiting for it. Source: FlexAttention (arXiv 2412.05496), section 4.
    """
    n, b, device = len(packed), packed.block_size, packed.ids.device
    index = torch.arange(n, device=device)

    # [N] where a token's sequence begins: sequence 0 0 0 1 1 -> 0 0 0 3 3. (Token 0 is compared with the
    # last one, which does not matter: it begins at 0 either way.)
    new_sequence = packed.sequence != packed.sequence.roll(1)
    begin = torch.where(new_sequence, index, 0).cummax(0).values

    # [N] the end of its clean range. Block 2, b = 4: a view's is at begin + 8, a clean token's, which sees
    # its own block too, at begin + 12. The clamp is for the sequence that `padded` adds.
    end = (begin + (packed.block + (packed.view == 0)) * b).clamp(max=n)

    # [N] its own segment. A clean token has it in the clean range already, and ranges must not overlap.
    own = index // b * b
    own_end = torch.where(packed.view == 0, own, own + b)
    begin32, end32 = begin.to(torch.int32), end.to(torch.int32)

    def mask_mod(batch, head, i, j):
        return ((begin32[i] <= j) & (j < end32[i])) | (i // b == j // b)

    return tiles_of_ranges([(begin, end), (own, own_end)], mask_mod, tile)  # (first, one past the last)


# ------------------------------------------------------------------------ laying out a row


@dataclass
class Views:
    """One sequence with the K views of it that are to be scored. Numpy arrays."""

    ids: np.ndarray  # [L] the clean tokens, L a multiple of the block size
    block: np.ndarray  # [K] which block each view shows, ascending
    masked: np.ndarray  # [K, B] whether the view does not know the token
    is_scored: np.ndarray  # [K, B] whether an action there is scored
    targets: np.ndarray  # [K, B] as in Packed, and so the next five
    bounds: np.ndarray  # [K, B]
    weights: np.ndarray  # [K, B]
    advantages: np.ndarray  # [K, B]
    engine_logprobs: np.ndarray  # [K, B]
    ages: np.ndarray  # [K, B]

    @property
    def num_tokens(self) -> int:
        """Tokens in the packed row: the clean copy and the views."""
        return self.ids.size + self.masked.size


def pack(
    sequences: list[Views],
    block_size: int,
    mask_id: int,
    token_budget: int,
    plan: list[list[int]] | None = None,
) -> list[Packed]:
    """Lay sequences out in rows of at most `token_budget` tokens; a longer sequence gets its own row.

    Args:
        plan: indices into `sequences` for every row, whatever the budget; None: `plan_packs` makes it. A
            list without indices becomes a row of one block that is not scored, for a rank that has to run
            as many rows as the others.
    """
    if plan is None:
        plan = plan_packs([views.num_tokens for views in sequences], token_budget)
    rows = []
    for members in plan:
        numbered = [(index, sequences[index]) for index in members]
        rows.append(_lay_out(numbered or [(0, blank(block_size, mask_id))], block_size, mask_id))
    return rows


def _lay_out(sequences: list[tuple[int, Views]], block_size: int, mask_id: int) -> Packed:
    """One row from (index in the list, views) pairs: clean copy, views, next clean copy, views, ...

    A sequence [a b c d e f] in blocks of 2 with two views of block 2, of which the first knows nothing and
    the second knows e:

        ids         a b c d e f   _ _   e _
        positions   0 1 2 3 4 5   4 5   4 5
        block       0 0 1 1 2 2   2 2   2 2
        view        0 0 0 0 0 0   1 1   2 2
    """
    names = [f.name for f in dataclasses.fields(Packed) if f.name != "block_size"]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    offset, views_so_far = 0, 0
    for in_row, (in_list, views) in enumerate(sequences):
        # What stands where: the clean copy, then block after block as its views show it.
        original = np.arange(views.ids.size)
        of_views = views.block[:, None] * block_size + np.arange(block_size)  # [K, B] positions
        positions = np.concatenate([original, of_views.ravel()])
        noisy = np.where(views.masked, mask_id, views.ids[of_views]).ravel()
        numbers = views_so_far + 1 + np.arange(len(views.block))  # [K]
        parts["ids"].append(np.concatenate([views.ids, noisy]))
        parts["positions"].append(positions)
        parts["sequence"].append(np.full(positions.size, in_row))
        parts["block"].append(positions // block_size)
        parts["view"].append(np.concatenate([np.zeros_like(original), np.repeat(numbers, block_size)]))

        # What is scored of it: views in order, positions from left to right.
        where = np.flatnonzero(views.is_scored)
        parts["scored"].append(offset + original.size + where)
        parts["source"].append(np.full(where.size, in_list))
        for name in ("targets", "bounds", "weights", "advantages", "engine_logprobs", "ages"):
            parts[name].append(getattr(views, name).ravel()[where])
        offset += positions.size
        views_so_far += len(views.block)

    # Four fields are float32, the others int64.
    floats = ("bounds", "weights", "advantages", "engine_logprobs")
    joined = {}
    for name, arrays in parts.items():
        dtype = np.float32 if name in floats else np.int64
        joined[name] = torch.from_numpy(np.concatenate(arrays).astype(dtype))
    return Packed(**joined, block_size=block_size)


# --------------------------------------------------------------------- two sources of views


@dataclass
class Trajectory:
    """How a response came about: its tokens, and at which denoising step each was revealed."""

    prompt_ids: list[int]
    response_ids: list[int]  # [R]; prompt and response together are whole blocks
    steps: list[int]  # [R] the step map: at which denoising step each token was revealed, counted from 1
    # through the whole response, so that no two blocks share a number
    logprobs: list[float]  # [R] the engine's log g of each token at the moment of its reveal
    # What the token was before: for each step of its block at which it held, in order, the log p below which
    # its draw was held, and the engine's log-probability of that. Recorded for the exact likelihood only.
    hold_bounds: list[list[float]] = field(default_factory=list, kw_only=True)
    hold_logprobs: list[list[float]] = field(default_factory=list, kw_only=True)
    # Of each token: how many updates the policy has made since it was drawn. Empty: none.
    ages: list[int] = field(default_factory=list, kw_only=True)


def replay(
    trajectory: Trajectory, block_size: int, weight: float, exact: bool = False, advantage: float | list = 0.0
) -> Views:
    """The views that a decoder saw, one per (block, denoising step) that happened.

    At a step the revealed tokens are scored; with `exact`, so are the masked positions that held:
    every masked position takes one action, reveal or hold. Example, block size 4:

        prompt [5 6], response [7 8 9 1 2 3], steps [1 2 3 3 4 3], mask _
        block 0, step 1: 5 6 _ _   reveals 7, holds one
        block 0, step 2: 5 6 7 _   reveals 8
        block 1, step 3: _ _ _ _   reveals 9 1 3, holds one
        block 1, step 4: 9 1 _ 3   reveals 2

    Args:
        weight: in the loss, the same for every action of the trajectory.
        advantage: likewise, or a list of one per token [R], for all actions at its position.

    Raises:
        ValueError: the trajectory is not whole blocks, or exact and its holds were not recorded.
    """
    prompt = len(trajectory.prompt_ids)
    ids = np.array(trajectory.prompt_ids + trajectory.response_ids)
    if ids.size % block_size:
        raise ValueError(f"a trajectory of {ids.size} tokens is not whole blocks of {block_size}")

    # The record by position; the prompt was revealed at step 0, before everything.
    (steps, ages), (logprobs, advantages) = np.zeros((2, ids.size), int), np.zeros((2, ids.size))
    steps[prompt:], ages[prompt:] = trajectory.steps, trajectory.ages or 0
    logprobs[prompt:] = trajectory.logprobs
    advantages[prompt:] = advantage

    # A view per (block, step) that happened, in order; in the example block 0 0 1 1, step 1 2 3 4. Within
    # their blocks they are number 0 1 0 1.
    blocks = np.arange(prompt, ids.size) // block_size
    block, step = np.unique(np.stack([blocks, steps[prompt:]]), axis=1)  # [K] each
    number = np.arange(len(block)) - np.searchsorted(block, block)

    # In a view, the tokens of its own step and of later ones are masked; the later ones hold.
    at = block[:, None] * block_size + np.arange(block_size)  # [K, B] positions
    masked = steps[at] >= step[:, None]
    revealed = steps[at] == step[:, None]
    engine_logprobs = np.where(revealed, logprobs[at], np.nan)
    bounds = np.zeros(at.shape)
    if exact:
        held = masked & ~revealed
        bounds[held], engine_logprobs[held] = _of_holds(trajectory, at - prompt, number, held)
        bounds = np.where(revealed, _of_reveals(bounds, masked, held), bounds)
    return Views(
        ids=ids,
        block=block,
        masked=masked,
        is_scored=masked if exact else revealed,
        targets=np.where(revealed, ids[at], HOLD),
        bounds=bounds,
        weights=np.full(at.shape, weight),
        advantages=advantages[at],
        engine_logprobs=engine_logprobs,
        ages=ages[at],
    )


def _of_holds(
    trajectory: Trajectory, tokens: np.ndarray, number: np.ndarray, held: np.ndarray
) -> tuple[list[float], list[float]]:
    """Bounds and log-probabilities of the holds of some views: of token [K, B], in view number [K]."""
    if not trajectory.hold_bounds:
        raise ValueError("the holds of a trajectory were not recorded: Decoding(holds=True)")
    numbers = np.broadcast_to(number[:, None], held.shape)
    bounds, logprobs = [], []
    for token, hold in zip(tokens[held].tolist(), numbers[held].tolist(), strict=True):
        bounds.append(trajectory.hold_bounds[token][hold])
        logprobs.append(trajectory.hold_logprobs[token][hold])
    return bounds, logprobs


def _of_reveals(bounds: np.ndarray, masked: np.ndarray, held: np.ndarray) -> np.ndarray:
    """[K, 1] the bound of a view's reveals, which dithered thresholds look at, from three of [K, B].

    It is that of its holds; 0, if nothing held; infinity, if only one position was masked.
    """
    of_view = np.where(held, bounds, np.inf).min(-1, keepdims=True)
    of_view[~held.any(-1)] = 0.0
    of_view[masked.sum(-1) == 1] = np.inf
    return of_view


def noise(
    ids: list[int],
    prompt_tokens: int,
    block_size: int,
    rng: np.random.Generator,
    per: str = "sequence",
    views: int = 1,
    complementary: bool = False,
    t_min: float = 0.02,
    t_max: float = 0.0,
) -> Views:
    """Views of a training sequence drawn by random masking, weighted by 1/t.

    Draw t ~ U(t_min, t_max), per sequence (DiRL) or per block (BD3-LM, eq. 8), and mask each
    response token with probability t; its cross-entropy counts 1/t. `complementary` draws views in
    pairs: the second masks what the first did not, at 1 - t, so that each token is scored once per
    pair. A block in which nothing was masked makes no view. Weights are divided by `views`, not yet
    by the number of response tokens: that normaliser is the batch's.

    Args:
        ids: prompt and response, whole blocks (a multiple of block_size).
        prompt_tokens: how many of them are the prompt, never masked.
        per: what shares one t, "sequence" or "block".
        views: how many noised copies of each block; even if complementary.
        t_max: 0: 1 - t_min; complementary needs that.
    """
    # Masks and their rates, one of each per noised copy of the sequence: [blocks, B].
    num_blocks = len(ids) // block_size
    tokens = np.array(ids).reshape(num_blocks, block_size)
    response = (np.arange(len(ids)) >= prompt_tokens).reshape(num_blocks, block_size)
    masks, rates = [], []
    for _ in range(views // 2 if complementary else views):
        t = rng.uniform(t_min, t_max or 1 - t_min, size=(num_blocks, 1) if per == "block" else (1, 1))
        mask = (rng.random(tokens.shape) < t) & response
        rate = np.broadcast_to(t, tokens.shape)
        masks.append(mask)
        rates.append(rate)
        if complementary:
            masks.append(response & ~mask)
            rates.append(1 - rate)

    # The copies of a block become its views, if anything in them is masked.
    masked = np.stack(masks, 1)  # [blocks, views, B]
    rate = np.stack(rates, 1)
    happened = masked.any(-1)
    block = np.nonzero(happened)[0]  # [K]
    return _given_text(tokens, block, masked[happened], 1 / (rate[happened] * views))


def all_masked(ids: list[int], prompt_tokens: int, block_size: int) -> Views:
    """Views of all response tokens, each block in one that knows none of its own; every token counts 1.

    Args:
        ids: prompt and response, whole blocks.
        prompt_tokens: how many of them are the prompt, which is known.
    """
    tokens = np.array(ids).reshape(-1, block_size)
    masked = (np.arange(len(ids)) >= prompt_tokens).reshape(-1, block_size)
    block = np.flatnonzero(masked.any(-1))
    return _given_text(tokens, block, masked[block], np.ones((len(block), block_size)))


def _given_text(tokens: np.ndarray, block: np.ndarray, masked: np.ndarray, weights: np.ndarray) -> Views:
    """Views of a text that nobody sampled, every masked token of which is to be told: tokens [blocks, B], of
    each view its block [K], masks [K, B] and weights [K, B]."""
    return Views(
        ids=tokens.ravel(),
        block=block,
        masked=masked,
        is_scored=masked,
        targets=tokens[block],
        bounds=np.zeros(masked.shape),
        weights=weights,
        advantages=np.zeros(masked.shape),
        engine_logprobs=np.full(masked.shape, np.nan),
        ages=np.zeros(masked.shape, int),
    )


def blank(block_size: int, mask_id: int) -> Views:
    """One block without a view: it goes through the network, and nothing of it is scored."""
    rollout = Trajectory([mask_id] * block_size, [], [], [])
    return replay(rollout, block_size, weight=0.0)


# ---------------------------------------------------------------------------- the picture


def plot(packed: Packed, labels: list[str], path: str) -> None:
    """Plot who sees whom in a small packed row to a PNG. `labels`: N short token names."""
    # A square per pair, coloured by the line of the rule that makes it visible: 1 clean sees clean,
    # 2 a view sees clean, 3 a view sees itself, 0 none does.
    seen, clean = dense_mask(packed).numpy(), (packed.view == 0).numpy()
    query_is_clean, key_is_clean = clean[:, None], clean[None, :]
    lines = [query_is_clean & key_is_clean, ~query_is_clean & key_is_clean, ~key_is_clean]
    colour = np.select([seen & line for line in lines], [1, 2, 3])
    tags = zip(packed.sequence.tolist(), packed.view.tolist(), packed.block.tolist(), strict=True)
    figures.plot_row(colour, list(tags), labels, packed.scored.tolist(), path)


def main() -> None:
    """Plot two small trajectories in one row."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", nargs="?", type=picture_name, default="masking.png", help="PNG to write")
    path = parser.parse_args().picture
    trajectories = [
        Trajectory([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12], [1, 2, 3, 3, 4, 3], [0.0] * 6),
        Trajectory([1, 2, 3, 4], [5, 6, 7, 8], [1, 1, 1, 1], [0.0] * 4),
    ]
    (row,) = pack([replay(t, 4, weight=1.0) for t in trajectories], 4, mask_id=0, token_budget=99)
    letters = "_abcdefghijkl"  # token 0 is the mask
    names = [letters[i] for i in row.ids.tolist()]
    plot(row, names, path)
    print(f"{len(row)} tokens, {len(row.scored)} positions to score, plotted to {path}")


if __name__ == "__main__":
    run_script(main)
