"""What would be silently wrong, or hang, is refused in words; what looked dangerous and is right, is right."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import grid, line, make_case, slow
from models import SIZES
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, placement_types
from transformers import LlamaConfig, LlamaForQuestionAnswering, LlamaForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dtensor_ring import (
    Contiguous,
    Documents,
    Zigzag,
    distribute_tensor,
    from_local,
    full_tensor,
    redistribute,
    ring_attention,
    ring_plan,
    shard_batch,
)
from dtensor_ring.__main__ import main
from dtensor_ring.functional import ring_flash_attn_func, substitute_hf_flash_attn, zigzag_ring_flash_attn_varlen_func
from dtensor_ring.functional.lengths import host_lengths


def ranks_that_disagree():
    mesh, rank = line(), dist.get_rank()
    whole = torch.randn(1, 16, 2, 8)
    local = distribute_tensor(whole, mesh, [Zigzag(1)]).to_local()
    mixed = from_local(local, mesh, [Zigzag(1) if rank else Contiguous(1)], length=16)
    for strategy in ("ring", "gather"):
        with pytest.raises(ValueError, match="another layout, dtype, mask"):
            ring_attention(mixed, mixed, mixed, strategy=strategy)
    placed = distribute_tensor(whole, mesh, [Zigzag(1)])
    with pytest.raises(ValueError, match="another layout, dtype, mask"):
        ring_attention(placed, placed, placed, scale=1.0 + rank)
    uneven = torch.zeros(1, 4 + 2 * rank, 2, 8)
    with pytest.raises(ValueError, match="has q, k, v of global shapes"):
        ring_flash_attn_func(uneven, uneven, uneven)
    packed, cu = torch.zeros(8, 2, 8), torch.tensor([0, 2 + 2 * rank, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="or documents than rank"):
        zigzag_ring_flash_attn_varlen_func(packed, packed, packed, cu, 8)
    with pytest.raises(ValueError, match="every rank passes a tensor of the same shape and dtype"):
        distribute_tensor(torch.zeros(4, dtype=torch.int32 if rank else torch.float32), mesh, [Zigzag(0)])
    embeds = torch.full((1, 8, 4), float(rank))
    with pytest.raises(ValueError, match="hold different batches"):
        shard_batch({"inputs_embeds": embeds}, mesh)
    with pytest.raises(ValueError, match="src_data_rank=7 is no rank"):
        distribute_tensor(torch.zeros(4), mesh, [Zigzag(0)], src_data_rank=7)


def test_ranks_that_make_different_calls_are_told(pools):
    pools.run(2, ranks_that_disagree)


def partial_sums():
    mesh = grid()
    local = torch.ones(3, 2)
    sums = DTensor.from_local(local, mesh, [Partial(), Zigzag(1)], shape=torch.Size((3, 4)), stride=(4, 1))
    for act in (lambda: sums + 1.5, lambda: sums.add_(1.5), lambda: sums + torch.tensor(2.0)):
        with pytest.raises(NotImplementedError, match="reduce the partial sums first"):
            act()
    assert torch.equal(full_tensor(sums + sums), torch.full((3, 4), 4.0))
    cube = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("sum", "mean", "cp"))
    mine = torch.full((3, 4), float(dist.get_rank()))
    both = DTensor.from_local(mine, cube, [Partial(), Partial("avg"), Zigzag(1)], shape=torch.Size((3, 4)), stride=(4, 1))
    assert torch.equal(full_tensor(both + both), torch.full((3, 4), 6.0)), "twice the mean of 0 + 2 and 1 + 3"
    largest = DTensor.from_local(local, mesh, [Partial("max"), Zigzag(1)], shape=torch.Size((3, 4)), stride=(4, 1))
    with pytest.raises(NotImplementedError, match="reduce the partial sums first"):
        largest + largest
    nested = placement_types._StridedShard(0, split_factor=2)  # noqa: TID251  made by FSDP2 over TP
    strided = DTensor.from_local(torch.ones(2, 4), mesh, [nested, Shard(0)], run_check=False)
    with pytest.raises(ValueError, match="is not supported: use Replicate, Shard, Partial or ours"):
        redistribute(strided, [Zigzag(0), Replicate()])


def test_partial_sums_take_part_in_sums_alone(pools):
    pools.run(4, partial_sums)


def second_derivatives():
    mesh = line()
    x = torch.randn(6, requires_grad=True)
    y = (full_tensor(distribute_tensor(x, mesh, [Zigzag(0)], src_data_rank=None)) * x**2).sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_second_derivatives_raise(pools):
    pools.run(2, second_derivatives)


def test_documents_are_checked_in_compiled_code_too():
    x = torch.randn(3, 16, 2, 8)
    attend = torch.compile(lambda q, d: ring_attention(q, q, q, documents=d), backend="eager", fullgraph=True)
    attend(x, Documents.from_lengths([4, 12]))
    for documents in (Documents.from_lengths([4, 26]), Documents.from_lengths([10])):
        with pytest.raises(Exception, match="documents end at token"):
            attend(x, documents)
    with pytest.raises(Exception, match="documents have 2 rows"):
        attend(x, Documents(((0, 16), (0, 3, 16))))


def test_alibi_compiles():
    x, slopes = torch.randn(1, 16, 2, 8), torch.tensor([0.5, 0.25])
    attend = torch.compile(lambda q: ring_attention(q, q, q, alibi_slopes=slopes), backend="eager", fullgraph=True)
    torch.testing.assert_close(attend(x), ring_attention(x, x, x, alibi_slopes=slopes))


def alibi_over_ranks_compiled(backend):
    mesh, slopes = line(), torch.tensor([0.5, 0.25])
    inputs = [torch.randn(1, 16, 2, 8, requires_grad=True) for _ in range(3)]

    def layer(q, k, v):
        placed = [from_local(x, mesh, [Zigzag(1)], length=32) for x in (q, k, v)]
        return ring_attention(*placed, alibi_slopes=slopes).to_local()

    answers = []
    for act in (layer, torch.compile(layer, backend=backend, fullgraph=True)):
        out = act(*inputs)
        answers.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for eager, compiled in zip(*answers, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("backend", [slow("eager"), "aot_eager"])
def test_alibi_over_ranks_compiles_with_its_gradients(pools, backend):
    pools.run(2, alibi_over_ranks_compiled, backend)


def test_autocast_does_not_reach_into_the_kernel():
    case = make_case(16, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in case.inputs]
    wanted = torch.autograd.grad(ring_attention(*leaves, kernel="math"), leaves, case.dout)
    with torch.autocast("cpu", torch.bfloat16):
        out = ring_attention(*leaves, kernel="math")
    for a, b in zip(torch.autograd.grad(out, leaves, case.dout), wanted, strict=True):
        assert torch.equal(a, b)


def one_mask_for_the_whole_batch():
    mesh = grid("cp", "tp")
    case = make_case(12, heads=(4, 4), batch=2)
    found = []
    for other in (Replicate(), Shard(2), Shard(0)):
        torch.manual_seed(3)
        placed = [distribute_tensor(x, mesh, [Zigzag(1), other], src_data_rank=None) for x in case.inputs]
        found.append(full_tensor(ring_attention(*placed, dropout_p=0.5, kernel="math")))
    torch.manual_seed(3)
    found.append(ring_attention(*case.inputs, dropout_p=0.5, kernel="math", strategy="local"))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-12)


def test_a_dropout_mask_does_not_depend_on_how_heads_and_rows_are_split(pools):
    pools.run(4, one_mask_for_the_whole_batch)


def modes_leave_nothing_behind():
    mesh, x = line(), torch.randn(2, 14, 3)
    with torch.inference_mode():
        full_tensor(redistribute(distribute_tensor(x, mesh, [Zigzag(1)]), [Contiguous(1)]))
    leaf = x.clone().requires_grad_()
    moved = redistribute(distribute_tensor(leaf, mesh, [Zigzag(1)]), [Contiguous(1)])
    full_tensor(moved).sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(x))
    with torch.device("meta"):
        distribute_tensor(x[:, :9], mesh, [Zigzag(1)], src_data_rank=None)
    assert torch.equal(full_tensor(distribute_tensor(x[:, :9], mesh, [Zigzag(1)])), x[:, :9])


def test_what_is_kept_between_calls_does_not_depend_on_modes(pools):
    pools.run(2, modes_leave_nothing_behind)


def test_lengths_are_read_again_where_changes_are_not_counted():
    values = np.array([0, 4, 8])
    cu = torch.from_numpy(values)
    assert host_lengths("cu_seqlens", cu) == (0, 4, 8)
    values[1] = 2
    assert host_lengths("cu_seqlens", cu) == (0, 2, 8)
    with torch.inference_mode():
        assert host_lengths("cu_seqlens", torch.tensor([0, 3])) == (0, 3)


@pytest.mark.parametrize("bounds", [[0, 3.7, 9], "09"])
def test_bounds_are_integers(bounds):
    with pytest.raises(TypeError):
        Documents((tuple(bounds),))


def rows_of_documents():
    with pytest.raises(ValueError, match="documents have 2 rows, but the batch has 4"):
        shard_batch({"input_ids": torch.zeros(4, 8, dtype=torch.int64)}, line(), documents=Documents(((0, 8), (0, 3, 8))))
    with pytest.raises(TypeError, match="labels must be a tensor"):
        shard_batch({"input_ids": torch.zeros(1, 3, dtype=torch.int64), "labels": [1, 2, 3]}, line())


def test_a_batch_that_does_not_fit_is_told(pools):
    pools.run(1, rows_of_documents)


@pytest.mark.parametrize("head", [LlamaForSequenceClassification, LlamaForQuestionAnswering])
def test_heads_that_pool_over_tokens_are_refused(head):
    with pytest.raises(NotImplementedError, match="heads that pool or pick tokens"):
        ring_plan(head(LlamaConfig(**SIZES)))


def undo_in_any_order():
    group, before = dist.group.WORLD, dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    for order in ((0, 1), (1, 0)):
        handles = [substitute_hf_flash_attn(group, 1), substitute_hf_flash_attn(group, 2)]
        handles[order[0]].undo()
        handles[1 - order[0]].update(torch.tensor([0, 4]))
        handles[order[1]].undo()
        assert before == ALL_ATTENTION_FUNCTIONS._local_mapping
    with pytest.raises(TypeError, match="takes a process group"):
        substitute_hf_flash_attn(None, 1)


def test_substitutions_are_undone_in_any_order(pools):
    pools.run(1, undo_in_any_order)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--layout", "stripe:00"], "unknown layout 'stripe:00'"),
        (["--layout", "zigzag/even", "--documents", "10,20,34"], "needs documents that 8 divides, found one of 10"),
        (["--documents", "10,20,"], "takes lengths between commas"),
    ],
)
def test_the_command_line_says_what_it_needs(capsys, arguments, text):
    with pytest.raises(SystemExit):
        main(["plan", *arguments])
    assert text in capsys.readouterr().err


def moves_in_compiled_code():
    placed = distribute_tensor(torch.arange(12.0), line(), [Zigzag(0)])
    for name, act in (("full_tensor", full_tensor), ("redistribute", lambda t: redistribute(t, [Contiguous(0)]))):
        with pytest.raises(Exception, match=f"{name} is not compiled: move tensors outside"):
            torch.compile(act, backend="eager", fullgraph=True)(placed)


def test_moves_are_refused_in_compiled_code(pools):
    pools.run(2, moves_in_compiled_code)
