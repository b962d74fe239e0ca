"""transformers' Trainer with sequences over ranks: what it logs, evaluates, predicts and trains is what one process does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import line, slow
from models import SIZES, build, packed_mask
from trainers import assert_same, fresh_accelerate, make_model, options, outcome, ring, samples

from dtensor_ring import Documents, Stripe, Zigzag, ring_plan
from dtensor_ring.integrations.trainer.checks import check_trainer


def loss_of_logits(outputs, labels, num_items_in_batch=None):
    """A user's loss, from whole logits and labels that it shifts itself."""
    logits, targets = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


def flattened(alone, rows):
    """Rows packed by transformers' collator; one process is given the mask that they mean."""
    from transformers import DataCollatorWithFlattening

    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(rows)
    if not alone:
        return batch
    mask = packed_mask(Documents.from_position_ids(batch["position_ids"]), 1)
    return {name: batch[name] for name in ("input_ids", "labels", "position_ids")} | {"attention_mask": mask}


def experts():
    """A model whose routers have a loss of their own, a mean over all tokens."""
    from transformers import MixtralConfig

    return build(MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1)).float()


def adapters():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    return get_peft_model(make_model(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False))


def masked():
    """A model whose labels are those of their own tokens."""
    from transformers import CONFIG_MAPPING, AutoModelForMaskedLM

    torch.manual_seed(5)
    return AutoModelForMaskedLM.from_config(CONFIG_MAPPING["eurobert"](**SIZES, pad_token_id=0))


MODELS = {"experts": experts, "adapters": adapters, "masked": masked}
THIRDS = [{**row, "labels": row["input_ids"].masked_fill(torch.arange(17) % 3 != 0, -100)} for row in samples(12)]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(samples(12))


CASES = {
    # arguments of the trainer, of its constructor, and of the plan
    "accumulation, unequal labels": ({"gradient_accumulation_steps": 2, "include_num_input_tokens_seen": "all"}, {}, {}),
    "average_tokens_across_devices=False": ({"average_tokens_across_devices": False, "gradient_accumulation_steps": 2}, {}, {}),
    "label smoothing": ({"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2}, {}, {}),
    "packed": ({}, {"data_collator": flattened}, {"placement": Zigzag(1, per_document=True)}),
    "packed, label smoothing": ({"label_smoothing_factor": 0.2}, {"data_collator": flattened}, {"placement": Stripe(1)}),
    "compute_loss_func": ({}, {"compute_loss_func": loss_of_logits}, {}),
    "chunked loss": ({"gradient_accumulation_steps": 2}, {"compute_metrics": None}, {"loss": "chunked"}),
    "routers": ({"gradient_accumulation_steps": 2}, {"model": "experts", "compute_metrics": None}, {}),
    "adapters": ({}, {"model": "adapters"}, {}),
    "masked": ({"average_tokens_across_devices": False}, {"model": "masked", "train_dataset": THIRDS}, {}),
    "masked, label smoothing": ({"label_smoothing_factor": 0.2}, {"model": "masked", "train_dataset": THIRDS}, {}),
    "stream": ({}, {"train_dataset": "stream"}, {}),
}


def train(case, kind, folder, cp_size):
    """What a trainer logs, its weights, and what compute_metrics was given: over the ranks, or `cp_size` None for one process."""
    from transformers import Trainer, TrainingArguments

    changed, given, planned = CASES[case]
    given, seen = {"train_dataset": samples(12), "eval_dataset": samples(5, seed=2)} | given, []
    given["model"] = MODELS[given["model"]]() if "model" in given else make_model()
    if given["train_dataset"] == "stream":
        given["train_dataset"] = Stream()
    if "data_collator" in given:
        given["data_collator"] = partial(given["data_collator"], cp_size is None)

    def metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"rows": len(prediction.predictions)}

    if "data_collator" not in given:  # rows of a packed batch have no number of their own
        given.setdefault("compute_metrics", metrics)
    if cp_size is not None:
        given |= {"cp_size": cp_size if kind != "config" else None, "make_plan": partial(ring_plan, **planned)}
    if kind == "config":
        from accelerate import ParallelismConfig

        changed = {
            **changed,
            "parallelism_config": ParallelismConfig(cp_size=cp_size, dp_shard_size=dist.get_world_size() // cp_size),
        }
    wrapper = "fsdp" if kind == "config" else kind
    with fresh_accelerate(wrapper):
        args = TrainingArguments(**options(folder, wrapper, **changed))
        trainer = (Trainer if cp_size is None else ring(Trainer))(args=args, **given)
        trainer.train()
        trainer.log(trainer.evaluate())
        return *outcome(trainer), seen


def beside_one_process(case, kind, folder):
    """On every rank the trainer's outcome is that of one process, which the first rank computes alone."""
    mine = train(case, kind, folder, 2)
    if dist.get_rank() == 0:
        reference = train(case, "alone", folder, None)
        assert_same(mine, reference)
        for (predictions, labels), (wanted, wanted_labels) in zip(mine[2], reference[2], strict=True):
            torch.testing.assert_close(torch.tensor(predictions), torch.tensor(wanted), rtol=1e-4, atol=1e-5)
            assert (labels == wanted_labels).all()
    return mine[0], mine[1].sum().item()


@pytest.mark.parametrize(
    ("case", "kind"),
    [("accumulation, unequal labels", "ddp"), ("packed", "ddp"), ("compute_loss_func", "ddp")]
    + [("accumulation, unequal labels", "fsdp")]
    + [slow("average_tokens_across_devices=False", "ddp"), slow("label smoothing", "ddp")]
    + [("masked, label smoothing", "ddp"), ("adapters", "ddp"), slow("masked", "ddp")]
    + [("average_tokens_across_devices=False", "config")]
    + [slow(case, "fsdp") for case in ("label smoothing", "packed", "compute_loss_func")]
    + [slow(case, "ddp") for case in ("stream", "chunked loss", "routers", "packed, label smoothing")],
)
def test_a_trainer_over_ranks_logs_evaluates_and_trains_as_one_process(pools, tmp_path, case, kind):
    first, *others = pools.run(2, beside_one_process, case, kind, tmp_path)
    assert all(other == first for other in others)


def beside_one_process_with_larger_batches(folder):
    """Two batches of two rows at a time, each over two ranks, are a batch of four rows of one process."""
    from transformers import Trainer, TrainingArguments

    def trained(kind, rows, base, **given):
        changed = {"per_device_train_batch_size": rows, "per_device_eval_batch_size": rows}
        with fresh_accelerate(kind):
            args = TrainingArguments(**options(folder, kind, **changed))
            trainer = base(model=make_model(), args=args, train_dataset=samples(12), eval_dataset=samples(8, seed=2), **given)
            trainer.train()
            trainer.log(trainer.evaluate())
            predicted = trainer.predict(samples(7, seed=4))
            return *outcome(trainer), torch.tensor(predicted.predictions), torch.tensor(predicted.label_ids)

    for kind in ("ddp", "fsdp"):
        mine = trained(kind, 2, ring(Trainer), cp_size=2)
        if dist.get_rank() == 0:
            reference = trained("alone", 4, Trainer)
            assert_same(mine, reference)
            torch.testing.assert_close(mine[2], reference[2], rtol=1e-4, atol=1e-5)
            assert torch.equal(mine[3], reference[3])


@pytest.mark.slow
def test_two_batches_over_two_ranks_each_are_one_batch_of_one_process_and_samples_that_fill_up_are_dropped(pools, tmp_path):
    pools.run(4, beside_one_process_with_larger_batches, tmp_path)


def resumed(kind, folder):
    """Two steps, a checkpoint, and two more from it, beside four steps in one go; both with AdamW, whose state is kept."""
    from transformers import Trainer, TrainingArguments

    def trainer(steps, **changed):
        changed |= {"max_steps": steps, "optim": "adamw_torch", "learning_rate": 1e-3}
        args = TrainingArguments(**options(folder, kind, **changed))
        return ring(Trainer)(model=make_model(), args=args, train_dataset=samples(12), cp_size=2)

    with fresh_accelerate(kind):
        whole = trainer(4)
        whole.train()
    with fresh_accelerate(kind):
        trainer(2, save_strategy="steps", save_steps=2).train()
    with fresh_accelerate(kind):
        rest = trainer(4, save_strategy="no")
        rest.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-2"))
        history = [entry for entry in outcome(rest)[0] if "loss" in entry]
        wanted = [entry for entry in outcome(whole)[0] if "loss" in entry]
        assert_same((history, outcome(rest)[1]), (wanted, outcome(whole)[1]), rtol=0, atol=1e-7)
        assert [entry["step"] for entry in history] == [1, 2, 3, 4]
    if kind == "ddp":
        assert "dtensor_ring" not in (Path(folder) / "checkpoint-2" / "config.json").read_text()
        assert json.loads((Path(folder) / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.parametrize("kind", ["ddp", slow("fsdp")])
def test_training_resumed_from_a_checkpoint_is_training_without_a_pause(pools, tmp_path, kind):
    pools.run(2, resumed, kind, tmp_path)


REFUSED = {
    "does not divide the 2 processes": ({}, {"cp_size": 3}),
    "cp_size=, an argument": ({}, {"cp_size": None}),
    "whole number": ({}, {"cp_size": 2.0}),
    "dispatch_batches=True": ({"accelerator_config": {"dispatch_batches": True}}, {}),
    "use_seedable_sampler=False": ({"accelerator_config": {"use_seedable_sampler": False}}, {}),
    "batch_rebalance": ({"train_sampling_strategy": "batch_rebalance"}, {}),
    "neftune_noise_alpha": ({"neftune_noise_alpha": 5.0}, {}),
    "must return a RingPlan": ({}, {"make_plan": lambda model: {}}),
}
REFUSED_UNDER_FSDP = {
    "RingParallelismConfig": ("ours", {}),
    "ParallelismConfig has cp_size=2": ("config", {"cp_size": 1}),
}


def refused(kind, folder):
    """What each refused trainer raises."""
    from accelerate import ParallelismConfig
    from transformers import Trainer, TrainingArguments

    texts = {}
    for wanted, (changed, given) in (REFUSED_UNDER_FSDP if kind == "fsdp" else REFUSED).items():
        with fresh_accelerate(kind):
            if changed in ("config", "ours"):
                config = type("RingParallelismConfig" if changed == "ours" else "Config", (ParallelismConfig,), {})
                changed = {"parallelism_config": config(cp_size=2)}
            args = TrainingArguments(**options(folder, kind, **changed))
            with pytest.raises((ValueError, NotImplementedError, TypeError)) as failure:
                ring(Trainer)(model=make_model(), args=args, train_dataset=samples(4), **{"cp_size": 2, **given})
            texts[wanted] = str(failure.value)
    return texts


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_what_would_be_silently_wrong_is_refused_by_name_on_every_rank(pools, tmp_path, kind):
    first, *others = pools.run(2, refused, kind, tmp_path)
    assert all(wanted in text for wanted, text in first.items())
    assert all(other == first for other in others)


def test_wrappers_that_were_not_tried_are_refused_by_name():
    def refused_wrapper(kind, is_fsdp2=False, n_gpu=1, **sizes):
        accelerator = SimpleNamespace(
            distributed_type=SimpleNamespace(name=kind, value=kind),
            is_fsdp2=is_fsdp2,
            parallelism_config=SimpleNamespace(**{"tp_size": 1, "sp_size": 1, **sizes}),
        )
        given = {"accelerator_config": SimpleNamespace(dispatch_batches=None, use_seedable_sampler=True), "n_gpu": n_gpu}
        args = SimpleNamespace(train_sampling_strategy="random", neftune_noise_alpha=None, **given)
        check_trainer(SimpleNamespace(accelerator=accelerator, args=args), 2)

    refused_wrapper("FSDP", is_fsdp2=True)
    refused_wrapper("MULTI_GPU")
    for wanted, changed in {
        "FSDP1": {"kind": "FSDP"},
        "DEEPSPEED": {"kind": "DEEPSPEED"},
        "tp_size=2": {"kind": "MULTI_GPU", "tp_size": 2},
        "sp_size=2": {"kind": "MULTI_GPU", "sp_size": 2},
        "DataParallel over 2": {"kind": "MULTI_GPU", "n_gpu": 2},
    }.items():
        with pytest.raises(NotImplementedError, match=wanted):
            refused_wrapper(**changed)


def refused_predictions(folder):
    """Predictions are asked of a plan that makes no logits, and of a model with outputs that cannot be gathered."""
    from transformers import Trainer, TrainingArguments

    with fresh_accelerate():
        given = {"make_plan": partial(ring_plan, loss="chunked"), "compute_metrics": len, "cp_size": 2}
        trainer = ring(Trainer)(model=make_model(), args=TrainingArguments(**options(folder)), eval_dataset=samples(2), **given)
        with pytest.raises(NotImplementedError, match="losses in chunks make no logits"):
            trainer.evaluate()
    with fresh_accelerate():
        given = {"compute_metrics": len, "cp_size": 2}
        trainer = ring(Trainer)(model=experts(), args=TrainingArguments(**options(folder)), eval_dataset=samples(2), **given)
        with pytest.raises(NotImplementedError, match="ignore_keys"):
            trainer.evaluate()


def refused_adapters(folder):
    """What is refused of adapters is refused here too, though plans are applied to the model inside."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    with fresh_accelerate():
        model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], r=2, alora_invocation_tokens=[1]))
        with pytest.raises(NotImplementedError, match="alora_invocation_tokens"):
            ring(Trainer)(model=model, args=TrainingArguments(**options(folder)), train_dataset=samples(4), cp_size=2)


def hidden_processes(folder):
    """A process group that Accelerate does not see, as of a script that torchrun has not started."""
    from transformers import Trainer, TrainingArguments

    with fresh_accelerate("alone"):
        args = TrainingArguments(**options(folder))
        with pytest.raises(ValueError, match="has 2 ranks, but Accelerate sees 1 processes"):
            ring(Trainer)(model=make_model(), args=args, train_dataset=samples(4), cp_size=2)


def whole_and_undone(folder):
    """With cp_size=1 a trainer is as without the mixin; undone plans leave the model whole; new models are planned anew."""
    from transformers import Trainer, TrainingArguments

    with fresh_accelerate():
        alone = ring(Trainer)(model=make_model(), args=TrainingArguments(**options(folder)), train_dataset=samples(4), cp_size=1)
        assert alone.model.config._attn_implementation == "sdpa"
        with pytest.raises(RuntimeError, match="no plan"):
            alone.plan  # noqa: B018
    with fresh_accelerate():
        args = TrainingArguments(**options(folder, dataloader_num_workers=1))
        trainer = ring(Trainer)(model_init=make_model, args=args, train_dataset=samples(8), cp_size=2)
        # Workers of both ranks of a sequence draw alike.
        assert trainer.get_train_dataloader().worker_init_fn.keywords["rank"] == 0
        args.dataloader_num_workers = 0
        first = trainer.model
        trainer.train()
        assert trainer.model is not first
        assert [m.config._attn_implementation for m in (first, trainer.model)] == ["sdpa", "dtensor_ring"]
        ids = samples(1)[0]["input_ids"][None]
        whole = trainer.plan.gather(trainer.model(input_ids=ids).logits)
        trainer.undo_plans()
        torch.testing.assert_close(trainer.model(input_ids=ids).logits, whole, rtol=1e-4, atol=1e-5)
        assert len(trainer.gather_function(torch.ones(1))) == 2, "what every process has, as Trainer takes it to be"
        assert {"prepare_data_loader", "gather_for_metrics", "_prepare_cp"}.isdisjoint(vars(trainer.accelerator))
    hidden_processes(folder)
    refused_predictions(folder)
    refused_adapters(folder)


def test_models_are_whole_with_one_rank_a_sequence_and_after_undo_and_new_ones_are_planned(pools, tmp_path):
    pools.run(2, whole_and_undone, tmp_path)


class Alternate(torch.utils.data.Sampler):
    """The same samples for the ranks of a sequence, as whoever plans a model for a plain Trainer has it."""

    def __iter__(self):
        return iter(range(12))

    def __len__(self):
        return 12


def plain_trainers(folder):
    """Trainer without the mixin, whose loader gives both ranks one batch: by a plan, and by Accelerate's configuration."""
    from torch.distributed.tensor.parallel import parallelize_module
    from transformers import Trainer, TrainingArguments

    from dtensor_ring.integrations.accelerate import RingParallelismConfig

    class Same(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, 2, sampler=Alternate(), collate_fn=self.data_collator)

    def trained(kind, base, model=None, **changed):
        with fresh_accelerate(kind):
            args = TrainingArguments(**options(folder, kind, train_sampling_strategy="sequential", **changed))
            trainer = base(model=make_model() if model is None else model, args=args, train_dataset=samples(12))
            trainer.train()
            history, weights = outcome(trainer)
            for entry in history:
                entry.pop("total_flos", None)  # which Trainer adds up over processes
            return history, weights

    model = make_model()
    plan = ring_plan(model)
    parallelize_module(model, line(), plan)
    results = [trained("ddp", Same, model), trained("ddp", Trainer, parallelism_config=RingParallelismConfig(cp_size=2))]
    plan.undo()
    assert not hasattr(model, "accepts_loss_kwargs")
    late = ring_plan(model)
    with fresh_accelerate("ddp"):
        trainer = Same(model=model, args=TrainingArguments(**options(folder, "ddp")), train_dataset=samples(12))
        parallelize_module(model, line(), late)
        with pytest.raises(RuntimeError, match=r"Same that was made before the plan was applied.*Apply the plan before"):
            trainer.train()
    late.undo()
    if dist.get_rank() == 0:
        reference = trained("alone", Trainer)
        for mine in results:
            assert_same(mine, reference)


def test_a_trainer_without_the_mixin_has_the_loss_and_gradients_of_one_process(pools, tmp_path):
    pools.run(2, plain_trainers, tmp_path)


def test_a_page_shows_the_difference_from_the_script_for_one_gpu_in_at_most_fifteen_lines():
    root = Path(__file__).parents[1]
    for page, script in (("trainer", "trainer_train"), ("trl", "sft_train")):
        diff = (root / "docs" / f"{page}.md").read_text().split("```diff\n")[1].split("```")[0].splitlines()
        lines = [line.strip() for line in (root / "examples" / f"{script}.py").read_text().splitlines()]
        changed = [line for line in diff if line.startswith(("+", "-"))]
        assert len(changed) <= 15
        assert all(line[1:].strip() in lines for line in diff if not line.startswith("-"))
        assert not any(line[1:].strip() in lines for line in changed if line.startswith("-"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("script", ["trainer_train.py", "sft_train.py"])
def test_an_example_of_a_trainer_logs_over_two_ranks_what_it_logs_in_one_process(script, tmp_path):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    logs = []
    for command in ([*launcher, str(root / "examples" / script)], [str(root / "examples" / script), "--cp", "1"]):
        ended = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
        shown = re.findall(r"'(loss|grad_norm|eval_loss|eval_accuracy|entropy|num_tokens)': '([^']+)'", ended.stdout)
        logs.append([(name, float(value)) for name, value in shown])
    assert [name for name, _ in logs[0]] == [name for name, _ in logs[1]]
    assert [value for _, value in logs[0]] == pytest.approx([value for _, value in logs[1]], rel=2e-3)  # four digits are shown
    assert logs[0][-1][1] != logs[0][0][1]
