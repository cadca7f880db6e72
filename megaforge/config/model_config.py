"""The model's own numbers. Everything here changes what is trained; a checkpoint refuses a different value."""

from __future__ import annotations

from dataclasses import dataclass

from megaforge.config.agent_config import AgentConfig
from megaforge.config.depth_config import DepthConfig
from megaforge.config.fields import divisors, either, flag
from megaforge.config.mamba_config import MambaConfig
from megaforge.config.mtp_config import MultiTokenConfig
from megaforge.config.peft_config import PeftConfig
from megaforge.config.rom_config import RomConfig
from megaforge.errors import UserError
from megaforge.registry import CONVERTERS, NORMS

_ACTIVATIONS = ("relu2", "gated_relu2", "swiglu", "gelu", "gelu_exact")


@dataclass(frozen=True)
class ModelConfig(MambaConfig, RomConfig, MultiTokenConfig, DepthConfig, PeftConfig, AgentConfig):
    """Shape of the model, and what its matrices are trained as."""

    num_layers: int = flag(
        12, "number of blocks (a mixer and its FFN) when the pattern comes from --layer-schedule", least=1, most=100_000
    )
    ffn_hidden_size: int | None = flag(
        None, "inner width of the FFN, or of each expert (default: 4 x hidden size)", least=1, most=1 << 28
    )
    moe_ffn_hidden_size: int | None = flag(
        None, "inner width of each expert, beside dense FFNs of another (default: as theirs)", least=1, most=1 << 28
    )
    hybrid_layer_pattern: str | None = flag(
        None,
        "layers in order: R RWKV-7, M Mamba-2, * attention, E MoE FFN, - dense FFN, | pipeline cut, / in front of the "
        "layers of a further prediction (--mtp-mode); e.g. RERE|RE*E; a file of --extensions adds letters. Overrides "
        "--layer-schedule",
    )
    layer_schedule: str = flag(
        "interleave-x",
        "where the attention blocks go",
        choices=("interleave-x", "top-of-x", "hybrid", "attention", "rwkv"),
    )
    transformer_pct: float = flag(
        25.0, "share of attention blocks in percent; their number is round(L * pct / 100)", least=0, most=100
    )
    ffn: str = flag("moe", "FFN of the blocks made by --layer-schedule", choices=("moe", "dense"))
    activation: str = flag("relu2", "FFN activation", choices=_ACTIVATIONS)
    normalization: str = flag("rmsnorm", "norm of the residual stream", choices=NORMS)
    norm_epsilon: float = flag(1e-6, "epsilon of the norms", above=0)
    untie_embeddings_and_output_weights: bool = flag(False, "give the output head a matrix of its own")
    hidden_dropout: float = flag(
        0.0,
        "share of the embedding's and of each layer's output that is dropped in training, in steps of 1/65536",
        least=0,
        below=1,
    )
    add_bias_linear: bool = flag(False, "biases in attention and FFN projections")
    vocab_size: int | None = flag(None, "true vocabulary size (default: the tokenizer's)", least=1, most=1 << 31)
    make_vocab_size_divisible_by: int = flag(
        128, "pad the vocabulary to this multiple, at every layout alike", least=1, most=1 << 31
    )
    num_experts: int = flag(8, "experts of a MoE FFN", least=1, most=1_000_000)
    moe_router_topk: int = flag(2, "experts a token goes to", least=1, most=1_000_000)
    moe_router_score_function: str = flag("softmax", "how router logits become scores", choices=("softmax", "sigmoid"))
    moe_router_pre_softmax: bool = flag(
        False,
        "weigh the chosen experts by their share of all experts' softmax, not of the chosen ones' (softmax only); "
        "needed with --moe-router-topk 1",
    )
    moe_router_topk_scaling_factor: float | None = flag(
        None, "factor on the routing weights of the chosen experts", above=0
    )
    moe_router_num_groups: int | None = flag(
        None,
        "groups of neighbouring experts; a token's experts come from --moe-router-group-topk of them",
        least=1,
        most=1_000_000,
    )
    moe_router_group_topk: int | None = flag(None, "groups a token goes to", least=1)
    moe_router_enable_expert_bias: bool = flag(
        False, "balance without a loss: a bias in the choice of experts (sigmoid), moved once a step against their load"
    )
    moe_router_bias_update_rate: float = flag(1e-3, "step of the expert bias", least=0)
    moe_router_load_balancing_type: str = flag(
        "seq_aux_loss",
        "load-balancing loss: over each sequence, with the load of the previous global batch, or none",
        choices=("seq_aux_loss", "global_aux_loss", "none"),
    )
    moe_aux_loss_coeff: float = flag(1e-2, "weight of the load-balancing loss", least=0)
    moe_z_loss_coeff: float = flag(1e-3, "weight of the router z-loss", least=0)
    moe_expert_capacity_factor: float | None = flag(
        None,
        "an expert takes at most this times its even share of each sequence's tokens (default: every token)",
        above=0,
    )
    moe_token_drop_policy: str = flag(
        "position",
        "which tokens a full expert takes: the first of the sequence, or those of the largest weight (looks ahead)",
        choices=("position", "probs"),
    )
    moe_shared_expert_intermediate_size: int | None = flag(
        None,
        "inner width of an expert that every token goes to besides (default: none)",
        least=1,
    )
    rwkv_head_size: int = flag(64, "channels of an RWKV-7 head", least=1, most=1 << 16)
    rwkv_decay_rank: int | None = flag(
        None, "rank of the decay (w) LoRA; default: the published rule of the width", least=1
    )
    rwkv_iclr_rank: int | None = flag(
        None,
        "rank of the in-context learning rate (a) LoRA; default: the published rule",
        least=1,
    )
    rwkv_value_rank: int | None = flag(
        None, "rank of the value-residual (v) LoRA; default: the published rule", least=1
    )
    rwkv_gate_rank: int | None = flag(None, "rank of the gate (g) LoRA; default: the published rule", least=1)
    rwkv_init: str = flag(
        "orthogonal",
        "RWKV-7 projections at step 0: the published orthogonal rule, or normal of the same scale "
        "(for widths whose QR is too slow)",
        choices=("orthogonal", "normal"),
    )
    init_std: float = flag(0.02, "standard deviation of normal initial weights", least=0)
    bound_tied_embedding: bool = flag(
        True, "a tied embedding starts with a standard deviation of at most 4 / hidden size, whatever --init-std"
    )
    init_std_scale: float = flag(1.0, "factor on every random initial weight", least=0)
    converters: tuple[str, ...] = flag(
        (),
        "what changes the model once it is built, in this order: quantizers that --extensions register",
        choices=CONVERTERS,
    )
    reset_at_document_boundaries: bool = flag(
        True,
        "packed documents do not see each other: attention mask, positions, token shift, recurrent states restart",
    )

    @property
    def all_converters(self) -> tuple[str, ...]:
        """``--converters`` behind the one that ``--quantize-weights`` asks for."""
        own = ("bitnet",) if self.quantizes and "bitnet" not in self.converters else ()
        return own + self.converters

    @property
    def is_gated(self) -> bool:
        """Whether an FFN's first projection has a gate beside what goes up."""
        return self.activation in ("swiglu", "gated_relu2")

    @property
    def ffn_size(self) -> int:
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def expert_ffn_size(self) -> int:
        return self.moe_ffn_hidden_size or self.ffn_size

    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary padded to ``make_vocab_size_divisible_by``, whatever the layout."""
        if self.vocab_size is None:
            raise UserError("--vocab-size is not set and no tokenizer gave one; pass --tokenizer-model or --vocab-size")
        multiple = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // multiple) * multiple

    def validate(self) -> None:
        """Checks what can be checked without a layout.

        Raises:
            UserError: naming the flag, its value and one that works.
        """
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"--hidden-size {self.hidden_size} is not divisible by --num-attention-heads "
                f"{self.num_attention_heads}; choose a divisor of {self.hidden_size} or set --kv-channels"
            )
        self.validate_attention()
        self.validate_experts()
        self.validate_quantizers()
        self.validate_peft()

    def validate_experts(self) -> None:
        """
        Raises:
            UserError: no router can choose so.
        """
        if self.moe_router_topk > self.num_experts:
            raise UserError(f"--moe-router-topk {self.moe_router_topk} exceeds --num-experts {self.num_experts}")
        renormalised = self.moe_router_score_function == "softmax" and not self.moe_router_pre_softmax
        if self.moe_router_topk == 1 and renormalised:
            raise UserError(
                "--moe-router-topk 1: the softmax of one chosen expert is always 1, so the loss would never train the "
                "router; add --moe-router-pre-softmax, or use --moe-router-score-function sigmoid"
            )
        if self.moe_router_enable_expert_bias and self.moe_router_score_function != "sigmoid":
            raise UserError(
                "--moe-router-enable-expert-bias balances sigmoid scores; add --moe-router-score-function sigmoid"
            )
        if (self.moe_router_num_groups is None) != (self.moe_router_group_topk is None):
            raise UserError("--moe-router-num-groups and --moe-router-group-topk belong together; set both or neither")
        if self.moe_router_num_groups is not None and self.moe_router_group_topk is not None:
            self._validate_groups(self.moe_router_num_groups, self.moe_router_group_topk)

    def _validate_groups(self, groups: int, group_topk: int) -> None:
        if self.num_experts % groups:
            raise UserError(
                f"--moe-router-num-groups {groups} does not divide --num-experts {self.num_experts}; "
                f"use {either(divisors(self.num_experts))}"
            )
        fitting = [k for k in divisors(self.moe_router_topk) if self.moe_router_topk // k <= self.num_experts // groups]
        fitting = [k for k in fitting if k <= groups]
        if group_topk not in fitting:
            raise UserError(
                f"--moe-router-group-topk {group_topk}: each of the chosen groups gives topk / group-topk of its "
                f"{self.num_experts // groups} experts, with --moe-router-topk {self.moe_router_topk} and "
                f"{groups} groups; "
                + (f"use {either(fitting)}" if fitting else "use fewer groups or a smaller --moe-router-topk")
            )
