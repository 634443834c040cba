"""The card of a checkpoint: what it says is so, its lines run, and nothing in it can break it."""

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import TINY
from faults import ENVIRONMENT, arguments, install, make_good, run_here, snapshot, the_error, told, works
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects

from evaluate import EvalConfig
from model import load
from plumbing import card
from plumbing.card import BASE_CARD, BEGIN, END, Card, add_evaluations, code, origin, split
from plumbing.checkpoint import encode_prompt, load_tokenizer, read_copied, stop_ids, tiny
from plumbing.common import ROOT, InputError
from plumbing.config import load_config
from plumbing.identity import identity
from rollout import Decoding, TorchEngine
from sft import SFTConfig

HUB_CARD = "---\nlicense: apache-2.0\nbase_model: Qwen/Qwen3-8B-Base\n---\n\n# SDAR\n\nIts own words.\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_good(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def hub(good, tmp_path_factory):
    """The model as it lies in the hub's cache, with its card, licence and code."""
    folder = tmp_path_factory.mktemp("cache") / "models--JetLM--SDAR-8B-Chat/snapshots/0123abc"
    shutil.copytree(good / "model", folder)
    (folder / "README.md").write_text(HUB_CARD)
    (folder / "LICENSE").write_text("Apache\n")
    (folder / "modeling_sdar.py").write_text("raise SystemExit('run')\n")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    return folder


def trained(script: str, good: Path, out: Path, *more: str) -> tuple[dict, str]:
    """(front matter, the rest) of the card of a run's newest checkpoint."""
    works(script, arguments(good, script, out, *more))
    return split((out / "latest/README.md").read_text())


def row(body: str, name: str) -> str:
    """The second cell of the table row with this first one."""
    (found,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", body, re.MULTILINE)
    return found


# ---------------------------------------------------------------------------------- what it says


def test_what_it_came_from_is_said_and_passed_on(good, hub, tmp_path):
    """From the hub by SFT by DiPO: base model and licence stay, the stages add up."""
    front, body = trained("sft", good, tmp_path / "first", f"model={hub}", "steps=3")
    assert front["base_model"] == "JetLM/SDAR-8B-Chat" and front["license"] == "apache-2.0"
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    assert {"block-diffusion", "sft"} <= set(front["tags"]) and "datasets" not in front
    assert "# `SDAR-8B-Chat` after SFT, step 3\n" in body
    assert row(body, "began with") == "`JetLM/SDAR-8B-Chat`" and row(body, "licence") == "`apache-2.0`"
    assert row(body, "steps") == "3 of sft.py" and row(body, "`lr`") == "`0.001`"
    assert "`steps`" not in body and "`out`" not in body and str(tmp_path) not in body

    first = tmp_path / "first/latest"
    front, body = trained("dipo", good, tmp_path / "second", f"model={first}", "steps=2")
    assert front["base_model"] == "JetLM/SDAR-8B-Chat" and front["license"] == "apache-2.0"
    assert "# `SDAR-8B-Chat` after DiPO, step 2\n" in body
    assert row(body, "began with") == "`first, step-000003`"
    assert row(body, "made by") == "`sft.py on sft.jsonl, 3 steps`"
    assert row(body, "`rewards`") == "`{accuracy: 1.0, speed: 1.0}`"
    third = origin(str(tmp_path / "second/latest"), (tmp_path / "second/latest").resolve())
    assert third["stages"] == ["sft.py on sft.jsonl, 3 steps", "dipo.py on rl.jsonl, 2 steps"]

    # The hub's own client reads it.
    found = ModelCard.load(tmp_path / "second/latest/README.md").data
    assert (found.base_model, found.license, found.library_name) == (
        "JetLM/SDAR-8B-Chat", "apache-2.0", "transformers",
    )  # fmt: skip


def test_the_originals_card_and_licence_stay_beside_ours(good, hub, tmp_path):
    trained("sft", good, tmp_path / "first", f"model={hub}", "steps=1")
    trained("sft", good, tmp_path / "second", f"model={tmp_path}/first/latest", "steps=1")
    for run in ("first", "second"):
        folder = tmp_path / run / "latest"
        assert (folder / BASE_CARD).read_text() == HUB_CARD
        assert (folder / "LICENSE").read_text() == "Apache\n"
        assert card.OURS in (folder / "README.md").read_text()
    assert read_copied(tmp_path / "second/latest").keys() == read_copied(hub).keys()


def test_figures_of_the_last_step_and_of_the_evaluation(good, tmp_path):
    evaluation = ["eval_every=2", f"eval_data={good}/test.jsonl", "eval_max_tokens=8", "eval_limit=3"]
    _, body = trained("sft", good, tmp_path / "run", *evaluation, "save_every=1", "keep_checkpoints=9")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert row(body, "loss") == f"{lines[-1]['loss']:.4g}" and "## Step 5" in body
    text = "While training, after step 4: the first 3 questions of `test.jsonl`, one greedy response each "
    text += "(top-k 1), dynamic decoding at threshold 0.9, at most 8 new tokens, prompt `{question}`, graded"
    _, body = split((tmp_path / "run/checkpoints/step-000004/README.md").read_text())
    assert text in body
    figures = [lines[3][f"eval/{name}"] for name in card.FIGURES]
    assert f"| {' | '.join(map(card.number, figures))} |" in body
    _, body = split((tmp_path / "run/checkpoints/step-000001/README.md").read_text())
    assert "Nothing was evaluated while training." in body


def test_a_data_set_of_the_hub_is_named_if_the_file_is_still_it(good, tmp_path):
    """By the manifest that data/download.py writes."""
    shutil.copy(good / "sft.jsonl", tmp_path / "own.jsonl")
    checksum = identity(load_config(SFTConfig, [f"data={good}/sft.jsonl"]))["data"]["sha256"]
    entry = {"repo": "Auraithm/Light", "revision": "0", "upstream": {}, "local": {"own.jsonl": checksum}}
    (tmp_path / "manifest.json").write_text(json.dumps({"own": entry}))
    front, body = trained("sft", good, tmp_path / "one", f"data={tmp_path}/own.jsonl", "steps=1")
    assert front["datasets"] == ["Auraithm/Light"] and "from the data set `Auraithm/Light`" in body
    with open(tmp_path / "own.jsonl", "a") as file:
        file.write((good / "sft.jsonl").read_text().splitlines()[0] + "\n")
    front, body = trained("sft", good, tmp_path / "two", f"data={tmp_path}/own.jsonl", "steps=1")
    assert "datasets" not in front and "Auraithm" not in body


@pytest.mark.parametrize(
    ("name", "folder", "expected"),
    [
        ("JetLM/SDAR-8B-Chat", "/c/models--JetLM--SDAR-8B-Chat/snapshots/1", "JetLM/SDAR-8B-Chat"),
        ("x", "/c/models--Some-One--a.b/snapshots/1", "Some-One/a.b"),
        ("/home/me/SDAR-8B-Chat", "/home/me/SDAR-8B-Chat", ""),
        ("/home/me/a:b*c", "/home/me/a:b*c", ""),
    ],
)
def test_the_id_on_the_hub(name, folder, expected):
    assert card.hub_id(name, Path(folder)) == expected


def test_adapters_are_described_as_what_they_are(good, tmp_path):
    pytest.importorskip("peft")
    _, body = trained("sft", good, tmp_path / "run", "lora_rank=2", "steps=1")
    assert row(body, "trained") == "LoRA adapters of rank 2"
    assert "with the adapters' products added" in body and "`adapters.safetensors`" in body
    _, body = trained("sft", good, tmp_path / "all", "steps=1")
    assert "adapters.safetensors" not in body and row(body, "trained") == "all weights"


# ------------------------------------------------------------------------------ the same, always


@pytest.mark.parametrize("script", ["sft", "dipo"])
def test_a_resumed_run_writes_the_same_bytes(script, good, hub, tmp_path):
    """Though the model that it began with is gone, and the data have another name."""
    model, moved = tmp_path / "models--JetLM--SDAR-8B-Chat/snapshots/1", tmp_path / "data.jsonl"
    more = ["eval_every=2", f"eval_data={good}/test.jsonl", "eval_max_tokens=8", f"model={model}"]
    shutil.copytree(hub, model)
    data = good / ("sft.jsonl" if script == "sft" else "rl.jsonl")
    shutil.copy(data, moved)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    keep = ["save_every=1", "keep_checkpoints=9"]
    trained(script, good, whole, *more, *keep, "steps=4")
    trained(script, good, parts, *more, *keep, "steps=2")
    shutil.rmtree(model)
    trained(script, good, parts, *more, *keep, "steps=4", "resume=true", f"data={moved}")
    for step in (1, 2, 3, 4):
        one, other = (run / f"checkpoints/step-00000{step}/README.md" for run in (whole, parts))
        assert one.read_bytes() == other.read_bytes()
    assert "after step 2:" in (parts / "checkpoints/step-000003/README.md").read_text()


def test_two_ranks_write_one(good, tmp_path, zygote):
    argv = arguments(good, "sft", tmp_path / "two", "steps=2")
    done = zygote.torchrun(2, [sys.executable, "sft.py", *argv], cwd=ROOT, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 0, done.stderr
    _, expected = trained("sft", good, tmp_path / "one", "steps=2")
    _, found = split((tmp_path / "two/latest/README.md").read_text())
    table = re.compile(r"## Step 2\n.*?\n## ", re.DOTALL)  # sums over ranks round otherwise
    assert table.sub("", found) == table.sub("", expected)


def test_another_run_by_force_is_said(good, tmp_path):
    trained("sft", good, tmp_path / "run", "steps=1")
    _, body = trained("sft", good, tmp_path / "run", "steps=2", "resume=force", "lr=2e-3")
    assert row(body, "forced") == "after step 1 it went on as another run (resume=force)"
    assert row(body, "`lr`") == "`0.002`"
    shutil.copy(good / "rl.jsonl", tmp_path / "none.jsonl")
    lines = (good / "sft.jsonl").read_text().splitlines()[1:]
    (tmp_path / "less.jsonl").write_text("\n".join(lines))
    _, body = trained("sft", good, tmp_path / "run", "steps=3", "resume=force", f"data={tmp_path}/less.jsonl")
    assert row(body, "data").startswith("`less.jsonl`"), "not what the checkpoint before says"


@pytest.mark.parametrize("times", [1, 9])
def test_a_card_that_cannot_be_written_is_a_checkpoint_that_cannot(times, good, tmp_path, monkeypatch):
    """As with every other file: tried again, then elsewhere; nothing incomplete is left."""
    write, calls, out = Path.write_bytes, [0], tmp_path / "out"

    def failing(path: Path, content: bytes) -> int:
        if path.name == "README.md" and out in path.parents:
            calls[0] += 1
            if calls[0] <= times:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, content)

    install(f"at_once,spare:{tmp_path}/spare", monkeypatch.setattr)
    monkeypatch.setattr(Path, "write_bytes", failing)
    exit_code, stderr = run_here("sft", arguments(good, "sft", out, "steps=2"))
    lines = told(stderr)
    assert "README.md" in lines[0] and "No space left" in lines[0] and "trying again" in lines[0]
    if times == 1:
        assert exit_code == 0 and (out / "latest/README.md").exists()
    else:
        assert f"step 2 is in {tmp_path}/spare/step-000002" in the_error(exit_code, stderr)
        assert (tmp_path / "spare/step-000002/README.md").exists() and not list(out.rglob("step-*"))
    assert not list(tmp_path.rglob(".part-*"))


# --------------------------------------------------------------------------------------- its lines


def blocks(body: str, language: str = "") -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
    return [text for kind, text in found if kind == language]


def run_snippet(script: str, folder: Path, environment: dict[str, str], seconds: float):
    """A script in a process of its own, which has to end well."""
    (folder / "script.py").write_text(script)
    command = [sys.executable, "script.py"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_the_lines_for_transformers_decode_as_we_do(kind, tmp_path, monkeypatch):
    """In a process that has nothing of this repository; without running code of the checkpoint."""
    moe = {"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"], "num_experts": 4}
    moe |= {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
    moe |= {"mlp_only_layers": [], "norm_topk_prob": True}
    changes = TINY | (moe if kind == "moe" else {}) | {"block_size": 8}
    changes |= {"auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"}}
    folder = tiny(tmp_path / "model", **changes)
    (folder / "modeling_sdar.py").write_text("raise SystemExit('run')\n")
    lines = "\n".join(card.usage(read_copied(folder)))
    (snippet,) = blocks(lines, "python")
    script = snippet.replace("FOLDER", str(folder)).replace("256", "40").replace("0.9", "0.3")
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONPATH"}
    done = run_snippet(script + "print(ids[prompt:])\n", tmp_path, environment, seconds=120)
    tokenizer = load_tokenizer(folder)
    engine = TorchEngine(load(folder), 8, tokenizer.mask_token_id, stop_ids(tokenizer))
    prompt = encode_prompt(tokenizer, "What is 12 * 7?")
    (expected,) = engine.generate([prompt], [0], Decoding(top_k=1, threshold=0.3, max_tokens=40))
    ids = json.loads(done.stdout.splitlines()[-1])
    assert ids == expected.response_ids and 1 < expected.num_steps < len(ids)
    assert "MISSING" not in done.stderr and "trust_remote_code=True" in lines
    assert f"`modeling_sdar.py`). nanodirl never runs it" in lines  # noqa: F541


def test_the_lines_for_lmdeploy_run_and_decode_as_we_do(tmp_path):
    """On LMDeploy's own scheduler and sampling; lmdeploy_on_cpu.py says what is stood in for."""
    pytest.importorskip("lmdeploy", reason="pip install --no-deps -r requirements-lmdeploy.txt")
    folder = tiny(tmp_path / "model", **TINY, vocab_size=151_680, mask_token_id=151_669)
    (snippet,) = (b for b in blocks("\n".join(card.usage(read_copied(folder))), "python") if "lmdeploy" in b)
    script = snippet.replace("FOLDER", str(folder)).replace("max_new_tokens=512", "max_new_tokens=16")
    script = script.replace('dtype="bfloat16"', 'dtype="float32"').replace(").text)", ").token_ids)")
    first = "import os\nos.environ['LMDEPLOY_ENABLE_CHECK_ENV'] = '0'\n"
    first += "import lmdeploy_on_cpu\nlmdeploy_on_cpu.install()\n"
    done = run_snippet(
        first + script, tmp_path, ENVIRONMENT | {"PYTHONPATH": str(ROOT / "tests")}, seconds=300
    )
    found = json.loads(done.stdout.splitlines()[-1])
    tokenizer = load_tokenizer(folder)
    engine = TorchEngine(load(folder), 4, 151_669, stop_ids(tokenizer))
    prompt = encode_prompt(tokenizer, "What is 12 * 7?")
    (expected,) = engine.generate([prompt], [0], Decoding(top_k=1, threshold=0.9, max_tokens=16))
    assert found == expected.response_ids[: len(found)] and len(found) >= 8


def test_without_the_mask_of_lmdeploy_its_lines_are_left_out(good):
    lines = "\n".join(card.usage(read_copied(good / "model")))
    assert "takes token 151669" in lines and "here it is token 259" in lines
    assert "PytorchEngineConfig" not in lines and "no code for it is in this folder" in lines


def test_the_mask_token_is_found(good):
    copied = read_copied(good / "model")
    config = json.loads(copied["config.json"])
    config.pop("mask_token_id")
    copied["config.json"] = json.dumps(config).encode()
    assert card.mask_token(copied) == 259, "from tokenizer.json"
    decoder = {"151668": {"content": "</think>"}, "151669": {"content": "<|MASK|>"}}
    settings = json.dumps({"added_tokens_decoder": decoder}).encode()
    assert card.mask_token({"tokenizer_config.json": settings}) == 151669
    assert card.mask_token({}) is None


def test_the_commands_of_this_repository_take_their_arguments(good, tmp_path, zygote):
    _, body = trained("sft", good, tmp_path / "run", "steps=1")
    commands = [shlex.split(c, comments=True) for b in blocks(body) for c in b.splitlines()]
    (show,) = [c for c in commands if c[:2] == ["python", "rollout.py"]]
    show = [word.replace("FOLDER", str(tmp_path / "run/latest")) for word in show[1:]]
    done = zygote.run([sys.executable, *show], cwd=ROOT, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 0 and "step map" in done.stdout, done.stderr
    for script in ("evaluate.py", "dipo.py", "plumbing/card.py"):
        assert [c for c in commands if c[:2] == ["python", script]] and (ROOT / script).is_file()


def test_what_is_published_is_what_others_need(good, hub, tmp_path):
    _, body = trained("sft", good, tmp_path / "run", f"model={hub}", "steps=1")
    (command,) = [shlex.split(b) for b in blocks(body) if b.startswith("hf ")]
    assert command[:4] == ["hf", "upload", "OWNER/NAME", "FOLDER"]
    patterns = command[5::2]
    assert command[4::2] == ["--exclude"] * len(patterns)
    names = {f.name for f in (tmp_path / "run/latest").iterdir()} | {"optimizer-00001-of-00002.safetensors"}
    left = set(filter_repo_objects(sorted(names | {"adapters.safetensors"}), ignore_patterns=patterns))
    assert left == set(read_copied(hub)) | {"model.safetensors", "README.md"}
    help_text = subprocess.run(
        [Path(sys.executable).with_name("hf"), "upload", "--help"], capture_output=True, text=True
    ).stdout
    assert "--exclude" in help_text


# ------------------------------------------------------------------------------------- hostile texts

NASTY = "a`b``c|d\n# <script>alert(1)</script> [x](http://y) --- 'q' \"r\" \x1b[31m ￼{question}"


@pytest.mark.parametrize(
    "text", [NASTY, "`", "``", " ", "", "|", "\\|", "<!-- evaluations: begin -->", "a\tb"]
)
def test_a_code_span_holds_anything(text):
    markdown = pytest.importorskip("markdown_it", reason="pip install markdown-it-py")
    html = markdown.MarkdownIt().enable("table").render(f"| h | i |\n| - | - |\n| {code(text)} | end |\n")
    assert html.count("<td>") == 2 and "<script" not in html and "<a " not in html and "<!--" not in html
    assert html.count("<code>") == 1 and "<td>end</td>" in html and "\x1b" not in html
    assert BEGIN not in code(text)


def test_hostile_names_and_prompts_break_nothing(good, tmp_path):
    markdown = pytest.importorskip("markdown_it", reason="pip install markdown-it-py")
    model = tmp_path / "m`|<img src=x> --- # [a](b)"
    shutil.copytree(good / "model", model)
    licence = {"license": "x: [y]\n---\n<script>`|", "license_name": ["<b>", "|"]}
    (model / "README.md").write_text(f"---\n{yaml.safe_dump(licence)}---\n")
    data = tmp_path / "d`|<img src=x>.jsonl"
    shutil.copy(good / "sft.jsonl", data)
    evaluation = ["eval_every=1", f"eval_data={good}/test.jsonl", "eval_max_tokens=8"]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"model": str(model), "data": str(data), "prompt": NASTY, "steps": 1}))
    argv = [a for a in arguments(good, "sft", tmp_path / "run", *evaluation) if a.split("=")[0] not in
            ("model", "data", "steps")]  # fmt: skip
    works("sft", ["--config", str(file), *argv])
    front, body = split((tmp_path / "run/latest/README.md").read_text())
    assert front["license"] == licence["license"] and front["license_name"] == ["<b>", "|"]
    html = markdown.MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    assert not re.search(r"<(script|img|b)\b", html) and 'href="b"' not in html
    assert len(re.findall("<h1>", html)) == 1 and "\x1b" not in body
    for rows in re.findall(r"<tr>.*?</tr>", html, re.DOTALL):
        assert len(re.findall("<t[dh]", rows)) in (2, len(card.FIGURES))
    assert body.count(BEGIN) == 1


@pytest.mark.parametrize(
    "front",
    [
        "- a", ": : [", "license: {a: 1}\nbase_model: 3", "license: [1, 2]", "license: 2026-99-99",
        "nanodirl: {stages: 3}", "nanodirl: {base: {stages: [3]}}", "a: &a [*a]\nlicense: *a", "[" * 9000,
        "!!python/object/apply:os.system ['false']", "\0", "license: &a [&b [x, *a]]", None,
    ],
)  # fmt: skip
def test_the_card_of_others_may_be_anything(front, tmp_path):
    content = b"\xff\xfe" if front is None else f"---\n{front}\n---\n".encode()
    (tmp_path / "README.md").write_bytes(content)
    found = origin(str(tmp_path), tmp_path)
    assert found == {"name": tmp_path.name, "base_model": "", "licence": {}, "stages": []}


@pytest.mark.parametrize("change", ["evaluation: 3", "data: {}", "base: x", "stage: 3", "fingerprint: null"])
def test_a_card_that_a_person_changed_is_no_reason_to_end(change, good, tmp_path):
    trained("sft", good, tmp_path / "run", "steps=1")
    file = tmp_path / "run/latest/README.md"
    front, body = split(file.read_text())
    name, _, value = change.partition(": ")
    front["nanodirl"][name] = yaml.safe_load(value)
    file.write_text(card.joined(front, body))
    _, body = trained("sft", good, tmp_path / "run", "steps=2", "resume=true")
    assert row(body, "steps") == "2 of sft.py"


def test_texts_of_the_run_are_not_aliased_in_yaml(good):
    made = Card(load_config(SFTConfig, [f"data={good}/sft.jsonl"]), identity_of(good), good / "model", None)
    made.facts["base"]["licence"] = {"license": ["a", "b"]}
    text = made.text(3, {}).decode()
    assert "&id" not in text and split(text)[0]["license"] == ["a", "b"]


def identity_of(good: Path) -> dict:
    return identity(load_config(SFTConfig, [f"data={good}/sft.jsonl", f"model={good}/model"]))


# ------------------------------------------------------------------------------ tables of evaluations


@pytest.fixture(scope="module")
def evaluated(good, tmp_path_factory):
    """(run of sft.py, run of evaluate.py on its checkpoint, another one); copy before changing."""
    folder = tmp_path_factory.mktemp("evaluated")
    works("sft", arguments(good, "sft", folder / "run", "steps=2"))
    before = snapshot(folder / "run/latest/")
    common = [f"data={good}/test.jsonl", "max_tokens=8", "samples=2", "top_k=0"]
    model = folder / "run/latest"
    works("evaluate", [*common, f"model={model}", f"out={folder}/one", "rules=[static, dynamic]"])
    works("evaluate", [*common, f"model={model}", f"out={folder}/two", "rules=[dynamic]", "threshold=0.5"])
    works("evaluate", [*common, f"model={good}/model", f"out={folder}/other", "rules=[dynamic]"])
    assert snapshot(folder / "run/latest/") == before, "evaluate.py writes nothing there"
    return folder


@pytest.fixture
def checkpoint(evaluated, tmp_path):
    """A copy of the checkpoint that may be changed."""
    return Path(shutil.copytree((evaluated / "run/latest").resolve(), tmp_path / "checkpoint"))


def test_tables_of_evaluations_are_put_in_and_replaced(evaluated, checkpoint, zygote):
    before = snapshot(checkpoint)
    command = [sys.executable, str(ROOT / "plumbing/card.py"), str(checkpoint), str(evaluated / "one")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=checkpoint, timeout=60)
    assert done.returncode == 0, done.stderr
    front, body = split((checkpoint / "README.md").read_text())
    summary = json.loads((evaluated / "one/summary.json").read_text())
    for rule in ("static", "dynamic"):
        figures = summary["benchmarks"][rule]["test"]
        assert f"| `test` | `{rule}` | 4 | 2 | {100 * figures['accuracy']:.1f} % |" in body
    for setting in ("samples=2", "top_k=0", "threshold=0.9", "max_tokens=8", "prompt={question}"):
        assert f"`{setting}`" in body
    results = ModelCard.load(checkpoint / "README.md").data.eval_results
    assert sorted(r.metric_name for r in results) == [
        "mean@2, dynamic, protocol none", "mean@2, static, protocol none",
    ]  # fmt: skip
    assert {(r.dataset_type, r.task_type, r.metric_type) for r in results} == {
        ("test", "text-generation", "accuracy")
    }
    assert front["nanodirl"] == split(before["README.md"].decode())[0]["nanodirl"]

    add_evaluations(checkpoint, [evaluated / "one", evaluated / "two"])
    body = split((checkpoint / "README.md").read_text())[1]
    assert body.count("nanodirl's evaluate.py, protocol") == 2 and "`threshold=0.5`" in body
    add_evaluations(checkpoint, [])
    assert snapshot(checkpoint) == before, "taken out again"


def test_the_words_of_a_person_stay(evaluated, checkpoint):
    file = checkpoint / "README.md"
    front, body = split(file.read_text())
    body = body.replace("## Training", "My words.\n\n## Training") + "\nThe end.\n"
    file.write_text(card.joined(front | {"language": "en"}, body))
    add_evaluations(checkpoint, [evaluated / "two"])
    front, body = split(file.read_text())
    assert front["language"] == "en" and "My words." in body and body.endswith("\nThe end.\n")


@pytest.mark.parametrize("old", [HUB_CARD, "# Only words\n", f"{END}{BEGIN}", BEGIN, None])
def test_a_card_without_our_marks_and_a_folder_without_a_card(old, evaluated, checkpoint):
    file = checkpoint / "README.md"
    file.unlink() if old is None else file.write_text(old)
    for _ in range(2):
        add_evaluations(checkpoint, [evaluated / "two"])
        front, body = split(file.read_text())
        assert body.count("nanodirl's evaluate.py, protocol") == 1
        assert body.count("| `test` | `dynamic` |") == 1
        assert front["model-index"][0]["results"][0]["metrics"][0]["type"] == "accuracy"
    if old == HUB_CARD:
        assert front["base_model"] == "Qwen/Qwen3-8B-Base" and "Its own words." in body
    if old is None:
        assert "Qwen3ForCausalLM" in body and front["library_name"] == "transformers"


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (lambda c, r: shutil.rmtree(r), "no finished evaluation"),
        (lambda c, r: (r / "summary.json").unlink(), "no finished evaluation"),
        (lambda c, r: (r / "summary.json").write_text("{"), "summary.json: damaged"),
        (lambda c, r: (r / "summary.json").write_text("[]"), "summary.json: damaged"),
        (lambda c, r: (r / "summary.json").write_text('{"benchmarks": {"a": {"b": {}}}}'), "damaged"),
        (lambda c, r: (r / "config.json").write_text("{}"), "whose weights are not those of"),
        (lambda c, r: (r / "config.json").unlink(), "whose weights are not those of"),
        (lambda c, r: (c / "config.json").unlink(), "no checkpoint"),
        (lambda c, r: os.utime(c / "model.safetensors", (1, 1)), "whose weights are not those of"),
        (lambda c, r: (c / "README.md").write_bytes(b"\xff"), "expected a text"),
    ],
)
def test_what_does_not_belong_together_is_refused(damage, wanted, evaluated, checkpoint, tmp_path):
    run = Path(shutil.copytree(evaluated / "two", tmp_path / "run"))
    add_evaluations(checkpoint, [run])
    damage(checkpoint, run)
    before = snapshot(checkpoint)
    with pytest.raises(InputError, match=wanted):
        add_evaluations(checkpoint, [run])
    assert snapshot(checkpoint) == before


def test_an_evaluation_of_another_checkpoint_is_refused(evaluated, checkpoint):
    with pytest.raises(InputError, match=r"other: an evaluation of .*/model, whose weights"):
        add_evaluations(checkpoint, [evaluated / "one", evaluated / "other"])
    assert "protocol `none`" not in (checkpoint / "README.md").read_text()


def test_all_that_makes_a_protocol_is_a_field_of_evaluate():
    assert set(card.HOW) <= {f for f in EvalConfig.__dataclass_fields__}
