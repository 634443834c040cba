"""Grading against hand-written cases, and against answers that try to hang or crash it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reward
from plumbing import answers, own_reward
from plumbing.answers import extract_answer, is_equivalent
from plumbing.common import InputError
from reward import Graded, Question, Utf8, example, grade
from rollout import Rollout

ROOT = Path(__file__).resolve().parents[1]

HANG_GUARD = 60.0  # seconds; far above every limit below, so that a slow machine fails nothing

# --------------------------------------------------------------------------------------- extraction


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{\frac{a}{b^{2}}}} done", r"\sqrt{\frac{a}{b^{2}}}"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{1}\boxed{2}\boxed{3}", "3"),
        (r"\boxed {7}", "7"),
        ("\\boxed\n{7}", "7"),
        (r"\boxed{ 7 }", " 7 "),
        (r"\boxed{}", ""),
        (r"\boxed{1} then \boxed{}", ""),
        ("\\boxed{1\n2}", "1\n2"),
        # unfinished boxes
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{2", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{ wait, \boxed{5}", "5"),
        (r"\boxed", None),
        (r"\boxed{", None),
        # nested boxes: the outer one
        (r"\boxed{\boxed{3}}", r"\boxed{3}"),
        # escaped braces are no braces, an escaped backslash escapes nothing
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{}", r"\{"),
        (r"\boxed{\}}", r"\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a \\{b}}", r"a \\{b}"),
        (r"\boxed\{1\}", None),
        (r"\\boxed{4}", "4"),
        (r"x \\\boxed{4}", "4"),
        # stray braces outside the box
        (r"} } \boxed{1}", "1"),
        (r"{ \boxed{1}", "1"),
        (r"\boxed{1} } {", "1"),
        # nothing to find
        ("", None),
        ("42", None),
        (r"\fbox{42}", None),
        (r"boxed{42}", None),
        ("\\", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def balanced(children):
    inner = st.lists(children, max_size=4).map("".join)
    return st.one_of(inner, inner.map(lambda x: "{" + x + "}"), inner.map(r"\sqrt{{{}}}".format))


LEAVES = st.one_of(
    st.text(st.characters(exclude_characters="{}\\"), max_size=8),
    st.sampled_from([r"\{", r"\}", r"\\", r"\boxed{1}", r"\pi "]),
)


@given(st.recursive(LEAVES, balanced, max_leaves=20), st.text(max_size=10))
def test_a_balanced_answer_comes_back_as_written(x, before):
    # The text before must not open a brace, nor end in a backslash that would escape ours.
    before = before.replace("{", "").replace("\\", "")
    assert extract_answer(before + "\\boxed{" + x + "}") == x


@given(st.text(st.sampled_from("\\boxed{} 1"), max_size=60))
def test_extraction_takes_any_text(text):
    answer = extract_answer(text)
    assert answer is None or answer in text


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 150_000,
        "\\boxed{" * 150_000 + "}" * 150_000,
        "\\" * 1_000_000,
        "\\boxed" + " " * 1_000_000,
        "{" * 1_000_000 + "\\boxed{1}",
    ],
)
def test_extraction_is_linear(text):
    start = time.monotonic()
    extract_answer(text)
    assert time.monotonic() - start < HANG_GUARD


# ----------------------------------------------------------------------------------------- processes


@pytest.fixture
def pool():
    """A pool of its own, and the promise that it leaves no process behind."""
    pool = answers.Pool()
    yield pool
    pids = [worker.process.pid for worker in pool.idle + pool.busy]
    pool.close()
    assert all(ends(pid) for pid in pids)


def group_lives(pid: int) -> bool:
    """Whether a worker or the child that compares for it is there; those it leads share its group.

    Who is dead, and no child of this process, is gone, however late init asks for his exit code.
    """
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    if not os.path.exists("/proc/self/stat"):
        return True
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it went meanwhile
            state, parent, group = file.read_text().rpartition(")")[2].split()[:3]
            if int(group) == pid and (state != "Z" or int(parent) == os.getpid()):
                return True
    return False


def ends(pid: int) -> bool:
    """Whether the whole group ends, within HANG_GUARD."""
    end = time.monotonic() + HANG_GUARD
    while group_lives(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not group_lives(pid)


def task(answer: str, gold: str, seconds: float = 30.0) -> str:
    return json.dumps([answer, gold, None, seconds])


NEVER = r"\frac{(x+y+z+w)^{100}}{3}"  # sympy would expand it for hours


def test_the_kernel_ends_one_long_call_and_the_worker_goes_on(pool):
    verdicts = pool.run([task("2x", "x + x"), task(NEVER, r"\frac{3}{7}", 0.5), task("3x", "x + 2x")], 1)
    assert [verdict.equal for verdict in verdicts] == [True, False, True]
    assert verdicts[1].why == "time limit"
    assert len(pool.idle) == 1, "one worker should have done it all"


def test_verdicts_stand_in_the_order_of_the_tasks(pool):
    right = [bool(i % 3) for i in range(30)]
    tasks = [task(f"{i}x + y", f"y + {i if r else i + 1}x") for i, r in enumerate(right)]
    tasks.insert(0, task(NEVER, "x", 1.0))  # it ends after all the others
    assert [verdict.equal for verdict in pool.run(tasks, 2)] == [False, *right]
    assert len(pool.idle) == 2 and not pool.busy


def test_a_killed_worker_is_replaced(pool):
    assert pool.run([task("2x", "x + x")], 1)[0].equal
    first = pool.idle[0].process
    os.killpg(first.pid, signal.SIGKILL)
    assert pool.run([task("2x", "x + x")], 1)[0].equal, "the answer is right whoever killed the worker"
    assert pool.idle[0].process.pid != first.pid and first.poll() is not None


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the child in /proc")
def test_a_killed_child_is_replaced(pool):
    assert pool.run([task("2x", "x + x")], 1)[0].equal
    pid = pool.idle[0].process.pid
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        os.kill(int(file.read()), signal.SIGKILL)
    assert pool.run([task("3x", "x + 2x")], 1)[0].equal
    assert pool.idle[0].process.pid == pid


def test_a_worker_ends_with_its_standard_input():
    command, pipe = [sys.executable, "-m", "plumbing.answers"], subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
    replies, _ = process.communicate(task("2x", "x+x") + "\n" + task("x", "y") + "\n", timeout=HANG_GUARD)
    ready, *verdicts = replies.splitlines()
    assert ready == "ready" and [json.loads(verdict)[0] for verdict in verdicts] == [True, False]
    assert process.returncode == 0 and not group_lives(process.pid)


def test_workers_end_when_this_process_is_killed():
    program = f"from plumbing import answers; p = answers.Pool(); p.run(['{task('2x', 'x')}'], 1); " + (
        f"print(p.idle[0].process.pid, flush=True); p.run([{task(NEVER, 'x', 1.0)!r}], 1)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    process.kill()
    process.communicate()
    assert ends(worker)


def test_an_interrupted_task_does_not_answer_the_next(pool):
    def interrupt(*_):
        raise KeyboardInterrupt

    assert pool.run([task("2x", "x + x")], 1)[0].equal
    pid = pool.idle[0].process.pid
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            pool.run([task(NEVER, "5")], 1)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert not pool.idle and not pool.busy and ends(pid), "the busy worker should be gone"
    assert pool.run([task("2x", "x + x")], 1)[0].equal


def test_a_worker_that_cannot_start_is_an_error_not_a_wrong_answer(pool, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="-m plumbing.answers"):
        pool.run([task("2x", "x + x")], 2)


def test_memory_is_limited():
    # The worker's body in a process of ours, which then asks for more than the limit.
    probe = "from plumbing import answers; answers._serve(); bytearray(answers.MEMORY_BYTES)"
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG_GUARD,
        check=False,
    )
    assert done.stdout == "ready\n" and "MemoryError" in done.stderr


def test_the_same_pair_is_compared_once(monkeypatch):
    asked = []
    run = answers.Pool.run
    monkeypatch.setattr(
        answers.Pool, "run", lambda self, tasks, n: asked.extend(tasks) or run(self, tasks, n)
    )
    pairs = [(r"\frac{6x}{14}", r"\frac{3x}{7}", None)] * 3 + [("5", "5", None)]
    for _ in range(2):
        assert all(verdict.equal for verdict in answers.judge_all(pairs, seconds=29.0))
    assert len(asked) == 1


@pytest.mark.parametrize("ranks", [1, 1_000_000])
def test_the_ranks_of_a_machine_share_its_cores(ranks):
    program = "import os; from plumbing.answers import judge_all, _pool; " + (
        "judge_all([(f'{i}x', f'x + {i - 1}x', None) for i in range(2, 5)], 60.0); "
        "print(len(_pool().idle), min(3, len(os.sched_getaffinity(0))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"LOCAL_WORLD_SIZE": str(ranks)},
        capture_output=True,
        text=True,
        timeout=HANG_GUARD,
        check=True,
    )
    workers, at_most = map(int, done.stdout.split())
    assert workers == (at_most if ranks == 1 else 1)


@pytest.mark.parametrize("seconds", [0, -1.0])
def test_a_limit_of_no_time_is_refused(seconds):
    # A timer set to zero would be no timer at all.
    with pytest.raises(ValueError, match="seconds"):
        is_equivalent("1", "1", seconds=seconds)


def test_reward_needs_no_torch():
    program = "import sys, reward; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


# ------------------------------------------------------------------------------------------ rewards


def graded(
    correct, tpf=1.0, block_size=4, *, text="", answer=None, num_tokens=8, truncated=False, max_tokens=0
) -> Graded:
    """A verdict with just these facts: 180 tokens make every TPF below a whole number of forwards."""
    forwards = round(180 / tpf)
    steps = [1 + i % forwards for i in range(max(180, forwards))]  # no decoder has a TPF below 1
    reason = "length" if truncated else "stop"
    rollout = Rollout([], [0] * 180, steps, [], num_tokens, reason)
    assert rollout.tokens_per_forward == tpf
    return Graded(rollout, Question("?", "1"), text, answer, correct, block_size, max_tokens)


@pytest.mark.parametrize(
    ("correct", "tpf", "block_size", "value"),
    [
        # s by hand: 0 at TPF 1, 1/2 half way, 1 at TPF B
        (True, 1.0, 4, 0.5),
        (True, 2.5, 4, 0.75),
        (True, 4.0, 4, 1.0),
        (False, 1.0, 4, 0.0),
        (False, 2.5, 4, -0.25),
        (False, 4.0, 4, -0.5),
        # a third of the way: cos(pi / 3) = 1/2, s = 1/4
        (True, 2.0, 4, 0.625),
        (False, 2.0, 4, -0.125),
        (True, 3.0, 4, 0.875),
        # beyond the ends
        (True, 0.5, 4, 0.5),
        (True, 9.0, 4, 1.0),
        (False, 9.0, 4, -0.5),
        # a block of one token has no speed to gain
        (True, 1.0, 1, 0.5),
        (False, 1.0, 1, 0.0),
    ],
)
def test_speed(correct, tpf, block_size, value):
    assert reward.speed(graded(correct, tpf, block_size)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("correct", "tpf", "value"),
    [(True, 1.0, 0.5), (True, 4.0, 0.5), (False, 1.0, 0.0), (False, 2.5, -0.25), (False, 4.0, -0.5)],
)
def test_speed_penalty(correct, tpf, value):
    assert reward.speed_penalty(graded(correct, tpf)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("correct", "tokens", "steps", "alpha", "value"),
    [
        (True, 8, 1, 1.0, 1.0),  # all at once
        (True, 8, 8, 1.0, 0.125),  # one by one
        (True, 8, 5, 1.0, 0.5),
        (True, 8, 5, 2.0, 0.25),
        (True, 8, 5, 0.0, 1.0),
        (True, 1, 1, 3.0, 1.0),
        (False, 8, 1, 1.0, 0.0),
        (False, 8, 8, 0.0, 0.0),
    ],
)
def test_speed_if_right(correct, tokens, steps, alpha, value):
    step_map = [1 + min(i, steps - 1) for i in range(tokens)]
    rollout = Rollout([5] * 4, [0] * tokens, step_map, [], tokens - 1, "stop")  # the last one is not shown
    case = Graded(rollout, Question("?", "1"), "", "1", correct, 4)
    assert reward.speed_if_right(case, alpha) == pytest.approx(value)
    if alpha == 1:
        assert reward.values(case, {"speed_if_right": 2.0}) == {"speed_if_right": pytest.approx(value)}


def test_accuracy_binary_boxed():
    assert [reward.accuracy(graded(c)) for c in (True, False)] == [1.0, 0.0]
    assert [reward.binary(graded(c)) for c in (True, False)] == [1.0, -1.0]
    assert [reward.boxed(graded(False, answer=a)) for a in ("2", "", None)] == [0.1, 0.1, 0.0]


@pytest.mark.parametrize(
    ("text", "only", "closed"),
    [
        ("<think>2 + 2</think>", 1.0, 1.0),
        ("<think>\n2 + 2\n</think>\n\n \t", 1.0, 1.0),
        ("<think></think>", 1.0, 1.0),
        ("<think>2</think> and <think>3</think>", 1.0, 1.0),
        ("<think>2 + 2</think> 4", 0.0, 0.0),
        ("<think>2 + 2</think> \n\n4", 0.0, 1.0),  # text after it, on a later line
        ("2 + 2</think>", 0.0, 1.0),  # the prompt opened it
        (" <think>2 + 2</think>", 0.0, 1.0),
        ("<think>2 + 2", 0.0, 0.0),
        ("<think>", 0.0, 0.0),
        ("4", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_formats_as_published(text, only, closed):
    case = graded(False, text=text)
    wanted = {"format": only, "think_format": closed}
    assert reward.values(case, wanted) == wanted


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>2 + 2</think> 4", 1.0),
        (" \n<think>\n2 + 2\n</think>\n\n4\n", 1.0),
        ("<think></think>4", 1.0),
        ("<think>2 + 2 4", 0.0),
        ("2 + 2</think> 4", 0.0),
        ("<think>2 + 2</think>", 0.0),
        ("<think>2 + 2</think> \n", 0.0),
        ("Well, <think>2 + 2</think> 4", 0.0),
        ("<think>2 <think>+ 2</think> 4", 0.0),
        ("<think>2 + 2</think> 4 </think>", 0.0),
        ("<think>2</think> 4 <think>5</think> 6", 0.0),
        ("4", 0.0),
        ("", 0.0),
    ],
)
def test_think_first(text, value):
    assert reward.values(graded(False, text=text), {"think_first": 1.0}) == {"think_first": value}


@pytest.mark.parametrize(
    ("correct", "num_tokens", "truncated", "value"),
    [
        # of 300 tokens: (1 + cos 0) / 2 = 1, at a third (1 + 1/2) / 2 = 3/4, half way 1/2
        (True, 0, False, 1.0),
        (True, 100, False, 0.875),
        (True, 150, False, 0.75),
        (True, 200, False, 0.625),  # at two thirds (1 - 1/2) / 2 = 1/4
        (True, 300, False, -0.5),  # as long as the limit: as if it had been cut off
        (False, 0, False, -0.5),
        (False, 100, False, -0.375),
        (False, 150, False, -0.25),
        (False, 200, False, -0.125),
        (False, 300, False, -0.5),
        (False, 300, True, -0.5),
        (False, 303, False, -0.5),  # the last block may end beyond the limit
    ],
)
def test_cosine(correct, num_tokens, truncated, value):
    case = graded(correct, num_tokens=num_tokens, truncated=truncated, max_tokens=300)
    assert reward.cosine(case) == pytest.approx(value)


@pytest.mark.parametrize(
    ("num_tokens", "value"), [(0, 0.0), (150, 0.0), (151, -1 / 150), (225, -0.5), (300, -1.0), (450, -2.0)]
)
def test_soft_overlong(num_tokens, value):
    case = graded(True, num_tokens=num_tokens, max_tokens=300)
    wanted = {"soft_overlong": value, "dapo_overlong": max(value, -1.0)}
    assert reward.values(case, wanted) == pytest.approx(wanted)


@pytest.mark.parametrize(("num_tokens", "value"), [(3, 0.0), (4, -0.5), (5, -1.0), (6, -1.5)])
def test_soft_overlong_halves_an_odd_limit_downwards(num_tokens, value):
    case = graded(True, num_tokens=num_tokens, max_tokens=5)  # the last 2 tokens of 5
    assert reward.soft_overlong(case) == pytest.approx(value)


@pytest.mark.parametrize(
    ("num_tokens", "value"), [(0, 0.0), (75, 0.25), (299, 299 / 300), (300, 0.0), (303, 0.0)]
)
@pytest.mark.parametrize("correct", [True, False])
def test_length(correct, num_tokens, value):
    assert reward.length(graded(correct, num_tokens=num_tokens, max_tokens=300)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("correct", "num_tokens", "value"),
    [(True, 0, 0.5), (True, 75, 0.25), (True, 150, 0.0), (True, 300, -0.5), (True, 400, -0.5),
     (False, 0, 0.0), (False, 75, 0.0), (False, 225, -0.25), (False, 300, -0.5)],
)  # fmt: skip
def test_brevity(correct, num_tokens, value):
    assert reward.brevity(graded(correct, num_tokens=num_tokens, max_tokens=300)) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", 0.0),
        ("one two", 0.0),
        ("one two three", 0.0),
        ("a b c d e f", 0.0),
        ("a a a a", -0.5),  # two 3-grams, one of them new
        ("A a a a", -0.5),
        ("a b c a b c", -0.25),  # abc bca cab abc
        ("no " * 102, -0.99),
    ],
)
def test_repetition(text, value):
    assert reward.repetition(graded(True, text=text)) == pytest.approx(value)


@pytest.mark.parametrize("name", ["cosine", "soft_overlong", "dapo_overlong", "length", "brevity"])
def test_a_reward_of_length_without_the_limit_is_an_error(name):
    with pytest.raises(ValueError, match="max_tokens"):
        reward.values(graded(True), {name: 1.0})


def test_values_are_unweighted_and_total_is_weighted():
    weights = {"accuracy": 2.0, "speed": 0.5}
    rewards = reward.values(graded(True, tpf=2.5), weights)
    assert rewards == pytest.approx({"accuracy": 1.0, "speed": 0.75})
    assert reward.total(rewards, weights) == pytest.approx(2.375)
    assert set(reward.values(graded(True), {"speed": 1.0})) == {"speed"}


def test_check_names():
    reward.check_names(dict.fromkeys(reward.REWARDS, 1.0))
    with pytest.raises(ValueError, match="'sped'.*accuracy, speed"):
        reward.check_names({"accuracy": 1.0, "sped": 1.0})
    with pytest.raises(ValueError, match="accuracy, speed"):
        reward.check_names({})


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder from which rewards of one's own are imported, by a process started after this one."""
    monkeypatch.chdir(tmp_path)
    own_reward.WORKER.close()
    yield tmp_path
    own_reward.WORKER.close()


def test_a_reward_of_your_own_by_dotted_path(own):
    (own / "my_rewards.py").write_text(
        "def tokens(graded):\n    return graded.rollout.num_tokens / 10\n\nten = 10\n"
    )
    weights = {"accuracy": 1.0, "my_rewards.tokens": 0.5}
    reward.check_names(weights)
    rewards = reward.values(graded(True, num_tokens=20), weights)
    assert rewards == {"accuracy": 1.0, "my_rewards.tokens": 2.0}
    assert reward.total(rewards, weights) == 2.0
    for name in ("my_rewards.missing", "my_rewards.ten", "not_there.tokens", ".tokens", "tokens."):
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            reward.check_names({name: 1.0})
    for weight in (None, "1", [1.0], {"tokens": 1.0}):
        with pytest.raises(ValueError, match="my_rewards: .*, expected a number"):
            reward.check_names({"my_rewards": weight})


def test_a_reward_of_your_own_sees_a_copy_of_all_there_is(own):
    (own / "my_rewards.py").write_text(
        "def same(graded):\n"
        "    r, q = graded.rollout, graded.question\n"
        "    found = [r.num_steps, r.shown_ids, r.seed, q.gold, q.tolerance, graded.truncated]\n"
        "    graded.correct = True\n"
        "    return found == [3, list(b'abcdef'), 5, '1', 0.1, True]\n"
    )
    case = Graded(example("abcdef", 2.0, truncated=True), Question("?", "1", 0.1), "abcdef", None, False, 4)
    case.rollout.seed = 5
    assert reward.values(case, {"my_rewards.same": 1.0}) == {"my_rewards.same": 1.0}
    assert not case.correct


def test_a_reward_of_your_own_that_gives_no_value_names_itself_and_the_question(own):
    (own / "my_rewards.py").write_text(
        "import time\n\n"
        "def fails(graded):\n    return graded.answer[0]\n\n"
        "def hangs(graded):\n    time.sleep(1000)\n"
    )
    case = graded(False)
    case.question.where = "rl.jsonl:3"
    with pytest.raises(InputError, match=r"^reward my_rewards\.fails: question rl\.jsonl:3: TypeError: "):
        reward.values(case, {"my_rewards.fails": 1.0})
    with pytest.raises(InputError, match=r"^reward my_rewards\.hangs: question rl\.jsonl:3: no .* 0\.2 s$"):
        reward.values(case, {"my_rewards.hangs": 1.0}, 0.2)


def test_other_rewards_are_called_here():
    own_reward.WORKER.close()
    reward.values(graded(True, max_tokens=9), dict.fromkeys(reward.REWARDS, 1.0))
    assert own_reward.WORKER._process is None


@pytest.mark.parametrize(
    ("text", "truncated", "answer", "correct"),
    [
        (r"\boxed{0.5}", False, "0.5", True),
        (r"\boxed{0.5}", True, "0.5", False),
        (r"\boxed{2}", False, "2", False),
        (r"one half", False, None, False),
        (r"\boxed{0.5", False, None, False),
    ],
)
def test_grade(text, truncated, answer, correct):
    rollout, question = example(text, 2.0, truncated), Question("1 - 1/2?", r"\frac{1}{2}")
    (result,) = grade([rollout], [question], Utf8(), block_size=4)
    assert result == Graded(rollout, question, text, answer, correct, 4)
    assert result.truncated == truncated
    assert result.rollout.num_tokens == len(text)
    assert result.rollout.tokens_per_forward == len(text) / -(-len(text) // 2)


def test_what_follows_the_stop_token_is_not_graded():
    rollout = example(r"\boxed{1}\boxed{2}")
    rollout.num_tokens = len(r"\boxed{1}")
    (result,) = grade([rollout], [Question("?", "1")], Utf8(), block_size=4)
    assert (result.text, result.answer, result.correct) == (r"\boxed{1}", "1", True)


def test_many_are_graded_as_each_alone():
    texts = [
        r"\boxed{0.5}",
        r"\boxed{0.5}",
        "one half",
        r"\boxed{\frac{x}{2}}",
        r"\boxed{4.25}",
        r"\boxed{4.3}",
    ]
    golds = [r"\frac12", r"\frac12", r"\frac12", "0.5x", "4.2", "4.2"]
    truncated = [False, True, False, False, False, False]
    tolerances = [None, None, None, None, 0.1, None]
    rollouts = [example(text, 1.0, cut) for text, cut in zip(texts, truncated, strict=True)]
    questions = [Question("?", gold, limit) for gold, limit in zip(golds, tolerances, strict=True)]
    how = {"tokenizer": Utf8(), "block_size": 4, "max_tokens": 64}
    batch = grade(rollouts, questions, **how)
    one_by_one = [grade([r], [q], **how)[0] for r, q in zip(rollouts, questions, strict=True)]
    assert batch == one_by_one
    assert [g.correct for g in batch] == [True, False, False, True, True, False]
    assert [g.max_tokens for g in batch] == [64] * 6
    assert grade([], [], Utf8(), block_size=4) == []


# ------------------------------------------------------------------------------------- command line


def launch(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, reward.__file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANG_GUARD, check=False)


def test_check_explains_each_verdict(tmp_path):
    records = [
        {"text": r"So \boxed{\dfrac{1}{2}}.", "gold": "0.5"},
        {"response": r"\boxed{5 km}", "answer": r"5\text{ kg}"},
        {"text": r"\boxed{2, 1}", "gold": "1,2"},
        {"text": "no box", "gold": "7"},
        {"text": r"\boxed{4.25}", "gold": "4.2", "tolerance": 0.1},
    ]
    file = tmp_path / "responses.jsonl"
    file.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    done = launch("--check", str(file))
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if not line.startswith("  ")] == [
        "1 right: numbers",
        "2 wrong: different units",
        "3 right: parts of a list in any order",
        "4 wrong: no answer",
        "5 right: numbers, within 0.1",
        "3 of 5 right",
    ]
    assert r"answer '\\dfrac{1}{2}', normal form '\\frac{1}{2}'" in done.stdout
    assert "answer no closed box" in done.stdout


@pytest.mark.parametrize("line", ["{}", "[1]", "no json", '{"text": "1"}', '{"gold": "1"}'])
def test_check_names_the_bad_line(tmp_path, line):
    file = tmp_path / "responses.jsonl"
    file.write_text(json.dumps({"text": "", "gold": "1"}) + "\n" + line + "\n")
    done = launch("--check", str(file))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and f"{file}:2" in done.stderr


def test_check_without_a_file():
    done = launch("--check", "/nowhere.jsonl")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "/nowhere.jsonl" in done.stderr
