"""Stage 1, SFT by random masking.

Every training sequence is laid out once clean, with K noised copies of its blocks as views (masking.py).
A copy masks each response token with probability t and counts with weight 1/t, so that the loss

    L = - 1 / (R K)  sum over copies, sum over masked i  1/t  log p(x_i | view)

(R response tokens in the batch) is an unbiased estimate of a bound on -log p(response) per token; SDAR
(2510.06303) and BD3-LM (2503.09573, eq. 8). The response's last block is filled up with the padding token
and that is trained too, so that the decoder never meets a block shape that training did not have.

    python sft.py data=data/generated/sft.jsonl                       # one process, a tiny model
    torchrun --nproc_per_node 8 sft.py --config configs/sdar_8b_sft.yaml
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plumbing.common import InputError, run_script
from plumbing.config import TrainConfig, check_sources, read_arguments, setting


@dataclass
class SFTConfig(TrainConfig):
    """Fields of sft.py."""

    out: str = setting("runs/sft", "the run directory: config, metrics, checkpoints", may_change=True)
    data: str = setting("data/generated/sft.jsonl", "training file", heading="Data and noise")
    batch_size: int = setting(64, "sequences per optimizer step, over all ranks", above=0)
    max_tokens: int = setting(1024, "longest sequence, prompt included", above=0)
    noise_per: Literal["sequence", "block"] = setting("sequence", "the unit with one noise level t")
    views: int = setting(1, "noised copies of each block", above=0)
    complementary: bool = setting(False, "draw views in pairs that mask each other's complement")
    t_min: float = setting(0.02, "noise levels are drawn from [t_min, t_max]", above=0, below=0.5)
    t_max: float = setting(0.0, "the highest of them; 0: 1 - t_min", at_most=1)

    def check(self) -> None:
        """Check combinations of fields and the data file; see TrainConfig."""
        super().check()
        if self.complementary and self.views % 2:
            raise InputError(f"config key views: {self.views}, expected an even number of them")
        if self.t_max and (self.complementary or self.t_max <= self.t_min):
            raise InputError(f"config key t_max: {self.t_max}, expected 0, or more than t_min without pairs")
        check_sources(self)


if __name__ == "__main__":  # a bad argument is answered before the imports below, which take seconds
    CONFIG = read_arguments(SFTConfig)

from typing import TYPE_CHECKING

import numpy as np
import torch

from evaluate import evaluate_now
from masking import Packed, noise, pack
from model import BlockDiffusion, Sampling, choose_block_size, load_for_training
from plumbing.balance import plan_ranks
from plumbing.checkpoint import gathered, load_tokenizer, named_weights, prompt_and_response, stop_ids
from plumbing.common import DataOrder, Stopwatch, progress, read_records
from plumbing.gpu import check_memory, to_engine, to_trainer
from plumbing.guard import Guard, noted
from plumbing.lengths import fitting, fitting_questions
from plumbing.ranks import micro_batches, rank_and_world, start_distributed, sum_over_ranks
from plumbing.run_folder import RunFolder, due, lr_at, make_optimizer, set_lr
from reward import read_questions
from rollout import make_engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# ------------------------------------------------------------------------------- the data


@dataclass
class Example:
    """A training sequence: whole blocks, of which the first prompt_tokens are the prompt."""

    ids: list[int]
    prompt_tokens: int
    where: str = ""  # file and line


def read_examples(
    path: str, tokenizer: PreTrainedTokenizerFast, block_size: int, max_tokens: int, too_long: str = "error"
) -> list[Example]:
    """Encode a training file (formats: data/README.md), each sequence filled up to whole blocks.

    Args:
        too_long: what to do about sequences of more than max_tokens: `error`, or `leave_out`.

    Raises:
        InputError: a record of another format, without a response, or longer than max_tokens.
    """
    examples, stops = [], set(stop_ids(tokenizer))
    for where, record in progress(read_records(path), desc="encode", unit="record", leave=False):
        prompt, response = prompt_and_response(where, record, tokenizer)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        ids = prompt_ids + tokenizer(response, add_special_tokens=False)["input_ids"]

        # End with a stop token, then fill up the last block.
        if ids[-1] not in stops:
            ids.append(tokenizer.eos_token_id)
        ids += [tokenizer.pad_token_id] * (-len(ids) % block_size)
        examples.append(Example(ids, len(prompt_ids), where))
    lengths = [len(example.ids) for example in examples]
    return fitting(examples, lengths, max_tokens, "by config key max_tokens or the model", too_long)


# -------------------------------------------------------------------------------- the loss


def sft_loss(logprobs: torch.Tensor, packed: Packed, response_tokens: int) -> torch.Tensor:
    """Weighted cross-entropy of one row, divided by the response tokens of the whole batch."""
    return -(packed.weights * logprobs).sum() / response_tokens


def accumulate_gradients(
    model: BlockDiffusion,
    batch: list[tuple[int, Example]],
    config: SFTConfig,
    block_size: int,
    mask_id: int,
    device: torch.device,
) -> dict[str, float]:
    """Add the gradient of the loss on the global batch. Every rank gets all of it and computes its share.

    Args:
        batch: each example with its running number, which with the seed decides its noise.

    Returns:
        loss, entropy and train_tokens, over all ranks.
    """
    # Draw the views of all sequences; the seed makes them the same on every rank. (1: not the data order's.)
    noised = []
    for number, example in batch:
        rng = np.random.default_rng([config.seed, 1, number])
        noised.append(
            noise(
                example.ids, example.prompt_tokens, block_size, rng,
                config.noise_per, config.views, config.complementary, config.t_min, config.t_max,
            )
        )  # fmt: skip
    response_tokens = sum(len(e.ids) - e.prompt_tokens for _, e in batch)

    # Lay this rank's even share of them out in packed rows.
    rank, world = rank_and_world()
    plan = plan_ranks([views.num_tokens for views in noised], config.token_budget, world)
    rows = pack(noised, block_size, mask_id, config.token_budget, plan[rank])

    # Forward and backward, row by row.
    sums = {"loss": 0.0, "entropy": 0.0, "scored": 0.0, "train_tokens": 0.0}
    for packed, row in zip(micro_batches(model, rows, config.reduce_once), plan[rank], strict=True):
        packed = packed.to(device)
        scores = model.score(packed, Sampling())
        loss = sft_loss(scores.logprobs, packed, response_tokens)
        (loss * world).backward()  # FSDP2 averages over ranks, the loss is a sum over them
        records = ", ".join(batch[i][1].where for i in row)
        sums["loss"] += noted(loss.item(), f"loss of a row of {records}")
        sums["entropy"] += scores.entropy.sum().item()
        sums["scored"] += len(packed.scored)
        sums["train_tokens"] += len(packed)
    sums = sum_over_ranks(sums)
    return {
        "loss": sums["loss"],
        "entropy": sums["entropy"] / max(sums["scored"], 1),
        "train_tokens": int(sums["train_tokens"]),
    }


# -------------------------------------------------------------------------------- the loop


def main(config: SFTConfig) -> None:
    """The SFT loop: gradient, optimizer step, perhaps evaluation, log, checkpoint."""
    # What a run is: its folder, model, optimizer and data, where it stopped if it is resumed. (`base`
    # differs from `weights` with LoRA only.)
    rank, _, device = start_distributed()
    folder = RunFolder(config)
    tokenizer = load_tokenizer(folder.weights)
    check_memory(config, folder.base)
    model = load_for_training(folder.base, device, config)  # FSDP2 shards it under torchrun
    block_size, mask_id = choose_block_size(config.block_size, model.config), tokenizer.mask_token_id
    optimizer = make_optimizer(model, config)
    folder.restore(model, optimizer)
    longest = min(config.max_tokens, model.config.max_position_embeddings)
    examples = read_examples(config.data, tokenizer, block_size, longest, config.too_long)
    order = DataOrder(len(examples), config.seed, folder.cursor)

    # An engine generates for the evaluation; it sleeps until then.
    if config.eval_every:
        engine = make_engine(folder.weights, tokenizer, block_size, config, folder.engine_log)
        questions = read_questions(config.eval_data)[: config.eval_limit or None]
        questions = fitting_questions(questions, tokenizer, engine, config, config.eval_max_tokens)
        to_trainer(engine)

    guard = Guard(config)  # over loss and gradient
    bar = progress(total=config.steps, initial=folder.step, desc="sft", unit="step", disable=rank > 0)
    for step in range(folder.step + 1, config.steps + 1):
        watch = Stopwatch()
        with watch("train"):
            # The gradient of the next batch.
            batch = [(number, examples[index]) for number, index in order.take(config.batch_size)]
            metrics = accumulate_gradients(model, batch, config, block_size, mask_id, device)

            # One optimizer step, if all numbers are in order.
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            metrics["grad_norm"] = gathered(norm).item()
            metrics["lr"] = lr_at(config, step - 1, config.steps)
            if guard.allows(step, metrics):
                set_lr(optimizer, metrics["lr"])
                optimizer.step()
            optimizer.zero_grad()

        # The engine gets the new weights, generates, and sleeps again.
        if due(config.eval_every, step, config.steps):
            with watch("evaluate"):
                metrics |= to_engine(engine, named_weights(model))
                metrics |= evaluate_now(engine, tokenizer, questions, config, lambda: named_weights(model))
                to_trainer(engine)

        # On record.
        folder.log(step, metrics | watch.seconds)
        bar.set_postfix(loss=f"{metrics['loss']:.3f}")
        bar.update()
        if due(config.save_every, step, config.steps) or step == config.steps:
            folder.save(step, order.cursor, model, optimizer)
    bar.close()
    if config.eval_every:
        engine.close()
    folder.close()


if __name__ == "__main__":
    run_script(main, CONFIG)
