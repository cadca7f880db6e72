"""Parameter counts against sums written out by hand, and the tool that prints them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megaforge.config.model_config import ModelConfig
from megaforge.models.parameter_count import count_parameters, total

ROOT = Path(__file__).resolve().parents[2]


def test_counts_of_a_hybrid() -> None:
    """h 2048 as in cdrmix-core-1b, one RWKV and one attention block of 8 experts."""
    h, f, experts, topk, vocab = 2048, 4608, 8, 2, 50304
    cfg = ModelConfig(
        hidden_size=h, ffn_hidden_size=f, num_attention_heads=16, hybrid_layer_pattern="RE*E", vocab_size=50272
    )
    counts = {c.component: c for c in count_parameters(cfg)}
    assert counts["embedding"].stored == vocab * h
    assert counts["attention"].stored == 4 * h * h
    assert counts["experts"].stored == 2 * 2 * experts * h * f
    assert counts["experts"].active == 2 * 2 * topk * h * f
    assert counts["routers"].stored == 2 * experts * h
    assert counts["norms"].stored == 5 * h
    # Four square matrices; LoRAs of rank 128 (w), 128 (a), 224 (g), none for v in layer 0; six mixes, w0, a0, k_k,
    # k_a, r_k, two of ln_x; the channel mix's x_k
    assert counts["RWKV-7 mixers, channel mixes"].stored == 4 * h * h + 2 * h * (128 + 128 + 224) + 13 * h + h
    whole = total(list(counts.values()))
    assert whole.stored == sum(c.stored for c in counts.values())
    assert whole.stored - whole.active == 2 * 2 * (experts - topk) * h * f


def test_untied_head_and_dense_ffn() -> None:
    cfg = ModelConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        hybrid_layer_pattern="*-",
        activation="swiglu",
        vocab_size=100,
        make_vocab_size_divisible_by=1,
        untie_embeddings_and_output_weights=True,
    )
    counts = {c.component: c.stored for c in count_parameters(cfg)}
    assert counts == {
        "embedding": 6400,
        "attention": 64 * (64 + 2 * 32) + 64 * 64,
        "dense FFN": 3 * 64 * 256,
        "norms": 3 * 64,
        "output head": 6400,
    }


def test_published_sizes() -> None:
    """GPT-3 175B and Mixtral 8x7B as Megatron-LM's own examples write them, and a model with both widths."""
    gpt3 = ModelConfig(
        hidden_size=12288,
        num_attention_heads=96,
        hybrid_layer_pattern="*-" * 96,
        activation="gelu",
        normalization="layernorm",
        add_bias_linear=True,
        position_embedding_type="learned_absolute",
        max_position_embeddings=2048,
        vocab_size=50257,
    )
    assert total(count_parameters(gpt3)).stored == 174_604_836_864
    both = ModelConfig(
        hidden_size=64,
        ffn_hidden_size=96,
        moe_ffn_hidden_size=32,
        num_experts=4,
        num_attention_heads=4,
        hybrid_layer_pattern="*-*E",
        vocab_size=128,
    )
    counts = {c.component: c.stored for c in count_parameters(both)}
    assert counts["dense FFN"] == 2 * 64 * 96 and counts["experts"] == 2 * 4 * 64 * 32


def test_plan_prints_the_table_and_names_mistakes() -> None:
    def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "tools/plan.py", *arguments], cwd=ROOT, capture_output=True, text=True)

    done = plan("params", "--config", "cdrmix-core-200b")
    assert done.returncode == 0, done.stderr
    assert "RERERE*E" in done.stdout and "stored" in done.stdout and "B active" in done.stdout
    drawn = plan("schedule", "--schedule", "zb-v", "--pp", "2")
    assert drawn.returncode == 0 and "bubble share" in drawn.stdout
    wrong = plan("parameters")
    assert wrong.returncode == 2 and "parameters: choose a command: params" in wrong.stderr
    without = plan("params", "--config", "cdrmix-test")
    assert without.returncode == 2 and "--vocab-size" in without.stderr
