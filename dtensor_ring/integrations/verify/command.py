"""`python -m dtensor_ring verify`: a model from a path, processes over gloo, and what `verify` finds."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.utils import logging

from dtensor_ring._register import register
from dtensor_ring.comm import transport_along
from dtensor_ring.comm.rank_checks import refused_together
from dtensor_ring.integrations.transformers.ask import ring_plan
from dtensor_ring.integrations.verify.verifying import verify
from dtensor_ring.placements import Contiguous, SequencePlacement, Stripe, Zigzag
from dtensor_ring.planning.documents import Documents
from dtensor_ring.planning.layout import Layout
from dtensor_ring.tools.verification import Verification

_DOCUMENTS = (4, 1, 6, 2, 3)  # shares of a packed row, short ones between long ones
# What a wrong path, option or model ends in: one line for whoever typed it. Anything else is a fault, and shows where.
_REFUSALS = (ValueError, TypeError, NotImplementedError, OSError)


class Answer(NamedTuple):
    """What a process has to say: a text to print, whether all is right, and whether the text is a refusal."""

    text: str
    ok: bool
    refused: bool = False


def run(options: argparse.Namespace) -> Answer | None:
    """Verifies what the options ask for, over processes made here, or over torchrun's.

    Returns:
        What to print; None on torchrun's ranks but the first.

    Raises:
        ValueError: options that do not fit; or what the model, the plan or the batch is refused for.
    """
    _check(options)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _under_torchrun(options)
    world = options.cp or 2
    with tempfile.TemporaryDirectory() as folder:
        started = multiprocessing.start_processes(
            _work,
            (world, folder, options),
            nprocs=world,
            join=False,
            daemon=True,
            start_method="spawn",
        )
        assert started is not None, "processes that are not joined are returned"
        while not started.join():
            pass
        # Files, and no pipe: nobody reads before all have ended, and the tables of many ranks would fill a pipe.
        found = [Answer(*json.loads((Path(folder) / str(rank)).read_text())) for rank in range(world)]
    return next((answer for answer in found if answer.refused), found[0])


def _check(options: argparse.Namespace) -> None:
    torchrun = os.environ.get("WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
    if options.cp is not None and torchrun not in (None, str(options.cp)):
        raise ValueError(f"--cp {options.cp}, but torchrun has started {torchrun} processes: leave --cp out, or start as many")
    for name, least in (("cp", 1), ("batch", 1), ("layers", 1), ("length", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} is at least {least}, found {value}")
    placement_of(options.layout)
    if not Path(options.model).expanduser().exists():
        raise ValueError(
            f"--model {options.model}: no such file or folder. Give a folder with a config.json, a config.json or a .gguf file; "
            "nothing is downloaded"
        )


def _under_torchrun(options: argparse.Namespace) -> Answer | None:
    dist.init_process_group("gloo")
    try:
        answer = _answer(options)
        return answer if dist.get_rank() == 0 or answer.refused else None
    finally:
        dist.destroy_process_group()


def _work(rank: int, world: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    (Path(folder) / str(rank)).write_text(json.dumps(_answer(options)))
    # Nobody leaves while another still asks for its part of a verdict or of an error.
    dist.barrier()
    dist.destroy_process_group()


def _answer(options: argparse.Namespace) -> Answer:
    register()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        found = verified(options)
    except _REFUSALS as failure:
        return Answer(str(failure), ok=False, refused=True)
    text = (
        json.dumps({"model": options.model, "cp": dist.get_world_size(), **found.facts()}, indent=2) if options.json else str(found)
    )
    return Answer(text, found.ok)


def verified(options: argparse.Namespace) -> Verification:
    """As `verify`, on a rank, of what the options name."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    transport = transport_along(mesh)
    with refused_together(lambda: [transport]):  # one host of several may lack the file
        try:
            model = load(options)
        except OSError as failure:  # in a class that is told to other ranks
            raise ValueError(str(failure)) from failure
        batch = make_batch(model, options, options.length or 64 * world)
        plan = ring_plan(model, placement_of(options.layout), options.strategy, unlisted=options.unlisted)
    return verify(model, batch, mesh, plan=plan, edge_cases=not options.no_edge_cases)


def load(options: argparse.Namespace) -> PreTrainedModel:
    """The model at a path, in a dtype, with its weights or with random ones, and perhaps fewer layers."""
    path = Path(options.model).expanduser()
    folder = path if path.is_dir() else path.parent
    source: dict[str, str] = {}
    if path.suffix == ".gguf":
        source = {"gguf_file": path.name}
    elif path.is_dir() and not (path / "config.json").exists():
        raise ValueError(f"--model {path}: no config.json in this folder. Give a model's folder, a config.json or a .gguf file")
    if path.is_file() and not source:
        try:
            values = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"--model {path} holds no JSON: {error}") from error
        if not isinstance(values, dict) or "model_type" not in values:
            raise ValueError(f"--model {path}: not a config of transformers, which names its model_type")
        config: Any = AutoConfig.for_model(**values)
    else:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **source)
    _shorten(config.get_text_config(), options.layers)
    # One process is the measure, and transformers' sdpa knows neither the softcaps of some models nor the sinks of others.
    chosen: dict[str, Any] = {"dtype": getattr(torch, options.dtype), "attn_implementation": "eager"}
    has_weights = bool(source) or (path.is_dir() and any(next(path.glob(end), None) for end in ("*.safetensors", "*.bin")))
    if has_weights:
        model = _class_for(config).from_pretrained(folder, config=config, local_files_only=True, **chosen, **source)
        if source:
            del model.config.quantization_config  # the weights are of the dtype now
        return model
    torch.manual_seed(options.seed)  # the same weights on every rank
    return _class_for(config).from_config(config, **chosen)


def _class_for(config: Any) -> Any:  # noqa: ANN401
    """The auto class of a config: encoders such as BERT have a masked-LM head unless they say that they are decoders."""
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not causal and not getattr(config, "is_decoder", False):
        return AutoModelForMaskedLM
    return AutoModelForCausalLM


def _shorten(config: Any, layers: int | None) -> None:  # noqa: ANN401
    if layers is None:
        return
    if layers > config.num_hidden_layers:
        raise ValueError(f"--layers {layers}, but the model has {config.num_hidden_layers}")
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]


def make_batch(model: PreTrainedModel, options: argparse.Namespace, length: int) -> Mapping[str, Tensor]:
    """Random tokens, the same on every rank; some labels do not count, as in real batches."""
    coins = torch.Generator().manual_seed(options.seed)
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = torch.randint(vocabulary, (options.batch, length), generator=coins)
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape, generator=coins) < 0.1, -100)}
    if options.packed:
        if length < 2 * sum(_DOCUMENTS):
            raise ValueError(f"--packed needs rows of at least {2 * sum(_DOCUMENTS)} tokens, found --length {length}")
        lengths = [length * share // sum(_DOCUMENTS) for share in _DOCUMENTS]
        lengths[0] += length - sum(lengths)
        batch["position_ids"] = Documents.from_lengths(lengths).position_ids().expand(options.batch, -1)
    return batch


def placement_of(layout: str) -> SequencePlacement:
    """The placement of a layout's text.

    Raises:
        ValueError: there is none.
    """
    parsed = Layout.parse(layout)
    for placement in (Contiguous(1), Zigzag(1), Zigzag(1, per_document=True), Stripe(1, block=parsed.block)):
        if placement.layout == parsed:
            return placement
    raise ValueError(f"--layout {layout} has no placement: use contiguous, zigzag, stripe, stripe:BLOCK or zigzag/documents")
