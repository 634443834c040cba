"""Rollouts: block-wise denoising, and the record of what was revealed when.

A prompt's whole blocks are prefilled; the rest of it opens the first generated block, already known.
Then, per block, until it has no mask: one forward over its B positions against the cache; at every
masked position j draw v_j from g_j, with confidence c_j = p_j(v_j); *reveal* a set S of them by one of
three rules, the others *hold* (what was drawn there is thrown away):

    dynamic      S = {j : c_j >= threshold}, or the most confident one if none reaches it
    static       the B / denoising_steps most confident
    sequential   the first B / denoising_steps masked ones from the left

p is the softmax after temperature, g is p after top-k and top-p (model.py). One more forward over the
finished block leaves its clean keys and values in the cache; nothing is decided there, so it is no
step. Generation stops after the block with a stop token or at the length limit, and *every* token of
that last block belongs to the trajectory, since later reveals in it were conditioned on them.

Tokens per forward (TPF) = tokens of the trajectory / its (block, step) pairs; between 1 and B.

    python rollout.py CHECKPOINT "3+8+5?"    # prints one trajectory with its step map

Same semantics as LMDeploy 0.18.0 (pytorch/strategies/dllm/unmasking.py). Source: SDAR (2510.06303).
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Protocol

import torch

from masking import InputError
from model import BlockCache, Sampling, load, load_tokenizer, sampling_logprobs, stop_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from model import BlockDiffusion

RULES = ("dynamic", "static", "sequential")


@dataclass
class Decoding(Sampling):
    """Everything that decides what a request generates, but its prompt and its seed."""

    rule: str = "dynamic"  # which positions are revealed: one of RULES
    threshold: float = 0.9  # dynamic: confidence that is enough to reveal
    denoising_steps: int = 4  # static and sequential: steps per block
    max_tokens: int = 256  # new tokens; the last block is finished all the same

    @classmethod
    def from_config(cls, config: object, **changes) -> Decoding:
        """The fields that a script's config has under the same names, but for the changes."""
        names = {f.name for f in fields(cls)} & vars(config).keys()
        return cls(**{name: getattr(config, name) for name in names} | changes)


@dataclass
class Rollout:
    """One response with its step map: the record that flows from the engine to the loss."""

    prompt_ids: list[int]
    response_ids: list[int]  # [R] whole blocks: P + R is a multiple of the block size
    steps: list[int]  # [R] the denoising step, counted from 1, at which each token was revealed
    logprobs: list[float]  # [R] the engine's log g of each token at the moment of its reveal
    hold_bounds: list[float]  # [R] in that token's step, draws less probable than this were held
    num_tokens: int  # tokens that the user sees, stop token included
    finish_reason: str  # "stop" or "length"
    seed: int = 0

    @classmethod
    def of(cls, prompt_ids: list[int], response_ids: list[int]) -> Rollout:
        """A rollout with a token per step from the left, for examples and tests."""
        n = len(response_ids)
        steps = list(range(1, n + 1))
        return cls(prompt_ids, response_ids, steps, [0.0] * n, [1.0] * n, n, "length")

    @property
    def num_steps(self) -> int:
        """(block, step) forwards that decided a token."""
        return len(set(self.steps))

    @property
    def tokens_per_forward(self) -> float:
        """TPF of the trajectory."""
        return len(self.response_ids) / self.num_steps

    @property
    def visible_ids(self) -> list[int]:
        """The response as the user sees it, stop token included."""
        return self.response_ids[: self.num_tokens]


def reveal(confidence: torch.Tensor, masked: torch.Tensor, how: Decoding) -> torch.Tensor:
    """Which masked positions are revealed now: [..., B] booleans.

    Args:
        confidence: [..., B] p_j(v_j) of what was drawn; ignored where nothing is masked.
        masked: [..., B] what is still unknown. A block without masks reveals nothing.
    """
    block_size = confidence.shape[-1]
    count = min(max(1, block_size // how.denoising_steps), block_size)
    if how.rule == "sequential":
        return masked & (masked.cumsum(-1) <= count)
    if how.rule == "dynamic":
        count = 1
    confidence = confidence.masked_fill(~masked, -1.0)
    best = confidence.topk(count, dim=-1).indices
    chosen = torch.zeros_like(masked).scatter(-1, best, True)
    if how.rule == "dynamic":
        chosen = chosen | (confidence >= how.threshold)
    return chosen & masked


def hold_bound(confidence: torch.Tensor, revealed: torch.Tensor, how: Decoding) -> torch.Tensor:
    """Below which probability a draw was held at this step: [...] from [..., B] (design, section 4).

    dynamic: the threshold if it was reached, else the one confidence that was revealed;
    static: the least confidence revealed; sequential: infinity, since any draw was held.
    """
    least = confidence.masked_fill(~revealed, torch.inf).amin(-1)
    if how.rule == "sequential":
        return torch.full_like(least, torch.inf)
    if how.rule == "dynamic":
        return torch.where(least >= how.threshold, how.threshold, least)
    return least


class Engine(Protocol):
    """What dipo.py and evaluate.py need of a rollout engine."""

    block_size: int

    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        how: Decoding,
        done: Callable[[Rollout], None] = lambda rollout: None,
    ) -> list[Rollout]:
        """One rollout per (prompt, seed), in that order; `done` sees each as it ends."""

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite the weights in place; names are those of the checkpoint."""

    def sleep(self) -> None:
        """Give the memory back that only generation needs."""

    def wake(self) -> None:
        """Take it again."""

    def close(self) -> None:
        """End what the engine started."""


class TorchEngine:
    """The embedded engine: cached block decoding with this repository's own model.

    Each request has its own random stream, so its answer is the same alone and in any batch (up to
    the rounding of matrix products of another size).
    """

    def __init__(
        self,
        model: BlockDiffusion,
        block_size: int,
        mask_id: int,
        stop_ids: list[int],
        max_batch: int = 256,
    ):
        self.model = model.eval().requires_grad_(False)
        self.block_size, self.mask_id = block_size, mask_id
        self.stop_ids = torch.tensor(stop_ids, device=model.device)
        self.max_batch = max_batch
        self._device = model.device

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite the weights in place.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape.
        """
        own = self.model.state_dict()
        for name, tensor in tensors:
            if name not in own:
                raise ValueError(f"weight update: unknown or repeated tensor {name}")
            if own[name].shape != tensor.shape:
                raise ValueError(f"weight update: {name} has shape {tuple(tensor.shape)}")
            own.pop(name).copy_(tensor)
        if self.model.config.tie_word_embeddings:
            own.pop("lm_head.weight", None)
        if own:
            raise ValueError(f"weight update: missing tensor {min(own)}")

    def sleep(self) -> None:
        """Nothing is kept between calls but the weights; those wait on the CPU."""
        if self._device.type != "cpu":
            self.model.to("cpu")
            torch.cuda.empty_cache()

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
    ) -> list[Rollout]:
        """One rollout per (prompt, seed), in that order. See `Engine`.

        Raises:
            InputError: an empty prompt, or one that with max_tokens exceeds the model's positions.
        """
        if not prompts:
            return []
        b = self.block_size
        longest = max(map(len, prompts))
        room = -(-(longest + how.max_tokens) // b) * b
        limit = self.model.config.max_position_embeddings
        if min(map(len, prompts)) == 0:
            raise InputError("an empty prompt")
        if room > limit:
            raise InputError(
                f"a prompt of {longest} tokens and max_tokens={how.max_tokens} exceed the model's "
                f"{limit} positions"
            )
        batch = _Batch(self, min(self.max_batch, len(prompts)), room, how)
        waiting = deque(range(len(prompts)))
        answers: list[Rollout | None] = [None] * len(prompts)
        while waiting or batch.requests:
            joining = {}
            while waiting and batch.free:
                request = waiting.popleft()
                joining[batch.free.pop()] = (request, prompts[request], seeds[request])
            if joining:
                batch.join(joining)
            for request, rollout in batch.step():
                answers[request] = rollout
                done(rollout)
        return answers


@dataclass
class _Request:
    """One running request of a batch."""

    index: int
    prompt: list[int]
    seed: int
    random: torch.Generator
    steps: int = 0


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
        self.bounds = torch.zeros(shape, device=device)
        self.start = torch.zeros(self.slots, dtype=torch.long, device=device)  # of the block
        self.prompt_tokens = torch.zeros(self.slots, dtype=torch.long, device=device)

    def join(self, joining: dict[int, tuple[int, list[int], int]]) -> None:
        """Put (request, prompt, seed) into free slots and prefill the prompts' whole blocks."""
        b = self.engine.block_size
        longest = 0
        for slot, (request, prompt, seed) in joining.items():
            self.requests[slot] = _Request(request, prompt, seed, torch.Generator().manual_seed(seed))
            self.ids[slot] = self.engine.mask_id
            self.ids[slot, : len(prompt)] = torch.tensor(prompt)
            self.masked[slot] = True
            self.masked[slot, : len(prompt)] = False
            self.prompt_tokens[slot] = len(prompt)
            self.start[slot] = len(prompt) // b * b
            longest = max(longest, len(prompt) // b * b)
        if longest:  # what a shorter prompt writes past its end is overwritten before it is seen
            slots = torch.tensor(list(joining), device=self.ids.device)
            positions = torch.arange(longest, device=self.ids.device).expand(len(slots), -1)
            self.engine.model.prefill(self.ids[slots, :longest], positions, self.cache, slots)

    def step(self) -> list[tuple[int, Rollout]]:
        """One forward over the current block of every request; those that ended with it."""
        e, b, device = self.engine, self.engine.block_size, self.ids.device
        running = list(self.requests)
        slots = torch.tensor(running, device=device)
        positions = self.start[slots, None] + torch.arange(b, device=device)  # [S, B]
        at = (slots[:, None], positions)
        ids, masked = self.ids[at], self.masked[at]
        ids = torch.where(masked, e.mask_id, ids)
        logits = e.model.decode(ids, positions, self.cache, slots)  # [S, B, V]
        denoising = masked.any(-1)  # the others are finished: this forward wrote their clean block
        self.start[slots[~denoising]] += b

        log_p, log_g = sampling_logprobs(logits, self.how)
        drawn = self._draw(log_g, [self.requests[s] for s in running], denoising.tolist())
        confidence = log_p.gather(-1, drawn[..., None])[..., 0].exp()
        revealed = reveal(confidence, masked, self.how)
        step = torch.tensor([self.requests[s].steps for s in running], device=device)
        bound = hold_bound(confidence, revealed, self.how)
        logprob = log_g.gather(-1, drawn[..., None])[..., 0]
        for state, new in (
            (self.ids, drawn),
            (self.steps, step[:, None]),
            (self.logprobs, logprob),
            (self.bounds, bound[:, None]),
        ):
            state[at] = torch.where(revealed, new, state[at])
        self.masked[at] = masked & ~revealed

        complete = denoising & ~self.masked[at].any(-1)
        generated = positions >= self.prompt_tokens[slots, None]
        stopped = (torch.isin(self.ids[at], e.stop_ids) & generated).any(-1)
        length = self.start[slots] + b - self.prompt_tokens[slots]
        ended = complete & (stopped | (length >= self.how.max_tokens))
        return [self._leave(running[i]) for i in ended.nonzero()[:, 0].tolist()]

    def _draw(self, log_g: torch.Tensor, requests: list[_Request], denoising: list[bool]):
        """[S, B] tokens, by inverting the distribution function at one uniform number each."""
        b = log_g.shape[1]
        uniform = torch.zeros(len(requests), b, dtype=torch.double)
        for row, request in enumerate(requests):
            if denoising[row]:
                request.steps += 1
                uniform[row] = torch.rand(b, dtype=torch.double, generator=request.random)
        cumulative = log_g.double().exp().cumsum(-1)
        point = uniform.to(log_g.device)[..., None] * cumulative[..., -1:]
        return torch.searchsorted(cumulative, point, right=True)[..., 0].clamp(max=log_g.shape[-1] - 1)

    def _leave(self, slot: int) -> tuple[int, Rollout]:
        """Take a finished request out of the batch and make its record."""
        request = self.requests.pop(slot)
        self.free.append(slot)
        begin, end = len(request.prompt), int(self.start[slot]) + self.engine.block_size
        ids = self.ids[slot, begin:end].tolist()
        shown = ids[: self.how.max_tokens]
        stops = set(self.engine.stop_ids.tolist())
        stop = next((i for i, v in enumerate(shown) if v in stops), None)
        return request.index, Rollout(
            prompt_ids=request.prompt,
            response_ids=ids,
            steps=self.steps[slot, begin:end].tolist(),
            logprobs=self.logprobs[slot, begin:end].tolist(),
            hold_bounds=self.bounds[slot, begin:end].tolist(),
            num_tokens=len(shown) if stop is None else stop + 1,
            finish_reason="length" if stop is None else "stop",
            seed=request.seed,
        )


def main(checkpoint: str, question: str) -> None:
    """Print one trajectory, block by block and step by step."""
    model, tokenizer = load(checkpoint), load_tokenizer(checkpoint)
    b = model.config.block_size
    engine = TorchEngine(model, b, tokenizer.mask_token_id, stop_ids(tokenizer))
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    (rollout,) = engine.generate([prompt], [0], Decoding(max_tokens=64))
    ids, steps = prompt + rollout.response_ids, [0] * len(prompt) + rollout.steps
    for step in range(1, max(steps) + 1):
        block = steps.index(step) // b * b
        seen = [tokenizer.decode(ids[i]) if steps[i] <= step else "_" for i in range(block, block + b)]
        print(f"step {step:3d}  block {block // b:3d}  {' '.join(map(repr, seen))}")
    print(f"\n{tokenizer.decode(rollout.visible_ids)!r}")
    print(f"finish: {rollout.finish_reason}, {rollout.tokens_per_forward:.2f} tokens per forward")
    print(f"step map: {rollout.steps}")


if __name__ == "__main__":
    try:
        if len(sys.argv) != 3:
            raise InputError("usage: python rollout.py CHECKPOINT QUESTION")
        main(*sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
