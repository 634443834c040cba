"""data/own.py: which of a model's kept answers become training rows."""

import json
import subprocess
import sys

import own
import pytest
from conftest import TINY

from plumbing.checkpoint import load_tokenizer, tiny
from plumbing.common import ROOT, InputError, run_script
from sft import read_examples

RIGHT = {"question": "1+2?", "text": r"1+2=3 \boxed{3}", "correct": True, "finish_reason": "stop"}
RECORDS = [
    RIGHT,
    RIGHT | {"text": r"2+1=3 \boxed{3}"},  # another way
    RIGHT,  # again
    RIGHT | {"question": "2+2?", "text": r"\boxed{5}", "correct": False},
    RIGHT | {"question": "3+2?", "finish_reason": "length"},
    RIGHT | {"question": "4+2?", "text": "  "},
]


@pytest.fixture
def responses(tmp_path):
    """A file as evaluate.py writes it, with its config beside it."""
    (tmp_path / "config.json").write_text(json.dumps({"prompt": "Add: {question}"}))
    file = tmp_path / "responses-rl-dynamic.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return file


def chats(rows: list[dict]) -> list[tuple[str, str]]:
    return [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]


def test_right_complete_answers_once(responses):
    expected = [("Add: 1+2?", r"1+2=3 \boxed{3}"), ("Add: 1+2?", r"2+1=3 \boxed{3}")]
    assert chats(own.own_rows(responses)) == expected
    assert chats(own.own_rows(responses, wrong_too=True)) == [*expected, ("Add: 2+2?", r"\boxed{5}")]


def test_the_file_is_one_that_sft_reads(responses, tmp_path, zygote):
    out = tmp_path / "new" / "own.jsonl"
    done = zygote.run([sys.executable, ROOT / "data/own.py", responses, "--out", out])
    assert (done.returncode, done.stdout) == (0, f"{out}: 2 rows\n")
    tokenizer = load_tokenizer(tiny(tmp_path / "tiny", **TINY))
    examples = read_examples(str(out), tokenizer, 4, 200)
    decoded = tokenizer.decode(examples[1].ids)
    assert "Add: 1+2?" in decoded and r"2+1=3 \boxed{3}<|im_end|>" in decoded
    assert [f.name for f in out.parent.iterdir()] == ["own.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"question": "1?"}, ":1: no `text`"),
        (RIGHT | {"correct": 1}, ":1: no `correct`"),
        (RIGHT | {"correct": False}, "no right response"),
    ],
)
def test_bad_files_are_named(tmp_path, line, message):
    file = tmp_path / "responses.jsonl"
    file.write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=message):
        own.own_rows(file)


def test_a_bad_file_ends_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["own.py", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "o.jsonl")]
    )
    with pytest.raises(SystemExit) as stop:
        run_script(own.main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "none.jsonl" in error
    assert not (tmp_path / "o.jsonl").exists()


def test_it_runs_by_itself():
    done = subprocess.run([sys.executable, ROOT / "data/own.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--wrong-too" in done.stdout
