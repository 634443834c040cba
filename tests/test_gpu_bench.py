"""benchmarks/gpu.py at toy size on a CPU, and its runner with stages that fail, hang and are killed."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gpu
import pytest
import torch.distributed as dist
import wheels
from stages import Check
from zygote import Zygote

from plumbing.common import InputError
from rollout import LMDeployEngine

ROOT = Path(__file__).resolve().parents[1]
WITH_LMDEPLOY = ["parity", "copies", "update", "sleep", "loop", "transfer"]

# ---------------------------------------------------------------------------------- the runner

PROGRAM = f"""
import os, subprocess, sys, time
sys.path[:0] = ["{ROOT}", "{ROOT}/benchmarks"]
from stages import Check, Stages
stage = Stages(small="SMALL" in os.environ, program=__file__)

@stage(1, real={{"size": 2}}, toy={{"size": 1}})
def good(folder, size):
    (folder / "scratch").write_text("room of its own")
    yield Check("size", size)
    yield Check("speed", 1.0, "x", at_least=2, soft=True)

@stage(1, real={{}}, toy={{}})
def breaks(folder):
    yield Check("before", 1)
    raise RuntimeError("no kernel image")

@stage(1, real={{}}, toy={{}}, limit=5)
def hangs(folder):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield Check("child", child.pid)
    time.sleep(600)

@stage(1, real={{}}, toy={{}})
def wrong(folder):
    yield Check("error", float("nan"), at_most=1)

@stage(1, real={{}}, toy=None)
def large(folder):
    yield Check("size", 1)

@stage(1, real={{}}, toy={{}})
def last(folder):
    yield Check("it went on", 1, at_least=1)

stage.main(stage.parser("").parse_args(), "a machine")
"""


@pytest.fixture
def program(tmp_path) -> list[str]:
    """A command that runs these stages and writes to tmp_path/out."""
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    return [sys.executable, str(file)]


def run(command: list[str], out: Path, *options: str) -> tuple[subprocess.CompletedProcess, dict]:
    """What it printed, and its results.json."""
    arguments = [*command, "--out", str(out), *options]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    return done, json.loads((out / "results.json").read_text())


def gone(pid: int) -> bool:
    """Whether a process is no more; it may take a moment."""
    for _ in range(200):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or ") Z " in state.read_text():
            return True
        time.sleep(0.05)
    return False


def test_what_fails_or_hangs_is_reported_and_the_rest_goes_on(program, tmp_path):
    done, results = run(program, tmp_path / "out")
    stages = results["stages"]
    verdicts = {name: result["verdict"] for name, result in stages.items()}
    bad = {"breaks": "crashed", "hangs": "hung", "wrong": "FAILED"}
    assert verdicts == {"good": "missed", "large": "ok", "last": "ok"} | bad
    assert done.returncode == 1
    assert "RuntimeError: no kernel image" in stages["breaks"]["error"]
    assert stages["breaks"]["checks"][0]["value"] == 1, "what it found before it failed"
    assert stages["hangs"]["seconds"] < 60 and gone(stages["hangs"]["checks"][0]["value"])
    assert " in hangs" in stages["hangs"]["error"], "where it was"
    assert results["machine"] == "a machine" and results["commit"] and results["command"]
    page = (tmp_path / "out" / "results.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1 and len(rows) == 2 + 6 + 7
    assert "no kernel image" in page and "| speed | 1 x | at least 2 | missed |" in page
    for name in verdicts:
        assert f"{name}: begins" in done.stdout and f"{name}: {verdicts[name]}" in done.stdout


def test_stages_are_chosen_and_earlier_results_stay(program, tmp_path, monkeypatch):
    monkeypatch.setenv("SMALL", "1")
    done, results = run(program, tmp_path, "--stages", "good,large")
    verdicts = {name: result["verdict"] for name, result in results["stages"].items()}
    assert done.returncode == 0 and verdicts == {"good": "ok", "large": "needs CUDA"}
    assert [check["value"] for check in results["stages"]["good"]["checks"]] == [1, 1.0]
    done, results = run(program, tmp_path, "--stages", "good,last", "--minutes", "0.01")
    assert results["stages"]["good"]["verdict"] == "ok", "from the call before"
    assert results["stages"]["last"]["verdict"] == "left out: expected 1 s, 1 s are left"
    done, results = run(program, tmp_path, "--stages", "last")
    assert set(results["stages"]) == {"good", "large", "last"} and done.returncode == 0
    before = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(before | {"machine": "another one"}))
    done, results = run(program, tmp_path, "--stages", "last")
    assert set(results["stages"]) == {"last"}, "figures of two machines do not share a table"
    done = subprocess.run([*program, "--stages", "god"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'god', expected of good" in done.stderr


def test_what_was_measured_survives_a_kill_and_nothing_goes_on(program, tmp_path):
    process = subprocess.Popen([*program, "--out", str(tmp_path), "--stages", "last,hangs"])
    lines = tmp_path / "hangs.jsonl"
    while not (lines.exists() and lines.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["stages"]["last"]["verdict"] == "ok" and "hangs" not in results["stages"]
    assert gone(json.loads(lines.read_text())["value"])


@pytest.mark.parametrize(
    ("bounds", "value", "verdict"),
    [
        ({}, 3.0, "-"),
        ({"at_most": 3}, 3.0, "ok"),
        ({"at_most": 3}, 3.1, "FAILED"),
        ({"at_least": 3}, 2.9, "FAILED"),
        ({"at_least": 3, "soft": True}, 2.9, "missed"),
        ({"at_least": 3}, float("nan"), "FAILED"),
    ],
)
def test_verdicts(bounds, value, verdict):
    assert Check("", value, **bounds).verdict == verdict


# ---------------------------------------------------------------------------------- the stages


@pytest.mark.parametrize("name", ["machine", "flex", "step", "score", "embedded"])
def test_a_stage_at_toy_size(name, tmp_path):
    checks = list(gpu.stage.checks(name, tmp_path))
    assert checks and not [check for check in checks if check.verdict == "FAILED"]
    assert all(check.value == check.value for check in checks), "no figure is nan"


@pytest.fixture(scope="module")
def lmdeploy_zygote():
    pytest.importorskip("lmdeploy", reason="pip install --no-deps -r requirements-lmdeploy.txt")
    zygote = Zygote(["lmdeploy_zygote"])
    yield zygote
    zygote.close()


@pytest.mark.parametrize("name", WITH_LMDEPLOY)
def test_a_stage_with_lmdeploy(name, tmp_path, monkeypatch, lmdeploy_zygote):
    monkeypatch.setattr(LMDeployEngine, "setup", "")  # the stage changes both
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(LMDeployEngine, "launch", lmdeploy_zygote.popen)
    try:
        checks = list(gpu.stage.checks(name, tmp_path))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert checks and not [check for check in checks if check.verdict == "FAILED"]


def test_wrong_weights_are_noticed(tmp_path, monkeypatch, lmdeploy_zygote):
    """The stage `update` fails if the engine keeps the weights that it has."""
    monkeypatch.setattr(LMDeployEngine, "setup", "")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(LMDeployEngine, "launch", lmdeploy_zygote.popen)
    monkeypatch.setattr(LMDeployEngine, "update_weights", lambda *_: None)
    verdicts = [check.verdict for check in gpu.stage.checks("update", tmp_path)]
    assert verdicts == ["ok", "FAILED", "ok", "FAILED"]


def test_the_command(tmp_path, zygote):
    """All in all, with the stages that are not for a CPU."""
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--out", str(tmp_path)]
    done = zygote.run([*command, "--stages", "machine,large,step_selective,tests"])
    assert done.returncode == 0, done.stderr
    stages = json.loads((tmp_path / "results.json").read_text())["stages"]
    verdicts = {name: result["verdict"] for name, result in stages.items()}
    skipped = dict.fromkeys(("step_selective", "large", "tests"), "needs CUDA")
    assert verdicts == {"machine": "ok"} | skipped


def test_every_stage_is_run_here_or_says_why_not():
    toy = {name for name, stage in gpu.stage.known.items() if stage.toy is not None}
    # `pipeline` starts benchmarks/rollout.py, three processes with all imports: too slow for here.
    assert toy == {"machine", "flex", "step", "score", "embedded", "pipeline", *WITH_LMDEPLOY}


# ---------------------------------------------------------------------------------- the wheels


def test_lmdeploys_wheel_is_made_small_and_installs_without_a_network(tmp_path, monkeypatch):
    wheel = tmp_path / "wheels" / "lmdeploy-0.18.0-py3-none-any.whl"
    wheel.parent.mkdir()
    info = "lmdeploy-0.18.0.dist-info"
    kept = {"lmdeploy/__init__.py": "answer = 42\n", "lmdeploy/turbomind/turbomind.py": ""}
    kept[f"{info}/METADATA"] = "Metadata-Version: 2.1\nName: lmdeploy\nVersion: 0.18.0\n"
    kept[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    dropped = ["lmdeploy/turbomind/_turbomind.cpython-312.so", "lmdeploy/turbomind/lib/libnccl.so"]
    with zipfile.ZipFile(wheel, "w") as file:
        for name, text in (kept | dict.fromkeys(dropped, "code")).items():
            file.writestr(name, text)
        file.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*kept, *dropped]))
    wheels.without_turbomind(wheel)
    with zipfile.ZipFile(wheel) as file:
        assert set(file.namelist()) == {*kept, f"{info}/RECORD"}
        assert "_turbomind" not in file.read(f"{info}/RECORD").decode()
    monkeypatch.setenv("PYTHONPATH", "first")
    monkeypatch.setattr(sys, "path", list(sys.path))
    wheels.install(wheel.parent, tmp_path / "site")
    assert (tmp_path / "site/lmdeploy/__init__.py").read_text() == "answer = 42\n"
    assert os.environ["PYTHONPATH"] == os.pathsep.join(["first", str(tmp_path / "site")])
    with pytest.raises(InputError, match="has no wheels"):
        wheels.install(tmp_path, tmp_path / "site")


def test_carried_packages_are_pinned_or_installed(monkeypatch):
    """The versions that are asked for come from the requirement files."""
    asked = []
    monkeypatch.setattr(wheels, "run_pip", lambda *arguments: asked.extend(arguments))
    monkeypatch.setattr(wheels, "without_turbomind", lambda wheel: None)
    monkeypatch.setattr(wheels.Path, "glob", lambda *_: [ROOT / "README.md"])
    wheels.collect(ROOT)
    pins = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-lmdeploy.txt").read_text()
    wanted = [argument for argument in asked if "==" in argument and not argument.startswith("--")]
    assert len(wanted) == len(wheels.CARRIED)
    assert [pin for pin in wanted if pin not in pins] == [wanted[3]] and "antlr4" in wanted[3]
