"""Tokens per second of a whole training step against Hugging Face transformers' Llama of the same shape, on the CPU.

A dense attention model of 34M parameters (d 512, 8 layers, 8 heads, SwiGLU 1408, vocabulary 8,192, untied head)
on 4 x 512 tokens: forward, backward, gradient clipping, AdamW. Ours goes through the real model, gradient reducer,
clip and optimizer. Both sides are checked first to compute the same loss from the same weights.

Cases:
    fp32            ours as the trainer runs it (faster matmuls after a self-check that they are exact) against
                    Llama in fp32 as it comes. Goal 1.7.
    fp32_same_matmul  the same, with the same matmul precision given to both.
    bf16            ours with bf16 weights and fp32 masters against Llama under bf16 autocast. Goal 1.2.
    fp32_compiled, bf16_compiled  ours against Llama under torch.compile at the same matmul precision. Goals 1.12, 1.4.
    fp32_products, bf16_products  ours against the matrix products of its layers and head alone, forward and backward,
                    as torch computes them: the share of a step's time that they take. Goal 1/1.3.

    python tests/bench/bench_train_step.py [--rounds 7] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megaforge.config.model_config import ModelConfig
from megaforge.config.optimizer_config import OptimizerConfig
from megaforge.models.hybrid import HybridModel
from megaforge.optim import Optimizer
from megaforge.optim.clip import clip_gradients
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.data_parallel import GradientReducer
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from megaforge.training.numerics import choose_matmul_precision, matmul_error
from tests.bench.harness import interleaved_ratio, print_json, print_table

BATCH, LENGTH, VOCAB, HIDDEN, LAYERS, HEADS, INNER = 4, 512, 8192, 512, 8, 8, 1408
LEARNING_RATE = 1e-4
CASES = ("fp32", "fp32_same_matmul", "bf16", "fp32_compiled", "bf16_compiled", "fp32_products", "bf16_products")
Step = Callable[[], float]


def our_config() -> ModelConfig:
    return ModelConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=INNER,
        num_attention_heads=HEADS,
        layer_schedule="attention",
        ffn="dense",
        activation="swiglu",
        vocab_size=VOCAB,
        untie_embeddings_and_output_weights=True,
    )


def our_step(dtype: torch.dtype, tokens: torch.Tensor) -> tuple[Step, HybridModel]:
    """A function that trains one step and returns the loss before it, and the model."""
    ctx = ParallelContext.single()
    model = HybridModel(make_layer_context(our_config(), ctx, dtype=dtype))
    initialize_parameters(model, ctx, seed=0)
    reducer = GradientReducer(model, ctx)
    optimizer = Optimizer(OptimizerConfig(lr=LEARNING_RATE), model, ctx)
    mask = torch.ones(BATCH, LENGTH)

    def step() -> float:
        reducer.zero_grad()
        reducer.set_last_microbatch(True)
        output, _ = model.run_stage(tokens[:, :-1], tokens[:, 1:], mask, turns_back=True)
        loss = output.loss_sum / mask.numel()
        loss.backward()
        reducer.finish_grad_sync()
        clip_gradients(model, ctx, 1.0)
        optimizer.step(LEARNING_RATE)
        return float(loss.detach())

    return step, model


def products_step(dtype: torch.dtype) -> Step:
    """The products of a step with matrices, of attention's projections, FFNs and the head: output, input gradient and
    weight gradient of each."""
    shapes = [(3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER)] * LAYERS + [(VOCAB, HIDDEN)]
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    widths = {width for shape in shapes for width in shape}
    rows = {width: torch.randn(BATCH * LENGTH, width, dtype=dtype) for width in widths}

    def step() -> float:
        for weight in weights:
            out, inside = rows[weight.shape[0]], rows[weight.shape[1]]
            torch.mm(inside, weight.t())
            torch.mm(out, weight)
            torch.mm(out.t(), inside)
        return 0.0

    return step


def peer_step(autocast: bool, tokens: torch.Tensor, weights_of: HybridModel, *, compiled: bool = False) -> Step:
    """Hugging Face's Llama with the weights of ``weights_of``: its own loss, clip_grad_norm_ and fused AdamW."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=VOCAB,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
    )
    model = LlamaForCausalLM(config)
    copy_into_llama(weights_of, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    forward = torch.compile(model) if compiled else model

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = forward(input_ids=inputs, labels=labels, shift_labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


@torch.no_grad()
def copy_into_llama(ours: HybridModel, llama: torch.nn.Module) -> None:
    weights = {p.spec.name: p for p in ours.parameters()}  # type: ignore[attr-defined]
    theirs = dict(llama.named_parameters())
    theirs["model.embed_tokens.weight"].copy_(weights["embedding.weight"])
    theirs["model.norm.weight"].copy_(weights["final_norm.weight"])
    theirs["lm_head.weight"].copy_(weights["head.weight"])
    for layer in range(LAYERS):
        us, them = f"layers.{layer}", f"model.layers.{layer}"
        query, key, value = weights[f"{us}.mixer.qkv.weight"].split(HIDDEN)
        gate, up = weights[f"{us}.ffn.up.weight"].split(INNER)
        for name, value_of in (
            ("input_layernorm", weights[f"{us}.mixer_norm.weight"]),
            ("post_attention_layernorm", weights[f"{us}.ffn_norm.weight"]),
            ("self_attn.q_proj", query),
            ("self_attn.k_proj", key),
            ("self_attn.v_proj", value),
            ("self_attn.o_proj", weights[f"{us}.mixer.output.weight"]),
            ("mlp.gate_proj", gate),
            ("mlp.up_proj", up),
            ("mlp.down_proj", weights[f"{us}.ffn.down.weight"]),
        ):
            theirs[f"{them}.{name}.weight"].copy_(value_of)


def rate(step: Step, precision: str, clock: Callable[[], float]) -> Callable[[], float]:
    """A measure: tokens per second of ``clock`` of one step at torch's matmul ``precision``."""

    def measure() -> float:
        torch.set_float32_matmul_precision(precision)
        start = clock()
        step()
        return BATCH * LENGTH / (clock() - start)

    return measure


def check_same_model(ours: Step, peer: Step, tolerance: float) -> None:
    """The first two losses agree: the same function, gradient, clip and update."""
    for _ in range(2):
        mine, other = ours(), peer()
        if abs(mine - other) > tolerance * other:
            raise SystemExit(f"the two models differ: loss {mine} against {other}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="measured pairs of steps a case")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads")
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="count CPU time, for a machine that others use too; with --threads 1"
    )
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES, help="which cases (all)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    chosen = choose_matmul_precision("auto")
    print(
        f"{torch.get_num_threads()} threads; fp32 matmuls at '{chosen}': error {matmul_error(chosen):.1e} against fp64"
    )
    clock = time.process_time if arguments.cpu_seconds else time.perf_counter
    rows: list[list[object]] = []
    cases = {}
    fp32, bf16 = torch.float32, torch.bfloat16
    for name, dtype, theirs_at, goal, peer_name in (
        ("fp32", fp32, "highest", 1.7, "transformers Llama, fp32 as it comes"),
        ("fp32_same_matmul", fp32, chosen, None, f"transformers Llama, fp32 at '{chosen}'"),
        ("bf16", bf16, chosen, 1.2, f"transformers Llama, bf16 autocast, '{chosen}'"),
        ("fp32_compiled", fp32, chosen, 1.12, f"transformers Llama, torch.compile, fp32 at '{chosen}'"),
        ("bf16_compiled", bf16, chosen, 1.4, f"transformers Llama, torch.compile, bf16 autocast, '{chosen}'"),
        ("fp32_products", fp32, chosen, 1 / 1.3, f"its matrix products alone, fp32 at '{chosen}'"),
        ("bf16_products", bf16, chosen, 1 / 1.3, "its matrix products alone, bf16"),
    ):
        if name not in arguments.cases:
            continue
        torch.set_float32_matmul_precision(chosen)
        ours, model = our_step(dtype, tokens)
        if name.endswith("products"):
            peer = products_step(dtype)
        else:
            peer = peer_step(dtype == bf16, tokens, model, compiled=name.endswith("compiled"))
            check_same_model(ours, peer, 1e-2 if dtype == bf16 else 1e-5)
        result = interleaved_ratio(rate(ours, chosen, clock), rate(peer, theirs_at, clock), arguments.rounds)
        rows.append([name, result.candidate, result.peer, result.median, result.min, result.max, goal or "-"])
        cases[name] = result.case(peer_name)
    print_table("training step, tokens/s", ["case", "ours", "peer", "ratio", "min", "max", "goal"], rows)
    print_json("train_step", cases)


if __name__ == "__main__":
    main()
