"""Inside the rollout subprocess: LMDeploy's PyTorch engine, corrected in four places, and a recorder.

lmdeploy_engine.py starts this file, one process per rank, and talks to it over a socket pair. It is a
program of its own that nobody imports, which is why it may import rollout.py. The engine is LMDeploy
0.18.0 as published; what is changed in it is changed here, in this process only:

    fix_stop_words      upstream pytorch/strategies/dllm/sequence.py:122
    fix_sampling        upstream pytorch/strategies/dllm/sampling.py:47-59 and ar/sampling.py:94
    fix_drawing         upstream pytorch/engine/logits_process.py:502-545
    float32 confidence  upstream pytorch/strategies/dllm/unmasking.py:20     (in record_steps)
    record_steps        what upstream does not return: the step map, the log-probability of every token
                        at its reveal, and below which probability a draw was held

Each function says what it corrects; tests/test_lmdeploy.py fails without each of them. They replace
private methods, so any other version of LMDeploy is refused.

Left out on purpose: tensor parallelism (needs ray), prefix caching (stale after a weight update).
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import mmap
import os
import sys
import threading
import traceback
from collections import defaultdict, deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from model import sampling_logprobs
from plumbing.common import Forgiving
from plumbing.kernels import log_normalizer
from plumbing.lmdeploy_engine import LMDEPLOY_VERSION
from rollout import Decoding, dithered, exact_record, held_mass, reveal

if TYPE_CHECKING:
    from collections.abc import Iterable

HEARTBEAT_SECONDS = 1.0
DRAW_ROWS = 64  # rows of logits that are worked on at once: what is made of them is so many times V large
PICK_RUN = 128  # tokens; divides the 151,936 of Qwen3, where nothing has to be padded


@dataclass
class Recorder:
    """What the patched methods share: how this call decodes, and what has been recorded."""

    how: Decoding
    forwards: int  # passes of the network so far: a sign of life
    finished: dict[int, dict[str, list]]  # by session: the fields of a trajectory
    drawn: list[torch.Tensor]  # of the forward in hand: log p and log g of what was drawn, [rows] each
    log_tau: torch.Tensor | None = None  # [rows] what log p has to reach there, if thresholds are dithered
    before: dict[int, int] = field(default_factory=dict)  # by session: forwards in earlier calls


RECORDER = Recorder(Decoding(), 0, {}, [])


def install(mask_id: int) -> None:
    """Apply all patches; call it once, before the engine is built.

    Raises:
        RuntimeError: another version of LMDeploy than the one whose methods are replaced.
    """
    import lmdeploy
    from lmdeploy.utils import get_logger

    get_logger("lmdeploy").setLevel("WARNING")
    if lmdeploy.__version__ != LMDEPLOY_VERSION:
        raise RuntimeError(f"lmdeploy {lmdeploy.__version__} is installed, expected {LMDEPLOY_VERSION}")
    use_mask_id(mask_id)
    fix_stop_words()
    fix_sampling()
    fix_drawing()
    record_steps()


def use_mask_id(mask_id: int) -> None:
    """Upstream pytorch/configurations/sdar.py:16 knows one mask token, 151669; take the tokenizer's."""
    from lmdeploy.pytorch.configurations.sdar import SDARModelConfigBuilder as Builder

    build = Builder.build.__func__

    def with_mask_id(cls, *args, **kwargs):
        config = build(cls, *args, **kwargs)
        config.dllm_mask_token = mask_id
        return config

    Builder.build = classmethod(with_mask_id)


def fix_stop_words() -> None:
    """See stop words in the block that holds the prompt's tail.

    Upstream counts where the answer begins from the prompt *after* it was filled up with masks to a
    whole block, so a stop word in those places is taken for the prompt's and generation goes on.
    """
    from lmdeploy.pytorch.strategies.dllm.sequence import SchedulerSequenceDLLM as Sequence

    append = Sequence._update_token_ids_inputs

    def _update_token_ids_inputs(self, token_ids, dllm_mask):
        append(self, token_ids, dllm_mask)
        self.output_start_pos = self.num_valid_ids

    Sequence._update_token_ids_inputs = _update_token_ids_inputs


def fix_sampling() -> None:
    """Give every row its own request's settings, and every position its own random numbers.

    The rows of a batch are request after request, B positions each. Upstream repeats the settings the
    other way round (position after position), so requests get each other's seeds, temperatures and
    top-k. And it draws from (seed, offset) alone, one pair per request: all positions of a block draw
    the same number. Together, 16 copies of a prompt with 16 seeds gave 4 answers; a group of identical
    rollouts has no advantage to learn from. And it keeps 32 bits of a seed, where the run's own seed is above
    bit 40 (dipo.sample_groups): two runs would share every random number. And it counts offsets from the
    tokens that are there when a request is prefilled, one for each forward from then on: a request that was
    preempted would go on with other numbers than without, some of them a second time. Here it is forwards
    from the beginning, those of earlier calls included if the request goes on from them.
    """
    from lmdeploy.pytorch.strategies.ar.sampling import ARSamplingStrategy as Base
    from lmdeploy.pytorch.strategies.dllm.sampling import DLLMSamplingStrategy as Strategy

    # All 63 bits of a seed, for autoregressive models too.
    make_base = Base.make_sampling_inputs

    def with_whole_seeds(self, seqs):
        inputs = make_base(self, seqs)
        if inputs.random_seeds is not None or RECORDER.how.dither:  # None if all are greedy
            inputs.random_seeds = torch.tensor([seq.sampling_param.random_seed for seq in seqs])
        inputs.temperature = None  # `draw` divides by it
        return inputs

    Base.make_sampling_inputs = with_whole_seeds

    # [B * S] settings become [S * B]; the seed of a position is the request's and the position's.
    per_row = ("temperature", "repetition_penalty", "top_k", "top_p", "min_p", "random_seeds")
    per_row += ("random_offsets", "num_ignore_eos", "repetition_ngram_size", "repetition_ngram_threshold")
    make = Strategy.make_sampling_inputs

    def make_sampling_inputs(self, seqs):
        inputs, block_size = make(self, seqs), self.dllm_block_length
        for name in per_row:
            value = getattr(inputs, name, None)
            if value is not None:  # [B * S] -> [S * B]
                setattr(inputs, name, value.view(block_size, len(seqs)).T.reshape(-1))
        if inputs.random_seeds is not None:  # 64 bits wrap around
            position = torch.arange(block_size).repeat(len(seqs))
            inputs.random_seeds = inputs.random_seeds + position * 0x1E3779B97F4A7C15
        before = [RECORDER.before.get(seq.session_id, 0) for seq in seqs]
        forwards = torch.tensor(before) + torch.tensor([getattr(seq, "forwards", 0) for seq in seqs])
        inputs.random_offsets = forwards.repeat_interleave(block_size)
        return inputs

    Strategy.make_sampling_inputs = make_sampling_inputs


def fix_drawing() -> None:
    """Draw tokens in float32 and without sorting, from the same g as the trainer's.

    Upstream sorts all logits of every row at every step, also if nothing is cut off: values, indices and
    probabilities, [rows, V] in 12 bytes an element, and what the sort itself needs. And it cuts in the dtype
    of the LM head, with rounded sums, and of equal logits it keeps any: the trainer then holds tokens
    impossible that were drawn. It also rounds the temperature to that dtype: 0.7 becomes 0.6992.
    """
    from lmdeploy.pytorch.engine.logits_process import FusedLogitsProcessor

    def sampling(self, logits):
        settings = self.sampling_inputs
        how, seeds, offsets = RECORDER.how, settings.random_seeds, settings.random_offsets
        drawn, *RECORDER.drawn = draw(logits, seeds, offsets, how)
        RECORDER.log_tau = None
        if how.dither:  # from other numbers than the draws
            RECORDER.log_tau = dithered(uniform(~seeds, offsets), how).to(logits.device).float()
        return drawn

    FusedLogitsProcessor.sampling = torch.inference_mode()(sampling)


def draw(
    logits: torch.Tensor, seeds: torch.Tensor | None, offsets: torch.Tensor, how: Decoding
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A token per row, its log p and its log g: [rows] each, the latter two in float32.

    Args:
        logits: [rows, V], without what is banned. p is their softmax after temperature, g is p after
            top-k, then top-p: the distributions of `model.sampling_logprobs`.
        seeds: [rows] int64, with `offsets` all that a draw depends on; None if all rows are greedy.
        offsets: [rows] int64, other ones at each step.
    """
    greedy, cut = how.top_k == 1, how.top_k > 0 or how.top_p < 1.0
    points = torch.zeros(len(logits), device=logits.device) if greedy else uniform(seeds, offsets)
    results = []
    for part, point in zip(logits.split(DRAW_ROWS), points.split(DRAW_ROWS), strict=True):
        if cut and not greedy:
            log_p, log_g = sampling_logprobs(part, how)
            drawn = pick(log_g.exp(), point)[:, None]
            results.append((drawn, log_p.gather(-1, drawn), log_g.gather(-1, drawn)))
            continue
        # Without a cut g is p, and no [rows, V] log-probabilities are needed.
        part = part.float() if how.temperature == 1.0 else part.float() / how.temperature
        best = part.amax(-1, keepdim=True)
        weights = (part - best).exp_()
        drawn = part.argmax(-1, keepdim=True) if greedy else pick(weights, point)[:, None]
        log_p = part.gather(-1, drawn) - best - log_normalizer(weights)
        results.append((drawn, log_p, torch.zeros_like(log_p) if greedy else log_p))
    return tuple(torch.cat(parts)[:, 0] for parts in zip(*results, strict=True))


def pick(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Where the distribution function of each row of weights [rows, V] passes its point in [0, 1): [rows].

    First the run of PICK_RUN tokens, then the token in it, so that nothing else is as large as the weights.
    A token of weight 0 is never picked.
    """
    missing = -weights.shape[-1] % PICK_RUN
    runs = (F.pad(weights, (0, missing)) if missing else weights).unflatten(-1, (-1, PICK_RUN))
    mass = runs.sum(-1, dtype=torch.double)
    end = mass.cumsum(-1)  # [rows, runs]
    points = points[:, None] * end[:, -1:]
    run = torch.searchsorted(end, points, right=True).clamp(max=end.shape[-1] - 1)
    points = points - (end - mass).gather(-1, run)

    inside = runs.gather(1, run[..., None].expand(-1, -1, PICK_RUN))[:, 0].double().cumsum(-1)
    below_end = inside[:, -1:].nextafter(torch.zeros_like(points))  # where rounding passed the end
    return (run * PICK_RUN + torch.searchsorted(inside, points.minimum(below_end), right=True))[:, 0]


def uniform(seeds: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1) [rows], float64, from all 64 bits of each (seed, offset): SplitMix64, twice."""
    return ((_mix(_mix(seeds) + offsets) >> 11) & (2**53 - 1)).double() * 2.0**-53


def _mix(x: torch.Tensor) -> torch.Tensor:
    """One output of SplitMix64 (Steele, Lea and Flood 2014) for each state x, int64 that wraps around."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


def held_masses(logits: torch.Tensor, bounds: torch.Tensor, how: Decoding) -> torch.Tensor:
    """Log-probability [rows] that a draw is held below its bound [rows]; logits as for `draw`."""
    masses = []
    for part, bound in zip(logits.split(DRAW_ROWS), bounds.split(DRAW_ROWS), strict=True):
        masses.append(held_mass(*sampling_logprobs(part, how), bound, how))
    return torch.cat(masses)


def record_steps() -> None:
    """Record, per request, at which step each token was revealed, with which log g, and what held till then.

    `update_running` runs once per forward for every running request, so what became of the masks
    between two calls is the step map. A forward that only writes a finished block to the cache
    reveals nothing and is no step. What is revealed is decided by `rollout.reveal`, on log-probabilities in
    float32: upstream takes the softmax in the dtype of the LM head, where bfloat16 ties neighbours and turns
    a threshold of 0.9 into 0.8965.
    """
    record_forwards()
    record_requests()


def record_forwards() -> None:
    """The part of `record_steps` at the model: what a forward drew, and what was revealed of it."""
    from lmdeploy.pytorch.consts import DLLM_CACHED, DLLM_MASKED, DLLM_UNMASKED
    from lmdeploy.pytorch.strategies.dllm import model_agent, unmasking

    Unmasking, Agent = unmasking.UnmaskingProcessor, model_agent.DLLMModelAgentStrategy

    @dataclass
    class Outputs(model_agent.DLLMExtraOutputs):  # its tensors are copied to the CPU with the others
        logprobs: torch.Tensor  # [S * B] log g of what was drawn
        bounds: torch.Tensor  # [S * B] log p below which a draw was held; empty if holds are not recorded
        hold_logprobs: torch.Tensor  # [S * B] log-probability of that; likewise

    # The sampled tokens arrive: the rule decides which of them are revealed.
    def unmask_and_record(self, logits, input_ids, token_ids, dllm_mask):
        how, blocks = RECORDER.how, dllm_mask.view(-1, self.dllm_config.block_length)
        log_p, log_g = (logprob.view_as(blocks) for logprob in RECORDER.drawn)
        masked, complete = blocks == DLLM_MASKED, (blocks == DLLM_UNMASKED).all(-1, keepdim=True)
        token_ids = torch.where(masked.flatten(), token_ids, input_ids)
        log_tau = None if RECORDER.log_tau is None else RECORDER.log_tau.view_as(blocks)
        revealed = reveal(log_p, masked, how, log_tau)
        bounds = masses = log_g.flatten()[:0]
        if how.holds:
            log_g, bounds = exact_record(log_p, log_g, masked, revealed, how, log_tau)
            bounds = bounds.flatten()
            masses = held_masses(logits, bounds, how)
        self.record = log_g.flatten(), bounds, masses

        # A block that was complete before this forward is in the cache after it.
        blocks = blocks.masked_fill(complete, DLLM_CACHED).masked_fill(revealed, DLLM_UNMASKED)
        return blocks.flatten(), token_ids

    def make_extra_outputs(self, extra_inputs):
        return Outputs(extra_inputs.dllm_mask, *self.unmasking_processor.record)

    Unmasking.__call__ = unmask_and_record
    Agent.make_extra_outputs = make_extra_outputs


def record_requests() -> None:
    """The part of `record_steps` at the scheduler: what became of the masks of each request."""
    from lmdeploy.pytorch.consts import DLLM_MASKED, DLLM_UNMASKED
    from lmdeploy.pytorch.strategies.dllm import sequence

    Strategy, Sequence = sequence.DLLMSequenceStrategy, sequence.SchedulerSequenceDLLM
    update_running = Strategy.update_running
    decode, set_stop_pos = Sequence._update_token_ids_decode, Sequence.set_stop_pos

    # The result of a forward arrives: keep each request's part of it.
    def update_running_and_record(self, running, batched_outputs, *args, **kwargs):
        extra, n = batched_outputs.extra_outputs, len(running)
        parts = (t.view(n, -1).tolist() for t in (extra.logprobs, extra.bounds, extra.hold_logprobs))
        for request, *latest in zip(running, *parts, strict=True):
            request.latest = latest
        RECORDER.forwards += 1
        return update_running(self, running, batched_outputs, *args, **kwargs)

    # Its masks change: what was revealed is a step.
    def _update_token_ids_decode(self, token_ids, dllm_mask):
        self.forwards = getattr(self, "forwards", 0) + 1
        start = self.num_history_ids
        before = self.history_dllm_mask[start : start + len(dllm_mask)]
        revealed = np.flatnonzero((before == DLLM_MASKED) & (dllm_mask == DLLM_UNMASKED))
        if len(revealed):
            record = self.__dict__.setdefault("record", {})
            holds = self.__dict__.setdefault("holds", defaultdict(list))
            self.step = getattr(self, "step", 0) + 1
            logprob, bounds, hold_logprobs = self.latest
            record.update((start + int(i), (self.step, logprob[i])) for i in revealed)
            for i in np.flatnonzero(dllm_mask == DLLM_MASKED) if bounds else ():
                holds[start + int(i)].append((bounds[i], hold_logprobs[i]))
        decode(self, token_ids, dllm_mask)

    # Its last block is complete: the record leaves, once per request.
    def set_stop_pos_and_record(self, pos):
        end, first = self.num_valid_ids, self.num_valid_ids - self.num_new_tokens
        steps, logprobs = zip(*(self.record[i] for i in range(first, end)), strict=True)
        ids = self.history_cache[first:end].tolist()
        set_stop_pos(self, pos)
        record = {"response_ids": ids, "steps": list(steps), "logprobs": list(logprobs)}
        if RECORDER.how.holds:
            holds = [self.holds[i] for i in range(first, end)]
            record["hold_bounds"] = [[bound for bound, _ in of_token] for of_token in holds]
            record["hold_logprobs"] = [[logprob for _, logprob in of_token] for of_token in holds]
        RECORDER.finished[self.session_id] = record

    Strategy.update_running = update_running_and_record
    Sequence._update_token_ids_decode = _update_token_ids_decode
    Sequence.set_stop_pos = set_stop_pos_and_record


def forwards_before(prompt_tokens: int, own_tokens: int, steps: int, block_size: int) -> int:
    """Forwards that a request has had when it goes on behind own tokens, revealed in so many steps.

    One per step, and one per block that leaves it in the cache; before them the prompt's prefill, which
    is a step already unless the prompt is whole blocks. The prefill of the own blocks is the one that leaves
    the last of them in the cache, and counts itself.
    """
    blocks = (prompt_tokens + own_tokens) // block_size - prompt_tokens // block_size
    return steps + blocks - 1 + (prompt_tokens % block_size == 0)


class Server:
    """The engine, and what the parent can ask of it: every public method is a request."""

    def __init__(self, conn: Connection, settings: dict[str, Any], weights_fd: int, messages: asyncio.Queue):
        from lmdeploy.messages import PytorchEngineConfig
        from lmdeploy.pytorch.engine import Engine

        self.conn, self.weights_fd, self.messages = conn, weights_fd, messages
        self.block_size = settings["block_size"]
        options = dict(settings["options"])
        if self.block_size:
            options |= {"dllm_block_length": self.block_size, "dllm_denoising_steps": 1}
        config = PytorchEngineConfig(distributed_executor_backend="uni", enable_metrics=False, **options)
        self.engine = Engine.from_pretrained(settings["checkpoint"], engine_config=config)
        self.agent = self.engine.executor.model_agent
        self.engine.start()
        self.instance = self.engine.create_instance()
        self.sessions = itertools.count(1)
        self.bucket = torch.empty(0, dtype=torch.uint8)

    async def generate(
        self,
        requests: list[tuple[int, list[int], int, list[int], int]],
        how: Decoding,
        stop_ids: list[int],
        room: int = 0,
    ) -> None:
        """Answer (index, prompt, seed, own tokens, their steps) requests; each is sent back as it stops.

        Args:
            room: how many to run at a time, with others from the parent when there is room; 0: only these.
        """
        RECORDER.how = how
        if self.block_size:
            config = self.agent.agent_strategy.unmasking_processor.dllm_config
            strategy = how.rule if how.rule == "sequential" else f"low_confidence_{how.rule}"
            config.unmasking_strategy = type(config.unmasking_strategy).from_str(strategy)
            config.denoising_steps, config.confidence_threshold = how.denoising_steps, how.threshold
        beating = asyncio.create_task(self._beat())
        waiting, asking = deque(requests), asyncio.Lock()

        async def answer_some() -> None:
            while waiting or room:
                if waiting:
                    request = waiting.popleft()
                else:
                    async with asking:  # what comes next over the connection is the reply
                        self.conn.send(("take",))
                        request = await self.messages.get()
                if request is None:
                    return
                await self._answer(*request, how, stop_ids)

        try:
            await asyncio.gather(*(answer_some() for _ in range(room or len(requests))))
        finally:
            beating.cancel()

    async def _beat(self) -> None:
        while True:
            self.conn.send(("alive", RECORDER.forwards))
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _answer(
        self,
        index: int,
        prompt: list[int],
        seed: int,
        own: list[int],
        steps: int,
        how: Decoding,
        stop_ids: list[int],
    ) -> None:
        from lmdeploy.messages import GenerationConfig, ResponseType

        room = how.max_tokens - len(own)
        room = min(room, how.partial_tokens or room)
        config = GenerationConfig(
            max_new_tokens=room,
            do_sample=True,  # not looked at on this path: greedy is top_k=1
            top_k=how.top_k,
            top_p=how.top_p,
            temperature=how.temperature,
            random_seed=seed,
            stop_token_ids=stop_ids,
            bad_token_ids=list(how.banned_ids),
            min_new_tokens=min(max(how.min_tokens - len(own), 0), room),
        )

        # Run the request until it stops.
        session, ids, status = next(self.sessions), [], None
        if own:
            RECORDER.before[session] = forwards_before(len(prompt), len(own), steps, self.block_size)
        async for out in self.instance.async_stream_infer(session, prompt + own, gen_config=config):
            ids, status = ids + list(out.token_ids or []), out.status
            RECORDER.forwards += not self.block_size
        await self.instance.async_end(session)
        RECORDER.before.pop(session, None)

        # Send its record.
        if self.block_size:
            record = RECORDER.finished.pop(session, None)
        else:  # an autoregressive model: a token per forward, nothing to replay
            record = {"response_ids": ids, "steps": list(range(1, len(ids) + 1))}
            record["logprobs"] = []
        if record is None or status not in (ResponseType.SUCCESS, ResponseType.FINISH):
            raise RuntimeError(f"lmdeploy ended a request of {len(prompt)} tokens with {status}")
        self.conn.send(("rollout", index, record))

    async def map_bucket(self, handle: tuple | None, size: int) -> None:
        """Where the next weights lie: a CUDA tensor of the parent, or `size` bytes of shared memory."""
        if handle is None:
            self.bucket = torch.frombuffer(mmap.mmap(self.weights_fd, size), dtype=torch.uint8)
            return
        rebuild, arguments = handle
        arguments = list(arguments)
        arguments[6] = torch.cuda.current_device()  # the same GPU, by this process's own number
        self.bucket = rebuild(*arguments)

    async def load(self, tensors: list[tuple[str, tuple[int, ...], int]], dtype: str, last: bool) -> None:
        """Copy (name, shape, offset in bytes) tensors of the bucket over the live parameters."""
        from lmdeploy.pytorch.weight_loader.model_weight_loader import process_weights_after_loading

        def views() -> Iterable[tuple[str, torch.Tensor]]:
            format = getattr(torch, dtype)
            for name, shape, offset in tensors:
                size = int(np.prod(shape)) * format.itemsize
                yield name, self.bucket[offset : offset + size].view(format).view(shape)

        model = self.agent.patched_model.get_model()
        places = [p.data_ptr() for p in model.parameters()]
        with self.agent.all_context():
            model.load_weights(views())
            if last:
                process_weights_after_loading(model)
        torch.cuda.synchronize()
        if places != [p.data_ptr() for p in model.parameters()]:  # a mixture of experts is laid out anew
            self.agent.reset_graph_runner()  # captured graphs read the old places
        if last:
            self.bucket = torch.empty(0, dtype=torch.uint8)

    async def sleep(self) -> int:
        """Drop weights, cache and graphs; bytes of GPU memory that came free."""
        before = torch.cuda.mem_get_info()[0]
        await self.engine.sleep(2)
        return torch.cuda.mem_get_info()[0] - before

    async def wake(self, tags: list[str]) -> None:
        """Take memory again: "weights", empty until they are loaded, and "kv_cache" with the graphs."""
        self.engine.wakeup(tags)


def serve(conn: Connection, weights_fd: int) -> None:
    """Build the engine as the first message says, then answer requests until the parent is gone."""
    settings = conn.recv()
    messages: asyncio.Queue = asyncio.Queue()

    # A thread reads, so that the end of the parent is noticed whatever the engine does.
    def listen(loop: asyncio.AbstractEventLoop) -> None:
        while True:
            try:
                message = conn.recv()
            except (EOFError, OSError):  # the parent closed its end or died: so do we, whatever we do
                os._exit(0)
            loop.call_soon_threadsafe(messages.put_nowait, message)

    # Requests are answered one after the other; an error is reported and the next one is taken.
    async def answer() -> None:
        threading.Thread(target=listen, args=(asyncio.get_running_loop(),), daemon=True).start()
        server = Server(conn, settings, weights_fd, messages)
        conn.send(("done", server.engine.max_session_len))
        while True:
            name, arguments = await messages.get()
            try:
                conn.send(("done", await getattr(server, name)(*arguments)))
            except Exception:
                conn.send(("error", traceback.format_exc()))

    if settings["setup"]:  # a hook for tests: module:function
        module, function = settings["setup"].split(":")
        getattr(importlib.import_module(module), function)()
    install(settings["mask_id"])
    asyncio.run(answer())


if __name__ == "__main__":
    sys.stdout, sys.stderr = Forgiving(sys.stdout), Forgiving(sys.stderr)
    socket_fd, memory_fd = map(int, sys.argv[1:])
    try:
        serve(Connection(socket_fd), memory_fd)
    except (EOFError, BrokenPipeError):
        sys.exit(0)
