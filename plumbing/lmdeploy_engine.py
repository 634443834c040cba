"""LMDeploy in a subprocess: the parent's side. lmdeploy_child.py is the other one.

The subprocess ends with this one, however this one ends. If it dies or falls silent it is started again
and the unfinished requests are done again; after three deaths with no answer in between the run stops.
Nothing here knows what a rollout is: requests go out, records come back, weights go over.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import mmap
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from plumbing.checkpoint import TensorFiles, as_published, check_weights, find_folder, gather_into
from plumbing.common import AT_END, ROOT, InputError, tell, writing
from plumbing.gpu import (
    BUCKET_BYTES,
    CACHE_PAGE,
    GIB,
    cache_bytes_per_token,
    engine_workspace,
    rest,
    room_for_cache,
    used_bytes,
)

LMDEPLOY_VERSION = "0.18.0"  # lmdeploy_child.py replaces private methods of this version
MESSAGES = {"done": 2, "alive": 2, "rollout": 3, "take": 1, "error": 2}  # what it says, and in how many parts
READ_SECONDS = 60  # for the rest of a message that has begun


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


class LMDeployProcess:
    """The subprocess of one rank, on that rank's GPU."""

    setup = ""  # module:function that the subprocess calls first; for tests
    launch = staticmethod(subprocess.Popen)  # starts it; in tests a fork of a process with the imports done
    start_seconds = 1800  # from the start to the first sign of readiness
    silence_seconds = 600  # without a forward pass or an answer

    def __init__(
        self,
        checkpoint: str | Path,
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
            cache_gib: key/value cache; 0: what `gpu.room_for_cache` finds, at most for max_batch
                responses of full length.
            log: what the subprocess prints goes to the end of this file.
            options: further fields of LMDeploy's PytorchEngineConfig.

        Raises:
            InputError: another version of LMDeploy, no room for a cache, or the engine cannot start (its
                log is shown).
        """
        # What the child is told, and what weights it will expect.
        problem = lmdeploy_problem()
        if problem and not self.setup:
            raise InputError(f"config key engine: {problem}")
        self.checkpoint, self.block_size = find_folder(checkpoint), block_size or 1
        self.stop_ids, self.dtype = stop_ids, dtype
        self.log = Path(log)
        self.config = json.loads((self.checkpoint / "config.json").read_text())
        self.positions = self.config["max_position_embeddings"]
        self.device = torch.cuda.current_device() if torch.cuda.is_available() else None
        files = TensorFiles(self.checkpoint, "model")
        self._shapes = {name: files.shape(name) for name in files.parts}
        if not self._shapes:
            raise InputError(f"{checkpoint}: no weights, expected model*.safetensors")
        self.max_batch, self.cache_gib, self._options = max_batch, cache_gib, options or {}
        self._settings = {"checkpoint": str(self.checkpoint.absolute()), "setup": self.setup}
        self._settings |= {"block_size": block_size, "mask_id": mask_id}

        # The state of the subprocess, as far as this side knows it.
        self._memory = os.memfd_create("weights")  # shared memory without a name: nothing to leave behind
        self._process: subprocess.Popen | None = None
        self._deaths = 0  # in a row
        self._own_weights = False  # the weights are no longer the checkpoint's
        self._lost = False  # and the subprocess does not have them
        self._asleep: set[str] = set()
        AT_END.append(self._kill)
        try:
            self._start()
        except _ChildDied as reason:
            self._kill()
            self._give_up(f"the rollout process did not start ({reason})")

    def _engine_options(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "max_batch_size": self.max_batch,
            "session_len": self.positions,
            "block_size": CACHE_PAGE,
            "num_gpu_blocks": self._pages(),
            "cudagraph_capture_batch_sizes": _batch_sizes(self.max_batch),
        }

    def _pages(self) -> int:
        """Blocks of the cache, from what is free on the GPU now, the trainer being at rest.

        Raises:
            InputError: there is no room for any.
        """
        # What one page holds, and what is left for them all.
        c = self.config
        head_dim = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        shape = SimpleNamespace(**c | {"head_dim": head_dim})
        page = CACHE_PAGE * cache_bytes_per_token(shape, getattr(torch, self.dtype).itemsize)
        room = self.cache_gib * GIB
        if not room and self.device is None:
            room = GIB
        elif not room:
            rest()
            sizes = [math.prod(size) for size in self._shapes.values()]
            workspace = engine_workspace(shape, self.max_batch * self.block_size)
            free = torch.cuda.mem_get_info()[0]
            room = room_for_cache(free, 2 * sum(sizes), workspace, max(sizes))

        # Not more than all requests can fill.
        most = -(-self.positions // CACHE_PAGE)  # of one request
        pages = min(int(room // page), self.max_batch * most)
        if pages < 1:
            raise InputError(
                f"config key max_batch: {self.max_batch}, and no room is left on the GPU for the engine's "
                f"cache ({room / GIB:.1f} GiB); expected fewer, or cache_gib"
            )
        return pages

    def _start(self) -> None:
        settings = self._settings | {"options": self._engine_options() | self._options}
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", READ_SECONDS, 0))
        self._connection = Connection(ours.detach())
        with writing(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            log = open(self.log, "ab")  # noqa: SIM115, closed below
        with theirs, log:
            self._process = self.launch(
                [sys.executable, "-m", "plumbing.lmdeploy_child", str(theirs.fileno()), str(self._memory)],
                cwd=ROOT,
                pass_fds=(theirs.fileno(), self._memory),
                env=child_environment(os.environ, self.device),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is the parent's affair
            )
        self._asleep, self._lost = set(), self._own_weights
        self._send(settings)
        _, self.longest = self._receive(self.start_seconds)  # request, in tokens, that its cache can hold

    def _give_up(self, reason: str) -> None:
        tell(f"last lines of {self.log}:")
        for line in self.log.read_text(errors="replace").splitlines()[-15:]:
            tell(f"  {line}")
        raise InputError(f"{reason}; its log is {self.log}")

    def _kill(self) -> None:
        self._connection.close()
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _end(self) -> str:
        """How the subprocess ended, whose connection broke."""
        try:
            return f"exit code {self._process.wait(timeout=5)}"
        except subprocess.TimeoutExpired:
            return "it does not speak any more"

    def _receive(self, seconds: float) -> tuple:
        """The child's next message.

        Raises:
            _ChildDied: it is gone, or said nothing for so many seconds.
            InputError: it is out of GPU memory.
            RuntimeError: it reports another error; its traceback.
        """
        try:
            message = self._connection.recv() if self._connection.poll(seconds) else None
        except (OSError, EOFError):
            raise _ChildDied(self._end()) from None
        except Exception as error:  # whatever unpickling garbage raises
            raise _ChildDied(f"its message is garbled ({type(error).__name__})") from None
        if message is None:
            raise _ChildDied(f"no sign of life for {seconds:.0f} s")
        if not isinstance(message, tuple) or len(message) != MESSAGES.get(message[0] if message else ""):
            raise _ChildDied("its message is garbled")
        if message[0] == "error":
            self._kill()
            if "OutOfMemoryError" in message[1]:
                raise InputError(
                    f"config key cache_gib: {self.cache_gib}: the rollout process is out of GPU memory, of "
                    f"which {used_bytes() / GIB:.1f} GiB are used without it; expected a smaller cache_gib "
                    f"or max_batch; its log is {self.log}"
                )
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
            raise _ChildDied(self._end()) from None

    def _died(self, reason: Exception) -> None:
        """Note a death; the third in a row ends the run."""
        self._kill()
        self._deaths += 1
        if self._deaths >= 3:
            self._give_up(f"the rollout process died {self._deaths} times in a row, the last time: {reason}")
        tell(f"the rollout process died ({reason}): starting it again")

    def check_room(self, tokens: int) -> None:
        """Refuse requests of more tokens than the cache holds: LMDeploy would cut them short without a word.

        Raises:
            InputError: naming cache_gib.
        """
        if tokens > self.longest:
            raise InputError(
                f"config key cache_gib: {self.cache_gib}, and the engine's cache has room for a request of "
                f"{self.longest} tokens; a prompt and its response need {tokens}"
            )

    def records(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        how: Any,
        so_far: list[tuple[list[int], int]],
        take: Callable[[], int | None] | None = None,
    ) -> Iterator[tuple[int, dict[str, list]]]:
        """(index, record) of each request as it stops; ends early if the weights were lost on the way.

        Args:
            how: the settings, which the child's `generate` understands.
            so_far: what a request goes on behind: tokens after its prompt, and the steps that revealed them.
            take: the index of the next request, whenever the child has room; None: no more. Without it the
                child has all of them at once.
        """

        def request(i: int) -> tuple:
            return i, prompts[i], seeds[i] % 2**63, *so_far[i]

        def taken() -> tuple | None:
            if (i := take()) is None:
                return None
            todo[i] = None
            return request(i)

        todo = {} if take else dict.fromkeys(range(len(prompts)))  # an ordered set
        while todo or take:
            try:
                if self._process is None:
                    self._start()
                if self._lost:
                    return
                self.wake()
                known = [request(i) for i in todo]
                self._send(("generate", (known, how, self.stop_ids, self.max_batch if take else 0)))
                for i, record in self._receive_records(taken):
                    del todo[i]
                    yield i, record
                return
            except _ChildDied as reason:
                self._died(reason)

    def _receive_records(self, taken: Callable[[], tuple | None]) -> Iterator[tuple[int, dict[str, list]]]:
        """What the child sends until it is done.

        Args:
            taken: what it gets when it asks for a further request.

        Raises:
            _ChildDied: it died, or its network made no pass for silence_seconds.
        """
        forwards, last_progress = -1, time.monotonic()
        while True:
            tag, *content = self._receive(self.silence_seconds)
            if tag == "done":
                return
            if tag == "alive" and content[0] == forwards:
                if time.monotonic() - last_progress > self.silence_seconds:
                    raise _ChildDied(f"no forward pass for {self.silence_seconds:.0f} s")
                continue
            last_progress = time.monotonic()
            if tag == "take":
                self._send(taken())
                continue
            if tag == "alive":
                (forwards,) = content
                continue
            self._deaths = 0
            yield content[0], content[1]

    def update_weights(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite the weights in place, a bucket at a time; a sleeping engine takes memory for them.

        Everything is gathered even if the subprocess dies, since every rank takes part in that; the engine
        then starts again and wants the weights again (`rollout.generate_all`).

        Raises:
            ValueError: a tensor is missing, unknown or of another shape than in the checkpoint.
        """
        self._own_weights = self._lost = True
        bucket = _Bucket(self)
        try:
            if self._process is None:
                self._start()
            if "weights" in self._asleep:
                self._ask("wake", ["weights"])
                self._asleep.remove("weights")
        except _ChildDied as reason:
            bucket.fail(reason)
        tied = self.config.get("tie_word_embeddings")
        for name, view in check_weights(bucket.published(tensors), self._shapes, tied):
            bucket.add(name, view)
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
        if self._kill in AT_END:
            AT_END.remove(self._kill)


class _Bucket:
    """Tensors on their way to the subprocess: one flat piece of memory that both can see.

    On the GPU it is a tensor shared by CUDA IPC, on the CPU anonymous shared memory. It grows to the
    largest single parameter if that is larger than BUCKET_BYTES. Slices of all ranks are gathered right
    into it, so an update takes no more than this.
    """

    def __init__(self, engine: LMDeployProcess):
        self.engine, self.failed = engine, False
        self.dtype = getattr(torch, engine.dtype)
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.tensors: list[tuple[str, tuple[int, ...], int]] = []  # name, shape, offset in bytes
        self.used = 0

    def published(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters as they come, gathered into the bucket, as views under the names of checkpoints.

        What is there goes out first if there is no room.
        """
        for name, tensor in tensors:
            size = tensor.numel() * self.dtype.itemsize
            if self.used + size > len(self.memory):
                self.flush()
                if size > len(self.memory):
                    self._grow(max(size, BUCKET_BYTES))
            place = self.memory[self.used : self.used + size].view(self.dtype).view(tensor.shape)
            gather_into(place, tensor)
            self.used += -(-size // 16) * 16
            for published, view, _ in as_published(name, place):
                yield published, view
            del place, view  # else they would keep a bucket that a larger one replaces

    def add(self, name: str, view: torch.Tensor) -> None:
        """Have a view of the bucket sent under this name."""
        self.tensors.append((name, tuple(view.shape), view.storage_offset() * view.itemsize))

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
