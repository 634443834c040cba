"""What a user gets wrong ends in one line that names the place and code 2, nothing half-written.

Most cases read the arguments and call a script's `main` through `run_script` in this process, which
is what the command line does; a few of each script are processes of their own (tests/zygote.py).
"""

import contextlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import tiny as tiny_task
from safetensors.torch import load_file, save_file

import dipo
import evaluate
import sft
from plumbing.checkpoint import tiny
from plumbing.common import ROOT, run_script
from plumbing.config import load_config, read_arguments

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
DEFAULTS = {  # a run of every script that works, and takes a fraction of a second
    "sft": ["steps=1", "batch_size=2", "max_tokens=256"],
    "dipo": ["steps=1", "groups=1", "group_size=4", "max_tokens=16", "max_rounds=4"]
    + ["rewards.speed=1", "threshold=0.005"],
    "evaluate": ["max_tokens=8", "limit=2"],
}
SCRIPTS = {  # main, and what reads its arguments
    "sft": (sft.main, sft.SFTConfig, None),
    "dipo": (dipo.main, dipo.DiPOConfig, None),
    "evaluate": (evaluate.main, evaluate.EvalConfig, evaluate.PROTOCOLS),
}


class Place:
    """A folder with a good model and good data, and a working command for every script."""

    def __init__(self, folder: Path, good: Path):
        self.folder, self.out = folder, folder / "out"
        self.model, self.sft, self.questions = (
            good / "model",
            good / "sft.jsonl",
            good / "test.jsonl",
        )

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def copy_model(self) -> Path:
        return Path(shutil.copytree(self.model, self.folder / "model"))

    def command(self, script: str, *changes: str) -> list[str]:
        """Arguments of a run that works, except for the changes."""
        data = self.sft if script == "sft" else self.questions
        good = [f"model={self.model}", f"data={data}", f"out={self.out}", *DEFAULTS[script]]
        return good + list(changes)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    tiny(folder / "model", **SMALL)
    options = ["--out", str(folder), "--sft", "8", "--rl", "8", "--validation", "2", "--test", "4"]
    tiny_task.main(options)
    return folder


@pytest.fixture
def place(tmp_path, good) -> Place:
    return Place(tmp_path, good)


def run_here(script: str, argv: list[str]) -> None:
    """A run in this process that has to work."""
    main, config_class, presets = SCRIPTS[script]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        main(load_config(config_class, argv, presets))


def the_error(code: int | None, stderr: str) -> str:
    """The one error line of a run that ended with exit code 2."""
    shown = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", stderr)  # a progress bar moves the cursor
    assert "Traceback" not in shown, shown
    lines = [line for line in re.split(r"[\r\n]+", shown) if line.startswith("error: ")]
    assert len(lines) == 1, f"one line that starts with `error: ` was expected in:\n{shown}"
    assert code == 2, f"exit code {code}: {lines[0]}"
    return lines[0]


def refused(place: Place, script: str, *changes: str) -> str:
    """The error line of a run in this process, which leaves nothing behind that looks finished."""
    stderr, code = io.StringIO(), None
    main, config_class, presets = SCRIPTS[script]
    argv = [f"{script}.py", *place.command(script, *changes)]
    with (
        patch.object(sys, "argv", argv),
        contextlib.redirect_stderr(stderr),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            run_script(main, read_arguments(config_class, presets))
        except SystemExit as exit:
            code = exit.code
    error = the_error(code, stderr.getvalue())
    assert_nothing_half_written(place.out)
    return error


def refused_process(
    zygote, place: Place, script: str, *changes: str, file_limit: int | None = None
) -> tuple[str, subprocess.CompletedProcess]:
    """The same of a process of its own, in which no file may grow beyond `file_limit` bytes."""
    done = zygote.run(
        [sys.executable, f"{script}.py", *place.command(script, *changes)],
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=120,
        limits=[] if file_limit is None else [(resource.RLIMIT_FSIZE, file_limit)],
    )
    return the_error(done.returncode, done.stderr), done


def assert_nothing_half_written(out: Path) -> None:
    for pattern in (".part-*", "*.part", "step-*", "latest", "summary.json", "metrics.jsonl"):
        assert not list(out.rglob(pattern)), f"{pattern} was left behind"


def assert_names(error: str, *wanted: str) -> None:
    for text in wanted:
        assert text in error, f"{text!r} is missing in: {error}"


def test_the_command_that_the_cases_change_works(place) -> None:
    for script in ("sft", "dipo", "evaluate"):
        out = place.folder / script
        run_here(script, place.command(script, f"out={out}"))
        assert (out / ("summary.json" if script == "evaluate" else "latest/state.json")).exists()


# --------------------------------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("script", "override", "wanted"),
    [
        ("sft", "stepz=3", ["stepz"]),  # unknown key
        ("dipo", "group_sise=3", ["group_sise"]),
        ("evaluate", "tempature=1", ["tempature"]),
        ("sft", "model.path=x", ["model"]),  # a key below a plain value
        ("sft", "steps=abc", ["steps", "abc"]),  # wrong type
        ("sft", "steps=1.5", ["steps", "1.5"]),
        ("sft", "lr=fast", ["lr", "fast"]),
        ("sft", "complementary=maybe", ["complementary", "maybe"]),
        ("sft", "steps=null", ["steps"]),
        ("dipo", "rewards=accuracy", ["rewards"]),
        ("dipo", "rewards.accuracy=high", ["rewards", "high"]),
        ("dipo", "rule=foo", ["rule", "foo"]),  # bad choice
        ("dipo", "normalizer=x", ["normalizer", "x"]),
        ("dipo", "likelihood=Tokens", ["likelihood", "Tokens"]),
        ("sft", "schedule=linear", ["schedule", "linear"]),
        ("sft", "dtype=float16", ["dtype", "float16"]),
        ("evaluate", "rules=[static,foo]", ["rules", "foo"]),
        ("evaluate", "dtype=int8", ["dtype", "int8"]),
        ("sft", "steps", ["steps", "key=value"]),  # no `=`
        ("evaluate", "rules=[static", ["rules=[static"]),  # YAML that does not close
        ("sft", "steps=-1", ["steps"]),  # negative, zero, out of range
        ("sft", "steps=0", ["steps"]),
        ("sft", "lr=-1e-5", ["lr"]),
        ("sft", "lr=nan", ["lr"]),
        ("sft", "weight_decay=-1", ["weight_decay"]),
        ("sft", "adam_beta1=1", ["adam_beta1"]),
        ("sft", "adam_beta2=1.5", ["adam_beta2"]),
        ("sft", "batch_size=0", ["batch_size"]),
        ("sft", "t_min=0.5", ["t_min"]),
        ("sft", "t_max=1.1", ["t_max"]),
        ("sft", "t_max=0.01", ["t_max", "t_min"]),
        ("sft", "block_size=-4", ["block_size"]),
        ("dipo", "threshold=-0.1", ["threshold"]),
        ("dipo", "threshold=1.1", ["threshold", "at most 1"]),
        ("dipo", "top_p=0", ["top_p"]),
        ("dipo", "top_p=1.5", ["top_p", "at most 1"]),
        ("dipo", "max_tokens=1000", ["max_tokens is 1000", "128 positions"]),
        ("dipo", "temperature=0", ["temperature"]),
        ("dipo", "denoising_steps=0", ["denoising_steps"]),
        ("dipo", "max_rounds=0", ["max_rounds"]),
        ("dipo", "updates=0", ["updates"]),
        ("evaluate", "samples=0", ["samples"]),
        ("evaluate", "max_tokens=0", ["max_tokens"]),
        ("evaluate", "denoising_steps=0", ["denoising_steps"]),
        ("evaluate", "temperature=0", ["temperature"]),
        ("evaluate", "temperature=-1", ["temperature"]),
        ("evaluate", "limit=-1", ["limit"]),
        ("evaluate", "top_k=-1", ["top_k"]),
        ("evaluate", "top_p=-0.5", ["top_p"]),
        ("evaluate", "rules=[]", ["rules"]),
        ("evaluate", "min_tokens=-1", ["min_tokens"]),
        ("evaluate", "min_tokens=9", ["min_tokens", "9", "max_tokens"]),
        ("evaluate", "banned=[nothing]", ["banned", "nothing"]),
        ("evaluate", "protocol=dirl", ["min_tokens", "128"]),  # max_tokens=8 wins over the protocol's
        ("evaluate", "protocol=best", ["protocol", "best"]),
        ("evaluate", "sweep=[0.5,-1]", ["sweep"]),
        ("evaluate", "sweep=0.5", ["sweep"]),
        ("evaluate", "data=olympiadbench", ["data/hub/olympiadbench.jsonl", "data/download.py"]),
        ("dipo", "rewards.briefness=1", ["rewards", "briefness", "accuracy, speed"]),  # unknown reward
        ("dipo", "group_size=1", ["group_size", "at least 2"]),
        ("sft", "eval_every=1", ["eval_data"]),
        ("sft", "block_size=8", ["block_size", "8", "4"]),  # the checkpoint has 4
        ("dipo", "block_size=8", ["block_size", "8", "4"]),
        ("evaluate", "block_size=8", ["block_size", "8", "4"]),
    ],
)
def test_an_override_is_refused_by_its_key(place, script, override, wanted) -> None:
    assert_names(refused(place, script, override), *wanted)


def test_noise_levels_of_pairs_are_symmetric(place) -> None:
    assert_names(refused(place, "sft", "complementary=true", "views=2", "t_max=0.9"), "t_max", "pairs")


def test_an_exact_likelihood_is_of_what_was_sampled(place) -> None:
    assert_names(refused(place, "dipo", "likelihood=exact", "train_on=softmax"), "train_on", "exact")


def test_odd_views_cannot_be_complementary(place) -> None:
    assert_names(refused(place, "sft", "complementary=true", "views=3"), "views", "even")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("step: 3\n", ["step"]),  # misspelt
        ("steps: many\n", ["steps", "many"]),
        ("steps: [1\nlr: 2\n", ["bad.yaml"]),
        ("- steps\n- lr\n", ["bad.yaml"]),
        ("just text\n", ["just text"]),
        (b"prompt: \xff\xfe\n", ["bad.yaml"]),
    ],
)
def test_a_config_file_is_refused(place, content, wanted) -> None:
    file = place.write("bad.yaml", content)
    assert_names(refused(place, "sft", "--config", str(file)), *wanted)


def test_a_missing_config_file_is_named(place) -> None:
    assert_names(refused(place, "dipo", "--config", "nowhere.yaml"), "nowhere.yaml")


@pytest.mark.parametrize("arguments", [["--stepz", "3"], ["--config"]])
def test_a_bad_option_is_refused_in_one_line(place, arguments) -> None:
    assert_names(refused(place, "sft", *arguments), arguments[0])


@pytest.mark.parametrize("seed", [20240607, 2**62])
def test_a_large_seed_is_no_bad_input(place, seed) -> None:
    run_here("dipo", place.command("dipo", f"seed={seed}"))


# ----------------------------------------------------------------------------------------- the data

QUESTION = '{"question": "3+8?", "ground_truth_answer": "11"}\n'
CHAT = json.dumps({"messages": [{"role": "user", "content": "3"}, {"role": "assistant", "content": "4"}]})


@pytest.mark.parametrize("script", ["sft", "dipo", "evaluate"])
@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("", ["bad.jsonl", "no rows"]),
        ("\n \n", ["bad.jsonl", "no rows"]),
        ("[]", ["bad.jsonl", "no rows"]),
        (QUESTION + '{"question": "3+\n', ["bad.jsonl:"]),  # which line: below
        ("[1, 2\n,,]", ["bad.jsonl:2", "JSON"]),
        ("[[1]]", ["bad.jsonl: row 1", "object"]),
        ('"text"\n', ["bad.jsonl:1", "object"]),
        ("3\n", ["bad.jsonl:1", "object"]),
        (QUESTION.encode("utf-16"), ["bad.jsonl", "UTF-8"]),
        (b'{"question": "\xff"}\n', ["bad.jsonl", "UTF-8"]),
        ("[" * 100_000, ["bad.jsonl", "JSON"]),  # deeper than the parser goes
        ("9" * 5_000 + "\n", ["bad.jsonl:1"]),  # more digits than Python converts
    ],
    ids=["empty", "blank", "no-records", "half-a-line", "half-a-list", "list", "text",
         "number", "utf-16", "not-utf-8", "deep", "digits"],
)  # fmt: skip
def test_an_unreadable_data_file_is_named(place, script, content, wanted) -> None:
    file = place.write("bad.jsonl", content)
    assert_names(refused(place, script, f"data={file}"), *wanted)


@pytest.mark.parametrize("script", ["sft", "dipo", "evaluate"])
def test_a_missing_data_file_is_named(place, script) -> None:
    assert_names(refused(place, script, "data=nowhere.jsonl"), "nowhere.jsonl")


@pytest.mark.parametrize("script", ["dipo", "evaluate"])
@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ('{"question": "3+8?"', ["JSON"]),
        ('{"question": "3+8?"}', ["answer"]),
        ('{"question": "3+8?", "answer": null}', ["answer"]),
        ('{"question": "3+8?", "answer": ""}', ["answer"]),
        ('{"question": "3+8?", "answer": {"value": 11}}', ["answer"]),
        ('{"question": "3+8?", "answer": "so it is #### "}', ["answer"]),
        ('{"ground_truth_answer": "11"}', ["question"]),
        ('{"question": " ", "answer": "11"}', ["question"]),
        ('{"question": 3, "answer": "11"}', ["question"]),
        ('{"question": "\\ud800?", "answer": "11"}', []),  # half a character
    ],
)
def test_a_bad_question_is_named_by_its_line(place, script, record, wanted) -> None:
    file = place.write("bad.jsonl", QUESTION + record + "\n" + QUESTION)
    assert_names(refused(place, script, f"data={file}"), "bad.jsonl:2", *wanted)


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (CHAT[:-3], ["JSON"]),
        (QUESTION.strip(), ["messages", "prompt"]),  # a format, but another one
        ('{"messages": []}', ["messages"]),
        ('{"messages": "3+8?"}', ["messages"]),
        ('{"messages": [{"role": "user", "content": "3"}]}', ["messages"]),
        ('{"messages": [{"role": "assistant", "content": "3"}]}', ["messages"]),
        ('{"messages": ["3", {"role": "assistant", "content": "4"}]}', []),
        ('{"messages": [{"text": "3"}, {"role": "assistant", "content": "4"}]}', []),
        ('{"prompt": "3+8?", "response": ""}', ["response"]),
        ('{"prompt": "3+8?", "response": 11}', ["response"]),
        ('{"prompt": "", "response": "11"}', ["prompt"]),
        (CHAT.replace('"4"', '" "'), ["response"]),
        (CHAT.replace('"3"', '"\\ud800"'), []),
        (CHAT.replace('"3"', '"' + "3" * 300 + '"'), ["max_tokens", "128"]),  # too long
    ],
)
def test_a_bad_training_record_is_named_by_its_line(place, record, wanted) -> None:
    file = place.write("bad.jsonl", CHAT + "\n" + record + "\n" + CHAT + "\n")
    assert_names(refused(place, "sft", f"data={file}"), "bad.jsonl:2", *wanted)


@pytest.mark.parametrize("script", ["dipo", "evaluate"])
def test_a_prompt_longer_than_the_model_s_positions(place, script) -> None:
    record = {"question": "3+" * 70 + "8?", "ground_truth_answer": "11"}
    file = place.write("long.jsonl", json.dumps(record))
    assert_names(refused(place, script, f"data={file}"), "prompt", "128 positions")


def test_a_broken_evaluation_file_stops_a_run_before_its_first_step(place) -> None:
    file = place.write("bad.jsonl", QUESTION + "{}\n")
    for script in ("sft", "dipo"):
        error = refused(place, script, "eval_every=1", f"eval_data={file}")
        assert_names(error, "bad.jsonl:2", "question")


def test_no_useful_group_within_the_bound(place) -> None:
    error = refused(place, "dipo", "threshold=0.999", "max_rounds=2")  # one token a step, all wrong
    assert_names(error, place.questions.name, "no useful group", "2 rounds")


# ----------------------------------------------------------------------------------- the checkpoint


def edit_json(file: Path, **changes) -> None:
    content = json.loads(file.read_text())
    content |= changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def reshape_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:7].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def drop_mask_token(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = folder / name
        file.write_text(file.read_text().replace("<|MASK|>", "<|other|>"))
    edit_json(folder / "tokenizer_config.json", mask_token=None)


def drop_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def drop_template(folder: Path) -> None:
    for file in folder.glob("*.jinja"):
        file.unlink()
    edit_json(folder / "tokenizer_config.json", chat_template=None)


@pytest.mark.parametrize("script", ["sft", "evaluate"])
@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (shutil.rmtree, ["model", "no such checkpoint folder"]),
        (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json"]),
        (lambda folder: (folder / "model.safetensors").unlink(), ["model", "no weights"]),
        (lambda folder: os.truncate(folder / "model.safetensors", 50_000), ["model", "weights"]),
        (lambda folder: os.truncate(folder / "model.safetensors", 4), ["model", "weights"]),
        (drop_tensor, ["model", "missing", "model.layers.1.mlp.up_proj.weight"]),
        (reshape_tensor, ["model", "model.norm.weight"]),
        (lambda f: edit_json(f / "config.json", model_type="qwen3"), ["config.json", "qwen3"]),
        (lambda f: edit_json(f / "config.json", model_type="no-such"), ["config.json", "no-such"]),
        (lambda f: edit_json(f / "config.json", model_type=None), ["config.json"]),
        (drop_mask_token, ["mask token"]),
        (drop_tokenizer, ["tokenizer"]),
        (drop_template, ["chat template"]),
    ],
    ids=["folder", "config", "half-config", "weights", "half-weights", "four-bytes", "tensor",
         "shape", "qwen3", "unknown-type", "no-type", "mask-token", "tokenizer", "template"],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named(place, script, damage, wanted) -> None:
    folder = place.copy_model()
    damage(folder)
    assert_names(refused(place, script, f"model={folder}"), str(folder), *wanted)


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (lambda f: (f / "state.json").unlink(), ["state.json"]),
        (lambda f: (f / "state.json").write_text('{"step": '), ["state.json"]),
        (lambda f: (f / "state.json").write_text('{"step": 1}'), ["state.json"]),
        (lambda f: (f / "optimizer.safetensors").unlink(), ["optimizer.safetensors"]),
        (lambda f: os.truncate(f / "optimizer.safetensors", 999), ["optimizer.safetensors"]),
        (lambda f: save_file({}, f / "optimizer.safetensors"), ["optimizer.safetensors"]),
    ],
    ids=["state", "half-state", "state-keys", "optimizer", "half-optimizer", "optimizer-keys"],
)
def test_a_run_whose_checkpoint_is_damaged_cannot_be_resumed(place, damage, wanted) -> None:
    other = Place(place.folder, place.model.parent)
    other.out = place.folder / "done"
    run_here("sft", other.command("sft"))
    damage(other.out / "checkpoints" / "step-000001")
    error = refused(place, "sft", f"out={other.out}", "resume=true", "steps=2")
    assert_names(error, "step-000001", *wanted)
    assert "cannot write" not in error, error


# ----------------------------------------------------------------------------------- the run folder


def test_a_run_is_not_overwritten(place, zygote) -> None:
    run_here("sft", place.command("sft"))
    before = {f: f.read_bytes() for f in place.out.rglob("*") if f.is_file()}
    error, _ = refused_process(zygote, place, "sft")
    assert_names(error, str(place.out), "resume=true")
    assert before == {f: f.read_bytes() for f in place.out.rglob("*") if f.is_file()}


@pytest.mark.parametrize("script", ["sft", "dipo", "evaluate"])
def test_an_out_that_is_a_file_is_named(place, script) -> None:
    file = place.write("a-file", "kept")
    assert_names(refused(place, script, f"out={file}"), str(file))
    assert file.read_text() == "kept"


@pytest.mark.parametrize(
    ("script", "limit", "changes", "name"),
    [
        ("sft", 100, [], "run.json"),
        ("sft", 4_000, ["steps=100"], "metrics.jsonl"),
        ("sft", 50_000, [], "model.safetensors"),
        ("sft", 250_000, [], "optimizer.safetensors"),
        ("sft", 50_000, ["model=tiny"], "tiny"),
        ("dipo", 50_000, [], "model.safetensors"),
        ("evaluate", 100, [], "config.json"),
        ("evaluate", 3_000, ["limit=4", "max_tokens=64"], "responses-test-static.rank0.jsonl"),
    ],
)
def test_a_full_disk_names_the_file(place, zygote, script, limit, changes, name) -> None:
    # A file that may not grow stands for the full disk: the same call fails at the same place.
    error, _ = refused_process(zygote, place, script, *changes, file_limit=limit)
    assert_no_finished_checkpoint(place.out)
    assert_names(error, name)


def assert_no_finished_checkpoint(out: Path) -> None:
    for finished in ("checkpoints/step-*", "latest", "tiny", "summary.json"):
        assert not list(out.glob(finished)), f"{finished} appeared though it could not be written"


# ---------------------------------------------------------------------------------- whole processes


@pytest.mark.parametrize(
    ("script", "change", "wanted"),
    [
        ("sft", "stepz=3", ["stepz"]),
        ("sft", "data=nowhere.jsonl", ["nowhere.jsonl"]),
        ("dipo", "rule=foo", ["rule", "foo"]),
        ("dipo", "threshold=0.999", ["no useful group"]),
        ("evaluate", "model=no/such/folder", ["no/such/folder"]),
        ("evaluate", "rules", ["rules", "key=value"]),
    ],
)
def test_a_process_ends_with_one_line_and_code_2(place, zygote, script, change, wanted) -> None:
    error, done = refused_process(zygote, place, script, change)
    assert_names(error, *wanted)
    assert done.stdout == "", "an error belongs to stderr"
    assert_nothing_half_written(place.out)


@pytest.mark.parametrize("arguments", [[], ["no/such/folder", "3+8?"]])
def test_rollout_refuses_in_one_line(zygote, arguments) -> None:
    command = [sys.executable, "rollout.py", *arguments]
    done = zygote.run(command, cwd=ROOT, env=ENVIRONMENT)
    error = the_error(done.returncode, done.stderr)
    assert_names(error, *(arguments[:1] or ["checkpoint"]))
