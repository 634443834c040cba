"""More of what a user gets wrong, as in test_bad_input.py, in kinds that are not there.

Damaged checkpoints, tokenizers, questions, chats, kept responses, config values, command lines and
environment variables end in one line that names the place and code 2; what files and models hold moves no
terminal and holds no trainer up.
"""

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import compare
import demo
import download
import grading
import pytest
import tiny as tiny_task
from test_bad_input import (
    CHAT,
    ENVIRONMENT,
    QUESTION,
    SCRIPTS,
    SMALL,
    Place,
    assert_names,
    edit_json,
    refused,
    run_here,
    the_error,
)

import masking
import model
import reward
import rollout
from plumbing import answers, figures, launch
from plumbing.checkpoint import load_tokenizer, tiny
from plumbing.common import ROOT, InputError, printable, read_records, run_script, tell
from plumbing.config import load_config
from plumbing.ranks import start_distributed

HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b3A\u202egnp\u2066\r\x08"  # ESC, C1, right to left, and back


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    tiny(folder / "model", **SMALL)
    with contextlib.redirect_stdout(io.StringIO()):
        options = ["--out", str(folder), "--sft", "4", "--rl", "4", "--validation", "2", "--test", "2"]
        tiny_task.main(options)
    return folder


@pytest.fixture
def place(tmp_path, good) -> Place:
    return Place(tmp_path, good)


def run_program(main, *arguments) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a small program's main in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", ["program", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run_script(main)
        except SystemExit as exit:
            code = exit.code
    return code, out.getvalue(), err.getvalue()


def refused_program(main, *arguments) -> str:
    code, out, err = run_program(main, *arguments)
    assert out == "", "an error belongs to stderr"
    assert err.count("\n") == 1, f"one line was expected: {err}"
    return the_error(code, err)


def assert_harmless(text: str) -> None:
    found = {c for c in text if not c.isprintable() and c not in "\n"}
    assert not found, f"{found} in {text!r}"


# ----------------------------------------------------------------------------- config.json


def write_config(content: bytes):
    return lambda folder: (folder / "config.json").write_bytes(content)


def set_value(name: str, value):
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | {name: value}
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def drop_value(name: str):
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        del config[name]
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def replace_by_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


def replace_by_pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@pytest.mark.parametrize("script", ["sft", "evaluate"])
@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (set_value("block_size", "4"), ["block_size", '"4"']),
        (set_value("block_size", 4.5), ["block_size", "4.5"]),
        (set_value("block_size", 0), ["block_size", "from 1"]),
        (set_value("block_size", -4), ["block_size", "-4"]),
        (set_value("block_size", True), ["block_size", "true"]),
        (set_value("block_size", [4]), ["block_size", "[4]"]),
        (set_value("block_size", 10**9), ["block_size", "128"]),  # longer than any sequence
        (set_value("vocab_size", "many"), ["vocab_size", "many"]),
        (set_value("vocab_size", 0), ["vocab_size"]),
        (set_value("hidden_size", 0), ["hidden_size"]),
        (set_value("hidden_size", -3), ["hidden_size", "-3"]),
        (set_value("intermediate_size", 10**12), ["intermediate_size"]),  # would fill the memory
        (set_value("num_hidden_layers", None), ["num_hidden_layers", "null"]),
        (set_value("num_hidden_layers", 10**6), ["num_hidden_layers", "1000000"]),
        (set_value("num_hidden_layers", 2.0), ["num_hidden_layers", "2.0"]),
        (drop_value("max_position_embeddings"), ["max_position_embeddings", "missing"]),
        (set_value("max_position_embeddings", 0), ["max_position_embeddings"]),
        (set_value("max_position_embeddings", "long"), ["max_position_embeddings", "long"]),
        (set_value("num_key_value_heads", 3), ["num_attention_heads", "multiple", "3"]),
        (set_value("num_attention_heads", 0), ["num_attention_heads"]),
        (set_value("head_dim", "wide"), ["head_dim", "wide"]),
        (set_value("torch_dtype", "float17"), ["torch_dtype", "float17"]),
        (set_value("dtype", 7), ["dtype", "7"]),
        (set_value("rms_norm_eps", "small"), ["rms_norm_eps", "small"]),
        (set_value("rope_theta", 0), ["rope_theta"]),
        (set_value("hidden_act", "nope"), ["hidden_act", "nope"]),
        (set_value("eos_token_id", "x"), ["eos_token_id"]),
        (set_value("rope_scaling", "linear"), ["rope_parameters"]),  # as transformers calls it
        (set_value("model_type", 3), ["model_type"]),
        (write_config(b"[]"), ["object"]),
        (write_config(b""), ["JSON"]),
        (write_config(b"null"), ["object"]),
        (write_config(b"\xff\xfe{}"), ["JSON"]),
        (write_config(b"{}\0"), ["JSON"]),
        (write_config(b"[" * 100_000), ["JSON"]),
        (replace_by_folder, ["no such file"]),
        (replace_by_pipe, ["no such file"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_a_damaged_config_json_is_named(place, script, damage, wanted) -> None:
    folder = place.copy_model()
    damage(folder)
    assert_names(refused(place, script, f"model={folder}"), f"{folder}/config.json", *wanted)


def test_a_block_size_may_be_missing_or_null(place) -> None:
    folder = place.copy_model()
    set_value("block_size", None)(folder)
    run_here("evaluate", place.command("evaluate", f"model={folder}", "limit=1", "rules=[dynamic]"))


# ------------------------------------------------------------------------------ the tokenizer


def drop_settings(**changes):
    return lambda folder: edit_json(folder / "tokenizer_config.json", **changes)


def template(text: str):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


@pytest.mark.parametrize("script", ["sft", "evaluate"])
@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (set_value("vocab_size", 262), ["assistant", "262", "vocab_size"]),
        (drop_settings(eos_token=None), ["no eos token"]),
        (drop_settings(pad_token=None), ["no pad token"]),
        (drop_settings(eos_token="<|nope|>"), ["eos token <|nope|>", "vocabulary"]),
        (drop_settings(pad_token="<|nope|>"), ["pad token <|nope|>", "vocabulary"]),
        (drop_settings(mask_token="<|nope|>"), ["mask token <|nope|>", "vocabulary"]),
        (drop_settings(eos_token=3), ["tokenizer", "eos_token"]),
        (lambda f: (f / "tokenizer.json").write_text("[]"), ["tokenizer"]),
        (lambda f: os.truncate(f / "tokenizer.json", 500), ["tokenizer"]),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), ["tokenizer"]),
        (lambda f: (f / "tokenizer_config.json").write_bytes(b'{"a": "\xff"}'), ["tokenizer"]),
        (template("{% for %}"), ["chat template"]),
        (template("{{ raise_exception('never') }}"), ["chat template", "never"]),
        (template("{# nothing #}"), ["chat template", "leaves out"]),
        (template("{{ messages.foo.bar }}"), ["chat template", "foo"]),
    ],
    ids=["large", "no-eos", "no-pad", "eos", "pad", "mask", "number", "list", "half", "settings",
         "not-utf-8", "syntax", "refuses", "empty", "undefined"],
)  # fmt: skip
def test_a_damaged_tokenizer_is_named(place, script, damage, wanted) -> None:
    folder = place.copy_model()
    damage(folder)
    assert_names(refused(place, script, f"model={folder}"), str(folder), *wanted)


def test_an_autoregressive_baseline_needs_no_pad_and_no_mask_token(place) -> None:
    folder = place.copy_model()
    edit_json(folder / "config.json", model_type="qwen3")
    edit_json(folder / "tokenizer_config.json", pad_token=None, mask_token=None)
    assert load_tokenizer(folder).pad_token is None


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T"] * 2}, "tokenizer_class": "T"}),
        ("config.json", {"auto_map": {"AutoConfig": "evil.T", "AutoTokenizer": ["evil.T", None]}}),
        ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.T"}}),
    ],
    ids=["tokenizer", "config", "type"],
)  # fmt: skip
@pytest.mark.parametrize("script", ["sft", "evaluate"])
def test_code_of_a_checkpoint_is_never_run_nor_asked_for(place, script, file, changes) -> None:
    folder = place.copy_model()
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass T: pass\n")
    edit_json(folder / file, **changes)
    with patch("builtins.input", side_effect=AssertionError("asked on the terminal")):
        if file == "config.json" and "model_type" not in changes:  # published ones: our class is taken
            run_here(script, place.command(script, f"model={folder}"))
        else:
            assert_names(refused(place, script, f"model={folder}"), str(folder))
    assert not (folder / "ran").exists()


# --------------------------------------------------------------------------------- questions


@pytest.mark.parametrize(
    "answer",
    ["false", "true", "NaN", "Infinity", "-Infinity", "1e400", "[null]", "[]", '[""]', "{}", "[[]]",
     '["1", ["2"]]', '[["1"]]', '[{"a": 1}]', "[true]", "[NaN]", '["1", null]', '"\\u0000"', '"####"', '" "'],
)  # fmt: skip
def test_a_gold_answer_that_is_none_is_named_by_its_line(place, answer) -> None:
    file = place.write("bad.jsonl", QUESTION + f'{{"question": "3?", "answer": {answer}}}\n')
    assert_names(refused(place, "evaluate", f"data={file}"), "bad.jsonl:2", "no answer")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("0", "0"), ("-1", "-1"), ("2.5", "2.5"), ('["1", 2]', "1, 2"), ('"x = #### 4"', "4"),
     ('"false"', "false")],
)  # fmt: skip
def test_a_gold_answer_may_be_a_number_or_a_list(answer, gold) -> None:
    assert answers.gold_answer({"answer": json.loads(answer)}) == gold
    assert answers.gold_answer({"ground_truth_answer": None, "answer": False, "final_answer": 3}) == "3"


@pytest.mark.parametrize("error", ["NaN", "Infinity", "-1", '"-1"', '"1e999"', '"nan"', "true", "{}", "[1]"])
def test_a_tolerance_that_is_none_is_named_by_its_line(place, error) -> None:
    file = place.write("bad.jsonl", QUESTION + f'{{"question": "3?", "answer": "1", "error": {error}}}\n')
    assert_names(refused(place, "dipo", f"data={file}"), "bad.jsonl:2", "`error`")


@pytest.mark.parametrize("question", ["null", '["a"]', '{"a": 1}', "true", '"\\t"'])
def test_a_question_that_is_no_text_is_named_by_its_line(place, question) -> None:
    file = place.write("bad.jsonl", QUESTION + f'{{"question": {question}, "answer": "1"}}\n')
    assert_names(refused(place, "evaluate", f"data={file}"), "bad.jsonl:2", "no question")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ('{"question": "a", "question": "b", "answer": "1"}', ["bad.jsonl:1", "twice", "question"]),
        (QUESTION + "\0\0\0", ["bad.jsonl:2", "JSON"]),
        ("[" + QUESTION + ",]", ["bad.jsonl:2", "JSON"]),
        (QUESTION.strip() + ",\n", ["bad.jsonl:1", "JSON"]),
        ("{'question': '3'}", ["bad.jsonl:1", "JSON"]),
        ('{"question": "a\nb"}', ["bad.jsonl:1", "JSON"]),
        ('{\n"question": "a"\n}', ["bad.jsonl:1", "JSON"]),
        ("[]\n[]", ["bad.jsonl:2", "JSON"]),
        (QUESTION.encode("utf-16-le"), ["bad.jsonl:1", "JSON"]),
        (b"\x1f\x8b\x08\x00", ["bad.jsonl", "UTF-8"]),
        (b"PAR1\x15\x04", ["bad.jsonl:1", "JSON"]),
        ("question,answer\n3?,4\n", ["bad.jsonl:1", "JSON"]),
        ('{"a": ' * 5_000 + "1" + "}" * 5_000, ["bad.jsonl:1"]),
        ('{"question": "3?", "answer": "1", "x": ' + "[" * 980 + "]" * 980 + "}", ["bad.jsonl:1"]),
    ],
    ids=["key", "nul", "comma", "line-comma", "quotes", "break", "pretty", "lists", "utf-16", "gzip",
         "parquet", "csv", "deep", "nearly-too-deep"],
)  # fmt: skip
def test_a_damaged_question_file_is_named(place, content, wanted) -> None:
    file = place.write("bad.jsonl", content)
    if "nearly" in os.environ["PYTEST_CURRENT_TEST"]:  # it depends on the stack, and neither is a traceback
        with contextlib.suppress(InputError):
            read_records(file)
        return
    assert_names(refused(place, "evaluate", f"data={file}"), *wanted)


@pytest.mark.parametrize(
    "change", [lambda t: "\ufeff" + t, lambda t: t.replace("\n", "\r\n")], ids=["bom", "crlf"]
)
def test_files_of_windows_are_read(place, change) -> None:
    text = QUESTION + QUESTION.replace("3+8", "3+9")
    file = place.write("windows.jsonl", change(text))
    assert [r for _, r in read_records(file)] == [json.loads(line) for line in text.splitlines()]
    assert read_records(place.write("list.json", change(f"[{QUESTION}]")))[0][1]["question"] == "3+8?"


def make_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def make_link(folder: Path, to: str) -> Path:
    (folder / "link").symlink_to(to)
    return folder / "link"


@pytest.mark.parametrize("script", ["sft", "evaluate"])
@pytest.mark.parametrize(
    "make",
    [
        lambda folder: folder,
        make_pipe,  # nobody writes to it, so who opens it waits
        lambda folder: make_link(folder, "nowhere"),
        lambda folder: make_link(folder, "link"),
        lambda folder: Path("/dev/zero"),
        lambda folder: folder / ("a" * 300),
    ],
    ids=["folder", "pipe", "dangling", "loop", "device", "long"],
)
def test_data_that_is_no_file_is_named(place, script, make) -> None:
    path = make(place.folder)
    assert_names(refused(place, script, f"data={path}"), str(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(place) -> None:
    file = place.write("secret.jsonl", QUESTION)
    file.chmod(0)
    assert_names(refused(place, "evaluate", f"data={file}"), "secret.jsonl", "Permission denied")


# ------------------------------------------------------------------------------------- chats

USER, REPLY = {"role": "user", "content": "3"}, {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"messages": [{"role": 3, "content": "3"}, REPLY]}, ["role", "3"]),
        ({"messages": [{"role": None, "content": "3"}, REPLY]}, ["role", "None"]),
        ({"messages": [{"content": "3"}, REPLY]}, ["role"]),
        ({"messages": [{"role": "human", "content": "3"}, REPLY]}, ["role", "human"]),
        ({"messages": [{"role": "\x1b[2J", "content": "3"}, REPLY]}, ["role", "x1b"]),
        ({"messages": [{"role": "system", "content": "s"}, REPLY]}, ["user"]),
        ({"messages": [USER, REPLY | {"tool_calls": [{"name": "f"}]}]}, ["tool_calls"]),
        ({"messages": [USER | {"function_call": {"name": "f"}}, REPLY]}, ["function_call"]),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, ["messages"]),
        ({"messages": [USER, {"role": "assistant", "content": [{"text": "4"}]}]}, ["messages"]),
        ({"messages": [USER, {"role": "Assistant", "content": "4"}]}, ["messages"]),
        ({"messages": [None, REPLY]}, ["messages"]),
        ({"messages": {"role": "user"}}, ["messages"]),
        ({"prompt": ["3"], "response": "4"}, ["prompt"]),
        ({"text": "3"}, ["prompt"]),
    ],
)
def test_a_strange_chat_is_named_by_its_line(place, record, wanted) -> None:
    file = place.write("bad.jsonl", CHAT + "\n" + json.dumps(record) + "\n")
    error = refused(place, "sft", f"data={file}")
    assert_names(error, "bad.jsonl:2", *wanted)
    assert_harmless(error)


# ------------------------------------------------------------------------- kept responses


@pytest.fixture(scope="module")
def evaluated(good, tmp_path_factory) -> Path:
    """The folder of an evaluation that was interrupted before its report."""
    place = Place(tmp_path_factory.mktemp("evaluated"), good)
    run_here("evaluate", place.command("evaluate", "rules=[static]"))
    for name in ("summary.json", "table.md"):
        (place.out / name).unlink()
    return place.out


RESPONSES = "responses-test-static.jsonl"


def change_response(out: Path, **changes) -> None:
    """Change fields of the second line; None drops one, "null" is null."""
    first, second = (out / RESPONSES).read_text().splitlines()
    record = json.loads(second) | changes
    record = {name: None if value == "null" else value for name, value in record.items() if value is not None}
    (out / RESPONSES).write_text(f"{first}\n{json.dumps(record)}\n")


@pytest.mark.parametrize(
    "changes",
    [{name: None} for name in ("response_ids", "steps", "num_tokens", "finish_reason", "seed", "seconds")]
    + [{"response_ids": value} for value in (["a"], [-1], [2**40], [], [1.5], [True], "abc", "null")]
    + [{"steps": value} for value in ([1], ["1"], [0], {}, "null")]
    + [{"num_tokens": value} for value in (10**6, 0, -1, 2.5, "3")]
    + [{"finish_reason": value} for value in ("tired", "null", ["stop"])]
    + [{"seed": value} for value in ("0", "null", [1], 1.5, True)]
    + [{"seconds": value} for value in ("fast", float("nan"), float("inf"), -1, "null", True)],
    ids=str,
)
def test_a_damaged_response_is_named_by_its_line(place, evaluated, changes) -> None:
    shutil.copytree(evaluated, place.out)
    change_response(place.out, **changes)
    before = (place.out / RESPONSES).read_bytes()
    error = refused(place, "evaluate", "rules=[static]")
    assert_names(error, f"{RESPONSES}:2", f"`{next(iter(changes))}`", f"remove {place.out} to start again")
    assert before == (place.out / RESPONSES).read_bytes()


@pytest.mark.parametrize("content", [b"{", b"[]", b"null", b"", b"\xff\xfe", b'{"a": 1, "a": 2}'])
def test_a_damaged_config_of_an_evaluation_is_named(place, evaluated, content) -> None:
    shutil.copytree(evaluated, place.out)
    (place.out / "config.json").write_bytes(content)
    error = refused(place, "evaluate", "rules=[static]")
    assert_names(error, f"{place.out}/config.json", f"remove {place.out} to start again")


def test_of_two_responses_with_one_seed_the_last_counts(place, evaluated) -> None:
    shutil.copytree(evaluated, place.out)
    lines = (place.out / RESPONSES).read_text().splitlines()
    record = json.loads(lines[0]) | {"finish_reason": "length", "seconds": 77.0}
    (place.out / RESPONSES).write_text("\n".join([*lines, json.dumps(record)]) + "\n")
    run_here("evaluate", place.command("evaluate", "rules=[static]"))
    assert json.loads((place.out / RESPONSES).read_text().splitlines()[0])["seconds"] == 77.0


# ---------------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("script", "changes", "wanted"),
    [
        ("sft", ["eval_data=x.jsonl"], ["eval_every"]),
        ("dipo", ["eval_data=x.jsonl"], ["eval_every"]),
        ("evaluate", ["prompt=hello"], ["prompt", "{question}"]),
        ("dipo", ["prompt=Solve {Question}"], ["prompt", "{question}"]),
        ("sft", ["prompt={question"], ["prompt"]),
        ("evaluate", ["prompt=''"], ["prompt"]),
        ("evaluate", ["top_p=0"], ["top_p", "more than 0"]),
        ("evaluate", ["top_p=1.5"], ["top_p", "at most 1"]),
        ("evaluate", ["threshold=2"], ["threshold", "at most 1"]),
        ("dipo", ["eval_threshold=7"], ["eval_threshold", "at most 1"]),
        ("dipo", ["eval_max_tokens=0"], ["eval_max_tokens"]),
        ("evaluate", ["sweep=[0.5,2]"], ["sweep", "at most 1"]),
        ("evaluate", ["sweep=[0.5,0.5]"], ["sweep", "twice"]),
        ("evaluate", ["sweep=[[0.5]]"], ["sweep", "without lists"]),
        ("evaluate", ["rules=[static,static]"], ["rules", "twice"]),
        ("evaluate", ["rules=static"], ["rules"]),
        ("evaluate", ["rules=[null]"], ["rules"]),
        ("evaluate", ["banned=x"], ["banned"]),
        ("evaluate", ["banned=['']"], ["banned"]),
        ("evaluate", ["banned=[[a]]"], ["banned"]),
        ("evaluate", ["temperature=1e30"], ["temperature", "usual size"]),
        ("evaluate", ["max_tokens=9223372036854775808"], ["max_tokens", "usual size"]),
        ("evaluate", ["seed=-9223372036854775809"], ["seed", "usual size"]),
        ("sft", [f"steps={10**400}"], ["steps", "usual size"]),
        ("sft", [f"seed={10**30}"], ["seed", "usual size"]),
        ("sft", ["seed=true"], ["seed"]),
        ("dipo", ["advantage_std=2"], ["advantage_std", "true or false"]),
        ("sft", ["complementary=1.5"], ["complementary", "true or false"]),
        ("sft", ["compile=-1"], ["compile", "true or false"]),
        ("dipo", ["block_size=4.0"], ["block_size"]),
        ("dipo", ["rewards=[accuracy]"], ["rewards"]),
        ("dipo", ["rewards.accuracy=null"], ["rewards.accuracy"]),
        ("sft", ["out=''"], ["out"]),
        ("evaluate", ["out=' '"], ["out"]),
        ("sft", ["model=''"], ["model"]),
        ("sft", ["data=''"], ["data"]),
        ("evaluate", ["data=''"], ["data"]),
        ("sft", ["model="], ["model"]),
        ("evaluate", ["protocol="], ["protocol"]),
        ("sft", ['out="a\\0b"'], ["out", "x00"]),
        ("evaluate", ['model="a\\0b"'], ["model", "x00"]),
        ("evaluate", ["data={a: b}"], ["data"]),
        ("evaluate", ["data=[null]"], ["data"]),
        ("evaluate", ["data=true"], ["data"]),
        ("sft", [""], ["empty argument"]),
        ("sft", ["=3"], ["Key"]),
        ("sft", ["seed =3"], ["seed "]),
        ("sft", ["SEED=3"], ["SEED"]),
        ("sft", ["--seed=1"], ["--seed=1"]),
        ("sft", ["-x"], ["-x"]),
        ("sft", ["prompt=${nope}{question}"], ["prompt", "nope"]),
        ("sft", ["model=" + "a" * 300], ["aaa", "too long"]),
        ("sft", ["model=" + "a/" * 3000], ["a/a", "too long"]),
        ("evaluate", ["out=" + "a" * 300], ["aaa", "too long"]),
        ("evaluate", ["out=/proc/x"], ["/proc/x"]),
    ],
    ids=lambda value: value[0][:30] if isinstance(value, list) else value,
)
def test_a_value_is_refused_by_its_key(place, script, changes, wanted) -> None:
    assert_names(refused(place, script, *changes), *wanted)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("seed: 1\nseed: 2\n", ["bad.yaml", "duplicate key seed"]),
        ("seed: 1\n---\nseed: 2\n", ["bad.yaml", "document"]),
        ("3", ["bad.yaml"]),
        ("1: 2\n", ["1"]),
        ("model:\n  path: x\n", ["model"]),
        ("seed: !!python/object/apply:os.system ['true']\n", ["bad.yaml", "tag"]),
        ("seed:\t1\n\tsteps: 2\n", ["bad.yaml", "line 1"]),
        (b"\x00\x01", ["bad.yaml"]),
        ("wandb: 'a\\0'\ncompile: 3\n", ["compile"]),
    ],
)
def test_a_strange_config_file_is_refused(place, content, wanted) -> None:
    file = place.write("bad.yaml", content)
    assert_names(refused(place, "sft", "--config", str(file)), *wanted)


def test_a_config_file_that_is_a_folder_is_named(place) -> None:
    assert_names(refused(place, "sft", "--config", str(place.folder)), str(place.folder), "folder")


@pytest.mark.parametrize("script", ["sft", "evaluate"])
def test_a_model_that_is_a_file_is_named(place, script) -> None:
    file = place.write("model.safetensors", "")
    assert_names(refused(place, script, f"model={file}"), str(file), "folder")
    assert_names(refused(place, script, f"model={file}/x"), str(file))


@pytest.mark.parametrize("script", ["sft", "dipo", "evaluate"])
def test_an_out_inside_a_file_is_named(place, script) -> None:
    file = place.write("a-file", "kept")
    assert_names(refused(place, script, f"out={file}/out"), f"{file}/out")
    assert file.read_text() == "kept"


# ----------------------------------------------------------------------------- small programs

BOXED = '{"text": "\\\\boxed{1}", "gold": %s}\n'


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("", ["no rows"]),
        ('{"text": "a"}\n', [":1", "gold"]),
        ('{"text": 3, "gold": "1"}\n', [":1", "text"]),
        (BOXED % "null", [":1", "gold"]),
        (BOXED % "true", [":1", "gold"]),
        (BOXED % '"1", "tolerance": -1', [":1", "tolerance"]),
        (BOXED % '"1", "tolerance": NaN', [":1", "tolerance"]),
        (BOXED % '"1", "tolerance": "x"', [":1", "tolerance"]),
        ("[1]", ["row 1", "object"]),
    ],
)
def test_reward_names_what_it_cannot_check(tmp_path, content, wanted) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(content)
    assert_names(refused_program(reward.main, "--check", file), "bad.jsonl", *wanted)


@pytest.mark.parametrize(
    ("main", "arguments", "wanted"),
    [
        (reward.main, ["--chck", "x"], ["--chck"]),
        (reward.main, ["--check"], ["--check"]),
        (reward.main, ["--check", "nowhere"], ["nowhere"]),
        (reward.main, ["--check", "FOLDER"], ["FOLDER", "folder"]),
        (model.main, ["a", "b"], ["b"]),
        (model.main, [""], ["folder", "empty"]),
        (model.main, ["FILE"], ["FILE"]),
        (model.main, ["FILE/x"], ["FILE/x"]),
        (masking.main, ["FOLDER"], ["FOLDER", ".png"]),
        (masking.main, ["x.foo"], ["x.foo", ".png"]),
        (masking.main, ["--dpi"], ["--dpi"]),
        (masking.main, ["/nowhere/x.png"], ["/nowhere/x.png"]),
        (rollout.main, ["MODEL", ""], ["question"]),
        (rollout.main, ["MODEL", "\udcff"], ["question", "UTF-8"]),
        (rollout.main, ["MODEL", "3" * 200], ["128 positions"]),
        (rollout.main, ["", "3"], ["no such checkpoint folder"]),
        (rollout.main, ["FILE", "3"], ["FILE", "folder"]),
        (tiny_task.main, ["--out", ""], ["--out", "empty"]),
        (tiny_task.main, ["--out", "FILE"], ["FILE"]),
        (download.main, ["nope"], ["nope", "math500"]),
        (download.main, ["math500", "--source", ""], ["--source", "empty"]),
        (download.main, ["math500", "--source", "/nowhere"], ["/nowhere"]),
        (download.main, ["math500", "--out", "FILE", "--source", "/nowhere"], ["FILE"]),
        (demo.main, ["--nope"], ["--nope"]),
        (demo.main, ["--out", ""], ["--out", "empty"]),
        (demo.main, ["--out", "DEMO"], ["DEMO", "finished demo"]),
        (grading.main, ["--samples", "x"], ["--samples", "x"]),
        (compare.main, ["FOLDER"], ["RUN"]),
        (compare.main, ["FOLDER", ""], ["RUN", "empty"]),
        (compare.main, ["FOLDER", "/nowhere"], ["FOLDER", "summary.json"]),
    ],
)
def test_a_small_program_refuses_in_one_line(place, main, arguments, wanted) -> None:
    file = place.write("a-file", "kept")
    (place.folder / "demo").mkdir()
    place.write("demo/summary.json", "{}")
    names = {"FILE": str(file), "FOLDER": str(place.folder), "MODEL": str(place.model)}
    names["DEMO"] = f"{place.folder}/demo"

    def filled(text: str) -> str:
        return re.sub("FILE|FOLDER|MODEL|DEMO", lambda found: names[found[0]], text)

    error = refused_program(main, *map(filled, arguments))
    assert_names(error, *map(filled, wanted))
    assert file.read_text() == "kept"


@pytest.mark.parametrize(
    "manifest",
    ["[]", "{", "3", '{"math500": 3}', '{"math500": {}}', '{"math500": {"repo": 1, "revision": "x"}}'],
)
def test_a_damaged_manifest_is_named(tmp_path, manifest) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    error = refused_program(download.main, "math500", "--out", tmp_path, "--source", "/nowhere")
    assert_names(error, f"{tmp_path}/manifest.json")


@pytest.mark.parametrize(
    "row", [{"problem": "a"}, {"problem": "a", "answer": None}, {"problem": " ", "answer": "1"},
            {"problem": 3, "answer": "1"}, {"problem": "a", "answer": True}, {HOSTILE: 1}]
)  # fmt: skip
def test_a_row_of_another_shape_is_not_taken(tmp_path, row) -> None:
    folder = tmp_path / "mirror" / download.DATASETS["math500"].repo
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text(json.dumps(row))
    out = tmp_path / "out"
    error = refused_program(download.main, "math500", "--out", out, "--source", tmp_path / "mirror")
    assert_names(error, "test.jsonl:1", "unknown shape")
    assert_harmless(error)
    assert not (out / "math500.jsonl").exists()


@pytest.mark.parametrize(
    "changes", [{"correct": "yes"}, {"correct": 1}, {"correct": "null"}, {"gold": {}}, {"question": [1]}]
)
def test_a_comparison_names_a_damaged_answer(place, evaluated, changes) -> None:
    runs = [place.folder / "a", place.folder / "b"]
    for run in runs:
        shutil.copytree(evaluated, run)
        (run / "summary.json").write_text("{}")
    change_response(runs[1], **changes)
    error = refused_program(compare.main, *runs)
    assert_names(error, f"{runs[1]}/{RESPONSES}:2", f"`{next(iter(changes))}`")


# --------------------------------------------------------------------- what moves a terminal


def test_the_hostile_text_is_one() -> None:
    assert sum(not c.isprintable() for c in HOSTILE) >= 8
    assert_harmless(printable(HOSTILE))


def test_an_answer_does_not_move_the_terminal(tmp_path) -> None:
    file = tmp_path / "check.jsonl"
    record = {"text": f"\\boxed{{1, 2{HOSTILE}}}", "gold": f"1, {HOSTILE}3"}
    file.write_text(json.dumps(record) + "\n" + json.dumps(record | {"gold": "1,2,3"}))
    code, out, err = run_program(reward.main, "--check", file)
    assert code == 0, err
    assert_harmless(out)


def test_names_of_files_and_models_do_not_move_the_terminal(place) -> None:
    folder = place.folder / f"model{HOSTILE}|a"
    shutil.copytree(place.model, folder)
    file = place.folder / f"data{HOSTILE}|$x$.jsonl"
    shutil.copy(place.questions, file)
    out = place.folder / f"out{HOSTILE}"
    shown = io.StringIO()
    argv = place.command("evaluate", "limit=1", "sweep=[0.5]")
    config = {"model": str(folder), "data": str(file), "out": str(out)}
    main, config_class, presets = SCRIPTS["evaluate"]
    loaded = load_config(config_class, argv, presets)
    for name, value in config.items():  # YAML has no such names
        setattr(loaded, name, value)
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        main(loaded)
    assert_harmless(re.sub(r"\r|\x1b\[A", "", shown.getvalue()))  # of the progress bar
    table = (out / "table.md").read_text()
    assert_harmless(table)
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, "a column too many"


def test_tables_keep_their_lines_and_columns() -> None:
    of_one = {"questions": 1, "samples": 1, "accuracy": 1.0, "pass_at_k": 1.0, "maj_at_k": 1.0, "tpf": 1.0}
    of_one |= {"tokens": 1.0, "truncated": 0.0, "tokens_per_second": 1.0, "seconds": 1.0}
    name = f"a|b\n{HOSTILE}"
    results = {"static": {"math500": of_one, name: of_one}}
    tables = [figures.tables(name, f"none except for prompt={name}", results)[0]]
    tables.append(figures.comparison_table(name, name, {name: ([1.0], [0.0])}))
    for table in tables:
        assert_harmless(table)
        assert len(table.splitlines()) == len(table.replace("\\|", "").splitlines())
    assert "a\\|b\\n" in tables[1]


@pytest.mark.parametrize("script", ["sft", "dipo", "evaluate"])
def test_errors_do_not_move_the_terminal(place, script) -> None:
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        tell(f"error: {HOSTILE}")
    assert_harmless(stderr.getvalue())
    file = place.write("bad.jsonl", json.dumps({"question": "3", "answer": "1", "error": HOSTILE}))
    if script == "sft":
        file = place.write("bad.jsonl", json.dumps({"messages": [{"role": HOSTILE, "content": ""}, REPLY]}))
    assert_harmless(refused(place, script, f"data={file}"))


# -------------------------------------------------------------------------- the other ranks

ALL = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"WORLD_SIZE": ""}, ["WORLD_SIZE", "missing"]),
        ({"MASTER_ADDR": ""}, ["MASTER_ADDR", "missing"]),
        ({"MASTER_PORT": ""}, ["MASTER_PORT", "missing"]),
        ({"RANK": "first"}, ["RANK", "first"]),
        ({"RANK": "-1"}, ["RANK", "-1"]),
        ({"RANK": "2"}, ["RANK", "2", "WORLD_SIZE"]),
        ({"RANK": "1.0"}, ["RANK", "1.0"]),
        ({"WORLD_SIZE": "0"}, ["WORLD_SIZE", "0"]),
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE", "two"]),
        ({"MASTER_PORT": "http"}, ["MASTER_PORT", "http"]),
        ({"MASTER_PORT": "70000"}, ["MASTER_PORT", "70000"]),
        ({"LOCAL_RANK": "x"}, ["LOCAL_RANK", "x"]),
        ({"LOCAL_RANK": "-1"}, ["LOCAL_RANK", "-1"]),
        ({"RANK": "1"}, ["MASTER_ADDR", "MASTER_PORT", "127.0.0.1:1", "refused"]),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, ["MASTER_PORT", "nobody answers"]),
        ({"MASTER_ADDR": "no.such.host.invalid"}, ["MASTER_ADDR", "no.such.host.invalid"]),
        ({"MASTER_ADDR": "a" * 70, "RANK": "1"}, ["MASTER_ADDR"]),  # no name that can be looked up
    ],
    ids=str,
)
def test_an_environment_variable_is_named(monkeypatch, changes, wanted) -> None:
    for name, value in (ALL | changes).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch, "CONNECT_SECONDS", 0.2)
    with pytest.raises(InputError) as caught:
        start_distributed()
    assert_names(str(caught.value), *wanted)


def test_a_rank_needs_a_gpu_of_its_own(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="LOCAL_RANK: 2, and this machine has 2 GPUs"):
        launch.check_launch(gpus=2)
    launch.check_launch(gpus=3)
    launch.check_launch(gpus=0)


def run_rank(zygote, place: Place, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "evaluate.py", *place.command("evaluate", "limit=1")]
    return zygote.run(command, cwd=ROOT, env=ENVIRONMENT | variables, timeout=60)


def test_a_port_in_use_is_named(place, zygote) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_rank(zygote, place, **ALL | {"WORLD_SIZE": "1", "MASTER_PORT": port})
    assert_names(the_error(done.returncode, done.stderr), "MASTER_PORT", port)


def test_an_address_that_nobody_answers_is_named_in_time(place, zygote) -> None:
    start = time.monotonic()
    done = run_rank(zygote, place, **ALL | {"RANK": "1"})
    assert time.monotonic() - start < 30
    assert_names(the_error(done.returncode, done.stderr), "MASTER_ADDR", "127.0.0.1:1")


# -------------------------------------------------------------- patterns on what a model wrote

PIECES = ["1", "1,", "1,123", "123,", "12 ", " ", "~", "\t", "\\ ", "\\,", "\\quad", "\\", "{", "}", "(", "[",
          "$", "\\$", "^", "^{", "_", ".", ". ", ":", ", ", ",\\!", "{,}", "1/", "\\frac", "\\frac{1}", "|",
          "\\sqrt", "sqrt(", "\\text{", "\\text{1", "\\text{and", "and ", ",and", "percent", " percent", "=",
          "\\circ", "^\\circ", "pi", "inf", "\\boxed{", "**", "x_{a", "x \\in", "\\begin{matrix}", "\\{",
          "×", "a", "<think>", "</think>", "</think> ", "½", "√", "x²", "\\overline{3", "0.\\overline",
          " units", "million", ">=", "!=", "|A", "\\sin ", "(x)=", "\\pm", "\\mp2", "\\begin{array}{c",
          "\\\\[4pt]", " or ", "for all ", "where ", "10 000", "\\mathrm{cm^", "'",
          "1:2", "\\mathbf "]  # fmt: skip
ATTACK = """
import resource, sys, json
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from types import SimpleNamespace
import reward
from plumbing import answers

rules = [answers.normal_form.__wrapped__, answers.number, answers._decimals, answers._depth]
rules += [answers.extract_answer, lambda text: answers.quick_verdict(text, "1", None)]
for form in (reward.think_only, reward.think_format, reward.think_first):
    rules.append(lambda text, form=form: form(SimpleNamespace(text=text)))
rules += [lambda text: reward.repetition(SimpleNamespace(text=text))]
for piece in json.loads(sys.argv[1]):
    for start in ("", "<think>", "\\\\text{", "1", " "):
        for end in ("x", "!", "}", "\\n"):
            text = (start + piece * 2000)[:1999] + end
            for rule in rules:
                rule(text)
"""


def test_no_pattern_holds_up_the_trainer() -> None:
    """A few thousand attacks within a minute of processor time; one on a cubic pattern alone takes longer."""
    pairs = ["".join(pair) for pair in itertools.islice(itertools.permutations(PIECES, 2), 0, None, 97)]
    done = subprocess.run(
        [sys.executable, "-c", ATTACK, json.dumps(PIECES + pairs)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"it ran out of processor time: {done.stderr[-500:]}"


def test_a_report_of_a_sweep_takes_any_name(tmp_path) -> None:
    of_one = {
        "accuracy": 1.0,
        "accuracy_low": 1.0,
        "accuracy_high": 1.0,
        "tpf": 1.0,
        "tokens_per_second": 1.0,
    }
    figures.plot_sweep(tmp_path / "sweep.png", [0.5], {"dynamic-0.5": {"a$\\x$": of_one}})
    assert (tmp_path / "sweep.png").stat().st_size > 0
