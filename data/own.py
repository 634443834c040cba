r"""Training rows from a model's own answers: what evaluate.py kept, as a file for sft.py.

A model that has learned many ways to write an answer is unsure at every place where they part, and reveals
one token where it could reveal several. Its own careful answers (greedy, at a high threshold) settle for one
way; trained on those that are right, it is sure of it (docs/speed.md).

    python evaluate.py model=CHECKPOINT data=questions.jsonl threshold=0.9 out=runs/own
    python data/own.py runs/own/responses-questions-dynamic.jsonl --out data/generated/own.jsonl
    python sft.py --config configs/settle_sft.yaml model=CHECKPOINT data=data/generated/own.jsonl

Responses that ran into the length limit are left out, and so are repetitions. The user's turn is the one of
the evaluation (`prompt` in its config.json).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plumbing.common import InputError, read_records, run_script, writing
from plumbing.config import Parser, folder_name
from plumbing.kept import read_settings

FIELDS = {"question": str, "text": str, "correct": bool, "finish_reason": str}


def own_rows(file: Path, wrong_too: bool = False) -> list[dict]:
    """Chats of the responses in a file that evaluate.py wrote, each once.

    Raises:
        InputError: a line that is no response; a file without a response that can be used.
    """
    prompt = read_settings(file.parent / "config.json").get("prompt", "{question}")
    rows, known = [], set()
    for where, record in read_records(str(file)):
        for name, kind in FIELDS.items():
            if not isinstance(record.get(name), kind):
                raise InputError(f"{where}: no `{name}`, expected a response of evaluate.py")
        pair = record["question"], record["text"]
        usable = record["finish_reason"] == "stop" and record["text"].strip() and pair not in known
        if usable and (record["correct"] or wrong_too):
            known.add(pair)
            turn = prompt.replace("{question}", record["question"])
            user = {"role": "user", "content": turn}
            rows.append({"messages": [user, {"role": "assistant", "content": record["text"]}]})
    if not rows:
        raise InputError(f"{file}: no {'complete' if wrong_too else 'right'} response")
    return rows


def main() -> None:
    """Write the file."""
    parser = Parser(description="Training rows from a model's own right answers.", allow_abbrev=False)
    parser.add_argument("responses", type=folder_name, help="responses-*.jsonl of evaluate.py")
    parser.add_argument("--out", type=folder_name, required=True, help="training file for sft.py")
    parser.add_argument("--wrong-too", action="store_true", help="keep wrong answers as well, to compare")
    options = parser.parse_args()
    rows = own_rows(options.responses, options.wrong_too)
    with writing(options.out):
        options.out.parent.mkdir(parents=True, exist_ok=True)
        part = options.out.with_name(f".part-{options.out.name}")
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        part.replace(options.out)
    print(f"{options.out}: {len(rows)} rows")


if __name__ == "__main__":
    run_script(main)
