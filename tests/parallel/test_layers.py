"""Parallel layers, initial weights and gradient reduction against their unsharded selves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaforge.config.model_config import ModelConfig
from megaforge.parallel import mappings
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.cross_entropy import vocab_parallel_linear_cross_entropy
from megaforge.parallel.data_parallel import GradientReducer
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.init_rules import Constant, Elementwise, Normal, OfModule, Orthogonal, Uniform
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.layers import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear, VocabParallelEmbedding
from megaforge.parallel.param_spec import ParamSpec, make_parameter, name_parameters, named_specs

SEQUENCE, BATCH, HIDDEN, INNER, VOCAB = 8, 4, 12, 16, 37
CFG = ModelConfig(hidden_size=HIDDEN, vocab_size=VOCAB, make_vocab_size_divisible_by=8)


class TinyModel(nn.Module):
    """Embedding, a scale on the residual stream, a fused two-part column layer with a gate inside the region, a column
    layer that opens the region itself, a row layer with bias, and the tied head: each way in which a parameter can be
    split or replicated."""

    def __init__(self, ctx: ParallelContext, sequence_parallel: bool, dtype: torch.dtype, overlap: bool) -> None:
        super().__init__()
        self.ctx = ctx
        layer = make_layer_context(CFG, ctx, sequence_parallel=sequence_parallel, dtype=dtype, overlap_tp_comm=overlap)
        self.region = region = layer.region
        init = Normal(0.3)
        self.embedding = VocabParallelEmbedding(layer, init=Normal(0.5, VOCAB))
        scale = ParamSpec("scale", (HIDDEN,), Uniform(2.0), tp_partial_grad=region.sequence_parallel)
        mix = ParamSpec("mix", (HIDDEN,), Uniform(2.0), tp_partial_grad=True)
        self.scale = make_parameter(scale, ctx, dtype)
        self.mix = make_parameter(mix, ctx, dtype)
        self.column = ColumnParallelLinear(layer, HIDDEN, 2 * INNER, init=init, bias=True, parts=(INNER, INNER))
        self.opening = ColumnParallelLinear(layer, HIDDEN, INNER, init=init, enter=True, bias=True)
        self.row = RowParallelLinear(layer, INNER, HIDDEN, init=init, bias=True)
        name_parameters(self)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.scale
        gate, up = self.column(self.region.enter(x) * self.mix).chunk(2, dim=-1)
        x = x + self.row(torch.tanh(gate) * up + self.opening(x))
        hidden = self.region.enter(x).reshape(-1, HIDDEN)
        loss, *_ = vocab_parallel_linear_cross_entropy(
            hidden, self.embedding.weight, labels.T.reshape(-1), ctx=self.ctx, vocab_size=VOCAB, chunk_tokens=5
        )
        return loss.sum()


def tokens_and_labels() -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, VOCAB, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(3))
    return ids[:, :-1], ids[:, 1:]


def gather_full(spec: ParamSpec, local: Tensor, ctx: ParallelContext) -> Tensor:
    """The global tensor from every rank's pieces, by a sum of disjoint parts."""
    full = local.new_zeros(spec.shape)
    for piece in spec.pieces(ctx):
        full[tuple(slice(a, b) for a, b in piece.global_box)] = piece.local_view(local)
    return mappings.reduce_from_tensor_parallel(full, ctx.tp) if spec.shard_dim is not None else full


def run_tiny(
    tp: int, sequence_parallel: bool, dtype: torch.dtype, overlap: bool
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Two micro-batches a dp rank of the same global batch; returns loss, weights and gradients as global tensors."""
    ctx = ParallelContext.create(tp=tp)
    model = TinyModel(ctx, sequence_parallel, dtype, overlap)
    initialize_parameters(model, ctx, seed=5)
    with torch.no_grad():
        for spec, parameter in named_specs(model):  # zero-initialised biases would hide a lost gradient
            if spec.name.endswith("bias"):
                parameter.copy_(spec.take_local(torch.linspace(-1, 1, spec.numel, dtype=dtype).view(spec.shape), ctx))
    reducer = GradientReducer(model, ctx, bucket_size=200, overlap=overlap)
    reducer.zero_grad()
    tokens, labels = tokens_and_labels()
    total = torch.zeros((), dtype=torch.float64)
    micro = BATCH // ctx.dp.size // 2 or 1
    own = slice(ctx.dp.rank * (BATCH // ctx.dp.size), (ctx.dp.rank + 1) * (BATCH // ctx.dp.size))
    batches = list(zip(tokens[own].split(micro), labels[own].split(micro), strict=True))
    for number, (t, y) in enumerate(batches):
        reducer.set_last_microbatch(number == len(batches) - 1)
        loss = model(t, y) / (BATCH * SEQUENCE)
        loss.backward()
        total += loss.detach().double()
    reducer.finish_grad_sync()
    total = mappings.reduce_from_tensor_parallel(total, ctx.dp)
    weights = {s.name: gather_full(s, p.detach(), ctx) for s, p in named_specs(model)}
    grads = {s.name: gather_full(s, p.main_grad, ctx) for s, p in named_specs(model)}
    return float(total), weights, grads


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
@pytest.mark.parametrize(
    "world,tp,sequence_parallel,overlap",
    [
        (2, 2, False, True),
        (2, 2, True, True),
        (4, 4, True, True),
        (2, 1, False, True),
        (4, 2, True, False),
        (4, 2, False, True),
    ],
)
def test_layout_changes_nothing(
    ranks, world: int, tp: int, sequence_parallel: bool, overlap: bool, dtype: torch.dtype, tolerance: float
) -> None:
    loss, weights, grads = ranks.run(1, run_tiny, 1, False, dtype, True)[0]
    for other_loss, other_weights, other_grads in ranks.run(world, run_tiny, tp, sequence_parallel, dtype, overlap):
        assert abs(other_loss - loss) <= tolerance * abs(loss)
        for name in weights:
            assert torch.equal(weights[name], other_weights[name]), name
            assert float(grads[name].norm()) > 0
            difference = (other_grads[name] - grads[name]).norm() / grads[name].norm()
            assert difference <= tolerance, f"{name}: {difference}"


def test_one_rank_agrees_with_plain_torch() -> None:
    """The fused cross-entropy and layers against torch.nn.functional in fp64."""
    loss, weights, grads = run_tiny(1, False, torch.float64, True)
    w = {name: value.clone().requires_grad_() for name, value in weights.items()}
    tokens, labels = tokens_and_labels()
    x = F.embedding(tokens.T, w["embedding.weight"]) * w["scale"]
    gate, up = F.linear(x * w["mix"], w["column.weight"], w["column.bias"]).chunk(2, dim=-1)
    inner = torch.tanh(gate) * up + F.linear(x, w["opening.weight"], w["opening.bias"])
    x = x + F.linear(inner, w["row.weight"], w["row.bias"])
    logits = (x @ w["embedding.weight"].T)[..., :VOCAB]
    expected = F.cross_entropy(logits.reshape(-1, VOCAB), labels.T.reshape(-1))
    expected.backward()
    assert abs(loss - float(expected.detach())) < 1e-13
    for name, value in w.items():
        assert value.grad is not None
        assert torch.allclose(value.grad, grads[name], rtol=1e-11, atol=1e-14), name


@pytest.mark.parametrize(
    "rule", [Normal(0.7), Uniform(0.1), Orthogonal(0.5), Elementwise(lambda i: i * 0.5 - 3), Normal(1.0, 500)]
)
@pytest.mark.parametrize("dim", [0, 1])
def test_initial_weights_do_not_depend_on_the_split(rule, dim: int) -> None:
    single = ParallelContext.single()
    shape = (600, 528)
    spec = ParamSpec("w", shape, rule, shard_dim=dim, parts=(shape[dim] // 3 * 2, shape[dim] // 3))

    def filled(ctx: ParallelContext) -> Tensor:
        holder = nn.Module()
        holder.weight = make_parameter(spec, ctx, torch.float64)
        initialize_parameters(holder, ctx, seed=11)
        return holder.weight.detach()

    full = filled(single)
    for rank in range(4):
        ctx = ParallelContext.of_rank(rank, 4, tp=4)
        assert torch.equal(filled(ctx), spec.take_local(full, ctx))


def test_random_rules_have_their_moments_and_names_differ() -> None:
    box = ((0, 1000), (0, 700))
    first = Normal(0.5).fill(1, "a", (1000, 700), box)
    assert abs(float(first.mean())) < 3e-3 and abs(float(first.std()) - 0.5) < 3e-3
    assert not torch.equal(first, Normal(0.5).fill(1, "b", (1000, 700), box))
    assert not torch.equal(first, Normal(0.5).fill(2, "a", (1000, 700), box))
    assert float(torch.corrcoef(torch.stack((first[:256].flatten(), first[256:512].flatten())))[0, 1].abs()) < 0.02
    assert torch.equal(first, OfModule(Normal(0.5)).fill(1, "a.weight", (1000, 700), box))
    q = Orthogonal(2.0).fill(1, "q", (64, 32), ((0, 64), (0, 32)))
    assert torch.allclose(q.T @ q, 4 * torch.eye(32, dtype=torch.float64), atol=1e-12)


def test_sixteen_bit_gradients_accumulate_in_fp32() -> None:
    ctx = ParallelContext.single()
    holder = nn.Module()
    holder.weight = make_parameter(ParamSpec("w", (3, 3), Normal(1.0)), ctx, torch.bfloat16)
    reducer = GradientReducer(holder, ctx)
    reducer.zero_grad()
    for value in (1.0, 2.0**-10):  # their sum has no bf16 representation
        (holder.weight * value).sum().backward()
    reducer.finish_grad_sync()
    assert holder.weight.main_grad.dtype == torch.float32
    assert torch.equal(holder.weight.main_grad, torch.full((3, 3), 1.0 + 2.0**-10))


def test_a_replicated_layer_adds_its_bias() -> None:
    layer = make_layer_context(CFG, ParallelContext.single())
    linear = ReplicatedLinear(*(layer.parameter(shape, Constant(0.5)) for shape in ((3, 2), (3,))))
    name_parameters(linear)
    initialize_parameters(linear, ParallelContext.single(), seed=1)
    x = torch.tensor([[1.0, 2.0]])
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias)) and bool((linear(x) == 2.0).all())


def test_partial_sums_take_no_bias() -> None:
    with pytest.raises(ValueError, match="a bias cannot be added to partial sums"):
        RowParallelLinear(
            make_layer_context(CFG, ParallelContext.single()), 4, 4, init=Normal(1), reduce=False, bias=True
        )
