"""`python rollout.py`: its command line, its chat, its engines; through a pipe and through a pseudo-terminal.

Oracles: the engines' own records, the confidences that `reveal` saw, transformers' `generate`, and the
chat template written out.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import termios

import pytest
import torch
from conftest import TINY
from PIL import Image
from terminal import Program, Screen

import rollout
from plumbing import chat
from plumbing.autoregressive import Autoregressive
from plumbing.checkpoint import encode_prompt, load_tokenizer, stop_ids, tiny, tiny_tokenizer
from plumbing.common import ROOT, InputError
from plumbing.show import plain_lines
from rollout import Decoding, LMDeployEngine, TorchEngine

PLAIN_ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
ENVIRONMENT = PLAIN_ENVIRONMENT | {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TERM": "xterm-256color",
    "PYTHONIOENCODING": "utf-8",
}


@pytest.fixture
def options(monkeypatch):
    """The options of a command line, without the checkpoint in front."""

    def read(*arguments: str) -> argparse.Namespace:
        monkeypatch.setattr("sys.argv", ["rollout.py", "CHECKPOINT", *arguments])
        monkeypatch.chdir(ROOT)
        return chat.read_options("what it does")

    return read


@pytest.fixture(scope="module")
def engine(tiny_folder) -> TorchEngine:
    tokenizer = load_tokenizer(str(tiny_folder))
    return TorchEngine(rollout.load(str(tiny_folder)), 4, tokenizer.mask_token_id, stop_ids(tokenizer))


@pytest.fixture(scope="module")
def autoregressive_folder(tmp_path_factory):
    """A random Qwen3 as transformers writes it, with peaked distributions."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("qwen3"), tiny_tokenizer()
    config = Qwen3Config(
        **TINY,
        vocab_size=264,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def piped(folder, *arguments, lines: bytes | None = None, **changes) -> subprocess.CompletedProcess:
    """The script with standard output in a pipe, and lines to read if any; `changes` of the environment."""
    command = [sys.executable, "rollout.py", str(folder), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT | changes, input=lines or b"", capture_output=True, timeout=300
    )


def step_maps(printed: str) -> list[list[int]]:
    return [json.loads(found) for found in re.findall(r"^step map: (\[.*\])$", printed, re.MULTILINE)]


# -------------------------------------------------------------------------------- the command line


def test_the_defaults_and_every_flag(options):
    assert vars(options()) | {"question": "q"} == vars(options("q"))
    default = vars(options("q"))
    wanted = {
        "rule": "dynamic",
        "threshold": 0.9,
        "temperature": 0.0,
        "seed": 0,
        "max_tokens": None,
        "pace": None,
    }
    wanted |= {"gif": None, "engine": "auto", "dtype": "float32", "question": "q", "checkpoint": "CHECKPOINT"}
    assert default == wanted | {"max_batch": 2, "cache_gib": 0.0}
    for flags, name, value in (
        (["--static"], "rule", "static"),
        (["--threshold", "0.5"], "threshold", 0.5),
        (["--temperature", "1.5"], "temperature", 1.5),
        (["--seed", "7"], "seed", 7),
        (["--max-tokens", "9"], "max_tokens", 9),
        (["--pace", "0"], "pace", 0.0),
        (["--gif", "docs/../b.GIF"], "gif", chat.Path("docs/../b.GIF")),
        (["--engine", "torch"], "engine", "torch"),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
    ):
        assert vars(options("q", *flags)) == default | {name: value}


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["q", "--threshold", "1.1"], ["--threshold", "1.1", "at most 1"]),
        (["q", "--threshold", "nan"], ["--threshold", "nan"]),
        (["q", "--temperature", "-1"], ["--temperature"]),
        (["q", "--temperature", "inf"], ["--temperature", "inf"]),
        (["q", "--seed", "1.5"], ["--seed", "1.5", "whole"]),
        (["q", "--seed", "-1"], ["--seed"]),
        (["q", "--seed", str(2**64)], ["--seed"]),
        (["q", "--max-tokens", "0"], ["--max-tokens", "'0'"]),
        (["q", "--pace", "x"], ["--pace", "'x'"]),
        (["q", "--gif", "x.png"], ["--gif", "x.png", ".gif"]),
        (["q", "--gif", "no/such/x.gif"], ["--gif", "no/such", "folder"]),
        (["--gif", "x.gif"], ["--gif", "question"]),
        (["q", "--engine", "vllm"], ["--engine", "vllm"]),
        (["q", "--dtype", "int8"], ["--dtype", "int8"]),
        (["q", "--colour"], ["--colour"]),
        (["q", "r"], ["r"]),
        (["\udcff"], ["question", "UTF-8"]),
    ],
)
def test_a_bad_argument_is_named_in_one_line(options, arguments, wanted):
    with pytest.raises(InputError) as caught:
        options(*arguments)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in wanted), caught.value


# --------------------------------------------------------------------------------- commands


def test_commands_change_what_they_name(options):
    now, history = options(), [{"role": "user", "content": "x"}]
    for line, name, value, said in (
        ("/static", "rule", "static", "static"),
        ("/threshold 0.7", "threshold", 0.7, "threshold 0.7, for /dynamic"),
        ("/dynamic", "rule", "dynamic", "dynamic, threshold 0.7"),
        ("/threshold  1", "threshold", 1.0, "threshold 1.0"),
        ("/seed 3", "seed", 3, "seed 3"),
        ("/temperature 0.5", "temperature", 0.5, "temperature 0.5"),
        ("/max-tokens 12", "max_tokens", 12, "max-tokens 12"),
    ):
        before = vars(now).copy()
        assert chat.obey(line, now, history, True) == said
        assert vars(now) == before | {name: value}
    assert len(history) == 1
    assert chat.obey("/reset", now, history, True) == "a new chat" and history == []
    printed = chat.obey("/help", now, history, True)
    for name in (
        "static",
        "dynamic",
        "threshold",
        "seed",
        "temperature",
        "max-tokens",
        "reset",
        "help",
        "quit",
    ):
        assert f"/{name}" in printed


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("/", "/help"),
        ("/foo", "/foo"),
        ("/threshold", "0.9"),
        ("/threshold x", "'x'"),
        ("/threshold 2", "at most 1"),
        ("/seed -1", "'-1'"),
        ("/max-tokens 0", "'0'"),
        ("/max_batch 3", "no such command"),
        ("/static now", "'now'"),
        ("/reset 1", "'1'"),
        ("/STATIC", "/STATIC"),
    ],
)
def test_a_bad_command_changes_nothing_and_is_one_line(options, line, wanted):
    now, history = options(), [{"role": "user", "content": "x"}]
    before = vars(now).copy()
    with pytest.raises((InputError, argparse.ArgumentTypeError)) as caught:
        chat.obey(line, now, history, True)
    assert wanted in str(caught.value) and "\n" not in str(caught.value)
    assert vars(now) == before and len(history) == 1


@pytest.mark.parametrize("line", ["/static", "/dynamic"])
def test_an_autoregressive_model_has_no_rules(options, line):
    with pytest.raises(InputError, match="autoregressive"):
        chat.obey(line, options(), [], False)


# ------------------------------------------------------------------------------------ prompts


def test_a_prompt_with_a_history_is_the_chat_template_of_all_turns(tokenizer):
    history = [{"role": "user", "content": "3+8?"}, {"role": "assistant", "content": "11"}]
    ids = encode_prompt(tokenizer, "and 5?", history)
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\n3+8?<|im_end|>\n<|im_start|>assistant\n11<|im_end|>\n"
        "<|im_start|>user\nand 5?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert encode_prompt(tokenizer, "3+8?") == encode_prompt(tokenizer, "3+8?", [])


def test_a_template_for_one_turn_only_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}{{ messages[0].content }}"
    )
    assert tokenizer.decode(encode_prompt(tokenizer, "x")) == "x"
    with pytest.raises(InputError, match="refuses a chat of 3 turns"):
        encode_prompt(tokenizer, "x", [{"role": "user", "content": "a"}] * 2)


# --------------------------------------------------------------------------- answers of the engines


@pytest.mark.parametrize("flags", [[], ["--static"], ["--temperature", "1"], ["--threshold", "0.3"]])
def test_an_answer_is_the_engines_record_with_the_confidences_of_its_reveals(
    engine, tokenizer, options, monkeypatch, flags
):
    """What `reveal` saw, and chose, when each token was revealed."""
    seen = []

    def spy(confidence, masked, how, log_tau=None):
        chosen = reveal(confidence, masked, how, log_tau)
        if masked.any():
            seen.append((confidence[0].tolist(), chosen[0].tolist()))
        return chosen

    reveal = rollout.reveal
    monkeypatch.setattr(rollout, "reveal", spy)
    asked = options("3+8?", "--max-tokens", "24", "--seed", "5", *flags)
    answer = rollout.answer(engine, tokenizer, "3+8?", [], asked)

    prompt = encode_prompt(tokenizer, "3+8?")
    assert answer.prompt_tokens == len(prompt) and answer.num_steps == len(seen)
    assert answer.blocks == [i // 4 for i in range(len(answer.steps))]
    for step, (confidence, chosen) in enumerate(seen, start=1):
        revealed = [i for i, s in enumerate(answer.steps) if s == step]
        assert [i % 4 for i in revealed] == [j for j, is_chosen in enumerate(chosen) if is_chosen]
        for i in revealed:
            assert math.isclose(
                answer.probabilities[i], math.exp(confidence[i % 4]), rel_tol=1e-3, abs_tol=1e-6
            )
    assert answer.probabilities[: len(prompt)] == [1.0] * len(prompt)
    assert min(answer.probabilities[len(prompt) :]) < 0.99, "all the same would show nothing"

    # The texts and the end are those of the engine.
    greedy = "--temperature" not in flags
    how = Decoding(rule=asked.rule, threshold=asked.threshold, top_k=int(greedy), max_tokens=24)
    (expected,) = engine.generate([prompt], [5], how)
    assert answer.steps == [0] * len(prompt) + expected.steps
    assert "".join(answer.texts) == tokenizer.decode(prompt) + tokenizer.decode(expected.response_ids)
    assert answer.text == tokenizer.decode(expected.shown_ids, skip_special_tokens=True)
    assert (answer.num_tokens, answer.finish_reason) == (expected.num_tokens, expected.finish_reason)
    assert answer.seconds > 0


def test_greedy_does_not_ask_for_the_seed_and_draws_do(engine, tokenizer, options):
    def text(*flags: str) -> str:
        return rollout.answer(engine, tokenizer, "3+8?", [], options("q", "--max-tokens", "24", *flags)).text

    assert text("--seed", "1") == text("--seed", "2")
    assert text("--temperature", "1", "--seed", "1") == text("--temperature", "1", "--seed", "1")
    assert text("--temperature", "1", "--seed", "1") != text("--temperature", "1", "--seed", "2")
    assert text("--temperature", "1", "--seed", "1") != text("--temperature", "3", "--seed", "1")


def test_static_is_a_token_per_step_in_blocks_of_any_size(tmp_path, options):
    folder = tiny(tmp_path / "eight", block_size=8, **TINY)
    tokenizer = load_tokenizer(folder)
    eight = TorchEngine(rollout.load(folder), 8, tokenizer.mask_token_id, [])
    answer = rollout.answer(eight, tokenizer, "3+8?", [], options("q", "--static", "--max-tokens", "16"))
    assert answer.tokens_per_forward == 1.0 and set(answer.blocks[answer.prompt_tokens :]) >= {2, 3}


def test_an_autoregressive_answer_is_that_of_transformers(autoregressive_folder, options):
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(autoregressive_folder)
    model = Autoregressive(autoregressive_folder, "float32", [tokenizer.eos_token_id])
    answer = rollout.answer(model, tokenizer, "3+8?", [], options("q", "--max-tokens", "30"))
    prompt = torch.tensor([encode_prompt(tokenizer, "3+8?")])
    reference = AutoModelForCausalLM.from_pretrained(autoregressive_folder)
    out = reference.generate(
        prompt, max_new_tokens=30, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    assert "".join(answer.texts) == tokenizer.decode(out[0])
    assert answer.steps[answer.prompt_tokens :] == list(range(1, out.shape[1] - prompt.shape[1] + 1))
    assert answer.tokens_per_forward == 1.0
    with torch.no_grad():
        log_p = reference(out).logits[0].log_softmax(-1)
    expected = log_p[:-1].exp().gather(-1, out[0, 1:, None])[prompt.shape[1] - 1 :, 0].tolist()
    assert answer.probabilities[answer.prompt_tokens :] == pytest.approx(expected, abs=1e-4)


def test_autoregressive_draws_follow_seed_and_temperature(autoregressive_folder):
    """Of the first token, against the softmax; 800 draws."""
    tokenizer = load_tokenizer(autoregressive_folder)
    model = Autoregressive(autoregressive_folder, "float32", [])
    prompt, how = encode_prompt(tokenizer, "3+8?"), Decoding(temperature=2.0, max_tokens=1)
    seeds = list(range(800))
    records = model.generate([prompt] * 800, seeds, how)
    with torch.no_grad():
        p = (model.model(torch.tensor([prompt])).logits[0, -1] / 2.0).softmax(-1)
    for token in p.topk(4).indices.tolist():
        share = sum(r.response_ids == [token] for r in records) / 800
        assert abs(share - float(p[token])) < 4 * math.sqrt(float(p[token]) / 800)
    assert model.generate([prompt], [3], how)[0].response_ids == records[3].response_ids
    drawn = records[0]
    assert drawn.logprobs[0] == pytest.approx(float(p[drawn.response_ids[0]].log()), abs=1e-4)


def test_an_autoregressive_answer_ends_at_a_stop_token_and_within_the_positions(autoregressive_folder):
    tokenizer = load_tokenizer(autoregressive_folder)
    prompt, how = encode_prompt(tokenizer, "3+8?"), Decoding(top_k=1, max_tokens=20)
    (free,) = Autoregressive(autoregressive_folder, "float32", []).generate([prompt], [0], how)
    assert (len(free.response_ids), free.finish_reason, free.num_tokens) == (20, "length", 20)
    stop = free.response_ids[6]
    end = free.response_ids.index(stop) + 1
    (stopped,) = Autoregressive(autoregressive_folder, "float32", [stop]).generate([prompt], [0], how)
    assert stopped.response_ids == free.response_ids[:end] and stopped.finish_reason == "stop"
    with pytest.raises(InputError, match=r"max_tokens=200 exceed the model's 128 positions"):
        Autoregressive(autoregressive_folder, "float32", []).generate(
            [prompt], [0], Decoding(top_k=1, max_tokens=200)
        )


@pytest.mark.parametrize("damage", ["weights", "kind", "missing", "nan"])
def test_a_damaged_autoregressive_checkpoint_is_named(autoregressive_folder, tmp_path, damage):
    from safetensors.torch import load_file, save_file

    for file in autoregressive_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    if damage == "weights":
        weights.write_bytes(b"no")
    elif damage == "kind":
        (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    elif damage == "missing":
        tensors.pop("model.norm.weight")
    else:
        tensors["model.norm.weight"][0] = math.nan
    if damage in ("missing", "nan"):
        save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(InputError, match=re.escape(str(tmp_path))) as caught:
        Autoregressive(tmp_path, "float32", [])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_lmdeploys_answers_are_the_embedded_ones(
    tiny_folder, autoregressive_folder, options, monkeypatch, tmp_path, kind
):
    """On a CPU, as tests/test_lmdeploy.py runs it. Greedily it does not say how sure it was."""
    pytest.importorskip("lmdeploy", reason="pip install --no-deps -r requirements-lmdeploy.txt")
    monkeypatch.setattr(LMDeployEngine, "setup", "lmdeploy_on_cpu:install")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tiny_folder if kind == "diffusion" else autoregressive_folder
    tokenizer = load_tokenizer(folder)
    asked = options("q", "--engine", "lmdeploy", "--max-tokens", "16")
    deployed = rollout.make_engine(folder, tokenizer, 0, asked, tmp_path / "log")
    try:
        found = rollout.answer(deployed, tokenizer, "3+8?", [], asked)
        assert found.probabilities is None
        if kind == "diffusion":
            ours = rollout.make_engine(
                folder, tokenizer, 0, options("q", "--engine", "torch"), tmp_path / "log"
            )
        else:
            ours = Autoregressive(folder, "float32", stop_ids(tokenizer))
        expected = rollout.answer(ours, tokenizer, "3+8?", [], asked)
        assert list(plain_lines(found)) == list(plain_lines(expected))
        assert found.text == expected.text
    finally:
        deployed.close()


# ------------------------------------------------------------------------------ whole processes


def test_a_question_in_a_pipe(tiny_folder, engine, tokenizer, options):
    done = piped(tiny_folder, "3+8?", "--static", "--max-tokens", "12", "--pace", "9", "--engine", "torch")
    assert done.returncode == 0, done.stderr
    printed = done.stdout.decode()
    asked = options("q", "--static", "--max-tokens", "12")
    assert printed == "\n".join(plain_lines(rollout.answer(engine, tokenizer, "3+8?", [], asked))) + "\n"
    assert all(c.isprintable() or c == "\n" for c in printed)
    assert done.stderr.decode() == "", "no bar, no sequence"
    (step_map,) = step_maps(printed)
    assert sorted(step_map) == list(range(1, len(step_map) + 1))


def test_a_pipe_that_takes_ascii_only_gets_escapes(tiny_folder):
    unicode = piped(tiny_folder, "3+8?", "--max-tokens", "12").stdout.decode()
    done = piped(tiny_folder, "3+8?", "--max-tokens", "12", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert (
        not unicode.isascii() and done.stdout.decode() == unicode.encode("ascii", "backslashreplace").decode()
    )


def test_a_chat_in_a_pipe(tiny_folder, engine, tokenizer, options):
    lines = b"3+8?\n\n/static\n  and 5?  \n/nonsense\n/threshold 7\nf\xffoo\n/reset\n3+8?\n/quit\n9+9?\n"
    done = piped(tiny_folder, "--max-tokens", "12", lines=lines)
    assert done.returncode == 0, done.stderr
    printed, history = done.stdout.decode(), []
    expected = []
    for question, rule in (("3+8?", "dynamic"), ("and 5?", "static"), ("3+8?", "static")):
        if question == "3+8?":
            history = []
        asked = options("q", "--max-tokens", "12")
        asked.rule = rule
        answer = rollout.answer(engine, tokenizer, question, history, asked)
        history += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text}]
        expected.append([line for text in plain_lines(answer) for line in text.split("\n")])
    found = re.sub(r"[\d.]+ tokens/s", "", printed)
    parts = re.split(r"^\d+ tokens in \d+ steps, [\d.]+ tokens per forward, \n", found, flags=re.MULTILINE)
    assert parts[0].split("\n") == [*expected[0], ""]
    assert parts[1].split("\n") == ["static", *expected[1], ""]
    assert parts[2].split("\n") == ["a new chat", *expected[2], ""]
    assert parts[3] == "", "nothing after /quit"
    errors = [line for line in done.stderr.decode().split("\n") if line.startswith("error")]
    assert [error.split(",")[0] for error in errors] == [
        "error: /nonsense: no such command",
        "error: '7'",
        "error: expected a text in UTF-8",
    ]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", printed)


def test_a_chat_that_exceeds_the_positions_says_how_to_go_on(tmp_path):
    folder = tiny(tmp_path / "short", **TINY | {"max_position_embeddings": 128})
    lines = b"3+8?\n" + b"7" * 50 + b"\n" + b"5" * 40 + b"\n/reset\n3+8?\n"
    done = piped(folder, "--max-tokens", "12", lines=lines)
    assert done.returncode == 0, done.stderr
    maps = step_maps(done.stdout.decode())
    errors = [line for line in done.stderr.decode().split("\n") if line.startswith("error")]
    assert 1 <= len(errors) <= 2 and len(maps) == 4 - len(errors)
    for error in errors:
        assert "128 positions" in error and "/reset" in error and "/max-tokens" in error
    assert maps[0] == maps[-1], "after /reset it is a new chat"


def test_a_chat_on_a_terminal(tiny_folder):
    running = Program(
        [sys.executable, "rollout.py", str(tiny_folder), "--max-tokens", "12", "--pace", "0.01"],
        cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        before = termios.tcgetattr(running.slave)
        end = running.until("> ")
        running.send("3+8?\n")
        end = running.until("tokens/s", end)
        end = running.until("> ", end)
        running.send("/nonsense\n")
        end = running.until("error: /nonsense: no such command", end)
        end = running.until("> ", end)
        running.send("\x04")
        assert running.end() == 0
        assert termios.tcgetattr(running.slave) == before
        screen = Screen(80, 60)
        screen.feed(running.output)
        lines = screen.text.split("\n")
        assert "> 3+8?" in lines and "generating" not in screen.text
        assert sum("tokens/s" in line for line in lines) == 1 and screen.too_high == 0
        assert re.search(r"\033\[\?2026h.*step 1/", running.output, re.DOTALL), "it moved"
    finally:
        running.close()


def test_ctrl_c_ends_a_chat_cleanly(tiny_folder):
    running = Program([sys.executable, "rollout.py", str(tiny_folder)], cwd=ROOT, env=ENVIRONMENT)
    try:
        before = termios.tcgetattr(running.slave)
        running.until("> ")
        running.send("3+")
        running.until("3+")
        running.send("\x03")
        assert running.end() == 130
        assert running.output.count("interrupted (SIGINT)") == 1 and "Traceback" not in running.output
        assert termios.tcgetattr(running.slave) == before, "the shell after it would not echo"
    finally:
        running.close()


def test_the_picture_of_both_rules(tiny_folder, tmp_path, engine, tokenizer, options):
    file = tmp_path / "x.gif"
    done = piped(
        tiny_folder, "3+8?", "--gif", str(file), "--max-tokens", "12", "--pace", "0.05", "--threshold", "0.2"
    )
    assert done.returncode == 0, done.stderr
    answers = {}
    for rule in ("static", "dynamic"):
        asked = options("q", "--max-tokens", "12", "--threshold", "0.2")
        asked.rule = rule
        answers[rule] = rollout.answer(engine, tokenizer, "3+8?", [], asked)
    assert answers["dynamic"].num_steps < answers["static"].num_steps
    steps = max(answer.num_steps for answer in answers.values())
    with Image.open(file) as opened:
        assert opened.n_frames == steps + 2 and opened.info["duration"] == 50
    printed = done.stdout.decode()
    for rule, answer in answers.items():
        assert re.search(rf"^{rule}: .*\b{answer.num_steps} steps", printed, re.MULTILINE)
    same = answers["static"].text == answers["dynamic"].text
    assert ("the two answers are the same" if same else "the two answers differ") in printed
    assert f"{steps + 2} frames" in printed


@pytest.mark.parametrize("form", ["lines", "picture"])
def test_an_autoregressive_checkpoint(autoregressive_folder, tmp_path, form):
    picture = ["--gif", str(tmp_path / "x.gif")] if form == "picture" else []
    done = piped(autoregressive_folder, "3+8?", "--max-tokens", "10", *picture)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.decode()
    if form == "picture":
        steps = int(re.search(r"^autoregressive: .* in (\d+) step", printed, re.MULTILINE)[1])
        with Image.open(tmp_path / "x.gif") as opened:
            assert opened.n_frames == steps + 2
        assert "two answers" not in printed
    else:
        (step_map,) = step_maps(printed)
        assert step_map == list(range(1, len(step_map) + 1)) and "1.00 tokens per forward" in printed


def test_lmdeploy_where_it_cannot_run_is_refused_in_one_line(tiny_folder):
    done = piped(tiny_folder, "3+8?", "--engine", "lmdeploy")
    assert done.returncode == 2 and done.stdout == b""
    error = done.stderr.decode().strip().split("\n")[-1]
    assert error.startswith("error: config key engine: lmdeploy")
