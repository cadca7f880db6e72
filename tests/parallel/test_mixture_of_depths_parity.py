"""Mixture of Depths at layouts of every kind against one rank, as :mod:`tests.parallel.test_layout_matrix` compares
them: loss, every gradient, the gradient norm and the updated weights over five steps of packed documents; and what each
token is chosen for where later ones are not known."""

from __future__ import annotations

import pytest
import torch

from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import named_specs
from megaforge.parallel.token_selection import TokenSelection
from megaforge.training.setup import make_context
from megaforge.verification.parity import Comparison, combined, compare, parity_config, write_documents
from megaforge.verification.parity_layouts import ParityLayout, choose_layouts
from tests.parallel.pool import RankPool

FLAGS = (
    *("--hybrid-layer-pattern", "RER-R-*-M*E", "--mamba-head-dim", "8", "--mamba-state-dim", "6"),
    *("--mamba-num-groups", "4", "--mamba-num-heads", "8", "--mod-capacity-factor", "0.75"),
)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_documents(str(tmp_path_factory.mktemp("parity") / "train_text_document"), 61, runs=True)


def compare_here(documents: str, name: str, dtype: str, flags: tuple[str, ...]) -> Comparison:
    [layout] = choose_layouts([name])
    reference = parity_config(documents, dtype, None, flags)
    return compare(parity_config(documents, dtype, layout, flags), reference, torch.device("cpu"))


@pytest.mark.parametrize(
    "name,more",
    [
        ("tp4-sp", ("--hidden-dropout", "0.1")),
        ("cp4", ("--mod-inference", "threshold", "--hidden-dropout", "0.1")),
        ("pp2-cp2-zb-v", ()),
        ("tp2-sp-dp2-zero2", ("--mod-inference", "threshold")),
        ("tp2-cp2-ep2", ()),
    ],
)
def test_layout_changes_nothing(ranks: RankPool, documents: str, name: str, more: tuple[str, ...]) -> None:
    [layout] = choose_layouts([name])
    records = ranks.run(layout.ranks, compare_here, documents, name, "fp64", FLAGS + more)
    found = combined(records, parity_config(documents, "fp64", layout, FLAGS + more))
    assert found.agrees("fp64"), f"{name}: {found.worst}"


def losses_here(documents: str, layout: ParityLayout | None) -> torch.Tensor:
    """Cross-entropies in evaluation of two texts, of the tokens that this rank holds, by their places."""
    config = parity_config(documents, "fp64", layout, FLAGS)
    ctx = ParallelContext.single() if layout is None else make_context(config, torch.device("cpu"))
    sp = config.parallel.sequence_parallel
    model = HybridModel(make_layer_context(config.model, ctx, sequence_parallel=sp, dtype=torch.float64)).eval()
    initialize_parameters(model, ctx, 3)
    with torch.no_grad():
        for spec, parameter in named_specs(model):
            if "inference.down.bias" in spec.name:
                parameter.fill_(0.1)
    length = config.data.seq_length
    tokens = torch.randint(61, (2, length), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        own = model(tokens, tokens.roll(-1, 1), torch.ones(2, length)).losses_SB
    return model.shards.gather(own)


def test_evaluation_chooses_the_same_tokens_at_every_layout(ranks: RankPool, documents: str) -> None:
    expected = losses_here(documents, None)
    for flags in ("--tp 2 --sp --cp 2", "--tp 2 --cp 2 --ep 2"):
        layout = ParityLayout("evaluation", 4, tuple(flags.split()))
        for found in ranks.run(layout.ranks, losses_here, documents, layout):
            torch.testing.assert_close(found, expected)


def test_a_selection_takes_and_puts_back() -> None:
    layer = make_layer_context(parity_config("x", "fp64", None, FLAGS).model, ParallelContext.single())
    x = torch.randn(5, 2, 3)
    some = TokenSelection(torch.tensor([[0, 1], [3, 2]]), 5, layer.region, layer.shard, torch.tensor([1, 2]))
    assert some.chosen_SB.t().tolist() == [[True, False, False, False, False], [False, True, True, False, False]]
    taken = some.take(x)
    assert torch.equal(taken, torch.stack([x[[0, 3], 0], x[[1, 2], 1]], 1))
    assert torch.equal(some.put(taken)[some.chosen_SB], x[some.chosen_SB])
    assert PackedSequence(2, 5, torch.device("cpu")).select(some.indices_SB).length == 2
