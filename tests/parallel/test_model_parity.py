"""The layout changes nothing: models unlike that of test_layout_matrix.py, at tp x sp against one rank.

Compared on every rank: loss, every gradient, the gradient norm and every weight after three optimizer steps, with the
real reducer, clip and AdamW. Noise on all weights, uneven loss masks and packed documents keep every gradient busy and
every normalisation honest.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megaforge.config.model_config import ModelConfig
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.models.hybrid import HybridModel
from megaforge.nn.losses import LossTerm, total_loss
from megaforge.optim import Optimizer
from megaforge.optim.clip import clip_gradients
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.data_parallel import GradientReducer
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.mappings import reduce_from_tensor_parallel
from megaforge.parallel.param_spec import ParamSpec, named_specs
from tests.nn.support import perturb

BATCH, LENGTH, STEPS = 4, 16, 3
# Enough to make every gradient count, not so much that rounding in fp32 grows beyond the tolerance in three steps.
NOISE, LEARNING_RATE = 0.05, 1e-3
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

SMALL = {
    "hidden_size": 32,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "rwkv_head_size": 8,
    "num_experts": 4,
    "vocab_size": 61,
    "make_vocab_size_divisible_by": 8,
    "moe_aux_loss_coeff": 0.1,
    "moe_z_loss_coeff": 0.1,
}
# With biases every channel must rotate: the softmax does not see a bias of unrotated keys, so its gradient is rounding
# noise, which Adam would blow up to full steps.
CASES = {
    "attention, dense swiglu, biases": {
        "hybrid_layer_pattern": "*-*-",
        "activation": "swiglu",
        "add_bias_linear": True,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "qk_layernorm": True,
        "apply_wd_to_qk_layernorm": True,
        "rotary_interleaved": True,
    },
    "attention, experts": {
        "hybrid_layer_pattern": "*E*-",
        "activation": "gelu_exact",
        "normalization": "layernorm",
        "position_embedding_type": "learned_absolute",
        "max_position_embeddings": LENGTH,
        "moe_ffn_hidden_size": 16,
    },
    "RWKV-7 as published": {
        "hybrid_layer_pattern": "R-R-",
        "normalization": "layernorm",
        "untie_embeddings_and_output_weights": True,
    },
    "hybrid, vocabulary 50,257": {"hybrid_layer_pattern": "RE*-RE*E", "vocab_size": 50257},
}
LAYOUTS = [(2, 2, False), (4, 4, True)]


@dataclass
class Outcome:
    """What a training run of one case gave; tensors are global, by parameter name."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def global_batch(vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, labels, uneven loss mask and document starts, each [BATCH, LENGTH]."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, vocab, (BATCH, LENGTH + 1), generator=generator)
    mask = (torch.rand(BATCH, LENGTH, generator=generator) < torch.linspace(0.2, 1, BATCH)[:, None]).float()
    start = torch.rand(BATCH, LENGTH, generator=generator) < 0.15
    return ids[:, :-1], ids[:, 1:], mask, start


def whole(spec: ParamSpec, local: Tensor, ctx: ParallelContext) -> Tensor:
    """The global tensor from this rank's copy and, where it is split, its neighbours' shards."""
    full = local.new_zeros(spec.shape)
    for piece in spec.pieces(ctx):
        full[tuple(slice(a, b) for a, b in piece.global_box)] = piece.local_view(local)
    return full if spec.shard_dim is None else reduce_from_tensor_parallel(full, ctx.tp)


def train(case: str, tp: int, sequence_parallel: bool, dtype: torch.dtype) -> Outcome:
    """Three steps, two micro-batches a dp rank."""
    ctx = ParallelContext.create(tp=tp)
    cfg = ModelConfig(**{**SMALL, **CASES[case]})  # type: ignore[arg-type]
    model = HybridModel(make_layer_context(cfg, ctx, sequence_parallel=sequence_parallel, dtype=dtype))
    # Not 5: there a gradient that is all but zero makes Adam's first step depend on rounding, 1e-5 of a matrix in fp32.
    initialize_parameters(model, ctx, seed=7)
    perturb(model, ctx, NOISE)
    reducer = GradientReducer(model, ctx, bucket_size=5000)
    optimizer = Optimizer(OptimizerConfig(lr=LEARNING_RATE), model, ctx)
    batch = global_batch(cfg.vocab_size or 0)
    tokens = float(batch[2].sum())
    own = [part.chunk(ctx.dp.size)[ctx.dp.rank].chunk(2) for part in batch]
    outcome = Outcome([], [], {}, {})
    for step in range(STEPS):
        reducer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for number, micro in enumerate(zip(*own, strict=True)):
            reducer.set_last_microbatch(number == 1)
            out = model(*micro)
            counts = {"labels": tokens, "sequences": BATCH, "tokens": BATCH * LENGTH}
            loss = total_loss({"loss": LossTerm(out.loss_sum, "labels")} | out.terms, counts)
            assert loss is not None
            loss.backward()
            total += loss.detach().double()
        reducer.finish_grad_sync()
        outcome.losses.append(float(reduce_from_tensor_parallel(total, ctx.dp)))
        if step == 0:
            outcome.gradients = {s.name: whole(s, p.main_grad, ctx) for s, p in named_specs(model)}  # type: ignore[attr-defined]
        outcome.norms.append(clip_gradients(model, ctx, 0.5))
        optimizer.step(LEARNING_RATE)
    outcome.weights = {s.name: whole(s, p.detach(), ctx) for s, p in named_specs(model)}
    return outcome


def differences(case: str, tp: int, sequence_parallel: bool, dtype: torch.dtype, expected: Outcome) -> dict[str, float]:
    """Everything of this rank's run that differs from ``expected`` by more than the tolerance, and by how much."""
    found = train(case, tp, sequence_parallel, dtype)
    errors: dict[str, float] = {}
    for name, ours, theirs in (("loss", found.losses, expected.losses), ("norm", found.norms, expected.norms)):
        for step in range(STEPS):
            errors[f"{name} {step}"] = abs(ours[step] - theirs[step]) / abs(theirs[step])
    for kind in ("gradients", "weights"):
        for name, value in getattr(expected, kind).items():
            errors[f"{kind} of {name}"] = float((getattr(found, kind)[name] - value).norm() / value.norm())
    return {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float64) for case in CASES), ("hybrid, vocabulary 50,257", torch.float32)]
)
def test_layout_changes_nothing(ranks, case: str, dtype: torch.dtype) -> None:
    expected = train(case, 1, False, dtype)
    for name, gradient in expected.gradients.items():
        assert bool(gradient.any()), f"{name}: its gradient is trivially zero"
    assert expected.norms[0] > 0.5, "clipping must be at work"
    for world, tp, sequence_parallel in LAYOUTS:
        for rank, wrong in enumerate(ranks.run(world, differences, case, tp, sequence_parallel, dtype, expected)):
            assert not wrong, f"tp {tp}, dp {world // tp}, sp {sequence_parallel}, rank {rank}: {wrong}"
