"""Run the real LMDeploy engine on a CPU, for tests: `torch.cuda` stood in for, two operators in torch.

Scheduler, sampling, unmasking, weight loader, sleep and wake-up are LMDeploy's own. Stood in for are
the CUDA runtime (streams, events, memory figures), the paged attention and the mixture of experts;
everything else that CUDA has a kernel for falls back to LMDeploy's default implementation in torch. float32,
which LMDeploy refuses, is let through.

    LMDeployEngine.setup = "lmdeploy_on_cpu:install"    # with tests/ on PYTHONPATH
"""

import asyncio
import contextlib
import functools
import os
import sys
import threading
import types

import torch
from torch.overrides import TorchFunctionMode


@functools.cache
def install() -> None:
    """Once per process: the zygote of test_lmdeploy.py has done it for its forks."""
    fake_cuda()
    use_torch_operators()
    allow_float32()


class Stream:
    """A CUDA stream or event: the CPU does everything at once, so there is never anything to wait for."""

    def __init__(self, *_, **__):
        self.query = lambda: True
        self.elapsed_time = lambda other: 0.0

    def __getattr__(self, name):  # record, wait, synchronize, wait_event, wait_stream, ...
        return lambda *_, **__: None


class CudaIsCpu(TorchFunctionMode):
    """Every tensor that is asked for on "cuda" is made on the CPU."""

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        kwargs = {name: on_cpu(name, value) for name, value in (kwargs or {}).items()}
        args = [on_cpu("device", a) if isinstance(a, str | torch.device) else a for a in args]
        return function(*args, **kwargs)


def on_cpu(name, value):
    if name == "pin_memory":
        return False
    if name == "device" and (isinstance(value, int) or str(value).startswith("cuda")):
        return torch.device("cpu")
    return value


def fake_cuda() -> None:
    cuda, gib = torch.cuda, 2**30
    cuda.Stream = cuda.Event = Stream
    cuda.current_stream = cuda.default_stream = lambda *_, **__: Stream()
    cuda.stream = lambda *_: contextlib.nullcontext()
    for name in ("synchronize", "empty_cache", "set_device", "ipc_collect", "init", "_lazy_init"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.is_available = cuda.is_bf16_supported = lambda *_, **__: True
    cuda.current_device, cuda.device_count = lambda: "cpu", lambda: 1
    cuda.mem_get_info = lambda *_: (4 * gib, 8 * gib)
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_name = lambda *_: "cpu"
    hopper = {"name": "cpu", "major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 8 * gib}
    hopper |= {"warp_size": 32, "uuid": "0", "shared_memory_per_multiprocessor": 233472}
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(
        **hopper, shared_memory_per_block_optin=232448
    )
    cuda.memory_allocated = cuda.max_memory_allocated = cuda.memory_reserved = lambda *_: 0
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch._C._cuda_clearCublasWorkspaces = lambda: None
    torch._dynamo.config.disable = True  # it would compile for CUDA
    CudaIsCpu().__enter__()  # for the rest of the process, and below in the threads that it starts
    run = threading.Thread.run

    def run_on_cpu(self):
        with CudaIsCpu():
            run(self)

    threading.Thread.run = run_on_cpu


class PagedAttention:
    """Writes keys and values to their pages, then attends to all pages, block-causally, in torch."""

    def __init__(self, spec):
        self.block_size = max(1, spec.block_sparse_size or 1)
        self.scale = spec.scale or spec.head_dim**-0.5

    def forward(self, query, key, value, k_cache, v_cache, attn_metadata, **_):
        m, out, start = attn_metadata, torch.empty_like(query), 0
        for row, (new, total) in enumerate(zip(m.q_seqlens.tolist(), m.kv_seqlens.tolist(), strict=True)):
            positions = torch.arange(total)
            page = m.block_offsets[row, positions // k_cache.size(1)].long(), positions % k_cache.size(1)
            here = slice(start, start + new)
            newest = page[0][total - new :], page[1][total - new :]
            k_cache[newest], v_cache[newest] = key[here], value[here]
            groups = query.size(1) // key.size(1)
            k, v = (c[page].transpose(0, 1).repeat_interleave(groups, 0) for c in (k_cache, v_cache))
            block = positions // self.block_size
            seen = block[total - new :, None] >= block
            q = query[here].transpose(0, 1)
            attended = torch.nn.functional.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=seen, scale=self.scale
            )
            out[here] = attended[0].transpose(0, 1)
            start += new
        return out


class Experts:
    """Every expert on the tokens that were routed to it, one after the other."""

    def __init__(self, spec):
        self.renormalize = spec.renormalize

    def update_weights(self, gate_up, down):
        return gate_up, down

    def forward(self, hidden, weights, experts, gate_up, down, *_, **__):
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(hidden)
        for expert in range(len(down)):
            token, choice = (experts == expert).nonzero(as_tuple=True)
            gate, up = (hidden[token] @ gate_up[expert].T).chunk(2, dim=-1)
            answer = (torch.nn.functional.silu(gate) * up) @ down[expert].T
            out.index_add_(0, token, answer * weights[token, choice, None].to(out.dtype))
        return out


def use_torch_operators() -> None:
    from lmdeploy.pytorch.backends.attention import PagedAttentionBuildSpec
    from lmdeploy.pytorch.backends.cuda.op_backend import CudaOpsBackend
    from lmdeploy.pytorch.backends.default.op_backend import DefaultOpsBackend
    from lmdeploy.pytorch.backends.graph_runner import GraphRunner
    from lmdeploy.pytorch.backends.moe import FusedMoEBuildSpec

    def build_op(cls, spec, **kwargs):
        if isinstance(spec, PagedAttentionBuildSpec):
            return PagedAttention(spec)
        if isinstance(spec, FusedMoEBuildSpec):
            return Experts(spec)
        return DefaultOpsBackend.build_op.__func__(DefaultOpsBackend, spec, **kwargs)

    CudaOpsBackend.build_op = classmethod(build_op)
    CudaOpsBackend.build_graph_runner = staticmethod(GraphRunner)


def allow_float32() -> None:
    from lmdeploy import messages
    from lmdeploy.pytorch.config import ModelConfig

    Config = messages.PytorchEngineConfig
    check, build = Config.__post_init__, ModelConfig.from_pretrained.__func__
    wanted = []

    def accept(self):
        if self.dtype == "float32":
            wanted.append(torch.float32)
            self.dtype = "bfloat16"
        check(self)

    def with_dtype(cls, *args, **kwargs):
        config = build(cls, *args, **kwargs)
        if wanted:
            config.dtype = config.hf_config.dtype = wanted[0]
        return config

    Config.__post_init__, ModelConfig.from_pretrained = accept, classmethod(with_dtype)


# Broken on purpose: what the tests must notice. The child runs plumbing.lmdeploy_child as __main__.


def without(name: str) -> None:
    install()
    setattr(sys.modules["__main__"], name, lambda: None)


def without_sampling_fix() -> None:
    without("fix_sampling")


def without_stop_fix() -> None:
    without("fix_stop_words")


def upstreams_confidence() -> None:
    """Confidences as upstream computes them: a softmax in the dtype of the LM head."""
    install()
    child = sys.modules["__main__"]
    draw = child.draw

    def rounded(logits, *settings):
        drawn, _, log_g = draw(logits, *settings)
        return drawn, logits.softmax(-1).gather(-1, drawn[:, None])[:, 0].float().log(), log_g

    child.draw = rounded


def other_version() -> None:
    install()
    import lmdeploy

    lmdeploy.__version__ = "0.17.9"


def dies_when_asked() -> None:
    install()
    sys.modules["__main__"].Server.generate = lambda *_: os._exit(3)


def falls_silent() -> None:
    install()
    sys.modules["__main__"].Server.generate = lambda *_: asyncio.sleep(3600)


def stands_still() -> None:
    """Alive, with a heart beat, but no forward pass: as when a kernel never returns."""
    install()

    async def generate(server, *_):
        await server._beat()

    sys.modules["__main__"].Server.generate = generate
