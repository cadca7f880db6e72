"""Costs of parts: what a run of the part alone says, at any layout, without peers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megaforge.config.cli import parse_config
from megaforge.config.model_config import ModelConfig
from megaforge.planning.costs import _sizes, carried_before, part_cost
from megaforge.planning.layout import PlannedLayout, layout_of
from megaforge.planning.measure import Cost, measure_end, measure_layer
from megaforge.planning.stages import model_parts

PLAIN = PlannedLayout(8, sequence_length=64, global_batch_size=8, dtype=torch.float32)
TOKENS, WIDTH, WIDE = 64, 64, 4


def small(*flags: str) -> ModelConfig:
    return parse_config(["--config", "cdrmix-test", "--vocab-size", "500", *flags]).config.model


def dense_ffn(layout: PlannedLayout) -> Cost:
    cfg = small("--layer-schedule", "attention", "--ffn", "dense", "--normalization", "rmsnorm")
    return part_cost(model_parts(cfg, layout.dtype), layout, 1, 1)


def test_a_dense_ffn_keeps_what_its_formula_says() -> None:
    """x, 1/rms, the normed x, max(0, inner) and its square."""
    cost = dense_ffn(PLAIN)
    inner = small().ffn_size
    assert cost.input == TOKENS * WIDTH * WIDE
    assert cost.kept == TOKENS * WIDE * (WIDTH + 1 + WIDTH + 2 * inner)
    assert (cost.shared, cost.reads, cost.forward, cost.backward) == ({}, {}, {}, {})
    assert dense_ffn(dataclasses.replace(PLAIN, micro_batch_size=3)).kept == 3 * cost.kept
    halved = dense_ffn(dataclasses.replace(PLAIN, tp=2, etp=2, sequence_parallel=True))
    # Inside the region every rank has every token; the residual stream is cut.
    assert halved.kept == TOKENS * WIDE * (WIDTH / 2 + 1 / 2 + WIDTH + 2 * inner / 2)


def test_gradients_of_weights_wait_only_where_the_schedule_splits() -> None:
    split = dataclasses.replace(PLAIN, pp=2, etp=1, schedule_name="zb-h1", global_batch_size=8)
    assert dense_ffn(PLAIN).waiting == 0
    # Of the norm's output, of the inner width, and of the FFN's output, which are the residual stream's.
    inner = small().ffn_size
    assert dense_ffn(split).waiting == pytest.approx(TOKENS * WIDE * (2 * WIDTH + inner), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_in_four_bits_is_wide_while_it_is_multiplied(dtype: torch.dtype) -> None:
    """Six bytes a weight of one matrix at a time: in fp32, made of codes in two bytes a weight, or made 16-bit."""
    shape = ("--layer-schedule", "attention", "--ffn", "dense", "--hidden-size", "512", "--ffn-hidden-size", "2048")
    sizes = _sizes(dataclasses.replace(PLAIN, sequence_length=1, dtype=dtype), "none", experts=False)
    lora, qlora = (measure_layer(small(*shape, "--peft", name), 1, 1, sizes, {}) for name in ("lora", "qlora"))
    assert 0 <= qlora.kept - lora.kept < 4096, "tables of levels alone"
    assert lora.working < 0.1 * qlora.working
    assert qlora.working == pytest.approx(6 * 512 * 2048, rel=0.03)


def test_carried_tensors_are_made_once_and_read() -> None:
    cfg = small("--layer-schedule", "rwkv", "--ffn", "dense")
    sizes = _sizes(PLAIN, "none", experts=False)
    first = measure_layer(cfg, 0, 0, sizes, {})
    assert first.reads == {}
    assert first.shared == {"v_first": TOKENS * WIDTH * WIDE}
    arriving = carried_before(model_parts(cfg, torch.float32), PLAIN, 1)
    assert arriving == {"v_first": (TOKENS, 1, WIDTH)}
    later = measure_layer(cfg, 1, 0, sizes, arriving)
    assert later.reads == first.shared
    assert later.shared == {}  # the difference to it is kept, not the tensor


def test_a_plan_is_of_the_backend_that_is_chosen() -> None:
    given = ("--config", "cdrmix-test", "--vocab-size", "500", "--layer-schedule", "rwkv", "--ffn", "dense")
    given = (*given, "--rwkv-head-size", "32", "--train-iters", "1")
    kept = {}
    for backend in ("auto", "torch", "fla", "native16"):
        config = parse_config([*given, "--wkv-backend", backend, "--device", "cuda"]).config
        kept[backend] = part_cost(model_parts(config.model, torch.float32), layout_of(config, 1), 0, 0).kept
    assert kept["torch"] != kept["auto"] == kept["fla"]
    # One state in place of four, of every 64 tokens and each head.
    layout = layout_of(config, 1)
    states = layout.tokens // 64 * config.model.hidden_size // 32
    assert kept["native16"] - kept["auto"] == states * 3 * 32 * 32 * WIDE


def test_attention_shares_its_rotary_tables_with_later_layers() -> None:
    cfg = small("--layer-schedule", "attention", "--ffn", "dense")
    cost = measure_layer(cfg, 0, 0, _sizes(PLAIN, "none", experts=False), {})
    assert sum(cost.shared.values()) == 2 * TOKENS * cfg.head_dim / 2 * WIDE
    assert cost.shared.items() <= cost.touched.items()


def test_ends() -> None:
    cfg, sizes = small(), _sizes(PLAIN, "none", experts=False)
    embedding, head = measure_end(cfg, sizes, last=False), measure_end(cfg, sizes, last=True)
    assert embedding.kept == TOKENS * 8
    # Logits of a chunk, twice, are what the head's passes need for a while.
    assert head.working > 2 * TOKENS * cfg.padded_vocab_size() * WIDE
    assert head.kept >= 2 * TOKENS * WIDTH * WIDE


def test_a_part_is_measured_once_for_layouts_that_agree_on_its_sizes() -> None:
    parts = model_parts(small(), torch.float32)
    same = [dataclasses.replace(PLAIN, ep=ep, zero=zero) for ep in (1, 2) for zero in (0, 1)]
    assert len({id(part_cost(parts, layout, 1, 0)) for layout in same}) == 1
    assert len({id(part_cost(parts, layout, 1, 1)) for layout in same}) == 2
