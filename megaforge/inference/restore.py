"""A trained model out of a checkpoint directory, ready to use on any number of tensor-parallel and pipeline ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megaforge.checkpoint.adapter_files import BaseModel
from megaforge.checkpoint.checkpoint import load_checkpoint, read_meta
from megaforge.checkpoint.find import find_checkpoint
from megaforge.checkpoint.packed_file import TrainedFile
from megaforge.checkpoint.peft_files import open_folder
from megaforge.checkpoint.prefix_files import PrefixFolder, put_before
from megaforge.checkpoint.sources import SUFFIX, open_source
from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.config.schema import config_from_dict
from megaforge.data.run_tokenizer import load_with_eod
from megaforge.data.tokenizer import Tokenizer, guess_tokenizer_type, load_tokenizer
from megaforge.data.tokenizer_files import there_is
from megaforge.device import give_back_host_memory, resolve_device
from megaforge.errors import UserError
from megaforge.inference.few_tokens import multiply_few_tokens_fast
from megaforge.inference.staged import StagedModel
from megaforge.models.prepared_run import check_run
from megaforge.models.stages import build_model
from megaforge.optim import MainParameters
from megaforge.parallel.agree import from_first_rank, together
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.distributed import discover_launch, initialize
from megaforge.parallel.layer_context import compute_dtype, make_layer_context
from megaforge.parallel.layers import linears
from megaforge.parallel.param_spec import named_specs
from megaforge.peft.merging import Merged, add_deltas
from megaforge.quant.packed import PackedLinear, pack_model
from megaforge.training.ema import average_entries, has_average
from megaforge.training.setup import set_numerics


@dataclass(frozen=True)
class TrainedModel:
    """A model with its weights, and what it was trained with.

    Attributes:
        config: the run's configuration; its layout is the present one.
        meta: everything else the checkpoint says, e.g. ``iteration``.
        path: the checkpoint.
    """

    model: StagedModel
    ctx: ParallelContext
    config: Config
    meta: dict[str, Any]
    path: Path

    @property
    def data(self) -> dict[str, Any]:
        """What the run's data kept in the checkpoint; empty for weights that no run wrote."""
        return dict(self.meta.get("state", {}).get("data", {}))

    @property
    def choices(self) -> dict[str, Any]:
        """What was chosen when the run's data were prepared (:meth:`megaforge.data.sidecar.Sidecar.choices`): of its
        first dataset that says so, for those of a run agree. Empty where none does."""
        sources = self.data.get("sources", [])
        return next((dict(source["choices"]) for source in sources if source.get("choices")), {})

    def load_tokenizer(self, tokenizer_model: str | None = None) -> Tokenizer:
        """The tokenizer the model was trained with, from where it was then or from ``tokenizer_model``.

        Raises:
            UserError: it is gone, or is another one.
        """
        saved = self.meta.get("tokenizer")
        if saved is None:
            if tokenizer_model is None:
                raise UserError(f"{self.path} names no tokenizer; pass --tokenizer-model")
            return load_tokenizer(guess_tokenizer_type(tokenizer_model), tokenizer_model)
        model = tokenizer_model or saved["model"]
        if tokenizer_model is None and saved["type"] != "NullTokenizer" and not there_is(model):
            raise UserError(f"the tokenizer {model} that {self.path} was trained with is gone; pass --tokenizer-model")
        tokenizer = load_with_eod(saved["type"], model, saved.get("eod"), saved.get("eod_token"))
        if tokenizer.fingerprint != saved["fingerprint"]:
            raise UserError(
                f"the tokenizer {model} (SHA-256 {tokenizer.fingerprint}) is not the one that {self.path} was trained "
                f"with (SHA-256 {saved['fingerprint']}); pass that one as --tokenizer-model"
            )
        if saved.get("eod", tokenizer.eod) != tokenizer.eod:
            raise UserError(
                f"{self.path} was trained on documents that end with token {saved['eod']}, and the tokenizer {model} "
                f"ends them with {tokenizer.eod}; pass the tokenizer as it was then as --tokenizer-model"
            )
        return tokenizer


def load_trained_model(
    load: str,
    *,
    tp: int | None = None,
    pp: int = 1,
    device: str = "auto",
    ema: bool = False,
    kernels: bool = False,
    dtype: str | None = None,
    adapter: str | None = None,
) -> TrainedModel:
    """Joins the other ranks, if there are any, and loads a model. Collective.

    Args:
        load: a run's ``--save`` directory (its newest valid checkpoint), a checkpoint, or a ``.safetensors`` file.
        tp: tensor-parallel size; None takes all ranks of a stage.
        pp: pipeline stages, one a rank.
        device: cpu, cuda or auto.
        ema: with the moving average of the weights (``--ema-decay``) in their place.
        kernels: quantized matrices are multiplied by packed kernels.
        dtype: what weights and activations are kept in, fp32 or bf16; None: as in training.
        adapter: a folder of ``peft``'s files, merged into the weights, as adapters in a checkpoint are.

    Raises:
        UserError: no valid checkpoint, no average for ``ema``, or a model that ``tp`` or ``pp`` does not divide.
    """
    launch = discover_launch()
    if pp < 1 or launch.world_size % pp:
        raise UserError(f"--pp {pp} does not divide the {launch.world_size} ranks that were started")
    tp = launch.world_size // pp if tp is None else tp
    if tp < 1 or launch.world_size // pp % tp:
        raise UserError(f"--tp {tp} does not divide the {launch.world_size // pp} ranks of a pipeline stage")
    place = resolve_device(device, launch.local_rank)
    _join(place)
    ctx = ParallelContext.create(tp=tp, pp=pp, device=place)
    file = together(ctx, lambda: TrainedFile(load)) if Path(load).suffix == SUFFIX else None
    path = find_checkpoint(load, ctx) if file is None else file.path
    meta = read_meta(path) if file is None else file.meta
    if ema and not has_average(meta):
        raise UserError(
            f"--ema: {path} keeps no average of the weights; train with --ema-decay 0.999, or leave --ema out"
        )
    config = _present_config(meta, path, tp, pp, device, dtype)
    plan = check_run(config, launch.world_size).plan
    set_numerics(config, place)
    layer = make_layer_context(config.model, ctx, dtype=compute_dtype(config.training))
    model = build_model(dataclasses.replace(layer, without_memory=file is not None), plan)
    packed = file is not None and file.is_packed
    if file is not None:
        together(ctx, lambda: file.load(model, ctx, kernels=kernels))
    else:
        _load_weights(model, path, ctx, ema)
    if adapter is not None:
        add_adapter(model, ctx, config, adapter, path, packed=packed)
    Merged(model)
    if kernels:
        _use_kernels(model, packed=packed, path=path)
    _ = multiply_few_tokens_fast(model, place.type)
    _ = give_back_host_memory()  # the main weights that a 16-bit model was loaded through
    return TrainedModel(StagedModel(model.eval(), plan), ctx, config, meta, path)


def _join(place: torch.device) -> None:
    """Joins the other ranks, unless this process has done so to train."""
    if not dist.is_initialized():
        _ = initialize(place)


def _load_weights(model: nn.Module, path: Path, ctx: ParallelContext, ema: bool) -> None:
    main = MainParameters(model)
    entries = average_entries(main) if ema else main.entries()
    _ = load_checkpoint(path, entries, ctx, verify=False, allow_extra=("",), cast=True)
    main.after_load()


def add_adapter(
    model: nn.Module, ctx: ParallelContext, config: Config, adapter: str, path: Path, *, packed: bool = False
) -> None:
    """Merges the adapter of the folder ``adapter`` into a model that was loaded from ``path``, or puts its prefix in
    front of the layers. Collective.

    Raises:
        UserError: on every rank: it is not one, of another base, or the weights are codes.
    """
    if packed or config.model.quantizes or config.model.peft is not None:
        has = "adapters of its own" if config.model.peft is not None else "quantized matrices"
        raise UserError(f"--adapter {adapter}: {path} has {has}, into which nothing is merged; leave it out")
    base = BaseModel(config.model)
    folder = together(ctx, lambda: open_folder(adapter))
    from_first_rank(ctx, lambda: folder.check_base(open_source(path), base))
    if isinstance(folder, PrefixFolder):
        count = together(ctx, lambda: put_before(model, config.model, folder, ctx))
        print_rank_0(f"--adapter {adapter}: a prefix of {folder.length} in front of {count} layers")
        return
    deltas = together(ctx, lambda: folder.deltas(base))
    for spec, parameter in named_specs(model):
        if spec.name in deltas:
            add_deltas(parameter, spec, deltas[spec.name], ctx)
    print_rank_0(f"--adapter {adapter}: merged into {len(deltas)} matrices")


def _use_kernels(model: nn.Module, *, packed: bool, path: Path) -> None:
    """Packs what a checkpoint has not packed already, and says which matrices have no kernel."""
    if not packed:
        _ = pack_model(model, kernels=True)
    ops = [layer.op for _, layer in linears(model) if isinstance(layer.op, PackedLinear)]
    if not ops:
        raise UserError(f"--use-custom-kernels: no matrix of {path} is quantized (--quantize-weights); leave it out")
    left = sum(not op.uses_kernels for op in ops)
    if left:
        print_rank_0(
            f"--use-custom-kernels: {left} of {len(ops)} quantized matrices have no packed kernel (they are for "
            "binary, ternary and int4 weights with symmetric activations); torch multiplies their codes"
        )


def _present_config(meta: dict[str, Any], path: Path, tp: int, pp: int, device: str, dtype: str | None) -> Config:
    if "config" not in meta:
        raise UserError(f"--load {path}: it does not say which model it is of; no training run wrote it")
    config = config_from_dict(meta["config"], source=str(path))
    pattern = config.model.hybrid_layer_pattern
    uncut = None if pattern is None else pattern.replace("|", "")  # the run's stages need not be these
    types: dict[str, Any] = {} if dtype is None else {"bf16": dtype == "bf16", "fp16": False, "fp64": False}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, hybrid_layer_pattern=uncut),
        parallel=dataclasses.replace(
            config.parallel,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=None,
            num_layers_per_virtual_pipeline_stage=None,
            pipeline_schedule=None,
            recompute="none",
            context_parallel_size=1,
            expert_model_parallel_size=1,
            expert_tensor_parallel_size=None,
            sequence_parallel=False,
            zero_stage=0,
            distributed_backend="auto",
            grad_compression="none",
            grad_reduce_in_bf16=False,
        ),
        training=dataclasses.replace(
            config.training,
            micro_batch_size=1,
            global_batch_size=None,
            rampup_batch_size=(),
            step_batch_size_schedule=(),
            device=device,
            eval_global_batch_size=None,
            **types,
        ),
    )
