"""Data under `RingParallelismConfig`: one batch for a sequence axis, each sample read and counted once; and what is refused."""

from __future__ import annotations

import importlib
import itertools
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.local_sgd import LocalSGD
from accelerate.utils.launch import prepare_extend_env_parallelism_config, prepare_multi_gpu_env
from accelerate_ranks import accelerator_of, reset
from helpers import refused, some_or_every
from test_accelerate import build
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, TensorDataset

from dtensor_ring.integrations.accelerate import RingParallelismConfig, ring_of
from dtensor_ring.integrations.transformers import ring_plan
from dtensor_ring.optional import MissingExtraError

COUNT = 11  # rows: the last batch of any kind is incomplete


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(COUNT))


def noisy(rows: list) -> dict[str, object]:
    """A collator that draws numbers, each rank its own."""
    numbers = torch.stack([row[0] if isinstance(row, (tuple, list)) else row for row in rows])
    return {"row": numbers, "noise": torch.rand(len(rows), 3)}


KINDS = {
    "shuffled": lambda size: DataLoader(TensorDataset(torch.arange(COUNT)), size, shuffle=True, collate_fn=noisy),
    "in order": lambda size: DataLoader(TensorDataset(torch.arange(COUNT)), size, collate_fn=noisy),
    "drop last": lambda size: DataLoader(TensorDataset(torch.arange(COUNT)), size, drop_last=True, collate_fn=noisy),
    "stream": lambda size: DataLoader(Stream(), size, collate_fn=noisy),
}


def same_on_the_axis(mesh, batch) -> bool:
    every = [None] * mesh.size()
    dist.all_gather_object(every, {key: value.tolist() for key, value in batch.items()}, mesh.get_group())
    return all(other == every[0] for other in every)


def reads(kind: str, dispatch: bool | None, split: bool) -> None:
    torch.manual_seed(dist.get_rank())
    with accelerator_of("ddp", loaders={"dispatch_batches": dispatch, "split_batches": split}) as accelerator:
        ring = ring_of(accelerator)
        assert ring.data_size == dist.get_world_size() // 2
        size = 2 * ring.data_size if split else 2
        loader = accelerator.prepare(KINDS[kind](size))
        assert isinstance(loader, DataLoader)
        orders = []
        for _ in range(2):
            seen = []
            for batch in loader:
                assert same_on_the_axis(ring.mesh, batch)
                # The first batches tell: what completes the last one may be on several data ranks.
                if len(seen) < 2 * ring.data_size:
                    every = accelerator.gather(batch["row"]).tolist()
                    assert len(set(every)) == 2 * ring.data_size
                seen += accelerator.gather_for_metrics(batch["row"]).tolist()
                named = accelerator.gather_for_metrics([f"row {row}" for row in batch["row"].tolist()])
                assert named == [f"row {row}" for row in seen[-len(named) :]]
            orders.append(seen)
        full = 2 * ring.data_size * (COUNT // (2 * ring.data_size)) if kind == "drop last" else COUNT
        for seen in orders:
            # A stream that each data rank reads for itself has no length, by which Accelerate knows what completed its last batch.
            assert len(set(seen)) == full
            assert len(seen) == full or (kind == "stream" and dispatch is False)
            if kind != "shuffled":
                assert seen[:full] == list(range(full))
        if kind == "shuffled":
            assert orders[0] != orders[1]
        rest = list(accelerator.skip_first_batches(loader, 1))
        assert len(rest) == len(list(loader)) - 1
        assert all(same_on_the_axis(ring.mesh, batch) for batch in rest)
        if kind == "in order" and full > 2 * ring.data_size:
            assert rest[0]["row"][0] == 2 * ring.data_size + 2 * ring.data_index


# The other ones run where everything does.
SOME = (
    ("shuffled", False, False),
    ("stream", None, False),
    ("stream", False, False),
    ("in order", True, False),
    ("in order", False, True),
    ("drop last", True, True),
)


def reads_every_kind(every: bool) -> None:
    for kind, dispatch, split in itertools.product(KINDS, (None, False, True), (False, True)) if every else SOME:
        try:
            reads(kind, dispatch, split)
        except Exception as failure:
            failure.add_note(f"{kind}, dispatch_batches={dispatch}, split_batches={split}")
            raise


@some_or_every
@pytest.mark.parametrize("world", [2, 4])
def test_a_sequence_axis_gets_one_batch_and_every_sample_is_read_and_counted_once(pools, world, every):
    pools.run(world, reads_every_kind, every)


class DataSetError(Exception):
    pass


def unlike_others(rows: list) -> None:
    raise DataSetError("no class of ours")


def fails_in_time() -> None:
    class Broken(IterableDataset):
        def __iter__(self):
            yield torch.tensor(0)
            raise OSError("disk on fire")

    with accelerator_of("ddp", loaders={"dispatch_batches": False}) as accelerator:
        loader = accelerator.prepare(DataLoader(Broken(), 1))
        refused(lambda: list(loader), RuntimeError, "disk on fire")
        loader = accelerator.prepare(DataLoader([0, 1], 1, collate_fn=unlike_others))
        refused(lambda: list(loader), RuntimeError, "no class of ours")


def test_an_error_of_a_dataset_is_raised_on_every_rank_that_waits_for_its_batch(pools):
    pools.run(2, fails_in_time)


def make(mode="ddp", sizes=None, **options):
    with accelerator_of(mode, sizes=sizes or {"cp_size": 2}, **options):
        pass


def refuses_shards() -> None:
    refused(lambda: make(sizes={"cp_size": 2, "dp_shard_size": 2}), ValueError, "dp_shard_size=2", "fsdp_version=2")
    with accelerator_of("ddp") as accelerator:
        values = torch.arange(4.0) + (dist.get_rank() == 3)  # alike on ranks 0 and 1, who learn of it
        refused(lambda: accelerator.gather_for_metrics(values), ValueError, "hold different values")
        assert len(accelerator.gather_for_metrics(values - values)) == 8


def refuses_by_name() -> None:
    refused(lambda: make(sizes={"cp_size": 3}), ValueError, "make 3 processes, found 2")
    refused(
        lambda: make(sizes={"cp_size": 2, "dp_replicate_size": 2}), ValueError, "dp_replicate_size=2", "make 4 processes, found 2"
    )
    refused(lambda: make(sizes={"cp_size": 2, "tp_size": 2}), NotImplementedError, "cp_size=2 with tp_size=2", "set tp_size=1")
    with accelerator_of("ddp") as accelerator:
        sampler = DistributedSampler(range(8), num_replicas=2, rank=0)
        for loader in (
            DataLoader(range(8), 2, sampler=sampler),
            DataLoader(range(8), batch_sampler=BatchSampler(sampler, 2, drop_last=False)),
        ):
            refused(lambda: accelerator.prepare(loader), ValueError, "a DistributedSampler over 2 ranks", "never be read")  # noqa: B023
        accelerator.dataloader_config.use_stateful_dataloader = True
        refused(lambda: accelerator.prepare(DataLoader(range(8))), NotImplementedError, "use_stateful_dataloader")
        model, optimizer, _ = build("llama")
        model, optimizer = accelerator.prepare(model, optimizer)
        ids = torch.arange(8)[None]
        with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2, enabled=True):
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            refused(optimizer.step, RuntimeError, "inside of no_sync", "LocalSGD")
        optimizer.step()
        # Each rank's own tokens are no samples: those of one rank would be taken for all.
        own = torch.arange(4.0).view(1, 4) + dist.get_rank()
        for values in (own, {"logits": own}, own.long(), (own[:, : 2 + dist.get_rank()],)):
            refused(lambda: accelerator.gather_for_metrics(values), ValueError, "hold different values", "gather(model, logits)")  # noqa: B023
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    refused(lambda: make("fsdp2", fsdp_plugin=plugin), NotImplementedError, "FSDP1 is not supported")
    refused(lambda: make("fsdp2", ddp=False), ValueError, "ddp=False", "FSDP plugin")
    reset()
    refused(lambda: ring_of(Accelerator(cpu=True)), ValueError, "no sequence axis of ours")
    reset()


def test_what_would_be_wrong_is_refused_by_name_on_every_rank(pools):
    pools.run(2, refuses_by_name)
    pools.run(4, refuses_shards)


def undoes() -> None:
    with accelerator_of("ddp") as accelerator:
        before = dict(vars(Accelerator))
        own = set(accelerator.__dict__)
        model, optimizer, scheduler = build("llama")
        hooks = len(optimizer._optimizer_step_pre_hooks)
        attention = model.config._attn_implementation
        loader = DataLoader(TensorDataset(torch.arange(COUNT)), 2, collate_fn=noisy)
        parallel, _, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        ring = ring_of(accelerator)
        ids = torch.arange(10)[None]
        logits = parallel(input_ids=ids).logits
        assert logits.shape[1] == 5
        assert ring.plan_of(parallel) is ring.plan_of(model)
        wholes = ring.gather(parallel, logits)
        assert wholes.shape[1] == 10
        torch.testing.assert_close(ring.sum_over_tokens(parallel, logits), wholes.sum(1))
        ring.undo()
        assert set(accelerator.__dict__) == own - {*METHODS, "ring"}
        assert dict(vars(Accelerator)) == before
        assert model.config._attn_implementation == attention
        torch.testing.assert_close(parallel(input_ids=ids).logits, wholes)
        assert type(vars(loader)["base_dataloader"]) is DataLoader
        assert len(optimizer._optimizer_step_pre_hooks) == hooks
        assert not scheduler.split_batches
        assert "step" not in vars(scheduler)
        refused(lambda: ring_of(accelerator), ValueError, "no sequence axis of ours")
    with accelerator_of("ddp", sizes={"cp_size": 1}) as accelerator:
        ring = ring_of(accelerator)
        model = accelerator.prepare(build("llama")[0])
        assert not set(METHODS) & set(accelerator.__dict__), "one rank shares its sequences with nobody: all is Accelerate's"
        assert ring.gather(model, ids) is ids
        assert ring.sum_over_tokens(model, ids) == ids.sum()
        assert accelerator.gather_for_metrics(torch.tensor([dist.get_rank()])).tolist() == [0, 1]


METHODS = (
    "prepare",
    "prepare_model",
    "prepare_optimizer",
    "prepare_data_loader",
    "prepare_scheduler",
    "skip_first_batches",
    "gather_for_metrics",
)


def test_undo_gives_back_what_was_prepared_and_one_rank_alone_changes_nothing(pools):
    pools.run(2, undoes)


def chooses() -> None:
    with accelerator_of("ddp", plan=lambda model: ring_plan(model) if model.config.vocab_size == 64 else None) as accelerator:
        kept, parallel = build("llama")[0], build("llama")[0]
        kept.config.vocab_size = 63
        prepared = accelerator.prepare(kept, parallel)
        ids = torch.arange(10)[None]
        assert [model(input_ids=ids).logits.shape[1] for model in prepared] == [10, 5]
    with accelerator_of("fsdp2") as accelerator:
        model = build("llama")[0]
        refused(lambda: accelerator.prepare(model), ValueError, "model and optimizer must be passed together")
        assert model(input_ids=ids).logits.shape[1] == 10, "what Accelerate refused is left as it was"


def test_a_plan_may_leave_a_model_whole_and_none_is_left_on_a_model_that_was_refused(pools):
    pools.run(2, chooses)


def test_sizes_come_from_accelerate_launch(monkeypatch):
    arguments = ["--use_parallelism_config", "--parallelism_config_cp_size", "2", "--parallelism_config_dp_replicate_size", "4"]
    options = launch_command_parser().parse_args([*arguments, "script.py"])
    for key, value in prepare_extend_env_parallelism_config(options, {}).items():
        monkeypatch.setenv(key, value)
    config = RingParallelismConfig()
    assert (config.cp_size, config.dp_replicate_size, config.total_size) == (2, 4, 8)
    assert config.non_data_parallel_size == 1
    assert config.active_mesh_dims == ["dp_replicate", "cp"]
    assert not config.cp_enabled
    assert RingParallelismConfig(cp_size=4, dp_replicate_size=1).total_size == 4


@pytest.mark.parametrize("sizes", [{"cp_size": 0}, {"dp_replicate_size": 0}, {"cp_size": 2, "sp_size": 2}])
def test_sizes_that_accelerate_refuses_are_refused(sizes):
    with pytest.raises(ValueError, match=r"must be at least 1|mutually exclusive"):
        RingParallelismConfig(**sizes)


PAGE = Path(__file__).parents[1] / "docs" / "accelerate.md"
SCRIPT = Path(__file__).parents[1] / "examples" / "accelerate_train.py"


def blocks(language: str) -> str:
    return PAGE.read_text().split(f"```{language}\n")[1].split("```")[0]


def test_the_diff_on_the_page_is_what_the_script_has_beside_one_for_a_single_gpu():
    added = [line[1:] for line in blocks("diff").splitlines() if line.startswith("+")]
    kept = [line[1:] for line in blocks("diff").splitlines() if line.startswith(" ")]
    script = [line.strip() for line in SCRIPT.read_text().splitlines()]
    assert 0 < len(added) <= 15
    assert {line.strip() for line in added + kept} <= set(script)
    rest = [line for line in script if line not in {line.strip() for line in added}]
    assert not [line for line in rest if re.search(r"dtensor_ring|[Rr]ing[A-Z_.(]", line)], "all that is ours is in the diff"


def test_the_file_for_fsdp2_on_the_page_is_one_that_accelerate_launch_takes(tmp_path, monkeypatch):
    file = tmp_path / "fsdp2.yaml"
    file.write_text(blocks("yaml"))
    parsed = launch_command_parser().parse_args(["--config_file", str(file), "script.py"])
    options, _, _ = _validate_launch_command(parsed)
    environment = prepare_multi_gpu_env(options)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    for key, value in environment.items():
        if key.startswith("PARALLELISM_CONFIG"):
            monkeypatch.setenv(key, value)
    config = RingParallelismConfig()
    assert (config.dp_shard_size, config.cp_size, config.total_size) == (2, 4, options.num_processes)
    assert config.fsdp_dim_names == ["dp_shard_cp"]
    assert config.dp_shard_cp_dim_names == ["dp_shard", "cp"]


def test_without_accelerate_the_error_says_what_to_install(monkeypatch):
    ours = "dtensor_ring.integrations.accelerate"
    for name in [name for name in sys.modules if name.startswith(ours)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"needs accelerate 1\.12 .* pip install 'dtensor-ring\[accelerate\]'"):
        importlib.import_module(ours)
