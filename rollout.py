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

Two engines do this behind one interface, `Engine`: `TorchEngine`, this repository's own model, on CPU
or GPU; and `LMDeployEngine`, LMDeploy in a subprocess (lmdeploy_child.py), whose semantics these are
(pytorch/strategies/dllm/unmasking.py of its version 0.18.0). Source: SDAR (2510.06303).
"""

from __future__ import annotations

import importlib.metadata
import json
import mmap
import os
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from tqdm import tqdm

from masking import InputError
from model import (
    BlockCache,
    Sampling,
    TensorFiles,
    as_published,
    find_folder,
    load,
    load_tokenizer,
    sampling_logprobs,
    stop_ids,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from model import BlockDiffusion

RULES = ("dynamic", "static", "sequential")
LMDEPLOY_VERSION = "0.18.0"  # lmdeploy_child.py replaces private methods of this version
BUCKET_BYTES = 2**30  # weights travel to the subprocess in pieces of this size


@dataclass
class Decoding(Sampling):
    """Everything that decides what a request generates, but its prompt and its seed."""

    rule: str = "dynamic"  # which positions are revealed: one of RULES
    threshold: float = 0.9  # dynamic: confidence that is enough to reveal
    denoising_steps: int = 4  # static and sequential: steps per block
    max_tokens: int = 256  # new tokens; the last block is finished all the same
    min_tokens: int = 0  # a block that begins before so many new tokens has no stop token
    banned_ids: list[int] = field(default_factory=list)  # never drawn; p and g are without them

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
    ) -> list[Rollout | None]:
        """One rollout per (prompt, seed), in that order; `done` sees each as it ends.

        None where the engine lost its weights on the way: see `generate_all`.
        """

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite the weights in place; names are those of the model's parameters."""

    def sleep(self) -> int:
        """Give the memory back that only generation needs; bytes of the GPU that came free.

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
) -> list[Rollout]:
    """`engine.generate`, and again for what is missing if the engine lost its weights on the way.

    Args:
        weights: the trainer's weights now. Gathering them is a collective call, so when it is given
            every rank must call this function, and an engine lost on one rank makes all send again.
    """
    rollouts: list[Rollout | None] = [None] * len(prompts)
    todo = range(len(prompts))
    while True:
        new = engine.generate([prompts[i] for i in todo], [seeds[i] for i in todo], how, done)
        for i, rollout in zip(todo, new, strict=True):
            rollouts[i] = rollout
        todo = [i for i in todo if rollouts[i] is None]
        if not any(gather(bool(todo))):
            return rollouts
        engine.update_weights(weights())
        engine.wake()


def rank_and_world() -> tuple[int, int]:
    """This process among those of torchrun; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(item: Any) -> list[Any]:
    """The item of every rank, on every rank."""
    items = [item] * rank_and_world()[1]
    if len(items) > 1:
        dist.all_gather_object(items, item)
    return items


def check_prompts(prompts: list[list[int]], how: Decoding, block_size: int, limit: int) -> int:
    """Positions that the longest request can need, whole blocks.

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

    def sleep(self) -> int:
        """Nothing is kept between calls but the weights; those wait on the CPU."""
        if self._device.type == "cpu":
            return 0
        before = torch.cuda.mem_get_info()[0]
        self.model.to("cpu")
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] - before

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
        room = check_prompts(prompts, how, self.block_size, self.model.config.max_position_embeddings)
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

        self._ban(logits, positions[:, 0] - self.prompt_tokens[slots])
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

    def _ban(self, logits: torch.Tensor, new_tokens: torch.Tensor) -> None:
        """Take what may not be drawn out of [S, B, V] logits; new tokens [S] before these blocks.

        As LMDeploy does (pytorch/strategies/ar/sampling.py:98): while a block begins before
        min_tokens, the whole block has no stop token.
        """
        if self.how.banned_ids:
            logits[..., self.how.banned_ids] = -torch.inf
        if self.how.min_tokens:
            early = new_tokens.clamp(min=0) < self.how.min_tokens
            stops = self.engine.stop_ids
            logits[..., stops] = logits[..., stops].masked_fill(early[:, None, None], -torch.inf)

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


class _ChildDied(Exception):
    """The rollout process is gone, or silent for too long; the message says which."""


def child_environment(environ: Mapping[str, str], device: int | None) -> dict[str, str]:
    """Environment of a rank's rollout process: its one GPU, and nothing of the launcher's.

    Args:
        device: index of the rank's GPU among those that the rank itself sees; None without a GPU.
            An inherited CUDA_VISIBLE_DEVICES (numbers or UUIDs) is indexed by it.
    """
    launcher = ("GROUP_", "ROLE_", "TORCHELASTIC_", "MASTER_", "LOCAL_")
    kept = {k: v for k, v in environ.items() if not k.startswith(launcher)}
    for name in ("RANK", "WORLD_SIZE"):
        kept.pop(name, None)
    if device is not None:
        visible = environ.get("CUDA_VISIBLE_DEVICES")
        kept["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device].strip() if visible else str(device)
    return kept | {"LMDEPLOY_ENABLE_CHECK_ENV": "0"}  # else it starts a process that checks


def lmdeploy_problem() -> str:
    """Why LMDeploy cannot run here, in a line; empty if it can."""
    try:
        version = importlib.metadata.version("lmdeploy")
    except importlib.metadata.PackageNotFoundError:
        return f"lmdeploy {LMDEPLOY_VERSION} is not installed (README, Rollout engines)"
    if version != LMDEPLOY_VERSION:
        return f"lmdeploy {version} is installed, expected {LMDEPLOY_VERSION}"
    return "" if torch.cuda.is_available() else "lmdeploy needs CUDA"


class LMDeployEngine:
    """LMDeploy's PyTorch engine in a subprocess of its own, on this rank's GPU.

    Rollouts are those of `TorchEngine`: same steps, same record. `logprobs` is log g of the token at
    its reveal, computed in float32 from the engine's own logits after temperature, top-k and top-p;
    confidences likewise. A request's answer depends on its prompt and seed, not on its neighbours.

    The subprocess ends with this one, however this one ends. If it dies or falls silent it is started
    again and the unfinished requests are done again; after three deaths with no rollout in between
    the run stops. An autoregressive model (block_size=0) is served too: a token per step, no step map.

        engine = LMDeployEngine("JetLM/SDAR-8B-Chat", 4, tokenizer.mask_token_id, stop_ids(tokenizer))
        rollouts = engine.generate(prompts, seeds, Decoding(max_tokens=2048))
    """

    setup = ""  # module:function that the subprocess calls first; for tests
    start_seconds = 1800  # from the start to the first sign of readiness
    silence_seconds = 600  # without a forward pass or an answer

    def __init__(
        self,
        checkpoint: str,
        block_size: int,
        mask_id: int | None,
        stop_ids: list[int],
        max_batch: int = 256,
        dtype: str = "bfloat16",
        cache_gib: float = 0.0,
        log: str | Path = "rollout.log",
        options: dict[str, Any] | None = None,
    ):
        """Start the subprocess and wait until it is ready.

        Args:
            checkpoint: folder in the Hugging Face layout, or a hub id.
            block_size: 0 for an autoregressive model.
            cache_gib: key/value cache; 0: 40 % of what is free on the GPU now.
            log: what the subprocess prints goes to the end of this file.
            options: further fields of LMDeploy's PytorchEngineConfig.

        Raises:
            InputError: another version of LMDeploy, or the engine cannot start (its log is shown).
        """
        problem = lmdeploy_problem()
        if problem and not self.setup:
            raise InputError(f"config key engine: {problem}")
        self.checkpoint, self.block_size = find_folder(checkpoint), block_size or 1
        self.stop_ids, self.dtype = stop_ids, dtype
        self.log = Path(log)
        self.config = json.loads((self.checkpoint / "config.json").read_text())
        self.device = torch.cuda.current_device() if torch.cuda.is_available() else None
        page = 64  # tokens of a cache block, LMDeploy's default
        self._settings = {
            "checkpoint": str(self.checkpoint),
            "block_size": block_size,
            "mask_id": mask_id,
            "setup": self.setup,
            "options": {
                "dtype": dtype,
                "max_batch_size": max_batch,
                "session_len": self.config["max_position_embeddings"],
                "block_size": page,
                "num_gpu_blocks": self._cache_bytes(cache_gib) // (page * self._bytes_per_token()),
                "cudagraph_capture_batch_sizes": _batch_sizes(max_batch),
            }
            | (options or {}),
        }
        files = TensorFiles(self.checkpoint, "model")
        self._shapes = {name: files.shape(name) for name in files.parts}
        if not self._shapes:
            raise InputError(f"{checkpoint}: no weights, expected model*.safetensors")
        self._memory = os.memfd_create("weights")  # shared memory without a name: nothing to leave behind
        self._process: subprocess.Popen | None = None
        self._deaths = 0  # in a row
        self._own_weights = False  # the weights are no longer the checkpoint's
        self._lost = False  # and the subprocess does not have them
        self._asleep: set[str] = set()
        try:
            self._start()
        except _ChildDied as reason:
            self._kill()
            self._give_up(f"the rollout process did not start ({reason})")

    def _cache_bytes(self, gib: float) -> int:
        free = torch.cuda.mem_get_info()[0] if self.device is not None else 2**30
        return int(gib * 2**30) or int(0.4 * free)

    def _bytes_per_token(self) -> int:
        c = self.config
        head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        values = 2 * c["num_hidden_layers"] * c["num_key_value_heads"] * head_dim
        return values * getattr(torch, self.dtype).itemsize

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        self.log.parent.mkdir(parents=True, exist_ok=True)
        child = Path(__file__).with_name("lmdeploy_child.py")
        with theirs, open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(child), str(theirs.fileno()), str(self._memory)],
                pass_fds=(theirs.fileno(), self._memory),
                env=child_environment(os.environ, self.device),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is the parent's affair
            )
        self._asleep, self._lost = set(), self._own_weights
        self._send(self._settings)
        self._receive(self.start_seconds)

    def _give_up(self, reason: str) -> None:
        tail = self.log.read_text(errors="replace").splitlines()[-15:]
        tqdm.write("\n".join(["", f"last lines of {self.log}:", *tail]), file=sys.stderr)
        raise InputError(f"{reason}; its log is {self.log}")

    def _kill(self) -> None:
        self._connection.close()
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _receive(self, seconds: float) -> tuple:
        """The child's next message.

        Raises:
            _ChildDied: it is gone, or said nothing for so many seconds.
            RuntimeError: it reports an error; its traceback.
        """
        try:
            message = self._connection.recv() if self._connection.poll(seconds) else None
        except (OSError, EOFError):
            raise _ChildDied(f"exit code {self._process.wait()}") from None
        if message is None:
            raise _ChildDied(f"no sign of life for {seconds:.0f} s")
        if message[0] == "error":
            self._kill()
            raise RuntimeError(f"in the rollout process:\n{message[1]}")
        return message

    def _ask(self, name: str, *arguments: Any) -> Any:
        """Call a method of the child's Server and wait for its answer."""
        self._send((name, arguments))
        return self._receive(self.start_seconds)[1]

    def _send(self, message: Any) -> None:
        if self._process is None:
            raise _ChildDied("it is not running")
        try:
            self._connection.send(message)
        except OSError:
            raise _ChildDied(f"exit code {self._process.wait()}") from None

    def _died(self, reason: Exception) -> None:
        """Note a death; the third in a row ends the run."""
        self._kill()
        self._deaths += 1
        if self._deaths >= 3:
            self._give_up(f"the rollout process died {self._deaths} times in a row, the last time: {reason}")
        tqdm.write(f"the rollout process died ({reason}): starting it again", file=sys.stderr)

    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        how: Decoding,
        done: Callable[[Rollout], None] = lambda rollout: None,
    ) -> list[Rollout | None]:
        """One rollout per (prompt, seed), in that order. See `Engine`.

        Raises:
            InputError: bad prompts, see `check_prompts`; or the engine died three times in a row.
            RuntimeError: an error inside the engine, with its traceback.
        """
        answers: list[Rollout | None] = [None] * len(prompts)
        if prompts:
            check_prompts(prompts, how, self.block_size, self.config["max_position_embeddings"])
        todo = list(range(len(prompts)))
        while todo:
            try:
                if self._process is None:
                    self._start()
                if self._lost:
                    return answers
                self.wake()
                requests = [(i, prompts[i], seeds[i] % 2**63) for i in todo]
                self._send(("generate", (requests, how, self.stop_ids)))
                for i, rollout in self._rollouts(prompts, seeds):
                    answers[i] = rollout
                    done(rollout)
            except _ChildDied as reason:
                self._died(reason)
            todo = [i for i in todo if answers[i] is None]
        return answers

    def _rollouts(self, prompts: list[list[int]], seeds: list[int]) -> Iterable[tuple[int, Rollout]]:
        forwards, last_progress = -1, time.monotonic()
        while True:
            kind, *content = self._receive(self.silence_seconds)
            if kind == "done":
                return
            if kind == "alive" and content[0] == forwards:
                if time.monotonic() - last_progress > self.silence_seconds:
                    raise _ChildDied(f"no forward pass for {self.silence_seconds:.0f} s")
                continue
            last_progress = time.monotonic()
            if kind == "alive":
                (forwards,) = content
                continue
            index, record = content
            self._deaths = 0
            shown = record["response_ids"][: record["num_tokens"]]
            stop = next((i for i, v in enumerate(shown) if v in self.stop_ids), None)
            record["num_tokens"] = len(shown) if stop is None else stop + 1
            reason = "length" if stop is None else "stop"
            yield index, Rollout(prompts[index], **record, finish_reason=reason, seed=seeds[index])

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite the weights in place, a bucket at a time; a sleeping engine takes memory for them.

        The iterator is read to its end even if the subprocess dies, since every rank takes part in
        gathering it; the engine then starts again and wants the weights again (`generate_all`).

        Raises:
            ValueError: a tensor is missing, unknown or of another shape than in the checkpoint.
        """
        self._own_weights = self._lost = True
        expected, tied = dict(self._shapes), self.config.get("tie_word_embeddings")
        if tied:  # some checkpoints hold the tied tensor twice
            expected.pop("lm_head.weight", None)
        bucket = _Bucket(self)
        try:
            if self._process is None:
                self._start()
            if "weights" in self._asleep:
                self._ask("wake", ["weights"])
                self._asleep.remove("weights")
        except _ChildDied as reason:
            bucket.fail(reason)
        for parameter in tensors:
            for name, tensor, _ in as_published(*parameter):
                if tied and name == "lm_head.weight":
                    continue
                if name not in expected:
                    raise ValueError(f"weight update: unknown or repeated tensor {name}")
                if expected.pop(name) != list(tensor.shape):
                    raise ValueError(f"weight update: {name} has shape {tuple(tensor.shape)}")
                bucket.add(name, tensor)
        if expected:
            raise ValueError(f"weight update: missing tensor {min(expected)}")
        bucket.flush(last=True)
        self._lost = bucket.failed

    def sleep(self) -> int:
        """Drop weights, cache and graphs; bytes of GPU memory that came free. See `Engine`."""
        if self._asleep or self._process is None:
            return 0
        try:
            freed = self._ask("sleep")
        except _ChildDied as reason:
            self._died(reason)
            return 0
        self._asleep, self._own_weights, self._lost = {"weights", "kv_cache"}, True, True
        return freed

    def wake(self) -> None:
        """Take the memory again. Weights that `update_weights` did not bring meanwhile are lost."""
        if not self._asleep or self._process is None:
            return
        try:
            self._ask("wake", sorted(self._asleep, reverse=True))  # weights first
            self._asleep.clear()
        except _ChildDied as reason:
            self._died(reason)

    def close(self) -> None:
        """End the subprocess."""
        if self._process is not None:
            self._kill()
            os.close(self._memory)


class _Bucket:
    """Tensors on their way to the subprocess: one flat piece of memory that both can see.

    On the GPU it is a tensor shared by CUDA IPC, on the CPU anonymous shared memory. It grows to the
    largest single tensor if that is larger than BUCKET_BYTES.
    """

    def __init__(self, engine: LMDeployEngine):
        self.engine, self.failed = engine, False
        self.kind = getattr(torch, engine.dtype)
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.tensors: list[tuple[str, tuple[int, ...], int]] = []  # name, shape, offset in bytes
        self.used = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a tensor in; what is there goes out first if there is no room."""
        if self.failed:
            return
        size = tensor.numel() * self.kind.itemsize
        if self.used + size > len(self.memory):
            self.flush()
            if size > len(self.memory):
                self._grow(max(size, BUCKET_BYTES))
        if self.failed:
            return
        place = self.memory[self.used : self.used + size]
        place.view(self.kind).view(tensor.shape).copy_(tensor)
        self.tensors.append((name, tuple(tensor.shape), self.used))
        self.used += -(-size // 16) * 16

    def _grow(self, size: int) -> None:
        handle, self.memory = None, torch.empty(0, dtype=torch.uint8)  # the smaller one goes first
        if self.engine.device is None:
            os.ftruncate(self.engine._memory, size)
            self.memory = torch.frombuffer(mmap.mmap(self.engine._memory, size), dtype=torch.uint8)
        else:
            from torch.multiprocessing.reductions import reduce_tensor

            self.memory = torch.empty(size, dtype=torch.uint8, device=self.engine.device)
            handle = reduce_tensor(self.memory)
        self._ask("map_bucket", handle, size)

    def flush(self, last: bool = False) -> None:
        """Have the subprocess copy what is there over its live parameters."""
        if self.tensors or last:
            if self.memory.is_cuda:
                torch.cuda.synchronize()  # the subprocess reads on a stream of its own
            self._ask("load", self.tensors, self.engine.dtype, last)
        self.tensors, self.used = [], 0
        if last:
            self.memory = torch.empty(0, dtype=torch.uint8)
            if self.engine.device is not None:
                torch.cuda.ipc_collect()

    def _ask(self, *request: Any) -> None:
        try:
            if not self.failed:
                self.engine._ask(*request)
        except _ChildDied as reason:
            self.fail(reason)

    def fail(self, reason: Exception) -> None:
        """The subprocess died: nothing more is sent."""
        self.failed = True
        self.engine._died(reason)


def _batch_sizes(largest: int) -> list[int]:
    """Batch sizes that CUDA graphs are captured for: powers of two, up to `largest`."""
    return sorted({min(2**i, largest) for i in range(largest.bit_length() + 1)})


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
