"""The CUDA path without a GPU: what torch.compile makes of it for an H200.

fake_gpu.py says what is real (all compilers, down to NVIDIA's assembler) and what is pretended (the device);
compile_cases.py has the cases. They run in processes of their own, several cases in each, since starting one
takes seconds. CPU time on one thread of a 2-core machine, torch 2.13 and Triton 3.9: the three layers 86 s,
one of them marked `slow`; the scoring of bfloat16 10 s; all four of FlexAttention 61 s, of which three are.
"""

import functools
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_gpu import SHARED_MEMORY

from plumbing.kernels import SCORING_BYTES

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton"),
    pytest.mark.skipif(not shutil.which("g++"), reason="needs g++, for one_gpu.cpp"),
]

GROUPS = [
    ["mask", "flex:bfloat16:128"],
    ["layers:selective", "layers:full"],
    ["scoring:bfloat16"],
    ["flex:bfloat16:64", "flex:float32:64", "flex:float32:128"],
    ["scoring:float32"],
    ["layers:none"],
]
SLOW = GROUPS[3] + GROUPS[4] + GROUPS[5]

# Bytes of stack of a thread, where they are not 0: registers spilled to memory. (forward, backward) of
# FlexAttention with torch's own tile sizes. Measured with Triton 3.7.1 and 3.9.0: 240 to 480 for the backward
# kernel that training runs; head dimension 64 and float32 are for tests only.
STACK = {
    "flex:bfloat16:128": (0, 640),
    "layers": (0, 640),
    "flex:bfloat16:64": (1024, 128),
    "flex:float32:64": (2048, 128),
    "flex:float32:128": (2048, 512),
}


@functools.cache
def compiled(group: int) -> dict:
    """What compile_cases.py found: {case: {"passes": [...], "kernels": [...]}}."""
    command = [sys.executable, "-W", "ignore", HERE / "compile_cases.py", *GROUPS[group]]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def result(case: str) -> dict:
    return compiled(next(i for i, group in enumerate(GROUPS) if case in group))[case]


def cases(*names: str):
    """Parameters: all cases of these names, the slow ones marked."""
    found = []
    for case in sum(GROUPS, []):
        if case.split(":")[0] in names:
            found.append(pytest.param(case, marks=[pytest.mark.slow] if case in SLOW else []))
    return pytest.mark.parametrize("case", found)


@cases("flex", "layers")
def test_two_compilations_serve_all_lengths(case):
    passes = result(case)["passes"]
    assert [p["graphs"] for p in passes] == [1, 2, 2, 2], "the first length, then any"
    assert [p["compiled"] for p in passes[2:]] == [passes[1]["compiled"]] * 2, (
        "no kernel after the second length"
    )
    assert not any(p["breaks"] for p in passes)


@cases("scoring")
def test_scoring_compiles_for_two_lengths_only(case):
    """Two graphs of each of two functions, the first size and then any, wherever slices begin."""
    passes = result(case)["passes"]
    assert [p["graphs"] for p in passes] == [passes[0]["graphs"]] + [4] * (len(passes) - 1)
    assert {p["compiled"] for p in passes[1:]} == {passes[1]["compiled"]}
    assert not any(p["breaks"] for p in passes)


@cases("flex", "layers", "scoring")
def test_kernels_fit_on_an_sm(case):
    kernels = result(case)["kernels"]
    assert {k["target"] for k in kernels} == {90}
    assert max(k["shared"] for k in kernels) <= SHARED_MEMORY
    forward, backward = STACK.get(case, STACK.get(case.split(":")[0], (0, 0)))
    for name, variants in by_source(kernels).items():
        bound = {"forward": forward, "backward": backward}.get(flex_pass(name), 0)
        assert min(k["stack"] for k in variants) <= bound, f"{name}: {variants}"


def by_source(kernels: list[dict]) -> dict[str, list[dict]]:
    """The variants of each kernel, of which a GPU would take the fastest: one without spills is enough."""
    found = {}
    sources = [kernel["source"] for kernel in kernels]
    for kernel in kernels:
        figures = {name: value for name, value in kernel.items() if name != "source"}
        number = sources.index(kernel["source"])  # a name may stand for several kernels
        found.setdefault(f"{kernel['name']} ({number})", []).append(figures)
    return found


def flex_pass(name: str) -> str | None:
    """Of which pass of FlexAttention this is the kernel."""
    if not name.startswith("triton_tem_") or "flex_attention" not in name:
        return None
    return "backward" if "flex_attention_backward" in name else "forward"


@cases("flex", "layers")
def test_flex_kernels_check_no_borders_and_guarantee_no_row(case):
    """What the caller knows gets into both kernels, with symbolic lengths too."""
    sources = [k["source"] for k in result(case)["kernels"] if flex_pass(k["name"])]
    # Forward and backward, for the first length and for any; "full" has the forward once more.
    assert len(sources) == (6 if case == "layers:full" else 4)
    for source in sources:
        assert "IS_DIVISIBLE : tl.constexpr = True" in source
        assert "ROWS_GUARANTEED_SAFE : tl.constexpr = False" in source


@cases("layers")
def test_what_the_backward_pass_computes_again(case):
    """Two layers: attention is computed again in "full" only."""
    again = 2 if case == "layers:full" else 0
    for each in result(case)["passes"]:
        assert [flex_pass(name) for name in each["forward"]["launched"]].count("forward") == 2
        assert [flex_pass(name) for name in each["backward"]["launched"]].count("backward") == 2
        assert [flex_pass(name) for name in each["backward"]["launched"]].count("forward") == again


@pytest.mark.slow
def test_checkpointing_keeps_less():
    """Bytes left on the GPU after the forward pass of the last row."""
    kept = [
        result(f"layers:{mode}")["passes"][-1]["forward"]["kept"] for mode in ("none", "selective", "full")
    ]
    assert kept[0] > 1.2 * kept[1] > 1.5 * kept[2], kept


@cases("scoring")
def test_scoring_makes_no_copy_of_its_logits(case):
    """In bfloat16 the compiled forward pass asks for no buffer [rows, V], the backward for one per chunk."""
    if "float32" in case:
        return
    for each in result(case)["passes"]:
        chunks = len(each["backward"]["launched"])  # one kernel per chunk
        assert not wide(each["forward"]["allocated"])
        buffers = wide(each["backward"]["allocated"])
        assert len(buffers) == chunks
        assert {dtype for _, dtype in buffers} == {"bfloat16"}
        assert sum(rows for (rows, _), _ in buffers) == each["length"]


def wide(buffers: list) -> list:
    """Those as wide as the vocabulary."""
    return [(shape, dtype) for shape, dtype in buffers if len(shape) == 2 and shape[1] == 151936]


@cases("scoring")
def test_scoring_stays_within_its_bytes(case):
    """All that it has on the GPU at a time, beside the gradients that it returns."""
    for each in result(case)["passes"][2:]:  # the first two compile
        slack = 2**25  # [rows] vectors
        assert each["forward"]["peak"] <= SCORING_BYTES + slack
        assert each["backward"]["peak"] <= SCORING_BYTES + each["gradients"] + slack


def test_the_mask_waits_for_nothing():
    """Fake tensors raise on every operator whose result would have to be read. (2,176 tokens: 17 tiles.)"""
    assert result("mask")["tables"] == [[1, 1, 17, 17]] * 2
