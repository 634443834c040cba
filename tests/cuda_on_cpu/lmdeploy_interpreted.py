"""LMDeploy's CUDA back end on a CPU: its own Triton kernels, in Triton's interpreter.

Paged attention, cache filling, rotary embedding, norms, activation and sampling are the code that runs on a
GPU, a program instance at a time. So is the CUDA graph runner, with its padding to captured batch sizes and
its buffers at fixed places; only the capture itself is left out (LMDeploy's own switch for that).

    LMDeployEngine.setup = "lmdeploy_interpreted:install"    # with tests/ and this folder on PYTHONPATH,
                                                             # with TRITON_INTERPRET=1 and
                                                             # LMDEPLOY_FAKE_CUDA_GRAPH_CAPTURE=1

What the interpreter cannot show: compilation, races between threads, speed.
"""

import math
import sys

import lmdeploy_on_cpu
import torch


def install() -> None:
    """Stand-ins for the CUDA runtime, and what Triton's interpreter lacks."""
    lmdeploy_on_cpu.fake_cuda()
    lmdeploy_on_cpu.allow_float32()
    one_multiprocessor()
    torch.cuda.graph_pool_handle = lambda *_: (0, 0)
    pretend_a_hopper()
    give_functions_to_the_interpreter()
    note_kernels()


def one_multiprocessor() -> None:
    """Work is split for the multiprocessors there are: with one, a step takes 30 times fewer instances."""
    properties = torch.cuda.get_device_properties()
    properties.multi_processor_count = 1
    torch.cuda.get_device_properties = lambda *_: properties


def pretend_a_hopper() -> None:
    """Triton asks its driver for the device, to choose kernels and block sizes."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    properties = {"max_shared_mem": 232448, "multiprocessor_count": 1, "warpSize": 32, "max_num_regs": 65536}

    class Driver:
        utils = type("Utils", (), {"get_device_properties": staticmethod(lambda _: properties)})
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
        get_device_interface = staticmethod(lambda: torch.cuda)
        get_current_stream = staticmethod(lambda _: 0)

    driver.set_active(Driver())


def give_functions_to_the_interpreter() -> None:
    """Functions that the kernels hold under a name of their own, where the interpreter does not find them."""
    import lmdeploy.pytorch.kernels.cuda  # noqa: F401, all of its modules
    import triton.language as tl

    own = {
        "tl_log2": lambda x: math.log2(x) if isinstance(x, float) else tl.log2(x),
        "tl_exp2": lambda x: tl.exp2(x),
        "fast_expf": lambda x: tl.exp(x),
        "fast_dividef": lambda x, y: x / y,
        "tanh": lambda x: 2 / (1 + tl.exp(-2 * x)) - 1,
    }
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("lmdeploy.pytorch.kernels.cuda"):
            for name in own.keys() & vars(module).keys():
                setattr(module, name, own[name])
    # Hints to the hardware, for programs that depend on one another.
    tl.extra.cuda.gdc_wait = tl.extra.cuda.gdc_launch_dependents = lambda *_, **__: None


def note_kernels() -> None:
    """Print each kernel when it runs first, and each capture; grids may be lists, as in compiled Triton."""
    from lmdeploy.pytorch.backends.cuda.graph_runner.full_graph import CUDASingleGraphRunner
    from triton.runtime.interpreter import GridExecutor

    run, capture, used = GridExecutor.__call__, CUDASingleGraphRunner.capture, set()

    def run_and_note(self, *args, **kwargs):
        if self.fn.__name__ not in used:
            used.add(self.fn.__name__)
            print("\nkernel", self.fn.__name__, file=sys.stderr, flush=True)
        if isinstance(self.grid, list):
            self.grid = tuple(self.grid)
        return run(self, *args, **kwargs)

    def capture_and_note(self, **kwargs):
        output = capture(self, **kwargs)
        print("\ngraph captured for", self.meta.max_batchs, file=sys.stderr, flush=True)
        return output

    GridExecutor.__call__, CUDASingleGraphRunner.capture = run_and_note, capture_and_note
