"""Whatever a reward of one's own does, a run ends in one line that names the reward and the question."""

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import tiny as tiny_task
import yaml
from test_reward import HANG_GUARD, ends

from dipo import DiPOConfig
from plumbing import own_reward
from plumbing.checkpoint import tiny
from plumbing.common import ROOT, InputError
from plumbing.config import load_config
from plumbing.own_reward import RewardWorker

GRADED = SimpleNamespace(question=SimpleNamespace(where="rl.jsonl:7", text="3+8?"), text="11")
C_LOOP = "9**9**9"  # one instruction, hours: no signal handler and no other thread of Python gets a turn


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """A worker of its own in a folder of its own, and the promise that it leaves no process behind."""
    monkeypatch.chdir(tmp_path)
    worker = RewardWorker()
    yield worker
    pid = pid_of(worker)
    worker.close()
    assert pid is None or ends(pid)


def pid_of(worker: RewardWorker) -> int | None:
    return worker._process and worker._process.pid


def write(body: str, name: str = "mine.py") -> None:
    """A module in the current folder: `body` whole, or as the expression that `mine.reward` returns."""
    with open(name, "w", encoding="utf-8") as file:
        file.write(body if "\n" in body else f"import os, sys\n\ndef reward(graded):\n    return {body}\n")


def refused(worker: RewardWorker, seconds: float = HANG_GUARD, graded=GRADED) -> str:
    """The one line of a reward that gives no number."""
    with pytest.raises(InputError) as error:
        worker.value("mine.reward", graded, seconds)
    line = str(error.value)
    assert line.startswith("reward mine.reward: question ") and len(line.splitlines()) == 1
    return line


# ----------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("0.25", 0.25),
        ("-3", -3.0),
        ("True", 1.0),
        ("len(graded.text)", 2.0),
        ("__import__('fractions').Fraction(1, 4)", 0.25),
        ("__import__('numpy').float32(0.5)", 0.5),
        ("__import__('numpy').bool_(True)", 1.0),
        ("__import__('numpy').array(0.5)", 0.5),
        ("__import__('torch').tensor(0.5)", 0.5),
        ("float('inf')", math.inf),
    ],
)
def test_any_real_number_is_a_value(worker, expression, value):
    write(expression)
    found = worker.value("mine.reward", GRADED, HANG_GUARD)
    assert found == value and type(found) is float


def test_nan_is_a_value(worker):
    """What a step makes of it is the loop's affair."""
    write("float('nan')")
    assert math.isnan(worker.value("mine.reward", GRADED, HANG_GUARD))


@pytest.mark.parametrize(
    ("expression", "shown"),
    [
        ("None", "None"),
        ("'1.0'", "'1.0'"),
        ("b'1'", "b'1'"),
        ("__import__('numpy').str_('1.0')", "np.str_('1.0')"),
        ("[1.0]", "[1.0]"),
        ("{}", "{}"),
        ("1j", "1j"),
        ("print", "<built-in function print>"),
    ],
)
def test_what_is_no_number_is_refused(worker, expression, shown):
    write(expression)
    assert refused(worker) == (
        f"reward mine.reward: question rl.jsonl:7: returned {shown}, expected a number"
    )


def test_a_long_value_is_shortened(worker):
    write("'word\\n' * 10**6")
    assert len(refused(worker)) < 150


# ------------------------------------------------------------------------------------ errors and ends


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero (mine.py:4)"),
        ("{}['a']", "KeyError: "),
        ("int('x\\ny')", "ValueError: invalid literal for int() with base 10: 'x\\ny' (mine.py:4)"),
        ("__import__('json').loads('{')", "JSONDecodeError: "),  # in another file, called from this line
        ("exec('raise ValueError(\"one\\\\ntwo\")')", "ValueError: one (mine.py:4)"),
        ("exec('assert False')", "AssertionError (mine.py:4)"),
        ("reward(graded)", "RecursionError: "),
        ("10**400", "OverflowError: int too large to convert to float"),
        ("graded.rollouts", "AttributeError: "),
        ("sys.exit()", "SystemExit (mine.py:4)"),
        ("sys.exit('enough')", "SystemExit: enough (mine.py:4)"),
        ("exec('raise KeyboardInterrupt')", "KeyboardInterrupt (mine.py:4)"),
        ("os._exit(0)", "its process ended (exit code 0)"),
        ("os._exit(3)", "its process ended (exit code 3)"),
        ("os.kill(os.getpid(), 9)", "its process ended (Killed)"),
        ("os.system('sleep 1000 &') or os._exit(3)", "its process ended (exit code 3)"),
        ("__import__('ctypes').string_at(0)", "its process ended (Segmentation fault)"),
    ],
)
def test_an_error_and_an_end_are_one_line(worker, expression, reason):
    write(expression)
    assert f"question rl.jsonl:7: {reason}" in refused(worker)


def test_a_reward_with_other_arguments_is_one_line(worker):
    write("def reward(graded, more):\n    return 1.0\n")
    assert "TypeError: reward() missing 1 required positional argument: 'more'" in refused(worker)


@pytest.mark.parametrize(
    ("text", "shown"), [("3+8?", "'3+8?'"), ("a\nb" * 40, repr(("a\nb" * 40)[:57] + "..."))]
)
def test_a_question_of_no_file_is_shown_by_its_text(worker, text, shown):
    write("1 / 0")
    graded = SimpleNamespace(question=SimpleNamespace(where="", text=text))
    assert refused(worker, graded=graded).startswith(f"reward mine.reward: question {shown}: Zero")


@pytest.mark.parametrize("expression", ["exec('while True: pass')", "__import__('time').sleep(1000)", C_LOOP])
def test_a_hang_ends_at_the_limit(worker, expression):
    write(f"def reward(graded):\n    if graded.text:\n        {expression}\n    return 1.0\n")
    worker.find("mine.reward")
    pid, start = pid_of(worker), time.monotonic()
    assert refused(worker, 0.3) == "reward mine.reward: question rl.jsonl:7: no answer within 0.3 s"
    assert time.monotonic() - start < HANG_GUARD and ends(pid)
    good = SimpleNamespace(text="", question=GRADED.question)
    assert worker.value("mine.reward", good, HANG_GUARD) == 1.0, "started again"


def test_the_limit_is_for_the_call_alone(worker):
    """Not for imports, which come with the first call after a start."""
    write("import time\n\ntime.sleep(1)\n\ndef reward(graded):\n    return 1.0\n")
    slow = "import time\n\nclass Slow:\n    def __setstate__(self, state):\n        time.sleep(1)\n"
    write(slow, "slow.py")
    sys.path.insert(0, os.getcwd())
    try:
        import slow

        graded = slow.Slow()
        graded.question = GRADED.question
        assert worker.value("mine.reward", graded, 0.5) == 1.0
    finally:
        sys.path.remove(os.getcwd())
        del sys.modules["slow"]


@pytest.mark.parametrize("seconds", [1e7, 1e300])
def test_a_limit_of_years_is_none(worker, seconds):
    write("1")
    assert worker.value("mine.reward", GRADED, seconds) == 1.0


def test_one_process_serves_all_rewards_until_it_dies(worker):
    write(
        "import os\n\nseen = []\n\n"
        "def first(graded):\n    seen.append(graded.text)\n    return os.getpid()\n\n"
        "def second(graded):\n    return len(seen)\n\n"
        "def last(graded):\n    os._exit(1)\n"
    )
    first = worker.value("mine.first", GRADED, HANG_GUARD)
    assert worker.value("mine.first", GRADED, HANG_GUARD) == first == pid_of(worker)
    assert worker.value("mine.second", GRADED, HANG_GUARD) == 2.0
    with pytest.raises(InputError, match=r"^reward mine\.last: "):
        worker.value("mine.last", GRADED, HANG_GUARD)
    assert worker.value("mine.first", GRADED, HANG_GUARD) not in (first, os.getpid())
    assert worker.value("mine.second", GRADED, HANG_GUARD) == 1.0, "a new process, and its module anew"


def test_an_error_ends_no_process(worker):
    write("1 / 0")
    refused(worker)
    pid = pid_of(worker)
    refused(worker)
    assert pid_of(worker) == pid


def test_a_process_killed_between_two_calls_is_replaced(worker):
    write("os.getpid()")
    pid = worker.value("mine.reward", GRADED, HANG_GUARD)
    os.kill(int(pid), signal.SIGKILL)
    worker._process.wait(HANG_GUARD)
    assert worker.value("mine.reward", GRADED, HANG_GUARD) != pid


def test_a_fork_of_the_reward_does_not_answer_in_its_place(worker):
    write("import os\n\ndef reward(graded):\n    return 5.0 if os.fork() else 7.0\n")
    assert [worker.value("mine.reward", GRADED, HANG_GUARD) for _ in range(5)] == [5.0] * 5


def test_an_interrupted_call_does_not_answer_the_next(worker):
    def interrupt(*_):
        raise KeyboardInterrupt

    write(
        "import time\n\ndef reward(graded):\n    time.sleep(len(graded.text))\n    return len(graded.text)\n"
    )
    worker.find("mine.reward")
    pid = pid_of(worker)
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            worker.value("mine.reward", GRADED, HANG_GUARD)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert ends(pid)
    good = SimpleNamespace(text="", question=GRADED.question)
    assert worker.value("mine.reward", good, HANG_GUARD) == 0.0


# -------------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        ("1", "mine.missing", "AttributeError: module 'mine' has no attribute 'missing'"),
        ("reward = 10\n", "mine.reward", "not a function"),
        ("1", "not_there.reward", "ModuleNotFoundError: No module named 'not_there'"),
        ("1", ".reward", "ValueError: Empty module name"),
        ("1", "mine.", "AttributeError"),
        ("import not_there\n", "mine.reward", "ModuleNotFoundError: No module named 'not_there' (mine.py:1)"),
        ("def reward(\n", "mine.reward", "SyntaxError: '(' was never closed (mine.py, line 1)"),
        ("\n1 / 0\n", "mine.reward", "ZeroDivisionError: division by zero (mine.py:2)"),
        ("import sys\nsys.exit(3)\n", "mine.reward", "SystemExit: 3 (mine.py:2)"),
        ("import os\nos._exit(3)\n", "mine.reward", "its process ended (exit code 3)"),
        ("import time\ntime.sleep(1000)\n", "mine.reward", "no answer within 2 s"),
        (f"x = {C_LOOP}\n", "mine.reward", "no answer within 2 s"),
    ],
)
def test_what_cannot_be_imported_is_refused_by_name(worker, monkeypatch, module, name, reason):
    monkeypatch.setattr(own_reward, "IMPORT_SECONDS", 2.0)
    write(module)
    with pytest.raises(InputError) as error:
        worker.find(name)
    assert str(error.value).startswith(f"unknown reward {name!r}: {reason}")
    assert len(str(error.value).splitlines()) == 1


def test_finding_a_reward_loads_no_torch(worker):
    write("import sys\n\nloaded = 'torch' in sys.modules\n\ndef reward(graded):\n    return loaded\n")
    assert worker.value("mine.reward", GRADED, HANG_GUARD) == 0.0


def test_what_is_imported_here_is_imported_there_before_the_current_folder(worker, tmp_path, monkeypatch):
    (tmp_path / "library").mkdir()
    write("1", tmp_path / "library/mine.py")
    write("2")
    write("3", "other.py")
    monkeypatch.syspath_prepend(tmp_path / "library")
    assert worker.value("mine.reward", GRADED, HANG_GUARD) == 1.0
    assert worker.value("other.reward", GRADED, HANG_GUARD) == 3.0


# -------------------------------------------------------------------------- the process and this one


def program(expression: str, seconds: float = 600.0) -> str:
    """A script that asks for a reward, after it has printed the number of the worker's process."""
    return f"""
from types import SimpleNamespace
from plumbing.common import run_script
from plumbing.own_reward import WORKER, find

def main():
    graded = SimpleNamespace(question=SimpleNamespace(where="rl.jsonl:7", text="3+8?"))
    reward = find("mine.reward", {seconds})
    print(WORKER._process.pid, flush=True)
    {expression}

run_script(main)
"""


@pytest.fixture
def start(tmp_path):
    """Start a script in a folder of its own, and wait for the number of the worker's process."""
    processes = []

    def start(code: str) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes, text=True)
        processes.append(process)
        process.worker = int(process.stdout.readline())
        return process

    yield start
    for process in processes:
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.worker, signal.SIGKILL)
        process.communicate()


HANGS = ["while True: pass", "__import__('time').sleep(1000)", C_LOOP]


def write_hang(folder, hang: str) -> None:
    """It says when it begins."""
    write(f"def reward(graded):\n    print('begun')\n    {hang}\n", folder / "mine.py")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process within C with its parent")
@pytest.mark.parametrize("hang", HANGS)
def test_a_hanging_reward_ends_when_the_parent_is_killed(start, tmp_path, hang):
    write_hang(tmp_path, hang)
    process = start(program("reward(graded)"))
    assert process.stderr.readline() == "begun\n"
    process.kill()
    process.wait()
    assert ends(process.worker)


@pytest.mark.parametrize("hang", [*HANGS, "__import__('os').system('sleep 1000')"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_hang_ends_both_in_one_line(start, tmp_path, hang, number):
    write_hang(tmp_path, hang)
    process = start(program("reward(graded)"))
    assert process.stderr.readline() == "begun\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=HANG_GUARD)
    assert stderr == f"interrupted ({number.name})\n" and process.returncode == 128 + number
    assert ends(process.worker)


@pytest.mark.parametrize("last", ["return", "import os; os._exit(0)", "1 / 0", "reward(None)"])
def test_the_worker_ends_with_its_parent(start, tmp_path, last):
    write("1", tmp_path / "mine.py")
    process = start(program(last))
    process.communicate(timeout=HANG_GUARD)
    assert ends(process.worker)


def test_what_a_reward_prints_goes_to_standard_error(start, tmp_path):
    text = "import os, subprocess\n\ndef reward(graded):\n    print('one')\n    os.system('echo two')\n"
    text += "    os.write(1, b'three\\n')\n    input()\n"
    write(text, tmp_path / "mine.py")
    process = start(program("reward(graded)"))
    stdout, stderr = process.communicate("typed for the script\n", timeout=HANG_GUARD)
    assert stdout == "" and process.returncode == 2
    assert stderr.splitlines() == ["one", "two", "three"] + [
        "error: reward mine.reward: question rl.jsonl:7: EOFError: EOF when reading a line (mine.py:7)"
    ]


def test_control_characters_of_an_error_are_shown_as_such(start, tmp_path):
    write("exec('raise ValueError(chr(27) + chr(91) + \"2J gone\")')", tmp_path / "mine.py")
    process = start(program("reward(graded)"))
    assert r": ValueError: \x1b[2J gone (mine.py:4)" in process.communicate(timeout=HANG_GUARD)[1]


# ---------------------------------------------------------------------------- config and command line


@pytest.fixture(autouse=True)
def fresh():
    """The process of this session was started in another folder."""
    own_reward.WORKER.close()
    yield
    own_reward.WORKER.close()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A model and questions."""
    folder = tmp_path_factory.mktemp("good")
    tiny(folder / "model", hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16)
    tiny_task.main(["--out", str(folder), "--sft", "2", "--rl", "8", "--validation", "2", "--test", "4"])
    return folder


@pytest.fixture
def load(good, tmp_path, monkeypatch):
    """Reads a command line in a folder with a reward of one's own."""
    monkeypatch.chdir(tmp_path)
    write("1.0")
    return lambda *arguments: load_config(DiPOConfig, [*arguments, f"data={good}/rl.jsonl"])


@pytest.mark.parametrize(
    ("arguments", "rewards"),
    [
        (["rewards.mine.reward=1"], {"accuracy": 1.0, "mine.reward": 1.0}),
        (["rewards.mine.reward=0.5", "rewards.accuracy=0"], {"accuracy": 0.0, "mine.reward": 0.5}),
        (["rewards.mine.reward=1", "rewards.mine.reward=-2"], {"accuracy": 1.0, "mine.reward": -2.0}),
        (["rewards={mine.reward: 2}"], {"accuracy": 1.0, "mine.reward": 2.0}),
        (["rewards.speed=${steps}", "steps=7"], {"accuracy": 1.0, "speed": 7.0}),
    ],
)
def test_an_override_below_a_dict_is_one_key(load, arguments, rewards):
    assert load(*arguments).rewards == rewards


@pytest.mark.parametrize("text", ["rewards: {mine.reward: 0.5}", "rewards:\n  mine.reward: 0.5"])
def test_a_config_file_names_a_reward_and_an_override_wins(load, tmp_path, text):
    (tmp_path / "dipo.yaml").write_text(text)
    path = ["--config", "dipo.yaml"]
    assert load(*path).rewards == {"accuracy": 1.0, "mine.reward": 0.5}
    assert load(*path, "rewards.mine.reward=3").rewards == {"accuracy": 1.0, "mine.reward": 3.0}


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["rewards.mine.reward=high"], "config key rewards.mine.reward: Value 'high'"),
        (["rewards.mine.reward=null"], "config key rewards.mine.reward: "),
        (["rewards.mine.reward="], "config key rewards.mine.reward: "),
        (["rewards.mine.reward=nan"], "config key rewards"),
        (["rewards.mine.reward=[1]"], "config key rewards"),
        (["rewards.mine.reward={a: 1}"], "config key rewards"),
        (["rewards={mine: {reward: 1}}"], "config key rewards"),
        (["rewards.mine.reword=1"], "config key rewards: unknown reward 'mine.reword': AttributeError"),
        (["rewards..mine=1"], "config key rewards: unknown reward '.mine': "),
        (["rewards.=1"], "config key rewards: unknown reward ''"),
        (["rewards.mine.reward=[1"], "rewards.mine.reward=[1 "),
        (["rewards.mine.reward"], "rewards.mine.reward: expected key=value"),
        (["model.mine.reward=1"], "config key model"),
        (["reward_seconds=0"], "config key reward_seconds: "),
        (["reward_seconds=inf"], "config key reward_seconds: "),
    ],
)
def test_a_bad_weight_or_name_is_one_line(load, arguments, wanted):
    with pytest.raises(InputError) as error:
        load(*arguments)
    assert str(error.value).startswith(wanted) and len(str(error.value).splitlines()) == 1


def test_a_nested_name_in_a_config_file_is_one_line_that_shows_the_right_one(load, tmp_path):
    (tmp_path / "dipo.yaml").write_text("rewards:\n  mine:\n    reward: 1.0\n")
    wanted = "config key rewards: mine: {'reward': 1.0}, expected a number as in mymodule.myreward: 1.0"
    with pytest.raises(InputError, match=f"^{re.escape(wanted)}$"):
        load("--config", "dipo.yaml")


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def train(zygote, good, folder, *changes: str) -> subprocess.CompletedProcess:
    """Two steps of dipo.py, started in another folder than that of the repository."""
    small = ["steps=2", "groups=1", "group_size=2", "max_tokens=8", "max_rounds=1", "rewards.accuracy=0"]
    small += [f"model={good}/model", f"data={good}/rl.jsonl", "out=run"]
    command = [sys.executable, ROOT / "dipo.py", *small, *changes]
    return zygote.run(command, cwd=folder, env=os.environ | ENVIRONMENT)


def test_a_run_in_another_folder_finds_its_reward(zygote, good, tmp_path):
    """And takes its values; the second one reads what only a rollout has."""
    write(
        "import random\n\ndef first(graded):\n    return random.random()\n\n"
        "def second(graded):\n    return graded.rollout.num_steps\n",
        tmp_path / "mine.py",
    )
    done = train(zygote, good, tmp_path, "rewards.mine.first=1", "rewards.mine.second=0.5")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["rewards"] == {"accuracy": 0.0, "mine.first": 1.0, "mine.second": 0.5}
    again = train(zygote, good, tmp_path, "resume=true", "steps=3", "--config", "run/config.yaml")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("body", "changes", "wanted"),
    [
        ("1 / 0", [], r"ZeroDivisionError: division by zero \(mine\.py:4\)"),
        ("None", [], "returned None, expected a number"),
        ("os._exit(1)", [], r"its process ended \(exit code 1\)"),
        ("exec('while True: pass')", ["reward_seconds=0.5"], r"no answer within 0\.5 s"),
    ],
)
def test_a_run_ends_in_one_line_with_reward_and_question(zygote, good, tmp_path, body, changes, wanted):
    write(body, tmp_path / "mine.py")
    done = train(zygote, good, tmp_path, "rewards.mine.reward=1", *changes)
    lines = [line for line in re.split(r"[\r\n]+", done.stderr) if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = lines
    assert re.fullmatch(rf"error: reward mine\.reward: question .*rl\.jsonl:\d+: {wanted}", line)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("import sys\nsys.exit(0)\n", "SystemExit: 0 (mine.py:2)"),
        ("import os\nos._exit(0)\n", "its process ended (exit code 0)"),
    ],
)
def test_a_module_that_ends_python_ends_a_run_before_it_begins(zygote, good, tmp_path, body, wanted):
    write(body, tmp_path / "mine.py")
    done = train(zygote, good, tmp_path, "rewards.mine.reward=1")
    assert done.stderr == f"error: config key rewards: unknown reward 'mine.reward': {wanted}\n"
    assert done.returncode == 2 and not (tmp_path / "run").exists()
