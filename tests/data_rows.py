"""Small training and question files for tests."""

import json
import random
from pathlib import Path

import tiny as tiny_task


def write_task(folder: Path, records: int = 32, seed: int = 0) -> None:
    """Write sft.jsonl and rl.jsonl with so many questions of the tiny task."""
    rng = random.Random(seed)
    examples = [tiny_task.make_example(rng, (2, 3), 9) for _ in range(records)]
    for split in ("sft", "rl"):
        lines = [json.dumps(tiny_task.to_row(example, split)) for example in examples]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
