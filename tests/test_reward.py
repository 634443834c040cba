"""Grading against hand-written cases, and against answers that try to hang or crash it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reward
from reward import Graded, extract_answer, grade, is_equivalent

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


# -------------------------------------------------------------------------------------- equivalence

EQUAL = [  # (answer, gold)
    ("18", "18"),
    (" 18 ", "18"),
    ("$18$", "18"),
    ("$ 18 $", "18"),
    ("18.0", "18"),
    ("18.", "18"),
    ("+18", "18"),
    ("-3", "-3.00"),
    ("070", "70"),
    (".5", "0.5"),
    ("1,234", "1234"),
    ("1{,}234", "1234"),
    ("10080", r"10,\!080"),
    ("1,234,567.50", "1234567.5"),
    (r"\$1,234.50", "1234.5"),
    ("9" * 1000 + ".0", "9" * 1000),
    ("0.5", r"\frac{1}{2}"),
    ("1/2", r"\frac{1}{2}"),
    (r"\dfrac{1}{2}", r"\frac12"),
    (r"\frac{2}{4}", r"\frac{1}{2}"),
    (r"1\frac{1}{2}", r"\frac{3}{2}"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    (r"11\sqrt2", r"11\sqrt{2}"),
    ("2^{10}", "1024"),
    (r"2 \times 10^3", "2000"),
    ("5!", "120"),
    (r"\binom{5}{2}", "10"),
    (r"\log_2 8", "3"),
    (r"\sin(\pi/6)", r"\frac{1}{2}"),
    (r"3\pi", r"\pi \cdot 3"),
    ("x^2+2x+1", "(x+1)^2"),
    ("p - q", "-q + p"),
    ("x=5", "5"),
    ("y = 2x + 3", "2x+3"),
    ("{1,2}", r"\{1, 2\}"),
    (r"\{2,1\}", r"\{1,2\}"),
    ("2, 1", "1,2"),
    (r"10 \text{ or } 12", "10, 12"),
    (r"\emptyset", r"\{\}"),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3, \frac{\pi}{2})"),
    ("[0,1)", "[0, 1)"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty, 2) \cup (3, \infty)"),
    (r"x \in [-2,7]", "[-2,7]"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("A", r"\text{A}"),
    (r"\text{(C)}", "C"),
    (r"\text{even}", "even"),
    (r"5\text{ cm}", "5"),
    (r"120^\circ", "120"),
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    (r"\boxed{2}", "2"),
    (r"$1$ or $2$", "1,2"),
]

UNEQUAL = [
    ("3", "4"),
    ("18", "-18"),
    ("1,234", "1235"),
    ("12,34", "1234"),
    ("0.333", "0.3333"),
    ("0.333", r"\frac{1}{3}"),
    ("9" * 1000, "9" * 999 + "8"),
    (r"\frac{1}{2}", r"\frac{2}{1}"),
    (r"\sqrt{2}", "1.41"),
    (r"\pi", "3.14"),
    (r"\infty", r"-\infty"),
    ("i", "-i"),
    ("x", "y"),
    ("x^2", "x^3"),
    ("(1,2)", "(2,1)"),
    ("(0,1)", "[0,1]"),
    ("[0,1)", "(0,1]"),
    (r"\{1,2\}", r"\{1,3\}"),
    ("1,2", "1,2,3"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ("B", "A"),
    (r"\text{odd}", r"\text{even}"),
    (r"7\text{ cm}", "5"),
    ("six", "6"),
    ("", "1"),
    (" ", ""),
    ("$", "5"),
    (".", "0"),
    ("-", "0"),
    ("?", "1"),
]


@pytest.mark.parametrize(("answer", "gold"), EQUAL)
def test_equal(answer, gold):
    assert is_equivalent(answer, gold, seconds=30.0)


@pytest.mark.parametrize(("answer", "gold"), UNEQUAL)
def test_unequal(answer, gold):
    assert not is_equivalent(answer, gold, seconds=30.0)


@pytest.mark.parametrize("seconds", [0, -1.0])
def test_a_limit_of_no_time_is_refused(seconds):
    # A timer set to zero would be no timer at all.
    with pytest.raises(ValueError, match="seconds"):
        is_equivalent("1", "1", seconds=seconds)


# ------------------------------------------------------------------------------------------- worker

HOSTILE = {
    "tower": "9^{9^{9^{9}}}",
    "tower of factorials": "((9!)!)!",
    "long power": "10^{10^{10}}",
    "python power": "10**10**10",
    "modulo of a tower": r"7^{7^{7^{7}}} \mod 10",
    "sum": r"\sum_{k=1}^{10^{9}} \frac{1}{k^k}",
    "binomial": r"\binom{10^{10}}{10^{9}}",
    "braces": "{" * 10_000 + "}" * 10_000,
    "braces within the length limit": "{" * 900 + "1" + "}" * 900,
    "brackets": "(" * 900 + "1" + ")" * 900,
    "fractions": r"\frac{1}{" * 180 + "2" + "}" * 180,
    "roots": r"\sqrt{" * 250 + "2" + "}" * 250,
    "megabyte of text": "word " * 200_000,
    "megabyte of digits": "9" * 1_000_000,
    "null bytes": "1\0\0",
    "surrogates": "\ud800\udfff\ud800",
    "line breaks": "1\n2\r\n3\u2028",
    "python": "__import__('os').system('exit 1')",
    "braces of the wrong kind": "}}}{{{",
    "unfinished": "\\",
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_answer_is_wrong_and_grading_goes_on(answer):
    start = time.monotonic()
    assert not is_equivalent(answer, r"\frac{3}{7}", seconds=0.5)
    assert time.monotonic() - start < HANG_GUARD
    reward._is_equivalent_symbolically.cache_clear()
    assert is_equivalent("2x", "x + x", seconds=30.0)


def test_the_kernel_ends_one_long_call_in_c():
    worker = reward.Worker()
    assert worker.compare("2x", "x + x", 30.0)
    process = worker.process
    assert not worker.compare("9^{9^{9^{9}}}", "5", 0.5)
    assert process.poll() == -signal.SIGALRM, "the worker should have died of its own timer"
    assert worker.compare("3x", "x + 2x", 30.0), "a new worker should have taken over"
    worker.close()


def test_a_killed_worker_is_replaced_and_none_is_left():
    worker = reward.Worker()
    assert worker.compare("2x", "x + x", 30.0)
    first = worker.process
    os.kill(first.pid, signal.SIGKILL)
    assert worker.compare("2x", "x + x", 30.0), "the answer is right whoever killed the worker"
    second = worker.process
    assert second.pid != first.pid and first.poll() is not None
    assert worker.close() is not None
    assert second.poll() is not None, "close should leave no process behind"
    assert worker.close() is None, "closing twice is harmless"


def test_the_worker_ends_with_its_standard_input():
    process = subprocess.Popen(
        [sys.executable, reward.__file__, "--worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    replies, _ = process.communicate(
        json.dumps(["2x", "x+x", 30.0]) + "\n" + json.dumps(["x", "y", 30.0]) + "\n",
        timeout=HANG_GUARD,
    )
    assert replies.splitlines() == ["ready", "true", "false"]
    assert process.returncode == 0


def test_an_interrupted_task_does_not_answer_the_next():
    def interrupt(*_):
        raise KeyboardInterrupt

    worker = reward.Worker()
    assert worker.compare("2x", "x + x", 30.0)
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            worker.compare("9^{9^{9^{9}}}", "5", 30.0)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert worker.process is None, "the busy worker should be gone, and its reply with it"
    assert worker.compare("2x", "x + x", 30.0)
    worker.close()


def test_a_worker_that_cannot_start_is_an_error_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    worker = reward.Worker()
    with pytest.raises(RuntimeError, match="--worker"):
        worker.compare("2x", "x + x", 30.0)
    assert worker.process is None


def test_memory_is_limited():
    # The worker's body in a process of ours, which then asks for more than the limit.
    probe = "import reward; reward._serve(); bytearray(reward.MEMORY_BYTES)"
    done = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=os.path.dirname(reward.__file__),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG_GUARD,
        check=False,
    )
    assert done.stdout == "ready\n" and "MemoryError" in done.stderr


def test_the_same_pair_is_graded_once():
    reward._is_equivalent_symbolically.cache_clear()
    for _ in range(3):
        assert is_equivalent(r"\frac{6}{14}", r"\frac{3}{7}", seconds=30.0)
    assert reward._is_equivalent_symbolically.cache_info().misses == 1


# ------------------------------------------------------------------------------------------ rewards


def graded(correct, tpf=1.0, block_size=4):
    return Graded(
        text="",
        answer=None,
        gold="1",
        correct=correct,
        num_tokens=8,
        truncated=False,
        tokens_per_forward=tpf,
        block_size=block_size,
    )


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


def test_accuracy():
    assert reward.accuracy(graded(True)) == 1.0
    assert reward.accuracy(graded(False)) == 0.0


def test_score_is_unweighted_and_total_is_weighted():
    weights = {"accuracy": 2.0, "speed": 0.5}
    rewards = reward.score(graded(True, tpf=2.5), weights)
    assert rewards == pytest.approx({"accuracy": 1.0, "speed": 0.75})
    assert reward.total(rewards, weights) == pytest.approx(2.375)
    assert set(reward.score(graded(True), {"speed": 1.0})) == {"speed"}


def test_check_names():
    reward.check_names({"accuracy": 1.0, "speed": 0.0})
    with pytest.raises(ValueError, match="'sped'.*accuracy, speed"):
        reward.check_names({"accuracy": 1.0, "sped": 1.0})
    with pytest.raises(ValueError, match="accuracy, speed"):
        reward.check_names({})


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
    result = grade(
        text,
        r"\frac{1}{2}",
        num_tokens=5,
        truncated=truncated,
        tokens_per_forward=2.0,
        block_size=4,
    )
    assert result == Graded(text, answer, r"\frac{1}{2}", correct, 5, truncated, 2.0, 4)


def test_the_example_runs_as_a_user_would_run_it():
    done = subprocess.run(
        [sys.executable, reward.__file__],
        capture_output=True,
        text=True,
        timeout=HANG_GUARD,
        check=True,
    )
    assert "correct True: accuracy +1.00 speed +1.00, total +2.00" in done.stdout
