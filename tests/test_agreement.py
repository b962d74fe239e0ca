"""What ranks have compared belongs to their group: other groups, and groups that ended, change nothing; every call can be tried."""

from __future__ import annotations

import datetime
import gc
import threading
from unittest.mock import patch
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from helpers import grid
from pool import Pool
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard

from dtensor_ring import Documents, Zigzag, distribute_tensor, full_tensor, ring_attention
from dtensor_ring.comm import AloneTransport, rank_checks, transport_of
from dtensor_ring.comm.rank_checks import is_agreed, remember
from dtensor_ring.debug import check_every_call
from dtensor_ring.functional import ring_flash_attn_func


def overlapping_groups():
    """One rank of a group makes more calls over another group than are remembered: both still know what the first group compared.

    The other waits meanwhile, for as long as a busy machine takes.
    """
    rank, seconds = dist.get_rank(), datetime.timedelta(seconds=45)
    first, second = (dist.new_group(ranks, timeout=seconds) for ranks in ([0, 1], [0, 2]))
    x = torch.ones(1, 2, 1, 8)
    with patch.object(rank_checks, "_AGREEMENTS", 16):
        if rank in (0, 1):
            ring_flash_attn_func(x, x, x, group=first)
        if rank in (0, 2):
            for i in range(40):
                ring_flash_attn_func(x, x, x, softmax_scale=1.0 + i, group=second)
            assert len(transport_of(second).agreements) == 16, "or the test shows nothing"
        if rank in (0, 1):
            ring_flash_attn_func(x, x, x, group=first)


def test_what_a_group_compared_does_not_depend_on_calls_over_other_groups(pools):
    pools.run(3, overlapping_groups, timeout=120)


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


def test_a_group_made_again_compares_calls_again():
    pool = Pool(2)
    try:
        pool.run(a_group_made_again, timeout=60)
    finally:
        pool.close()


def many_calls():
    """More calls than a group remembers, then the first again: all ranks have forgotten it, and compare it anew together."""
    mesh = DeviceMesh.from_group(dist.new_group(timeout=datetime.timedelta(seconds=20)), "cpu", mesh_dim_names=("cp",))
    x = distribute_tensor(torch.ones(1, 4, 1, 8), mesh, [Zigzag(1)])
    known, most = transport_of(mesh.get_group(0)).agreements, rank_checks._AGREEMENTS
    rank_checks._AGREEMENTS = 16
    try:
        for i in range(20):
            ring_attention(x, x, x, scale=1.0 + i)
        assert len(known) == 16
        with pytest.raises(ValueError, match="another layout, dtype, mask"):
            ring_attention(x, x, x, scale=1.0 + dist.get_rank())
        ring_attention(x, x, x, scale=1.0)
    finally:
        rank_checks._AGREEMENTS = most


def test_what_a_group_forgets_all_of_its_ranks_forget(pools):
    pools.run(2, many_calls)


def subgroups():
    """Each row of a mesh compares by itself, and so does a group of all ranks."""
    plane = grid()
    row, whole = plane.get_local_rank("dp"), torch.randn(1, 8, 2, 8)
    for mesh in (plane["cp"], plane["dp"], init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))):
        x = distribute_tensor(whole, mesh, [Zigzag(1)], src_data_rank=None)
        alone = ring_attention(whole, whole, whole, strategy="local")
        torch.testing.assert_close(full_tensor(ring_attention(x, x, x)), alone)
    x = distribute_tensor(whole, plane["cp"], [Zigzag(1)], src_data_rank=None)
    if row == 0:
        with pytest.raises(ValueError, match="another layout, dtype, mask"):
            ring_attention(x, x, x, scale=2.0 + plane.get_local_rank("cp"))
    else:
        ring_attention(x, x, x, scale=2.0)
    ring_attention(x, x, x, scale=2.0)


def test_rows_of_a_mesh_agree_by_themselves(pools):
    pools.run(4, subgroups, timeout=60)


def alone():
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("cp",))
    x = distribute_tensor(torch.randn(1, 8, 2, 8), mesh, [Zigzag(1)])
    with check_every_call():
        ring_attention(x, x, x)


def test_one_rank_agrees_with_itself(pools):
    pools.run(1, alone)


def ended_groups():
    group, x = dist.new_group(), torch.ones(1, 2, 1, 8)
    ring_flash_attn_func(x, x, x, group=group)
    transport = ref(transport_of(group))
    assert len(transport().agreements) == 1
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert transport() is None


def test_agreement_ends_with_its_group(pools):
    pools.run(2, ended_groups)


def test_calls_are_forgotten_in_the_order_in_which_they_were_compared_whoever_asks():
    transport, size = AloneTransport(), rank_checks._AGREEMENTS
    for call in range(size + 3):
        remember(transport, call)
        assert is_agreed(transport, call)
        is_agreed(transport, 0)  # to ask keeps nothing: another rank may not ask
    assert [call for call in range(size + 3) if not is_agreed(transport, call)] == [0, 1, 2]


def test_every_call_is_compared_in_the_thread_that_asks_for_it():
    transport, seen = AloneTransport(), []
    remember(transport, "a call")
    with check_every_call():
        assert not is_agreed(transport, "a call")
        thread = threading.Thread(target=lambda: seen.append(is_agreed(transport, "a call")))
        thread.start()
        thread.join()
    assert is_agreed(transport, "a call")
    assert seen == [True]


def parted_numbers():
    """Both calls are known to all; then ranks make different ones, of the same sizes."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=8))
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("cp",))
    x = distribute_tensor(torch.randn(1, 16, 2, 8), mesh, [Zigzag(1)])
    for scale in (1.0, 2.0):
        ring_attention(x, x, x, scale=scale)
    with check_every_call(), pytest.raises(ValueError, match="every rank must make the same call"):
        ring_attention(x, x, x, scale=1.0 + dist.get_rank())


def test_ranks_that_part_on_later_calls_are_found_where_every_call_is_checked(pools):
    pools.run(2, parted_numbers, timeout=60)


def parted_documents():
    """Ranks part in documents, the drop-in functions in scale; each inside the block."""
    mesh = DeviceMesh.from_group(dist.new_group(timeout=datetime.timedelta(seconds=8)), "cpu", mesh_dim_names=("cp",))
    x, rank = distribute_tensor(torch.randn(1, 16, 2, 8), mesh, [Zigzag(1)]), dist.get_rank()
    packings = [Documents.from_lengths([4, 12]), Documents.from_lengths([12, 4])]
    for documents in packings:
        ring_attention(x, x, x, documents=documents)
    share = torch.ones(1, 4, 2, 8)
    for scale in (1.0, 2.0):
        ring_flash_attn_func(share, share, share, softmax_scale=scale, group=mesh.get_group(0))
    with check_every_call():
        with pytest.raises(ValueError, match="every rank must make the same call"):
            ring_attention(x, x, x, documents=packings[rank])
        with pytest.raises(ValueError, match="every rank must make the same call"):
            ring_flash_attn_func(share, share, share, softmax_scale=1.0 + rank, group=mesh.get_group(0))
        ring_attention(x, x, x, documents=packings[0])


def test_ranks_that_part_in_documents_or_drop_in_calls_are_found_too(pools):
    pools.run(2, parted_documents, timeout=60)


def ranks_made_anew() -> None:
    """Process groups end and are made again with ranks swapped, while somebody still has the mesh of before."""
    rank, x = dist.get_rank(), torch.randn(2, 8, 2, 4, generator=torch.Generator().manual_seed(0))
    documents = Documents(((0, 3, 8), (0, 5, 8)))
    wanted, meshes = ring_attention(x, x, x, documents=documents, strategy="local"), []
    for number, mine in enumerate((rank, 1 - rank)):
        store = dist.TCPStore("127.0.0.1", 29651 + number, 2, mine == 0, datetime.timedelta(seconds=20))
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=store, rank=mine, world_size=2, timeout=datetime.timedelta(seconds=20))
        meshes.append(grid())
        placed = [distribute_tensor(x, meshes[-1], [Shard(0), Zigzag(1)], src_data_rank=None) for _ in range(3)]
        torch.testing.assert_close(full_tensor(ring_attention(*placed, documents=documents)), wanted)


def test_a_rank_that_is_another_after_groups_are_made_again_attends_to_its_own_part():
    pool = Pool(2)
    try:
        pool.run(ranks_made_anew, timeout=60)
    finally:
        pool.close()
