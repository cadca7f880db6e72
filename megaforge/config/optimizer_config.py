"""Flags of the update rules, the learning-rate schedule, clipping and loss scaling."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.fields import flag
from megaforge.config.groups import group_factors
from megaforge.errors import UserError
from megaforge.registry import GRADIENT_FILTERS, LR_SCHEDULES, UPDATE_RULES


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and the learning-rate schedule."""

    optimizer: str = flag("adam", "update rule; adam is AdamW, as in Megatron-LM", choices=UPDATE_RULES)
    lr: float = flag(3e-4, "peak learning rate", above=0)
    min_lr: float = flag(0.0, "learning rate at the end of the decay", least=0)
    lr_decay_style: str = flag("cosine", "shape of the decay", choices=LR_SCHEDULES)
    lr_warmup_iters: int = flag(0, "iterations of linear warm-up", least=0)
    lr_decay_iters: int | None = flag(None, "iterations until --min-lr (default: --train-iters)", least=1)
    lr_wsd_decay_iters: int | None = flag(
        None,
        "length of the final decay of WSD (default: a tenth of --lr-decay-iters)",
        least=1,
    )
    lr_warmup_fraction: float = flag(
        0.0, "instead of --lr-warmup-iters: the warm-up's share of --lr-decay-iters, not rounded", least=0, below=1
    )
    lr_warmup_init: float = flag(0.0, "learning rate that the warm-up starts from, as if at step 0", least=0)
    lr_wsd_decay_style: str = flag(
        "minus_sqrt",
        "shape of WSD's final decay, with Megatron-LM's formulas (where exponential is the default)",
        choices=("exponential", "linear", "cosine", "minus_sqrt"),
    )
    lr_restart_iters: int | None = flag(
        None, "with --lr-decay-style cosine-restarts: iterations of the first cycle behind the warm-up", least=1
    )
    lr_restart_mult: float = flag(1.0, "each cycle of cosine-restarts is this times as long as the last", least=1)
    lr_plateau_factor: float = flag(
        0.5, "--lr-decay-style plateau: factor on the rate where evaluations improve no longer", above=0, below=1
    )
    lr_plateau_patience: int = flag(5, "plateau: evaluations without improvement that change nothing yet", least=0)
    lr_plateau_threshold: float = flag(
        1e-4, "plateau: share of the best loss by which another is better", least=0, below=1
    )
    lr_on_spike: float | None = flag(
        None, "factor on the learning rate after a spike of loss or gradient norm; it fades", above=0, below=1
    )
    lr_spike_window: int = flag(
        100, "--lr-on-spike: steps that tell what is usual, and in which the factor fades", least=8, most=1 << 16
    )
    lr_mult: tuple[str, ...] = flag(
        (),
        "factors on the learning rate of groups of parameters: a kind (embedding, head, attention, rwkv, mamba, moe, "
        "router, ffn, norm, other), a role (matrix, lookup, vector) or an update rule's name",
        metavar="GROUP=X",
    )
    wd_mult: tuple[str, ...] = flag((), "factors on the weight decay of such groups", metavar="GROUP=X")
    override_opt_param_scheduler: bool = flag(
        False, "with --load: follow this line's learning-rate schedule where the checkpoint had another"
    )
    use_checkpoint_opt_param_scheduler: bool = flag(
        False, "with --load: keep the checkpoint's learning-rate schedule, whatever this line says"
    )
    weight_decay: float = flag(0.1, "decoupled weight decay of matrices", least=0)
    decoupled_weight_decay: bool = flag(
        True,
        "with --optimizer adam: decay weights beside the update; otherwise as part of the gradient (plain Adam, L2)",
    )
    adam_beta1: float = flag(0.9, "decay of the first moment", least=0, below=1)
    adam_beta2: float = flag(0.95, "decay of the second moment", least=0, below=1)
    adam_eps: float = flag(1e-8, "epsilon of Adam", above=0)
    sgd_momentum: float = flag(0.9, "with --optimizer sgd: momentum", least=0, below=1)
    muon_momentum: float = flag(0.95, "muon: decay of the mean of gradients", least=0, below=1)
    muon_use_nesterov: bool = flag(True, "muon: orthogonalize the mean as it will be one gradient later")
    muon_num_ns_steps: int = flag(5, "muon: Newton-Schulz steps", least=1, most=20)
    muon_coefficient_type: str = flag(
        "quintic",
        "muon: polynomials of the Newton-Schulz steps",
        choices=("simple", "quintic", "polar_express", "cans"),
    )
    muon_fp32_matmul_prec: str = flag(
        "medium",
        "muon: products of the Newton-Schulz steps: low, bf16; medium, also fp32 for long matrices; high, fp32",
        choices=("low", "medium", "high"),
    )
    muon_scale_mode: str = flag(
        "spectral",
        "muon: factor on the update of a matrix of m rows and n columns: sqrt(max(m, n)), sqrt(m / n), or "
        "sqrt(max(1, m / n))",
        choices=("spectral", "unit_rms_norm", "shape_scaling"),
    )
    muon_extra_scale_factor: float = flag(
        0.2, "muon: factor on every update; with spectral 0.2 gives them the size of AdamW's", above=0
    )
    muon_tp_mode: str = flag(
        "distributed",
        "muon: who orthogonalizes a matrix that is split over tp: every rank (duplicated), the ranks in turn "
        "(distributed), or each rank its own part (blockwise, another update)",
        choices=("duplicated", "distributed", "blockwise"),
    )
    normuon_beta2: float = flag(0.95, "normuon: decay of the mean square of each row of the update", least=0, below=1)
    clip_grad: float = flag(1.0, "largest global gradient norm; 0 switches clipping off", least=0)
    clip_grad_per_group: float = flag(
        0.0, "largest gradient norm of each kind of parameter (embedding, attention, ...); 0: no limit", least=0
    )
    clip_grad_value: float = flag(0.0, "largest magnitude of an element of the gradient; 0: no limit", least=0)
    qat_latent_limit: float = flag(
        3.0,
        "qat_adam, qat_sgd: largest magnitude of a latent weight, times that of the quantized matrix; 0: no limit",
        least=0,
    )
    qat_damping: float = flag(
        0.0, "qat_adam, qat_sgd: strength of the pull to the code that a weight has, against oscillation", least=0
    )
    second_stage_at: float | None = flag(
        None,
        "share of --train-iters after which learning rate and weight decay fall, for 1-bit weights",
        above=0,
        below=1,
    )
    second_stage_lr_factor: float = flag(2 / 3, "on the learning rate after --second-stage-at", least=0)
    second_stage_weight_decay_factor: float = flag(0.0, "on the weight decay after --second-stage-at", least=0)
    grokfast: str | None = flag(
        None,
        "add the gradient's slow part to it before it is clipped (Grokfast): ema, an exponential mean, or ma, the mean "
        "of a window",
        choices=GRADIENT_FILTERS,
    )
    grokfast_alpha: float = flag(0.98, "with --grokfast ema: weight of the past in the mean", least=0, below=1)
    grokfast_lambda: float | None = flag(
        None, "with --grokfast: how much of the mean is added (default: 2 for ema, 5 for ma)", least=0
    )
    grokfast_window: int = flag(
        100,
        "with --grokfast ma: gradients of the window; each is kept, and nothing is added before it is full",
        least=1,
    )
    plateau_boost: bool = flag(False, "raise the learning rate while the training loss stands still")
    plateau_boost_factor: float = flag(2.0, "with --plateau-boost: factor on the learning rate", least=1)
    plateau_boost_interval: int = flag(
        500, "with --plateau-boost: iterations over which losses are averaged and compared", least=1
    )
    plateau_boost_trigger: float = flag(
        0.1, "with --plateau-boost: relative improvement from one interval to the next below which it begins", above=0
    )
    plateau_boost_intervals: int = flag(4, "with --plateau-boost: most intervals that one boost lasts", least=1)
    qk_clip: bool = flag(False, "scale down queries and keys of heads whose attention logits grow beyond a threshold")
    qk_clip_threshold: float = flag(100.0, "with --qk-clip: the largest logit that stays", above=0)
    qk_clip_alpha: float = flag(
        0.5, "with --qk-clip: the queries' share of the scaling, as an exponent", least=0, most=1
    )
    ema_decay: float = flag(
        0.0,
        "keep an exponential moving average of the weights, this much of it from the past; 0: no",
        least=0,
        below=1,
    )
    ema_evaluate: bool = flag(False, "with --ema-decay: the run's own evaluations use the average")
    initial_loss_scale: float = flag(65536.0, "fp16: loss scale at the start", above=0)
    min_loss_scale: float = flag(1.0, "fp16: smallest loss scale", above=0)
    loss_scale_window: int = flag(1000, "fp16: clean iterations before the scale grows by 2", least=1)
    hysteresis: int = flag(
        2,
        "fp16: overflows since the scale last grew, of which the last and each further one halve it",
        least=1,
    )

    loss_scale: float | None = flag(
        None, "fp16: this scale for good; a step that overflows is left out, and 20 in a row end the run", above=0
    )
    decoupled_lr: float | None = flag(
        None, "peak learning rate of the embedding and the output head; the others keep --lr", above=0
    )
    decoupled_min_lr: float | None = flag(
        None, "with --decoupled-lr: their rate at the end of the decay (default: --min-lr)", least=0
    )
    weight_decay_incr_style: str = flag(
        "constant", "how weight decay grows over the run", choices=("constant", "linear", "cosine")
    )
    start_weight_decay: float | None = flag(
        None, "with --weight-decay-incr-style: weight decay at the start, in place of --weight-decay", least=0
    )
    end_weight_decay: float | None = flag(None, "with --weight-decay-incr-style: weight decay at the end", least=0)

    def validate(self) -> None:
        self._check_ends()
        if self.muon_coefficient_type in ("polar_express", "cans") and self.muon_num_ns_steps < 5:
            raise UserError(
                f"--muon-num-ns-steps {self.muon_num_ns_steps}: the first steps of {self.muon_coefficient_type} are "
                "made to be followed by the rest; use at least 5, or --muon-coefficient-type simple"
            )
        if self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler:
            raise UserError(
                "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler exclude each other; choose one"
            )
        if self.min_lr > self.lr:
            raise UserError(f"--min-lr {self.min_lr}: must not exceed --lr {self.lr}")
        _ = group_factors("--lr-mult", self.lr_mult)
        _ = group_factors("--wd-mult", self.wd_mult)
        if self.lr_warmup_init > self.lr:
            raise UserError(f"--lr-warmup-init {self.lr_warmup_init}: must not exceed --lr {self.lr}")
        if self.lr_warmup_fraction and self.lr_warmup_iters:
            raise UserError(
                f"--lr-warmup-fraction {self.lr_warmup_fraction} and --lr-warmup-iters {self.lr_warmup_iters} exclude "
                "each other; leave out one of them"
            )

    def _check_ends(self) -> None:
        """The rate of embedding and head, and the decay at both ends of the run."""
        if self.decoupled_lr is not None:
            least = self.min_lr if self.decoupled_min_lr is None else self.decoupled_min_lr
            name = "--min-lr" if self.decoupled_min_lr is None else "--decoupled-min-lr"
            if least > self.decoupled_lr:
                raise UserError(f"{name} {least}: must not exceed --decoupled-lr {self.decoupled_lr}")
            if self.lr_warmup_init > self.decoupled_lr:
                raise UserError(
                    f"--lr-warmup-init {self.lr_warmup_init}: must not exceed --decoupled-lr {self.decoupled_lr}"
                )
        start, end = self.start_weight_decay, self.end_weight_decay
        if self.weight_decay_incr_style == "constant":
            return
        given = f"--weight-decay-incr-style {self.weight_decay_incr_style}"
        if start is None or end is None:
            raise UserError(
                f"{given}: it does not say from where to where; add --start-weight-decay and --end-weight-decay"
            )
        if end < start:
            raise UserError(f"--end-weight-decay {end}: must be at least --start-weight-decay {start}")
        if not self.weight_decay:
            raise UserError(f"{given} with --weight-decay 0: the two exclude each other; leave out --weight-decay")
