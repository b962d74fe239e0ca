"""The load-balancing loss of mixtures of experts, over the tokens of all ranks.

    f_e = share of the assignments that go to expert e, p_e = mean probability of e, both over all layers and tokens of the batch
    loss = E * sum_e f_e p_e                        Switch Transformer (Fedus et al. 2021), equations 4 to 6

It is a product of two means, so the mean of every rank's loss is another number: the sums and the number of tokens are added up
over ranks first, in one all-reduce of 2 E + 1 numbers, and one in backward. transformers computes the same of the tokens that it
sees, in `load_balancing_loss_func`; its models are called without it, and it is added to their loss afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from dtensor_ring.integrations.transformers.outputs import SumOverRanks
from dtensor_ring.ops.dtypes import accumulate_dtype

ROUTED = ("mixtral", "qwen3_moe", "gpt_oss")  # model types whose loss is load_balancing_loss_func of transformers, unchanged
_NAMES = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")


def asks_for_router(model: PreTrainedModel, arguments: Mapping[str, Any]) -> bool:
    """Whether a call, or else the config, asks for router logits and the loss of them.

    Raises:
        NotImplementedError: it does, of a model whose loss is not known to be the one above.
    """
    config: Any = model.config
    asked = arguments.get("output_router_logits")
    where = "in the config" if asked is None else "in the call"
    if not (getattr(config, "output_router_logits", False) if asked is None else asked):
        return False
    if config.model_type not in ROUTED:
        raise NotImplementedError(
            f"output_router_logits=True {where} is not supported for models of type {config.model_type!r}: their load-balancing "
            f"loss is not linear over tokens, and known for {', '.join(ROUTED)} only; set it to False"
        )
    return True


def record_router_logits(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]] | None:
    """A forward pre-hook for the model below the head: router logits are recorded where the batch asks."""
    # Told, the head would compute a loss of this rank's tokens alone, with a mask that it does not have.
    batch = kwargs.get("ring_batch")
    return (args, {**kwargs, "output_router_logits": True}) if batch is not None and batch.loss.router else None


def has_router_loss(model: PreTrainedModel) -> bool:
    """Whether this model adds a load-balancing loss; without a head it gives router logits only."""
    return all(hasattr(model, name) for name in _NAMES)


def router_loss(model: PreTrainedModel, router_logits: Sequence[Tensor], mask: Tensor | None, mesh: DeviceMesh) -> Tensor:
    """The load-balancing loss of the whole batch, the same on every rank; gradients to be averaged over the axis.

    Args:
        model: says how many experts there are, and how many a token goes to.
        router_logits: of each layer (B x S/W, E), of this rank's tokens.
        mask: (B, S/W), 1 at tokens that count; None where all do.
        mesh: the axis.
    """
    of_model: Any = model
    experts, wide = of_model.num_experts, accumulate_dtype(router_logits[0].dtype)
    device = router_logits[0].device
    weights = None if mask is None else mask.reshape(-1).to(device, wide)
    assigned, probability = (torch.zeros(experts, dtype=wide, device=device) for _ in range(2))
    tokens = torch.zeros(1, dtype=wide, device=device)
    for logits in router_logits:
        p = logits.to(device).softmax(-1)  # in the dtype of logits, as transformers does: it decides which experts are chosen
        chosen = p.topk(of_model.num_experts_per_tok, -1).indices.flatten()
        each = p.new_ones(p.shape[0], dtype=wide) if weights is None else weights
        assigned.scatter_add_(0, chosen, each.repeat_interleave(of_model.num_experts_per_tok))
        probability = probability + (p.to(wide) * each[:, None]).sum(0)
        tokens = tokens + each.sum()
    sums = SumOverRanks.apply(torch.cat([assigned, probability, tokens]), mesh)
    assigned, probability, tokens = sums.split([experts, experts, 1])
    return experts * (assigned / tokens * probability / tokens).sum()
