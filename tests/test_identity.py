"""A run is resumed as what it is; another run, or a folder that another process has, is refused unchanged."""

import errno
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from faults import (
    ENVIRONMENT,
    KEEP_ALL,
    arguments,
    assert_same_end,
    make_good,
    run_here,
    snapshot,
    strict_records,
    the_error,
    told,
    works,
)
from safetensors.torch import load_file, save_file

from model import load
from plumbing import common
from plumbing.checkpoint import tiny
from plumbing.common import ROOT, InputError, checkpoints, lock

MORE = ["save_every=1", "keep_checkpoints=2"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Model and data; other ones of the same shape beside them."""
    folder = make_good(tmp_path_factory.mktemp("good"))
    config = json.loads((folder / "model" / "config.json").read_text())
    tiny(folder / "other", seed=1, **config)
    tiny(folder / "wide", **config | {"block_size": 8})
    (folder / "other.jsonl").write_text("\n".join((folder / "sft.jsonl").read_text().splitlines()[1:]) + "\n")
    return folder


@pytest.fixture(scope="module", params=["sft", "dipo"])
def finished(request, good, tmp_path_factory):
    """(script, its arguments, the run's folder) after step 3; copy the folder before changing it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    argv = [*arguments(good, request.param, out), *MORE, "steps=3"]
    works(request.param, argv)
    return request.param, argv, out


@pytest.fixture
def run(finished, tmp_path):
    """(script, arguments, folder) of a copy under the name of the original's copy."""
    script, argv, out = finished
    copy = Path(shutil.copytree(out, tmp_path / "run", symlinks=True))
    return script, [a.replace(str(out), str(copy)) for a in argv], copy


def unchanged_and_refused(script: str, argv: list[str], out: Path, *wanted: str) -> str:
    before = snapshot(out)
    error = the_error(*run_here(script, argv))
    assert snapshot(out) == before, "the folder of a run that was refused has changed"
    for text in wanted:
        assert text in error, f"{text!r} is missing in: {error}"
    return error


# --------------------------------------------------------------------------------- other fields


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (["seed=7"], ["seed was 0 and is 7"]),
        (["lr=2e-3"], ["lr was 0.001 and is 0.002"]),
        (["weight_decay=0.1"], ["weight_decay was 0.0 and is 0.1"]),
        (["prompt=Now {question}"], ["prompt was {question} and is Now {question}"]),
        (["block_size=4"], ["block_size was 0 and is 4"]),
        (["dtype=bfloat16"], ["dtype was float32 and is bfloat16"]),
        (["too_long=leave_out"], ["too_long"]),
        (
            ["warmup_steps=2", "max_grad_norm=2", "seed=1"],
            ["warmup_steps was 0", "max_grad_norm", "seed was"],
        ),
        (["schedule=cosine"], ["schedule was constant and is cosine"]),
    ],
    ids=lambda value: value[0].split("=")[0].split(" ")[0],
)
def test_another_field_is_another_run(run, changes, wanted):
    script, argv, out = run
    unchanged_and_refused(script, [*argv, "resume=true", *changes], out, "holds another run", *wanted)


@pytest.mark.parametrize(
    "change", ["batch_size=5", "views=2", "noise_per=block", "t_min=0.1", "complementary=true"]
)
def test_another_field_of_sft(good, tmp_path, change):
    out = tmp_path / "run"
    argv = [*arguments(good, "sft", out), "views=4", "steps=2"]
    works("sft", argv)
    unchanged_and_refused("sft", [*argv, "resume=true", change], out, f"{change.split('=')[0]} was ")


@pytest.mark.parametrize(
    "change",
    ["likelihood=exact", "rewards.speed=2", "rewards.boxed=1", "group_size=5", "groups=3", "kl_beta=0.1"]
    + ["updates=2", "temperature=0.9", "threshold=0.5", "max_tokens=12", "normalizer=batch", "rule=static"]
    + ["correction=mask", "partial_tokens=8", "max_age=3"],
)
def test_another_field_of_dipo(good, tmp_path, change):
    out = tmp_path / "run"
    argv = [*arguments(good, "dipo", out), "steps=1"]
    works("dipo", argv)
    unchanged_and_refused(
        "dipo", [*argv, "resume=true", change], out, f"{change.split('=')[0].split('.')[0]} was "
    )


def test_what_changes_no_result_may_change(good, run, tmp_path):
    """More steps, and how they are computed, kept and evaluated: the end is that of a run begun so."""
    script, argv, out = run
    wanted = tmp_path / "wanted"
    other = ["steps=5", "max_batch=3", "save_every=2", "keep_checkpoints=1", "max_skipped=9"]
    other += [f"eval_data={good}/test.jsonl", "eval_every=5", "eval_limit=2", "eval_max_tokens=8"]
    works(script, [*argv, "resume=true", *other])
    works(script, [*argv, *other, f"out={wanted}"])
    assert_same_end(out, wanted, logs=False)
    for ours, reference in zip(*(strict_records(f / "metrics.jsonl") for f in (out, wanted)), strict=True):
        assert ours == pytest.approx(reference, rel=1e-4, abs=1e-6), "the engine's batches round otherwise"
    assert json.loads((out / "run.json").read_text())["forced"] == []
    works(script, [*argv, "resume=true", "steps=6", "token_budget=64"])


def test_steps_stretch_a_schedule(good, tmp_path):
    out = tmp_path / "run"
    argv = [*arguments(good, "sft", out), "schedule=cosine", "steps=3"]
    works("sft", argv)
    unchanged_and_refused("sft", [*argv, "resume=true", "steps=5"], out, "steps was 3 and is 5")


def test_the_other_script_s_run(good, run, tmp_path):
    """dipo.py on a run of sft.py, and the other way round, with the same checkpoint."""
    script, argv, out = run
    other = {"sft": "dipo", "dipo": "sft"}[script]
    unchanged_and_refused(
        other, [*arguments(good, other, out), "resume=true"], out, f"it is a run of {script}.py"
    )


def test_all_differences_are_listed(good, run):
    script, argv, out = run
    changes = [f"model={good}/other", f"data={good}/other.jsonl", "seed=1", "lr=1"]
    if script == "dipo":
        changes[1] = f"data={good}/test.jsonl"
    error = unchanged_and_refused(script, [*argv, "resume=true", *changes], out, "seed was", "lr was")
    assert f"model {good}/model is not what {good}/other is now" in error
    assert f"is not what {changes[1].removeprefix('data=')} is now" in error


# --------------------------------------------------------------------------------- force, run.json


def test_force_goes_on_and_notes_it(good, run):
    script, argv, out = run
    stderr = works(script, [*argv, "resume=force", "lr=2e-3", "seed=5", "steps=4"])
    (line,) = told(stderr)
    assert "resume=force although" in line and "lr was 0.001 and is 0.002" in line and "seed was 0" in line
    (forced,) = json.loads((out / "run.json").read_text())["forced"]
    assert forced["step"] == 3 and any("lr was" in change for change in forced["changes"])
    assert [r["step"] for r in strict_records(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert strict_records(out / "metrics.jsonl")[-1]["lr"] == 2e-3

    # From then on it is the run with those fields.
    works(script, [*argv, "resume=true", "lr=2e-3", "seed=5", "steps=5"])
    unchanged_and_refused(script, [*argv, "resume=true", "steps=6"], out, "lr was 0.002")
    assert len(json.loads((out / "run.json").read_text())["forced"]) == 1


def test_a_forced_other_model_keeps_the_weights_and_their_config(good, run):
    """The run goes on with its own checkpoint, so the next one has the config of those weights."""
    script, argv, out = run
    before = (out / "latest" / "config.json").read_bytes()
    works(script, [*argv, "resume=force", f"model={good}/wide", "steps=4"])
    assert (out / "latest").resolve().name == "step-000004"
    assert (out / "latest" / "config.json").read_bytes() == before != (good / "wide/config.json").read_bytes()
    load(str(out / "latest"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_text(""),
        lambda file: file.write_text(file.read_text()[:200]),
        lambda file: file.write_text("[]"),
        lambda file: file.write_text('{"script": "sft"}'),
        lambda file: file.write_bytes(b"\xff\xfe"),
    ],
    ids=["missing", "empty", "half", "list", "keys", "bytes"],
)
def test_a_damaged_run_json(run, damage):
    script, argv, out = run
    damage(out / "run.json")
    unchanged_and_refused(script, [*argv, "resume=true", "steps=4"], out, "run.json", "resume=force")


def test_a_missing_run_json_can_be_made_up_for(run):
    script, argv, out = run
    wanted = json.loads((out / "run.json").read_text())
    (out / "run.json").unlink()
    works(script, [*argv, "resume=force", "steps=4"])
    found = json.loads((out / "run.json").read_text())
    assert found["fields"].keys() == wanted["fields"].keys() and found["model"] == wanted["model"]
    works(script, [*argv, "resume=true", "steps=5"])


def test_a_half_written_run_json_of_a_new_run_is_none(good, tmp_path):
    """Killed while run.json was written, before anything else: it begins anew."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json.part").write_text('{"script": ')
    works("sft", [*arguments(good, "sft", out), "resume=true", "steps=1"])


# ---------------------------------------------------------------------------------- model and data


@pytest.fixture
def linked(good, tmp_path):
    """`latest`, a link to a checkpoint: (the link, what it leads to, another checkpoint)."""
    first, second = tmp_path / "step-1", tmp_path / "step-2"
    shutil.copytree(good / "model", first)
    shutil.copytree(good / "other", second)
    (tmp_path / "latest").symlink_to(first)
    return tmp_path / "latest", first, second


def move_on(link: Path, target: Path) -> None:
    link.unlink()
    link.symlink_to(target)


def test_a_link_that_moved_on_is_not_followed_again(good, linked, tmp_path):
    """The reference of the KL is the checkpoint that the run began with, when it is resumed too."""
    link, _, second = linked
    out, wanted = tmp_path / "run", tmp_path / "wanted"
    argv = [*arguments(good, "dipo", out), f"model={link}", "kl_beta=0.5", *MORE]
    works("dipo", [*argv, f"out={wanted}", "steps=4"])
    works("dipo", [*argv, "steps=2"])
    move_on(link, second)
    works("dipo", [*argv, "steps=4", "resume=true"])
    assert_same_end(out, wanted)
    assert strict_records(out / "metrics.jsonl")[-1]["kl"] > 0


@pytest.mark.parametrize("script", ["sft", "dipo"])
def test_without_the_checkpoint_that_it_began_with(good, linked, tmp_path, script):
    """A run that does not look at it any more goes on; one with a KL to it cannot."""
    link, first, second = linked
    out, wanted = tmp_path / "run", tmp_path / "wanted"
    argv = [*arguments(good, script, out), f"model={link}", *MORE]
    works(script, [*argv, f"out={wanted}"])
    works(script, [*argv, "steps=2"])
    move_on(link, second)
    shutil.rmtree(first)
    works(script, [*argv, "resume=true"])
    assert_same_end(out, wanted)


@pytest.mark.parametrize("kind", ["kl_beta=0.5", "lora_rank=2"])
def test_with_what_is_gone_and_needed(good, linked, tmp_path, kind):
    if kind.startswith("lora"):
        pytest.importorskip("peft")
    link, first, second = linked
    out = tmp_path / "run"
    argv = [*arguments(good, "dipo", out), f"model={link}", kind, *MORE]
    works("dipo", [*argv, "steps=2"])
    move_on(link, second)
    shutil.rmtree(first)
    unchanged_and_refused("dipo", [*argv, "resume=true"], out, str(first), "gone")


def test_a_moved_model_under_the_same_name(good, tmp_path, monkeypatch):
    """A relative name from another place, and a folder that was renamed and is linked under its old name."""
    out, wanted = tmp_path / "run", tmp_path / "wanted"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    shutil.copytree(good / "model", tmp_path / "a" / "model")
    monkeypatch.chdir(tmp_path / "a")
    argv = [*arguments(good, "dipo", out), "model=./model", "kl_beta=0.5", *MORE]
    works("dipo", [*argv, f"out={wanted}"])
    works("dipo", [*argv, "steps=2"])
    (tmp_path / "a" / "model").rename(tmp_path / "b" / "model")
    monkeypatch.chdir(tmp_path / "b")
    works("dipo", [*argv, "resume=true"])
    assert_same_end(out, wanted)


def test_the_tiny_model_is_made_again(good, tmp_path):
    """model=tiny is a function of the seed, so nothing is lost with it, for the KL either."""
    out, wanted = tmp_path / "run", tmp_path / "wanted"
    argv = [*arguments(good, "dipo", out), "model=tiny", "kl_beta=0.5", "steps=3", *MORE]
    works("dipo", [*argv, f"out={wanted}"])
    works("dipo", [*argv, "steps=2"])
    shutil.rmtree(out / "tiny")
    works("dipo", [*argv, "resume=true"])
    assert_same_end(out, wanted)
    unchanged_and_refused(
        "dipo", [*argv, "resume=true", f"model={good}/model"], out, "model tiny is not what"
    )


def test_a_model_that_was_written_over(good, tmp_path):
    """Another fine-tune of the same shape under the same name."""
    out, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(good / "model", model)
    argv = [*arguments(good, "sft", out), f"model={model}", "steps=2"]
    works("sft", argv)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] += 1e-3
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    unchanged_and_refused(
        "sft", [*argv, "resume=true", "steps=3"], out, f"model {model} is not what {model} is now"
    )


def test_a_data_file_of_the_same_length(good, tmp_path):
    """One letter is another one; a copy under another name is the same."""
    out, data, wanted = tmp_path / "run", tmp_path / "data.jsonl", tmp_path / "wanted"
    shutil.copy(good / "sft.jsonl", data)
    argv = [*arguments(good, "sft", out), f"data={data}"]
    works("sft", [*argv, f"out={wanted}"])
    works("sft", [*argv, "steps=2"])
    works("sft", [*argv, f"data={good}/sft.jsonl", "steps=3", "resume=true"])
    content, time_before = data.read_text(), data.stat().st_mtime_ns
    digit = content.index("+") - 1
    data.write_text(content[:digit] + str((int(content[digit]) + 1) % 10) + content[digit + 1 :])
    os.utime(data, ns=(time_before, time_before))
    assert data.stat().st_size == len(content)
    unchanged_and_refused("sft", [*argv, "resume=true"], out, f"{data} is now")
    data.write_text(content)
    works("sft", [*argv, "resume=true"])
    assert_same_end(out, wanted)


# --------------------------------------------------------------------------------- what lies there


def test_a_log_that_was_shortened(run, tmp_path):
    script, argv, out = run
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:2]))
    unchanged_and_refused(
        script, [*argv, "resume=true", "steps=5"], out, "metrics.jsonl has ", " bytes, and had"
    )
    stderr = works(script, [*argv, "resume=force", "steps=5"])
    assert "metrics.jsonl" in told(stderr)[0]
    assert [r["step"] for r in strict_records(out / "metrics.jsonl")] == [1, 2, 4, 5]
    wanted = tmp_path / "wanted"
    works(script, [*argv, f"out={wanted}", "steps=5"])
    assert_same_end(out, wanted, logs=False)


def test_a_log_that_is_gone(run):
    script, argv, out = run
    (out / "metrics.jsonl").unlink()
    unchanged_and_refused(script, [*argv, "resume=true", "steps=5"], out, "metrics.jsonl has 0 bytes")


def test_what_only_looks_like_a_checkpoint(run, tmp_path):
    script, argv, out = run
    place = out / "checkpoints"
    shutil.copytree(place / "step-000003", place / "step-000003-backup")
    shutil.copytree(place / "step-000002", place / "step-9")
    (place / "step-000009").write_text("a file")
    (place / "step-").mkdir()
    assert [f.name for f in checkpoints(out)] == ["step-000002", "step-000003"]
    works(script, [*argv, "resume=true", "steps=5"])
    left = {"step-000003-backup", "step-9", "step-000009", "step-", "step-000004", "step-000005"}
    assert {f.name for f in place.iterdir()} == left
    wanted = tmp_path / "wanted"
    works(script, [*argv, f"out={wanted}", "steps=5"])
    assert_same_end(out, wanted)


def test_a_million_steps(tmp_path):
    for name in ("step-1000000", "step-999999", "step-000002", "step-1000001"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    names = ["step-000002", "step-999999", "step-1000000", "step-1000001"]
    assert [f.name for f in checkpoints(tmp_path)] == names


# -------------------------------------------------------------------------------------- evaluate.py


def test_two_evaluations_in_one_folder(good, tmp_path):
    out = tmp_path / "out"
    argv = arguments(good, "evaluate", out)
    works("evaluate", argv)
    changes = [f"model={good}/other"], ["seed=1"], ["max_tokens=12"], ["limit=3"], ["threshold=0.5"]
    for change in changes:
        unchanged_and_refused("evaluate", [*argv, *change], out, str(out))
    before = {f.name: strict_records(f) for f in out.glob("responses-*.jsonl")}
    works("evaluate", argv)
    assert before == {f.name: strict_records(f) for f in out.glob("responses-*.jsonl")}


def test_an_evaluation_in_the_folder_of_a_run(run, good):
    """A training run's folder is no place for responses, nor the other way round; nothing is lost in it."""
    script, argv, out = run
    made_again = (".lock", "report.html")
    before = {name: content for name, content in snapshot(out).items() if name not in made_again}
    run_here("evaluate", arguments(good, "evaluate", out))
    after = snapshot(out)
    assert all(after.get(name) == content for name, content in before.items())


# ------------------------------------------------------------------------------------------- the lock


@pytest.mark.parametrize(("script", "fault"), [("sft", "slow:train"), ("dipo", "graders,slow:rollout")])
def test_a_second_process_is_refused(good, tmp_path, zygote, script, fault):
    """While the first one runs, and while it is stopped; killed, it leaves the folder free at once.

    Even if its grading workers have not noticed yet.
    """
    out, wanted = tmp_path / "run", tmp_path / "wanted"
    argv = [*arguments(good, script, out), *MORE]
    command = [sys.executable, "tests/faults.py", f"{fault}:{tmp_path}", f"{script}.py", *argv]
    first = zygote.popen(command, cwd=ROOT, env=ENVIRONMENT)
    late = time.monotonic() + 60
    while not (tmp_path / "there").exists():
        assert time.monotonic() < late
        time.sleep(0.005)
    second = [sys.executable, f"{script}.py", *argv, "resume=true"]
    for number in (signal.SIGCONT, signal.SIGSTOP):
        os.kill(first.pid, number)
        before = snapshot(out)
        done = zygote.run(second, cwd=ROOT, env=ENVIRONMENT)
        assert f"{out}: another run is writing there" in the_error(done.returncode, done.stderr)
        assert len(told(done.stderr)) == 1
        assert snapshot(out) == before
    first.kill()
    first.wait()
    done = zygote.run(second, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    works(script, [*argv, f"out={wanted}"])
    assert_same_end(out, wanted)


def test_a_disk_without_locks(good, tmp_path, monkeypatch):
    """It is told, and the run goes on."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(common.fcntl, "flock", refuse)
    (line,) = told(works("sft", arguments(good, "sft", tmp_path / "run")))
    assert str(tmp_path / "run") in line and "cannot lock" in line


@pytest.mark.parametrize("script", ["sft", "dipo", "evaluate"])
def test_every_script_takes_the_lock(good, tmp_path, script):
    out = tmp_path / "run"
    with lock(out):
        before = snapshot(out)
        error = the_error(*run_here(script, arguments(good, script, out)))
        assert "another run is writing there" in error and snapshot(out) == before
    works(script, arguments(good, script, out))


def test_a_run_gives_its_folder_free(good, tmp_path):
    """Ended well, or with an error, within the same process."""
    out = tmp_path / "run"
    works("sft", [*arguments(good, "sft", out), "steps=1"])
    lock(out).close()
    with lock(out), pytest.raises(InputError, match="another run"):
        lock(out)


def test_two_ranks_take_it_once(good, tmp_path, zygote):
    """Only the first rank asks for the lock; refused, all ranks end."""
    out = tmp_path / "run"
    argv = [*arguments(good, "sft", out), "steps=2"]
    command = [sys.executable, "tests/faults.py", "impatient", "sft.py", *argv]
    with lock(out):
        done = zygote.torchrun(2, command, cwd=ROOT, env=ENVIRONMENT, timeout=60)
        assert "another run is writing there" in the_error(done.returncode, done.stderr)
    done = zygote.torchrun(2, command, cwd=ROOT, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 0, done.stderr
    unchanged_and_refused("sft", argv, out, "already holds a run")
    works("sft", [*argv, "resume=true", "steps=3", *KEEP_ALL])


def test_a_run_that_is_older_than_a_field_had_its_default(good, tmp_path):
    """Its run.json does not know the field: resuming with another value is another run all the same."""
    out = tmp_path / "run"
    argv = [*arguments(good, "dipo", out), "steps=1"]
    works("dipo", argv)
    record = json.loads((out / "run.json").read_text())
    for name in ("correction", "partial_tokens", "max_age"):
        del record["fields"][name]
    (out / "run.json").write_text(json.dumps(record))
    changes = ["partial_tokens=8", "correction=mask"]
    wanted = ["correction was none and is mask", "partial_tokens was 0 and is 8"]
    unchanged_and_refused("dipo", [*argv, "resume=true", *changes], out, *wanted)
    works("dipo", [*argv, "resume=true"])
