"""``--objective distillation``: cross-entropy, and how far the model is from a teacher, a trained checkpoint, of full
precision as a rule: in its scores, and in relations of its queries, keys and values."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from megaforge.checkpoint.checkpoint import load_checkpoint, read_meta
from megaforge.checkpoint.find import find_checkpoint
from megaforge.config.config import Config
from megaforge.config.launcher import print_rank_0
from megaforge.config.model_config import ModelConfig
from megaforge.config.schema import config_from_dict
from megaforge.data.loader import Batch
from megaforge.device import upload
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel, ModelOutput
from megaforge.nn.losses import LossTerm
from megaforge.nn.relations import Watch, mixer_with_relations
from megaforge.optim.main_parameters import MainParameters
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import compute_dtype, make_layer_context
from megaforge.parallel.mappings import reduce_from_tensor_parallel
from megaforge.training.objectives import NextToken
from megaforge.training.relation_loss import relation_divergence


class Distillation(NextToken):
    """Terms: ``loss``, the labels' cross-entropy; ``distill``, the divergence from the teacher's predictions at the
    temperature, a mean over labels that count (Hinton et al., arXiv 1503.02531); ``relations``, that of
    :mod:`megaforge.training.relation_loss`, a mean over tokens and heads.

    The teacher stands on every rank, split over tp, ep and cp as the model is, and computes without gradients.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.flags = config.distill
        self._teacher: HybridModel | None = None
        self._watches: tuple[Watch, Watch] | None = None

    def prepare(self, config: Config, model: Any, ctx: ParallelContext, tokenizer: dict[str, Any] | None) -> None:
        """Loads the teacher. Collective.

        Raises:
            UserError: on every rank: there is none, or its vocabulary is another.
        """
        self._teacher = teacher = load_teacher(config, ctx, tokenizer)
        if self.flags.distill_relation_weight:
            whose = (("the model", model), ("the teacher", teacher))
            ours, theirs = (mixer_with_relations(one, self.flags.distill_relation_layer, name) for name, one in whose)
            self._watches = Watch(ours, training_only=True), Watch(theirs, training_only=False)
            if self._watches[0].heads != self._watches[1].heads:
                heads = [[number * ctx.tp.size for number in watch.heads] for watch in self._watches]
                raise UserError(
                    f"--distill-relation-weight: the model has {heads[0]} heads of queries, keys and values, and the "
                    f"teacher {heads[1]}; choose another --distill-relation-layer, or a teacher with as many heads"
                )

    def terms(self, output: ModelOutput, batch: Batch) -> dict[str, LossTerm]:
        assert self._teacher is not None and output.head_input is not None
        teacher, flags = self._teacher, self.flags
        own = super().terms(output, batch)
        found = {"loss": dataclasses.replace(own["loss"], weight=flags.distill_label_weight)}
        tokens = upload(batch.tokens, teacher.ctx.device)
        info = teacher.pack(tokens, batch.document_start)
        with torch.no_grad():
            theirs = teacher.head_input(tokens, info)
        head, x = output.head_input
        far = head.divergence(x, teacher.head, theirs, flags.distill_temperature)
        weight = flags.distill_weight * flags.distill_temperature**2
        found["distill"] = LossTerm((far * output.mask_SB).sum(), "labels", weight)
        if self._watches is not None:
            found["relations"] = LossTerm(self._relations(info, tokens), "tokens", flags.distill_relation_weight)
        return found

    def _relations(self, info: Any, tokens: Tensor) -> Tensor:
        assert self._watches is not None and self._teacher is not None
        ours, theirs = (watch.take() for watch in self._watches)
        length, documents = tokens.shape[1], info.all_document_ids_BS
        visible = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        visible = visible & (documents[:, :, None] == documents[:, None, :])
        tp = self._teacher.ctx.tp
        own = relation_divergence(ours, theirs, visible) / tp.size
        return reduce_from_tensor_parallel(own, tp)


def load_teacher(config: Config, ctx: ParallelContext, tokenizer: dict[str, Any] | None) -> HybridModel:
    """The model of ``--distill-from`` at the layout of ``config``, in evaluation mode. Collective.

    Raises:
        UserError: on every rank: there is none, it does not fit the layout, or has another vocabulary.
    """
    named = f"--distill-from {config.distill.distill_from}"
    assert config.distill.distill_from is not None
    path = find_checkpoint(config.distill.distill_from, ctx)
    meta = read_meta(path)
    if "config" not in meta:
        raise UserError(f"{named}: {path} does not say which model it is of")
    theirs = config_from_dict(meta["config"], source=str(path)).model
    _check_vocabulary(named, config, theirs.padded_vocab_size(), theirs.vocab_size, meta.get("tokenizer"), tokenizer)
    try:
        teacher = build_teacher(config, theirs, ctx)
    except (UserError, ValueError) as error:
        raise UserError(f"{named}: the teacher does not fit this layout: {error}") from error
    main = MainParameters(teacher)
    _ = load_checkpoint(path, main.entries(), ctx, verify=False, allow_extra=("",), cast=True)
    main.after_load()
    size = sum(parameter.nbytes for parameter in teacher.parameters())
    print_rank_0(f"{named}: {path} teaches; it takes {size / 1e6:,.1f} MB a rank")
    return teacher.requires_grad_(False).eval()


def build_teacher(config: Config, teacher: ModelConfig, ctx: ParallelContext) -> HybridModel:
    """The model ``teacher`` at the layout of ``config``, not yet loaded."""
    layer = make_layer_context(
        teacher,
        ctx,
        sequence_parallel=config.parallel.sequence_parallel,
        dtype=compute_dtype(config.training),
        cp_comm_type=config.parallel.cp_comm_type,
        overlap_tp_comm=config.parallel.overlap_tp_comm,
        backends=config.training.backends,
    )
    return HybridModel(layer)


def _check_vocabulary(
    named: str, config: Config, padded: int, size: int | None, then: Any, now: dict[str, Any] | None
) -> None:
    ours = config.model
    if (size, padded) != (ours.vocab_size, ours.padded_vocab_size()):
        raise UserError(
            f"{named}: its vocabulary has {size} tokens ({padded} rows), and this model's {ours.vocab_size} "
            f"({ours.padded_vocab_size()}); scores of one token each are compared: use its tokenizer"
        )
    if then and now and then.get("fingerprint") != now.get("fingerprint"):
        raise UserError(f"{named}: it was trained with another tokenizer ({then.get('model')}); use that one")
