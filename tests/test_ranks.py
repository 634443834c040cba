"""Two ranks (FSDP2 over gloo) against one process, on the same data.

Loss and gradient must not depend on how the batch was cut over the ranks. rank_worker.py runs the
same cases in this process, where nothing is sharded, and under torchrun with two ranks.
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
HANG_GUARD = 120.0  # seconds; far above what two ranks need


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("ranks") / "tiny", **TINY)


def on_two_ranks(names: str, folder: Path, out: Path) -> dict[str, list[dict]]:
    """What rank 0 recorded of each case."""
    out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
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


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    """(records of all ordinary cases on two ranks, their folder)."""
    out = tmp_path_factory.mktemp("two") / "out"
    return on_two_ranks("sft,exact,tokens", folder, out), out


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


def test_sft_on_two_ranks(folder, two, tmp_path):
    (found, again), wanted = two[0]["sft"], rank_worker.run_sft(folder, tmp_path)
    assert found["sharded"] and not wanted[0]["sharded"]
    assert [sequences for sequences, _ in found["sizes"]] == [3, 2]
    names = ["loss", "entropy", "grad_norm"]
    assert_same_metrics(found["metrics"], wanted[0]["metrics"], names)
    assert_same(found["gradients"], wanted[0]["gradients"])
    # Adam magnifies rounding where a gradient is nearly zero
    assert_same(found["weights"], wanted[0]["weights"], 1e-4)
    assert_same_metrics(again["metrics"], wanted[1]["metrics"], ["loss"])


@pytest.mark.parametrize("likelihood", ["tokens", "exact"])
def test_dipo_on_two_ranks(two, one, likelihood):
    found, wanted = two[0][likelihood][0], one[likelihood]
    assert found["sharded"] and not wanted["sharded"]
    assert wanted["sizes"] == [[6, 6]]
    assert found["sizes"] == [[4, 4], [2, 4]], "the second rank keeps step by idle rows"
    assert_same(found["gradients"], wanted["gradients"], 1e-4)  # of the second update
    assert_same(found["weights"], wanted["weights"], 1e-4)
    names = ["loss", "entropy", "grad_norm", "hold_fraction", "gap_mean", "gap_max"]
    assert_same_metrics(found["metrics"], wanted["metrics"], names)


@pytest.mark.parametrize("likelihood", ["tokens", "exact"])
def test_idle_rows_count_in_no_figure(two, one, likelihood):
    found, wanted = two[0][likelihood][0], one[likelihood]
    assert wanted["metrics"]["policy_kl"] > 0
    assert_same_metrics(found["metrics"], wanted["metrics"], ["clip_fraction", "policy_kl"])


def test_a_rank_without_a_useful_group(folder, tmp_path):
    found = on_two_ranks("lone", folder, tmp_path / "two")["lone"][0]
    (tmp_path / "one").mkdir()
    wanted = rank_worker.run_lone(folder, tmp_path / "one")[0]
    assert found["sizes"] == [[2, 2], [0, 2]]
    assert_same(found["gradients"], wanted["gradients"], 1e-4)


def test_a_checkpoint_of_two_ranks_resumes_on_one(folder, two):
    records, out = two
    first, second = records["sft"]
    checkpoint = out / "sft" / "run" / "checkpoints" / "step-000001"
    saved = dict(load(str(checkpoint)).named_parameters())
    assert saved.keys() == first["weights"].keys()
    assert all(torch.equal(saved[n], first["weights"][n]) for n in saved)
    (resumed,) = rank_worker.run_sft(folder, out / "sft", resume=True)
    assert not resumed["sharded"]
    assert_same(resumed["gradients"], second["gradients"])
    # The same moments, so the same step: a step of lost moments would be of size lr.
    moved = {n: resumed["weights"][n] - first["weights"][n] for n in saved}
    assert_same(moved, {n: second["weights"][n] - first["weights"][n] for n in saved}, 1e-2)
