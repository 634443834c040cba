"""How the exact likelihood scores holds on a real checkpoint, and how much of the gradient they carry.

Rolls out some questions, replays them, and prints for an engine in float32 and one in bfloat16 (the trainer
is float32): the share of holds that score below -5 and at the floor, the norm of their gradient over that of
the reveals (advantages are +1 or -1 by chance), and how many are more than 1 from the engine's own value.

    python benchmarks/holds.py runs/demo/sft/latest runs/demo/data/rl.jsonl
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from dipo import DiPOConfig, correction_weights
from masking import HOLD, Packed, pack, replay
from model import BlockDiffusion, choose_block_size, load
from plumbing.checkpoint import encode_prompt, load_tokenizer, stop_ids
from plumbing.common import run_script
from plumbing.config import Parser
from reward import read_questions
from rollout import Decoding, TorchEngine

SETTINGS = {
    "static, temperature 0.5": Decoding(rule="static", temperature=0.5, max_tokens=48, holds=True),
    "static, temperature 1": Decoding(rule="static", max_tokens=48, holds=True),
    "dynamic 0.9": Decoding(threshold=0.9, max_tokens=48, holds=True),
}


def gradient_norm(network: BlockDiffusion, rows: list[Packed], how: Decoding, of_holds: bool) -> float:
    """Of the sum of advantage times log-probability over all holds, or over all reveals."""
    network.zero_grad()
    for row in rows:
        scores, held = network.score(row, how), row.targets == HOLD
        weights = correction_weights(scores.logprobs.detach(), row.engine_logprobs, held, DiPOConfig())
        terms = row.advantages * weights * scores.logprobs
        terms[held if of_holds else ~held].sum().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).norm().item()


@torch.no_grad()
def scores_of_holds(network: BlockDiffusion, rows: list[Packed], how: Decoding) -> torch.Tensor:
    """[H, 2] log-probabilities of all holds: the trainer's and the engine's."""
    pairs = []
    for row in rows:
        held = row.targets == HOLD
        pairs.append(torch.stack([network.score(row, how).logprobs[held], row.engine_logprobs[held]], -1))
    return torch.cat(pairs)


def main() -> None:
    """Print a table."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or hub id")
    parser.add_argument("data", help="question file")
    parser.add_argument("--questions", type=int, default=96)
    options = parser.parse_args()

    # The trainer's network, and prompts.
    network, tokenizer = load(options.checkpoint), load_tokenizer(options.checkpoint)
    block_size, mask_id = choose_block_size(0, network.config), tokenizer.mask_token_id
    questions = read_questions(options.data)[: options.questions]
    prompts = [encode_prompt(tokenizer, question.text) for question in questions]

    # Every engine under every setting.
    print("| engine | decoding | holds | below -5 | at the floor | gradient / reveals' | off by 1 |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for dtype in (torch.float32, torch.bfloat16):
        engine = TorchEngine(load(options.checkpoint, dtype), block_size, mask_id, stop_ids(tokenizer))
        for name, how in SETTINGS.items():
            rng, views = random.Random(0), []
            for rollout in engine.generate(prompts, list(range(len(prompts))), how):
                views.append(replay(rollout, block_size, 1.0, exact=True, advantage=rng.choice([-1.0, 1.0])))
            rows = pack(views, block_size, mask_id, token_budget=8192)
            ours, theirs = scores_of_holds(network, rows, how).T
            norms = [gradient_norm(network, rows, how, of_holds) for of_holds in (True, False)]
            shares = [(ours < -5), (ours < -20.69), ((ours - theirs).abs() > 1)]
            low, floor, off = (f"{100 * share.float().mean():.2f} %" for share in shares)
            ratio = f"{norms[0] / norms[1]:.3f}"
            print(f"| {str(dtype)[6:]} | {name} | {len(ours)} | {low} | {floor} | {ratio} | {off} |")


if __name__ == "__main__":
    run_script(main)
