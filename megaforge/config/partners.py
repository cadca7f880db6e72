"""Flags that do something only beside another: one table, checked once, before the run.

A flag counts when the user wrote it, on the command line or in a file of their own, with a value that asks for
something. A preset's values are a whole, of which a flag may switch a part off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial

from megaforge.config.config import Config
from megaforge.config.data_partners import DATA_PARTNERS
from megaforge.config.distill_partners import DISTILLATION
from megaforge.config.evaluation_partners import EVALUATION
from megaforge.config.fields import either
from megaforge.config.layer_kind import LayerKind
from megaforge.config.length_config import LENGTHS
from megaforge.config.lr_shapes import RateShape
from megaforge.config.micro_batch_config import AUTO
from megaforge.config.pattern import ahead_of, kinds_of
from megaforge.config.peft_partners import FINE_TUNING, method_partners
from megaforge.config.position_kind import PositionKind
from megaforge.config.quant_partners import QUANTIZATION, of_model
from megaforge.config.regularization_partners import REGULARIZATION
from megaforge.config.rl_partners import REINFORCEMENT
from megaforge.config.run_partners import RUN_PARTNERS, Partner
from megaforge.config.schema import settings
from megaforge.errors import raise_all
from megaforge.registry import LAYER_KINDS, LR_SCHEDULES, POSITION_EMBEDDINGS


def _evaluates(config: Config) -> bool:
    """Whether there are evaluations before the end."""
    between = config.training.eval_interval or config.length.eval_interval_epochs
    return bool(config.training.eval_iters and between)


def _warms_up(config: Config) -> bool:
    length, optimizer = config.length, config.optimizer
    return any(
        (optimizer.lr_warmup_iters, optimizer.lr_warmup_fraction, length.lr_warmup_epochs, length.lr_warmup_samples)
    )


def _scored(config: Config) -> bool:
    """Whether the checkpoints between the beginning and the end have an evaluation's score."""
    length, interval = config.length, config.checkpoint.save_interval
    saved, evaluated = length.save_interval_epochs, length.eval_interval_epochs
    if saved is not None and evaluated is not None:
        return (Fraction(repr(saved)) / Fraction(repr(evaluated))).denominator == 1
    if saved is not None or evaluated is not None:
        return saved is None and interval is None
    return interval is None or (interval > 0 and interval % config.training.eval_interval == 0)


_NO_FP16 = "is for --fp16, which is not set: it changes nothing"
_QUANTIZED_TRAINING = ("qat_adam", "qat_sgd")
_MUON = ("muon", "normuon")
_BY_SGD, _BY_ADAM = ("sgd", "qat_sgd"), ("adam", "paged_adam", "qat_adam", *_MUON)
_NO_SAVE = "nothing is saved: add --save DIR"
# Of these 0 is a value like others; elsewhere it switches something off, which needs no partner.
_ZERO_ASKS = frozenset(
    {
        "checkpoint.save_interval",
        *(f"optimizer.lr_plateau_{name}" for name in ("patience", "threshold")),
        *(f"optimizer.{name}" for name in ("adam_beta1", "adam_beta2", "sgd_momentum", "muon_momentum")),
        *(f"optimizer.{name}" for name in ("normuon_beta2", "grokfast_alpha", "grokfast_lambda", "qk_clip_alpha")),
        *("optimizer.second_stage_lr_factor", "optimizer.start_weight_decay", "optimizer.end_weight_decay"),
        "optimizer.decoupled_min_lr",
    }
)

PARTNERS = (
    *RUN_PARTNERS,
    Partner(
        ("parallel.compress_activations",),
        lambda c: c.parallel.recompute == "selective",
        "sums over the keys of attention and states of recurrences do not bear 8 bits: add --recompute selective, "
        "which keeps none of them",
    ),
    Partner(
        ("parallel.compress_activations",),
        lambda c: not c.parallel.cpu_offload_activations,
        "--cpu-offload-activations moves the same tensors: leave out the one or the other",
    ),
    Partner(
        ("parallel.compress_activations",),
        lambda c: not (ahead_of(c.model) and c.model.mtp_mode == "parallel"),
        "heads of --mtp-mode parallel are computed again, and could choose other experts: use --mtp-mode sequential",
    ),
    Partner(
        ("parallel.compress_activations",),
        lambda c: c.training.micro_batch_size < 64,
        "numbers of 64 sequences would share a scale: use --micro-batch-size 63 or less",
    ),
    Partner(
        ("training.micro_batch_size",),
        lambda c: c.training.micro_batch_size != AUTO or c.training.full_batch_size is not None,
        "memory would decide how large a batch is, and so what is learned: add --global-batch-size N",
    ),
    Partner(
        ("training.micro_batch_size",),
        lambda c: c.training.micro_batch_size != AUTO or not (c.parallel.layout == "auto" or c.resilience.elastic),
        "--layout auto and --elastic choose it with the rest: leave it out",
    ),
    Partner(
        ("parallel.sequence_checkpoint",),
        lambda c: not c.parallel.compress_activations,
        "states of recurrences do not bear the 8 bits of --compress-activations: leave out the one or the other",
    ),
    Partner(
        ("parallel.sequence_checkpoint",),
        lambda c: any(kind.recurrent for kind in kinds_of(c.model)),
        "the model has no RWKV-7 or Mamba-2 layer: it changes nothing",
        refuse=False,
    ),
    Partner(
        ("parallel.sequence_checkpoint",),
        lambda c: c.parallel.context_parallel_size == 1,
        "the ranks of --cp hand on states of their chunks by themselves: it changes nothing",
        refuse=False,
    ),
    *DATA_PARTNERS,
    *DISTILLATION,
    *REGULARIZATION,
    *REINFORCEMENT,
    *EVALUATION,
    *FINE_TUNING,
    Partner(
        ("optimizer.qk_clip_threshold", "optimizer.qk_clip_alpha"),
        lambda c: c.optimizer.qk_clip,
        "no logit is looked at: add --qk-clip",
    ),
    Partner(("optimizer.ema_evaluate",), lambda c: c.optimizer.ema_decay, "no average is kept: add --ema-decay 0.999"),
    Partner(("optimizer.ema_evaluate",), lambda c: c.training.eval_iters, "nothing is evaluated: add --eval-iters N"),
    Partner(
        ("checkpoint.save_interval", "length.save_interval_epochs", "checkpoint.keep_last"),
        lambda c: c.checkpoint.save,
        _NO_SAVE,
    ),
    Partner(("checkpoint.keep_best",), lambda c: c.checkpoint.save, _NO_SAVE),
    Partner(
        ("checkpoint.keep_best",),
        _evaluates,
        "checkpoints have no score to be best by: add --eval-iters N and --eval-interval N",
    ),
    Partner(
        ("checkpoint.keep_best",),
        lambda c: not _evaluates(c) or _scored(c),
        "only checkpoints of evaluated iterations have a score: make --save-interval a multiple of --eval-interval, "
        "both in iterations or both in epochs",
    ),
    Partner(
        ("checkpoint.finetune",),
        lambda c: c.checkpoint.load,
        "there are no weights to start from: add --load DIR",
    ),
    Partner(
        (
            *("checkpoint.load_optim", "checkpoint.load_rng", "checkpoint.reset_data"),
            *("optimizer.override_opt_param_scheduler", "optimizer.use_checkpoint_opt_param_scheduler"),
        ),
        lambda c: c.checkpoint.load and not c.checkpoint.finetune,
        "no run is continued (--load without --finetune): it changes nothing",
        refuse=False,
    ),
    Partner(
        ("training.exit_interval", "length.exit_interval_epochs", "training.exit_duration_in_mins"),
        lambda c: c.checkpoint.save,
        "it leaves without saving, as --save is not set",
        refuse=False,
    ),
    Partner(
        ("training.eval_interval", "length.eval_interval_epochs", "training.eval_global_batch_size"),
        lambda c: c.training.eval_iters,
        "nothing is evaluated: add --eval-iters N",
    ),
    Partner(
        ("logging.digest_interval",),
        lambda c: c.checkpoint.save or c.logging.digest_file,
        "nothing says where they go: add --save DIR or --digest-file FILE",
    ),
    Partner(
        ("logging.digest_file",), lambda c: c.logging.digest_interval, "no digests are made: add --digest-interval N"
    ),
    Partner(
        ("checkpoint.phase6_output",),
        lambda c: c.checkpoint.save,
        "it is written from the last checkpoint, and nothing is saved: add --save DIR",
    ),
    Partner(
        ("training.early_stopping_patience",),
        _evaluates,
        "it judges evaluations, and there are none before the end: add --eval-iters N and --eval-interval N",
    ),
    Partner(
        ("training.early_stopping_metric",),
        lambda c: c.training.eval_iters and (c.training.early_stopping_patience or c.checkpoint.keep_best),
        "nobody watches it: add --early-stopping-patience N or --keep-best N, and evaluations (--eval-iters)",
        refuse=False,
    ),
    Partner(
        ("optimizer.lr_warmup_iters",),
        lambda c: not _reads(c, "lr_decay_iters") or c.optimizer.lr_warmup_iters < (_decay_iters(c) or 2**63),
        "the decay is over when the warm-up ends (--lr-decay-iters, or --train-iters): make the one shorter or the "
        "other longer",
    ),
    Partner(
        ("optimizer.qat_latent_limit", "optimizer.qat_damping"),
        lambda c: c.optimizer.optimizer in _QUANTIZED_TRAINING,
        f"only rules for quantized training read it: add --optimizer {either(_QUANTIZED_TRAINING)}",
    ),
    Partner(
        ("optimizer.optimizer",),
        lambda c: c.optimizer.optimizer not in _QUANTIZED_TRAINING or c.model.quantize_weights or c.model.converters,
        "no matrix is quantized: add --quantize-weights ternary, or --converters with a quantizer",
    ),
    *QUANTIZATION,
    Partner(
        ("optimizer.second_stage_lr_factor", "optimizer.second_stage_weight_decay_factor"),
        lambda c: c.optimizer.second_stage_at,
        "there is no second stage: add --second-stage-at 0.5",
    ),
    Partner(
        ("optimizer.lr_decay_style",),
        lambda c: "reduce_on_plateau" not in _shape(c).callbacks or _evaluates(c),
        "it goes by evaluations, and there are none before the end: add --eval-iters N and --eval-interval N",
    ),
    Partner(
        ("optimizer.lr_spike_window",),
        lambda c: c.optimizer.lr_on_spike,
        "nothing happens on a spike: add --lr-on-spike 0.5",
    ),
    Partner(
        ("optimizer.lr_warmup_init",),
        _warms_up,
        "there is no warm-up to start from it: add --lr-warmup-iters or --lr-warmup-fraction",
    ),
    Partner(
        ("optimizer.decoupled_weight_decay",),
        lambda c: c.optimizer.optimizer == "adam",
        "only Adam's decay may be either: add --optimizer adam",
    ),
    Partner(
        tuple(
            f"optimizer.muon_{name}"
            for name in (
                *("momentum", "use_nesterov", "num_ns_steps", "coefficient_type", "fp32_matmul_prec", "scale_mode"),
                *("extra_scale_factor", "tp_mode"),
            )
        ),
        lambda c: c.optimizer.optimizer in _MUON,
        f"another rule updates the weights: add --optimizer {either(_MUON)}",
    ),
    Partner(
        ("optimizer.normuon_beta2",),
        lambda c: c.optimizer.optimizer == "normuon",
        "it is of another rule: add --optimizer normuon",
    ),
    Partner(
        ("optimizer.sgd_momentum",),
        lambda c: c.optimizer.optimizer not in _BY_ADAM,  # rules of one's own may read it
        "no weight is updated by --optimizer sgd: it changes nothing",
        refuse=False,
    ),
    Partner(
        tuple(f"optimizer.adam_{name}" for name in ("beta1", "beta2", "eps")),
        lambda c: c.optimizer.optimizer not in _BY_SGD,
        "no weight is updated by --optimizer adam: it changes nothing",
        refuse=False,
    ),
    Partner(
        ("optimizer.grokfast_lambda",),
        lambda c: c.optimizer.grokfast,
        "no gradient is filtered: add --grokfast ema or --grokfast ma",
    ),
    Partner(
        ("optimizer.grokfast_alpha",),
        lambda c: c.optimizer.grokfast not in (None, "ma"),
        "it is the weight of an exponential mean: add --grokfast ema",
    ),
    Partner(
        ("optimizer.grokfast_window",),
        lambda c: c.optimizer.grokfast not in (None, "ema"),
        "it is the window of a moving average: add --grokfast ma",
    ),
    Partner(
        tuple(f"optimizer.plateau_boost_{name}" for name in ("factor", "interval", "trigger", "intervals")),
        lambda c: c.optimizer.plateau_boost,
        "the learning rate is not boosted: add --plateau-boost",
    ),
    Partner(
        (
            *("optimizer.initial_loss_scale", "optimizer.min_loss_scale", "optimizer.loss_scale_window"),
            *("optimizer.hysteresis", "optimizer.loss_scale"),
        ),
        lambda c: c.training.fp16,
        _NO_FP16,
        refuse=False,
    ),
    Partner(
        ("parallel.grad_compression_rank",),
        lambda c: c.parallel.grad_compression == "powersgd",
        "it is the rank of --grad-compression powersgd, which is not set: add it",
    ),
    Partner(
        ("parallel.cp_comm_type",),
        lambda c: c.parallel.context_parallel_size > 1 or c.parallel.layout == "auto",
        "there is nothing to exchange at --cp 1: it changes nothing",
        refuse=False,
    ),
    Partner(
        ("parallel.pipeline_schedule", "parallel.virtual_pipeline_model_parallel_size"),
        lambda c: c.parallel.pipeline_model_parallel_size > 1 or c.parallel.layout == "auto",
        "there is no pipeline at --pp 1: it changes nothing but the order of the work",
        refuse=False,
    ),
    Partner(
        ("dry_run.dry_run_world_size", "dry_run.dry_run_ranks"),
        lambda c: c.dry_run.dry_run,
        "this would start a real run: add --dry-run",
    ),
    Partner(
        ("logging.run_name",),
        lambda c: c.logging.wandb_project or c.logging.mlflow_experiment,
        "no tracker takes it: add --wandb-project or --mlflow-experiment",
        refuse=False,
    ),
    Partner(
        ("model.layer_schedule", "model.transformer_pct", "model.ffn"),
        lambda c: c.model.hybrid_layer_pattern is None,
        "--hybrid-layer-pattern says which layers there are: it changes nothing",
        refuse=False,
    ),
    Partner(
        ("model.transformer_pct",),
        lambda c: c.model.layer_schedule not in ("attention", "rwkv"),
        "--layer-schedule has one kind of mixer: it changes nothing",
        refuse=False,
    ),
    Partner(
        of_model("moe_router_bias_update_rate"),
        lambda c: c.model.moe_router_enable_expert_bias,
        "there is no bias to move: add --moe-router-enable-expert-bias",
    ),
    Partner(
        of_model("moe_token_drop_policy"),
        lambda c: c.model.moe_expert_capacity_factor,
        "no token is dropped without --moe-expert-capacity-factor: it changes nothing",
        refuse=False,
    ),
    Partner(
        ("logging.moe_per_layer_logging",),
        lambda c: any(kind.has_experts for kind in kinds_of(c.model)),
        "the model has no layer with experts: it changes nothing",
        refuse=False,
    ),
    Partner(
        of_model("moe_aux_loss_coeff"),
        lambda c: c.model.moe_router_load_balancing_type != "none",
        "--moe-router-load-balancing-type none has no such loss: it changes nothing",
        refuse=False,
    ),
    Partner(
        of_model("mod_every", "mod_inference", "mod_loss_coeff"),
        lambda c: c.model.mod_capacity_factor,
        "every token goes through every block: add --mod-capacity-factor 0.75",
    ),
    Partner(
        of_model("mtp_mode"),
        lambda c: ahead_of(c.model),
        "the next token alone is predicted: add --mtp-num-layers N",
    ),
    Partner(
        of_model("mtp_loss_scaling_factor"),
        lambda c: ahead_of(c.model),
        "the next token alone is predicted (no --mtp-num-layers): it changes nothing",
        refuse=False,
    ),
    Partner(
        of_model("rope_scaling_factor"),
        lambda c: c.model.use_rope_scaling,
        "no frequency is scaled: add --use-rope-scaling",
    ),
    Partner(
        of_model("apply_wd_to_qk_layernorm"),
        lambda c: c.model.qk_layernorm,
        "there is no such norm: add --qk-layernorm",
    ),
    Partner(
        ("optimizer.qk_clip",),
        lambda c: not c.model.qk_layernorm,
        "--qk-layernorm norms queries and keys, so that smaller matrices make no smaller logit; leave one of the two "
        "out",
    ),
)


def _kind_partners() -> Iterator[Partner]:
    """Flags that shape one kind of layer, for models without it."""
    kinds: dict[str, LayerKind] = {letter: LAYER_KINDS.get(letter) for letter in LAYER_KINDS.names()}
    shapes: dict[tuple[str, ...], list[str]] = {}  # letters of kinds -> the flags that shape just these
    for setting in dict.fromkeys(setting for kind in kinds.values() for setting in kind.settings):
        letters = tuple(letter for letter, kind in kinds.items() if setting in kind.settings)
        shapes.setdefault(letters, []).append(setting)
    for letters, own in shapes.items():
        titles = " or ".join(kinds[letter].title for letter in letters)
        asked_by = "".join(kinds[letter].asked_by for letter in letters)
        asked = f"{asked_by}{' or '.join(letters)} in --hybrid-layer-pattern"
        text = f"this model has no {titles} ({asked}): it changes nothing"
        yield Partner(tuple(own), partial(_has, [kinds[letter] for letter in letters]), text, refuse=False)


def _position_partners() -> Iterator[Partner]:
    """Flags that shape one kind of position embedding, for models with another."""
    for name in POSITION_EMBEDDINGS.names():
        kind: PositionKind = POSITION_EMBEDDINGS.get(name)
        text = f"it shapes --position-embedding-type {name}, which is not chosen: it changes nothing"
        yield Partner(kind.settings, partial(_placed_by, name), text, refuse=False)


def _placed_by(name: str, config: Config) -> bool:
    return config.model.position_embedding_type == name


def _has(kinds: Sequence[LayerKind], config: Config) -> bool:
    return any(kind in kinds for kind in kinds_of(config.model))


def _schedule_partners(config: Config) -> Iterator[Partner]:
    """Flags that shape some learning-rate schedules, for another one. A ``--min-lr`` or a length is idle; what shapes
    the decay itself asks for another run."""
    readers: dict[str, list[str]] = {}
    for style in LR_SCHEDULES.names():
        for name in LR_SCHEDULES.get(style).reads:
            readers.setdefault(name, []).append(style)
    style = config.optimizer.lr_decay_style
    for name, styles in readers.items():
        idle = name in ("min_lr", "lr_decay_iters")
        text = f"--lr-decay-style {style} does not use it" + (
            ": it changes nothing" if idle else f"; add --lr-decay-style {either(styles)}"
        )
        keys = [f"optimizer.{name}", *(f"length.{other}" for other in LENGTHS.get(f"optimizer.{name}", ()))]
        yield Partner(tuple(keys), partial(_reads, name=name), text, refuse=not idle)


def _reads(config: Config, name: str) -> bool:
    """Whether the learning-rate schedule depends on a flag."""
    # The length of a warm-up by its share is counted from it.
    return name in _shape(config).reads or (name == "lr_decay_iters" and config.optimizer.lr_warmup_fraction > 0)


def _shape(config: Config) -> RateShape:
    shape: RateShape = LR_SCHEDULES.get(config.optimizer.lr_decay_style)
    return shape


def _decay_iters(config: Config) -> int:
    """0: not known yet, and checked when it is (:mod:`megaforge.training.lengths`)."""
    if config.length.needs_data:
        return 0
    return config.optimizer.lr_decay_iters or config.training.train_iters


def check_partners(config: Config, origins: Mapping[str, str]) -> list[str]:
    """Looks up every flag that the user wrote.

    Args:
        origins: where each setting's value came from (:class:`megaforge.config.cli.ParsedConfig`).

    Returns:
        What to tell the user of flags that do nothing.

    Raises:
        UserError: flags without their partners make this another run than was asked for.
    """
    notes: list[str] = []
    refused: list[str] = []
    by_parts = (*_schedule_partners(config), *_kind_partners(), *_position_partners(), *method_partners(config))
    for partner in (*PARTNERS, *by_parts):
        for key in partner.keys:
            setting = settings()[key]
            value = getattr(getattr(config, setting.section), setting.name)
            off = value in (None, False, 0) and setting.default is not True and key not in _ZERO_ASKS
            off = off and value not in setting.words.values()
            asks = value != setting.default and not off
            if not asks or not _written(origins[key]) or partner.needs(config):
                continue
            word = setting.flag if value is not False else "--no-" + setting.flag.removeprefix("--")
            text = f"{word}{'' if isinstance(value, bool) else f' {setting.written(value)}'}: {partner.text}"
            (refused if partner.refuse else notes).append(text)
    raise_all(refused)
    return notes


def _written(origin: str) -> bool:
    return origin != "default" and not origin.startswith(("preset ", "checkpoint ", "default of "))
