"""Two and four ranks (FSDP2 over gloo) against one process, on the same data.

Loss and gradient must not depend on how the batch was cut over the ranks. rank_worker.py runs the
same cases in this process, where nothing is sharded, and under torchrun.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rank_worker
import torch
from conftest import TINY
from data_rows import write_task
from safetensors.torch import load_file

from model import Sampling, load
from plumbing.checkpoint import tiny
from plumbing.common import ROOT

HANG_GUARD = 240.0  # seconds; far above what the ranks need
NAMES = "sft,exact,tokens,lone,certainty,certainty-noise"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint; beside it the data files that a config has to name."""
    place = tmp_path_factory.mktemp("ranks")
    write_task(place)
    return tiny(place / "tiny", **TINY)


def on_ranks(zygote, ranks: int, names: str, folder: Path, out: Path) -> dict[str, list[dict]]:
    """What rank 0 recorded of each case. Without a zygote: torchrun's own processes."""
    out.mkdir(exist_ok=True)
    script = Path(rank_worker.__file__)
    command = [str(script), names, str(folder), str(out)]
    path = os.pathsep.join([str(ROOT), str(script.parent)])
    settings = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    settings["PYTHONFAULTHANDLER"] = "1"  # a crash in C shows where
    options = {"env": os.environ | settings, "timeout": HANG_GUARD}
    if zygote:
        done = zygote.torchrun(ranks, [sys.executable, *command], **options)
    else:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = subprocess.run(
            [sys.executable, *torchrun, *command], capture_output=True, text=True, **options
        )
    assert done.returncode == 0, done.stderr[-8000:]
    return {n: torch.load(out / f"{n}.pt", weights_only=False) for n in names.split(",")}


def ordinary_cases(zygote, ranks: int, folder: Path, out: Path) -> tuple[int, dict[str, list[dict]], Path]:
    return ranks, on_ranks(zygote, ranks, NAMES, folder, out), out


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    """(number of ranks, records of all ordinary cases on them, their folder). By torchrun."""
    return ordinary_cases(None, 2, folder, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(folder, tmp_path_factory, zygote):
    return ordinary_cases(zygote, 4, folder, tmp_path_factory.mktemp("four"))


@pytest.fixture(params=["two", "four"])
def many(request):
    return request.getfixturevalue(request.param)


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


@pytest.mark.parametrize("ranks", [1, 2])
def test_options_that_save_memory_change_nothing(folder, two, tmp_path, zygote, ranks):
    """CPU offload, checkpointing and a reduction after every pass; a process alone is sharded as well."""
    wanted = two[1]["sft"]
    found = on_ranks(zygote, ranks, "frugal", folder, tmp_path)["frugal"]
    assert found[0]["sharded"]
    for step in (0, 1):
        assert_same(found[step]["gradients"][0], wanted[step]["gradients"][0], (1e-5, 1e-4)[step])
    assert_same(found[0]["weights"], wanted[0]["weights"], 1e-4)


def test_a_row_in_float32_stays_so_where_weights_are_bfloat16(folder, tmp_path, zygote):
    """FSDP2 would round it, and with it the bounds of the holds, as it rounds the weights."""
    found = on_ranks(zygote, 1, "holds", folder, tmp_path)["holds"]
    wanted = load(str(folder), torch.bfloat16).score(rank_worker.held_row(), Sampling()).logprobs
    assert len(found) == len(wanted) > 10 and wanted.std() > 0.5
    assert (found - wanted).abs().max() < 1e-5


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


@pytest.mark.parametrize("name", ["certainty", "certainty-noise"])
def test_certainty_where_most_ranks_have_no_right_answer(folder, many, tmp_path, name):
    """Three right answers: ranks that are not dealt as many as others run idle rows."""
    ranks, found = many[0], many[1][name][0]
    (wanted,) = rank_worker.CASES[name](folder, tmp_path)
    assert found["sharded"] and not wanted["sharded"]
    in_rows = {"certainty": {2: [[1, 0], [1, 1]], 4: [[0], [1], [1], [1]]}}
    in_rows["certainty-noise"] = {2: [[1], [2]], 4: [[0], [1], [1], [1]]}
    assert sorted([n for n, _ in rows] for rows in found["sizes"]) == in_rows[name][ranks]
    assert wanted["metrics"]["certainty_nll"] > 0.1
    assert_same_metrics(found["metrics"], wanted["metrics"], ["certainty_nll", "grad_norm"])
    assert_same(found["gradients"][0], wanted["gradients"][0])


def test_a_checkpoint_of_many_ranks_resumes_on_one(folder, many):
    ranks, records, out = many
    first, second = records["sft"]
    checkpoint = out / "sft" / "run" / "checkpoints" / "step-000001"
    assert len(list(checkpoint.glob("optimizer*"))) == ranks, "every rank writes its shard"
    saved = dict(load(str(checkpoint)).named_parameters())
    assert saved.keys() == first["weights"].keys()
    assert all(torch.equal(saved[n], first["weights"][n]) for n in saved)
    (resumed,) = rank_worker.run_sft(folder, out / "sft", resume=True)
    assert not resumed["sharded"]
    assert_same_step(resumed, first, second)


def assert_same_step(resumed: dict, first: dict, second: dict) -> None:
    """The second step after resuming is the one that was made without a break."""
    assert_same(resumed["gradients"][0], second["gradients"][0])
    # The same moments, so the same step: a step of lost moments would be of size lr.
    moved = {n: resumed["weights"][n] - first["weights"][n] for n in first["weights"]}
    assert_same(moved, {n: second["weights"][n] - first["weights"][n] for n in moved}, 1e-2)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 4)])
def test_a_checkpoint_resumes_on_more_ranks(folder, two, tmp_path, zygote, before, after):
    if before == 1:
        first, second = rank_worker.run_sft(folder, tmp_path / "sft")
    else:
        first, second = two[1]["sft"]
        shutil.copytree(two[2] / "sft", tmp_path / "sft", symlinks=True)
    (tmp_path / "sft").rename(tmp_path / "resume")
    (resumed,) = on_ranks(zygote, after, "resume", folder, tmp_path)["resume"]
    assert resumed["sharded"]
    assert_same_step(resumed, first, second)


# ------------------------------------------------------------------- loading without a full copy

MOE = {
    "model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"], "num_experts": 6,
    "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1,
    "norm_topk_prob": True, "mlp_only_layers": [1],
}  # fmt: skip
KINDS = {
    # sizes that two ranks and four cannot share evenly, down to first dimensions below the number of ranks
    "tied": TINY | {"tie_word_embeddings": True, "hidden_size": 54, "num_hidden_layers": 3, "head_dim": 2},
    "moe": TINY | MOE,
    "large": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "head_dim": 64},
}


@pytest.fixture(scope="module")
def kinds(folder):
    for kind, changes in KINDS.items():
        tiny(folder.with_name(kind), **changes)
    return folder


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_read_their_own_slices_hold_what_from_pretrained_does(kinds, tmp_path, zygote, ranks):
    names = ["load-tied", "load-moe"]
    records = on_ranks(zygote, ranks, ",".join(names), kinds, tmp_path)
    for name in names:
        source = kinds.with_name(name.removeprefix("load-"))
        wanted = rank_worker.run_load(source, tmp_path / "one")
        for part in ("weights", "buffers"):
            found = records[name][part]
            assert found.keys() == wanted[part].keys()
            assert all(torch.equal(found[n], tensor) for n, tensor in wanted[part].items()), part
        assert torch.allclose(records[name]["logprobs"], wanted["logprobs"], rtol=1e-5, atol=1e-6)
        # Gathered for the engine, in its dtype, where it lies: nothing but the own slice is copied.
        sent, extra = records[name]["sent"], records[name]["extra"]
        assert sent.keys() == wanted["weights"].keys()
        for n, tensor in wanted["weights"].items():
            assert torch.equal(sent[n], tensor.bfloat16()), n
            assert len(tensor) % ranks or extra[n] <= 1 / ranks, n
        assert any(len(tensor) % ranks == 0 for tensor in sent.values())
        # Written in several files, by all ranks, it is the checkpoint that it was.
        saved = tmp_path / name
        assert len(list(saved.glob("model-*"))) > ranks
        tensors, original = ({k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()}
                             for d in (saved, source))  # fmt: skip
        assert tensors.keys() == original.keys()
        assert all(torch.equal(tensors[n], original[n]) for n in original)
        again = dict(load(str(saved)).named_parameters())
        assert all(torch.equal(again[n], wanted["weights"][n]) for n in wanted["weights"])


def test_no_rank_holds_a_full_copy_while_loading(kinds, tmp_path, zygote):
    size = sum(f.stat().st_size for f in kinds.with_name("large").glob("*.safetensors"))
    peaks = on_ranks(zygote, 4, "load-large", kinds, tmp_path)["load-large"]["peak"]
    print(f"private memory while loading {size / 2**20:.0f} MiB: {[p // 2**20 for p in peaks]} MiB")
    assert min(peaks) > 0.2 * size, "a rank does hold a quarter, or this measures nothing"
    assert max(peaks) < 0.5 * size
