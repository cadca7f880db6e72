"""Small models of published architectures, trained here for two steps."""

from __future__ import annotations

from pathlib import Path

from tests.training.tiny import arguments, make_trainer, write_dataset

_WHOLE = ("--no-reset-at-document-boundaries", "--activation", "swiglu", "--num-query-groups", "2")
_MOE = (*_WHOLE, "--moe-router-load-balancing-type", "none", "--moe-z-loss-coeff", "0")
_UNTIED = "--untie-embeddings-and-output-weights"
_RWKV = ("--normalization", "layernorm", "--norm-epsilon", "1e-5", _UNTIED, "--hidden-size", "64")
_GPT2 = (
    *("--no-reset-at-document-boundaries", "--normalization", "layernorm", "--activation", "gelu", "--add-bias-linear"),
    *("--position-embedding-type", "learned_absolute", "--max-position-embeddings", "24"),
)
MODELS = {  # pattern and flags
    "llama": ("*-*-", (*_WHOLE, _UNTIED, "--use-rope-scaling", "--rope-scaling-factor", "4")),
    "mistral": ("*-", (*_WHOLE, "--rotary-seq-len-interpolation-factor", "2", "--norm-epsilon", "1e-5")),
    "qwen2": ("*-", (*_WHOLE, "--add-qkv-bias")),
    "qwen3": ("*-", (*_WHOLE, "--qk-layernorm", "--kv-channels", "16")),
    "gpt2": ("*-*-", _GPT2),
    "mixtral": ("*E*E", (*_MOE, _UNTIED)),
    "qwen3_moe": ("*E", (*_MOE, "--qk-layernorm", "--moe-router-pre-softmax")),
    "rwkv7": ("R-R-", (*_RWKV, "--rwkv-head-size", "64")),
}


def flags(kind: str, folder: Path, *more: str) -> list[str]:
    """A command line that trains the model ``kind`` on data in ``folder``."""
    pattern, own = MODELS[kind]
    given = arguments(str(folder / "train_text_document"), "--hybrid-layer-pattern", pattern, *own, *more)
    if "E" in pattern:
        return given
    start = given.index("--num-experts")
    return given[:start] + given[start + 4 :]


def train(kind: str, folder: Path) -> Path:
    """Its run's directory."""
    write_dataset(folder / "train_text_document")
    run = folder / "run"
    make_trainer(flags(kind, folder, "--train-iters", "2", "--save", str(run))).train()
    return run
