"""README, data/README and docs/ say what is so: links, pictures, fields, configs and examples."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import download
import pytest
import yaml

from dipo import DiPOConfig
from evaluate import PROTOCOLS, EvalConfig
from plumbing import own_reward
from plumbing.config import load_config
from reward import Question, Utf8, example, grade, values
from sft import SFTConfig

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "data/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/RESULTS.md",
]
SCRIPTS = {"sft.py": SFTConfig, "dipo.py": DiPOConfig, "evaluate.py": EvalConfig}


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """Files that git knows, from the root."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_are_in_git(page, tracked):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [t.partition("#")[0] for t in targets if not t.startswith(("http", "#"))]
    assert local or page != README
    missing = [t for t in local if (page.parent / t).resolve().relative_to(ROOT).as_posix() not in tracked]
    assert not missing, f"{page.name} points to {missing}, which git does not have"


def test_every_file_of_the_list_is_there(tracked):
    """Names in backticks and in the lists of files that end like a file of this repository."""
    named = re.findall(r"(?<![\w/.<{-])([\w/]+\.(?:py|md|yaml|txt))\b", README.read_text(encoding="utf-8"))
    known = {path.rpartition("/")[2] for path in tracked} | tracked
    made = {"table.md", "config.yaml", "myrewards.py"}  # by runs and by readers
    missing = {name for name in named if name not in known | made}
    assert not missing, f"README.md names {sorted(missing)}"


# What makes a picture, and the test that runs that at small size.
MADE_BY = {
    "docs/denoising.gif": ("rollout.py", "test_chat.py::test_the_picture_of_both_rules"),
    "docs/demo.png": ("benchmarks/demo.py", ".ci/run"),
    "docs/report.png": ("docs/screenshot.py", "test_browser.py::test_the_picture_of_the_readme"),
    "docs/rewards.png": ("docs/rewards.py", "test_docs.py::test_the_curves_of_the_rewards_are_plotted"),
    "docs/schedule.png": (
        "benchmarks/schedule.py",
        "test_schedule.py::test_the_program_prints_a_table_and_draws",
    ),
    "docs/speed.png": ("benchmarks/compare.py", "test_frontier.py::test_the_picture"),
    "docs/sweep.png": ("evaluate.py", "test_evaluate.py::test_a_sweep_is_measured_and_plotted"),
    "docs/method": ("docs/method.py", "test_method.py::test_the_pictures_in_git_are_those_that_are_drawn"),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_picture_has_its_command_on_the_page_and_a_test_that_runs_it(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+\.(?:png|gif))\)", text) + re.findall(r'src="([^"]+)"', text):
        picture = (page.parent / target).resolve().relative_to(ROOT)
        made = picture.parent if picture.parent.name == "method" else picture
        program, test = MADE_BY[made.as_posix()]
        assert re.search(rf"`[^`]*\b{program}\b", text), f"{page.name}: nothing says how {picture} is made"
        file, _, name = test.partition("::")
        if name:
            assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")
        else:
            assert "make demo" in (ROOT / file).read_text(encoding="utf-8")


def test_no_picture_lies_about(tracked):
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    unused = [path for path in tracked if path.endswith((".png", ".gif")) and Path(path).name not in shown]
    assert not unused, f"no page shows {unused}"


def test_the_list_of_the_cellar_is_whole(tracked):
    listed = re.findall(r"`(\w+\.\w+)`", (ROOT / "plumbing/README.md").read_text(encoding="utf-8"))
    files = {path.removeprefix("plumbing/") for path in tracked if path.startswith("plumbing/")}
    assert sorted(set(listed) - {"test_house.py"}) == sorted(files - {"__init__.py", "README.md"})


def test_every_test_that_the_readme_names_is_there():
    named = re.findall(r"`(tests/test_\w+\.py)::(\w+)`", README.read_text(encoding="utf-8"))
    assert len(named) >= 10
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {test}"


def test_the_fields_of_all_configs_are_documented():
    spec = importlib.util.spec_from_file_location("docs_config", ROOT / "docs/config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    document = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert document == module.document(), "docs/config.md is stale: python docs/config.py"
    for config_class in SCRIPTS.values():
        for field in fields(config_class):
            assert re.search(rf"\| `{field.name}`( \*)? \|", document)
            assert field.metadata["meaning"], f"{config_class.__name__}.{field.name} has no meaning"


def test_the_curves_of_the_rewards_are_plotted(tmp_path, zygote):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/rewards.py").write_text((ROOT / "docs/rewards.py").read_text())
    path = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    done = zygote.run([sys.executable, tmp_path / "docs/rewards.py"], env=path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "docs/rewards.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", sorted(file.name for file in (ROOT / "configs").glob("*.yaml")))
def test_a_config_holds_only_what_differs_from_the_defaults(name):
    config_class = SFTConfig if "sft" in name else DiPOConfig if "dipo" in name else EvalConfig
    content = yaml.safe_load((ROOT / "configs" / name).read_text())
    defaults = config_class()
    assert content and not [key for key, value in content.items() if getattr(defaults, key) == value]


@pytest.mark.parametrize("stage", ["sft", "dipo", "sft_release", "dipo_release"])
def test_the_published_configs_load_and_name_files_that_download_makes(stage, tmp_path, monkeypatch):
    """Without those files they say so, instead of training on something else."""
    name, _, release = stage.partition("_")
    config_class = SCRIPTS[f"{name}.py"]
    monkeypatch.chdir(tmp_path)
    path = ["--config", str(ROOT / f"configs/sdar_8b_{stage}.yaml")]
    with pytest.raises(ValueError, match=r"data/hub/.*: no such data file: .*python data/download.py"):
        load_config(config_class, path)
    given = yaml.safe_load(Path(path[1]).read_text())
    assert Path(given["data"]).stem in download.DATASETS
    Path("data/hub").mkdir(parents=True)
    Path(given["model"]).mkdir(parents=True)
    Path(given["data"]).write_text("{}\n")
    config = load_config(config_class, path)
    assert config.lr == (1e-5 if name == "sft" else 1e-6)
    assert config.adam_beta2 == (0.999 if release else 0.95)
    if name == "sft":
        assert config.batch_size == (64 if release else 512)
    else:
        assert (config.groups, config.group_size) == (128, 8 if release else 32)
        assert config.prompt == PROTOCOLS["dirl"]["prompt"], "trained on another prompt than evaluated on"


def blocks(language: str) -> list[str]:
    """The blocks of code of README.md and docs/ in a language; "": commands."""
    found = []
    for page in [README, *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
            found += [block] if kind == language else []
    return found


def commands() -> list[list[str]]:
    """Command lines of all pages that start one of this repository's programs, each once, uncommented."""
    lines = [line for block in blocks("") for line in block.splitlines()]
    starts = ("python ", "torchrun ", ".venv/bin/python ")
    found = []
    for line in lines:
        words = shlex.split(line, comments=True) if line.startswith(starts) else []
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        if scripts and words[scripts[0] :] not in found:
            found.append(words[scripts[0] :])
    return found


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_of_the_pages_have_arguments_that_their_programs_take(command, tmp_path, monkeypatch):
    """Whatever they would need (a node, the hub) is not needed to read their arguments."""
    script, *arguments = command
    assert (ROOT / script).is_file()
    if script not in SCRIPTS:
        return
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    made = [f"data/hub/{name}.jsonl" for name in download.DATASETS]
    made += [
        "runs/demo/data/rl.jsonl",
        "runs/demo/data/test.jsonl",
        "questions.jsonl",
        "data/generated/own.jsonl",
    ]
    for name in made:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}\n")
    Path("myrewards.py").write_text(reward_example())
    own_reward.WORKER.close()  # the next one starts in this folder
    for run in ("demo/sft", "demo/dipo", "sdar_8b_sft", "sdar_8b_dipo"):
        Path("runs", run, "latest").mkdir(parents=True)
    Path("CHECKPOINT").mkdir()
    presets = PROTOCOLS if script == "evaluate.py" else None
    load_config(SCRIPTS[script], arguments, presets)


def reward_example() -> str:
    """The file with a reward of one's own that docs/rewards.md shows."""
    (code,) = [block for block in blocks("python") if block.startswith("def shows_work")]
    return code


def test_the_reward_of_the_page_does_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("myrewards.py").write_text(reward_example())
    own_reward.WORKER.close()
    question, weights = Question("3+8+5?", "16"), {"myrewards.shows_work": 1.0}
    texts = [r"3+8=11 11+5=16 \boxed{16}", r"3+8=11 \boxed{16}", r"\boxed{16}", "=== = ="]
    graded = grade([example(text) for text in texts], [question] * len(texts), Utf8(), block_size=4)
    assert [values(g, weights)["myrewards.shows_work"] for g in graded] == [1.0, 0.5, 0.0, 1.0]
    own_reward.WORKER.close()


@pytest.mark.parametrize("engine", ["LMDeployEngine", "TorchEngine"])
def test_the_inference_examples_run(engine, tiny_folder, tmp_path, monkeypatch, capsys):
    if engine == "LMDeployEngine":
        pytest.importorskip("lmdeploy")
        monkeypatch.setattr("rollout.LMDeployEngine.setup", "lmdeploy_on_cpu:install")
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.chdir(tmp_path)
    (code,) = [block for block in blocks("python") if f"import Decoding, {engine}" in block]
    assert len(code.strip().splitlines()) <= 11
    exec(code.replace("JetLM/SDAR-8B-Chat", str(tiny_folder)), {})
    assert capsys.readouterr().out.strip()


def test_the_readme_is_read_in_one_sitting():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250
