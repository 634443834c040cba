"""Many processes as one: the process group, sums over ranks, FSDP2, and sequences dealt out evenly.

Everything works in a single process too, where there is no group and nothing to send.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from plumbing.balance import plan_packs, plan_ranks
from plumbing.common import InputError, first_line
from plumbing.launch import check_launch

BACKEND = "cpu:gloo,cuda:nccl"  # what waits in the host's memory, and rollouts, travel by gloo
Item = TypeVar("Item")


# ------------------------------------------------------------------------ the process group


def start_distributed(backend: str = "") -> tuple[int, int, torch.device]:
    """(rank, world size, device); starts the process group under torchrun, by default gloo or NCCL.

    Raises:
        InputError: environment variables under which the ranks would not find each other.
    """
    cuda = torch.cuda.is_available()
    check_launch(torch.cuda.device_count() if cuda else 0)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        try:
            dist.init_process_group(backend or (BACKEND if cuda else "gloo"), timeout=timedelta(hours=2))
        except dist.DistNetworkError as error:
            raise InputError(f"environment variable MASTER_PORT: {first_line(error)}") from error
    return *rank_and_world(), device


def rank_and_world() -> tuple[int, int]:
    """This process among those of torchrun; (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait for all ranks."""
    if rank_and_world()[1] > 1:
        dist.barrier()


def gather(item: Item) -> list[Item]:
    """The item of every rank, on every rank."""
    items = [item] * rank_and_world()[1]
    if len(items) > 1:
        dist.all_gather_object(items, item)
    return items


def first_problem(problems: list[str]) -> str:
    """The first problem that any rank has, told to all of them; empty: none has one. Call on every rank."""
    return next(filter(None, gather(problems[0] if problems else "")), "")


def sum_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Each named value summed over the ranks, which all have the same names."""
    if rank_and_world()[1] == 1:
        return dict(values)
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    tensor = torch.tensor(list(values.values()), dtype=torch.double, device=device)
    dist.all_reduce(tensor)
    return dict(zip(values, tensor.tolist(), strict=True))


# ------------------------------------------------------------------------------------ FSDP2


def shard(model: torch.nn.Module, dtype: str, cpu_offload: bool = False) -> None:
    """FSDP2: every decoder layer is one unit, the rest another; weights and moments in float32.

    Args:
        model: a transformers decoder with a method `score`, which is then a forward pass too.
        dtype: of the computation.
    """
    world = rank_and_world()[1]
    if world == 1 and dtype == "float32" and not cpu_offload:
        return
    cuda = torch.cuda.is_available()
    if not dist.is_initialized():  # one process: FSDP2 still does the mixed precision
        dist.init_process_group(BACKEND if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    # Left to itself FSDP2 would cast what `score` is given too: bounds of holds, in the middle of a row.
    mixed = MixedPrecisionPolicy(getattr(torch, dtype), torch.float32, cast_forward_inputs=False)
    policy = {
        "mp_policy": mixed,
        "offload_policy": CPUOffloadPolicy(pin_memory=cuda) if cpu_offload else OffloadPolicy(),
    }
    for layer in model.model.layers:
        fully_shard(layer, **policy)
    fully_shard(model, **policy)
    register_fsdp_forward_method(model, "score")


def micro_batches(model: torch.nn.Module, rows: Sequence[Item], reduce_once: bool) -> Iterator[Item]:
    """The rows of one optimizer step, one after the other, for a forward and a backward pass each.

    FSDP2 would sum gradients over the ranks after every backward pass; here only after the last one.
    Till then every rank holds the whole gradient, 4 bytes per parameter; with reduce_once=false it
    holds a shard, and every pass sums. Weights are gathered for every pass either way: keeping them
    between passes (set_reshard_after_backward) would undo the sharding.
    """
    for number, row in enumerate(rows, start=1):
        if isinstance(model, FSDPModule):
            last = number == len(rows)
            model.set_is_last_backward(last)
            model.set_requires_gradient_sync(last or not reduce_once)
        yield row


# ------------------------------------------------------------------ sequences over the ranks


def exchange(parcels: list[dict[Any, Any]]) -> dict[Any, Any]:
    """What all ranks, in turn, have for this one: parcels[r] goes to rank r. Call on every rank."""
    rank, world = rank_and_world()
    if world == 1:
        return parcels[0]
    mine: dict[Any, Any] = {}
    for source in range(world):
        received: list[dict] = [{}]
        dist.scatter_object_list(received, parcels if source == rank else None, src=source)
        mine |= received[0]
    return mine


def deal(records: list[Any], sizes: list[int], token_budget: int) -> tuple[list[Any], list[list[int]]]:
    """Deal the sequences of all ranks out evenly (`plan_ranks`); call on every rank.

    Args:
        records: what this rank has of each of its sequences, anything that can be pickled. It travels
            as a whole, so what belongs to a sequence stays with it.
        sizes: tokens of each in a packed row.

    Returns:
        The records that are this rank's now, and its rows as indices into them.

    Nearly every record changes its rank. A rollout is 26 bytes per token: 512 of 4,096 tokens on every
    rank are 53 MB to send and to receive and 0.4 s of pickling, once per batch of rollouts.
    """
    rank, world = rank_and_world()
    if world == 1:
        return records, plan_packs(sizes, token_budget)

    # One plan over the sequences of all ranks; `home` says where each lies now.
    home, all_sizes = [], []
    for source, sizes_there in enumerate(gather(sizes)):
        home += [(source, i) for i in range(len(sizes_there))]
        all_sizes += sizes_there
    plan = plan_ranks(all_sizes, token_budget, world)

    # Each rank gets what its rows need.
    parcels = []
    for rows in plan:
        wanted = [home[i] for row in rows for i in row if home[i][0] == rank]
        parcels.append({place: records[place[1]] for place in wanted})
    mine = exchange(parcels)

    # The plan's numbers, which count over all ranks, become indices into what arrived here.
    index = {place: i for i, place in enumerate(mine)}
    rows = [[index[home[i]] for i in row] for row in plan[rank]]
    return list(mine.values()), rows
