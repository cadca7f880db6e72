"""QLoRA: against LoRA beside the weights that codes stand for, at every layout, from a base, resumed, merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megaforge.checkpoint.adapter_files import MergedSource, export_peft
from megaforge.checkpoint.convert import write_directory
from megaforge.checkpoint.four_bit_source import widened
from megaforge.checkpoint.sources import open_source
from megaforge.config.qlora_config import QLoraConfig
from megaforge.errors import UserError
from megaforge.models.flops import active_matmul_parameters
from megaforge.models.parameter_count import count_parameters
from megaforge.parallel.context import ParallelContext
from megaforge.peft.qlora import four_bit_matrices
from tests.nn.support import perturb
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, trainer_of
from tests.peft.test_adapter_files import logits, train
from tests.peft.test_lora import LORA, MODEL, SHORT, SIZES, loss_of, small_model
from tests.peft.test_lora import train as observe
from tests.training.tiny import arguments, make_trainer, write_dataset

QLORA = (*LORA, "--peft", "qlora", "--qlora-block-size", "16")  # expert widths of a rank are not multiples of it
LAYOUTS = (
    (4, ("--tp", "4", "--sp", "--etp", "2", "--ep", "2", "--zero", "1")),
    (2, ("--ep", "2", "--zero", "2", "--recompute", "full")),
)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def flags(prefix: str, *more: str) -> list[str]:
    return arguments(prefix, *MODEL, *SIZES, *SHORT, *more)


@pytest.fixture(scope="module")
def one_rank(prefix: str) -> dict[str, Any]:
    return observe(flags(prefix, *QLORA))


@pytest.mark.parametrize(
    ("world", "layout"), LAYOUTS, ids=lambda value: "".join(value) if isinstance(value, tuple) else ""
)
def test_the_layout_changes_nothing(
    ranks: RankPool, prefix: str, one_rank: dict[str, Any], world: int, layout: tuple[str, ...]
) -> None:
    """Codes, loss, every gradient, every update."""
    compare(ranks.run(world, observe, flags(prefix, *QLORA, *layout)), one_rank, 1e-10)


@pytest.mark.parametrize("more", [(), ("--no-qlora-double-quant", "--qlora-quant-type", "int4")])
def test_every_gradient_is_that_of_lora_beside_what_codes_stand_for(prefix: str, more: tuple[str, ...]) -> None:
    model, plain = small_model(prefix, *QLORA, *more), small_model(prefix, *LORA)
    perturb(model, ParallelContext.single(), 0.05)
    base = {one.coding.spec.name: one.values(torch.float64) for one in four_bit_matrices(model)}
    own = {name: p.detach() for name, p in model.named_parameters() if ".four_bits." not in name}
    assert len(base) == 14 and not base.keys() & own.keys()
    # Two begin at zero.
    assert sum(bool((value - plain.get_parameter(name)).any()) for name, value in base.items()) == 12
    plain.load_state_dict({**own, **base}, strict=False)  # a tied head has no name of its own
    losses = [loss_of(one) for one in (model, plain)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None
            torch.testing.assert_close(p.grad, plain.get_parameter(name).grad, rtol=0, atol=0, msg=name)


def test_codes_count_as_the_matrices_that_they_are_of(prefix: str) -> None:
    model, plain = small_model(prefix, *QLORA), small_model(prefix, *LORA)
    assert active_matmul_parameters(model) == active_matmul_parameters(plain)
    active = [{one.component: one.active for one in count_parameters(each.cfg)} for each in (model, plain)]
    for component in ("attention", "experts", "dense FFN", "Mamba-2 mixers"):
        assert 1 <= active[0][component] / active[1][component] < 1.1
    held = sum(p.nbytes for name, p in model.named_parameters() if ".four_bits." in name)
    assert held < 0.1 * sum(8 * one.coding.spec.numel for one in four_bit_matrices(model))


def tune(argv: list[str]) -> dict[str, torch.Tensor]:
    trainer = trainer_of(argv)
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_from_a_base_at_any_layout_on_and_merged(ranks: RankPool, prefix: str, tmp_path: Path) -> None:
    base, one, two, cut = (str(tmp_path / name) for name in ("base", "one", "two", "cut"))
    given = arguments(prefix, *MODEL, *SIZES, *SHORT[: SHORT.index("--lora-bias")], "--lr-decay-style", "constant")
    train([*given, "--train-iters", "1", "--save", base])
    line = [*given, *QLORA, "--pretrained-checkpoint", base]
    tune([*line, "--save", one])
    ranks.run(2, tune, [*line, "--save", two, "--tp", "2", "--pp", "1", "--sp"])
    ranks.run(2, tune, [*line, "--save", cut, "--load", cut, "--pp", "2", "--train-iters", "1"])
    tune([*line, "--save", cut, "--load", cut])
    saved, others = open_source(one), [open_source(two), open_source(cut)]
    codes = [name for name in saved.tensors if name.endswith(".four_bits.codes")]
    assert len(codes) == 18
    for name in saved.tensors:
        for other in others:
            if ".four_bits." in name:
                assert torch.equal(saved.read(name), other.read(name)), name
            elif not name.startswith(("optimizer.", "callbacks.")):
                torch.testing.assert_close(saved.read(name), other.read(name), rtol=1e-8, atol=1e-10, msg=name)
    # Beside the weights that were coded, and merged into what codes stand for.
    source = open_source(one)
    assert export_peft(source, tmp_path / "adapter") == 2 * (4 + 1) * 3 + 13
    MergedSource(open_source(base), str(tmp_path / "adapter"))
    write_directory(MergedSource(source), tmp_path / "merged")
    wide = widened(source, trainer_of(line).config.model)
    near = (wide.read("layers.1.ffn.down.weight") - open_source(base).read("layers.1.ffn.down.weight")).abs().max()
    assert 0 < near < 0.05
    torch.testing.assert_close(logits(one), logits(str(tmp_path / "merged")), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="--peft qlora in the checkpoint, lora here; merge it first"):
        make_trainer([*given, *LORA, "--pretrained-checkpoint", one])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--qlora-block-size", "32"), r"--qlora-block-size 32: it does not divide the 48 .*; use 16"),
        (("--qlora-block-size", "12"), "--qlora-block-size 12: use a power of two, as 8"),
        (("--quantize-weights", "ternary"), "is quantized already"),
    ],
)
def test_bad_input_is_named(prefix: str, more: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        small_model(prefix, *QLORA, *more)


@pytest.mark.parametrize("size", [3, 48, 96])
def test_blocks_are_powers_of_two(size: int) -> None:
    with pytest.raises(
        UserError, match=f"--qlora-block-size {size}: use a power of two, as {1 << (size.bit_length() - 1)}"
    ):
        QLoraConfig(qlora_block_size=size).validate_qlora()


def test_matrices_without_adapters_are_kept_so_too(prefix: str) -> None:
    model: Any = small_model(prefix, *QLORA[:-2], "--qlora-block-size", "16", "--peft-targets", "attention", "moe")
    assert len(list(four_bit_matrices(model))) == 14 and "weight" not in model.layers["2"].mixer.input._parameters
