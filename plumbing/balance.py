"""Who takes which sequence: rows under a token budget, and rows for ranks that run in step.

Pure functions of lengths, so that every rank makes the same plan by itself.
"""

from __future__ import annotations

import heapq


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

    # Rows: the least number, the same for every rank, with which all fits.
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

    # Ranks: in rounds of rows of similar size.
    loads.sort(key=lambda item: (-item[0], item[1]))
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    so_far = [0] * ranks
    for start in range(0, len(loads), ranks):
        lightest = sorted(range(ranks), key=lambda rank: (so_far[rank], rank))
        for rank, (load, row) in zip(lightest, loads[start : start + ranks], strict=True):
            plan[rank].append(rows[row])
            so_far[rank] += load
    return plan
