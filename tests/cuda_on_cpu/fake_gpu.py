"""A pretended H200 for torch.compile, on a machine without a GPU and with the CPU build of torch.

Real: Dynamo, AOTAutograd, Inductor with the choices that it makes for compute capability 9.0, Triton, and
NVIDIA's assembler (ptxas, in Triton's wheel). Every kernel ends as a cubin for sm_90a, whose registers, stack
and shared memory are NVIDIA's figures.

Pretended, and by what:

    tensors      torch's fake tensors: shapes, dtypes and a device "cuda:0", without numbers
    the device   one_gpu.cpp for torch's C++ side; `_answer_like_an_h200` for torch.cuda and Inductor
    the driver   `Driver` knows only the target that Triton is to compile for
    launches     a kernel is compiled where it would be launched, noted in LAUNCHED, and not run

So this shows that kernels are generated, compile and fit, how often, which ones a pass would launch, and
which buffers compiled code asks for. It shows no result and no time.

All of it changes torch for the whole process, which therefore runs nothing else:

    import fake_gpu              # before torch
    fake_gpu.pretend(folder)
    with fake_gpu.tensors():
        torch.compile(f)(torch.randn(8, device="cuda"))
    fake_gpu.COMPILED, fake_gpu.LAUNCHED, fake_gpu.ALLOCATED
    fake_gpu.leave()             # not by returning: torch would wait for the device's threads
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path

SHARED_MEMORY = 232448  # bytes a block may have on an SM of compute capability 9.0
H200 = {
    "name": "NVIDIA H200",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 139 * 2**30,
    "warp_size": 32,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_block": 1024,
    "max_threads_per_multi_processor": 2048,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": SHARED_MEMORY,
    "shared_memory_per_multiprocessor": 233472,
    "L2_cache_size": 60 * 2**20,
    "gcnArchName": "",
    "uuid": "0",
}

COMPILED: list[dict] = []  # one per cubin: name, source, config, shared, registers, stack (bytes)
LAUNCHED: list[str] = []  # names of kernels, in the order of their launches
ALLOCATED: list[tuple] = []  # (shape, dtype) of every buffer that compiled code asked for


def pretend(folder: Path) -> None:
    """Turn this process into one that has an H200. Nothing may have imported torch before.

    Args:
        folder: for the compiled one_gpu.cpp and for the caches of Inductor and Triton; empty.
    """
    assert "torch" not in sys.modules
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process, where the patches are
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    ctypes.CDLL(str(_build(folder)))
    import torch

    assert torch._C._get_accelerator().type == "cuda"
    torch.set_num_threads(1)
    _answer_like_an_h200()
    _compile_for_an_h200()
    _launch_nothing()


def tensors():
    """Inside, torch makes fake tensors; real ones on the CPU may be moved to "cuda"."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def leave() -> None:
    """End the process at once, with success."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _build(folder: Path) -> Path:
    torch = Path(importlib.util.find_spec("torch").origin).parent  # found, not imported
    library = folder / "one_gpu.so"
    command = [
        "g++",
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-o",
        library,
        Path(__file__).with_name("one_gpu.cpp"),
    ]
    command += [f"-I{torch}/include", f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    return library


# ----------------------------------------------------------------------------- the device


def _always(value):
    return lambda *_, **__: value


class Nothing:
    """A stream, an event or a device guard: takes every call and does nothing."""

    device, device_index, cuda_stream = "cuda:0", 0, 0

    def __init__(self, *_, **__): ...
    def __enter__(self): ...
    def __exit__(self, *_): ...
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _always(None)


def _answer_like_an_h200() -> None:
    import torch
    import torch._dynamo.device_interface as device_interface

    properties = types.SimpleNamespace(**H200)
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "_is_compiled": True,
        "_lazy_init": None,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "get_device_name": H200["name"],
        "current_stream": Nothing(),
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, _always(value))
    torch.cuda.device = torch.cuda._DeviceGuard = Nothing
    torch._C._cuda_getCurrentRawStream = _always(0)
    answers |= {"exchange_device": 0, "maybe_exchange_device": 0, "get_raw_stream": 0}
    for name, value in answers.items():
        setattr(device_interface.CudaInterface, name, staticmethod(_always(value)))
    device_interface.CudaInterface.device = Nothing
    device_interface.get_cuda_stream = _always(0)


# --------------------------------------------------------------------------- the compilers


class Driver:
    """The part of Triton's driver that its compiler asks."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_device_capability(self, *_):
        return 9, 0

    get_current_device = get_current_stream = staticmethod(_always(0))


def _compile_for_an_h200() -> None:
    import torch._inductor.runtime.triton_helpers as triton_helpers
    import torch.utils._triton
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.runtime import driver

    driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = _always(None)
    torch.utils._triton.has_triton = _always(True)
    # These two would make real tensors on the device.
    FakeTensorMode.avoid_device_init = True
    torch._inductor.config.joint_graph_constant_folding = False
    # Without their names in them, equal kernels are compiled once. (It is the names that are noted here.)
    torch._inductor.config.triton.unique_kernel_names = False


def _launch_nothing() -> None:
    import torch
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner, StaticTritonCompileResult

    compile_config = CachingAutotuner._precompile_config

    def compile_and_note(self, config):
        result = compile_config(self, config)
        COMPILED.append(_about(self, config, result.kernel))
        return result

    def note(self, *_, **__):
        if not self.compile_results:
            self.precompile()
        LAUNCHED.append(self.inductor_meta["kernel_name"])

    CachingAutotuner._precompile_config = compile_and_note
    CachingAutotuner._make_launchers = _always(None)
    CachingAutotuner.run = note
    StaticTritonCompileResult.can_statically_launch = staticmethod(_always(None))

    def empty_strided(size, stride, dtype):
        ALLOCATED.append((tuple(size), str(dtype).removeprefix("torch.")))
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")

    def reinterpret(tensor, size, stride, offset=0):
        return torch.as_strided(tensor, size, stride, offset)

    torch._C._dynamo.guards._empty_strided_cuda = empty_strided
    torch._C._dynamo.guards._reinterpret_tensor = reinterpret


def _about(autotuner, config, kernel) -> dict:
    """A compiled kernel in figures."""
    registers, stack = _resources(kernel.asm["cubin"])
    return {
        "name": autotuner.inductor_meta["kernel_name"],
        "source": autotuner.fn.src,
        "target": kernel.metadata.target.arch,
        "warps": config.num_warps,
        "stages": config.num_stages,
        "shared": kernel.metadata.shared,
        "registers": registers,
        "stack": stack,
    }


@functools.cache
def _resources(cubin: bytes) -> tuple[int, int]:
    """Of a thread, as cuobjdump reads them: registers, and bytes of stack, spilled registers included."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    file = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    file.write_bytes(cubin)
    said = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout).groups()
    return int(registers), int(stack)
