"""How a process ends: in one line, with the right exit code, nobody left behind, and the run can go on."""

import contextlib
import fcntl
import io
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from faults import (
    ENVIRONMENT,
    arguments,
    assert_same_end,
    make_good,
    run_here,
    strict_records,
    the_error,
    told,
    works,
)
from safetensors.torch import load_file, save_file
from test_bad_input import drop_tensor

import sft
from plumbing.common import ROOT, fail, printable, progress, tell
from plumbing.config import how_to_go_on, load_config

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
HANG_GUARD = 60.0  # seconds; far above what anything here needs


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_good(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def reference(good, tmp_path_factory):
    """Folder of an undisturbed run of each script, made when it is asked for."""
    place = tmp_path_factory.mktemp("reference")

    def folder(script: str) -> Path:
        if not (place / script).exists():
            works(script, in_pieces(good, script, place / script))
        return place / script

    return folder


def in_pieces(good: Path, script: str, out: Path) -> list[str]:
    """Arguments of a run that saves and evaluates on the way."""
    more = ["save_every=1", "eval_every=2", f"eval_data={good}/test.jsonl", "eval_max_tokens=8"]
    return arguments(good, script, out, *(more if script != "evaluate" else []))


def wait_for(happened, what: str) -> None:
    late = time.monotonic() + HANG_GUARD
    while not happened():
        assert time.monotonic() < late, f"never: {what}"
        time.sleep(0.002)


def children(pid: int) -> list[int]:
    """All processes below this one."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def ended(processes, log: Path, number: int) -> str:
    """Send the signal to all, and what they print until they have ended, with whatever they started."""
    below = [child for process in processes for child in children(process.pid)]
    for process in processes:
        os.kill(process.pid, number)
    start = time.monotonic()
    for process in processes:
        assert process.wait(HANG_GUARD) == CODES[number], log.read_text()
    assert time.monotonic() - start < 5
    wait_for(lambda: not any(map(is_running, below)), f"the end of the processes {below}")
    return log.read_text()


# ------------------------------------------------------------------------------ Ctrl-C and SIGTERM


@pytest.mark.parametrize("script", ["sft", "dipo", "evaluate"])
@pytest.mark.parametrize("number", CODES)
def test_while_importing(good, tmp_path, script, number):
    """In a process of its own, from the moment on that it catches the signal: before the heavy imports."""
    log, out = tmp_path / "log", tmp_path / "out"
    with open(log, "w") as file:
        command = [sys.executable, f"{script}.py", *arguments(good, script, out)]
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=file)

    def catches() -> bool:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
        return int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1

    wait_for(catches, "a handler of SIGTERM")
    time.sleep(0.2)
    stderr = ended([process], log, number)
    assert stderr.startswith(f"interrupted ({number.name}): {out}") and stderr.count("\n") == 1
    assert not out.exists()


MOMENTS = [
    ("sft", "load", signal.SIGINT),
    ("sft", "train", signal.SIGINT),
    ("sft", "save", signal.SIGTERM),
    ("dipo", "train", signal.SIGTERM),
    ("dipo", "rollout", signal.SIGINT),
    ("dipo", "rollout", signal.SIGTERM),
    ("dipo", "save", signal.SIGINT),
    ("evaluate", "rollout", signal.SIGTERM),
    ("evaluate", "load", signal.SIGINT),
    ("sft", "evaluate", signal.SIGINT),
    ("dipo", "evaluate", signal.SIGTERM),
]


@pytest.mark.parametrize(("script", "phase", "number"), MOMENTS)
def test_in_any_phase(good, reference, tmp_path, zygote, script, phase, number):
    """Caught in the middle of a phase, the run ends in a line and goes on from there to the same end."""
    log, out = tmp_path / "log", tmp_path / "out"
    argv = in_pieces(good, script, out)
    command = [sys.executable, "tests/faults.py", f"slow:{phase}:{tmp_path}", f"{script}.py", *argv]
    with open(log, "w") as file:
        process = zygote.popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file)
    wait_for((tmp_path / "there").exists, "the phase")
    (line,) = told(ended([process], log, number))
    assert line.startswith(f"interrupted ({number.name}): {out} has ")
    assert "the same command" in line and ("resume=true" in line) == (script != "evaluate")

    if script == "evaluate":
        works(script, argv)
        for file in reference(script).glob("responses-*.jsonl"):
            assert strict_records(out / file.name) == strict_records(file)
        return
    done = sorted(f.name for f in out.glob("checkpoints/step-*"))
    assert (done[-1] if done else "no checkpoint") in line
    works(script, [*argv, "resume=true"])
    assert_same_end(out, reference(script))
    assert not list(out.rglob(".part-*"))


def test_the_last_line_names_a_checkpoint(good, tmp_path):
    """Not what only looks like one."""
    place = tmp_path / "checkpoints"
    for name in ("step-000002", "step-000010", "step-000010-backup", "step-", "step-x"):
        (place / name).mkdir(parents=True)
    config = load_config(sft.SFTConfig, arguments(good, "sft", tmp_path))
    assert f"{tmp_path} has step-000010;" in how_to_go_on(config)
    (place / "step-1000000").mkdir()
    assert f"{tmp_path} has step-1000000;" in how_to_go_on(config)


def test_grading_workers_end_too(good, tmp_path, zygote):
    log, out = tmp_path / "log", tmp_path / "out"
    argv = arguments(good, "dipo", out)
    command = ["tests/faults.py", f"graders,slow:rollout:{tmp_path}", "dipo.py", *argv]
    with open(log, "w") as file:
        process = zygote.popen([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, stderr=file)
    wait_for((tmp_path / "there").exists, "the phase")
    assert children(process.pid), "there are grading workers"
    assert len(told(ended([process], log, signal.SIGINT))) == 1


def test_ignored_under_nohup(good, reference, tmp_path, zygote):
    """A SIGINT that the caller ignores, as nohup and shells do for background jobs, stays ignored."""
    log, out = tmp_path / "log", tmp_path / "out"
    argv = arguments(good, "sft", out, "save_every=1", "steps=300")
    command = [sys.executable, "tests/faults.py", "deaf", "sft.py", *argv]
    with open(log, "w") as file:
        process = zygote.popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=file)
    wait_for((out / "latest").exists, "a checkpoint")
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    ended([process], log, signal.SIGTERM)


# ------------------------------------------------------------------------------------ several ranks


def on_two_ranks(zygote, log: Path, faults: str, script: str, argv: list[str]) -> list:
    """Two ranks that run on; the caller keeps the store, by which they find each other."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": store.host,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    command = [sys.executable, "tests/faults.py", faults, f"{script}.py", *argv]
    with open(log, "w") as file:
        each = [ENVIRONMENT | shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(2)]
        ranks = [zygote.popen(command, cwd=ROOT, env=env, stdout=file, stderr=file) for env in each]
    return [store, *ranks]


@pytest.mark.parametrize("number", CODES)
def test_of_two_ranks_the_first_speaks(good, tmp_path, zygote, number):
    """One is asleep in Python, the other waits for it in C code."""
    log, out = tmp_path / "log", tmp_path / "out"
    argv = arguments(good, "sft", out, "save_every=1")
    _store, *ranks = on_two_ranks(zygote, log, f"slow:train:{tmp_path}:1", "sft", argv)
    wait_for((tmp_path / "there").exists, "the phase")
    time.sleep(0.3)  # the other one gets to its collective call
    (line,) = told(ended(ranks, log, number))
    assert line.startswith(f"interrupted ({number.name}): {out} has step-000001;")
    works("sft", [*argv, "resume=true"])
    assert [r["step"] for r in strict_records(out / "metrics.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_other(good, tmp_path, zygote, killed):
    """Without a launcher: the other one notices by itself, waits whether it is ended, and says so."""
    log = tmp_path / "log"
    argv = arguments(good, "sft", tmp_path / "out")
    faults = f"impatient,slow:train:{tmp_path}:{killed}"
    _store, *ranks = on_two_ranks(zygote, log, faults, "sft", argv)
    wait_for((tmp_path / "there").exists, "the phase")
    time.sleep(0.3)
    ranks[killed].kill()
    code = ranks[1 - killed].wait(HANG_GUARD)
    assert "another rank has ended" in the_error(code, log.read_text())


@pytest.mark.parametrize(
    ("change", "wanted"),
    [("stepz=3", "stepz"), ("data={bad}", "bad.jsonl:1"), ("model={bad}", "bad.jsonl")],
    ids=["config", "data", "model"],
)
def test_an_error_of_all_ranks_is_one_line(good, tmp_path, zygote, change, wanted):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    argv = arguments(good, "sft", tmp_path / "out", change.format(bad=bad))
    done = zygote.torchrun(
        2, [sys.executable, "sft.py", *argv], cwd=ROOT, env=ENVIRONMENT, timeout=HANG_GUARD
    )
    assert wanted in the_error(done.returncode, done.stderr)
    assert len(told(done.stderr)) == 1


def test_an_error_of_one_rank_alone(good, tmp_path, zygote):
    """All end with it, at once and in one line, and what was done until then is saved."""
    out = tmp_path / "out"
    argv = arguments(good, "dipo", out, "rewards.moody=1")
    command = [sys.executable, "tests/faults.py", "bad_reward:10:1", "dipo.py", *argv]  # 4 in a step
    done = zygote.torchrun(2, command, cwd=ROOT, env=ENVIRONMENT, timeout=HANG_GUARD)
    error = the_error(done.returncode, done.stderr)
    assert "out of mood" in error and f"{good}/rl.jsonl:" in error
    assert (out / "latest").resolve().name == "step-000002"


# ---------------------------------------------------------------------------- what a person sees


def test_our_line_is_the_only_one(good, tmp_path, zygote):
    """No report by a library on a checkpoint that lacks a tensor, no bar of one that it reads."""
    model = tmp_path / "model"
    shutil.copytree(good / "model", model)
    drop_tensor(model)
    argv = arguments(good, "sft", tmp_path / "out", f"model={model}")
    done = zygote.run([sys.executable, "sft.py", *argv], cwd=ROOT, env=ENVIRONMENT)
    assert "missing tensor" in the_error(done.returncode, done.stderr)
    assert done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.parametrize("script", ["sft", "dipo", "evaluate"])
def test_a_file_or_a_pipe_gets_plain_lines(good, tmp_path, zygote, script):
    """No escapes, and nothing that is written over: read as bytes, since text turns \\r into line breaks."""
    log, argv = tmp_path / "log", arguments(good, script, tmp_path / "out")
    with open(log, "w") as file:
        command = [sys.executable, f"{script}.py", *argv]
        process = zygote.popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file)
    assert process.wait(HANG_GUARD) == 0, log.read_text()
    assert not set(log.read_bytes()) & set(b"\r\x1b\b")
    lines = log.read_text().splitlines()
    name, ends = {
        "sft": ("sft", "5/5 steps, 00:0"),
        "dipo": ("dipo", "4/4 steps, 00:0"),
        "evaluate": ("rl-static", "4/4 responses, 00:0"),
    }[script]
    (line,) = [line for line in lines if line.startswith(f"{name}: ")]
    assert line.startswith(f"{name}: {ends}") and re.search(r"\d(step|response)/s", line), line
    assert script == "evaluate" or not told(log.read_text()), "only bars and the engine"


def test_a_terminal_gets_a_bar(good, tmp_path, zygote):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    argv = arguments(good, "sft", tmp_path / "out")
    process = zygote.popen([sys.executable, "sft.py", *argv], cwd=ROOT, env=ENVIRONMENT, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the last one to have it open is gone
        while piece := os.read(ours, 1000):
            shown += piece
    os.close(ours)
    assert process.wait(HANG_GUARD) == 0
    assert b"\r" in shown and b"sft: 100%|" in shown and b"5/5" in shown


def test_lines_of_a_bar_now_and_then(monkeypatch):
    monkeypatch.setattr(progress, "line_seconds", 0.0)
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        with progress(total=3, desc="work", unit="piece") as bar:
            for _ in range(3):
                time.sleep(0.15)  # tqdm itself looks every 0.1 s
                bar.update()
        with progress(total=3, desc="quiet", unit="piece", leave=False) as bar:
            bar.update()
        with progress(total=3, desc="other rank", unit="piece", disable=True) as bar:
            bar.update()
    lines = stderr.getvalue().splitlines()
    counts = [line.split(" ")[1] for line in lines if line.startswith("work: ")]
    assert counts[-1] == "3/3" and {"1/3", "2/3"} <= set(counts)
    assert all("pieces, 00:0" in line and "piece/s" in line for line in lines if "work: 0/3" not in line)
    assert not any("other rank" in line for line in lines)


def test_a_short_run_of_a_bar_is_one_line():
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        for _ in progress(range(1000), desc="work", unit="piece"):
            pass
        for _ in progress(range(1000), desc="hidden", unit="piece", leave=False):
            pass
        tell("done")
    first, second = stderr.getvalue().splitlines()
    assert first.startswith("work: 1000/1000 pieces, ") and second == "done"


def test_what_others_wrote_moves_no_terminal():
    """Escapes, line breaks, a bell, marks that turn the direction of writing; letters stay."""
    text = "a\x1b[31mred\r\nnext\x07 \u202eright-to-left\u2066 \x9b2J é 数 end"
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as end:
        tell(text)
        fail(text)
    assert end.value.code == 2
    one, two = stderr.getvalue().splitlines()
    assert two == f"error: {one}" and stderr.getvalue().count("\n") == 2
    assert one.isprintable() and "é 数 end" in one
    for escape in (r"\x1b[31mred next", r"\x07", r"\u202e", r"\u2066", r"\x9b"):
        assert escape in one
    assert printable("plain text, é 数") == "plain text, é 数"


def test_a_file_with_such_a_name(good, tmp_path):
    data = tmp_path / "a\u202eb.jsonl"
    data.write_text("{}\n")
    error = the_error(*run_here("sft", arguments(good, "sft", tmp_path / "out", f"data={data}")))
    assert error.isprintable() and r"a\u202eb.jsonl:1" in error


def test_a_tensor_with_such_a_name(good, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(good / "model", model)
    tensors = load_file(model / "model.safetensors")
    tensors["a\x1b[2J\nb"] = tensors["model.norm.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    error = the_error(*run_here("sft", arguments(good, "sft", tmp_path / "out", f"model={model}")))
    assert error.isprintable() and "unexpected tensor" in error


def test_a_full_disk_under_the_log_is_no_reason_to_end(tmp_path):
    """What a run prints goes to a file that cannot grow any more."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import resource, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from plumbing.common import progress, run_script, tell\n"
        "def main():\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "    for i in progress(range(30), desc='steps'):\n"
        "        tell('a line of twenty or more characters')\n"
        "        print('and as many of them again')\n"
        "    sys.exit(0 if i == 29 else 1)\n"
        "run_script(main)\n"
    )
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        done = subprocess.run([sys.executable, str(script)], stdout=out, stderr=err)
    assert done.returncode == 0
    assert (tmp_path / "out").stat().st_size <= 20 and (tmp_path / "err").stat().st_size <= 20
