"""Every script once: data, SFT, DiPO, evaluation, launched as a user would, and what the others show.

The others, and second launches, have their imports done (tests/zygote.py).
"""

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

import evaluate
from dipo import DiPOConfig
from evaluate import EvalConfig
from plumbing.common import ROOT, InputError, read_records
from plumbing.config import load_config, setting
from reward import read_questions
from sft import SFTConfig

ENVIRONMENT = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
EVALUATION = {
    "questions", "samples", "accuracy", "pass_at_k", "tpf", "tokens", "truncated",
}  # fmt: skip
SFT_METRICS = {"step", "loss", "entropy", "grad_norm", "train_tokens", "lr", "seconds/train"}
DIPO_METRICS = {
    "step", "lr",
    "reward", "reward_kept", "accuracy", "tpf", "response_tokens", "truncation_rate",
    "groups_kept", "groups_asked", "kept_rate", "rollout_tokens",
    "loss", "entropy", "clip_fraction", "policy_kl", "hold_fraction", "grad_norm",
    "gap_mean", "gap_max", "gap_capped", "gap_holds", "gap_kl", "train_tokens", "gib_given_back",
    "seconds/rollout", "seconds/train", "seconds/update_weights",
}  # fmt: skip
REPORTED = EVALUATION | {  # by evaluate.py alone
    "accuracy_low", "accuracy_high", "pass_at", "maj_at_k", "seconds", "tokens_per_second",
}  # fmt: skip
EVAL_METRICS = {f"eval/{name}" for name in EVALUATION | {"seconds"}}


def launch(*command: str | Path, cwd: Path = ROOT, zygote=None) -> str:
    """Standard output of `python command...`, started in the repository root; in a fork of the zygote."""
    line = [sys.executable, *map(str, command)]
    if zygote:
        done = zygote.run(line, cwd=cwd, env=ENVIRONMENT)
    else:
        done = subprocess.run(line, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stderr}"
    return done.stdout


def records_of(path: Path) -> list[dict]:
    """The records of a JSON Lines file."""
    return [record for _, record in read_records(path)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The tiny task, with few questions."""
    out = tmp_path_factory.mktemp("data")
    options = ["--sft", 32, "--rl", 32, "--validation", 4, "--test", 6]
    printed = launch("data/tiny.py", "--out", out, *options)
    assert "sft.jsonl: 32 rows" in printed
    return out


@pytest.fixture(scope="module")
def sft_run(data, tmp_path_factory) -> Path:
    """A few steps of SFT from the tiny default model, evaluated every second step."""
    out = tmp_path_factory.mktemp("sft") / "run"
    launch(
        "sft.py", f"data={data}/sft.jsonl", f"out={out}", "steps=4", "batch_size=8", "lr=1e-3",
        f"eval_data={data}/validation.jsonl", "eval_every=2", "eval_max_tokens=16",
    )  # fmt: skip
    return out


def test_sft_writes_a_run(sft_run) -> None:
    metrics = records_of(sft_run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    for m in metrics:
        evaluated = EVAL_METRICS | {"seconds/evaluate"} if m["step"] % 2 == 0 else set()
        assert set(m) == SFT_METRICS | evaluated
        assert m["loss"] > 0 and m["grad_norm"] > 0 and m["train_tokens"] > 0
    assert metrics[-1]["loss"] < metrics[0]["loss"], "four steps at lr 1e-3 did not help at all"
    assert os.readlink(sft_run / "latest") == "checkpoints/step-000004"
    present = {file.name for file in (sft_run / "latest").iterdir()}
    assert present >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (sft_run / "config.yaml").exists()


@pytest.mark.parametrize("variant", ["tokens", "exact"])
def test_dipo_goes_on_from_the_sft_run(sft_run, data, tmp_path, zygote, variant) -> None:
    changes = []
    if variant == "exact":
        changes = ["likelihood=exact", "updates=2", "kl_beta=0.1", "normalize_each=true"]
        changes += ["eval_every=1", f"eval_data={data}/validation.jsonl", "eval_max_tokens=16"]
    launch(
        "dipo.py", f"model={sft_run}/latest", f"data={data}/rl.jsonl", f"out={tmp_path}/run",
        "steps=2", "groups=3", "group_size=4", "max_tokens=16", "threshold=0.01", "lr=1e-3",
        "rewards.speed=1.0", *changes, zygote=zygote if variant == "exact" else None,
    )  # fmt: skip
    metrics = records_of(tmp_path / "run" / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2]
    expected = set(DIPO_METRICS)
    if variant == "exact":
        expected |= {"kl", "seconds/evaluate"} | EVAL_METRICS
    for m in metrics:
        assert set(m) == expected
        assert m["gap_max"] < 1e-4, "trainer and engine disagree on a log-probability"
        assert (m["hold_fraction"] > 0) == (variant == "exact"), "only `exact` scores holds"
        assert 1 <= m["tpf"] <= 4 and 0 <= m["accuracy"] <= 1 and 0 < m["kept_rate"] <= 1
        assert m["groups_asked"] >= m["groups_kept"] >= 3 and m["rollout_tokens"] > 0
        if variant == "tokens":
            assert m["policy_kl"] == m["clip_fraction"] == 0, "one update is on-policy"
    if variant == "exact":
        assert metrics[0]["policy_kl"] > 0, "the second update saw a policy that had moved"
        assert metrics[0]["kl"] >= 0
    rollouts = records_of(tmp_path / "run" / "rollouts.jsonl")
    assert len(rollouts) == 2 * 2 and set(rollouts[0]["rewards"]) == {"accuracy", "speed"}
    assert {"question", "gold", "answer", "text", "steps", "advantage", "seed"} <= set(rollouts[0])
    assert (tmp_path / "run" / "latest" / "model.safetensors").exists()


def test_evaluate_writes_summary_responses_and_a_table(sft_run, data, tmp_path) -> None:
    printed = launch(
        "evaluate.py", f"model={sft_run}/latest", f"data={data}/test.jsonl", f"out={tmp_path}",
        "samples=2", "top_k=0", "max_tokens=16", "limit=5",
    )  # fmt: skip
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {"config", "static", "dynamic", "benchmarks"}
    assert summary["config"]["samples"] == 2 and summary["config"]["model"]
    for rule in ("static", "dynamic"):
        figures = summary[rule]
        assert set(figures) == REPORTED and summary["benchmarks"][rule] == {"test": figures}
        assert (figures["questions"], figures["samples"]) == (5, 2)
        responses = records_of(tmp_path / f"responses-test-{rule}.jsonl")
        assert len(responses) == 10
        right = sum(r["correct"] for r in responses) / 10
        assert right == figures["accuracy"] <= figures["pass_at_k"]
        assert len({r["seed"] for r in responses}) == 10, "two answers shared a random stream"
        assert f"| {rule} | 5 | 2 | {100 * right:.1f} %" in printed
    assert "| accuracy | 95 % | pass@k | maj@k | TPF |" in printed
    assert printed.startswith((tmp_path / "table.md").read_text())
    assert summary["static"]["tpf"] == 1.0, "four steps for a block of four"


def test_rollout_prints_a_trajectory_with_its_step_map(sft_run, zygote) -> None:
    printed = launch("rollout.py", sft_run / "latest", "3+8?", zygote=zygote)
    assert re.search(r"^step +1  block +\d+  ", printed, re.MULTILINE)
    step_map = json.loads(re.search(r"^step map: (\[.*\])$", printed, re.MULTILINE)[1])
    assert len(step_map) >= 1 and set(step_map) == set(range(1, max(step_map) + 1))
    assert "tokens per forward" in printed


def test_model_writes_a_tiny_checkpoint(tmp_path, zygote) -> None:
    printed = launch("model.py", tmp_path / "tiny", zygote=zygote)
    assert "parameters" in printed and str(tmp_path / "tiny") in printed
    assert (tmp_path / "tiny" / "model.safetensors").exists()


def test_reward_grades_its_examples(zygote) -> None:
    printed = launch("reward.py", zygote=zygote)
    assert "accuracy +1.00" in printed and "accuracy +0.00" in printed
    assert "correct True: accuracy +1.00 speed +1.00, total +2.00" in printed


# --------------------------------------------------------------------------------- help, and bad input


@pytest.mark.parametrize("config_class", [SFTConfig, DiPOConfig, EvalConfig])
def test_help_shows_the_launch_lines_and_what_every_field_means(config_class) -> None:
    script = f"{config_class.__module__}.py"
    printed = launch(script, "--help")
    assert f"python {script}" in printed and f"torchrun --nproc_per_node 8 {script}" in printed
    assert "seed=0" in printed and "block_size=0" in printed and "\nRollout engine:\n" in printed
    unwrapped = "".join(printed.split())
    for f in fields(config_class):
        assert f"\n  {f.name}=" in printed
        assert f.metadata["meaning"] and "".join(f.metadata["meaning"].split()) in unwrapped, f.name
    assert "tokens per block; 0: config.json's, else by name, else 4" in printed


@pytest.mark.parametrize("script", ["masking", "model", "rollout", "reward"])
def test_help_of_the_others_is_their_docstring_and_writes_nothing(script, tmp_path, zygote) -> None:
    printed = launch(ROOT / f"{script}.py", "--help", cwd=tmp_path, zygote=zygote)
    assert importlib.import_module(script).__doc__.strip() in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "argument", "answer"),
    [
        (script, argument, answer)
        for script in ("sft", "dipo", "evaluate")
        for argument, answer in (
            ("--help", f"{script}.py"),
            ("stepz=3", "stepz"),
            ("max_tokens=0", "max_tokens"),
        )
    ]
    + [
        (script, "data=nowhere.jsonl", "nowhere.jsonl: no such data file")
        for script in ("sft", "dipo", "evaluate")
    ]
    + [
        ("dipo", "rewards.brief=1", "brief"),
        ("dipo", "rewards={no_such.reward: 1}", "no_such.reward"),
    ],
)
def test_what_needs_no_model_is_answered_before_torch_is_imported(script, argument, answer) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", f"{script}.py", argument],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    imports, errors = set(), []
    for line in done.stderr.splitlines():
        if line.startswith("import time:"):
            imports.add(line.rpartition("|")[2].strip())
        else:
            errors.append(line)
    assert "omegaconf" in imports, "or this measures nothing"
    assert not imports & {"torch", "transformers"}
    if argument == "--help":
        assert done.returncode == 0 and answer in done.stdout and not errors
    else:
        assert done.returncode == 2 and done.stdout == ""
        (error,) = errors
        assert error.startswith("error: ") and answer in error


@pytest.mark.parametrize("config_class", [SFTConfig, DiPOConfig])
def test_a_missing_data_file_comes_with_how_to_make_it(config_class) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no .* python data/tiny\.py makes data/generated"):
        load_config(config_class, ["data=nowhere.jsonl"])


@pytest.mark.parametrize("config_class", [SFTConfig, DiPOConfig, evaluate.EvalConfig])
def test_a_missing_checkpoint_is_refused_with_the_config(config_class) -> None:
    """So before anything heavy is imported; what looks like a name of the hub has to wait."""
    data = f"data={__file__}"
    with pytest.raises(InputError, match="no/such/folder: no such checkpoint folder"):
        load_config(config_class, ["model=no/such/folder", data])
    assert load_config(config_class, ["model=JetLM/SDAR-8B-Chat", data]).model == "JetLM/SDAR-8B-Chat"


# ----------------------------------------------------------------------------------- question files


def test_published_formats_are_read(tmp_path) -> None:
    records = {
        "gsm8k": {"question": "How many?", "answer": "16 - 3 = 13 eggs.\n#### 1,318"},
        "math": {"problem": "Half?", "answer": r"\frac{1}{2}", "solution": "..."},
        "olympiad": {"question": "Which?", "final_answer": ["2", "-2"], "answer_type": "Numerical"},
        "ours": {"question": "3+8?", "ground_truth_answer": "11"},
        "number": {"question": "3+8?", "answer": 11},
    }
    golds = ["1,318", r"\frac{1}{2}", "2, -2", "11", "11"]
    (tmp_path / "list.json").write_text(json.dumps(list(records.values()), indent=2))
    lines = "".join(json.dumps(record) + "\n" for record in records.values())
    (tmp_path / "lines.jsonl").write_text(lines + "\n")
    for name in ("list.json", "lines.jsonl"):
        questions = read_questions(str(tmp_path / name))
        assert [q.gold for q in questions] == golds
        assert questions[1].text == "Half?"


@pytest.mark.parametrize("name", ["list.json", "lines.jsonl"])
def test_evaluate_reads_published_formats(sft_run, tmp_path, name, monkeypatch, capsys) -> None:
    records = [
        {"question": "Eggs?", "answer": "16 - 3 = 13, + 5.\n#### 18"},
        {"question": "Roots of x^2=4?", "final_answer": ["2", "-2"]},
    ]
    text = json.dumps(records) if name == "list.json" else "\n".join(map(json.dumps, records))
    (tmp_path / name).write_text(text)
    monkeypatch.chdir(ROOT)
    paths = [f"model={sft_run}/latest", f"data={tmp_path / name}", f"out={tmp_path}/out"]
    evaluate.main(load_config(EvalConfig, [*paths, "max_tokens=8", "rules=[dynamic]"]))
    responses = records_of(tmp_path / "out" / f"responses-{Path(name).stem}-dynamic.jsonl")
    assert [r["gold"] for r in responses] == ["18", "2, -2"]
    assert "| dynamic | 2 | 1 |" in capsys.readouterr().out


@pytest.mark.skipif("NANODIRL_BENCHMARKS" not in os.environ, reason="NANODIRL_BENCHMARKS not set")
def test_evaluate_on_gsm8k(sft_run, tmp_path) -> None:
    data = Path(os.environ["NANODIRL_BENCHMARKS"]) / "gsm8k.jsonl"
    if not data.exists():
        pytest.skip("no gsm8k.jsonl in NANODIRL_BENCHMARKS")
    launch(
        "evaluate.py", f"model={sft_run}/latest", f"data={data}", f"out={tmp_path}",
        "limit=20", "max_tokens=32", "rules=[dynamic]",
    )  # fmt: skip
    figures = json.loads((tmp_path / "summary.json").read_text())["dynamic"]
    assert figures["questions"] == 20
    assert figures["accuracy"] <= 0.1, "a model that cannot read solved word problems"


# -------------------------------------------------------------------------------------- the config


@dataclass
class SmallConfig:
    """Fields of a script that does not exist."""

    steps: int = setting(100, "how long", above=0)
    lr: float = setting(1e-5, "how fast")
    name: str = setting("plain", "how it is called")
    kind: Literal["a", "b"] = setting("a", "which one")
    weights: dict[str, float] = setting({"accuracy": 1.0}, "what counts")
    flag: bool = setting(False, "whether")


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(tmp_path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("steps: 7\nlr: 3e-4\nkind: b\n")
    argv = ["--config", str(file), "steps=9", "weights.speed=0.5", "flag=true", "name=a=b"]
    config = load_config(SmallConfig, argv)
    assert config == SmallConfig(
        steps=9, lr=3e-4, kind="b", weights={"accuracy": 1.0, "speed": 0.5}, flag=True, name="a=b"
    )
    assert isinstance(config.steps, int) and type(config.weights) is dict
    assert load_config(SmallConfig, ["--config", str(file)]).steps == 7
    assert load_config(SmallConfig, []) == SmallConfig()


def test_overrides_may_stand_on_either_side_of_the_file(tmp_path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("steps: 7\n")
    assert load_config(SmallConfig, ["steps=9", "--config", str(file)]).steps == 9


def test_an_empty_config_file_changes_nothing(tmp_path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("# all defaults\n")
    assert load_config(SmallConfig, ["--config", str(file)]) == SmallConfig()


def test_a_default_is_not_shared_between_two_configs() -> None:
    load_config(SmallConfig, []).weights["speed"] = 1.0
    assert load_config(SmallConfig, []).weights == {"accuracy": 1.0}


@pytest.mark.parametrize("override", ["stepz=1", "steps=x", "kind=c", "weights.speed=fast"])
def test_a_bad_override_names_its_key(override) -> None:
    with pytest.raises(InputError, match=re.escape(override.partition("=")[0])):
        load_config(SmallConfig, [override])
