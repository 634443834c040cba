"""Results of the FlexAttention kernels that Inductor writes for CUDA, computed by Triton's interpreter.

The kernels are generated as in fake_gpu.py, forward and backward, for the project's call and its BlockMask.
Where one would be launched, Triton's interpreter runs its source on CPU tensors: every fake tensor that goes
into a kernel has a tensor with numbers behind it (`Numbers`). The oracle is `dense_attention` and its
autograd. Real: the generated source, the grid, the tables of tiles. Left out: Triton's compiler, and with it
what it does to the order of sums; and bfloat16, whose bits the interpreter would multiply as integers. So the
numbers are float32, in tiles of the sizes that training has in bfloat16.

    python tests/cuda_on_cpu/flex_results.py     # prints a JSON object
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import types
from pathlib import Path

import fake_gpu

ROOT = Path(__file__).resolve().parents[2]
HEADS, KV_HEADS, DIM = 4, 2, 32
# What torch 2.13 takes for bfloat16 and head dimension 128 (compile_cases.py compiles it so).
TILES = {"fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 128}
TILES |= {"bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 64}
# Two lengths of each kind: the first is compiled as it is, all others with symbolic lengths.
ROWS = {"whole tiles": [[256, 20], [60, 36]], "a part of a tile at the end": [[60, 36], [256, 20]]}


class Numbers:
    """The CPU tensor behind each fake one, by storage: views of a fake tensor are views of its numbers."""

    def __init__(self):
        self.behind = {}

    def give(self, real):
        """A fake tensor on "cuda" that stands for a real one on the CPU."""
        fake = torch.empty_strided(real.size(), real.stride(), dtype=real.dtype, device="cuda")
        storage = fake.untyped_storage()
        self.behind[storage._cdata] = storage, real  # the storage is kept, so that no other gets its address
        return fake

    def of(self, fake):
        """What stands behind a fake tensor; KeyError for one that no kernel wrote."""
        _, real = self.behind[fake.untyped_storage()._cdata]
        with _disable_current_modes():
            return torch.as_strided(real, fake.size(), fake.stride(), fake.storage_offset())

    def empty_strided(self, size, stride, dtype):
        """A buffer that compiled code asks for. It is full of what would show if it were not written."""
        with _disable_current_modes():
            real = torch.empty_strided(size, stride, dtype=dtype)
            real.fill_(torch.nan if dtype.is_floating_point else -(2**20))
        return self.give(real)


def interpret(numbers: Numbers) -> list[str]:
    """From now on kernels run in Triton's interpreter. Returns a list that gets their names, as they run."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner, GridExpr

    names = []

    def run(self, *args, stream):
        config = max(self.configs, key=lambda c: c.kwargs.get("XBLOCK", 0))  # the fewest programs
        parameters = [name for name in self.fn.arg_names if name not in config.kwargs]
        parameters += self.inductor_meta.get("extra_launcher_args", [])  # the grid, where it is an argument
        values = [numbers.of(a) if isinstance(a, torch.Tensor) else a for a in args]
        values = dict(zip(parameters, values, strict=True)) | config.kwargs
        grid = GridExpr.from_meta(self.inductor_meta, config).eval_slow(values)
        with _disable_current_modes():
            self.fn[grid](**{name: values[name] for name in self.fn.arg_names})
        names.append(self.inductor_meta["kernel_name"])

    CachingAutotuner.run, CachingAutotuner.precompile = run, lambda *_, **__: None
    torch._C._dynamo.guards._empty_strided_cuda = numbers.empty_strided
    return names


def with_fakes(mask, numbers: Numbers):
    """The same BlockMask with fake tensors for its tables and for what its mask_mod has captured."""
    faked = copy.copy(mask)
    for name, value in vars(mask).items():
        if torch.is_tensor(value):
            setattr(faked, name, numbers.give(value))
    cells = []
    for cell in mask.mask_mod.__closure__:
        value = cell.cell_contents
        cells.append(types.CellType(numbers.give(value) if torch.is_tensor(value) else value))
    code = mask.mask_mod.__code__
    faked.mask_mod = types.FunctionType(code, mask.mask_mod.__globals__, closure=tuple(cells))
    return faked


def errors(lengths: list[int], whole: bool, launched: list[str], numbers: Numbers) -> dict:
    """Largest differences to dense attention: of the output, and of the gradients of q, k and v."""
    # A row, its masks and inputs with numbers.
    rng = np.random.default_rng(0)
    views = [masking.noise(rng.integers(0, 250, n).tolist(), 9, 4, rng, views=1) for n in lengths]
    (row,) = masking.pack(views, 4, 259, token_budget=10**9)
    row = masking.padded(row) if whole else row
    n, generator = len(row), torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)  # of q, k, v and the gradient of the output
    *inputs, slope = [torch.randn(1, h, n, DIM, generator=generator) for h in heads]
    mask, dense, scaling = masking.block_mask(row), masking.dense_mask(row), DIM**-0.5

    # The kernels, with fake tensors outside and numbers inside.
    launched.clear()
    with fake_gpu.tensors():
        fakes = [numbers.give(t).requires_grad_() for t in inputs]
        options = TILES | kernels.KERNEL_OPTIONS | {"IS_DIVISIBLE": n % masking.TILE == 0}
        out = kernels.flex_attention(*fakes, with_fakes(mask, numbers), scaling, options)
        gradients = torch.autograd.grad(out, fakes, numbers.give(slope))
        ours = [numbers.of(t) for t in (out, *gradients)]

    # The oracle.
    inputs = [t.requires_grad_() for t in inputs]
    out = kernels.dense_attention(*inputs, dense, scaling)
    theirs = [out, *torch.autograd.grad(out, inputs, slope)]
    found = {"tokens": n, "launched": list(launched), "tiles": tiles(mask)}
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        found[name] = ((a - b).norm() / b.norm()).item()
    return found


def tiles(mask) -> dict:
    """How many tiles of the mask are of each kind."""
    partial, full = int(mask.kv_num_blocks.sum()), int(mask.full_kv_num_blocks.sum())
    return {"partial": partial, "full": full, "empty": mask.kv_indices[0, 0].numel() - partial - full}


def main() -> None:
    numbers = Numbers()
    launched = interpret(numbers)
    found = {}
    for kind, rows in ROWS.items():
        found[kind] = [errors(r, kind == "whole tiles", launched, numbers) for r in rows]
    print(json.dumps(found))


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        fake_gpu.pretend(Path(folder))
        import numpy as np
        import torch
        from torch.utils._python_dispatch import _disable_current_modes

        sys.path.insert(0, str(ROOT))
        import masking
        from plumbing import kernels

        main()
    fake_gpu.leave()
