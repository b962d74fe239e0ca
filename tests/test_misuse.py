"""What a user may get wrong in a call is told by its right name: misspelled bounds, labels twice, shares, plans never applied."""

from __future__ import annotations

import copy
import gc
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers import blocks_touched, grid, line
from models import make_batch, make_model
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module

from dtensor_ring import Documents, Stripe, Zigzag, distribute_tensor, from_local, ring_attention, ring_plan, shard_batch
from dtensor_ring.data import ShardedBatch
from dtensor_ring.ops import prepare
from dtensor_ring.planning.layout import Layout


def parallel_model():
    model = make_model("llama")
    parallelize_module(model, line(), ring_plan(model))
    return model


BOUNDS = torch.tensor([0, 5, 16], dtype=torch.int32)
LOOKALIKES = {
    "cu_seqlens": (BOUNDS, "'cu_seqlens' is not read, and would be ignored.*meant"),
    "cu_seqlens_q": (BOUNDS, "Is 'cu_seq_lens_q' meant"),
    "documentz": ([0, 5, 16], "Is 'documents' meant"),
    "document_ids": (torch.zeros(2, 16), "'document_ids' is not read"),
    "max_seqlen": (16, "'max_seqlen' is not read"),
    "label": (torch.zeros(2, 16), "Is 'labels' meant"),
    "position_id": (torch.zeros(2, 16), "Is 'position_ids' meant"),
    "num_item_in_batch": (3, "Is 'num_items_in_batch' meant"),
}


def lookalikes():
    model, mesh, batch = parallel_model(), line(), make_batch(16)
    for name, (value, text) in LOOKALIKES.items():
        for call in (lambda extra: model(**batch, **extra), lambda extra: shard_batch({**batch, **extra}, mesh)):
            with pytest.raises(ValueError, match=text):
                call({name: value})
    for name, value in (("weights", torch.ones(3)), ("extra", [1, 2]), ("more", Documents.from_lengths([16]))):
        with pytest.raises(ValueError, match=rf"'{name}' of type \w+ is read by no layer"):
            model(**batch, **{name: value})
    model(**batch, cu_seq_lens_q=BOUNDS, cu_seq_lens_k=BOUNDS, max_length_q=11, max_length_k=11, output_hidden_states=True)
    model(**batch, documents=[0, 5, 16], return_dict=True, documentz=None, accumulate="float32")
    assert shard_batch({**batch, "source": "a book", "doc_id": "book 3", "segment": ["a", "b"], "index": 7}, mesh)["index"] == 7
    model(**batch, adapter_names=["a", "b"])
    with pytest.raises(TypeError, match="found 1 arguments by place and input_ids, labels by name; pass each once"):
        model(batch["input_ids"], **batch)
    with pytest.raises(TypeError, match="found 40 arguments by place"):
        model(*[None] * 40)


def test_keys_that_look_like_bounds_or_tensors_of_a_batch_raise_with_the_right_name(pools):
    pools.run(2, lookalikes)


def labels_twice():
    model, mesh, batch = parallel_model(), line(), make_batch(16)
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    wanted = model(**batch).loss
    assert torch.equal(model(**batch, shift_labels=shifted).loss, wanted)
    at_ends = shifted.clone()
    at_ends[:, 4] = -100
    documents = Documents.from_lengths([5, 11])
    model(**batch, shift_labels=at_ends, documents=documents)
    model(**batch, shift_labels=shifted, documents=documents)
    wrong = shifted.clone()
    wrong[1, 9] += 1
    for call in (lambda **extra: model(**batch, **extra), lambda **extra: shard_batch({**batch, **extra}, mesh)):
        with pytest.raises(ValueError, match=r"labels and shift_labels contradict each other: in row 1 the label of token 10"):
            call(shift_labels=wrong)
        with pytest.raises(ValueError, match="contradict each other: in row 0 the label of token 5"):
            call(shift_labels=at_ends)


def test_labels_and_shifted_labels_must_agree(pools):
    pools.run(2, labels_twice)


def shares_again(placement):
    model, mesh, batch = parallel_model(), line(), make_batch(16)
    share = shard_batch(batch, mesh, placement)
    texts = []
    for again in (lambda: shard_batch(share, mesh, placement), lambda: model(**share), lambda: shard_batch(dict(share), mesh)):
        with pytest.raises(ValueError, match="share already") as failure:
            again()
        texts.append(str(failure.value))
    assert isinstance(share, ShardedBatch)


@pytest.mark.parametrize("placement", [Zigzag(1), None], ids=repr)
def test_a_share_of_a_batch_is_not_cut_again_and_every_rank_is_told(pools, placement):
    pools.run(3, shares_again, placement, timeout=60)


def items_that_differ():
    model, batch, rank = parallel_model(), make_batch(16), dist.get_rank()
    for count in (torch.tensor(20 + rank), 20 + rank, 20.5 + rank):
        with pytest.raises(
            ValueError, match=r"num_items_in_batch is 2\d(\.5)? on rank \d, 2\d(\.5)? on rank \d of the sequence axis"
        ):
            model(**batch, num_items_in_batch=count)
    with pytest.raises(ValueError, match=r"num_items_in_batch is .*-1"):
        model(**batch, **({"num_items_in_batch": 20} if rank else {}))
    model(**batch, num_items_in_batch=20)


def test_a_number_of_items_that_differs_between_ranks_raises_on_every_rank(pools):
    pools.run(2, items_that_differ)


def shared_config():
    model = parallel_model()
    other = type(model)(model.config)
    other.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"was changed to 'sdpa'.*shares its config object.*copy\.deepcopy\(config\)"):
        model(**make_batch(16))
    model.set_attn_implementation("dtensor_ring")
    loss = model(**make_batch(16)).loss
    type(model)(copy.deepcopy(model.config)).set_attn_implementation("sdpa")
    assert torch.equal(model(**make_batch(16)).loss, loss)


def test_a_model_whose_attention_was_changed_through_a_shared_config_says_so(pools):
    pools.run(2, shared_config)


def plain_tensors():
    x, mesh = torch.randn(1, 8, 2, 4), line()
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        for _ in range(3):
            out = ring_attention(x, x, x)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 1, "once, where Python's default filter is in force"
    assert "in a program of 2 ranks: this rank attends to its own tokens alone" in texts[0]
    assert caught[0].filename == __file__
    assert torch.equal(ring_attention(x, x, x, strategy="local"), out)
    placed = distribute_tensor(torch.randn(2, 8, 2, 4), mesh, [Shard(0)])
    ring_attention(placed, placed, placed, strategy="local")
    spread = distribute_tensor(x, mesh, [Zigzag(1)])
    with pytest.raises(ValueError, match=r"strategy='local' attends to this rank's tokens alone, but mesh axis 'cp' holds"):
        ring_attention(spread, spread, spread, strategy="local")


def test_plain_tensors_among_ranks_warn_once_and_local_says_that_they_are_meant(pools):
    pools.run(2, plain_tensors)


def test_plain_tensors_alone_do_not_warn():
    x = torch.randn(1, 8, 2, 4)
    assert torch.equal(ring_attention(x, x, x), ring_attention(x, x, x, strategy="local"))


def plans():
    model = make_model("llama")
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        plan = ring_plan(model)
        del plan
        gc.collect()
        (text,) = [str(warning.message) for warning in caught]
        assert "ring_plan of a LlamaForCausalLM was never applied: every rank runs the whole model" in text
        caught.clear()
        plan = ring_plan(model)
        parallelize_module(model, line(), plan)
        plan.undo()
        del plan
        gc.collect()
        assert not caught
        mesh = grid(rows=1)
        parallelize_module(model, mesh["dp"], ring_plan(model))
        (text,) = [str(warning.message) for warning in caught]
        assert "over mesh axis 'dp', which has one rank of 2: nothing is spread" in text
        caught.clear()
        other = make_model("llama")
        parallelize_module(other, grid()["cp"], ring_plan(other))
        assert not caught, "a sequence axis of one rank is a setting"


def test_a_plan_that_is_never_applied_or_over_an_axis_of_one_rank_warns(pools):
    pools.run(2, plans)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"scale": math.nan}, ValueError, "scale multiplies q.k and must be a finite number, found nan"),
        ({"scale": math.inf}, ValueError, "a finite number, found inf"),
        ({"softcap": math.nan}, ValueError, "softcap bounds scores and is positive, or 0 for none, found nan"),
        ({"softcap": math.inf}, ValueError, "softcap bounds scores and is positive, or 0 for none, found inf"),
        ({"dropout_p": math.nan}, ValueError, "dropout_p is a probability below 1, found nan"),
        ({"window": (2.7, 0)}, TypeError, r"window=\(2\.7, 0\): a side is a whole number of tokens, found float, int"),
        ({"window": (True, False)}, TypeError, r"window=\(True, False\): a side is a whole number of tokens, found bool, bool"),
        ({"window": (3,)}, ValueError, r"window=\(3,\): needs two numbers of tokens, \(back, ahead\)"),
        ({"window": 5}, ValueError, r"window=5: needs two numbers of tokens"),
        ({"window": "35"}, ValueError, r"window='35': needs two numbers of tokens"),
        ({"strategy": "tree"}, ValueError, "unknown strategy 'tree': use 'ring', 'gather', 'ulysses', 'local'"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(arguments, kind, text):
    x = torch.randn(1, 8, 2, 4)
    with pytest.raises(kind, match=text):
        ring_attention(x, x, x, **arguments)


LONG_AND_SHORT = Documents.from_lengths([2400, *[80] * 20])


def stripes_of_documents():
    mesh, length = line(), 64
    documents = Documents.from_lengths([1] * 60 + [4])
    x = from_local(torch.zeros(1, length // mesh.size(), 2, 8), mesh, [Stripe(1)], length=length)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        # Of 61 documents, each rank has a part on each of two ranks; as many of the other's are looked at.
        patch.setattr(prepare, "MANY_STRIPE_TILES", 2 * 2 * 61)
        ring_attention(x, x, x, documents=documents)
        assert not shown
        patch.setattr(prepare, "MANY_STRIPE_TILES", 2 * 2 * 61 - 1)
        ring_attention(x, x, x, documents=documents)
        (warning,) = shown
        assert "stripe:1 cuts packed documents into more than 243 tiles" in str(warning.message)
        patch.setattr(prepare, "MOST_STRIPE_TILES", 2 * 2 * 61 - 1)
        with pytest.raises(ValueError, match=r"stripe:1 over 2 ranks cuts .* into about 244 tiles.*Zigzag\(1, per_document=True\)"):
            ring_attention(x, x, x, documents=documents)
        # What is planned otherwise is neither refused nor warned of.
        ring_attention(x, x, x, documents=documents, strategy="ulysses")
        whole = from_local(x.to_local(), mesh, [Zigzag(1)], length=length)
        ring_attention(whole, whole, whole, documents=documents)
        assert len(shown) == 1


def test_stripes_of_many_documents_warn_and_of_far_too_many_are_refused(pools):
    pools.run(2, stripes_of_documents)


def share_of_work(layout: str, world: int) -> float:
    """Mean work over the most loaded rank's, counted block by block."""
    bounds = LONG_AND_SHORT.bounds[0]
    runs = [Layout.parse(layout).runs(bounds[-1], world, rank, bounds) for rank in range(world)]
    work = [blocks_touched(bounds, [(run.start, run.count) for run in each]) for each in runs]
    return sum(work) / world / max(work)


def unbalanced():
    mesh = DeviceMesh.from_group(dist.new_group(), "cpu", mesh_dim_names=("cp",))  # a group is told once
    ids, rank = torch.zeros(1, 4000, dtype=torch.int64), dist.get_rank()
    share, better = share_of_work("zigzag", 4), share_of_work("zigzag/documents", 4)
    assert share < 0.8 < better, "or the test shows nothing"
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        for _ in range(3):
            shard_batch({"input_ids": ids}, mesh, documents=LONG_AND_SHORT)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == (rank == 0), "one rank, once"
    if rank == 0:
        assert f"busy for {share:.0%} of the time" in texts[0]
        assert "Documents(21 in 1 row of 4000 tokens" in texts[0]
        assert f"under Zigzag(1) over 4 ranks. Zigzag(1, per_document=True) would reach {better:.0%}" in texts[0]

    model = make_model("llama")
    plan = ring_plan(model)
    parallelize_module(model, line(), plan)
    assert "ask again after one" in plan.describe()
    model(input_ids=ids, documents=LONG_AND_SHORT)
    # The proposal is the same on every rank, and stays one: the layout is what it was.
    assert "sequence parallel as Zigzag(1), over 4 ranks" in plan.describe()
    assert f"balance:   {share:.2f} (mean work / most loaded rank) on the last batch" in plan.describe()
    assert f"Zigzag(1, per_document=True) would reach {better:.0%}" in plan.describe()
    model(input_ids=ids)
    assert "ask again after one" in plan.describe()


def test_an_unbalanced_packing_is_told_once_with_its_remedy(pools):
    pools.run(4, unbalanced)


def balanced():
    mesh = DeviceMesh.from_group(dist.new_group(), "cpu", mesh_dim_names=("cp",))
    ids = torch.zeros(1, 4000, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shard_batch({"input_ids": ids}, mesh, documents=[0, 4000])
        shard_batch({"input_ids": ids}, mesh, Zigzag(1, per_document=True), documents=LONG_AND_SHORT)
        padded = torch.ones(1, 4000, dtype=torch.int64)
        padded[:, 2400:] = 0
        shard_batch({"input_ids": ids, "attention_mask": padded}, mesh)
    rows = Documents((LONG_AND_SHORT.bounds[0], (0, 2400, 4000)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        shard_batch({"input_ids": ids.expand(2, -1)}, mesh, documents=rows)
    assert ["Pack the rows into one (B=1)" in str(warning.message) for warning in caught] == [True] * (dist.get_rank() == 0)


def test_balanced_packings_and_padding_do_not_warn(pools):
    pools.run(4, balanced)


@pytest.mark.parametrize("kind", [torch.tensor, lambda number: torch.tensor([number])], ids=["scalar", "one element"])
def test_a_number_may_be_a_tensor_whose_value_is_read_at_every_call(kind):
    x, number = torch.randn(1, 8, 2, 4), kind(0.1)
    asked = {"scale": number, "softcap": number}
    assert torch.equal(ring_attention(x, x, x, **asked), ring_attention(x, x, x, scale=0.1, softcap=0.1))
    number += 1.0
    asked = {"scale": number, "softcap": number}
    assert torch.equal(ring_attention(x, x, x, **asked), ring_attention(x, x, x, scale=1.1, softcap=1.1))


@pytest.mark.parametrize("name", ["scale", "softcap", "dropout_p"])
def test_a_number_that_wants_a_gradient_is_refused(name):
    x = torch.randn(1, 8, 2, 4)
    with pytest.raises(NotImplementedError, match=f"{name} gets no gradient: pass {name}.item()"):
        ring_attention(x, x, x, **{name: torch.tensor(0.5, requires_grad=True)})
