"""What Megatron-LM makes of values together, wherever they stand: on the line, in a file, in its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megaforge.config.megatron.growing_batches import count_samples
from megaforge.config.megatron.line import Line

_BALANCE = "--moe-router-load-balancing-type"
# Its entries ask for these; any one of a row.
_REQUIRED = (
    ("model.num_layers", "model.hybrid_layer_pattern"),
    ("model.hidden_size",),
    ("model.num_attention_heads",),
    ("data.seq_length",),
    ("model.max_position_embeddings",),
    ("training.micro_batch_size",),
    ("optimizer.lr",),
    ("training.train_iters", "length.train_samples", "length.train_epochs", "length.train_tokens"),
)
_LAYERS = ("model.ffn", "model.hybrid_layer_pattern")
_CONVENTIONS = (
    "as always here, and otherwise than in Megatron-LM: step k has the learning rate that it gives step k + 1; every "
    "token has the same weight in the loss, whatever its micro-batch; initial weights and order of the data follow "
    "--seed alone, at every layout (docs/from_megatron.md)"
)


def settle(line: Line, values: dict[str, Any], origins: dict[str, str]) -> None:
    """Fills in what follows from other values, in place; what is wrong goes to ``line.refused``."""
    _balance(line, values)
    if not line.as_there:
        return
    count_samples(values, origins)
    if "model.num_experts" in values and not any(_written(origins, key) for key in _LAYERS):
        values["model.ffn"], origins["model.ffn"] = "moe", "--num-experts, as in Megatron-LM"
    fused = values.get("model.add_bias_linear") and line.find("--no-bias-gelu-fusion") is None
    if values.get("model.activation") == "gelu" and not fused and not _written(origins, "model.activation"):
        values["model.activation"] = "gelu_exact"  # tanh is in the kernel that adds the bias
        origins["model.activation"] = "GELU without a fused bias, as in Megatron-LM"
    if values.get("model.activation") == "swiglu" and "model.ffn_hidden_size" not in values:
        # Two thirds of four times the width, in whole 64s.
        values["model.ffn_hidden_size"] = 64 * (8 * values.get("model.hidden_size", 0) // 3 // 64) or None
        origins["model.ffn_hidden_size"] = "--swiglu, as in Megatron-LM"
    for row in _REQUIRED:
        if not any(key in values for key in row):
            flags = " or ".join("--" + key.partition(".")[2].replace("_", "-") for key in row[:2])
            line.refused.append(f"{flags} is missing: there is no default, as in Megatron-LM")
    if values.get("checkpoint.save") and "checkpoint.save_interval" not in values:
        line.refused.append(f"--save {values['checkpoint.save']}: add --save-interval N, as in Megatron-LM")
    if values.get("data.mock_data"):  # does not heed these
        for key in filter(lambda key: not _written(origins, key), ("data.split", "data.split_order")):
            values.pop(key, None)
            origins[key] = "default"
    _vocabulary(line, values)
    line.notes.append(_CONVENTIONS)


def _vocabulary(line: Line, values: Mapping[str, Any]) -> None:
    """Rows of the embedding, which it counts otherwise."""
    size, multiple = line.find("--vocab-size"), line.find("--make-vocab-size-divisible-by")
    reads = ("NullTokenizer", "TikTokenizer")
    if size is not None and values.get("data.tokenizer_model") and values.get("data.tokenizer_type") not in reads:
        line.notes.append(
            f"{size.written}: the model has so many rows, whatever the tokenizer; Megatron-LM reads it with a "
            "NullTokenizer or TikTokenizer only"
        )
    if multiple is not None:
        line.notes.append(
            f"{multiple.written}: the embedding's rows are a multiple of this at every --tp, and those that fill up "
            "have no share in the softmax; in Megatron-LM a multiple of this times --tp, and they have"
        )


def _written(origins: Mapping[str, str], key: str) -> bool:
    return origins[key] != "default" and not origins[key].startswith("preset megatron")


def _balance(line: Line, values: Mapping[str, Any]) -> None:
    """Its ``aux_loss``, the default there, balances micro-batches: of one sequence, as ``seq_aux_loss`` does."""
    given = line.value(_BALANCE)
    silent = line.as_there and given is None and values.get("model.moe_aux_loss_coeff")
    size = values.get("training.micro_batch_size", 1)
    if (given == "aux_loss" or (silent and "model.num_experts" in values)) and size > 1:
        line.refused.append(
            f"{_BALANCE} aux_loss with --micro-batch-size {size}: balances each micro-batch, so that its size changes "
            f"the model; write {_BALANCE} seq_aux_loss, which balances each sequence, or --micro-batch-size 1"
        )
