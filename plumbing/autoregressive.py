"""An autoregressive checkpoint decoded by transformers itself: a token per step, on any machine."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from plumbing.checkpoint import check_finite
from plumbing.common import InputError, first_line


class Autoregressive:
    """What a rollout engine does for one block-diffusion model, for an autoregressive one: `generate`.

    Args:
        folder: a checkpoint of a model that transformers knows.
        stop_ids: tokens that end an answer.

    Raises:
        InputError: transformers cannot read it, or a weight is missing, nan or infinite.
    """

    block_size = 1

    def __init__(self, folder: Path, dtype: str, stop_ids: list[int]):
        try:
            self.model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # an unknown kind of model, a truncated file: many kinds
            raise InputError(f"{folder}: cannot read the model ({first_line(error)})") from error
        if report["missing_keys"]:
            raise InputError(f"{folder}: missing tensor {min(report['missing_keys'])}")
        for name, parameter in self.model.named_parameters():
            check_finite(name, parameter, folder)
        self.model = self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.positions = getattr(self.model.config, "max_position_embeddings", None)
        self.stop_ids = stop_ids

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], seeds: list[int], how: Any, *_: Any) -> list[Any]:
        """One record per (prompt, seed) with the fields of a rollout; logprobs are of the whole softmax.

        Penalties and the like in the checkpoint's generation_config.json are not applied, as LMDeploy does
        not either: `transformers.generate` would, and what it draws from would no longer be the softmax.

        Args:
            how: has temperature, top_k (1: greedy, else off) and max_tokens.

        Raises:
            InputError: a prompt that with max_tokens exceeds the model's positions.
        """
        records = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            if self.positions and len(prompt) + how.max_tokens > self.positions:
                raise InputError(
                    f"a prompt of {len(prompt)} tokens and max_tokens={how.max_tokens} exceed the model's "
                    f"{self.positions} positions"
                )
            ids, logprobs = self._continue(prompt, torch.Generator().manual_seed(seed), how)
            records.append(
                SimpleNamespace(
                    response_ids=ids,
                    steps=list(range(1, len(ids) + 1)),
                    logprobs=logprobs,
                    num_tokens=len(ids),
                    finish_reason="stop" if ids[-1] in self.stop_ids else "length",
                    is_sound=all(map(math.isfinite, logprobs)),
                )
            )
        return records

    def _continue(
        self, prompt: list[int], random: torch.Generator, how: Any
    ) -> tuple[list[int], list[float]]:
        """The tokens after a prompt, and the log-probability of each."""
        ids, logprobs, cache = list(prompt), [], None
        fed = 0  # tokens whose keys and values are in the cache
        while len(logprobs) < how.max_tokens and (not logprobs or ids[-1] not in self.stop_ids):
            new = torch.tensor([ids[fed:]], device=self.model.device)
            out = self.model(new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, fed = out.past_key_values, len(ids)
            logp = (out.logits[0, -1].float().cpu() / how.temperature).log_softmax(-1)
            greedy = how.top_k == 1
            token = int(logp.argmax() if greedy else torch.multinomial(logp.exp(), 1, generator=random))
            ids.append(token)
            logprobs.append(float(logp[token]))
        return ids[len(prompt) :], logprobs
