"""What the project compiles on CUDA, compiled for the pretended H200 of fake_gpu.py; a process of its own.

Arguments are cases, NAME:PARAMETER:..., with the functions below as names. The last line printed is a JSON
object: of every case what its passes did and which kernels were compiled.

    python tests/cuda_on_cpu/compile_cases.py flex:bfloat16:128 layers:selective scoring:bfloat16
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import weakref
from pathlib import Path

import fake_gpu

ROOT = Path(__file__).resolve().parents[2]
HEADS, KV_HEADS = 8, 2
LENGTHS = [700, 1300, 900, 2000]  # of the first sequence, in tokens
MASK_ID = 259
VOCABULARY = 151936
PASSES: list[dict] = []


def flex(dtype: str, dim: str) -> None:
    """FlexAttention over packed rows, forward and backward."""
    scaling = int(dim) ** -0.5
    for length in LENGTHS:
        row = packed_row(length)
        attention = model.FlexRow(row, kernels.KERNEL_OPTIONS)
        shapes = [(1, heads, len(row), int(dim)) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        q, k, v = (
            torch.randn(s, dtype=getattr(torch, dtype), device="cuda", requires_grad=True) for s in shapes
        )
        run_pass(len(row), lambda: attention.attend(None, q, k, v, scaling).float().square().sum())  # noqa: B023


def layers(checkpointing: str) -> None:
    """A training pass of a network of two compiled layers, bfloat16, head dimension 128."""
    fields = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "head_dim": 128}
    fields |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": 4096}
    with torch.device("cuda"):
        config = model.SDARConfig(**fields)
        network = model.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdar", dtype=torch.bfloat16
        )
    network.train()
    kernels.checkpoint_layers(network, checkpointing)
    kernels.compile_layers(network)
    for length in LENGTHS:
        row = packed_row(length)
        with no_holds():
            run_pass(len(row), lambda: network.score(row, model.Sampling()).logprobs.mean())  # noqa: B023
        network.zero_grad()


def mask() -> list:
    """The tables of the mask of a packed row, which is laid out on the GPU too."""
    built = masking.block_mask(packed_row(LENGTHS[0]))
    return [list(built.kv_indices.shape), list(built.full_q_indices.shape)]


def scoring(dtype: str) -> None:
    """ScoreChunks with a real vocabulary, as many rows as several chunks; reveals and holds are one code."""
    hidden_size, dtype = 1024, getattr(torch, dtype)
    weight = torch.randn(VOCABULARY, hidden_size, dtype=dtype, device="cuda", requires_grad=True)
    for rows in (8192, 6001, 7000, 12001, 3000, 8191):
        hidden = torch.randn(rows, hidden_size, dtype=dtype, device="cuda", requires_grad=True)
        targets = torch.zeros(rows, dtype=torch.int64, device="cuda")
        bounds = torch.rand(rows, device="cuda")
        arguments = hidden, weight, targets, bounds, 1.0, -30.0
        run_pass(rows, lambda: kernels.ScoreChunks.apply(*arguments)[0].sum())  # noqa: B023
        PASSES[-1]["gradients"] = hidden.nbytes + weight.nbytes
        weight.grad = None


# ------------------------------------------------------------------------------ what they share


def packed_row(length: int):
    """Two sequences with views of every block, filled up to whole tiles, as `model.score` does it."""
    rng = np.random.default_rng(0)
    views = [masking.noise(rng.integers(0, 250, n).tolist(), 9, 4, rng, views=2) for n in (length, 36)]
    (row,) = masking.pack(views, 4, MASK_ID, token_budget=10**9)
    return masking.padded(row.to("cuda"))


@contextlib.contextmanager
def no_holds():
    """Scoring few logits asks once per row whether there are holds; fake tensors cannot tell."""
    torch.Tensor.__bool__ = lambda tensor: False
    try:
        yield
    finally:
        del torch.Tensor.__bool__


def run_pass(length: int, loss) -> None:
    """Forward and backward, with a note of what each launched, allocated and held at its peak."""
    noted = {"length": length}
    with Memory() as memory:
        for name in ("forward", "backward"):
            fake_gpu.LAUNCHED.clear()
            fake_gpu.ALLOCATED.clear()
            memory.peak = memory.now
            if name == "forward":
                value = loss()
            else:
                value.backward()
            noted[name] = {
                "launched": list(fake_gpu.LAUNCHED),
                "allocated": list(fake_gpu.ALLOCATED),
                "peak": memory.peak,
                "kept": memory.now,
            }
    noted["graphs"] = counters["stats"]["unique_graphs"]
    noted["breaks"] = dict(counters["graph_break"])
    noted["compiled"] = len(fake_gpu.COMPILED)
    PASSES.append(noted)


def main() -> None:
    functions = {"flex": flex, "layers": layers, "scoring": scoring, "mask": mask}
    found = {}
    for case in sys.argv[1:]:
        name, *parameters = case.split(":")
        torch._dynamo.reset()
        for noted in (counters, PASSES, fake_gpu.COMPILED):
            noted.clear()
        with fake_gpu.tensors():
            tables = functions[name](*parameters)
        found[case] = {"passes": list(PASSES), "kernels": list(fake_gpu.COMPILED), "tables": tables}
    print(json.dumps(found))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        fake_gpu.pretend(Path(folder))
        import numpy as np
        import torch
        from torch._dynamo.utils import counters
        from torch.utils._python_dispatch import TorchDispatchMode
        from torch.utils._pytree import tree_leaves

        sys.path.insert(0, str(ROOT))
        import masking
        import model
        from plumbing import kernels

        class Memory(TorchDispatchMode):
            """Bytes on the pretended GPU in what is made inside: now, and the most so far.

            (Compilation itself makes tensors too: only passes that compile nothing count.)
            """

            def __init__(self):
                super().__init__()
                self.now = self.peak = 0
                self.known = weakref.WeakSet()

            @classmethod
            def is_infra_mode(cls) -> bool:
                return True  # torch.compile goes on as usual

            def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
                for storage in self._unknown(args):  # was there before
                    self.known.add(storage)
                made = operator(*args, **(kwargs or {}))
                for storage in self._unknown(made):
                    self.known.add(storage)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._free, storage.nbytes())
                return made

            def _unknown(self, tree) -> list:
                tensors = [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor) and t.is_cuda]
                storages = {id(s): s for s in [t.untyped_storage() for t in tensors]}
                return [s for s in storages.values() if s not in self.known]

            def _free(self, nbytes: int) -> None:
                self.now -= nbytes

        main()
    fake_gpu.leave()
