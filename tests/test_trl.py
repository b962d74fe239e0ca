"""TRL's SFTTrainer, DPOTrainer and GRPOTrainer over ranks log everything, and end with the weights, as in one process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import slow
from trainers import assert_same, fresh_accelerate, make_model, options, outcome, ring

from dtensor_ring.integrations.trainer.checks import check_trainer

WORDS = [f"w{i}" for i in range(60)]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def text(words, seed):
    drawn = torch.randint(0, len(WORDS), (words,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in drawn.tolist())


def texts():
    return {"text": [text(6 + 3 * (i % 4), i) for i in range(12)]}


def pairs():
    """Prompts, and answers of unlike lengths."""
    chosen, rejected = ([f" {text(n, seed + i)}" for i, n in enumerate(sizes)] for sizes, seed in ((_LONG, 50), (_SHORT, 90)))
    return {"prompt": [text(4 + i % 3, i) for i in range(8)], "chosen": chosen, "rejected": rejected}


_LONG, _SHORT = [5 + i % 4 for i in range(8)], [7 - i % 3 for i in range(8)]


def reward(completions, **_columns):
    """A number that the words of a completion have, other ones for most completions."""
    return [float(sum(int(word[1:]) for word in completion.split() if word.startswith("w")) % 7) for completion in completions]


def wild_reward(completions, log_extra, **columns):
    """One that is another on every process, as of a judge that is asked anew; and a column for the table of completions."""
    log_extra("length", [len(completion) for completion in completions])
    return [value * (1 + 100 * dist.get_rank()) for value in reward(completions, **columns)]


CASES = {
    # the trainer, its arguments, its data, and arguments of its constructor
    "SFT": ("SFT", {"gradient_accumulation_steps": 2}, texts, {}),
    "SFT packed": ("SFT", {"packing": True}, texts, {}),
    "SFT smoothed": ("SFT", {"label_smoothing_factor": 0.1}, texts, {}),
    "SFT dft": ("SFT", {"loss_type": "dft"}, texts, {}),
    "DPO": ("DPO", {}, pairs, {}),
    "DPO weighted": ("DPO", {"ld_alpha": 0.5, "use_weighting": True, "loss_type": ["ipo"]}, pairs, {}),
    "DPO precomputed": ("DPO", {"precompute_ref_log_probs": True}, pairs, {}),
    "GRPO": ("GRPO", {"num_iterations": 2, "gradient_accumulation_steps": 2, "top_entropy_quantile": 0.5}, pairs, {}),
    "GRPO batch": ("GRPO", {"steps_per_generation": 2, "scale_rewards": "batch", "loss_type": "grpo"}, pairs, {}),
    "GRPO wild": ("GRPO", {"log_completions": True}, pairs, {"reward_funcs": wild_reward}),
}


def reference_model():
    """Other weights than the trained model's, so that no two log-probabilities are equal."""
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def table_of(trainer):
    """The last completions, as GRPOTrainer shows and stores them."""
    columns = {**trainer._logs, **trainer._logs["rewards"], **trainer._logs["extra"]}
    return {name: list(column) for name, column in columns.items() if name not in ("rewards", "extra", "advantages")}


def on_disk(data, folder, *, alone):
    """The data as a file that all processes read, beside which TRL keeps what it has computed."""
    from datasets import load_from_disk

    if dist.get_rank() == 0:
        data.save_to_disk(folder)
    if not alone:
        dist.barrier()
    return load_from_disk(folder)


def train(case, kind, folder, rows=2, cp_size=None):
    """What a trainer logs, and its weights; `cp_size` None is TRL's own."""
    import trl
    from datasets import Dataset

    name, changed, make_data, given = CASES[case]
    data, given = Dataset.from_dict(make_data()), dict(given)
    sizes = {"per_device_train_batch_size": rows, "per_device_eval_batch_size": rows}
    config = {"max_length": 24, "eval_strategy": "steps", "eval_steps": 2}
    if name == "GRPO":
        config = {"num_generations": 2, "max_completion_length": 8}
        data, given = data.select_columns("prompt"), {"reward_funcs": reward} | given
    else:
        given["eval_dataset"] = data.select(range(4 if rows == 2 else 8))
    if name == "DPO":
        given["ref_model"] = reference_model()
    if changed.get("precompute_ref_log_probs"):
        data = on_disk(data, f"{folder}/{cp_size}", alone=cp_size is None)
        given["eval_dataset"] = data.select(range(4))
    if cp_size is not None:
        given["cp_size"] = cp_size
    base = getattr(trl, f"{name}Trainer")
    with fresh_accelerate(kind):
        args = getattr(trl, f"{name}Config")(**options(folder, kind, **sizes, **config, **changed))
        trainer = (base if cp_size is None else ring(base))(
            model=make_model(), args=args, train_dataset=data, processing_class=tokenizer(), **given
        )
        trainer.train()
        return *outcome(trainer), table_of(trainer) if name == "GRPO" else None


def beside_one_process(case, kind, folder):
    mine = train(case, kind, folder, cp_size=2)
    if dist.get_rank() == 0:
        reference = train(case, "alone", folder)
        assert_same(mine, reference)
        assert mine[2] == reference[2]
    return mine[0], mine[1].sum().item()


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, "ddp") for case in ("SFT", "SFT packed", "DPO", "GRPO")]
    + [slow(case, "ddp") for case in CASES if case not in ("SFT", "SFT packed", "DPO", "GRPO")]
    + [slow(case, "fsdp") for case in ("SFT", "SFT packed", "DPO", "GRPO")],
)
def test_a_trainer_of_trl_over_ranks_logs_and_trains_as_one_process(pools, tmp_path, case, kind):
    first, *others = pools.run(2, beside_one_process, case, kind, tmp_path)
    assert all(other == first for other in others)


def test_trainers_of_trl_that_were_not_tried_and_other_generators_are_refused_by_name():
    def check(name, **changed):
        accelerator = SimpleNamespace(
            distributed_type=SimpleNamespace(name="MULTI_GPU", value="MULTI_GPU"), parallelism_config=None, is_fsdp2=False
        )
        given = {"train_sampling_strategy": "random", "neftune_noise_alpha": None, "n_gpu": 1, "world_size": 4}
        given |= {"accelerator_config": SimpleNamespace(dispatch_batches=None, use_seedable_sampler=True)}
        given |= {"use_vllm": False, "use_transformers_continuous_batching": False, "generation_batch_size": 16}
        given |= {"num_generations": 4, "num_generations_eval": None, "per_device_eval_batch_size": 4}
        trainer = type("Ours", (type(name, (), {"__module__": "trl.trainer"}),), {})()
        trainer.accelerator, trainer.args = accelerator, SimpleNamespace(**(given | changed))
        check_trainer(trainer, 2)

    for name in ("SFTTrainer", "DPOTrainer", "GRPOTrainer"):
        check(name)
    for wanted, name, changed in (
        ("KTOTrainer was not tried", "KTOTrainer", {}),
        ("use_vllm=True", "GRPOTrainer", {"use_vllm": True}),
        ("continuous_batching", "GRPOTrainer", {"use_transformers_continuous_batching": True}),
        ("num_generations=16 does not divide the 8", "GRPOTrainer", {"num_generations": 16, "num_generations_eval": 4}),
        ("num_generations_eval=3 does not divide the 8", "GRPOTrainer", {"num_generations_eval": 3}),
    ):
        with pytest.raises(NotImplementedError, match=wanted):
            check(name, **changed)
