"""A run that is killed at any moment and resumed ends with the bytes of one that was never killed.

The killed runs are processes of their own that get SIGKILL, at moments drawn from a seed: while
Python is still importing, in the middle of training, and while a checkpoint is being written. The
latter two, and the last start of a chain, have their imports done (tests/zygote.py), since those would
take most of the time.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny as tiny_task

import dipo
import sft
from plumbing import run_folder
from plumbing.checkpoint import tiny
from plumbing.common import ROOT, read_records
from plumbing.config import load_config

ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # same sums each time
KILLS = 10
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
SFT = ["steps=12", "save_every=2", "batch_size=16", "views=2", "lr=1e-3"]
DIPO = ["steps=6", "save_every=1", "groups=4", "group_size=4", "max_rounds=2", "max_tokens=16"]
DIPO += ["threshold=0.005", "rewards.speed=1.0", "lr=1e-3", "updates=2", "kl_beta=0.1"]
PARTIAL = ["partial_tokens=5", "likelihood=exact", "max_age=4"]
SHARED = ["keep_checkpoints=2", "eval_every=3", "eval_limit=2", "eval_max_tokens=8", "seed=3"]
FILES = {"model.safetensors", "optimizer.safetensors", "state.json", "config.json"}
SCRIPTS = {"sft": (sft.main, sft.SFTConfig), "dipo": (dipo.main, dipo.DiPOConfig)}
SCRIPTS["partial"] = SCRIPTS["dipo"]  # with rollouts that are unfinished when a checkpoint is made


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    tiny(folder / "model", **SMALL)
    options = ["--out", str(folder), "--sft", "30", "--rl", "30", "--validation", "4"]
    tiny_task.main([*options, "--test", "4", "--min-terms", "2", "--max-terms", "3"])
    return folder


def arguments(good: Path, script: str, out: Path, *more: str) -> list[str]:
    data = good / ("sft.jsonl" if script == "sft" else "rl.jsonl")
    own = {"sft": SFT, "dipo": DIPO, "partial": DIPO + PARTIAL}[script]
    paths = [f"model={good}/model", f"data={data}", f"out={out}", f"eval_data={good}/test.jsonl"]
    return [*paths, *SHARED, *own, *more]


def command(good: Path, script: str, out: Path) -> list[str]:
    """The run as a user starts it again after every crash: one and the same command."""
    name = "sft.py" if script == "sft" else "dipo.py"
    return [sys.executable, name, *arguments(good, script, out, "resume=true")]


def logged(log: Path) -> list[dict]:
    """The records of a log without what depends on the clock."""
    records = [record for _, record in read_records(log)]
    return [{k: v for k, v in r.items() if "seconds" not in k.split("/")} for r in records]


def assert_same_run(ours: Path, reference: Path) -> None:
    for name in ("model.safetensors", "optimizer.safetensors"):
        same = (ours / "latest" / name).read_bytes() == (reference / "latest" / name).read_bytes()
        assert same, f"{name} differs from the uninterrupted run's"
    files = [
        {f.name: f.read_bytes() for f in (out / "latest").glob("unfinished*")} for out in (ours, reference)
    ]
    assert files[0] == files[1], "what had not ended differs from the uninterrupted run's"
    for log in reference.glob("*.jsonl"):
        assert logged(ours / log.name) == logged(log), f"{log.name} differs"
    names = [sorted(f.name for f in out.glob("checkpoints/*")) for out in (ours, reference)]
    assert names[0] == names[1], "other checkpoints are left than in the uninterrupted run"
    assert os.readlink(ours / "latest") == os.readlink(reference / "latest")


def assert_only_complete_checkpoints(out: Path) -> None:
    """True at any moment, so also right after a kill."""
    for folder in out.glob("checkpoints/step-*"):
        names = {file.name for file in folder.iterdir()}
        assert names >= FILES, f"{folder.name} is there, but lacks {FILES - names}"
    if (out / "latest").is_symlink():
        assert (out / "latest" / "state.json").exists(), "latest points to no complete checkpoint"


def wait_until(happened, is_running) -> None:
    """Until happened() is true, or the process ended."""
    while is_running() and not happened():
        time.sleep(0.0005)


def kill_while_importing(good: Path, script: str, out: Path, rng: random.Random) -> None:
    with open(out.with_suffix(".log"), "w") as log:
        environment = os.environ | ONE_THREAD
        process = subprocess.Popen(
            command(good, script, out), cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    time.sleep(rng.uniform(0.05, 1.0))
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL


def kill_while_running(
    zygote, good: Path, script: str, out: Path, rng: random.Random, moment: str, length: float
) -> bool:
    """SIGKILL at a random time of a phase, or False if the run ended before.

    Args:
        length: seconds that the uninterrupted run took, imports left out.
    """
    config = out / "config.yaml"
    before = config.stat().st_mtime_ns if config.exists() else 0
    with open(out.with_suffix(".log"), "w") as log:
        environment = os.environ | ONE_THREAD
        process = zygote.popen(command(good, script, out), cwd=ROOT, env=environment, stdout=log, stderr=log)

    def is_alive() -> bool:
        return process.poll() is None

    # The config is written anew at each start, just before the model is loaded.
    wait_until(lambda: config.exists() and config.stat().st_mtime_ns > before, is_alive)
    if moment == "training":
        time.sleep(rng.uniform(0, 0.7 * length))
    else:
        for _ in range(rng.randint(0, 2)):  # checkpoints that are let pass
            wait_until(lambda: any(out.glob("checkpoints/.part-*")), is_alive)
            wait_until(lambda: not any(out.glob("checkpoints/.part-*")), is_alive)
        wait_until(lambda: any(out.glob("checkpoints/.part-*")), is_alive)
        time.sleep(rng.uniform(0, 0.015))
    process.kill()
    process.wait()
    why = f"the run failed before it was killed:\n{out.with_suffix('.log').read_text()}"
    assert process.returncode in (0, -signal.SIGKILL), why
    return process.returncode != 0


@pytest.fixture(scope="module", params=["sft", "dipo", "partial"])
def finished(request, good, tmp_path_factory) -> tuple[str, Path]:
    """(script, out) of a run that ended; copy `out` before changing it."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    run_here(request.param, good, out)
    return request.param, out


def run_here(script: str, good: Path, out: Path, *more: str) -> None:
    main, config_class = SCRIPTS[script]
    main(load_config(config_class, arguments(good, script, out, *more)))


def test_killed_and_resumed_runs_end_bit_identical(finished, good, tmp_path, zygote) -> None:
    script, reference = finished
    ended = (reference / "latest").lstat().st_mtime
    length = ended - (reference / "config.yaml").stat().st_mtime
    assert len(logged(reference / "metrics.jsonl")) == (12 if script == "sft" else 6)

    rng = random.Random(script)
    moments = ["training"] * 6 + ["saving"] * 3
    rng.shuffle(moments)
    assert len(moments) == KILLS - 1
    steps, chain, in_flight = [], 0, 0
    while moments:  # a chain that ends by itself is checked, and another one is begun
        chain += 1
        out = tmp_path / f"chain-{chain}"
        if chain == 1:
            kill_while_importing(good, script, out, rng)
        while moments:
            if not kill_while_running(zygote, good, script, out, rng, moments[-1], length):
                break
            moments.pop()
            assert_only_complete_checkpoints(out)
            done = sorted(out.glob("checkpoints/step-*"))
            steps.append(int(done[-1].name[-6:]) if done else 0)
            in_flight += len(list(done[-1].glob("unfinished-*"))) if done else 0
        done = zygote.run(command(good, script, out), cwd=ROOT, env=os.environ | ONE_THREAD)
        assert done.returncode == 0, done.stderr
        assert_only_complete_checkpoints(out)
        assert not list(out.rglob(".part-*")), "a kill's leftovers are still there"
        assert_same_run(out, reference)
    assert (in_flight > 3) == (script == "partial"), "resumed with rollouts that had not ended"
    print(f"{script}: {chain} chains, newest checkpoints at the kills: {steps}")


def test_two_ranks_go_on_with_what_each_had_not_finished(good, tmp_path, zygote) -> None:
    """Two ranks stop and go on, bit for bit; one rank goes on with what two had."""

    def run(out: Path, ranks: int, steps: int) -> dict[str, bytes]:
        argv = [*command(good, "partial", out), f"steps={steps}", "eval_every=1"]
        done = zygote.torchrun(ranks, argv, cwd=ROOT, env=os.environ | ONE_THREAD)
        assert done.returncode == 0, done.stderr
        return {f.name: f.read_bytes() for f in (out / "latest").iterdir() if f.suffix != ".json"}

    def unfinished(out: Path) -> list[set[int]]:
        files = sorted((out / "latest").glob("unfinished-*.jsonl"))
        return [{record["number"] for _, record in read_records(file)} for file in files]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    wanted = run(whole, 2, 4)
    run(parts, 2, 2)
    shutil.copytree(parts, tmp_path / "alone", symlinks=True)
    before = unfinished(parts)
    assert len(before) == 2 and all(before) and not before[0] & before[1]
    assert run(parts, 2, 4) == wanted and unfinished(parts) == unfinished(whole)
    assert logged(parts / "metrics.jsonl") == logged(whole / "metrics.jsonl")

    run(tmp_path / "alone", 1, 3)
    (after,) = unfinished(tmp_path / "alone")
    step = logged(tmp_path / "alone" / "metrics.jsonl")[-1]
    ended = round(step["groups_kept"] / step["kept_rate"])
    assert len(before[0] | before[1]) + step["groups_asked"] == len(after) + ended + step["groups_too_old"]


# ------------------------------------------------------- the moments that chance hits too seldom


def copy(out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(out, tmp_path / "copy", symlinks=True))


def snapshot(out: Path) -> dict[str, bytes]:
    """Every file but config.yaml and report.html, which say what was given last, and when."""
    made_again = ("config.yaml", "report.html")
    files = [f for f in out.rglob("*") if f.is_file() and f.name not in made_again]
    return {str(f.relative_to(out)): f.read_bytes() for f in files}


def test_resume_of_a_finished_run_changes_nothing(finished, good, tmp_path) -> None:
    script, reference = finished
    out = copy(reference, tmp_path)
    run_here(script, good, out, "resume=true")
    assert snapshot(out) == snapshot(reference)
    assert os.readlink(out / "latest") == os.readlink(reference / "latest")


def test_resume_of_nothing_starts_from_scratch(finished, good, tmp_path) -> None:
    script, reference = finished
    (tmp_path / "empty").mkdir()
    run_here(script, good, tmp_path / "empty", "resume=true")
    assert_same_run(tmp_path / "empty", reference)


def test_what_was_logged_after_the_checkpoint_is_cut_off(finished, good, tmp_path) -> None:
    script, reference = finished
    out = copy(reference, tmp_path)
    for log in out.glob("*.jsonl"):
        with open(log, "a") as file:
            file.write('{"step": 13, "loss": 0.1}\n{"step": 14, "lo')  # the kill hit a write
    run_here(script, good, out, "resume=true")
    assert_same_run(out, reference)


def test_leftovers_of_a_kill_are_removed(finished, good, tmp_path) -> None:
    script, reference = finished
    out = copy(reference, tmp_path)
    newest = sorted(out.glob("checkpoints/step-*"))[-1]
    part = newest.with_name(f".part-{newest.name}")  # as if the last checkpoint was half written
    newest.rename(part)
    os.truncate(part / "model.safetensors", 1000)
    (part / "state.json").unlink()
    before = sorted(out.glob("checkpoints/step-*"))[-1]
    (out / "latest").unlink()
    (out / "latest").symlink_to(before.relative_to(out))
    (out / ".part-latest").symlink_to("nowhere")
    run_here(script, good, out, "resume=true")
    assert not list(out.rglob(".part-*"))
    assert_only_complete_checkpoints(out)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (out / "latest" / name).read_bytes() == (reference / "latest" / name).read_bytes()
    assert logged(out / "metrics.jsonl") == logged(reference / "metrics.jsonl")


def test_a_kill_before_the_oldest_checkpoint_went_leaves_no_more_of_them(finished, good, tmp_path) -> None:
    script, reference = finished
    out = copy(reference, tmp_path)
    oldest = sorted(out.glob("checkpoints/step-*"))[0]
    shutil.copytree(oldest, oldest.with_name("step-000001"))
    run_here(script, good, out, "resume=true")
    assert_same_run(out, reference)


def test_a_resumed_run_outlives_the_checkpoint_it_came_from(finished, good, tmp_path) -> None:
    script, reference = finished
    out = tmp_path / "run"
    steps = 6 if script == "sft" else 3  # half of them; the rest saves more often than it keeps
    run_here(script, good, out, f"steps={steps}")
    run_here(script, good, out, "resume=true")
    assert_same_run(out, reference)


def test_the_checkpoint_that_a_run_goes_on_from_stays_until_its_end(good, tmp_path, monkeypatch) -> None:
    """An engine in a subprocess that dies is started again with the files of that checkpoint."""
    out, there = tmp_path / "run", []
    run_here("sft", good, out, "steps=2", "save_every=1", "keep_checkpoints=1")
    log = run_folder.RunFolder.log

    def look_and_log(self, *arguments) -> None:
        there.append((self.weights / "model.safetensors").exists())
        log(self, *arguments)

    monkeypatch.setattr(run_folder.RunFolder, "log", look_and_log)
    run_here("sft", good, out, "steps=6", "save_every=1", "keep_checkpoints=1", "resume=true")
    assert there == [True] * 4
    assert [f.name for f in sorted(out.glob("checkpoints/*"))] == ["step-000006"]


def test_killed_between_the_last_checkpoint_and_the_link_to_it(finished, good, tmp_path) -> None:
    script, reference = finished
    out = copy(reference, tmp_path)
    before = sorted(out.glob("checkpoints/step-*"))[-2]
    (out / "latest").unlink()
    (out / "latest").symlink_to(before.relative_to(out))
    run_here(script, good, out, "resume=true")
    assert os.readlink(out / "latest") == os.readlink(reference / "latest")


def test_killed_while_an_old_checkpoint_is_deleted(good, tmp_path, monkeypatch) -> None:
    class Killed(BaseException):
        """Stands for SIGKILL."""

    def delete_one_file(folder, **_) -> None:
        min(Path(folder).iterdir()).unlink()
        raise Killed

    out = tmp_path / "run"
    monkeypatch.setattr(run_folder.shutil, "rmtree", delete_one_file)
    with pytest.raises(Killed):
        run_here("sft", good, out)
    monkeypatch.undo()
    assert_only_complete_checkpoints(out)
    run_here("sft", good, out, "resume=true")
    assert len(list(out.glob("checkpoints/*"))) == 2
    assert not list(out.rglob(".part-*"))
