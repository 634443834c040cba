"""The tiny task against plain integer arithmetic, and its command line as a user sees it."""

import importlib.util
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from plumbing.common import run_script

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "tiny.py"
FILES = ("sft.jsonl", "rl.jsonl", "validation.jsonl", "test.jsonl")
SMALL = ["--sft", "300", "--rl", "200", "--validation", "40", "--test", "60"]

spec = importlib.util.spec_from_file_location("tiny_data", SCRIPT)
tiny = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tiny)


def terms_of(question: str) -> list[int]:
    assert re.fullmatch(r"\d+(\+\d+)+\?", question)
    return [int(term) for term in question[:-1].split("+")]


def check_response(question: str, response: str) -> None:
    """Walk the response by hand: each step continues the last one, uses one term, is true."""
    terms = terms_of(question)
    *steps, box = response.split(" ")
    assert len(steps) == len(terms) - 1
    total = terms[0]
    for step, term in zip(steps, terms[1:], strict=True):
        left, right = step.split("=")
        first, second = left.split("+")
        assert (int(first), int(second)) == (total, term)
        total = total + term
        assert right == str(total)
    assert box == "\\boxed{" + str(total) + "}"


def read(folder: Path) -> dict[str, list[dict]]:
    return {name: [json.loads(line) for line in (folder / name).read_text().splitlines()] for name in FILES}


def questions(rows: list[dict]) -> list[str]:
    return [row["messages"][0]["content"] if "messages" in row else row["question"] for row in rows]


def generate(folder: Path, *options: str) -> dict[str, list[dict]]:
    tiny.main(["--out", str(folder), *options])
    return read(folder)


def test_response_is_this_string() -> None:
    assert tiny.solve([3, 8, 5]) == r"3+8=11 11+5=16 \boxed{16}"


def test_examples_are_true_and_in_range() -> None:
    rng = random.Random(1)
    lengths, values = set(), set()
    for _ in range(2000):
        example = tiny.make_example(rng, (2, 5), 7)
        terms = terms_of(example["question"])
        lengths.add(len(terms))
        values.update(terms)
        check_response(example["question"], example["response"])
        assert example["ground_truth_answer"] == str(sum(terms))
    assert lengths == {2, 3, 4, 5}
    assert values == set(range(1, 8))


def test_rows_have_the_documented_form(tmp_path: Path) -> None:
    splits = generate(tmp_path / "new" / "folder", *SMALL, "--careless", "0")
    assert [len(splits[name]) for name in FILES] == [300, 200, 40, 60]
    for row in splits["sft.jsonl"]:
        user, assistant = row["messages"]
        assert list(row) == ["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        check_response(user["content"], assistant["content"])
    for name in FILES[1:]:
        for row in splits[name]:
            assert list(row) == ["question", "ground_truth_answer"]
            assert row["ground_truth_answer"] == str(sum(terms_of(row["question"])))
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(FILES)


def test_careless_answers_leave_out_the_last_term_of_the_longest_sums(tmp_path: Path) -> None:
    rows = generate(tmp_path, "--rl", "0", "--careless", "0.7")["sft.jsonl"]
    longest = careless = 0
    for row in rows:
        question, response = (turn["content"] for turn in row["messages"])
        terms = terms_of(question)
        if len(terms) == 5:
            longest += 1
            if response.endswith("{" + str(sum(terms[:-1])) + "}"):
                careless += 1
                question = question.rpartition("+")[0] + "?"
        check_response(question, response)
    assert 0.45 < longest / len(rows) < 0.55
    assert 0.68 < careless / longest < 0.72


@pytest.mark.parametrize("ways", [0.2, 0.5])
def test_ways_are_right_and_as_frequent_as_asked(tmp_path: Path, ways: float) -> None:
    shape = ["--min-terms", "4", "--max-terms", "4", "--rl", "0", "--careless", "0"]
    rows = generate(tmp_path, *shape, "--sft", "4000", "--ways", str(ways))["sft.jsonl"]
    from_the_right = []
    for row in rows:
        question, response = (turn["content"] for turn in row["messages"])
        left = terms_of(question)
        used = [int(response.split("+")[0]), *(int(part.split("=")[0]) for part in response.split("+")[1:])]
        check_response("+".join(map(str, used)) + "?", response)
        assert sorted(used) == sorted(left)
        if len(set(left)) < 4:  # else one cannot tell which of two equal terms was used
            continue
        for term in used[:-1]:
            from_the_right.append(term == left[-1])
            assert term == left.pop(-1 if from_the_right[-1] else 0)
    assert len(from_the_right) > 5000
    assert abs(sum(from_the_right) / len(from_the_right) - ways) < 0.02


def test_ways_change_the_sft_answers_only(tmp_path: Path) -> None:
    one, many = (generate(tmp_path / ways, *SMALL, "--ways", ways) for ways in ("0", "0.5"))
    assert {name: one[name] for name in FILES[1:]} == {name: many[name] for name in FILES[1:]}
    assert questions(one["sft.jsonl"]) == questions(many["sft.jsonl"])
    assert one["sft.jsonl"] != many["sft.jsonl"]


def test_no_question_occurs_twice_in_a_large_space(tmp_path: Path) -> None:
    shape = ["--min-terms", "3", "--max-terms", "4", "--max-term", "49"]
    splits = generate(tmp_path, *shape)
    asked = [question for name in FILES for question in questions(splits[name])]
    assert len(asked) == len(set(asked)) == 41500
    long = sum(len(terms_of(question)) == 4 for question in asked)
    assert 0.45 < long / len(asked) < 0.55  # rejecting repeats favours the longer


def test_held_out_questions_stay_out_when_training_repeats(tmp_path: Path) -> None:
    # 5 ** 2 = 25 questions of two terms: 12 held out, 13 left for 500 training rows.
    sizes = ["--sft", "300", "--rl", "200", "--validation", "5", "--test", "7"]
    splits = generate(tmp_path, *sizes, "--min-terms", "2", "--max-terms", "2", "--max-term", "5")
    train = {q for name in FILES[:2] for q in questions(splits[name])}
    held_out = [q for name in FILES[2:] for q in questions(splits[name])]
    assert len(held_out) == len(set(held_out)) == 12
    assert len(train) == 13
    assert train.isdisjoint(held_out)


def test_seed_decides_the_bytes(tmp_path: Path) -> None:
    for folder, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        generate(tmp_path / folder, *SMALL, "--seed", seed)
    for name in FILES:
        first, again, other = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert first == again
        assert first != other


def test_training_size_leaves_the_held_out_files_alone(tmp_path: Path) -> None:
    one = generate(tmp_path / "a", *SMALL)
    two = generate(tmp_path / "b", *SMALL, "--sft", "10", "--rl", "0")
    assert one["test.jsonl"] == two["test.jsonl"]
    assert one["validation.jsonl"] == two["validation.jsonl"]
    assert two["rl.jsonl"] == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--min-terms", "5", "--max-terms", "4"], "--max-terms"),
        (["--min-terms", "1"], "--min-terms"),
        (["--sft", "-1"], "--sft"),
        (["--test", "-3"], "--test"),
        (["--seed", "-1"], "--seed"),
        (["--max-term", "0"], "--max-term"),
        (["--max-term", "-4"], "--max-term"),
        (["--rl", "many"], "--rl"),
        (["--rows", "5"], "--rows"),
        (["--max-term", "3"], "--max-term"),
        (["--ways", "1.5"], "--ways"),
    ],
)
def test_bad_options_write_nothing(
    options: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_script(tiny.main, ["--out", str(tmp_path / "out"), *options])
    output, error = capsys.readouterr()
    assert stop.value.code == 2
    assert output == ""
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tmp_path, *SMALL)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_text, calls = Path.write_text, []

    def full_disk(path: Path, *args, **kwargs) -> int:
        calls.append(path)
        if len(calls) == 3:
            write_text(path, "half a fi")
            raise OSError("No space left on device")
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(SystemExit) as stop:
        run_script(tiny.main, ["--out", str(tmp_path), *SMALL, "--seed", "1"])
    assert stop.value.code == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_command_line_writes_to_the_default_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), *SMALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    for name, summary, example in zip(FILES, lines[::2], lines[1::2], strict=True):
        path = Path("data") / "generated" / name
        rows = (tmp_path / path).read_text().splitlines()
        assert summary == f"{path}: {len(rows)} rows, {len(rows)} different"
        assert example.strip() == rows[0]


@pytest.mark.parametrize(
    ("text", "derived"),
    [
        (r"3+8=11 11+5=16 \boxed{16}", True),
        (r"5+8=13 13+3=16 \boxed{16}", True),
        (r"3+8=11 11+5=16 \boxed{16}" + "\n", True),
        (r"3+8=12 12+5=17 \boxed{16}", False),  # a wrong step
        (r"3+8=11 12+5=17 \boxed{17}", False),  # which does not go on from the last sum
        (r"3+8=11 11+8=19 \boxed{16}", False),  # a term twice, another left out
        (r"3+8=11 \boxed{11}", False),
        (r"3+8=11 11+5=16 \boxed{17}", False),
        (r"\boxed{16}", False),
        (r"3+8=11 11+5=16 16+0=16 \boxed{16}", False),
        ("", False),
    ],
)
def test_a_derivation_is_walked_step_by_step(text: str, derived: bool) -> None:
    assert tiny.is_derived("3+8+5?", text) is derived


def test_all_training_answers_are_derived() -> None:
    rng = random.Random(0)
    for _ in range(200):
        example = tiny.make_example(rng, (2, 5), 9, ways=0.5, writer=rng)
        assert tiny.is_derived(example["question"], example["response"])
