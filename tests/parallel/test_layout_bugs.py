"""Silent layout bugs that other engines have had, each made a test: the wrong model was trained without an error.

Number, what went wrong, where it was seen, and the test that would notice it here:

==  ==================================================================  =========================  ====================
 1  Gathered logits in the vocabulary-parallel loss: off by log(tp)     Megatron-LM #7452          test_01
 2  Loss divided by a rank's own count of labels                        Megatron-LM #7452, #673    test_02
 3  Router counts overwritten while autograd needs them                 Megatron-LM #7452          test_03
 4  Fused QKV on another group than tp's                                Megatron-LM #7452          test_04
 5  Replicated parameters among split heads: partial gradients          Megatron-LM #7452, #1446   test_05
 6  Keys expanded onto split heads: gradient never summed               torchtitan #1373           test_06
 7  Experts omitted or counted several times in the gradient norm       Megatron-LM #5916          test_07
 8  Expert gradients scaled by the dense data-parallel size             pytorch #160285            test_08
 9  Experts not summed over their own replicas: they drift apart        Megatron-LM #5916          test_09
12  Padding rows of the vocabulary in the softmax, other initial rows   Megatron-LM #1754          test_12
13  Chunked cross-entropy: a partial gradient taken for a whole one     torchtitan #3412           test_13
14  fp16 loss scale and overflow decided rank by rank                   fairseq2 #1374             test_14
15  Context-parallel loss scaled by cp twice or never                   Megatron-LM #673, #906     test_15
17  RWKV-7's v_first made anew in every pipeline stage                  --                         test_17
18  Expert capacity taken per rank                                      --                         test_18
19  Resuming in pipeline stages fails or starts from scratch            nanotron #221              [a]
20  A pipeline stage without experts hangs                              Megatron-LM core 0.11      test_20
21  An index built by one rank, seen half written or not at all         Megatron-LM #907           [b]
22  One random stream for different shards, several for replicas        --                         test_22
23  Weight decay chosen by name: others once a layer is wrapped         --                         test_23
24  A tied embedding's gradient lost on a stage, or counted twice       --                         test_24
==  ==================================================================  =========================  ====================

[a] tests/parallel/test_pipeline_model.py test_checkpoints_go_between_stages_and_one_rank
[b] tests/data/test_sample_order.py test_cache_is_shared_rebuilt_when_damaged_and_optional,
    tests/data/test_indexed_dataset.py test_killed_writer_shows_no_half_dataset
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megaforge.config.config import Config
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.models.prepared_run import check_run
from megaforge.models.stages import build_model
from megaforge.nn.head import OutputHead
from megaforge.nn.moe import MoEFFN
from megaforge.optim import Optimizer, clip_gradients
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.data_parallel import GradientReducer
from megaforge.parallel.flat_shard import optimizer_shard
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.init_rules import Normal
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import name_parameters, named_specs
from megaforge.parallel.zero import ShardedParameters
from megaforge.training.callbacks import MetricsWriter
from megaforge.training.setup import build_trainer
from megaforge.verification.parity import Comparison, combined, compare, one_rank, parity_config, write_documents
from megaforge.verification.parity_layouts import ParityLayout
from tests.nn.support import perturb
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import trainer_of
from tests.training.tiny import arguments, record, write_dataset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_documents(str(tmp_path_factory.mktemp("parity") / "train_text_document"), 61)


def configured(documents: str, layout: ParityLayout | None, pattern: str, *more: str) -> Config:
    flags = ("--hybrid-layer-pattern", pattern, "--seq-length", "16", *more)
    return parity_config(documents, "fp64", layout, flags)


def compare_here(documents: str, layout: ParityLayout, pattern: str, more: tuple[str, ...]) -> Comparison:
    return compare(configured(documents, layout, pattern, *more), configured(documents, None, pattern, *more), CPU)


def assert_same(ranks: RankPool, documents: str, world: int, flags: str, pattern: str, *more: str) -> None:
    """Five steps of a model at ``flags`` on ``world`` ranks are those of one rank, every gradient included."""
    layout = ParityLayout(flags, world, tuple(flags.split()))
    results = ranks.run(world, compare_here, documents, layout, pattern, more)
    found = combined(results, configured(documents, layout, pattern, *more))
    assert found.agrees("fp64"), f"{pattern} at {flags} on {world} ranks: {found.worst}"


# The output head: 13 words in 16 rows, of which the last rank of four has one; more tokens than a chunk holds.
TOKENS, WIDTH, WORDS, ROWS = 1100, 4, 13, 16


def score(tp: int) -> dict[str, Tensor]:
    """The loss of every token, and the gradients of a weighted sum of them; the head's whole by its ranks' rows."""
    ctx = ParallelContext.create(tp=tp)
    sizes = ("--vocab-size", WORDS, "--hidden-size", WIDTH, "--kv-channels", 8, "--rwkv-head-size", WIDTH)
    cfg = parity_config("none", "fp64", None, tuple(map(str, sizes))).model
    head = OutputHead(make_layer_context(cfg, ctx, dtype=torch.float64), init=Normal(0.7, WORDS))
    name_parameters(head, "head")
    initialize_parameters(head, ctx, seed=3)
    rows = slice(ctx.tp.rank * ROWS // tp, (ctx.tp.rank + 1) * ROWS // tp)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, 1, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, WORDS, (1, TOKENS), generator=generator)
    weights = torch.rand(TOKENS, 1, generator=generator, dtype=torch.float64)
    losses, *_ = head.loss(x, labels)
    (losses * weights).sum().backward()
    assert x.grad is not None and head.weight.grad is not None
    grad, weight = torch.zeros(ROWS, WIDTH, dtype=torch.float64), torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    grad[rows], weight[rows] = head.weight.grad, head.weight.detach()
    return {"losses": losses.detach(), "x": x.grad, "own rows": grad, "weight": weight, "share": weights, "y": labels}


@pytest.fixture(scope="module")
def scored(ranks: RankPool) -> dict[int, tuple[list[dict[str, Tensor]], dict[str, Tensor]]]:
    """By tp: what each rank found, and plain torch's answer."""
    found = {}
    for tp in (2, 4):
        results = ranks.run(tp, score, tp)
        weight = sum(result["weight"] for result in results)[:WORDS].requires_grad_()  # type: ignore[index]
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(TOKENS, 1, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
        losses = F.cross_entropy((x @ weight.T)[:, 0], results[0]["y"][0], reduction="none").unsqueeze(1)
        (losses * results[0]["share"]).sum().backward()
        found[tp] = results, {"losses": losses.detach(), "x": x.grad, "rows": weight.grad}
    return found


@pytest.mark.parametrize("tp", [2, 4])
def test_01_the_loss_of_a_split_vocabulary_is_not_off_by_log_tp(scored: Any, tp: int) -> None:
    results, expected = scored[tp]
    for result in results:
        torch.testing.assert_close(result["losses"], expected["losses"], rtol=1e-13, atol=1e-13)


def label_counts(documents: str) -> list[float]:
    """Labels that count in each sample of the first global batch, for sequences of 16."""
    config = configured(documents, None, "*-")
    trainer = build_trainer(check_run(config, 1), ParallelContext.single())
    [batch] = next(iter(trainer._loader(trainer.data, trainer.batches)))
    return batch.loss_mask.sum(1).tolist()


@pytest.mark.parametrize(
    ("world", "flags"), [(2, "--micro-batch-size 1"), (2, "--cp 2"), (4, "--cp 2 --micro-batch-size 1 --zero 2")]
)
def test_02_every_label_weighs_the_same(ranks: RankPool, documents: str, world: int, flags: str) -> None:
    counts = label_counts(documents)
    assert sum(counts[:4]) != sum(counts[4:]), "ranks' own counts must differ for this to prove anything"
    assert_same(ranks, documents, world, flags, "*-")


def router_gradient(sizes: dict[str, int], in_between: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of the load-balancing loss of two micro-batches, both forwards first; the loss and the tokens too."""
    ctx = ParallelContext.create(**sizes)
    flags = ("--moe-router-score-function", "softmax", "--no-moe-router-enable-expert-bias")
    cfg = parity_config("none", "fp64", None, flags).model
    layer = MoEFFN(make_layer_context(cfg, ctx, dtype=torch.float64))
    name_parameters(layer)
    initialize_parameters(layer, ctx, seed=3)
    perturb(layer, ctx)
    reducer = GradientReducer(layer, ctx)
    reducer.zero_grad()
    inputs = torch.randn(2, 6, 3, cfg.hidden_size, generator=torch.Generator().manual_seed(1)).double()
    losses = [layer(x, PackedSequence(3, 6, CPU)).losses for x in inputs]
    for loss in losses:
        if in_between:
            loss.tokens_per_expert.mul_(0)  # it is the caller's: he may add it up in place
    for number, loss in enumerate(losses):
        reducer.set_last_microbatch(number == 1)
        loss.load_balance_sum.backward()
    reducer.finish_grad_sync()
    total = torch.stack([loss.load_balance_sum.detach() for loss in losses]).sum()
    return layer.router.weight.main_grad, total, inputs  # type: ignore[attr-defined]


def balance_gradient(inputs: Tensor, weight: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """E * sum_e f_e P_e of every sequence, written out."""
    weight = weight.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for x in inputs:
        scores = (x @ weight.T).softmax(-1)
        for sequence in scores.unbind(1):
            chosen = F.one_hot(sequence.detach().topk(topk).indices, weight.shape[0]).sum((0, 1))
            share = chosen.double() / chosen.sum()
            total = total + weight.shape[0] * (share * sequence.mean(0)).sum()
    total.backward()
    assert weight.grad is not None
    return weight.grad, total.detach()


def test_03_router_counts_are_not_overwritten_under_autograd(ranks: RankPool) -> None:
    cfg = parity_config("none", "fp64", None).model
    ctx = ParallelContext.single()
    layer = MoEFFN(make_layer_context(cfg, ctx, dtype=torch.float64))
    name_parameters(layer)
    initialize_parameters(layer, ctx, seed=3)
    perturb(layer, ctx)
    weight = layer.router.weight.detach()
    results = [router_gradient({}, True), *ranks.run(2, router_gradient, {"tp": 2, "etp": 1}, True)]
    for grad, total, inputs in results:
        expected, loss = balance_gradient(inputs, weight, cfg.moe_router_topk)
        torch.testing.assert_close(total, loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


def test_04_attention_talks_to_its_own_tensor_parallel_group(ranks: RankPool, documents: str) -> None:
    """tp is neither the whole world nor the first ranks of it."""
    assert_same(ranks, documents, 4, "--tp 2", "*-")


@pytest.mark.parametrize("flags", ["--tp 2", "--tp 2 --sp"])
def test_05_replicated_parameters_among_split_heads_get_whole_gradients(
    ranks: RankPool, documents: str, flags: str
) -> None:
    """RWKV-7's token mixes and LoRA factors, the channel mix, and the norms around them."""
    assert_same(ranks, documents, 2, flags, "R-R-")


def test_06_shared_keys_are_split_with_their_heads_or_refused(ranks: RankPool, documents: str) -> None:
    """Two key/value heads for eight queries: a rank has a whole one, or the layout is refused."""
    assert_same(ranks, documents, 2, "--tp 2", "*-", "--num-query-groups", "2")
    with pytest.raises(UserError, match="--tp 4 does not divide --num-query-groups 2"):
        configured(documents, ParityLayout("tp4", 4, ("--tp", "4")), "*-", "--num-query-groups", "2")


def norm_of_known_gradients(sizes: dict[str, int], zero: bool) -> tuple[float, float]:
    """The norm that clipping finds, and the true one."""
    ctx = ParallelContext.create(**sizes)
    cfg = parity_config("none", "fp64", None, ("--hybrid-layer-pattern", "RE*-")).model
    model = HybridModel(make_layer_context(cfg, ctx, dtype=torch.float64))
    initialize_parameters(model, ctx, seed=1)
    if zero:
        ShardedParameters(model, ctx, bucket_size=700)
    squares = 0.0
    for number, (spec, parameter) in enumerate(named_specs(model)):
        if not parameter.requires_grad:
            continue
        whole = torch.randn(spec.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        squares += float(whole.square().sum())
        local, held = spec.take_local(whole, ctx), optimizer_shard(parameter)
        parameter.main_grad = local if held is spec else local.view(-1)[held.start : held.stop]  # type: ignore
    return clip_gradients(model, ctx, 1.0), math.sqrt(squares)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    "sizes", [{"tp": 2, "ep": 2}, {"tp": 2, "ep": 2, "etp": 1}, {"tp": 4, "ep": 2, "etp": 2}, {"ep": 2}], ids=str
)
def test_07_the_norm_counts_every_expert_once(ranks: RankPool, sizes: dict[str, int], zero: bool) -> None:
    for found, expected in ranks.run(4, norm_of_known_gradients, sizes, zero):
        assert found == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize(("world", "flags"), [(2, "--ep 2"), (4, "--ep 2 --micro-batch-size 2")])
def test_08_expert_gradients_are_sums_whatever_the_data_parallel_size(
    ranks: RankPool, documents: str, world: int, flags: str
) -> None:
    assert_same(ranks, documents, world, flags, "*E")


@pytest.mark.parametrize("flags", ["--tp 2 --ep 2 --etp 1", "--etp 2 --micro-batch-size 2"])
def test_09_experts_are_summed_over_their_own_replicas(ranks: RankPool, documents: str, flags: str) -> None:
    """Two copies of each expert shard, on other ranks than the copies of dense parameters."""
    assert_same(ranks, documents, 4, flags, "*E")


@pytest.mark.parametrize("tp", [2, 4])
def test_12_padding_rows_of_the_vocabulary_take_no_part(scored: Any, tp: int) -> None:
    results, expected = scored[tp]
    rows = sum(result["own rows"] for result in results)
    torch.testing.assert_close(rows[:WORDS], expected["rows"], rtol=1e-11, atol=1e-13)
    assert not bool(rows[WORDS:].any())
    weight = sum(result["weight"] for result in results)
    assert torch.equal(weight, score(1)["weight"]), "initial rows do not depend on tp"
    assert not bool(weight[WORDS:].any())


@pytest.mark.parametrize("tp", [2, 4])
def test_13_the_chunked_loss_hands_back_a_whole_gradient(scored: Any, tp: int) -> None:
    results, expected = scored[tp]
    for result in results:
        torch.testing.assert_close(result["x"], expected["x"], rtol=1e-11, atol=1e-13)


def overflow_on_the_last_rank(argv: list[str], name: str) -> tuple[list[tuple[float, float]], bool]:
    """Three steps in fp16, of which the second overflows in one value on one rank: (skipped, loss scale) of each, and
    whether the second left the weights as they were."""
    trainer = trainer_of(argv)
    recorder, clip, kept = record(trainer), clip_gradients, list[dict[str, Tensor]]()
    # Measuring how fast the machine is in fp16 takes a CPU long.
    trainer.callbacks = [callback for callback in trainer.callbacks if isinstance(callback, MetricsWriter)]

    def poisoned(model: nn.Module, ctx: ParallelContext, *limits: Any) -> float:
        kept.append({spec.name: parameter.detach().clone() for spec, parameter in named_specs(model)})
        if len(kept) == 2 and ctx.world.rank == ctx.world.size - 1:
            [parameter] = [p for spec, p in named_specs(model) if spec.name == name]
            parameter.main_grad.view(-1)[-1] = math.inf
        return clip(model, ctx, *limits)

    with mock.patch("megaforge.training.engine.clip_gradients", poisoned):
        trainer.train()
    steps = [(step["skipped"], step["loss_scale"]) for step in recorder.records if step["kind"] == "step"]
    before, after = kept[1:]
    return steps, all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("--tp", "2"), "layers.1.mixer.qkv.weight"),
        (("--pp", "2"), "final_norm.weight"),
        (("--ep", "2"), "layers.1.ffn.up.weight"),
        (("--zero", "2"), "embedding.weight"),
    ],
)
def test_14_one_rank_that_overflows_stops_the_step_of_all(
    ranks: RankPool, tmp_path: Path, flags: tuple[str, ...], name: str
) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    scaling = ("--fp16", "--initial-loss-scale", "64", "--hysteresis", "1", "--train-iters", "3")
    for steps, kept in ranks.run(2, overflow_on_the_last_rank, arguments(prefix, *scaling, *flags), name):
        assert steps == [(0.0, 64.0), (1.0, 32.0), (0.0, 32.0)]
        assert kept


@pytest.mark.parametrize(("world", "flags"), [(2, "--cp 2"), (4, "--cp 2 --zero 1")])
def test_15_sequences_that_ranks_share_are_not_scaled_by_their_number(
    ranks: RankPool, documents: str, world: int, flags: str
) -> None:
    assert_same(ranks, documents, world, flags, "RE*-")


@pytest.mark.parametrize(
    ("world", "flags"), [(4, "--pp 4"), (2, "--pp 2 --vpp 2"), (2, "--pp 2 --pipeline-schedule zb-v")]
)
def test_17_the_first_values_of_rwkv7_go_through_all_stages(
    ranks: RankPool, documents: str, world: int, flags: str
) -> None:
    """Made once, read by every later block, and the gradient of all of them comes back."""
    assert_same(ranks, documents, world, f"{flags} --micro-batch-size 2", "RR-R*R-")


@pytest.mark.parametrize("policy", ["position", "probs"])
@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, "--cp 2 --ep 2"),
        (2, "--tp 2 --sp --ep 2 --etp 1"),
        (2, "--micro-batch-size 1"),
        (4, "--tp 2 --sp --cp 2 --ep 2"),
    ],
)
def test_18_capacity_is_that_of_whole_sequences(
    ranks: RankPool, documents: str, world: int, flags: str, policy: str
) -> None:
    full = ("--moe-expert-capacity-factor", "0.7", "--moe-token-drop-policy", policy)
    dropped, all_kept = (one_rank(configured(documents, None, "*E", *more), CPU) for more in (full, ()))
    assert dropped.numbers[0][0] != all_kept.numbers[0][0], "tokens must be dropped for this to prove anything"
    assert_same(ranks, documents, world, flags, "*E", *full)


def test_20_a_stage_without_experts_does_not_hang(ranks: RankPool, documents: str) -> None:
    assert_same(ranks, documents, 4, "--pp 2 --ep 2 --micro-batch-size 2", "R-|*E")


def test_22_shards_are_drawn_apart_and_replicas_alike() -> None:
    """Whatever is random is a function of the global position: shards make up one tensor, which replicas share."""
    cfg = parity_config("none", "fp64", None).model
    whole = HybridModel(make_layer_context(cfg, ParallelContext.single(), dtype=torch.float64))
    initialize_parameters(whole, ParallelContext.single(), seed=5)
    full = {spec.name: parameter.detach() for spec, parameter in named_specs(whole)}
    shards: dict[str, list[Tensor]] = {"layers.1.mixer.qkv.weight": [], "layers.1.ffn.up.weight": []}
    for rank in range(8):
        ctx = ParallelContext.of_rank(rank, 8, tp=2, ep=2)
        model = HybridModel(make_layer_context(cfg, ctx, dtype=torch.float64))
        initialize_parameters(model, ctx, seed=5)
        for spec, parameter in named_specs(model):
            assert torch.equal(parameter, spec.take_local(full[spec.name], ctx)), spec.name
            if spec.name in shards and ctx.dp.rank < 2:
                shards[spec.name].append(parameter.detach())
    dense, experts = shards.values()
    assert not torch.equal(dense[0], dense[1]) and torch.equal(dense[0], dense[2])
    assert not any(torch.equal(experts[one], experts[other]) for one in range(4) for other in range(one))


def decay_of(model: nn.Module, ctx: ParallelContext, shards: ShardedParameters | None = None) -> dict[str, Any]:
    """(weight decay, factor of the learning rate) of every trained parameter."""
    optimizer = Optimizer(OptimizerConfig(weight_decay=0.1), model, ctx, shards)
    rules = [rule for rules, _ in optimizer._phases for rule in rules]
    groups = {id(p): group for rule in rules for group in rule._optimizer.param_groups for p in group["params"]}
    masters = {main.spec.name: groups[id(main.master)] for main in optimizer.main.trained}
    return {name: (group["weight_decay"], group["lr_mult"]) for name, group in masters.items()}


def test_23_weight_decay_follows_declarations_not_names_or_shapes() -> None:
    config = parity_config("none", "fp64", None)
    single = ParallelContext.single()
    plain = HybridModel(make_layer_context(config.model, single))
    expected = decay_of(plain, single)
    assert expected["layers.1.ffn.up.weight"] == (0.1, 1.0)
    assert expected["final_norm.weight"][0] == 0.0
    wrapped = nn.ModuleDict({"norm": nn.ModuleDict({"bias": HybridModel(make_layer_context(config.model, single))})})
    assert decay_of(wrapped, single) == expected
    sharded = HybridModel(make_layer_context(config.model, single))
    assert decay_of(sharded, single, ShardedParameters(sharded, single)) == expected
    found: dict[str, Any] = {}
    staged = parity_config("none", "fp64", ParityLayout("", 8, ("--pp", "2", "--tp", "2", "--ep", "2")))
    for rank in range(8):
        ctx = ParallelContext.of_rank(rank, 8, tp=2, pp=2, ep=2)
        model = build_model(make_layer_context(config.model, ctx), check_run(staged, 8).plan)
        for name, group in decay_of(model, ctx).items():
            assert found.setdefault(name, group) == group
    assert found == expected


@pytest.mark.parametrize(("world", "flags"), [(2, "--pp 2"), (4, "--pp 2 --zero 1"), (4, "--pp 2 --tp 2")])
def test_24_a_tied_embedding_is_one_parameter_on_two_stages(
    ranks: RankPool, documents: str, world: int, flags: str
) -> None:
    """Both copies get the gradient of both, stay equal, and count once in the norm."""
    assert_same(ranks, documents, world, f"{flags} --micro-batch-size 2", "*-*-")
