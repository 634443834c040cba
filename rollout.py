"""Rollouts: block-wise denoising, and the record of what was revealed when.

A prompt's whole blocks are prefilled; the rest of it opens the first generated block, already known.
Let p be the softmax of the logits after temperature, and g be p after top-k and top-p (model.py). Per
block, until it has no mask: one forward over its B positions against the cache; at every masked position
j draw v_j from g_j, with confidence c_j = p_j(v_j); *reveal* a set S of them by one of three rules, the
others *hold* (what was drawn there is thrown away):

    dynamic      S = {j : c_j >= threshold}, or the most confident one if none reaches it
    static       the max(1, B // denoising_steps) most confident
    sequential   the first max(1, B // denoising_steps) masked ones from the left

Confidences are compared as log c_j, which does not saturate; of equal ones the left is the more confident.

One more forward over the finished block leaves its clean keys and values in the cache; nothing is decided
there, so it is no step. Generation stops after the block with a stop token or at the length limit, and
*every* token of that last block belongs to the trajectory, since later reveals in it were conditioned on
them.

Tokens per forward (TPF) = tokens of the trajectory / its (block, step) pairs; between 1 and B.

    python rollout.py CHECKPOINT "3+8+5+6?"  # plays it in the terminal; in a pipe, lines and the step map
    python rollout.py CHECKPOINT             # a chat
    python rollout.py runs/demo/dipo/latest "1+8+8+7+6?" --gif docs/denoising.gif    # static and dynamic

Two engines do this behind one interface, `Engine`: `TorchEngine`, this repository's own model, on CPU
or GPU; and `LMDeployEngine`, LMDeploy in a subprocess (plumbing/lmdeploy_engine.py), whose version 0.18.0
defines these rules (pytorch/strategies/dllm/unmasking.py). Source: SDAR (2510.06303).
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from masking import Trajectory, pack, replay
from model import (
    FLOOR,
    BlockCache,
    Sampling,
    choose_block_size,
    held_draws,
    load,
    log_reached,
    sampling_logprobs,
)
from plumbing.autoregressive import Autoregressive
from plumbing.chat import answer_questions, read_options
from plumbing.checkpoint import (
    check_weights,
    encode_prompt,
    find_folder,
    gather_into,
    is_block_diffusion,
    load_tokenizer,
    read_config,
    stop_ids,
)
from plumbing.common import InputError, run_script, tell
from plumbing.gpu import rest, to_engine, used_bytes
from plumbing.guard import together
from plumbing.lmdeploy_engine import LMDeployProcess, lmdeploy_problem
from plumbing.queue import SharedQueue
from plumbing.ranks import gather, rank_and_world
from plumbing.show import Answer, of_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from transformers import PreTrainedTokenizerFast

    from model import BlockDiffusion
    from plumbing.config import Rule

RESENDS = 3  # of the weights to an engine that lost them, without any rollout in between


# -------------------------------------------------------------------- the records of a response


@dataclass
class Decoding(Sampling):
    """Everything that decides what a request generates, except its prompt and its seed."""

    rule: Rule = "dynamic"  # which positions are revealed
    denoising_steps: int = 4  # static and sequential: steps per block
    max_tokens: int = 256  # new tokens; the last block may exceed it
    partial_tokens: int = 0  # after so many in one call a request stops, unfinished, at a block's end; 0: off
    min_tokens: int = 0  # no stop token is drawn in a block that begins before so many new tokens
    banned_ids: list[int] = field(default_factory=list)  # never drawn: taken out before p and g
    holds: bool = False  # record what was held, which the exact likelihood needs

    @classmethod
    def from_config(cls, config: object, **changes) -> Decoding:
        """The fields of a script's config that have the same names, overridden by `changes`."""
        names = {f.name for f in fields(cls)} & vars(config).keys()
        settings = {name: getattr(config, name) for name in names}
        return cls(**(settings | changes))


@dataclass
class Rollout(Trajectory):
    """One response with its step map: the record that flows from the engine to the loss."""

    num_tokens: int  # tokens that the user sees (shown_ids), stop token included
    finish_reason: str  # "stop", "length" or "unfinished"
    seed: int = 0

    @property
    def num_steps(self) -> int:
        """(block, step) forwards that decided a token; no two blocks share the number of a step."""
        return len(set(self.steps))

    @property
    def tokens_per_forward(self) -> float:
        """TPF of the trajectory."""
        return len(self.response_ids) / self.num_steps

    @property
    def is_sound(self) -> bool:
        """Whether its probabilities are numbers; those of an engine with damaged weights are not."""
        return all(map(math.isfinite, self.logprobs))

    @property
    def shown_ids(self) -> list[int]:
        """The response as the user sees it, stop token included."""
        return self.response_ids[: self.num_tokens]


def end_rollout(
    prompt: list[int],
    seed: int,
    record: dict[str, list],
    how: Decoding,
    stops: list[int],
    begun: Rollout | None = None,
) -> Rollout:
    """The rollout of a request that stopped, with the number of its shown tokens and its reason to stop.

    Args:
        record: the fields of `Trajectory` of the blocks of this call, whose steps are counted from 1.
        stops: ids of stop tokens.
        begun: what the request went on with.
    """
    if begun:
        record["steps"] = [begun.num_steps + step for step in record["steps"]]
        record = {name: getattr(begun, name) + new for name, new in record.items()}
        record["ages"] = begun.ages and begun.ages + [0] * (len(record["steps"]) - len(begun.ages))
    shown = record["response_ids"][: how.max_tokens]
    is_partial = how.partial_tokens and len(shown) < how.max_tokens
    num_tokens, reason = len(shown), "unfinished" if is_partial else "length"
    for i, token in enumerate(shown):
        if token in stops:
            num_tokens, reason = i + 1, "stop"
            break
    return Rollout(prompt, **record, num_tokens=num_tokens, finish_reason=reason, seed=seed)


# ------------------------------------------------------------------------------ the rules


def reveal(
    confidence: torch.Tensor, masked: torch.Tensor, how: Decoding, log_tau: torch.Tensor | None = None
) -> torch.Tensor:
    """Which masked positions are revealed now: [..., B] booleans.

    Args:
        confidence: [..., B] log p_j(v_j) of what was drawn; ignored where nothing is masked.
        masked: [..., B] what is still unknown. A block without masks reveals nothing.
        log_tau: [..., B] dynamic: what log c_j has to reach; None: the threshold's.
    """
    block_size = confidence.shape[-1]
    count = max(1, block_size // how.denoising_steps)
    if how.rule == "sequential":
        return masked & (masked.cumsum(-1) <= count)
    if how.rule == "dynamic":
        count = 1
    # static: the `count` most confident. dynamic: the most confident one, and all that reach the threshold.
    confidence = confidence.masked_fill(~masked, -torch.inf)
    best = confidence.argsort(dim=-1, descending=True, stable=True)[..., :count]
    chosen = torch.zeros_like(masked).scatter(-1, best, True)
    if how.rule == "dynamic":
        reached = masked & (confidence >= (log_threshold(how) if log_tau is None else log_tau))
        # Thresholds differ if they are dithered: the most confident one may have missed its own.
        chosen = torch.where(reached.any(-1, keepdim=True), reached, chosen)
    return chosen & masked


def log_threshold(how: Decoding) -> float:
    """What log c_j has to reach."""
    return math.log(how.threshold) if how.threshold > 0 else -math.inf


def hold_bound(
    confidence: torch.Tensor, revealed: torch.Tensor, how: Decoding, log_tau: torch.Tensor | None = None
) -> torch.Tensor:
    """The log p below which a draw was held at this step: [..., B] from [..., B]; log_tau as for `reveal`.

    dynamic: the threshold's (if dithered, the highest) if it was reached, else that of the one revealed;
    static: the least revealed;
    sequential: infinity, since any draw would have been held. Of two equally confident positions the left
    one is revealed first. So right of the least revealed an equal draw was held too, and the bound is the
    next larger number.
    """
    if how.rule == "sequential":
        return torch.full_like(confidence, torch.inf)
    least = confidence.masked_fill(~revealed, torch.inf).amin(-1, keepdim=True)
    position = torch.arange(confidence.shape[-1], device=confidence.device)
    last_least = torch.where(revealed & (confidence == least), position, -1).amax(-1, keepdim=True)
    bound = torch.where(position > last_least, least.nextafter(torch.full_like(least, torch.inf)), least)
    if how.rule == "dynamic":
        needed = log_threshold(how) if log_tau is None else log_tau
        reached = (revealed & (confidence >= needed)).any(-1, keepdim=True)
        bound = torch.where(reached, log_threshold(how), bound)
    return bound


def dithered(uniform: torch.Tensor, how: Decoding) -> torch.Tensor:
    """What log c_j has to reach: [...], from numbers [...] in [0, 1), one for each position and step."""
    return (how.threshold - how.dither * uniform).clamp(min=FLOOR).log()


def exact_record(
    confidence: torch.Tensor,
    log_g: torch.Tensor,
    masked: torch.Tensor,
    revealed: torch.Tensor,
    how: Decoding,
    log_tau: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of revealing what was drawn, and `hold_bound`: [..., B] each, from [..., B].

    Args:
        log_g: of the draws. With dithered thresholds whether they reached theirs belongs to it.
    """
    bounds = hold_bound(confidence, revealed, how, log_tau)
    if not how.dither:
        return log_g, bounds
    of_step = torch.where(masked.sum(-1, keepdim=True) == 1, torch.inf, bounds.amin(-1, keepdim=True))
    return log_g + log_reached(confidence, of_step, how), bounds


def held_mass(log_p: torch.Tensor, log_g: torch.Tensor, bounds: torch.Tensor, how: Decoding) -> torch.Tensor:
    """Log-probability [...] that a draw is held: of g where log p, both [..., V], is below bounds [...]."""
    mass = torch.where(log_p < bounds[..., None], held_draws(log_p, log_g.exp(), how), 0).sum(-1)
    return mass.clamp(min=FLOOR).log()


# ----------------------------------------------------------------------------- the engines


class Engine(Protocol):
    """What dipo.py and evaluate.py need of a rollout engine."""

    block_size: int
    positions: int  # longest prompt and response together
    max_batch: int  # requests at a time
    dtype: str  # of its computation

    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        how: Decoding,
        done: Callable[[Rollout], None] = lambda rollout: None,
        begun: list[Rollout | None] | None = None,
        take: Callable[[], int | None] | None = None,
    ) -> list[Rollout | None]:
        """One rollout per (prompt, seed), in that order; `done` sees each as it stops.

        None where the engine lost its weights on the way: its subprocess died, and was started again with
        those of the checkpoint. See `generate_all`.

        Args:
            begun: of each request its unfinished rollout, None if it is new. It goes on behind its own
                blocks, which are prefilled, and draws what it would have drawn without a pause.
            take: gives the index of the next request to run, when there is room; None: no more. What it
                never gives stays None. Without it all are run, in order.
        """

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite the weights in place; names are those of the model's parameters."""

    def sleep(self) -> int:
        """Free the memory that only generation needs: weights and cache. Returns bytes of the GPU.

        The next `generate` needs `update_weights`, then `wake`.
        """

    def wake(self) -> None:
        """Take the memory again."""

    def close(self) -> None:
        """End what the engine started."""


def generate_all(
    engine: Engine,
    prompts: list[list[int]],
    seeds: list[int],
    how: Decoding,
    done: Callable[[Rollout], None] = lambda rollout: None,
    weights: Callable[[], Iterable[tuple[str, torch.Tensor]]] | None = None,
    begun: list[Rollout | None] | None = None,
    queue: SharedQueue | None = None,
) -> list[Rollout | None]:
    """Generate; if the engine of some rank lost its weights on the way, send them again and go on.

    So it is if probabilities are no numbers: sound weights give sound rollouts. Every rank must call this,
    since gathering the weights is a collective call.

    Args:
        done: sees every sound rollout as it stops.
        weights: the trainer's weights now; None: the checkpoint's, which no engine can lose.
        begun: see `Engine`.
        queue: of the requests, which all ranks have in the same order; those that another rank took stay
            None. Without it a rank's requests are its own.

    Raises:
        InputError: sending the weights RESENDS times brought no further rollout.
    """
    rollouts: list[Rollout | None] = [None] * len(prompts)
    in_all = len(prompts) if queue else sum(gather(len(prompts)))
    todo, left, in_vain = range(len(prompts)), -1, 0
    while in_vain < RESENDS:
        # What this rank still lacks, or what is left in the queue.
        asked = range(len(prompts)) if queue else todo
        missing = [prompts[i] for i in asked], [seeds[i] for i in asked]
        going_on = [begun[i] for i in asked] if begun else None
        with together():
            take = queue.take if queue else None
            new = engine.generate(*missing, how, lambda r: r.is_sound and done(r), going_on, take)
        for i, rollout in zip(asked, new, strict=True):
            if rollout is not None and rollout.is_sound:
                rollouts[i] = rollout
        todo = [i for i in (queue.taken if queue else todo) if rollouts[i] is None]
        if queue:
            queue.put_back(todo)

        # Until no rank lacks any.
        before, left = left, in_all - sum(gather(sum(rollout is not None for rollout in rollouts)))
        if not left:
            return rollouts
        in_vain = in_vain + 1 if left == before else 0
        if weights is None:
            break
        if todo:
            tell(f"{len(todo)} rollouts are lost or nan: the engine gets the weights again")
        to_engine(engine, weights())
    raise InputError("the rollout engine has no sound weights: what it computes is nan, or it dies again")


def needed_positions(prompts: list[list[int]], how: Decoding, block_size: int, limit: int) -> int:
    """Positions that the longest request can need, in whole blocks, if that is possible at all.

    Raises:
        InputError: an empty prompt, or one that with max_tokens exceeds the model's `limit`; or
            min_tokens above max_tokens.
    """
    if how.min_tokens > how.max_tokens:
        raise InputError(f"min_tokens={how.min_tokens} is more than max_tokens={how.max_tokens}")
    longest = max(map(len, prompts))
    room = -(-(longest + how.max_tokens) // block_size) * block_size
    if min(map(len, prompts)) == 0:
        raise InputError("an empty prompt")
    if room > limit:
        raise InputError(
            f"a prompt of {longest} tokens and max_tokens={how.max_tokens} exceed the model's "
            f"{limit} positions"
        )
    return room


class TorchEngine:
    """The embedded engine: cached block decoding with this repository's own model.

    Each request has its own random stream, so its rollout is the same alone and in any batch (up to
    the rounding of matrix products of another size).
    """

    def __init__(
        self, model: BlockDiffusion, block_size: int, mask_id: int, stop_ids: list[int], max_batch: int = 256
    ):
        self.model = model.eval().requires_grad_(False)
        self.block_size, self.mask_id = block_size, mask_id
        self.positions = model.config.max_position_embeddings
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.stop_ids = torch.tensor(stop_ids, device=model.device)
        self.max_batch = max_batch
        self._device = model.device

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite the weights in place.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape.
        """
        own = self.model.state_dict()
        shapes = {name: list(tensor.shape) for name, tensor in own.items()}
        for name, tensor in check_weights(tensors, shapes, self.model.config.tie_word_embeddings):
            gather_into(own[name], tensor)

    def sleep(self) -> int:
        """Only the weights are kept between calls; they wait on the CPU."""
        before = used_bytes()
        self.model.to("cpu")
        rest()
        return before - used_bytes()

    def wake(self) -> None:
        """Bring the weights back."""
        self.model.to(self._device)

    def close(self) -> None:
        """Nothing was started."""

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        how: Decoding,
        done: Callable[[Rollout], None] = lambda rollout: None,
        begun: list[Rollout | None] | None = None,
        take: Callable[[], int | None] | None = None,
    ) -> list[Rollout | None]:
        """One rollout per (prompt, seed), in that order. See `Engine`.

        Raises:
            InputError: an empty prompt, or one that with max_tokens exceeds the model's positions.
        """
        if not prompts:
            return []
        room = needed_positions(prompts, how, self.block_size, self.positions)

        # Continuous batching: a slot that comes free is taken by the next request.
        batch = _Batch(self, min(self.max_batch, len(prompts)), room, how)
        numbers = self.block_size * (2 if how.dither else 1)  # that a step draws
        begun = begun or [None] * len(prompts)
        rollouts: list[Rollout | None] = [None] * len(prompts)
        waiting = iter(take, None) if take else iter(range(len(prompts)))
        while True:
            joining = {}
            while batch.free and (index := next(waiting, None)) is not None:
                seed, old = seeds[index], begun[index]
                random = torch.Generator().manual_seed(seed)
                if old:  # behind what its earlier steps drew
                    torch.rand(old.num_steps * numbers, dtype=torch.double, generator=random)
                joining[batch.free.pop()] = _Request(index, prompts[index], seed, random, old)
            if joining:
                batch.join(joining)
            if not batch.requests:
                return rollouts
            for index, rollout in batch.step():
                rollouts[index] = rollout
                done(rollout)


@dataclass
class _Request:
    """One request: where its rollout goes in the list, and what it needs on the way."""

    index: int
    prompt: list[int]
    seed: int
    random: torch.Generator
    begun: Rollout | None
    steps: int = 0  # denoising steps of this call so far


@dataclass
class _Batch:
    """The running requests, each in a slot of the cache; the block that each is denoising."""

    engine: TorchEngine
    slots: int
    room: int
    how: Decoding
    requests: dict[int, _Request] = field(default_factory=dict)  # by slot

    def __post_init__(self):
        e, device = self.engine, self.engine.model.device
        self.free = list(range(self.slots))
        self.cache = BlockCache(e.model, self.slots, self.room, e.block_size)
        shape = (self.slots, self.room)
        self.ids = torch.full(shape, e.mask_id, device=device)
        self.masked = torch.zeros(shape, dtype=torch.bool, device=device)
        self.steps = torch.zeros(shape, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        per_step = (*shape, e.block_size, 2) if self.how.holds else (0,)
        self.holds = torch.zeros(per_step, device=device)  # by step of the block: bound, log-probability
        self.number = torch.zeros(self.slots, dtype=torch.long, device=device)  # of the step in its block
        self.start = torch.zeros(self.slots, dtype=torch.long, device=device)  # of the current block
        self.prompt_tokens = torch.zeros(self.slots, dtype=torch.long, device=device)
        self.first = torch.zeros(self.slots, dtype=torch.long, device=device)  # token of this call

    def join(self, joining: dict[int, _Request]) -> None:
        """Put requests into free slots and prefill the whole blocks of what is known."""
        b, longest = self.engine.block_size, 0
        for slot, request in joining.items():
            ids = request.prompt + (request.begun.response_ids if request.begun else [])
            known = len(ids)
            self.requests[slot] = request
            self.ids[slot] = self.engine.mask_id
            self.ids[slot, :known] = torch.tensor(ids)
            self.masked[slot] = True
            self.number[slot] = 0
            self.masked[slot, :known] = False
            self.prompt_tokens[slot], self.first[slot] = len(request.prompt), known
            self.start[slot] = known // b * b
            longest = max(longest, known // b * b)

        # All are prefilled as far as the longest. Behind a shorter prompt that writes keys of masks, which
        # its own blocks overwrite before anything sees them.
        if longest:
            slots = torch.tensor(list(joining), device=self.ids.device)
            positions = torch.arange(longest, device=self.ids.device).expand(len(slots), -1)
            self.engine.model.prefill(self.ids[slots, :longest], positions, self.cache, slots)

    def step(self) -> list[tuple[int, Rollout]]:
        """One forward over the current block of every request.

        For a block with masks it is a denoising step. For one that has just lost its last mask it is the
        pass that leaves clean keys in the cache: nothing is drawn, and the request's next block begins.

        Returns:
            (index, rollout) of the requests that ended, or pause.
        """
        # The current blocks, masks where they are not known yet.
        e, b, device = self.engine, self.engine.block_size, self.ids.device
        running = list(self.requests)
        slots = torch.tensor(running, device=device)
        positions = self.start[slots, None] + torch.arange(b, device=device)  # [S, B]
        at = (slots[:, None], positions)
        ids, masked = self.ids[at], self.masked[at]
        ids = torch.where(masked, e.mask_id, ids)
        denoising = masked.any(-1)  # [S]

        # The forward. `start` moves where it only wrote to the cache.
        logits = e.model.decode(ids, positions, self.cache, slots)  # [S, B, V]
        self.start[slots[~denoising]] += b

        # Draw at every masked position, and reveal some.
        self._ban(logits, positions[:, 0] - self.prompt_tokens[slots])
        log_p, log_g = sampling_logprobs(logits, self.how)
        drawn, log_tau = self._draw(log_g, [self.requests[s] for s in running], denoising.tolist())
        confidence = log_p.gather(-1, drawn[..., None])[..., 0]
        revealed = reveal(confidence, masked, self.how, log_tau)

        # The record of what was revealed, and what the others held.
        step = torch.tensor([self.requests[s].steps for s in running], device=device)
        logprob = log_g.gather(-1, drawn[..., None])[..., 0]
        if self.how.holds:
            logprob, bounds = exact_record(confidence, logprob, masked, revealed, self.how, log_tau)
            held = torch.stack([bounds, held_mass(log_p, log_g, bounds, self.how)], -1)  # [S, B, 2]
            number = self.number[slots]
            self.holds[(*at, number[:, None].clamp(max=b - 1))] = held
            self.number[slots] = torch.where(denoising, number + 1, 0)
        for state, new in (  # what is not revealed now keeps its value
            (self.ids, drawn),
            (self.steps, step[:, None]),
            (self.logprobs, logprob),
        ):
            state[at] = torch.where(revealed, new, state[at])
        self.masked[at] = masked & ~revealed

        # A request ends with a complete block that has a stop token or reaches the limit, or pauses after it.
        # (Where `start` has moved no block is complete.)
        complete = denoising & ~self.masked[at].any(-1)
        generated = positions >= self.prompt_tokens[slots, None]
        stopped = (torch.isin(self.ids[at], e.stop_ids) & generated).any(-1)
        length = self.start[slots] + b - self.prompt_tokens[slots]
        ended = complete & (stopped | (length >= self.how.max_tokens))
        if self.how.partial_tokens:
            ended |= complete & (self.start[slots] + b - self.first[slots] >= self.how.partial_tokens)
        return [self._leave(running[i]) for i in ended.nonzero()[:, 0].tolist()]

    def _ban(self, logits: torch.Tensor, new_tokens: torch.Tensor) -> None:
        """Ban banned_ids, and stop tokens while it is too early for them, in place.

        As LMDeploy does (pytorch/strategies/ar/sampling.py:98): while a block begins before
        min_tokens, the whole block has no stop token.

        Args:
            logits: [S, B, V]
            new_tokens: [S] generated before the current block.
        """
        if self.how.banned_ids:
            logits[..., self.how.banned_ids] = -torch.inf
        if self.how.min_tokens:
            early = new_tokens.clamp(min=0) < self.how.min_tokens
            stops = self.engine.stop_ids
            logits[..., stops] = logits[..., stops].masked_fill(early[:, None, None], -torch.inf)

    def _draw(
        self, log_g: torch.Tensor, requests: list[_Request], denoising: list[bool]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[S, B] tokens: each is where g's distribution function passes a uniform number.

        And [S, B] what their log p has to reach, if thresholds are dithered.

        The numbers come from the request's own stream, so they are the same in any batch.
        """
        b = log_g.shape[1]
        uniform = torch.zeros(len(requests), b, dtype=torch.double)
        lower = torch.zeros(len(requests), b, dtype=torch.double)
        for i, request in enumerate(requests):
            if denoising[i]:
                request.steps += 1
                uniform[i] = torch.rand(b, dtype=torch.double, generator=request.random)
                if self.how.dither:
                    lower[i] = torch.rand(b, dtype=torch.double, generator=request.random)
        cumulative = log_g.double().exp().cumsum(-1)  # [S, B, V], at its end 1 up to rounding
        point = uniform.to(log_g.device)[..., None] * cumulative[..., -1:]
        drawn = torch.searchsorted(cumulative, point, right=True)[..., 0].clamp(max=log_g.shape[-1] - 1)
        if not self.how.dither:
            return drawn, None
        return drawn, dithered(lower, self.how).to(log_g)

    def _leave(self, slot: int) -> tuple[int, Rollout]:
        """Take a request out of the batch and make the record of what was generated in this call."""
        request = self.requests.pop(slot)
        self.free.append(slot)
        begin = int(self.first[slot])
        end = int(self.start[slot]) + self.engine.block_size  # of the block that was just completed
        steps = self.steps[slot, begin:end].tolist()
        record = {
            "response_ids": self.ids[slot, begin:end].tolist(),
            "steps": steps,
            "logprobs": self.logprobs[slot, begin:end].tolist(),
        }
        if self.how.holds:
            recorded = self.holds[slot, begin:end].tolist()
            record |= holds_of_tokens(recorded, steps, begin, self.engine.block_size)
        stops = self.engine.stop_ids.tolist()
        rollout = end_rollout(request.prompt, request.seed, record, self.how, stops, request.begun)
        return request.index, rollout


def holds_of_tokens(
    recorded: list[list[list[float]]], steps: list[int], prompt_tokens: int, block_size: int
) -> dict[str, list[list[float]]]:
    """hold_bounds and hold_logprobs of a trajectory: of each token, the steps of its block before its own.

    Args:
        recorded: [R, B, 2] of each token and step of its block: bound and log-probability.
    """
    bounds, logprobs = [], []
    for i, of_token in enumerate(recorded):
        begin = (prompt_tokens + i) // block_size * block_size - prompt_tokens  # of its block
        first_step = min(steps[max(0, begin) : begin + block_size])
        held = of_token[: steps[i] - first_step]
        bounds.append([bound for bound, _ in held])
        logprobs.append([logprob for _, logprob in held])
    return {"hold_bounds": bounds, "hold_logprobs": logprobs}


class LMDeployEngine(LMDeployProcess):
    """LMDeploy's PyTorch engine in a subprocess of its own, on this rank's GPU.

    Rollouts are those of `TorchEngine`: same steps, same record. `logprobs` is log g of the token at
    its reveal, computed in float32 from the engine's own logits after temperature, top-k and top-p;
    confidences likewise. A rollout depends on its prompt and seed, not on its neighbours.
    An autoregressive model is served too (block_size=0): a token per step, no step map.

        engine = LMDeployEngine("JetLM/SDAR-8B-Chat", 4, tokenizer.mask_token_id, stop_ids(tokenizer))
        rollouts = engine.generate(prompts, seeds, Decoding(max_tokens=2048))
    """

    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        how: Decoding,
        done: Callable[[Rollout], None] = lambda rollout: None,
        begun: list[Rollout | None] | None = None,
        take: Callable[[], int | None] | None = None,
    ) -> list[Rollout | None]:
        """One rollout per (prompt, seed), in that order. See `Engine`.

        Raises:
            InputError: bad prompts, see `needed_positions`, `check_room`; or the engine died three times.
            RuntimeError: an error inside the engine, with its traceback.
        """
        rollouts: list[Rollout | None] = [None] * len(prompts)
        if not prompts:
            return rollouts
        self.check_room(needed_positions(prompts, how, self.block_size, self.positions))
        begun = begun or [None] * len(prompts)
        so_far = [(old.response_ids, old.num_steps) if old else ([], 0) for old in begun]
        for i, record in self.records(prompts, seeds, how, so_far, take):
            rollouts[i] = end_rollout(prompts[i], seeds[i], record, how, self.stop_ids, begun[i])
            done(rollouts[i])
        return rollouts


def make_engine(
    checkpoint: str | Path, tokenizer: PreTrainedTokenizerFast, block_size: int, config: Any, log: Path
) -> Engine:
    """The rollout engine for a checkpoint, as config.engine says; if it leaves the choice, that is printed.

    Args:
        block_size: 0: the checkpoint's, see `choose_block_size`.
        config: has engine, max_batch, dtype and cache_gib.
        log: what an engine in a subprocess prints goes there.

    Raises:
        InputError: the engine cannot run here, or not this model.
    """
    # auto takes LMDeploy where it can run.
    cuda, folder = torch.cuda.is_available(), find_folder(checkpoint)
    name = config.engine
    if name == "auto":
        name = "torch" if lmdeploy_problem() else "lmdeploy"
        if rank_and_world()[0] == 0:
            tell(f"engine: {name}")

    # The embedded one, or the subprocess, which also serves autoregressive models (no blocks).
    mask_id, stops = tokenizer.mask_token_id, stop_ids(tokenizer)
    if name == "torch":
        model = load(folder, getattr(torch, config.dtype), "cuda" if cuda else "cpu")
        b = choose_block_size(block_size, model.config)
        return TorchEngine(model, b, mask_id, stops, config.max_batch)
    b = choose_block_size(block_size, read_config(folder)) if is_block_diffusion(folder) else 0
    dtype = "bfloat16" if cuda else config.dtype  # what LMDeploy computes in on a GPU
    return LMDeployEngine(folder, b, mask_id, stops, config.max_batch, dtype, config.cache_gib, log)


def answer(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, question: str, history: list[dict], options: Any
) -> Answer:
    """The next turn of a chat, with the text, step, block and probability of each of its tokens."""
    prompt = encode_prompt(tokenizer, question, history)
    b, greedy = engine.block_size, not options.temperature
    how = Decoding.from_config(options, temperature=options.temperature or 1.0, top_k=int(greedy))
    how.denoising_steps = b
    start = time.perf_counter()
    (rollout,) = generate_all(engine, [prompt], [options.seed], how)
    seconds = time.perf_counter() - start

    # Greedily g is 1. What p was, the trainer's pass over the recorded views says.
    logprobs = rollout.logprobs
    if greedy and isinstance(engine, TorchEngine):
        (row,) = pack([replay(rollout, b, 1.0)], b, engine.mask_id, 0)
        scores = engine.model.score(row.to(engine.model.device), Decoding()).logprobs.tolist()
        order = sorted(range(len(scores)), key=rollout.steps.__getitem__)  # step by step, from the left
        logprobs = [score for _, score in sorted(zip(order, scores, strict=True))]
    elif greedy and isinstance(engine, LMDeployEngine):
        logprobs = None
    return of_record(tokenizer, prompt, rollout, logprobs, b, seconds)


def main() -> None:
    """Show how an answer comes about, step by step; without a question, chat."""
    options = read_options(__doc__)
    tokenizer, folder = load_tokenizer(options.checkpoint), find_folder(options.checkpoint)
    by_blocks = is_block_diffusion(folder)
    if options.engine == "auto":
        options.engine = "torch" if lmdeploy_problem() else "lmdeploy"
    if by_blocks or options.engine == "lmdeploy":
        log = Path(tempfile.gettempdir()) / f"rollout-{os.getpid()}.log"
        engine = make_engine(folder, tokenizer, 0, options, log)
    else:
        engine = Autoregressive(folder, options.dtype, stop_ids(tokenizer))
    options.max_tokens = options.max_tokens or min(256, (engine.positions or 512) // 2)
    answer_questions(options, functools.partial(answer, engine, tokenizer), by_blocks)


if __name__ == "__main__":
    run_script(main)
