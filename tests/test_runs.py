"""runs.sh to its end on the CPU, killed on the way; what it refuses; what it predicts."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import download
import node
import pytest
from packaging.requirements import Requirement

from evaluate import PROTOCOLS, EvalConfig
from plumbing.common import ROOT, InputError, read_records
from plumbing.config import load_config
from plumbing.gpu import GIB

SIZES = ["1.7B", "8B", "tiny"]
SHELL_FILES = ["runs.sh", "docs/slurm.sbatch"]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
HANG_GUARD = 300.0  # seconds; far above what anything here needs
NAMES = ("OUT", "DATA", "SOURCE", "GPUS", "SFT", "DIPO", "EVAL", "NNODES", "NODE_RANK", "MASTER", "DRY")


def environment(**more: str) -> dict[str, str]:
    """Without a GPU and the hub; `python` and `torchrun` are this interpreter's."""
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    fixed = {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return kept | fixed | more


def runs(*arguments: str, **more: str) -> subprocess.CompletedProcess:
    """`bash runs.sh ARGUMENTS`, to its end."""
    command = ["bash", "runs.sh", *arguments]
    pipes = {"capture_output": True, "text": True, "timeout": HANG_GUARD}
    return subprocess.run(command, cwd=ROOT, env=environment(**more), **pipes)


def dry(size: str, **more: str) -> list[list[str]]:
    """The commands that it would run, each as its words."""
    done = runs(size, DRY="1", **more)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert all(line.startswith("$ ") for line in done.stdout.splitlines())
    return [shlex.split(line)[1:] for line in done.stdout.splitlines()]


# ------------------------------------------------------------------------------------ the script itself


@pytest.mark.parametrize("file", SHELL_FILES)
def test_the_shell_understands_it(file):
    assert subprocess.run(["bash", "-n", ROOT / file]).returncode == 0


@pytest.mark.parametrize("file", SHELL_FILES)
@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(file):
    done = subprocess.run([SHELLCHECK, "--shell=bash", ROOT / file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("arguments", [(), ("",), ("7B",), ("tiny", "--fast"), ("tiny", "--dry", "more")])
def test_another_argument_gets_the_usage(arguments, tmp_path):
    done = runs(*arguments, OUT=f"{tmp_path}/out")
    assert done.returncode == 2 and done.stderr.startswith("usage: bash runs.sh 1.7B | 8B | tiny")
    assert not done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", SIZES)
def test_dry_prints_the_commands_and_does_nothing(size, tmp_path):
    by_variable = runs(size, DRY="1", OUT=f"{tmp_path}/out", DATA=f"{tmp_path}/data")
    by_option = runs(size, "--dry", OUT=f"{tmp_path}/out", DATA=f"{tmp_path}/data")
    assert by_option.stdout == by_variable.stdout and by_option.returncode == 0
    scripts = [word for words in dry(size, OUT="o", DATA="d") for word in words if word.endswith(".py")]
    compared = ["benchmarks/compare.py"] * 2
    middle = ["evaluate.py", "sft.py", "evaluate.py", "dipo.py", "evaluate.py"]
    assert [s for s in scripts if not s.startswith(("data/", "plumbing/"))] == middle + compared
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", SIZES)
def test_its_commands_name_what_was_downloaded_and_are_understood(size, tmp_path, monkeypatch):
    """The scripts' own readers take every command, once the data that is fetched lies there."""
    commands = dry(size, OUT="out", DATA="hub")
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    made = ["hub/sft.jsonl", "hub/rl.jsonl", "hub/validation.jsonl", "hub/test.jsonl"]
    if size != "tiny":
        fetched = commands[0][commands[0].index("hub") + 1 :]
        assert set(fetched) <= {*download.DATASETS, *download.MODELS}
        made = [f"hub/{name}.jsonl" for name in fetched if name in download.DATASETS]
        Path(f"hub/SDAR-{size}-Chat").mkdir(parents=True)
    for folder in ("out/base", "out/sft/latest", "out/dipo/latest", "hub"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    for name in made:
        Path(name).write_text("{}\n")

    # Each model is the one that the stage before it made.
    stages = [stage for words in commands if (stage := node.read_stage(words, planned=False))]
    base = "out/base" if size == "tiny" else f"hub/SDAR-{size}-Chat"
    models = [base, base, "out/sft/latest", "out/sft/latest", "out/dipo/latest"]
    assert [stage.config.model for stage in stages] == models
    assert [stage.out.name for stage in stages] == ["eval_base", "sft", "eval_sft", "dipo", "eval_dipo"]
    assert len({stage.config.protocol for stage in stages if stage.script == "evaluate.py"}) == 1
    evaluated = [stage.config for stage in stages if stage.script == "evaluate.py"]
    assert all(config.protocol == "dirl" for config in evaluated)
    if size != "tiny":
        published = PROTOCOLS["dirl"]
        assert all(getattr(config, n) == v for config in evaluated for n, v in published.items())
        assert stages[3].config.prompt == published["prompt"], "trained on another prompt than evaluated on"


def test_more_fields_and_several_machines_reach_the_commands():
    commands = dry("8B", SFT="steps=7 lr=2e-5", DIPO="reduce_once=false", EVAL="limit=3")
    by_script = {word: words for words in commands for word in words if word in node.SCRIPTS}
    assert "steps=7" in by_script["sft.py"] and "lr=2e-5" in by_script["sft.py"]
    assert "reduce_once=false" in by_script["dipo.py"] and "limit=3" in by_script["evaluate.py"]
    launched = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "8", "sft.py"]
    assert by_script["sft.py"][:7] == launched

    # The second of two machines fetches nothing, and every stage meets at a port of its own.
    several = {"NNODES": "2", "MASTER": "first:29500"}
    first, second = dry("8B", NODE_RANK="0", **several), dry("8B", NODE_RANK="1", **several)
    launched = [words for words in first if "torch.distributed.run" in words]
    assert second == launched and len(launched) == 5
    endpoints = [words[words.index("--rdzv_endpoint") + 1] for words in launched]
    assert endpoints == [f"first:{29500 + i}" for i in range(5)]


# --------------------------------------------------------------------------------- what it refuses


def test_a_machine_without_a_gpu_is_refused_before_anything_is_fetched(tmp_path):
    done = runs("8B", OUT=f"{tmp_path}/out", DATA=f"{tmp_path}/data")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines)
    assert any("sees no GPU" in line for line in lines)
    assert not list(tmp_path.iterdir())
    assert "plan of `bash runs.sh" in done.stdout and "measured" not in done.stdout
    assert "$ " not in done.stdout, "a command was started"


def test_a_misspelt_field_is_named_before_anything_is_made(tmp_path):
    done = runs("tiny", OUT=f"{tmp_path}/out", SFT="stpes=3")
    assert done.returncode == 2 and "stpes" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_python_without_the_packages_is_told_in_a_line(tmp_path):
    without = tmp_path / "bin/python"
    without.parent.mkdir()
    without.write_text(f'#!/bin/bash\nexec {sys.executable} -I -S "$@"\n')
    without.chmod(0o755)
    done = runs("tiny", OUT=f"{tmp_path}/out", PATH=f"{without.parent}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: missing here: torch transformers ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--gpus", "0", "--gpus: '0'"),
        ("--gpus", "two", "--gpus: 'two'"),
        ("--nodes", "-1", "--nodes: "),
        ("--out", "a b", "OUT: 'a b'"),
        ("--out", "", "OUT: ''"),
        ("--data", "x,y", "DATA: 'x,y'"),
    ],
)
def test_a_bad_variable_is_named(option, value, named, monkeypatch):
    options = {"--size": "tiny", "--gpus": "1", "--out": "out", "--data": "data", option: value}
    monkeypatch.setattr(sys, "argv", ["node.py", *(word for pair in options.items() for word in pair)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(InputError, match=re.escape(named)):
        node.main()


@pytest.mark.parametrize("master", ["", "first", ":29500", "first:", "a b:1"])
def test_several_machines_need_an_address(master):
    assert not list(node.launch_problems(8, 1, master)) and not list(
        node.launch_problems(8, 2, "first:29500")
    )
    (line,) = node.launch_problems(8, 2, master)
    assert line.startswith(f"environment variable MASTER: {master!r}, expected HOST:PORT")


def gpu(gib: float = 139.8, used: float = 0.5, capability=(9, 0)) -> node.Gpu:
    return node.Gpu("NVIDIA H200", int(gib * GIB), int((gib - used) * GIB), capability)


@pytest.mark.parametrize(
    ("gpus", "cuda", "problems"),
    [
        ([gpu()] * 8, "13.0", []),
        ([gpu()] * 9, "13.0", []),
        ([gpu()] * 4, "13.0", ["4 GPUs, expected 8"]),
        ([gpu()] * 7 + [gpu(used=30)], "13.0", ["GPU 7 (NVIDIA H200): another process uses 30.0 GiB"]),
        ([gpu()] * 8 + [gpu(used=30)], "13.0", []),
        ([gpu(capability=(7, 5))] + [gpu()] * 7, "13.0", ["GPU 0 (NVIDIA H200): compute capability 7.5"]),
        ([], "13.0", ["sees no GPU (built for CUDA 13.0"]),
        ([], None, ["sees no GPU (built for CPUs)"]),
    ],
)
def test_gpus_that_would_stop_it(gpus, cuda, problems):
    found = list(node.gpu_problems(gpus, 8, cuda))
    assert len(found) == len(problems)
    assert all(part in line for part, line in zip(problems, found, strict=True))


@pytest.mark.parametrize(
    ("size", "ranks", "gib", "stage", "remedy"),
    [
        ("8B", 8, 139.8, "dipo.py", ""),
        ("8B", 8, 79.1, "dipo.py", "reduce_once=false would fit"),
        ("8B", 1, 139.8, "sft.py", "lora_rank=16 would fit"),
        ("1.7B", 1, 79.1, "dipo.py", ""),
        ("1.7B", 1, 79.1, "sft.py", ""),
    ],
)
def test_the_planner_refuses_gpus_that_are_too_small(size, ranks, gib, stage, remedy):
    (command,) = [words for words in dry(size) if stage in words]
    found = node.forecast(node.read_stage(command), size, size, ranks, gib * GIB).problem
    assert remedy in found and bool(found) == bool(remedy)


def test_packages_of_another_version_are_named():
    assert not list(node.package_problems()), "this environment is what pyproject.toml asks for"
    assert ["Python 3.9.1" in line for line in node.package_problems((3, 9, 1))] == [True]
    (line,) = node.version_problem(Requirement("torch>=9"), "do this")
    assert line.startswith("torch 2.") and line.endswith("expected >=9: do this")
    (line,) = node.version_problem(Requirement("no-such-package"), "do this")
    assert line == "no-such-package is missing: do this"


def test_lmdeploy_loads_with_these_packages(monkeypatch, tmp_path):
    pytest.importorskip("lmdeploy")
    elsewhere = ("no C compiler", "no Python.h")
    assert not [line for line in node.engine_problems() if not line.startswith(elsewhere)]
    (tmp_path / "addict.py").write_text("raise ImportError('an old one')")  # LMDeploy imports it
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (line,) = [line for line in node.engine_problems() if not line.startswith(elsewhere)]
    assert line.startswith("lmdeploy does not load with these packages (ImportError: an old one)")


def test_a_full_disk_is_told_before(tmp_path):
    """What lies there already, here 10 GiB of a file with a hole, need not be written again."""
    free, there, later = shutil.disk_usage(tmp_path).free, tmp_path / "there", tmp_path / "not/yet"
    there.mkdir()
    (there / "file").touch()
    os.truncate(there / "file", 10 * GIB)
    assert not list(node.disk_problems([(there, 10 * GIB), (later, 2**20)]))
    (line,) = node.disk_problems([(there, free + 10 * GIB), (later, free)])
    assert f"{there} and {later}: " in line
    assert f"expected {2 * free / GIB:.1f}" in line, "one disk: both together"


# ---------------------------------------------------------------------------------- what it predicts


def test_predicted_times_are_those_of_the_formulas():
    """By hand: 6 FLOPs per parameter and token; tokens over tokens per second. Attention is the rest."""
    of = {}
    for words in dry("8B"):
        if stage := node.read_stage(words):
            of[stage.out.name] = node.forecast(stage, "8B", "8B", 8, 139.8 * GIB)
    matrices, speed = 6.95e9, 8 * 989e12 * 0.3  # parameters without embedding and head
    sft = 100 * 512 * (4200 + 4000) * 6 * matrices / speed
    assert sft < of["sft"].seconds < 1.4 * sft
    trained = 128 * 32 * (2200 + 2 * 2000) * 6 * matrices / speed
    rollouts = 2 * 128 * 32 * 2000 / (8 * 4000)
    assert 40 * (trained + rollouts) < of["dipo"].seconds < 40 * (1.4 * trained + rollouts)
    tokens = 16 * (500 * 617 + 1319 * 709 + 30 * 1274 + 30 * 890 + 674 * 896)
    assert of["eval_base"].seconds == pytest.approx(tokens / 32000 + tokens / 16000, rel=0.001)
    assert of["eval_sft"].seconds == of["eval_dipo"].seconds > 2 * of["eval_base"].seconds
    assert not any(line.measured for line in of.values())
    assert of["sft"].disk == 3 * 12 * 8_190_735_360, (
        "two checkpoints and one on its way, 12 bytes a parameter"
    )


@pytest.mark.parametrize(("size", "gpus"), [("1.7B", "1"), ("8B", "8")])
def test_the_page_shows_the_plan(size, gpus, monkeypatch, capsys):
    """docs/node.md has the table that is printed before an H200 has run anything."""
    options = ["--size", size, "--gpus", gpus, "--out", "nothing/there", "--data", "nothing"]
    commands = [shlex.join(["$", *words]) for words in dry(size, OUT="nothing/there", DATA="nothing")]
    monkeypatch.setattr(sys, "argv", ["node.py", *options])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(commands)))
    monkeypatch.setattr(node, "find_gpus", lambda: [gpu()] * int(gpus))
    with pytest.raises(SystemExit):  # no such GPU here
        node.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 6
    page = (ROOT / "docs/node.md").read_text()
    assert "\n".join(rows) in page, "stale: docs/node.md\n" + "\n".join(rows)


# ---------------------------------------------------------- killed in every stage, and gone on with


def lines_of(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def killed(happened, how: signal.Signals, **more: str) -> str:
    """What a run printed that got a signal, as did all that it started, once something had happened."""
    log = Path(more["OUT"]).parent / "killed.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            ["bash", "runs.sh", "tiny"],
            cwd=ROOT, env=environment(**more), stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip
    late = time.monotonic() + HANG_GUARD
    while not happened():
        assert process.poll() is None and time.monotonic() < late, log.read_text()
        time.sleep(0.002)
    os.killpg(process.pid, how)
    assert process.wait(timeout=HANG_GUARD) == (130 if how == signal.SIGINT else -how)
    return log.read_text()


Finished = namedtuple("Finished", "out printed before")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    """The tiny run, killed in SFT, stopped as by Ctrl-C in DiPO, killed in an evaluation, then to its end.

    printed: of each of the four calls; before: lines of logs at the moment of each kill.
    """
    out = tmp_path_factory.mktemp("runs") / "tiny"
    more = {"OUT": str(out), "EVAL": "limit=4 rules=[dynamic]"}
    responses = out / "eval_dipo/responses-test-dynamic.rank0.jsonl"
    moments = [
        (signal.SIGKILL, out / "sft/metrics.jsonl", (out / "sft/checkpoints/step-000002").exists),
        (signal.SIGINT, out / "dipo/metrics.jsonl", (out / "dipo/checkpoints/step-000001").exists),
        (signal.SIGKILL, responses, lambda: len(lines_of(responses)) >= 2),
    ]
    printed, before = [], []
    for how, log, happened in moments:
        printed.append(killed(happened, how, **more))
        before.append(lines_of(log))
    done = runs("tiny", **more)
    assert done.returncode == 0, done.stderr
    return Finished(out, [*printed, done.stdout], before)


def test_what_was_done_before_a_kill_is_not_done_again(finished):
    for stage, steps, saved, lines in (("sft", 6, 2, finished.before[0]), ("dipo", 4, 1, finished.before[1])):
        after = lines_of(finished.out / stage / "metrics.jsonl")
        assert [json.loads(line)["step"] for line in after] == list(range(1, steps + 1))
        assert after[:saved] == lines[:saved], (
            "steps before the checkpoint were made again: their seconds differ"
        )
    kept = [json.loads(line) for line in finished.before[2] if line.endswith("}")]
    (file,) = (finished.out / "eval_dipo").glob("responses-*.jsonl")
    now = {record["seed"]: record for _, record in read_records(file)}
    assert len(now) == 8 and len(kept) >= 2
    assert all(now[record["seed"]]["seconds"] == record["seconds"] for record in kept)


def skipped(printed: str) -> list[str]:
    """What a run said that it skips."""
    return [line.split()[1] for line in printed.splitlines() if line.startswith("skipped: ")]


def test_every_call_says_what_it_skips(finished):
    in_sft, in_dipo, in_evaluation, to_the_end = finished.printed
    assert skipped(in_sft) == []
    assert skipped(in_dipo) == ["data", "eval_base"]
    assert skipped(in_evaluation) == ["data", "eval_base", "sft", "eval_sft"]
    assert skipped(to_the_end) == ["data", "eval_base", "sft", "eval_sft", "dipo"]
    assert f"skipped: sft ({finished.out}/sft is at step 6 of 6)" in in_evaluation.splitlines()
    assert to_the_end.splitlines()[-1].startswith("finished: ")
    assert in_dipo.splitlines()[-1] == "stopped (exit code 130): the same command goes on from here"


def test_a_second_call_skips_all_of_it_and_changes_nothing(finished):
    def state() -> dict[str, int]:
        files = [f for f in finished.out.rglob("*") if f.is_file() and f.name != "downloaded"]
        return {str(f): f.stat().st_mtime_ns for f in files if "report" not in f.name}

    before = state()
    done = runs("tiny", OUT=str(finished.out), EVAL="limit=4 rules=[dynamic]")
    assert done.returncode == 0, done.stderr
    assert skipped(done.stdout) == ["data", "eval_base", "sft", "eval_sft", "dipo", "eval_dipo"]
    started = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert not set(started) & set(node.SCRIPTS), "a stage was started"
    assert state() == before
    table = [line for line in done.stdout.splitlines() if line.startswith(("| sft ", "| eval_dipo "))]
    assert ["measured (of 6 steps)" in table[0], "measured (of its responses)" in table[1]] == [True, True]


def test_a_finished_stage_with_other_settings_is_refused_not_skipped(finished):
    done = runs("tiny", OUT=str(finished.out), EVAL="limit=4 rules=[dynamic]", SFT="lr=0.5")
    assert done.returncode == 2 and "lr was 0.003 and is 0.5" in done.stderr
    assert skipped(done.stdout) == ["data", "eval_base"] and "stopped (exit code 2)" in done.stderr


def test_what_comes_after_a_run_that_goes_on_is_not_skipped(finished):
    """Its model is about to be another one, even if what lies there looks finished."""

    def names(**more: str) -> list[str]:
        commands = dry("tiny", OUT=str(finished.out), EVAL="limit=4 rules=[dynamic]", **more)
        return list(node.to_skip([stage for words in commands if (stage := node.read_stage(words))]))

    assert names() == ["eval_base", "sft", "eval_sft", "dipo", "eval_dipo"]
    assert names(DIPO="steps=5") == ["eval_base", "sft", "eval_sft"]
    assert names(SFT="seed=3") == ["eval_base"]


@pytest.fixture
def evaluation(finished, tmp_path) -> node.Stage:
    """A copy of the evaluation of SFT, of a copy of its checkpoint: as it was finished."""
    shutil.copytree(finished.out, tmp_path / "copy", symlinks=True)
    copy = tmp_path / "copy"
    settings = copy / "eval_sft/config.json"
    settings.write_text(settings.read_text().replace(str(finished.out.resolve()), str(copy.resolve())))
    arguments = ["protocol=dirl", "dtype=float32", "samples=2", "max_tokens=32", "min_tokens=4", "limit=4"]
    arguments += ["rules=[dynamic]", f"data=[{copy}/data/test.jsonl]", f"model={copy}/sft/latest"]
    config = load_config(EvalConfig, [*arguments, f"out={copy}/eval_sft"], PROTOCOLS)
    return node.Stage([], "evaluate.py", arguments, config, copy / "eval_sft")


def test_an_evaluation_of_other_weights_is_not_skipped(evaluation):
    assert node.finished(evaluation) == f"{evaluation.out}/summary.json is there"
    (weights,) = Path(evaluation.config.model).glob("model*.safetensors")
    os.utime(weights)
    assert not node.finished(evaluation)


@pytest.mark.parametrize(("field", "other"), [("samples", 3), ("seed", 7), ("limit", 3)])
def test_an_evaluation_with_another_setting_is_not_skipped(evaluation, field, other):
    setattr(evaluation.config, field, other)
    assert not node.finished(evaluation)


def test_an_evaluation_of_other_questions_is_not_skipped(evaluation):
    (file,) = evaluation.config.data
    questions = read_records(file)
    assert node.finished(evaluation)
    Path(file).write_text("".join(json.dumps(record) + "\n" for _, record in questions[::-1]))
    assert not node.finished(evaluation)


def test_a_damaged_config_of_an_evaluation_is_named(evaluation):
    (evaluation.out / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"eval_sft/config\.json: not JSON"):
        node.finished(evaluation)


@pytest.mark.slow
def test_two_machines_make_one_run(tmp_path):
    """Two calls on one machine, which meet as two would: the second waits for the data of the first."""
    common = {"OUT": f"{tmp_path}/run", "NNODES": "2", "MASTER": "localhost:29631"}
    common["EVAL"] = "limit=4 rules=[dynamic]"
    second = subprocess.Popen(
        ["bash", "runs.sh", "tiny"], cwd=ROOT, env=environment(**common, NODE_RANK="1"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    first = runs("tiny", **common, NODE_RANK="0")
    printed, _ = second.communicate(timeout=HANG_GUARD)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + printed
    assert "data/tiny.py" in first.stdout and "data/tiny.py" not in printed
    assert len(list((tmp_path / "run/sft/latest").glob("optimizer-*-of-00002.safetensors"))) == 2
    assert len(lines_of(tmp_path / "run/sft/metrics.jsonl")) == 6
