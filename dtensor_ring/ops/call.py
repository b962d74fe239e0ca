"""What is asked of one attention, as a value, and how what was left open is decided.

    call = AttentionCall(Band.parse("causal"), 0.125, Layout("zigzag"))
    str(call)                      mask=causal layout=zigzag strategy=auto kernel=auto scale=0.125 softcap=0.0 ...
    AttentionCall.parse(str(call)) == call

The text is what operators take: compilers and DTensor's caches know no other arguments than tensors, numbers and texts. It holds
nothing that changes from batch to batch: lengths in it would make a compiled graph of every length. What the caller left open stays
"auto" in it and is decided inside the operator, where lengths are integers, by `AttentionCall.choose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import torch

from dtensor_ring.ops.block_kinds import block_grain, each_kind
from dtensor_ring.ops.kernels import Kernel, KernelRequirements, SoftmaxParams, choose_kernel
from dtensor_ring.planning.cost_model import Link
from dtensor_ring.planning.costs import AttentionShape
from dtensor_ring.planning.devices import model_for
from dtensor_ring.planning.documents import Documents, Slices
from dtensor_ring.planning.layout import Layout
from dtensor_ring.planning.mask import Band
from dtensor_ring.planning.predict import Predictor
from dtensor_ring.planning.problem import AttentionProblem
from dtensor_ring.planning.schedule import ends_together
from dtensor_ring.planning.stage_choice import choose_stages
from dtensor_ring.planning.stages import BUFFERED_TOKENS

AUTO = "auto"


class Choice(NamedTuple):
    """How a call is carried out where its caller left it open."""

    strategy: str
    kernel: Kernel


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of attention, apart from its tensors, their lengths and documents.

    Attributes:
        band: which keys a query sees.
        scale: multiplies q.k.
        layout: how tokens are spread over the ranks.
        strategy: "ring", "gather" or "ulysses", or "auto".
        kernel: a name in `dtensor_ring.ops.kernels.KERNELS`, or "auto".
        softcap: c > 0 bounds scores to c * tanh(score / c).
        dropout_p: probability of dropping an attention weight.
        deterministic: gradients are bitwise the same from run to run.
        training: a backward pass may follow.
        kv_head_group_size: key heads whose keys travel at a time, 0 for all.
        stages: transfers of "ring", 0 for as few as `memory` allows.
        memory: bytes that the buffers of stages may take, 0 for the default.
        cost_model: the text of the model that stages are chosen by, "" for that of the device.
    """

    band: Band
    scale: float
    layout: Layout
    strategy: str = AUTO
    kernel: str = AUTO
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic: bool = False
    training: bool = False
    kv_head_group_size: int = 0
    stages: int = 0
    memory: int = 0
    cost_model: str = ""

    def __str__(self) -> str:
        """The text that `parse` reads: no float is rounded."""
        # Equal calls have equal texts, since a text is what compilers and caches compare: every field, always, in one order.
        return (
            f"mask={self.band.text} layout={self.layout} strategy={self.strategy} kernel={self.kernel} scale={self.scale!r} "
            f"softcap={self.softcap!r} dropout_p={self.dropout_p!r} deterministic={int(self.deterministic)} "
            f"training={int(self.training)} kv_head_group_size={self.kv_head_group_size} "
            f"stages={self.stages} memory={self.memory} cost_model={self.cost_model}"
        )

    # The operators parse their text in every call, forward and backward, and a run has a handful of texts.
    @classmethod
    @lru_cache(maxsize=256)
    def parse(cls, text: str) -> AttentionCall:
        """The call of a text."""
        words = dict(word.split("=", 1) for word in text.split())
        return cls(
            Band.parse(words["mask"]),
            float(words["scale"]),
            Layout.parse(words["layout"]),
            words["strategy"],
            words["kernel"],
            float(words["softcap"]),
            float(words["dropout_p"]),
            words["deterministic"] == "1",
            words["training"] == "1",
            int(words["kv_head_group_size"]),
            int(words["stages"]),
            int(words["memory"]),
            words["cost_model"],
        )

    @property
    def default_strategy(self) -> str:
        """The strategy asked for; "ring" where it is left open and nothing speaks for another."""
        return "ring" if self.strategy == AUTO else self.strategy

    @property
    def softmax(self) -> SoftmaxParams:
        """What every block of this attention is given."""
        return SoftmaxParams(self.scale, self.softcap, self.deterministic, self.dropout_p)

    def problem(
        self, lengths: Sequence[int], world: int, documents: Documents | Slices | None, token_bytes: int = 0
    ) -> AttentionProblem:
        """What is planned for: this call on tensors of some lengths (of queries, of keys); "auto" is planned as "ring".

        `token_bytes` are those of the key and value of one token, in all of this rank's batch and heads: what `memory` is counted
        in, the same on all ranks that share a sequence.
        """
        q_length, k_length = lengths
        problem = AttentionProblem(self.layout, self.band, q_length, k_length, world, self.default_strategy, documents)
        return problem.staged(self.stages, self._most_tokens(token_bytes))

    def _most_tokens(self, token_bytes: int) -> int:
        return self.memory // token_bytes if self.memory and token_bytes else BUFFERED_TOKENS

    def by_speed(self, problem: AttentionProblem, kernel: str, shape: AttentionShape, link: Link | None) -> AttentionProblem:
        """The problem in the stages that are fastest by a model, of those that memory allows, where the call leaves them open.

        Everything that is read here is the same on all ranks. With dropout and ALiBi the fewest stay: masks and distances depend
        on a plan, which forward and backward must have alike, whatever transport a group is given in between.

        Args:
            problem: that of `problem`, with the strategy chosen.
            kernel: the name of the kernel chosen for it.
            shape: sizes of this rank's tensors.
            link: how ranks exchange, as the transport knows it.
        """
        model = model_for(self.cost_model, link)
        if model is None or self.stages or self.dropout_p or problem.strategy != "ring":
            return problem
        if self.kv_head_group_size:  # each group of heads is an attention of its own
            group = min(self.kv_head_group_size, shape.kv_heads)
            shape = shape._replace(heads=shape.heads * group // shape.kv_heads, kv_heads=group)
        token_bytes = shape.kv_numbers * shape.itemsize
        return choose_stages(problem, Predictor(model, kernel, shape, model.over(link)), self._most_tokens(token_bytes))

    def need(
        self, device: str, dtype: torch.dtype, head_dim: int, v_head_dim: int, rows: int | None = None, heads: int | None = None
    ) -> KernelRequirements:
        """What is asked of a kernel for tensors of a device type and dtype, ALiBi and lengths aside; see there."""
        return KernelRequirements(
            device=device,
            dtype=dtype,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            training=self.training,
            softcap=self.softcap,
            deterministic=self.deterministic,
            dropout=self.dropout_p > 0,
            scale=self.scale,
            rows=rows,
            heads=heads,
        )

    def choose(self, need: KernelRequirements, has_alibi: bool = False, problem: AttentionProblem | None = None) -> Choice:
        """The strategy and the kernel; the same on every rank, and in forward and backward.

        Everything that is read here is the same on all ranks, except that packages may be installed on one and not on another:
        which kernel came out is compared with the rest of the call before anything is sent.

        Args:
            need: what is asked of the kernel, ALiBi and lengths aside.
            has_alibi: whether there are ALiBi slopes. Flash kernels measure distances from the end of a block, which "gather" may
                allow where "ring" does not.
            problem: what is planned for; None while lengths are symbols, and then neither ALiBi's distances nor blocks are judged.

        Raises:
            NotImplementedError: no kernel does what is asked; the text has each kernel's reason.
        """
        strategy = self.default_strategy
        if has_alibi:
            assert problem is not None, "distances depend on lengths"
            # Distances decide on the kernel, and on the strategy where that is open: so it is settled before kernels are asked.
            strategy, alignment = _choose_for_alibi(self.strategy, problem)
            need = replace(need, alibi=alignment)
        kinds = None
        if problem is not None:
            problem = replace(problem, strategy=strategy)
            kinds = partial(each_kind, problem)
            need = replace(need, tokens=-(-problem.q_length // problem.world), grain=block_grain(problem))
        return Choice(strategy, choose_kernel(None if self.kernel == AUTO else self.kernel, need, kinds))


def _choose_for_alibi(strategy: str, problem: AttentionProblem) -> tuple[str, Literal["aligned", "shifted"]]:
    """The strategy, and whether blocks are "aligned" so that flash kernels measure ALiBi distances rightly, or "shifted"."""
    # "ring" first: it keeps less memory, and "gather" is worth it only where it saves the flash kernel.
    for candidate in ("ring", "gather") if strategy == AUTO else (strategy,):
        if ends_together(replace(problem, strategy=candidate).planned):
            return candidate, "aligned"
    return ("ring" if strategy == AUTO else strategy), "shifted"
