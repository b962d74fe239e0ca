"""The Hugging Face adapter of ring-flash-attn: its README's script on current transformers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from models import SIZES, build, packed_mask
from transformers import Gemma2Config, LlamaConfig, Qwen3Config
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dtensor_ring.functional import substitute_hf_flash_attn, update_ring_flash_attn_params
from dtensor_ring.planning.documents import Documents

CONFIGS = {
    "qwen3": lambda: Qwen3Config(head_dim=8, **SIZES),
    "qwen3 window": lambda: Qwen3Config(head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=1, **SIZES),
    "llama": lambda: LlamaConfig(**SIZES),
    "gemma2": lambda: Gemma2Config(head_dim=8, sliding_window=5, **SIZES),
}


def make_model(kind: str):
    return build(CONFIGS[kind](), "eager").eval()


def window_masks(kind: str, documents: Documents) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive masks for the model without the adapter."""
    seen = packed_mask(documents, 1)
    distance = torch.arange(documents.length)[:, None] - torch.arange(documents.length)
    full = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -1e300)
    windowed = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~(seen & (distance < 5)), -1e300)
    return {"full_attention": full, "sliding_attention": windowed} if kind in ("qwen3 window", "gemma2", "qwen3") else full


def readme_script(kind: str, lengths: list[int], stride: int):
    group = dist.new_group(ranks=range(dist.get_world_size()))
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    ids = torch.randint(0, 64, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    documents = Documents.from_lengths(lengths)
    positions = documents.position_ids()
    reference = make_model(kind)
    wanted = reference(input_ids=ids, position_ids=positions, attention_mask=window_masks(kind, documents), use_cache=False).logits
    weights = torch.randn(wanted.shape, dtype=torch.float64)
    (wanted * weights).sum().backward()

    model = make_model(kind)
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    handle = substitute_hf_flash_attn(group, heads_k_stride=stride)
    try:
        with pytest.raises(RuntimeError, match="call update_ring_flash_attn_params"):
            model(input_ids=ids, use_cache=False)
        cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        update_ring_flash_attn_params(cu_seqlens, group)
        mine = torch.chunk(ids, world, dim=1)[rank]
        out = model(input_ids=mine, position_ids=torch.chunk(positions, world, dim=1)[rank], use_cache=False).logits
        torch.testing.assert_close(out, torch.chunk(wanted, world, dim=1)[rank], rtol=0, atol=1e-6)  # eager softmax is float32
        (out * torch.chunk(weights, world, dim=1)[rank]).sum().backward()
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            dist.all_reduce(a.grad)
            assert (a.grad - b.grad).abs().max() <= 1e-5 * b.grad.abs().max()
        with pytest.raises(ValueError, match="tokens, but documents of"):
            model(input_ids=mine[:, 1:], use_cache=False)
        with pytest.raises(NotImplementedError, match="pack documents without padding"):
            model(input_ids=mine, attention_mask=torch.arange(mine.shape[1])[None] > 0, use_cache=False)
    finally:
        handle.undo()
        handle.undo()
    assert before == ALL_ATTENTION_FUNCTIONS._local_mapping
    assert "eager" not in ALL_MASK_ATTENTION_FUNCTIONS._local_mapping
    again = model(input_ids=ids, position_ids=positions, attention_mask=window_masks(kind, documents), use_cache=False).logits
    assert torch.equal(again, wanted)
    with pytest.raises(RuntimeError, match="call substitute_hf_flash_attn"):
        handle.update(cu_seqlens)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_readme_s_script_runs_with_its_import_changed(pools, kind):
    pools.run(2, readme_script, kind, [6, 9, 5], 1)


@pytest.mark.parametrize(("lengths", "stride"), [([12, 8], 2), ([7, 1, 4], 1)])
def test_more_ranks_and_key_heads_at_a_time(pools, lengths, stride):
    pools.run(4, readme_script, "qwen3", lengths, stride)


def odd_length():
    readme_script("llama", [6, 7], 1)


def test_two_ranks_take_an_odd_row_as_torch_chunk_cuts_it(pools):
    pools.run(2, odd_length)
