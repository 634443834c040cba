"""Lesson 2 of docs/afternoon.md: the decoder, step by step, greedily, with all confidences."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from model import BlockCache, choose_block_size, load, sampling_logprobs  # noqa: E402
from plumbing.checkpoint import encode_prompt, load_tokenizer, stop_ids  # noqa: E402
from plumbing.common import run_script  # noqa: E402
from plumbing.config import Parser, readable  # noqa: E402
from rollout import Decoding, reveal  # noqa: E402

HOW = Decoding(rule="dynamic", threshold=0.9, top_k=1)  # top_k=1: the draw v_j is the likeliest token
BLOCKS = 12  # at most so many
SHORT = {"<|im_end|>": "<end>", "<|endoftext|>": "<pad>"}


@torch.inference_mode()
def main() -> None:
    """Decode block after block, and print a line per denoising step."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="runs/afternoon/sft/latest", help="folder or hub id")
    parser.add_argument("question", nargs="?", default="3+8?", type=readable)
    options = parser.parse_args()
    model, tokenizer = load(options.checkpoint).eval(), load_tokenizer(options.checkpoint)
    b, mask, stops = choose_block_size(0, model.config), tokenizer.mask_token_id, stop_ids(tokenizer)
    ids, steps = encode_prompt(tokenizer, options.question), 0
    prompt_tokens, slot = len(ids), torch.tensor([0])

    # The whole blocks of the prompt go into the cache; the rest of it opens the first generated block.
    whole = prompt_tokens // b * b
    cache = BlockCache(model, 1, whole + BLOCKS * b, b)
    if whole:
        model.prefill(torch.tensor([ids[:whole]]), torch.arange(whole)[None], cache, slot)
    for start in range(whole, whole + BLOCKS * b, b):
        block = torch.tensor(ids[start:] + [mask] * (start + b - len(ids)))  # [B]
        masked = torch.arange(start, start + b) >= len(ids)
        positions = torch.arange(start, start + b)[None]
        while masked.any():
            # One forward; a draw and its confidence at every position; some of the masked ones are revealed.
            logits = model.decode(block[None], positions, cache, slot)[0]  # [B, V]
            log_p, log_g = sampling_logprobs(logits, HOW)
            drawn = log_g.argmax(-1)
            confidence = log_p.gather(-1, drawn[:, None])[:, 0]
            revealed = reveal(confidence, masked, HOW)
            steps += 1
            line = f"step {steps:2d}  block {start // b}"
            for j in range(b):
                token = tokenizer.decode(drawn[j] if masked[j] else block[j])
                c = f"{confidence[j].exp():.3f}" if masked[j] else "known"
                line += f"  {SHORT.get(token, repr(token)):>5} {c}{'*' if revealed[j] else ' '}"
            print(line.rstrip())
            block, masked = torch.where(revealed, drawn, block), masked & ~revealed
        model.prefill(block[None], positions, cache, slot)  # the finished block leaves clean keys and values
        ids += block.tolist()[len(ids) - start :]
        if any(token in stops for token in ids[start:]):
            break

    response = len(ids) - prompt_tokens
    print(f"\n{tokenizer.decode(ids[prompt_tokens:], skip_special_tokens=True)!r}")
    print(f"{response} tokens in {steps} steps: {response / steps:.2f} tokens per forward")


if __name__ == "__main__":
    run_script(main)
