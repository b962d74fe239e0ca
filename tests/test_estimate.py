"""`estimate`: memory and time of a training step, from numbers alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from allocated import Allocated
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.estimate_cases import beside
from benchmarks.record import RESULTS, load
from dtensor_ring import estimate
from dtensor_ring.__main__ import main
from dtensor_ring.comm.loopback import LoopbackTransport
from dtensor_ring.estimation.attention_bytes import attention_bytes
from dtensor_ring.estimation.ledger import Ledger
from dtensor_ring.estimation.memory import PRECISIONS, Training, step_memory
from dtensor_ring.estimation.model_shape import SHAPES, read_model
from dtensor_ring.ops.executors.plan_executor import Executor
from dtensor_ring.ops.kernels import KERNELS, Saved, SoftmaxParams
from dtensor_ring.ops.kernels.block import Result
from dtensor_ring.planning.costs import AttentionShape
from dtensor_ring.planning.devices import CHIPS, KNOWN, LINKS
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band, mask_text
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import plan

NAMES = tuple(json.loads(SHAPES.read_text())["models"])
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


def free(_window):
    return 0.0, 0.0


@pytest.mark.parametrize("path", sorted(RESULTS.glob("estimate-*.json")), ids=lambda path: path.stem)
def test_measured_peaks_of_one_gpu_are_within_a_hundredth_and_times_within_a_tenth(path):
    rows = beside(load(path))
    assert sum(row.case.held_out for row in rows) >= 3
    for row in rows:
        assert row.estimated == pytest.approx(row.measured, rel=0.01), row.line()
        assert row.estimated_ms == pytest.approx(row.ms, rel=0.1), row.line()


@pytest.mark.parametrize("name", NAMES)
def test_every_known_shape_has_as_many_weights_as_its_name_says(name):
    billions = {"mixtral-8x7b": 46.7, "qwen3-30b-a3b": 30.5, "gpt-oss-20b": 20.9, "smollm2-135m": 0.135}
    said = billions.get(name) or float(name.rsplit("-", 1)[1].rstrip("b"))
    assert read_model(name).parameters / 1e9 == pytest.approx(said, rel=0.25)


def test_every_gpu_with_figures_of_attention_has_those_of_a_step():
    assert set(CHIPS) == set(KNOWN) == set(LINKS)


AXES = st.sampled_from([1, 2, 4, 8])


@examples(20)
@given(
    st.sampled_from(["llama-3.2-1b", "qwen3-8b", "gemma-2-9b", "mixtral-8x7b"]),
    st.sampled_from([8192, 12288, 65536]),
    AXES,
    st.sampled_from(["none", "full", "attention"]),
    st.sampled_from(["whole", "chunked"]),
)
def test_more_ranks_never_need_more_and_more_tokens_never_less(name, length, ranks, checkpoint, loss):
    how = {"checkpoint": checkpoint, "loss": loss}

    def held(mesh, tokens):
        memory = estimate(name, mesh, tokens, **how).memory
        return [memory.saved, memory.phase("between steps").bytes, memory.phase("optimizer").bytes]

    few, many = held({"cp": ranks}, length), held({"cp": 2 * ranks}, length)
    assert all(b <= a for a, b in zip(few, many, strict=True))
    shared = held({"cp": ranks, "dp": 2}, length)
    assert shared[0] <= few[0] * 1.0001 + 1
    assert all(b < a for a, b in zip(few[1:], shared[1:], strict=True))
    assert held({"cp": ranks}, 2 * length)[0] > few[0]


@examples(16)
@given(st.integers(1, 6), st.integers(1, 512), st.sampled_from(list(PRECISIONS)), st.sampled_from(["none", "fsdp"]), st.data())
def test_a_step_ends_with_weights_states_and_gradients_alone(layers, tokens, precision, parallel, data):
    """What the passes hold they release: else a part would have to go below nothing, which a ledger refuses, or stay."""
    kind = data.draw(st.sampled_from(["llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_oss", "mixtral", "qwen3_moe"]))
    more = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    fields = {**CONFIG, "model_type": kind, "num_hidden_layers": layers}
    model = read_model({**fields, **(more if kind in ("gpt_oss", "mixtral", "qwen3_moe") else {})})
    shards = data.draw(st.integers(1, 8)) if parallel == "fsdp" else 1
    training = Training(model, tokens, tokens, PRECISIONS[precision], parallel=parallel, shards=shards)
    for checkpoint in ("none", "full", "attention"):
        for loss in ("whole", "chunked"):
            memory = step_memory(replace(training, checkpoint=checkpoint, loss=loss, chunk=64), free)
            ended, size = dict(memory.phase("optimizer").parts), PRECISIONS[precision]
            weights = model.parameters / shards
            assert ended["gradients"] == pytest.approx(weights * size.weight, rel=1e-3)
            assert ended["optimizer"] == pytest.approx(2 * weights * size.state, rel=1e-3)
            rounded = 16 * layers + 16  # bytes are whole numbers, moment by moment
            for part in ("activations", "logits and loss", "temporaries", "sharding buffers", "attention buffers"):
                assert ended[part] <= rounded, (part, kind, checkpoint, loss)
            assert memory.peak.bytes >= memory.phase("optimizer").bytes


def test_a_ledger_knows_its_largest_moment_and_refuses_to_release_what_it_does_not_hold():
    ledger = Ledger()
    ledger.turn("first")
    ledger.hold("parameters", 5)
    ledger.doing("second")
    with ledger.passing("temporaries", 7):
        ledger.hold("gradients", 1)
    ledger.hold("gradients", 2)
    assert (ledger.total, ledger.most_total, ledger.moment, dict(ledger.most)) == (
        8,
        13,
        "second",
        {"parameters": 5, "temporaries": 7, "gradients": 1},
    )
    ledger.turn("third")
    assert (ledger.most_total, ledger.moment) == (8, "third")
    with pytest.raises(AssertionError, match="gradients has 3 bytes, of which 4 cannot be released"):
        ledger.release("gradients", 4)


class Hollow(type(KERNELS["torch_flash"])):
    """Makes the tensors that a flash kernel makes, and computes nothing."""

    def call_forward(self, q, k, v, block):
        return Result(torch.empty_like(q), q.new_zeros((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32))

    def call_backward(self, saved, dout, block):
        q, k, v, _, lse = saved
        wide = torch.empty(q.shape, dtype=torch.float32)  # dq is added up in float32, and each query head has its own dk and dv
        each_head = [
            torch.empty((*k.shape[:2], q.shape[2], k.shape[3]), dtype=k.dtype) for _ in range(2 * (q.shape[2] > k.shape[2]))
        ]
        made = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
        del wide, each_head
        return made[:3]


@pytest.mark.parametrize(
    ("layout", "world", "strategy", "stages", "heads"),
    [
        ("zigzag", 1, "ring", 0, 8),
        ("zigzag", 2, "ring", 1, 8),
        ("zigzag", 4, "ring", 1, 8),
        ("zigzag", 4, "ring", 3, 8),
        ("contiguous", 4, "ring", 2, 8),
        ("contiguous", 4, "ring", 3, 2),
        ("zigzag", 4, "gather", 0, 8),
        ("contiguous", 4, "gather", 0, 8),
    ],
)
def test_attention_holds_no_more_in_backward_than_its_buffers_are_estimated_and_not_much_less(
    layout, world, strategy, stages, heads
):
    length, kv_heads, dim = 512, 2, 32
    band = Band.parse(mask_text(True, (-1, -1)))
    problem = AttentionProblem(Layout.parse(layout), band, length, length, world, strategy).staged(stages)

    def body(transport):
        tokens = problem.q_local(transport.rank)
        q, dout = (torch.zeros(1, tokens, heads, dim, dtype=torch.bfloat16) for _ in range(2))
        k, v = (torch.zeros(1, tokens, kv_heads, dim, dtype=torch.bfloat16) for _ in range(2))
        executor = Executor(plan(problem, transport.rank), transport, Hollow(), SoftmaxParams(1.0))
        with Allocated() as counted:
            out, lse = executor.forward(q, k, v)
            counted.phase()
            before = counted.now
            grads = executor.backward(Saved(q, k, v, out, lse), dout)
            return counted.phase() - before - sum(x.nbytes for x in grads[:3])

    most = max(LoopbackTransport.run(world, body))
    bound = attention_bytes(problem, AttentionShape(heads, kv_heads, dim, dim)).backward
    assert most <= bound <= 1.8 * most, (most, bound)


def test_checkpointing_trades_memory_for_time_and_chunks_logits_for_none():
    how = {"loss": "chunked", "device": "h100"}
    none, attention, full = (
        estimate("llama-3.1-8b", {"cp": 8}, 65536, checkpoint=way, **how) for way in ("none", "attention", "full")
    )
    assert none.memory.saved > attention.memory.saved > full.memory.saved
    assert none.time.step < attention.time.step < full.time.step
    assert none.time.mfu > full.time.mfu > 0.2
    assert full.peaks == none.peaks == (("none", none.peak), ("full", full.peak), ("attention", attention.peak))
    whole = estimate("llama-3.1-8b", {"cp": 8}, 65536, checkpoint="full", device="h100")
    logits = 8192 * 128256
    assert dict(whole.memory.phase("backward").parts)["logits and loss"] == 12 * logits
    assert whole.peak - full.peak > 5 * logits


def test_time_counts_what_travels_and_what_attention_skips():
    alone = estimate("llama-3.1-8b", {"dp": 8}, 8192, device="h100")
    slow = estimate("llama-3.1-8b", {"dp": 8}, 8192, device="h100", gpus_per_host=1)
    assert alone.time.exchange < slow.time.exchange
    assert alone.time.matmul == slow.time.matmul
    packed = estimate("llama-3.1-8b", {"dp": 8}, 8192, [0, 1024, 8192], device="h100")
    assert packed.time.flops < alone.time.flops
    windowed = {"model_type": "mistral", **{k: v for k, v in CONFIG.items() if k != "model_type"}, "sliding_window": 64}
    times = [estimate({**windowed, "sliding_window": w}, None, 8192, device="h100").time for w in (64, None)]
    assert times[0].attention < times[1].attention
    assert times[0].flops < times[1].flops
    heads = estimate("llama-3.1-8b", {"tp": 4}, 8192, device="h100")
    assert heads.time.exchange > 0
    assert heads.time.matmul < alone.time.matmul / 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mesh": {"pp": 2}}, "mesh axis 'pp' is none of dp_replicate, dp, cp, tp"),
        ({"mesh": {"cp": 0}}, "mesh axis cp has a whole number of ranks above 0, found 0"),
        ({"mesh": {"tp": 3}}, "tp=3 must divide the 4 query heads, 2 key heads and 192 numbers of the MLP"),
        ({"length": 0}, "sizes are whole numbers from 1 up, found length=0"),
        ({"batch": 1.5}, "found batch=1.5"),
        ({"checkpoint": "some"}, "checkpoint='some': use one of 'none', 'full', 'attention'"),
        ({"parallel": "ddp", "precision": "mixed"}, "precision='mixed' is FSDP2's policy"),
        ({"mesh": {"cp": 3}, "strategy": "ulysses"}, "4 query and 2 key heads cannot be shared by 3 ranks"),
        ({"loss_chunk": 128}, "loss_chunk=128 is of loss='chunked', found loss='whole'"),
        ({"device": "b200"}, "no figures of device 'b200'"),
        ({"kernel": "cudnn"}, "kernel='cudnn' is for times: name a device"),
        ({"device": "a100", "kernel": "cudnn"}, "kernel 'cudnn' is not among those of the cost model"),
        ({"layout": "zigzag/documents"}, "is cut document by document: pass documents="),
        ({"model": "llama-9"}, "nothing is downloaded"),
        ({"model": {**CONFIG, "hidden_size": "64"}}, "hidden_size of a config is a whole number above 0, found '64'"),
        ({"model": {"model_type": "llama"}}, "the config has no num_hidden_layers"),
        ({"model": {**CONFIG, "num_key_value_heads": 3}}, "the 3 key heads of a config must divide its 4 query heads"),
        ({"model": {**CONFIG, "layer_types": ["mamba", "full_attention"]}}, "found ['mamba']"),
        ({"model": {**CONFIG, "layer_types": 5}}, "layer_types of a config is a list, found 5"),
        ({"model": {**CONFIG, "sliding_window": "x"}}, "sliding_window of a config is a whole number above 0, found 'x'"),
        ({"model": {**CONFIG, **EXPERTS, "decoder_sparse_step": 0}}, "decoder_sparse_step of a config is a whole number"),
        ({"model": {**CONFIG, **EXPERTS, "mlp_only_layers": 3}}, "mlp_only_layers of a config is a list, found 3"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(arguments, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        estimate(**{"model": CONFIG, **arguments})


def test_a_config_is_read_from_a_file_a_folder_and_the_text_part_of_a_larger_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "large", "text_config": CONFIG}))
    for model in (tmp_path, tmp_path / "config.json", str(tmp_path)):
        assert replace(read_model(model), name="") == replace(read_model(CONFIG), name="")
    (tmp_path / "config.json").write_text("no json")
    with pytest.raises(ValueError, match="holds no JSON"):
        read_model(tmp_path)
    assert any("taken for Llama's" in note for note in estimate({**CONFIG, "model_type": "unheard_of"}).notes)


def test_the_command_prints_what_the_function_returns(capsys):
    told = ["--model", "llama-3.1-8b", "--mesh", "dp=2,cp=8", "--length", "256Ki", "--checkpoint", "full", "--loss", "chunked"]
    assert main(["estimate", *told, "--device", "h100"]) == 0
    printed = capsys.readouterr().out
    found = estimate("llama-3.1-8b", {"dp": 2, "cp": 8}, 262144, checkpoint="full", loss="chunked", device="h100")
    assert printed == f"{found}\n"
    assert max(map(len, printed.splitlines())) <= 80
    assert f"peak: {found.peak / 2**30:.2f} GiB, in backward, layer" in printed
    assert main(["estimate", *told, "--device", "h100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.facts()))
    with pytest.raises(SystemExit, match="2"):  # 0 is no length, and not the default either
        main(["estimate", "--model", "llama-3.1-8b", "--length", "0"])
    assert "found length=0" in capsys.readouterr().err
    for wrong in (["--mesh", "cp"], ["--mesh", "cp=2,cp=2"], ["--model", "nothing"], ["--length", "x"]):
        with pytest.raises(SystemExit, match="2"):
            main(["estimate", *told, *wrong])
        assert "error:" in capsys.readouterr().err
