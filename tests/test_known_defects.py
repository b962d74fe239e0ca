"""What is known to be wrong, as laws that do not hold yet. Whoever mends one removes its mark, or the run fails."""

from __future__ import annotations

import datetime
import gc

import pytest
import torch
import torch.distributed as dist
from test_transformers import SIZES, make_batch, make_model, worst
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from transformers import AutoModelForCausalLM, LlamaConfig

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
)
from dtensor_ring.functional import ring_flash_attn_func


def line():
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))


def overlapping_groups():
    """One rank of a group makes hundreds of calls over another group: both still know what the first group compared."""
    rank, seconds = dist.get_rank(), datetime.timedelta(seconds=6)
    first, second = (dist.new_group(ranks, timeout=seconds) for ranks in ([0, 1], [0, 2]))
    x = torch.ones(1, 2, 1, 8)
    if rank in (0, 1):
        ring_flash_attn_func(x, x, x, group=first)
    if rank in (0, 2):
        for i in range(520):
            ring_flash_attn_func(x, x, x, softmax_scale=1.0 + i, group=second)
    if rank in (0, 1):
        ring_flash_attn_func(x, x, x, group=first)


@pytest.mark.xfail(strict=True, reason="defect 1: what ranks compared is kept in a cache of the process, not of their group")
def test_what_a_group_compared_does_not_depend_on_calls_over_other_groups(pools):
    pools.run(3, overlapping_groups, timeout=60)


def a_group_made_again():
    """A group that takes the name of one that ended compares its first call anew."""
    rank, x = dist.get_rank(), torch.ones(1, 2, 1, 8)
    names = []
    for scales in ((1.0, 1.0), (1.0, 2.0)):
        store = dist.TCPStore("127.0.0.1", 29641 + len(names), 2, rank == 0, datetime.timedelta(seconds=20))
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=6))
        names.append(dist.group.WORLD.group_name)
        if scales[0] == scales[1]:
            ring_flash_attn_func(x, x, x, softmax_scale=1.0)
        else:
            with pytest.raises(ValueError, match="another layout, dtype, mask"):
                ring_flash_attn_func(x, x, x, softmax_scale=scales[rank])
    assert names[0] == names[1], "or the test shows nothing"


@pytest.mark.xfail(strict=True, reason="defect 1: agreement outlives the group, under its name")
def test_a_group_made_again_compares_calls_again():
    from pool import Pool

    pool = Pool(2)
    try:
        pool.run(a_group_made_again, timeout=60)
    finally:
        pool.close()


def gathered_loss():
    mesh, batch = line(), make_batch(17)
    reference, model = make_model("llama"), make_model("llama")
    reference(**batch, use_cache=False).logits.square().mean().backward()
    plan = ring_plan(model, Zigzag(1))
    parallelize_module(model, mesh, plan)
    plan.gather(model(**batch).logits).square().mean().backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    assert worst(zip((p.grad for p in model.parameters()), (p.grad for p in reference.parameters()), strict=True)) < 1e-6


@pytest.mark.xfail(strict=True, reason="defect 7: plan.gather wants summed gradients, .loss averaged ones")
def test_averaged_gradients_of_gathered_outputs_are_those_of_one_process(pools):
    pools.run(2, gathered_loss)


def gathered_late():
    mesh, model, reference = line(), make_model("llama"), make_model("llama")
    plan = ring_plan(model, Zigzag(1, per_document=True))
    parallelize_module(model, mesh, plan)
    batches = []
    for lengths in ([9, 15], [3, 14, 7]):
        ids = make_batch(24, rows=1)["input_ids"]
        batches.append({"input_ids": ids, "position_ids": Documents.from_lengths(lengths).position_ids()})
    first, _second = (model(**batch).logits for batch in batches)
    mask = torch.block_diag(*(torch.ones(n, n).tril() for n in (9, 15))).bool()[None, None]
    wanted = reference(**batches[0], attention_mask=mask, use_cache=False).logits
    try:
        gathered = plan.gather(first)
    except (ValueError, RuntimeError):
        return
    torch.testing.assert_close(gathered, wanted, rtol=0, atol=1e-10)


@pytest.mark.xfail(strict=True, reason="defect 7: gather takes the documents of the last batch for those of its tensor")
def test_an_output_gathered_after_another_batch_is_right_or_raises(pools):
    pools.run(2, gathered_late)


def parted_numbers():
    """Both calls are known to all; then ranks make different ones, of the same sizes."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=8))
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
    x = distribute_tensor(torch.randn(1, 16, 2, 8), mesh, [Zigzag(1)])
    for scale in (1.0, 2.0):
        ring_attention(x, x, x, scale=scale)
    import dtensor_ring.debug

    with dtensor_ring.debug.check_every_call(), pytest.raises(ValueError, match="every rank must make the same call"):
        ring_attention(x, x, x, scale=1.0 + dist.get_rank())


@pytest.mark.xfail(strict=True, reason="defect 11: ranks that part after both calls are known are not found out")
def test_ranks_that_part_on_later_calls_are_found_where_every_call_is_checked(pools):
    pools.run(2, parted_numbers, timeout=60)


def packed_calls(changes: str) -> float:
    """Python objects that stay for each call after a warm-up, with another number of documents, or length, in every call."""
    mesh, calls = line(), 60

    def call(i: int) -> None:
        length = 512 if changes == "documents" else 512 + 2 * i
        documents = [0, *range(2, 2 * (i + 1), 2), length] if changes == "documents" else [0, 7, length]
        share = torch.ones(1, length // 2, 1, 8)
        x = from_local(share, mesh, [Contiguous(1)], length=length, check=False)
        ring_attention(x, x, x, documents=documents)

    for i in range(20):
        call(i)
    gc.collect()
    before = len(gc.get_objects())
    for i in range(20, 20 + calls):
        call(i)
    gc.collect()
    return (len(gc.get_objects()) - before) / calls


@pytest.mark.xfail(strict=True, reason="defect 12: shapes of packed documents and lengths stay in PyTorch's dispatch caches")
@pytest.mark.parametrize("changes", ["documents", "lengths"])
def test_packed_calls_leave_no_objects_behind(pools, changes):
    assert max(pools.run(2, packed_calls, changes)) < 2


def kept_bytes() -> int:
    """Bytes of tensors that stay after moves of many lengths."""
    mesh = line()

    def held() -> int:
        gc.collect()
        return sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor and x.device.type == "cpu" and x._base is None)

    before = held()
    for i in range(60):
        x = distribute_tensor(torch.empty(200_000 + i), mesh, [Zigzag(0)], src_data_rank=None)
        full_tensor(redistribute(x, [Contiguous(0)]))
    return held() - before


@pytest.mark.xfail(strict=True, reason="defect 13: caches of index tensors are bounded by entries, not by bytes")
def test_what_moves_keep_is_bounded_in_bytes(pools):
    assert max(pools.run(2, kept_bytes)) < 64 << 20


def graphs_of_packed_batches() -> int:
    mesh, graphs = line(), []
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation="sdpa")
    parallelize_module(model, mesh, ring_plan(model))

    def count(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        for documents in range(1, 13):
            positions = Documents.from_lengths([3] * documents + [64 - 3 * documents]).position_ids()
            compiled(input_ids=torch.zeros(1, 64, dtype=torch.int64), position_ids=positions)
    return len(graphs)


@pytest.mark.xfail(strict=True, reason="defect 14: a graph of the whole model for every number of documents")
def test_a_compiled_model_makes_no_graph_for_each_number_of_documents(pools):
    assert max(pools.run(2, graphs_of_packed_batches, timeout=250)) <= 8
