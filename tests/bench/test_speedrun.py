"""What the speedrun's numbers stand on: when a curve reaches its target, and a peer that cannot look ahead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megaforge.config.cli import parse_config
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from tests.bench.speedrun_peers import DensePreset, SpeedrunGPT
from tests.bench.speedrun_session import DENSE, Run, Text, crossing


def test_a_curve_reaches_its_target_between_two_evaluations():
    curve = [[0, 0.0, 3.5], [10, 5.0, 2.5], [20, 10.0, 2.0]]
    assert crossing(curve, 2.25) == pytest.approx(7.5)
    assert crossing(curve, 2.0) == pytest.approx(10.0)
    assert crossing(curve, 3.0) == pytest.approx(2.5)
    assert crossing(curve, 1.9) is None


def test_a_curve_that_starts_below_the_target_has_reached_it_at_once():
    assert crossing([[0, 0.0, 1.0], [10, 5.0, 2.0]], 2.5) == 0.0


def test_runs_that_differ_have_results_of_their_own():
    runs = [Run("ours", lr, seed, 10, bf16) for lr in (1e-3, 2e-3) for seed in (1, 2) for bf16 in (False, True)]
    runs += [Run("ours", 1e-3, 1, 10, False, embedding_mult=2.0)]
    assert len({run.name for run in runs}) == 9


@pytest.mark.parametrize("mult", [1.0, 2.5])
def test_our_embeddings_rate_is_the_runs_and_not_the_presets(tmp_path: Path, mult: float):
    text = Text(tmp_path, 3.0, [])
    ours = parse_config(text.flags(Run("ours", 1e-3, 1, 20, False, embedding_mult=mult), tmp_path)).config.optimizer
    assert ours.lr_mult == (f"embedding={mult}",) and ours.optimizer == "normuon"
    own = Run("ours", 1e-3, 1, 20, False, ("--optimizer", "adam", "--lr-mult", "embedding=3"), mult)
    assert parse_config(text.flags(own, tmp_path)).config.optimizer.lr_mult == ("embedding=3",)


def test_a_peers_embedding_has_its_own_rate():
    model = SpeedrunGPT(vocabulary=32, length=16, hidden=32, layers=2, inner=48)
    groups = [group for optimizer in model.optimizers(1e-3, 3.0) for group in optimizer.param_groups]
    of = {id(p): group.get("lr_mult", 1.0) for group in groups for p in group["params"]}
    assert set(of) == {id(p) for p in model.parameters()}
    assert [name for name, p in model.named_parameters() if of[id(p)] != 1.0] == ["embedding.weight"]


def test_the_speedrun_peer_does_not_look_ahead():
    torch.manual_seed(0)
    model = SpeedrunGPT(vocabulary=32, length=16, hidden=32, layers=2, inner=48)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    tokens = torch.randint(0, 32, (2, 16))
    labels = torch.randint(0, 32, (2, 16))
    labels[:, 8:] = -100
    before = model(tokens, labels)
    tokens[:, 8:] = (tokens[:, 8:] + 1) % 32
    torch.testing.assert_close(model(tokens, labels), before)
    tokens[:, 7] = (tokens[:, 7] + 1) % 32
    assert not torch.allclose(model(tokens, labels), before)


def test_the_dense_peer_is_our_dense_preset():
    flags = ["--config", "cdrmix-tiny", *DENSE, "--vocab-size", "128", "--num-layers", "2", "--ffn-hidden-size", "48"]
    ctx = ParallelContext.single()
    ours = HybridModel(make_layer_context(parse_config(flags).config.model, ctx))
    initialize_parameters(ours, ctx, 1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.2)
    peer = DensePreset(ours.cfg.padded_vocab_size(), 16, layers=2, inner=48)
    peer.load_state_dict({name: parameter.detach() for name, parameter in ours.named_parameters()})
    tokens, labels = torch.randint(0, 128, (2, 2, 16))
    expected = ours(tokens, labels, torch.ones(2, 16)).loss_sum
    torch.testing.assert_close(peer(tokens, labels), expected, rtol=2e-6, atol=0)
