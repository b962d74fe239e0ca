"""What a call of attention costs the host, part by part, where next to nothing is computed and nothing is sent.

    python -m benchmarks.host_cost                          # the CPU, 8 tokens
    python -m benchmarks.host_cost --device cuda            # one GPU, 512 tokens
    python -m benchmarks.host_cost --device cuda --json host_cost.json
    python -m benchmarks.host_cost --device cuda --one-thread       # as under torch.autograd.set_multithreading_enabled(False)

One process is a mesh axis of one rank, so that what is measured is checking, dispatch, wrapping and autograd, not transfers. The
table goes from the kernel alone outwards, all rows by the same kernel:

    kernel              the kernel's own functions on (B, S, H, D) tensors
    executor            the plan of one rank walked on plain tensors
    autograd.Function   not that, but the kernel in a torch.autograd.Function of three lines: what any attention costs whose
                        backward pass is Python, which autograd runs on a thread of its own
    plain               ring_attention on plain tensors, which needs both
    DTensor             ring_attention on DTensors that were made before
    from_local          DTensors made of local tensors, ring_attention, to_local
    packed              DTensors of 2, 20 and 200 packed documents: the host should take as long (on GPUs; the CPU kernel works on
                        one document after the other)
    a layer             a decoder layer of a Hugging Face model with PyTorch's scaled_dot_product_attention forced to the same
                        kernel, with that autograd.Function, and under ring_plan: the difference of a deep and a shallow model,
                        by layers
    a batch             what is left of the shallow model: the batch cut and compared, embeddings, the loss

Every result is first compared with the kernel's. The least of some blocks of calls taken in turns, in microseconds: other programs
of the machine only ever add to what the host takes. On a GPU a block ends with a synchronization.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from benchmarks.record import device_name, facts, save
from benchmarks.targets import LAYER
from dtensor_ring import Documents, Zigzag, from_local, ring_attention, ring_plan
from dtensor_ring.comm import transport_along
from dtensor_ring.ops.executors.plan_executor import Executor
from dtensor_ring.ops.kernels import KERNELS, Block, Kernel, Saved, SoftmaxParams
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import plan

Calls = dict[str, Callable[[], object]]
SHALLOW, DEEP = 2, 10  # layers
HEADS, KV_HEADS = 4, 2
_ONE_THREAD = "Backward on the thread that calls it."


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, help="default: 8 on the CPU, 512 on a GPU")
    parser.add_argument("--calls", type=int, default=100, help="calls in a block")
    parser.add_argument("--blocks", type=int, default=9, help="blocks of each row")
    parser.add_argument("--no-model", action="store_true", help="leave the model's layers out (transformers is not needed then)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--one-thread", action="store_true", help="backward on the thread that calls it, not on autograd's own")
    options = parser.parse_args()
    torch.autograd.set_multithreading_enabled(not options.one_thread)
    tokens = options.tokens or (8 if options.device == "cpu" else 512)
    torch.set_num_threads(1)
    mesh = one_rank(options.device)
    print(f"{device_name(torch.device(options.device))}, torch {torch.__version__}, {tokens} tokens, W=1, microseconds a call")
    rows = {f"attention, {title}": timed(calls, options) for title, calls in attention_calls(mesh, tokens, options.device).items()}
    if options.device == "cuda":
        rows["packed, forward and backward"] = timed(packed_calls(mesh, 16 * tokens), options)
    if not options.no_model:
        options.calls = max(1, options.calls // 10)
        for title, calls in model_calls(mesh, tokens, options.device).items():
            spent = timed(calls, options)
            names = list(dict.fromkeys(name.partition(" x ")[0] for name in spent))
            layer = {name: (spent[f"{name} x {DEEP}"] - spent[f"{name} x {SHALLOW}"]) / (DEEP - SHALLOW) for name in names}
            rows[f"a layer, {title}"] = layer
            rows[f"a batch, {title}"] = {name: spent[f"{name} x {SHALLOW}"] - SHALLOW * layer[name] for name in names}
    for title, figures in rows.items():
        print(title)
        first, before = next(iter(figures.values())), 0.0
        for name, value in figures.items():
            print(f"  {name:<36}{value:>8.0f}   over the row above {value - before:>+8.0f}   over the first {value - first:>+8.0f}")
            before = value
    if options.json:
        save(
            options.json,
            facts("host_cost", torch.device(options.device), tokens=tokens, note=_ONE_THREAD if options.one_thread else ""),
            listed(rows),
        )
    dist.destroy_process_group()


def listed(rows: dict[str, dict[str, float]]) -> Iterator[dict[str, object]]:
    """The figures as a file keeps them, and last what the target is about: how much a layer costs more under ring_plan."""
    for title, figures in rows.items():
        before = 0.0
        for name, value in figures.items():
            yield {"table": title, "name": name, "us": value, "over_above_us": value - before}
            before = value
    layers = [rows[title] for title in ("a layer, forward", "a layer, forward and backward") if title in rows]
    if layers:
        over = [(layer["ring_plan"] - layer["scaled_dot_product_attention"]) / 1e3 for layer in layers]
        yield {"target": LAYER, "kernel": "torch_flash", "over_ms": over}


def kernel_of(device: str) -> str:
    """The kernel that all rows compute with."""
    return "torch_flash" if device == "cuda" else "torch_cpu"


def one_rank(device: str) -> DeviceMesh:
    """A mesh axis of this process alone."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device, (1,), mesh_dim_names=("cp",))


def attention_calls(mesh: DeviceMesh, tokens: int, device: str) -> dict[str, Calls]:
    """The rows of one attention, forward without gradients and forward with backward; their results are compared first."""
    kernel = KERNELS[kernel_of(device)]
    dim, dtype = (128, torch.bfloat16) if device == "cuda" else (16, torch.float32)
    shapes = [(1, tokens, heads, dim) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, dout = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    block = Block((-1, 0), SoftmaxParams(dim**-0.5))
    problem = AttentionProblem(Layout("zigzag"), Band.parse("causal"), tokens, tokens, 1)
    executor = Executor(plan(problem, 0), transport_along(mesh), kernel, block.softmax)

    def placed(tensors: list[Tensor]) -> list[Tensor]:
        return [from_local(x, mesh, [Zigzag(1)], length=tokens, run_check=False) for x in tensors]

    ready, ready_leaves = placed([q, k, v]), placed(leaves)
    local_dout = from_local(dout, mesh, [Zigzag(1)], length=tokens, run_check=False)

    def kernel_both() -> tuple[Tensor, ...]:
        out, lse = kernel.forward(q, k, v, block)
        return kernel.backward(Saved(q, k, v, out, lse), dout, block)

    def executor_both() -> tuple[Tensor, ...]:
        out, lse = executor.forward(q, k, v)
        return executor.backward(Saved(q, k, v, out, lse), dout)[:3]

    def without_gradients(act: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(act)

    def attended(tensors: list[Tensor]) -> Tensor:
        return ring_attention(*placed(tensors), kernel=kernel.name).to_local()

    forward: dict[str, Callable[[], Any]] = {
        "kernel": lambda: kernel.forward(q, k, v, block)[0],
        "executor": lambda: executor.forward(q, k, v)[0],
        "autograd.Function": without_gradients(lambda: _OfKernel.apply(q, k, v, kernel, block)),
        "plain": without_gradients(lambda: ring_attention(q, k, v, kernel=kernel.name)),
        "DTensor": without_gradients(lambda: ring_attention(*ready, kernel=kernel.name)),
        "from_local": without_gradients(lambda: attended([q, k, v])),
    }
    both: dict[str, Callable[[], Any]] = {
        "kernel": kernel_both,
        "executor": executor_both,
        "autograd.Function": lambda: torch.autograd.grad(_OfKernel.apply(*leaves, kernel, block), leaves, dout),
        "plain": lambda: torch.autograd.grad(ring_attention(*leaves, kernel=kernel.name), leaves, dout),
        "DTensor": lambda: torch.autograd.grad(ring_attention(*ready_leaves, kernel=kernel.name), ready_leaves, local_dout),
        "from_local": lambda: torch.autograd.grad(attended(leaves), leaves, dout),
    }
    check(forward)
    check(both)
    return {"forward": forward, "forward and backward": both}


class _OfKernel(torch.autograd.Function):
    """A kernel's own functions as autograd calls them, and nothing else."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, block: Block) -> Tensor:  # noqa: ANN401
        out, lse = kernel.forward(q, k, v, block)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernel, ctx.block = kernel, block
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        return *ctx.kernel.backward(Saved(*ctx.saved_tensors), dout.contiguous(), ctx.block), None, None


def packed_calls(mesh: DeviceMesh, tokens: int) -> Calls:
    """Calls on more and more documents of as many tokens in all; their metadata are made by the first call, as by a first layer."""
    q, k, v, dout = (
        torch.randn(1, tokens, heads, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )

    def attended(documents: Documents) -> object:
        placed = [from_local(x, mesh, [Zigzag(1)], length=tokens, run_check=False) for x in (q, k, v)]
        return torch.autograd.grad(
            ring_attention(*placed, documents=documents, kernel=kernel_of("cuda")).to_local(), (q, k, v), dout
        )

    lengths = {count: [tokens // count] * (count - 1) + [tokens - tokens // count * (count - 1)] for count in (2, 20, 200)}
    return {f"{count} documents": partial(attended, Documents.from_lengths(each)) for count, each in lengths.items()}


def check(calls: dict[str, Callable[[], Any]]) -> None:
    """Stop unless every row computes what the kernel does; the flash kernels' dq may differ from run to run by its rounding."""
    wanted, *others = (_listed(call()) for call in calls.values())
    for tensors in others:
        for mine, its in zip(tensors, wanted, strict=True):
            torch.testing.assert_close(mine, its, rtol=2e-2, atol=2e-2)


def _listed(result: Any) -> list[Tensor]:  # noqa: ANN401
    tensors = [result] if isinstance(result, Tensor) else list(result)
    return [x.to_local() if hasattr(x, "to_local") else x for x in tensors]


def model_calls(mesh: DeviceMesh, tokens: int, device: str) -> dict[str, Calls]:
    """A small Llama with PyTorch's attention by the same kernel, and under ring_plan: the losses are compared first."""
    from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM

    stocks = {"scaled_dot_product_attention": _same_kernel, "autograd.Function": partial(_in_function, KERNELS[kernel_of(device)])}
    for name, attention in stocks.items():
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, lambda *_shapes, **_mask: None)
    dim, dtype = (128, torch.bfloat16) if device == "cuda" else (16, torch.float32)
    ids = torch.randint(0, 1000, (1, tokens), device=device)
    models: dict[str, Any] = {}
    for layers in (SHALLOW, DEEP):
        config = LlamaConfig(
            hidden_size=HEADS * dim,
            intermediate_size=2 * HEADS * dim,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=dim,
            vocab_size=1000,
        )
        alike = {name: LlamaForCausalLM(copy.deepcopy(config)).to(device, dtype) for name in (*stocks, "ring_plan")}
        first, *others = alike.values()
        for model in others:
            model.load_state_dict(first.state_dict())
        for name in stocks:
            alike[name].set_attn_implementation(name)
        parallelize_module(alike["ring_plan"], mesh["cp"], ring_plan(alike["ring_plan"], Zigzag(1), kernel=kernel_of(device)))
        for model in others:
            torch.testing.assert_close(_loss(model, ids), _loss(first, ids), rtol=1e-2, atol=1e-2)
        models |= {f"{name} x {layers}": model for name, model in alike.items()}
    return {
        "forward": {name: torch.no_grad()(partial(_loss, model, ids)) for name, model in models.items()},
        "forward and backward": {name: partial(_step, model, ids) for name, model in models.items()},
    }


def _loss(model: Any, ids: Tensor) -> Tensor:  # noqa: ANN401
    return model(input_ids=ids, labels=ids).loss


def _step(model: Any, ids: Tensor) -> None:  # noqa: ANN401
    model.zero_grad()
    _loss(model, ids).backward()


def _same_kernel(
    _module: object, query: Tensor, key: Tensor, value: Tensor, _mask: object, scaling: float | None = None, **_rest: object
) -> tuple[Tensor, None]:
    """Attention of one device by the flash kernel, as transformers calls it."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


def _in_function(
    kernel: Kernel,
    _module: object,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: object,
    scaling: float | None = None,
    **_rest: object,
) -> tuple[Tensor, None]:
    """The same in a torch.autograd.Function."""
    block = Block((-1, 0), SoftmaxParams(scaling or query.shape[-1] ** -0.5))
    return _OfKernel.apply(*(x.transpose(1, 2) for x in (query, key, value)), kernel, block), None


def timed(calls: Calls, options: argparse.Namespace) -> dict[str, float]:
    """Microseconds a call of each, the least of all blocks, measured in turns."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.blocks):
        for name, call in calls.items():
            call()
            _synchronize(options.device)
            begin = time.perf_counter()
            for _ in range(options.calls):
                call()
            _synchronize(options.device)
            spent[name].append((time.perf_counter() - begin) / options.calls * 1e6)
    return {name: min(values) for name, values in spent.items()}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
