"""Laws that one GPU shows: how kernels read windows, ranks as threads, graphs, and generic ops on our placements."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from flash_windows import as_flash_attn_2
from helpers import LAYOUTS, assert_like_kernel, make_case, run_loopback, single_device
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from dtensor_ring import (
    Documents,
    Zigzag,
    average_gradients,
    check_replicas,
    distribute_tensor,
    from_local,
    full_tensor,
    ring_attention,
)
from dtensor_ring.ops.kernels import KERNELS, Block, SoftmaxParams, VarlenMetadata, VarlenSegment

pytestmark = pytest.mark.gpu
WINDOWS = [(-1, -1), (-1, 0), (5, 0), (0, -1), (7, -1), (-1, 3), (-1, 40), (-1, 300), (4, 30), (300, 2), (64, 64), (500, 500)]
SHAPES = [(64, 64), (33, 200), (200, 33), (300, 3), (9, 3), (3, 9), (1, 70), (70, 1)]


@pytest.fixture(scope="module")
def mesh():
    """A mesh of one rank over NCCL."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29655", RANK="0", WORLD_SIZE="1")
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    yield init_device_mesh("cuda", (1,), mesh_dim_names=("cp",))
    dist.destroy_process_group()


def _sees_a_key(rows: int, columns: int, window: tuple[int, int]) -> torch.Tensor:
    left, right = window
    distance = torch.arange(columns) - torch.arange(rows)[:, None] - (columns - rows)
    seen = torch.ones_like(distance, dtype=torch.bool)
    seen &= (distance >= -left) if left >= 0 else True
    seen &= (distance <= right) if right >= 0 else True
    return seen.any(1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_flash_attention_2_reads_windows_as_the_stand_in_for_cpus_says(shape, window, packed):
    case, varlen = make_case(shape[0], k_length=shape[1], dim=64, batch=1, dtype=torch.bfloat16, device="cuda"), None
    read = as_flash_attn_2(window, shape[1])
    seen = _sees_a_key(*shape, read)
    if packed:
        varlen = VarlenMetadata.of([VarlenSegment(0, shape[0], 0, shape[1])], *shape, torch.device("cuda"))
    inputs, softmax = [x[0] if packed else x for x in case.inputs], SoftmaxParams(0.1)
    out = KERNELS["torch_flash"].forward(*inputs, Block(window, softmax, varlen)).out.reshape(shape[0], -1)
    meant = KERNELS["math"].forward(*inputs, Block(read, softmax, varlen)).out.reshape(shape[0], -1)
    assert (out.float() - meant.float())[seen.cuda()].abs().max() < 0.03


@pytest.mark.parametrize("lengths", [(300, 300), (300, 40), (40, 300)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_that_flash_attention_2_misreads_are_exact_over_ranks(layout, lengths):
    for is_causal, window in [(False, (7, -1)), (False, (0, -1)), (False, (-1, 40)), (True, (30, 0)), (False, (4, 30))]:
        case = make_case(lengths[0], k_length=lengths[1], dim=64, dtype=torch.bfloat16, device="cuda")
        case.is_causal, case.window = is_causal, window
        found = run_loopback(case, layout, 4, "ring", "torch_flash")[0]
        exact = case.exact()
        for name, a, b in zip(("out", "dq", "dk", "dv"), (found[0], *found[2:]), (exact[0], *exact[2:]), strict=True):
            assert (a.float() - b).abs().max() < 0.06 * b.abs().max(), f"{name} of window {window}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_rows_with_documents_of_their_own_err_like_one_gpu(layout):
    documents = Documents(((0, 90, 300), (0, 211, 300)))
    case = make_case(300, dim=64, documents=documents, dtype=torch.bfloat16, device="cuda")
    assert_like_kernel(run_loopback(case, layout, 4, "ring", "torch_flash")[0], single_device(case, "torch_flash"), case.exact())


@pytest.mark.parametrize("packed", [False, True])
def test_a_kernel_is_chosen_in_compiled_code(mesh, packed):
    documents = Documents.from_lengths([100, 156]) if packed else None

    def attend(x):
        placed = from_local(x, mesh, [Zigzag(1)], length=x.shape[1], run_check=False)
        return ring_attention(placed, placed, placed, documents=documents).to_local()

    x = torch.randn(1, 256, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    wanted = attend(x)
    out = torch.compile(attend, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (out, wanted)))


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_optimizers_and_clipping_on_gpus_are_those_of_plain_tensors(mesh, options):
    whole = torch.randn(13, 5, device="cuda")
    plain, placed = nn.Parameter(whole.clone()), nn.Parameter(distribute_tensor(whole, mesh, [Zigzag(0)]))
    optimizers = [torch.optim.AdamW([p], lr=0.1, **options) for p in (plain, placed)]
    for step in range(4):
        gradient = torch.randn(13, 5, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
        plain.grad, placed.grad = gradient.clone(), distribute_tensor(gradient, mesh, [Zigzag(0)])
        norms = [nn.utils.clip_grad_norm_([p], 1.0, foreach=options.get("foreach")) for p in (plain, placed)]
        torch.testing.assert_close(norms[1].full_tensor(), norms[0])
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(full_tensor(placed.detach()), plain.detach(), rtol=0, atol=1e-6)


def test_averages_of_one_rank_change_nothing(mesh):
    layer = nn.Linear(4, 4, device="cuda")
    layer.weight.grad = torch.ones(4, 4, device="cuda")
    average_gradients(layer, mesh)
    check_replicas(layer, mesh)
    assert torch.equal(layer.weight.grad, torch.ones(4, 4, device="cuda"))
