"""The packed layout: one clean pass plus only the views that happened.

A block-diffusion model decides the tokens of a block over several denoising steps. To score those
decisions exactly, each must be seen as the decoder saw it: the block with the tokens of earlier
steps known and the rest masked, over the *clean* earlier blocks. Instead of running the network once
per round on [noisy | clean] (2L tokens each, as BD3-LM and DiRL do), every sequence is laid out once:

    clean copy   all L tokens                                                            view 0
    views        B tokens per (block, step) that happened, still-unknown tokens masked   view 1, 2, ...

with the absolute positions of the originals. Who sees whom is one rule, `visible`:

    clean q sees clean kv       iff same sequence and block(kv) <= block(q)
    view  q sees clean kv       iff same sequence and block(kv) <  block(q)
    view  q sees kv of a view   iff it is the same view
    nothing else

A trajectory costs L + R * B / TPF tokens instead of B * 2L (R response tokens, TPF tokens per
forward). The same layout serves SFT, where the views are drawn by noise instead of by a step map.

    python masking.py            # draws a small example to masking.png

Sources: BD3-LM (arXiv 2503.09573) for block diffusion and its noise, DiRL (2512.22234) and TraceRL
(2509.06949) for replaying step maps, FlexAttention (2412.05496) for BlockMask.
"""

from __future__ import annotations

import dataclasses
import heapq
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from rollout import Rollout

TILE = 128  # queries and keys of a FlexAttention tile
HOLD = -1  # the target of a row whose action was to hold: keep the mask, throw the draw away


class InputError(ValueError):
    """Bad input from the user. Scripts print it as one line and exit with code 2."""


@dataclass
class Packed:
    """Sequences in one row of N tokens, and the M rows (positions in it) to score.

    Every sequence is its clean copy followed by its views in block order, so the row falls into
    groups of `block_size` neighbours that see each other; N is a multiple of `block_size`.
    """

    ids: torch.Tensor  # [N] token ids, mask id where a view does not know the token yet
    positions: torch.Tensor  # [N] position in the original sequence
    sequence: torch.Tensor  # [N] which sequence of this row
    block: torch.Tensor  # [N] positions // block_size
    view: torch.Tensor  # [N] 0 = clean copy, otherwise unique in the row
    rows: torch.Tensor  # [M] index into N of the rows that the LM head scores
    targets: torch.Tensor  # [M] the token revealed there, or HOLD
    bounds: torch.Tensor  # [M] a hold: draws whose probability is below this were thrown away
    weights: torch.Tensor  # [M] weight of the row in the loss
    trajectory: torch.Tensor  # [M] index of the sequence in the list that was packed
    engine_logprobs: torch.Tensor  # [M] log-probability at reveal by the rollout engine, else nan
    block_size: int

    def to(self, device: torch.device | str) -> Packed:
        """The same row with every tensor on `device`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved = {k: v.to(device) if torch.is_tensor(v) else v for k, v in fields.items()}
        return Packed(**moved)

    def __len__(self) -> int:
        return len(self.ids)


def visible(q_sequence, q_block, q_view, kv_sequence, kv_block, kv_view):
    """The visibility rule of the module docstring, for ints or broadcastable integer tensors."""
    clean_kv = (kv_view == 0) & ((kv_block < q_block) | ((kv_block == q_block) & (q_view == 0)))
    same_view = (kv_view == q_view) & (q_view != 0)
    return (q_sequence == kv_sequence) & (clean_kv | same_view)


def dense_mask(packed: Packed) -> torch.Tensor:
    """[N, N] boolean mask, True where row (query) sees column (key). For CPUs and for tests."""
    tags = (packed.sequence, packed.block, packed.view)
    return visible(*(t[:, None] for t in tags), *(t[None, :] for t in tags))


def padded(packed: Packed, multiple: int = TILE) -> Packed:
    """The same row, filled up to a multiple of `multiple` tokens with a sequence of its own.

    Nobody else sees it and no row of it is scored. Whole tiles need no check of their borders.
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
    return dataclasses.replace(packed, **{k: torch.cat([getattr(packed, k), t]) for k, t in tail.items()})


def block_mask(packed: Packed, tile: int = TILE) -> BlockMask:
    """FlexAttention's BlockMask, built per tile of `tile` x `tile` without an N x N tensor.

    In a row as `Packed` lays it out, what a token sees is two ranges of neighbours: clean tokens from
    the start of its sequence on, and its own group. Ranges make the rule two comparisons, and say
    exactly which tiles are empty, full or partial: per tile of queries, how many ranges touch a tile
    of keys, and how many cover it, are sums over where ranges begin and end. O(N + tiles^2) time and
    memory, on the row's device, without waiting for it. Source: FlexAttention (arXiv 2412.05496), 4.
    """
    from torch.nn.attention.flex_attention import BlockMask

    n, group, device = len(packed), packed.block_size, packed.ids.device
    num_tiles = -(-n // tile)
    index = torch.arange(n, device=device)
    new_sequence = packed.sequence != packed.sequence.roll(1)
    start = torch.where(new_sequence, index, 0).cummax(0).values  # [N] where its sequence starts
    end = (start + (packed.block + (packed.view == 0)) * group).clamp(max=n)  # [N] of the clean range
    own = index // group * group  # [N] start of the own group; a clean one is in the clean range

    def count(first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """[tiles, tiles]: how many tokens of a query tile have the key tile in [first, last)."""
        edges = torch.zeros(num_tiles * (num_tiles + 1), dtype=torch.int32, device=device)
        row, one = index // tile * (num_tiles + 1), torch.ones_like(index, dtype=torch.int32)
        edges.index_add_(0, row + first, one)
        edges.index_add_(0, row + torch.maximum(first, last), -one)
        return edges.view(num_tiles, -1).cumsum(1, dtype=torch.int32)[:, :-1]

    def up(t: torch.Tensor) -> torch.Tensor:
        return (t + tile - 1) // tile

    own_end = torch.where(packed.view == 0, own, own + group)
    last = torch.where(end > start, up(end), 0)
    some = (count(start // tile, last) + count(own // tile, up(own_end))) > 0
    full = (count(up(start), end // tile) + count(up(own), own_end // tile)) == tile

    def listed(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(how many, which) key tiles per query tile, as FlexAttention wants them: [1, 1, ...]."""
        count = tiles.sum(-1, dtype=torch.int32)
        order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return count[None, None], order.to(torch.int32)[None, None]

    start, end = start.to(torch.int32), end.to(torch.int32)

    def mask_mod(b, h, i, j):
        return ((start[i] <= j) & (j < end[i])) | (i // group == j // group)

    return BlockMask.from_kv_blocks(
        *listed(some & ~full), *listed(full), BLOCK_SIZE=tile, mask_mod=mask_mod, seq_lengths=(n, n)
    )


@dataclass
class Views:
    """One sequence with the V views of it that are to be scored. Numpy arrays."""

    ids: np.ndarray  # [L] the clean tokens, L a multiple of the block size
    block: np.ndarray  # [V] which block each view shows, ascending
    masked: np.ndarray  # [V, B] what the view does not know
    scored: np.ndarray  # [V, B] which of those are scored
    targets: np.ndarray  # [V, B] token id or HOLD
    bounds: np.ndarray  # [V, B]
    weights: np.ndarray  # [V, B]
    engine_logprobs: np.ndarray  # [V, B]

    def __len__(self) -> int:
        """Tokens in the packed row: the clean copy and the views."""
        return self.ids.size + self.masked.size


def pack(
    sequences: list[Views],
    block_size: int,
    mask_id: int,
    token_budget: int,
    plan: list[list[int]] | None = None,
) -> list[Packed]:
    """Lay sequences out in rows of at most `token_budget` tokens.

    Args:
        plan: the rows as lists of indices into `sequences`, else by `plan_packs`. An empty one becomes
            a single block that scores nothing: its rank only keeps step with the others.
    """
    rows = plan_packs([len(s) for s in sequences], token_budget) if plan is None else plan
    idle = [(0, blank(block_size, mask_id))]
    return [_lay_out([(i, sequences[i]) for i in row] or idle, block_size, mask_id) for row in rows]


def plan_packs(sizes: list[int], token_budget: int) -> list[list[int]]:
    """Cut sequences of the given sizes (tokens) into rows: lists of indices.

    Sequences are taken from long to short, so neighbours in a row have similar lengths, and a row is
    closed when the next one does not fit; one larger than the budget gets a row of its own.
    """
    plan, used = [], token_budget
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if not plan or used + sizes[i] > token_budget:
            plan.append([])
            used = 0
        plan[-1].append(i)
        used += sizes[i]
    return plan


def plan_ranks(sizes: list[int], token_budget: int, ranks: int) -> list[list[list[int]]]:
    """Deal sequences out to ranks that run in step: plan[rank][row] lists indices into `sizes`.

    Every rank gets the same number of rows, the least that keeps rows within the budget (a sequence
    larger than that stands alone), and the k-th rows of all ranks are of similar size, since no rank
    leaves a layer before the slowest one has sent its share of the weights. Longest first, each
    sequence goes to the row that is shortest so far (LPT, Graham 1969); the rows go to the ranks in
    order of size, the largest of each round to the rank with the least so far. A row is empty only
    if there are fewer sequences than rows. The same sizes give the same plan on every rank.
    """
    if ranks == 1:
        return [plan_packs(sizes, token_budget)]
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    least = -(-sum(min(size, token_budget) for size in sizes) // (token_budget * ranks))
    per_rank, fits = max(least, 1) - 1, False
    while not fits:
        per_rank += 1
        rows: list[list[int]] = [[] for _ in range(per_rank * ranks)]
        loads = [(0, row) for row in range(len(rows))]  # a heap
        for i in order:
            load, row = loads[0]
            rows[row].append(i)
            heapq.heapreplace(loads, (load + sizes[i], row))
        fits = all(load <= token_budget or len(rows[row]) == 1 for load, row in loads)
    loads.sort(key=lambda item: (-item[0], item[1]))
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    so_far = [0] * ranks
    for start in range(0, len(loads), ranks):
        lightest = sorted(range(ranks), key=lambda rank: (so_far[rank], rank))
        for rank, (load, row) in zip(lightest, loads[start : start + ranks], strict=True):
            plan[rank].append(rows[row])
            so_far[rank] += load
    return plan


def _lay_out(sequences: list[tuple[int, Views]], block_size: int, mask_id: int) -> Packed:
    """One row from (index, views) pairs: clean copy, views, next clean copy, views, ..."""
    parts: dict[str, list[np.ndarray]] = {f.name: [] for f in dataclasses.fields(Packed)[:-1]}
    offset, views_so_far = 0, 0
    for number, (index, s) in enumerate(sequences):
        clean = np.arange(s.ids.size)
        shown = s.block[:, None] * block_size + np.arange(block_size)  # [V, B] positions
        where = np.flatnonzero(s.scored)  # row by row: views in order, positions left to right
        unique_view = views_so_far + 1 + np.arange(len(s.block))
        positions = np.concatenate([clean, shown.ravel()])
        noisy = np.where(s.masked, mask_id, s.ids[shown]).ravel()
        parts["ids"].append(np.concatenate([s.ids, noisy]))
        parts["positions"].append(positions)
        parts["sequence"].append(np.full(positions.size, number))
        parts["block"].append(positions // block_size)
        parts["view"].append(np.concatenate([0 * clean, np.repeat(unique_view, block_size)]))
        parts["rows"].append(offset + s.ids.size + where)
        parts["trajectory"].append(np.full(where.size, index))
        for name in ("targets", "bounds", "weights", "engine_logprobs"):
            parts[name].append(getattr(s, name).ravel()[where])
        offset += positions.size
        views_so_far += len(s.block)
    dtypes = {"bounds": np.float32, "weights": np.float32, "engine_logprobs": np.float32}
    joined = {
        name: torch.from_numpy(np.concatenate(arrays).astype(dtypes.get(name, np.int64)))
        for name, arrays in parts.items()
    }
    return Packed(**joined, block_size=block_size)


def replay(rollout: Rollout, block_size: int, weight: float, exact: bool = False) -> Views:
    """The views that a rollout's decoder saw, one per (block, denoising step) that happened.

    At a step the revealed tokens are scored; with `exact`, so are the masked positions that held
    (design: every masked position takes one action, reveal or hold). Example, block size 4:

        prompt [5 6], response [7 8 9 1 2 3], steps [1 2 3 3 4 3], mask _
        block 0, step 1: 5 6 _ _   reveals 7, holds one
        block 0, step 2: 5 6 7 _   reveals 8
        block 1, step 3: _ _ _ _   reveals 9 1 3, holds one
        block 1, step 4: 9 1 _ 3   reveals 2

    Args:
        rollout: whole blocks; len(prompt_ids) + len(response_ids) is a multiple of block_size.
        weight: weight of each of its rows in the loss.
    """
    prompt = len(rollout.prompt_ids)
    ids = np.array(rollout.prompt_ids + rollout.response_ids)
    if ids.size % block_size:
        raise ValueError(f"a trajectory of {ids.size} tokens is not whole blocks of {block_size}")
    steps, bounds, logprobs = np.zeros(ids.size, int), np.zeros(ids.size), np.zeros(ids.size)
    steps[prompt:] = rollout.steps
    bounds[prompt:] = rollout.hold_bounds
    logprobs[prompt:] = rollout.logprobs
    generated = np.arange(prompt, ids.size)
    happened, first = np.unique(
        np.stack([generated // block_size, steps[prompt:]]), axis=1, return_index=True
    )
    block, step = happened  # [V], ordered by block, then step
    shown = block[:, None] * block_size + np.arange(block_size)
    masked = steps[shown] >= step[:, None]
    revealed = steps[shown] == step[:, None]
    return Views(
        ids=ids,
        block=block,
        masked=masked,
        scored=masked if exact else revealed,
        targets=np.where(revealed, ids[shown], HOLD),
        bounds=np.broadcast_to(bounds[generated[first]][:, None], shown.shape),
        weights=np.full(shown.shape, weight),
        engine_logprobs=np.where(revealed, logprobs[shown], np.nan),
    )


def noise(
    ids: list[int],
    prompt_tokens: int,
    block_size: int,
    rng: np.random.Generator,
    per: str = "sequence",
    views: int = 1,
    complementary: bool = False,
    t_min: float = 0.02,
) -> Views:
    """Views of a training sequence drawn by random masking, weighted by 1/t.

    Draw t ~ U(t_min, 1 - t_min), per sequence (DiRL) or per block (BD3-LM, eq. 8), and mask each
    response token with probability t; its cross-entropy counts 1/t. `complementary` draws views in
    pairs: the second masks what the first did not, at 1 - t, so that each token is scored once per
    pair. A block in which nothing was masked makes no view. Weights are divided by `views`, not yet
    by the number of response tokens: that normaliser is the batch's.

    Args:
        ids: prompt and response, whole blocks (a multiple of block_size).
        prompt_tokens: how many of them are the prompt, never masked.
        views: how many noised copies of each block; even if complementary.
    """
    num_blocks = len(ids) // block_size
    clean = np.array(ids).reshape(num_blocks, block_size)
    response = (np.arange(len(ids)) >= prompt_tokens).reshape(num_blocks, block_size)
    masks, rates = [], []
    for _ in range(views // 2 if complementary else views):
        t = rng.uniform(t_min, 1 - t_min, size=(num_blocks, 1) if per == "block" else (1, 1))
        mask = (rng.random(clean.shape) < t) & response
        masks.append(mask)
        rates.append(np.broadcast_to(t, clean.shape))
        if complementary:
            masks.append(response & ~mask)
            rates.append(1 - rates[-1])
    masked = np.stack(masks, 1)  # [blocks, views, B]
    rate = np.stack(rates, 1)
    happened = masked.any(-1)
    block = np.nonzero(happened)[0]
    masked = masked[happened]  # [V, B]
    return Views(
        ids=clean.ravel(),
        block=block,
        masked=masked,
        scored=masked,
        targets=clean[block],
        bounds=np.zeros(masked.shape),
        weights=1 / (rate[happened] * views),
        engine_logprobs=np.full(masked.shape, np.nan),
    )


def blank(block_size: int, mask_id: int) -> Views:
    """One block without a view: it goes through the network, and nothing of it is scored."""
    none = np.zeros((0, block_size))
    ids = np.full(block_size, mask_id)
    return Views(ids, np.zeros(0, int), none > 0, none > 0, none, none, none, none)


def draw(packed: Packed, labels: list[str], path: str) -> None:
    """Draw who sees whom in a small packed row to a PNG. `labels`: N short token names."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    seen, clean = dense_mask(packed).numpy(), (packed.view == 0).numpy()
    colour = np.where(seen, np.where(clean[None, :], np.where(clean[:, None], 1, 2), 3), 0)
    figure, axes = plt.subplots(figsize=(11, 11.6))
    palette = ["#f4f4f4", "#4878a8", "#8fbf7f", "#e08a3c"]
    axes.imshow(colour, cmap=ListedColormap(palette), vmin=0, vmax=3)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.xaxis.tick_top()
    tags = torch.stack([packed.sequence, packed.view, packed.block], 1).numpy()
    for i in range(1, len(labels)):
        if (tags[i] != tags[i - 1]).any():
            new_segment = (tags[i, :2] != tags[i - 1, :2]).any()
            for line in (axes.axhline, axes.axvline):
                line(i - 0.5, color="black" if new_segment else "white", lw=0.8)
    starts = [0] + [i for i in range(1, len(labels)) if (tags[i, :2] != tags[i - 1, :2]).any()]
    for start, end in zip(starts, starts[1:] + [len(labels)], strict=True):
        s, v, b = tags[start]
        name = f"sequence {s}: clean copy" if v == 0 else f"view {v} (block {b})"
        axes.text(len(labels) - 0.2, (start + end - 1) / 2, name, va="center", fontsize=9)
    for row in packed.rows.tolist():
        axes.get_yticklabels()[row].set_color("#c03030")
        axes.get_yticklabels()[row].set_fontweight("bold")
    names = ["not visible", "clean sees clean: block(kv) <= block(q)"]
    names += ["view sees clean: block(kv) < block(q)", "view sees itself"]
    axes.legend(
        handles=[Patch(facecolor=c, edgecolor="grey", label=n) for c, n in zip(palette, names, strict=True)],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncol=4,
        frameon=False,
        fontsize=9,
    )
    axes.set_title(
        "One packed row: each sequence once clean, then one view per (block, denoising step).\n"
        "Rows are queries, columns keys; _ is the mask token; red rows are scored by the LM head.",
        fontsize=11,
        pad=12,
    )
    figure.savefig(path, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    from rollout import Rollout

    examples = [
        Rollout.of(prompt_ids=[1, 2, 3, 4, 5, 6], response_ids=[7, 8, 9, 10, 11, 12]),
        Rollout.of(prompt_ids=[1, 2, 3, 4], response_ids=[5, 6, 7, 8]),
    ]
    examples[0].steps, examples[1].steps = [1, 2, 3, 3, 4, 3], [1, 1, 1, 1]
    (row,) = pack([replay(r, 4, weight=1.0) for r in examples], 4, mask_id=0, token_budget=99)
    names = [chr(ord("a") + i - 1) if i else "_" for i in row.ids.tolist()]
    output = sys.argv[1] if len(sys.argv) > 1 else "masking.png"
    draw(row, names, output)
    print(f"{len(row)} tokens, {len(row.rows)} rows to score, drawn to {output}")
