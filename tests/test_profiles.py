"""A profile names what a call of ours does: the pass and the bytes, each step, each transfer."""

from __future__ import annotations

import pytest
import torch
from helpers import line
from torch.profiler import ProfilerActivity, profile

from dtensor_ring import Zigzag, from_local, ring_attention
from dtensor_ring._torch import named_in_profiles
from dtensor_ring.comm import AloneTransport

LENGTH, ITEM, HEADS, DIM = 32, 4, 2, 8


def attended(rank_mesh):
    torch.manual_seed(rank_mesh.get_local_rank())
    leaves = [torch.randn(1, LENGTH // 2, HEADS, DIM, requires_grad=True) for _ in range(3)]
    placed = [from_local(x, rank_mesh, [Zigzag(1)], length=LENGTH, run_check=False) for x in leaves]
    ring_attention(*placed, stages=1).to_local().sum().backward()


def names_on_a_rank():
    """Names of ours in the profile of one call, and what a second call outside of it adds."""
    mesh = line()
    attended(mesh)  # ranks compare the first call of a kind
    with profile(activities=[ProfilerActivity.CPU]) as taken:
        attended(mesh)
    names = [event.name for event in taken.events() if event.name.startswith("dtensor_ring,")]
    rank = mesh.get_local_rank()
    mine = f"dtensor_ring, rank {rank} of 2, "
    assert all(name.startswith(mine) for name in names), names
    rest = [name.removeprefix(mine) for name in names]
    token = 2 * HEADS * DIM * ITEM  # its key and its value
    # Rank 0 holds the first and the last quarter of the tokens: it needs both of rank 1's, which needs the first.
    sent, received = [(LENGTH // 4 * token, LENGTH // 2 * token), (LENGTH // 2 * token, LENGTH // 4 * token)][rank]
    for direction, count in (("forward", sent), ("backward", sent + received)):
        assert rest.count(f"{direction}, ring, zigzag, causal, {LENGTH} tokens over 2 ranks, sends {count} bytes") == 1, rest
        for step in (0, 1):
            for what in ("waits for keys", "computes"):
                assert rest.count(f"{direction}, step {step} of 2, {what}") == 1, rest
            # The own keys of step 0 travel nowhere.
            assert sum(name.endswith(f"{direction}, keys of step {step} of 2") for name in rest) == step, rest
    assert rest.count(f"sends {sent} bytes, receives {received} bytes") == 2, rest  # keys in both passes
    assert rest.count(f"sends {received} bytes, receives {sent} bytes") == 1, rest  # gradients


def test_a_profile_names_passes_steps_and_transfers_with_their_bytes(pools):
    pools.run(2, names_on_a_rank)


def test_a_name_is_made_only_where_a_profile_is_taken():
    made = []

    def name() -> str:
        made.append(1)
        return "a name"

    with named_in_profiles(name):
        pass
    assert not made
    with profile(activities=[ProfilerActivity.CPU]) as taken, named_in_profiles(name):
        pass
    assert len(made) == 1
    assert [event.name for event in taken.events()].count("a name") == 1


def test_an_activity_ends_where_it_fails_and_does_not_begin_where_it_cannot_be_named():
    class Nameless:
        def __str__(self) -> str:
            raise ValueError("no name")

    def fail(wanted: str) -> None:
        raise KeyError(transport.activity == wanted)

    transport = AloneTransport()
    before = transport.activity
    with pytest.raises(KeyError, match="True"), transport.during("an activity"):
        fail("an activity")
    assert transport.activity is before
    with profile(activities=[ProfilerActivity.CPU]), pytest.raises(ValueError, match="no name"), transport.during(Nameless()):
        pass
    assert transport.activity is before
