"""The README's tables have a row for every config field, with the default that the code has."""

import contextlib
import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from dipo import DiPOConfig
from evaluate import EvalConfig
from sft import SFTConfig

README = Path(__file__).resolve().parents[1] / "README.md"
CONFIGS = (EvalConfig, SFTConfig, DiPOConfig)


def default_of(field: dataclasses.Field):
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def value_of(text: str, kind: type):
    """The value that a default in the README stands for.

    As in YAML, but that takes 1e-05 for a text and {question} for a mapping.
    """
    if kind is str and not text.startswith(('"', "'")):
        return text
    if kind is float:
        with contextlib.suppress(ValueError):
            return float(text)
    return yaml.safe_load(text)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[str]]:
    """Field name -> the defaults given for it, from rows | `field` | `default` | meaning |."""
    if not README.exists():
        pytest.skip("no README.md yet")
    found: dict[str, list[str]] = {}
    for line in README.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| *`(\w+)` *\| *`([^`]*)` *\|", line):
            found.setdefault(match[1], []).append(match[2])
    return found


@pytest.mark.parametrize(
    ("config", "field"),
    [pytest.param(c, f, id=f"{c.__name__}.{f.name}") for c in CONFIGS for f in dataclasses.fields(c)],
)
def test_a_field_is_documented_with_its_default(rows, config, field) -> None:
    assert field.name in rows, f"README.md has no row | `{field.name}` | `default` | meaning |"
    default = default_of(field)
    shown = [value_of(text, type(default)) for text in rows[field.name]]
    assert default in shown, (
        f"README.md gives `{field.name}` as {rows[field.name]}, the default is {default!r}"
    )


def test_no_row_names_a_field_that_is_gone(rows) -> None:
    known = {f.name for c in CONFIGS for f in dataclasses.fields(c)}
    tables = {name for name, defaults in rows.items() if any(defaults)}
    assert tables <= known, f"README.md documents {sorted(tables - known)}, which no config has"


@pytest.mark.parametrize("engine", ["LMDeployEngine", "TorchEngine"])
def test_the_inference_examples_run(engine, tiny_folder, tmp_path, monkeypatch, capsys):
    if engine == "LMDeployEngine":
        pytest.importorskip("lmdeploy")
        monkeypatch.setattr("rollout.LMDeployEngine.setup", "lmdeploy_on_cpu:install")
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (code,) = [b for b in blocks if engine in b]
    assert len(code.strip().splitlines()) <= 11
    exec(code.replace("JetLM/SDAR-8B-Chat", str(tiny_folder)), {})
    assert capsys.readouterr().out.strip()
