"""Mixture of Depths against a reference that is written out token by token, in training, in evaluation and in
generation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megaforge.config.depth_config import tokens_within
from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import blocks_of
from megaforge.models.generation_state import chosen, side_by_side
from megaforge.models.hybrid import HybridModel
from megaforge.nn.block import Block
from megaforge.nn.mixture_of_depths import DepthState, MixtureOfDepths, top_places
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.packed_sequence import PackedSequence

CFG = ModelConfig(
    vocab_size=40,
    hidden_size=16,
    num_attention_heads=2,
    rwkv_head_size=8,
    num_experts=4,
    ffn_hidden_size=24,
    make_vocab_size_divisible_by=8,
    hybrid_layer_pattern="RER-R-*-M*E",
    mamba_head_dim=8,
    mamba_state_dim=4,
    mamba_num_groups=2,
    mod_capacity_factor=0.6,
)
CPU = torch.device("cpu")


def model_of(cfg: ModelConfig = CFG, recompute: str = "none") -> HybridModel:
    """In fp64, with noise on all weights, so that every part matters."""
    ctx = ParallelContext.single()
    model = HybridModel(make_layer_context(cfg, ctx, dtype=torch.float64, recompute=recompute))
    initialize_parameters(model, ctx, 5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return model


def texts(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(40, (batch, length), generator=torch.Generator().manual_seed(seed))


def plainly(block: MixtureOfDepths, x: Tensor, info: PackedSequence, carried: dict[str, Tensor]) -> Tensor:
    """The block of the paper, one sequence after the other: the highest scores' tokens, in order."""
    out = x.clone()
    count = tokens_within(block.capacity, len(x))
    for row in range(x.shape[1]):
        rms = x[:, row].square().mean(-1, keepdim=True).add(block.router.epsilon).sqrt()
        scores = (x[:, row] / rms) @ block.router.score.weight[0] + block.router.score.bias
        places = sorted(sorted(range(len(x)), key=lambda place: -float(scores[place].detach()))[:count])
        starts = [
            place == 0 or bool(info.document_ids_BS[row, place] != info.document_ids_BS[row, before])
            for before, place in zip([0, *places], places, strict=False)
        ]
        own = PackedSequence(1, count, CPU, torch.tensor([starts]))
        own.position_ids_BS = info.position_ids_BS[row : row + 1, places]
        inside = {name: tensor[places, row : row + 1] for name, tensor in carried.items()}
        made, _, _ = Block.forward(block, x[places, row : row + 1], own, inside)
        gate = torch.sigmoid(scores[places])[:, None, None]
        out[places, row : row + 1] = x[places, row : row + 1] + gate * (made - x[places, row : row + 1])
    return out


@pytest.mark.parametrize("length", [1, 2, 13])
def test_the_highest_tokens_of_each_sequence_go_through_it(length: int) -> None:
    """Output and gradients, over documents; R with its v_first, attention with its positions, M, experts."""
    start = torch.zeros(3, length, dtype=torch.bool)
    start[:, 0] = True
    start[0, length // 3 :: 4] = True
    model, tokens = model_of(), texts(3, length)
    info = PackedSequence(3, length, CPU, start)
    x = model.embedded(tokens, info).detach()
    carried: dict[str, Tensor] = {}
    found = []
    for block in model.blocks:
        if isinstance(block, MixtureOfDepths):
            leaves = [x.clone().requires_grad_(), *(one.clone().requires_grad_() for one in carried.values())]
            weights = [p for p in block.parameters() if p.requires_grad]
            for forward in (lambda y, c, b=block: b(y, info, c)[0], lambda y, c, b=block: plainly(b, y, info, c)):
                out = forward(leaves[0], dict(zip(carried, leaves[1:], strict=True)))
                grads = torch.autograd.grad((out * torch.arange(16)).sum(), [*leaves, *weights], allow_unused=True)
                found.append((out, *grads))
            (got, *got_grads), (expected, *wanted) = found[-2:]
            torch.testing.assert_close(got, expected)
            for one, other in zip(got_grads, wanted, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    torch.testing.assert_close(one, other)
        x, carried, _ = block(x, info, carried)
        x, carried = x.detach(), {name: tensor.detach() for name, tensor in carried.items()}
    assert [type(block).__name__ for block in model.blocks] == ["Block", "MixtureOfDepths"] * 3


def test_equal_scores_go_by_place_whatever_their_rounding() -> None:
    scores = torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0])[:, None].double()
    noise = 1e-9 * torch.tensor([-1.0, 1.0, 1.0, 2.0, 0.0])[:, None].double()
    for some in (scores, scores + noise, -(-scores - noise)):
        assert top_places(some, 3).squeeze(1).tolist() == [0, 1, 4]
    assert top_places(torch.zeros(4, 2), 2).tolist() == [[0, 0], [1, 1]]
    assert top_places(torch.tensor([[-3e38], [3e38], [0.0]]), 1).tolist() == [[1]]
    assert [tokens_within(*one) for one in ((0.75, 128), (0.7, 10), (1.0, 9), (1e-6, 5), (0.5, 1))] == [96, 7, 9, 1, 1]


@pytest.mark.parametrize("inference", ["predictor", "threshold"])
def test_no_token_sees_a_later_one_where_it_is_not_training(inference: str) -> None:
    model = model_of(dataclasses.replace(CFG, mod_inference=inference)).eval()
    one, other = texts(4, 12), texts(4, 12, seed=1)
    other[:, :7] = one[:, :7]
    with torch.no_grad():
        first, second = model.logits(one), model.logits(other)
        torch.testing.assert_close(first[:, :7], second[:, :7])
        assert not torch.allclose(first[:, 7:], second[:, 7:])
        model.train()  # the share of a sequence knows its end
        first, second = model.logits(one), model.logits(other)
    assert not torch.allclose(first[:, :7], second[:, :7])


@pytest.mark.parametrize("inference", ["predictor", "threshold"])
def test_generation_makes_what_evaluation_makes(inference: str) -> None:
    """Token by token, in pieces, with texts side by side of other lengths, and dropped or repeated."""
    model, tokens = model_of(dataclasses.replace(CFG, mod_inference=inference)).eval(), texts(4, 14)
    blocks = [block for block in model.blocks if isinstance(block, MixtureOfDepths)]
    with torch.no_grad():
        expected = model.logits(tokens)
        state = model.new_state()
        got = [model.logits(piece, state=state) for piece in tokens.split([3, 1, 1, 4, 1, 1, 1, 1, 1], 1)]
        torch.testing.assert_close(torch.cat(got, 1), expected)
        taken = [[one.taken for one in layer.sequences] for layer in state.layers if isinstance(layer, DepthState)]
        assert len(taken) == len(blocks) and 0 < sum(map(sum, taken)) < 4 * 14 * len(blocks)
        assert len({tuple(row) for row in taken}) > 1
        back, kept = state.mark(), [list(row) for row in taken]
        first = model.logits(tokens[:, :3], state=state)
        back()
        now = [layer for layer in state.layers if isinstance(layer, DepthState)]
        assert kept == [[one.taken for one in layer.sequences] for layer in now]
        torch.testing.assert_close(model.logits(tokens[:, :3], state=state), first)
        states = [model.new_state() for _ in range(2)]
        model.logits(tokens[:2, :5], state=states[0]), model.logits(tokens[2:, :9], state=states[1])
        both = side_by_side(states)
        picked = chosen(both, torch.tensor([3, 0, 3]))
        rest = torch.stack([tokens[3, 9:12], tokens[0, 5:8], tokens[3, 9:12]])
        for place in range(3):
            last = model.logits(rest[:, place : place + 1], state=picked)[:, 0]
        torch.testing.assert_close(last, torch.stack([expected[3, 11], expected[0, 7], expected[3, 11]]))


def test_a_text_of_which_nothing_or_everything_is_chosen() -> None:
    model, tokens = model_of().eval(), texts(2, 6)
    plain = model_of(dataclasses.replace(CFG, mod_capacity_factor=None)).eval()
    own = {name: one for name, one in model.state_dict().items() if "router.score" not in name}
    plain.load_state_dict({name: one for name, one in own.items() if "inference" not in name})
    with torch.no_grad():
        for block in (block for block in model.blocks if isinstance(block, MixtureOfDepths)):
            block.router.inference.down.bias.fill_(1e9)
            block.router.score.weight.zero_()
            block.router.score.bias.fill_(60.0)  # its sigmoid is 1
        torch.testing.assert_close(model.logits(tokens), plain.logits(tokens))
        for block in (block for block in model.blocks if isinstance(block, MixtureOfDepths)):
            block.router.inference.down.bias.fill_(-1e9)
        for name in ("1", "3", "5"):
            del plain.layers[name]
        torch.testing.assert_close(model.logits(tokens), plain.logits(tokens))
        torch.testing.assert_close(model.logits(tokens, state=model.new_state()), plain.logits(tokens))


@pytest.mark.parametrize("recompute", ["full", "selective", "moe"])
def test_what_is_computed_again_is_the_same(recompute: str) -> None:
    tokens, results = texts(2, 10), []
    for model in (model_of(), model_of(recompute=recompute)):
        output = model(tokens, tokens.roll(-1, 1), torch.ones(2, 10))
        losses = [term.weight * term.sum for term in output.terms.values()]
        (output.loss_sum + torch.stack(losses).sum()).backward()
        results.append([p.grad for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_what_the_choice_is_learned_by() -> None:
    """Binary cross-entropy with what was chosen; of the predictor no gradient reaches anything else."""
    for inference in ("predictor", "threshold"):
        cfg = dataclasses.replace(CFG, mod_inference=inference, hybrid_layer_pattern="*-*-")
        model, tokens = model_of(cfg), texts(2, 10)
        output = model(tokens, tokens, torch.ones(2, 10))
        assert {"mod_loss", "mod_agreement", "mod_kept"} <= output.terms.keys()
        term = output.terms["mod_loss"]
        assert (term.weight, term.layers, term.denominator) == (1e-2, 1, "tokens")
        block = model.blocks[1]
        assert isinstance(block, MixtureOfDepths)
        info = PackedSequence(2, 10, CPU)
        x, _, _ = model.blocks[0](model.embedded(tokens, info), info)
        scores, logits = block.router(x)
        target = torch.zeros_like(scores).scatter(0, top_places(scores, 6), 1.0)
        p = logits.sigmoid()
        torch.testing.assert_close(term.sum, -(target * p.log() + (1 - target) * (1 - p).log()).sum())
        assert float(output.terms["mod_agreement"].sum) == float(((logits > 0) == (target > 0)).sum())
        assert float(output.terms["mod_kept"].sum) == float((logits > 0).sum())
        term.sum.backward()
        reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        if inference == "predictor":
            assert reached == {
                f"layers.1.router.inference.{one}" for one in ("up.weight", "up.bias", "down.weight", "down.bias")
            }
        else:
            assert {"layers.1.router.score.weight", "layers.0.mixer.qkv.weight"} <= reached


def test_which_blocks_choose() -> None:
    def places(**numbers: object) -> list[int]:
        return [place for place, block in enumerate(blocks_of(dataclasses.replace(CFG, **numbers))) if block.capacity]  # type: ignore[arg-type]

    assert places() == [1, 3, 5] and places(mod_every=1) == [1, 2, 3, 4, 5] and places(mod_every=3) == [2, 5]
    assert places(mod_capacity_factor=None) == []
