"""Work as it comes: requests from one queue for all ranks, and results that are looked at early."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch.distributed as dist

from plumbing.ranks import exchange, gather, rank_and_world

_NUMBERS = itertools.count()  # of the queues: every rank makes the same ones, in the same order


class Request(NamedTuple):
    """What an engine needs for one rollout."""

    seed: int  # no other request has it
    index: int  # of the question
    prompt: list[int]
    begun: Any  # the rollout that it goes on with, or None


class SharedQueue:
    """The requests of all ranks, of which each goes to one rank, when it has room; make it on every rank.

    What fits in the beginning is dealt out in turn: rank 1 of 2 begins with 1, 3, 5. After that a rank that
    has room takes the next number, from a counter in the process group's store: who that is depends on how
    fast they are. A process alone takes 0, 1, 2 and so on.

    Args:
        own: requests of this rank.
        room: requests that every rank can run at a time.
    """

    def __init__(self, own: list[Request], room: int):
        rank, world = rank_and_world()
        self._by_rank = gather(own)
        self.requests = sorted(itertools.chain.from_iterable(self._by_rank))
        dealt = min(room, len(self.requests) // world) * world
        self._own = deque(range(rank, dealt, world))
        self._rest = range(dealt, len(self.requests))
        self._key = f"plumbing.queue {next(_NUMBERS)}"
        self._store = dist.distributed_c10d._get_default_store() if world > 1 else dist.HashStore()
        self.taken: dict[int, None] = {}  # by this rank, in order

    def take(self) -> int | None:
        """The index of a request for this rank to run; None: there is none left."""
        if not self._own and self._rest:
            number = self._store.add(self._key, 1) - 1
            if number < len(self._rest):
                self._own.append(self._rest[number])
            else:
                self._rest = range(0)
        if not self._own:
            return None
        self.taken[self._own[0]] = None
        return self._own.popleft()

    def put_back(self, numbers: Iterable[int]) -> None:
        """Let this rank take these again, before any others: they came to nothing."""
        self._own.extendleft(reversed(list(numbers)))

    def bring_home(self, items: dict[int, Any]) -> dict[int, Any]:
        """What all ranks have for this rank's own requests, by seed; call it on every rank."""
        parcels = []
        for of_rank in self._by_rank:
            parcels.append({r.seed: items[r.seed] for r in of_rank if r.seed in items})
        return exchange(parcels)


class Ahead:
    """Looks at results in a thread while others are made, all that wait at once.

    Args:
        look: what it makes of a list of items, in order.
    """

    def __init__(self, look: Callable[[list[Any]], list[Any]]):
        self._look = look
        self._waiting: deque[tuple[Hashable, Any]] = deque()
        self._found: dict[Hashable, Any] = {}
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._calls: list[Future] = []

    def add(self, key: Hashable, item: Any) -> None:
        """Have an item looked at."""
        self._waiting.append((key, item))
        self._calls.append(self._thread.submit(self._look_at_all))

    def _look_at_all(self) -> None:
        """All that wait; mostly nothing, if the call before took long."""
        items = {}
        while self._waiting:
            key, item = self._waiting.popleft()
            items[key] = item
        if items:
            self._found.update(zip(items, self._look(list(items.values())), strict=True))

    def results(self) -> dict[Hashable, Any]:
        """What was made of each item, by its key. Waits for the last one, and raises what `look` raised."""
        self._thread.shutdown()
        for call in self._calls:
            call.result()
        return self._found
