"""Writes config.md, the fields of all configs, beside this file: python docs/config.py"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dipo import DiPOConfig  # noqa: E402
from evaluate import EvalConfig  # noqa: E402
from plumbing.config import FieldDoc, TrainConfig, field_docs  # noqa: E402
from sft import SFTConfig  # noqa: E402

HEAD = """# Config fields

Made by `python docs/config.py` from the code, where each field says what it means; `--help` prints the same.
A field is set in the YAML file of `--config` or as `key=value`, which wins. A star marks fields of training
runs that may have another value when the run is resumed: they do not change what it computes. (`steps` may
while the schedule is constant.)
"""


def table(docs: list[FieldDoc]) -> list[str]:
    """Markdown: a table per group of fields."""
    lines = []
    for number, doc in enumerate(docs):
        if doc.heading or number == 0:
            title = [f"### {doc.heading}", ""] if doc.heading else []
            lines += ["", *title, "| field | default | meaning |", "|---|---|---|"]
        meaning = doc.meaning.replace("|", "\\|")
        lines.append(f"| `{doc.name}`{' *' * doc.may_change} | `{doc.default}` | {meaning} |")
    return lines


def document() -> str:
    """All of config.md."""
    lines = [HEAD, "## Both stages: sft.py and dipo.py", *table(field_docs(TrainConfig))]
    shared = {doc.name: doc for doc in field_docs(TrainConfig)}
    for script, config_class in (("sft.py", SFTConfig), ("dipo.py", DiPOConfig)):
        docs = {doc.name: doc for doc in field_docs(config_class)}
        own = [doc for name, doc in docs.items() if name not in shared]
        lines += [
            "",
            f"## {script}",
            "",
            f"Beside the fields above; `out` is `{docs['out'].default}`.",
            *table(own),
        ]
    lines += ["", "## evaluate.py", *table(field_docs(EvalConfig))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("config.md").write_text(document())
