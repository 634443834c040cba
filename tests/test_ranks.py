"""Two and four ranks (FSDP2 over gloo) against one process, on the same data.

Loss and gradient must not depend on how the batch was cut over the ranks. rank_worker.py runs the
same cases in this process, where nothing is sharded, and under torchrun.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import rank_worker
import torch
from conftest import TINY

from model import load, tiny

ROOT = Path(__file__).resolve().parents[1]
HANG_GUARD = 240.0  # seconds; far above what the ranks need


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("ranks") / "tiny", **TINY)


def on_ranks(ranks: int, names: str, folder: Path, out: Path) -> dict[str, list[dict]]:
    """What rank 0 recorded of each case."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}"]
    script = Path(rank_worker.__file__)
    path = os.pathsep.join([str(ROOT), str(script.parent)])
    settings = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    settings["PYTHONFAULTHANDLER"] = "1"  # a crash in C shows where
    done = subprocess.run(
        [*command, str(script), names, str(folder), str(out)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=HANG_GUARD,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return {n: torch.load(out / f"{n}.pt", weights_only=False) for n in names.split(",")}


@pytest.fixture(scope="module", params=[2, 4])
def many(request, folder, tmp_path_factory):
    """(number of ranks, records of all ordinary cases on them, their folder)."""
    out = tmp_path_factory.mktemp("ranks") / "out"
    return request.param, on_ranks(request.param, "sft,exact,tokens,lone", folder, out), out


@pytest.fixture(scope="module")
def one(folder, tmp_path_factory):
    """The DiPO cases in this process, by likelihood."""
    out = tmp_path_factory.mktemp("one")
    return {name: rank_worker.run_dipo(folder, out / name, name)[0] for name in ("tokens", "exact")}


def assert_same(found: dict, wanted: dict, tolerance: float = 1e-5) -> None:
    """Relative to the norm of each tensor, none of which is zero."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape
        error = (found[name] - tensor).norm() / tensor.norm()
        assert error < tolerance, f"{name}: off by {error:.1e}"


def assert_same_metrics(found: dict, wanted: dict, names: list[str]) -> None:
    for name in names:
        assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name


def test_sft(folder, many, tmp_path):
    (found, again), wanted = many[1]["sft"], rank_worker.run_sft(folder, tmp_path)
    assert found["sharded"] and not wanted[0]["sharded"]
    names = ["loss", "entropy", "grad_norm"]
    assert_same_metrics(found["metrics"], wanted[0]["metrics"], names)
    assert_same(found["gradients"][0], wanted[0]["gradients"][0])
    # Adam magnifies rounding where a gradient is nearly zero
    assert_same(found["weights"], wanted[0]["weights"], 1e-4)
    assert_same_metrics(again["metrics"], wanted[1]["metrics"], ["loss"])


@pytest.mark.parametrize("likelihood", ["tokens", "exact"])
def test_dipo(many, one, likelihood):
    ranks, found, wanted = many[0], many[1][likelihood][0], one[likelihood]
    assert found["sharded"] and not wanted["sharded"]
    assert [sequences for sequences, _ in wanted["sizes"][0]] == [1] * 6
    # Two ranks roll out 4 and 2 answers and train on 3 each; of four, one rolls out nothing, and two
    # have to run one idle row, which is one block long.
    in_step = {2: [[1, 1, 1]] * 2, 4: [[1, 1]] * 2 + [[1, 0]] * 2}[ranks]
    assert sorted(([n for n, _ in rows] for rows in found["sizes"]), reverse=True) == in_step
    assert all(tokens == 4 for rows in found["sizes"] for n, tokens in rows if n == 0)
    assert_same(found["gradients"][0], wanted["gradients"][0])
    assert_same(found["gradients"][1], wanted["gradients"][1], 1e-4)  # Adam magnified rounding before
    assert_same(found["weights"], wanted["weights"], 1e-4)
    names = ["loss", "entropy", "grad_norm", "hold_fraction", "gap_mean", "gap_max"]
    assert_same_metrics(found["metrics"], wanted["metrics"], names)


@pytest.mark.parametrize("likelihood", ["tokens", "exact"])
def test_idle_rows_count_in_no_figure(many, one, likelihood):
    found, wanted = many[1][likelihood][0], one[likelihood]
    assert wanted["metrics"]["policy_kl"] > 0
    assert_same_metrics(found["metrics"], wanted["metrics"], ["clip_fraction", "policy_kl"])


def test_ranks_without_a_useful_group(folder, many, tmp_path):
    """One group: two ranks share its two answers, the other two of four have nothing to train on."""
    ranks, found = many[0], many[1]["lone"][0]
    wanted = rank_worker.run_lone(folder, tmp_path)[0]
    assert sorted(rows[0][0] for rows in found["sizes"]) == [0] * (ranks - 2) + [1, 1]
    assert_same(found["gradients"][0], wanted["gradients"][0])


def test_a_checkpoint_of_many_ranks_resumes_on_one(folder, many):
    _, records, out = many
    first, second = records["sft"]
    checkpoint = out / "sft" / "run" / "checkpoints" / "step-000001"
    saved = dict(load(str(checkpoint)).named_parameters())
    assert saved.keys() == first["weights"].keys()
    assert all(torch.equal(saved[n], first["weights"][n]) for n in saved)
    (resumed,) = rank_worker.run_sft(folder, out / "sft", resume=True)
    assert not resumed["sharded"]
    assert_same(resumed["gradients"][0], second["gradients"][0])
    # The same moments, so the same step: a step of lost moments would be of size lr.
    moved = {n: resumed["weights"][n] - first["weights"][n] for n in saved}
    assert_same(moved, {n: second["weights"][n] - first["weights"][n] for n in saved}, 1e-2)
