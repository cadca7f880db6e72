"""Mamba-2's layer: against transformers, documents, generation, recomputation, what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megaforge.config.check_layout import check_layout
from megaforge.config.cli import parse_config
from megaforge.config.model_config import ModelConfig
from megaforge.config.pattern import blocks_of
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.models.parameter_count import count_parameters, total
from megaforge.nn.mamba2 import DECAYS, STEPS, Mamba2Mixer, Mamba2State
from megaforge.parallel.context import Axis
from megaforge.parallel.context_parallel.shard import ContextParallelShard
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.packed_sequence import PackedSequence
from megaforge.parallel.param_spec import name_parameters, named_specs
from tests.nn.support import CTX, assert_close, filled, layer_context, random

SHAPE = {"mamba_state_dim": 6, "mamba_head_dim": 4, "mamba_num_groups": 2}
CFG = ModelConfig(hidden_size=16, **SHAPE)  # type: ignore[arg-type]
MODEL = dataclasses.replace(
    CFG,
    hybrid_layer_pattern="MM-",
    vocab_size=61,
    make_vocab_size_divisible_by=1,
    untie_embeddings_and_output_weights=True,
    norm_epsilon=1e-5,
)
# Ours by theirs, in a block without an FFN.
NAMES = {
    "conv_weight": "conv1d.weight",
    "conv_bias": "conv1d.bias",
    "dt_bias": "dt_bias",
    "a_log": "A_log",
    "skip": "D",
    "norm_weight": "norm.weight",
    "input.weight": "in_proj.weight",
    "output.weight": "out_proj.weight",
}


def layer(**facts: object) -> Mamba2Mixer:
    return filled(Mamba2Mixer(layer_context(CFG, **facts)), "mixer")  # type: ignore[arg-type]


def their_name(name: str) -> str:
    ends = {"embedding.weight": "backbone.embeddings", "final_norm.weight": "backbone.norm_f", "head.weight": "lm_head"}
    if name in ends:
        return f"{ends[name]}.weight"
    index, part = name.removeprefix("layers.").split(".", 1)
    own = "norm.weight" if part == "mixer_norm.weight" else "mixer." + NAMES[part.removeprefix("mixer.")]
    return f"backbone.layers.{index}.{own}"


@pytest.fixture(scope="module")
def theirs() -> tuple[HybridModel, torch.nn.Module]:
    """Two layers of ours in fp32, and transformers' model with the same weights."""
    transformers = pytest.importorskip("transformers", reason="needs the extra 'test'")
    cfg = dataclasses.replace(MODEL, hybrid_layer_pattern="MM")
    ours = filled(HybridModel(make_layer_context(cfg, CTX, dtype=torch.float32)))
    config = transformers.Mamba2Config(
        vocab_size=61, hidden_size=16, num_hidden_layers=2, state_size=6, head_dim=4, num_heads=8, n_groups=2, expand=2,
        chunk_size=16, use_bias=False, use_conv_bias=True, layer_norm_epsilon=1e-5, residual_in_fp32=False,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Mamba2ForCausalLM(config)
    weights = {their_name(spec.name): parameter.detach() for spec, parameter in named_specs(ours)}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert weights.keys() == shapes.keys()
    model.load_state_dict({name: weight.view(shapes[name]) for name, weight in weights.items()})
    return ours, model.eval()


def test_transformers_has_the_same_logits_and_gradients(theirs: tuple[HybridModel, torch.nn.Module]) -> None:
    ours, model = theirs
    tokens = torch.randint(0, 61, (2, 75), generator=torch.Generator().manual_seed(1))
    out, expected = ours.logits(tokens)[..., :61], model(input_ids=tokens).logits
    assert_close(out, expected, 2e-5, "logits")
    direction = random(*out.shape, seed=5).float()
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for spec, parameter in named_specs(ours):
        expected_gradient = gradients[their_name(spec.name)]
        assert parameter.grad is not None and expected_gradient is not None
        assert_close(parameter.grad, expected_gradient.view(parameter.shape), 5e-5, spec.name)


def test_documents_do_not_see_each_other() -> None:
    """A packed sequence gives what each document gives alone; the convolution and the state begin anew."""
    mixer = layer()
    x = random(90, 1, 16)
    starts = torch.zeros(1, 90, dtype=torch.bool)
    cuts = [0, 2, 3, 70, 90]
    starts[0, cuts[1:-1]] = True
    packed = mixer(x, PackedSequence(1, 90, x.device, starts)).update
    ends = zip(cuts, cuts[1:], strict=False)
    alone = [mixer(x[a:b], PackedSequence(1, b - a, x.device)).update for a, b in ends]
    assert_close(packed, torch.cat(alone), 1e-12, "update")


def test_chosen_tokens_of_documents_do_not_see_each_other() -> None:
    """As documents of a sequence of their own, though they have the positions that they had."""
    mixer, x, starts = layer(), random(20, 1, 16), torch.zeros(1, 20, dtype=torch.bool)
    starts[0, 12] = True
    places = torch.tensor([1, 4, 8, 9, 17, 18])[:, None]
    chosen = mixer(x[places[:, 0]], PackedSequence(1, 20, x.device, starts).select(places)).update
    alone = [mixer(x[part], PackedSequence(1, len(part), x.device)).update for part in ([1, 4, 8, 9], [17, 18])]
    assert_close(chosen, torch.cat(alone), 1e-12, "update")


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1,) * 9, (2, 1, 70, 3), (76,)])
def test_pieces_continue_each_other(cuts: tuple[int, ...]) -> None:
    mixer = layer()
    x = random(sum(cuts), 2, 16)
    whole = mixer(x, PackedSequence(2, len(x), x.device)).update
    state, out, offset = Mamba2State(), [], 0
    for piece in x.split(list(cuts)):
        out.append(mixer(piece, PackedSequence(2, len(piece), x.device, offset=offset), {}, state).update)
        offset += len(piece)
    assert_close(torch.cat(out), whole, 1e-12, "update")


@torch.no_grad()
@pytest.mark.parametrize("start", [5, 7, 8, 9])
def test_what_is_remembered_is_the_last_document(start: int) -> None:
    mixer, x, starts = layer(), random(12, 1, 16), torch.zeros(1, 10, dtype=torch.bool)
    starts[0, start] = True
    state = Mamba2State()
    mixer(x[:10], PackedSequence(1, 10, x.device, starts), {}, state)
    behind = mixer(x[10:], PackedSequence(1, 2, x.device, offset=10), {}, state).update
    alone = mixer(x[start:], PackedSequence(1, 12 - start, x.device)).update
    assert_close(behind, alone[-2:], 1e-12, "update")


def test_the_future_is_not_seen() -> None:
    mixer = layer()
    x = random(80, 1, 16)
    changed = x.clone()
    changed[66:] += 1
    before, after = (mixer(each, PackedSequence(1, 80, x.device)).update for each in (x, changed))
    assert torch.equal(before[:66], after[:66]) and not torch.equal(before[66], after[66])


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_nothing(recompute: str) -> None:
    def run(how: str) -> list[Tensor]:
        model = filled(HybridModel(make_layer_context(MODEL, CTX, dtype=torch.float64, recompute=how)))
        tokens = torch.arange(70)[None] % 61
        model(tokens, tokens.roll(-1, 1), torch.ones(1, 70)).loss_sum.backward()
        return [p.grad for _, p in named_specs(model) if p.grad is not None]

    for plain, again in zip(run("none"), run(recompute), strict=True):
        assert torch.equal(plain, again)


def test_what_is_declared() -> None:
    mixer = Mamba2Mixer(layer_context(CFG))
    name_parameters(mixer, "mixer")
    initialize_parameters(mixer, CTX, seed=7)
    specs = {spec.name.removeprefix("mixer."): spec for spec, _ in named_specs(mixer)}
    assert specs["input.weight"].parts == (32, 32, 12, 12, 8) and specs["conv_weight"].parts == (32, 12, 12)
    assert all(spec.shard_dim == (1 if name == "output.weight" else 0) for name, spec in specs.items())
    assert {name for name, spec in specs.items() if spec.weight_decay} == {
        "conv_weight",
        "input.weight",
        "output.weight",
    }
    assert {name for name, spec in specs.items() if spec.update == "matrix"} == {"input.weight", "output.weight"}
    step, decay = torch.nn.functional.softplus(mixer.dt_bias), mixer.a_log.exp()
    assert STEPS[0] <= step.min() < step.max() <= STEPS[1] and DECAYS[0] <= decay.min() < decay.max() <= DECAYS[1]


def test_chunks_shorter_than_the_convolution_are_refused() -> None:
    """Before anything is sent."""
    info = PackedSequence(1, 8, torch.device("cpu"), shards=ContextParallelShard(Axis("cp", size=2)))
    with pytest.raises(UserError, match="--cp 2: .* at least 3 tokens, and --seq-length / .* is 2"):
        layer()(random(4, 1, 16), info)


def test_half_precision_follows_single() -> None:
    """Convolution, steps, state and norm are in fp32 whatever the projections are in."""
    outs = {}
    for dtype in (torch.float32, torch.bfloat16):
        mixer = filled(Mamba2Mixer(layer_context(CFG, dtype)), "mixer")
        assert mixer.input.weight.dtype is dtype and mixer.a_log.dtype is torch.float32
        outs[dtype] = mixer(random(70, 2, 16).to(dtype), PackedSequence(2, 70, torch.device("cpu"))).update
    assert outs[torch.bfloat16].dtype is torch.bfloat16
    assert_close(outs[torch.bfloat16], outs[torch.float32], 2e-2, "update")


def test_parameters_and_flops_are_counted() -> None:
    [mamba] = [count for count in count_parameters(MODEL) if count.component == "Mamba-2 mixers"]
    each = 16 * (32 + 32 + 12 + 12 + 8) + 56 * 4 + 56 + 3 * 8 + 32 + 32 * 16
    assert mamba.stored == mamba.active == 2 * each
    assert total(count_parameters(MODEL)).stored > mamba.stored
    assert blocks_of(MODEL)[0].mixer.flops(MODEL, 128) == 5 * 32 * 6 + 8 * 56


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--mamba-head-dim", "7"], "--mamba-head-dim 7 does not divide 2 x --hidden-size 64; use 1, 2, 4"),
        (["--mamba-head-dim", "16"], None),
        (["--mamba-num-groups", "3"], "--mamba-num-groups 3 does not divide the 8 Mamba-2 heads; use 1, 2, 4 or 8"),
        (
            ["--mamba-num-heads", "6", "--mamba-num-groups", "3", "--tp", "2"],
            "--tp 2 does not divide --mamba-num-groups 3",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused(flags: list[str], message: str | None) -> None:
    line = ["--hidden-size", "64", "--num-attention-heads", "4", "--vocab-size", "64", "--hybrid-layer-pattern", "M-*-"]
    line += ["--seq-length", "64", "--mamba-head-dim", "16", *flags]

    def check() -> None:
        check_layout(parse_config(line).config, 2)

    if message is None:
        return check()
    with pytest.raises(UserError, match=message.replace("(", "\\(")):
        check()
