"""A checkpoint or a line of a log that cannot be written is tried again, or kept elsewhere; it is told."""

import builtins
import errno
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from faults import (
    ENVIRONMENT,
    KEEP_ALL,
    arguments,
    assert_same_end,
    install,
    make_good,
    run_here,
    snapshot,
    strict_records,
    the_error,
    told,
    works,
)

from plumbing import run_folder
from plumbing.common import ROOT
from plumbing.run_folder import spare_folder

FILES = {"config.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json"}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_good(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module", params=["sft", "dipo"])
def reference(request, good, tmp_path_factory):
    """(script, folder of its run to the end)."""
    out = tmp_path_factory.mktemp("reference") / request.param
    works(request.param, arguments(good, request.param, out))
    return request.param, out


def names(out: Path) -> list[str]:
    return sorted(f.name for f in (out / "checkpoints").iterdir())


# ----------------------------------------------------------- the checkpoint that the run began with


def test_the_model_s_folder_may_go_away_once_the_run_has_begun(good, reference, tmp_path, monkeypatch):
    (script, wanted), model, out = reference, tmp_path / "model", tmp_path / "out"
    shutil.copytree(good / "model", model)
    module = sys.modules[script]
    guard = module.Guard

    def gone(*arguments):
        shutil.rmtree(model)
        return guard(*arguments)

    monkeypatch.setattr(module, "Guard", gone)
    works(script, arguments(good, script, out, f"model={model}"))
    assert not model.exists()
    assert_same_end(out, wanted)
    found, expected = (snapshot((f / "latest").resolve()) for f in (out, wanted))
    assert found.keys() == expected.keys() and found.keys() >= FILES
    assert found["tokenizer.json"] == (good / "model" / "tokenizer.json").read_bytes()


def test_a_link_to_nowhere_and_a_folder_beside_the_weights(good, tmp_path):
    """They are not copied; a link to a file is, as a file."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(good / "model", model)
    (model / "notes.txt").symlink_to(tmp_path / "nowhere.txt")
    (model / "history.json").mkdir()
    (tmp_path / "license.txt").write_text("free")
    (model / "license.txt").symlink_to(tmp_path / "license.txt")
    works("sft", arguments(good, "sft", out, f"model={model}"))
    found = {f.name for f in (out / "latest").iterdir()}
    assert found >= FILES and "license.txt" in found and not found & {"notes.txt", "history.json"}
    assert not (out / "latest" / "license.txt").is_symlink()


# ------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("call", [1, 2], ids=["weights", "moments"])
def test_a_save_that_fails_once_is_tried_again(good, reference, tmp_path, monkeypatch, call):
    (script, wanted), out = reference, tmp_path / "out"
    install(f"failing_writes:{call}:{call},at_once", monkeypatch.setattr)
    stderr = works(script, arguments(good, script, out))
    (line,) = told(stderr)
    assert "No space left on device" in line and "trying again" in line
    assert_same_end(out, wanted)
    assert snapshot((out / "latest").resolve()).keys() == snapshot((wanted / "latest").resolve()).keys()
    assert not list(out.rglob(".part-*"))


def test_the_counters_that_cannot_be_written(good, tmp_path, monkeypatch):
    """state.json comes last: without it nothing appears under the checkpoint's name."""
    write, calls = run_folder.write_json, [0]

    def failing(path, content):
        if path.name == "state.json":
            calls[0] += 1
            if calls[0] == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    install("at_once", monkeypatch.setattr)
    monkeypatch.setattr(run_folder, "write_json", failing)
    stderr = works("sft", arguments(good, "sft", tmp_path / "out"))
    assert len(told(stderr)) == 1 and "trying again" in stderr
    assert names(tmp_path / "out") == ["step-000005"]


def test_a_checkpoint_without_a_place_is_put_elsewhere(good, reference, tmp_path, monkeypatch):
    """Where checkpoints/ should be lies a file. What is said to be moved is moved, and the run goes on."""
    (script, _), out, refuge, longer = reference, tmp_path / "out", tmp_path / "spare", tmp_path / "longer"
    out.mkdir()
    (out / "checkpoints").write_text("a file")
    with monkeypatch.context() as patch:
        install(f"at_once,spare:{refuge}", patch.setattr)
        error = the_error(*run_here(script, arguments(good, script, out, "steps=3")))
    place, target = re.search(r"step 3 is in (\S+): move it to (\S+)", error).groups()
    assert str(out / "checkpoints") in error.split(";")[0], "what could not be written"
    assert {f.name for f in Path(place).iterdir()} >= FILES
    assert not (out / "latest").is_symlink() and (out / "checkpoints").read_text() == "a file"
    assert len(strict_records(out / "metrics.jsonl")) == 3

    (out / "checkpoints").unlink()
    Path(target).mkdir()
    shutil.move(place, target)
    works(script, arguments(good, script, out, "steps=6", "resume=true"))
    works(script, arguments(good, script, longer, "steps=6"))
    assert_same_end(out, longer)


def test_nothing_older_is_dropped_while_the_newest_is_elsewhere(good, tmp_path, monkeypatch):
    """Step 2 finds no room, not when it is tried again either; from step 3 on there is room again."""
    out, longer, wanted = tmp_path / "out", tmp_path / "longer", tmp_path / "wanted"
    argv = ["save_every=1", "keep_checkpoints=1"]
    with monkeypatch.context() as patch:
        install(f"failing_writes:3:6,at_once,spare:{tmp_path}/spare", patch.setattr)
        assert "step 2 is in " in the_error(*run_here("sft", arguments(good, "sft", out, *argv, "steps=2")))
    assert names(out) == ["step-000001"] and (out / "latest" / "state.json").exists()
    assert (tmp_path / "spare" / "step-000002" / "state.json").exists()

    with monkeypatch.context() as patch:
        install(f"failing_writes:3:6,at_once,spare:{tmp_path}/spare-too", patch.setattr)
        stderr = works("sft", arguments(good, "sft", longer, *argv))
    assert "step 2 is in " in stderr and names(longer) == ["step-000005"]
    works("sft", arguments(good, "sft", wanted, *argv))
    assert_same_end(longer, wanted)


def test_a_disk_that_stays_full_everywhere(good, tmp_path, monkeypatch):
    """The run goes on, the checkpoint before is untouched, and the last word says what is missing."""
    out = tmp_path / "out"
    works("sft", arguments(good, "sft", out, "steps=2"))
    before = snapshot(out / "checkpoints")
    install(f"full:{tmp_path},at_once,spare:{tmp_path}/spare", monkeypatch.setattr)
    error = the_error(*run_here("sft", arguments(good, "sft", out, "steps=4", "resume=true", *KEEP_ALL)))
    assert "No space left on device" in error and "step 4 is not saved" in error
    assert snapshot(out / "checkpoints") == before
    assert [r["step"] for r in strict_records(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert not list(tmp_path.rglob(".part-*"))
    monkeypatch.undo()
    works("sft", arguments(good, "sft", out, "resume=true"))
    works("sft", arguments(good, "sft", tmp_path / "wanted"))
    assert_same_end(out, tmp_path / "wanted")


def test_the_spare_folder_is_where_there_is_room(tmp_path, monkeypatch):
    room = {tmp_path / "home": 5, tmp_path / "temporary": 7, tmp_path / "here": 6}
    for folder in room:
        folder.mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PWD", str(tmp_path / "here"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(run_folder.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda place: usage._replace(free=room[place]))
    found = spare_folder(Path("runs/one"))
    assert found.parent == tmp_path / "temporary"
    assert found.name.startswith("rescued-") and found.name.endswith("here-runs-one")
    assert spare_folder(Path("runs/two")) != found


def test_what_lies_there_already_stays(good, tmp_path, monkeypatch):
    """Another run under the same name put its checkpoint and its lines there."""
    out, refuge = tmp_path / "out", tmp_path / "spare"
    (refuge / "step-000005").mkdir(parents=True)
    (refuge / "step-000005" / "state.json").write_text("of another run")
    (refuge / "metrics.jsonl").write_text("of another run")
    before = snapshot(refuge)
    install(f"full:{out},at_once,spare:{refuge}", monkeypatch.setattr)
    log_without_room(monkeypatch, 3, 99)
    error = the_error(*run_here("sft", arguments(good, "sft", out)))
    assert snapshot(refuge) == before
    place = Path(re.search(r"step 5 is in (\S+): move", error).group(1))
    assert place.name == "step-000005" and {f.name for f in place.iterdir()} >= FILES
    lines = Path(re.search(r"logs are in (\S+)$", error).group(1))
    assert [r["step"] for r in strict_records(lines)] == [3, 4, 5]


@pytest.mark.parametrize("fault", ["failing_writes:1:1:1", "full:{out}:1"], ids=["once", "always"])
def test_a_disk_that_is_full_for_one_of_two_ranks(good, tmp_path, zygote, fault):
    out, refuge = tmp_path / "out", tmp_path / "spare"
    faults = f"{fault.format(out=out)},at_once,impatient,spare:{refuge}"
    command = [faults, "sft.py", *arguments(good, "sft", out, "steps=2")]
    done = zygote.torchrun(
        2, [sys.executable, "tests/faults.py", *command], cwd=ROOT, env=ENVIRONMENT, timeout=60
    )
    lines = told(done.stderr)
    assert "No space left on device" in lines[0] and "trying again" in lines[0]
    moments = {f"optimizer-0000{i}-of-00002.safetensors" for i in (1, 2)}
    if fault.startswith("failing"):
        assert done.returncode == 0 and len(lines) == 1, done.stderr
        assert {f.name for f in (out / "latest").iterdir()} >= FILES - {"optimizer.safetensors"} | moments
    else:
        assert f"step 2 is in {refuge}/step-000002" in the_error(done.returncode, done.stderr)
        assert {f.name for f in refuge.glob("*/*")} >= FILES - {"optimizer.safetensors"} | moments
        assert not list(out.rglob("step-*"))


# ----------------------------------------------------------------------------------------- the logs


def log_without_room(monkeypatch, first: int, last: int) -> None:
    """These attempts to append to metrics.jsonl write half of it and find the disk full."""
    calls = [0]

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, text):
            self.file.write(text[: len(text) // 2])
            self.file.flush()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(path, mode="r", *rest, **options):
        file = builtins.open(path, mode, *rest, **options)  # noqa: SIM115, its user closes it
        if Path(path).name != "metrics.jsonl" or mode != "a":
            return file
        calls[0] += 1
        return Half(file) if first <= calls[0] <= last else file

    monkeypatch.setattr(run_folder, "open", opened, raising=False)


def test_lines_of_a_log_wait_for_room(good, reference, tmp_path, monkeypatch):
    (script, wanted), out = reference, tmp_path / "out"
    log_without_room(monkeypatch, 2, 3)
    stderr = works(script, arguments(good, script, out))
    (line,) = told(stderr)
    assert "metrics.jsonl" in line and "No space left" in line and "wait in memory" in line
    assert_same_end(out, wanted)


def test_lines_that_never_find_room_are_put_elsewhere(good, tmp_path, monkeypatch):
    out, refuge, wanted = tmp_path / "out", tmp_path / "spare", tmp_path / "wanted"
    works("sft", arguments(good, "sft", wanted))
    install(f"spare:{refuge}", monkeypatch.setattr)
    log_without_room(monkeypatch, 3, 99)
    error = the_error(*run_here("sft", arguments(good, "sft", out)))
    assert "metrics.jsonl" in error and str(refuge) in error
    found = [strict_records(folder / "metrics.jsonl") for folder in (out, refuge)]
    assert [r["step"] for r in found[0]] == [1, 2]
    assert found[0] + found[1] == strict_records(wanted / "metrics.jsonl")
    assert_same_end(out, wanted, logs=False)
