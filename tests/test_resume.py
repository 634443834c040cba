"""A run that is killed at any moment and resumed ends with the bytes of one that was never killed.

The killed runs are real processes that get SIGKILL, at moments drawn from a seed: while Python is
still importing, in the middle of training, and while a checkpoint is being written.
"""

import contextlib
import json
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
import model
import sft

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}  # same sums each time
KILLS = 10
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
SFT = ["steps=12", "save_every=2", "batch_size=16", "views=2", "lr=1e-3"]
DIPO = ["steps=6", "save_every=1", "groups=4", "group_size=4", "max_rounds=2", "max_tokens=16"]
DIPO += ["threshold=0.005", "rewards.speed=1.0", "lr=1e-3", "updates=2", "kl_beta=0.1"]
SHARED = ["keep_checkpoints=2", "eval_every=3", "eval_limit=2", "eval_max_tokens=8", "seed=3"]
FILES = {"model.safetensors", "optimizer.safetensors", "state.json", "config.json"}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    model.tiny(folder / "model", **SMALL)
    options = ["--out", str(folder), "--sft", "30", "--rl", "30", "--validation", "4"]
    tiny_task.main([*options, "--test", "4", "--min-terms", "2", "--max-terms", "3"])
    return folder


def arguments(good: Path, script: str, out: Path, *more: str) -> list[str]:
    data = good / ("sft.jsonl" if script == "sft" else "rl.jsonl")
    own = SFT if script == "sft" else DIPO
    paths = [f"model={good}/model", f"data={data}", f"out={out}", f"eval_data={good}/test.jsonl"]
    return [*paths, *SHARED, *own, *more]


def start(good: Path, script: str, out: Path) -> subprocess.Popen:
    """The run as a user starts it again after every crash: one and the same command."""
    return subprocess.Popen(
        [sys.executable, f"{script}.py", *arguments(good, script, out, "resume=true")],
        cwd=ROOT,
        env=ONE_THREAD,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    stderr = process.communicate(timeout=300)[1]
    assert process.returncode == 0, stderr


def lines(file: Path) -> list[dict]:
    """Lines of a JSON Lines file without what depends on the clock."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{k: v for k, v in r.items() if "seconds" not in k.split("/")} for r in rows]


def assert_same_run(ours: Path, reference: Path) -> None:
    for name in ("model.safetensors", "optimizer.safetensors"):
        same = (ours / "latest" / name).read_bytes() == (reference / "latest" / name).read_bytes()
        assert same, f"{name} differs from the uninterrupted run's"
    for log in reference.glob("*.jsonl"):
        assert lines(ours / log.name) == lines(log), f"{log.name} differs"
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


def wait_until(happened, process: subprocess.Popen) -> None:
    """Until happened() is true, or the process ended."""
    while process.poll() is None and not happened():
        time.sleep(0.0005)


def kill_at(moment: str, process: subprocess.Popen, out: Path, rng: random.Random, length: float):
    """SIGKILL at a random time of a phase; `length` is how long the training loop takes."""
    config = out / "config.yaml"
    before = config.stat().st_mtime_ns if config.exists() else 0
    if moment == "importing":
        time.sleep(rng.uniform(0.05, 1.5))
    else:  # the config is written anew at each start, just before the model is loaded
        wait_until(lambda: config.exists() and config.stat().st_mtime_ns > before, process)
    if moment == "training":
        time.sleep(rng.uniform(0, length))
    if moment == "saving":
        saves = rng.randint(1, 3)
        for _ in range(saves):
            seen = set(out.glob("checkpoints/step-*"))
            wait_until(lambda: any(out.glob("checkpoints/.part-*")), process)
            if saves > 1:
                wait_until(lambda seen=seen: set(out.glob("checkpoints/step-*")) - seen, process)
        time.sleep(rng.uniform(0, 0.02))
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize("script", ["sft", "dipo"])
def test_killed_and_resumed_runs_end_bit_identical(good, tmp_path, script) -> None:
    reference = tmp_path / "reference"
    process = start(good, script, reference)
    wait_until((reference / "config.yaml").exists, process)
    began = time.monotonic()
    finish(process)
    length = time.monotonic() - began
    assert len(lines(reference / "metrics.jsonl")) == (12 if script == "sft" else 6)

    rng = random.Random(script)
    moments = ["importing"] + ["training"] * 6 + ["saving"] * 3
    rng.shuffle(moments)
    assert len(moments) == KILLS
    killed, steps, chain = 0, [], 0
    while killed < KILLS:  # a chain that ends by itself is checked, and another one is begun
        chain += 1
        out = tmp_path / f"chain-{chain}"
        ended = False
        while killed < KILLS and not ended:
            process = start(good, script, out)
            kill_at(moments[killed], process, out, rng, length)
            assert_only_complete_checkpoints(out)
            ended = process.returncode == 0
            if not ended:
                assert process.returncode == -signal.SIGKILL, "the run failed before it was killed"
                killed += 1
                done = sorted(out.glob("checkpoints/step-*"))
                steps.append(int(done[-1].name[-6:]) if done else 0)
        finish(start(good, script, out))
        assert_only_complete_checkpoints(out)
        assert not list(out.rglob(".part-*")), "a kill's leftovers are still there"
        assert_same_run(out, reference)
    print(f"{script}: {chain} chains, newest checkpoints at the kills: {steps}")
    assert len(set(steps)) > 2, "every kill hit the same step, so the test shows little"


# ------------------------------------------------------- the moments that chance hits too seldom


@pytest.fixture(scope="module", params=["sft", "dipo"])
def finished(request, good, tmp_path_factory) -> tuple[str, Path]:
    """(script, out) of a run that ended; copy `out` before changing it."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    run_here(request.param, good, out)
    return request.param, out


def run_here(script: str, good: Path, out: Path, *more: str) -> None:
    {"sft": sft, "dipo": dipo}[script].main(arguments(good, script, out, *more))


def copy(out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(out, tmp_path / "copy", symlinks=True))


def snapshot(out: Path) -> dict[str, bytes]:
    """Every file but config.yaml, which records the command that was given last."""
    files = [f for f in out.rglob("*") if f.is_file() and f.name != "config.yaml"]
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
    assert lines(out / "metrics.jsonl") == lines(reference / "metrics.jsonl")


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

    def delete_one_file(folder) -> None:
        min(Path(folder).iterdir()).unlink()
        raise Killed

    out = tmp_path / "run"
    monkeypatch.setattr(sft.shutil, "rmtree", delete_one_file)
    with pytest.raises(Killed):
        run_here("sft", good, out)
    monkeypatch.undo()
    assert_only_complete_checkpoints(out)
    run_here("sft", good, out, "resume=true")
    assert len(list(out.glob("checkpoints/*"))) == 2
    assert not list(out.rglob(".part-*"))


def test_the_newest_checkpoint_is_the_one_with_most_steps(finished, good, tmp_path) -> None:
    script, reference = finished
    out = copy(reference, tmp_path)
    newest = sorted(out.glob("checkpoints/step-*"))[-1]
    state = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(state | {"step": 1_000_000}))
    newest.rename(newest.with_name("step-1000000"))  # longer than the six digits of the others
    before = snapshot(out)
    run_here(script, good, out, "resume=true")
    assert snapshot(out) == before, "an older checkpoint was taken"
