"""A model card beside published weights: what the model is, what it was trained on and how, and the files' hashes.

It says what the checkpoint knows, and names what a publisher has to add; nothing in it is guessed. The form is Hugging
Face's (Mitchell et al., arXiv 1810.03993): Markdown below a head of YAML.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from megaforge.checkpoint.manifest import SUMS_FILE, sums_digest
from megaforge.checkpoint.sources import TensorSource
from megaforge.config.config import Config
from megaforge.config.schema import config_from_dict
from megaforge.durable import replacing
from megaforge.errors import UserError
from megaforge.models.parameter_count import count_parameters, total

CARD_FILE = "README.md"
_TO_ADD = ("license", "intended use", "limitations and risks", "who trained it")
_LIBRARY = {"hf": "transformers", "peft": "peft"}


def card_path(saved: Path) -> Path:
    """Where the card of ``saved`` lies: in a directory, or beside a file."""
    return saved / CARD_FILE if saved.is_dir() else saved.with_name(saved.name + ".md")


def write_card(source: TensorSource, saved: str | Path, target: str) -> Path | None:
    """Writes the card of ``saved``, which was made from ``source``.

    Args:
        target: whose format it is in: ``hf``, ``gguf`` ...

    Returns:
        The card; None: a file of its name was there, and stays.

    Raises:
        UserError: it cannot be written.
    """
    saved = Path(saved)
    path = card_path(saved)
    if path.exists():
        return None
    try:
        with replacing(path) as temporary:
            temporary.write_text(card(source, saved, target), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the model card cannot be written ({error.strerror})") from error
    return path


def card(source: TensorSource, saved: Path, target: str) -> str:
    """Its text."""
    meta = source.meta
    config = config_from_dict(meta["config"], source=str(source.path)) if "config" in meta else None
    head: dict[str, Any] = {"library_name": _LIBRARY.get(target, "megaforge"), "tags": ["megaforge", target]}
    if config is not None and config.model.quantize_weights:
        head["tags"].append(config.model.quantize_weights)
    sections = {
        "Model": [] if config is None else list(_model(config)),
        "Training": list(_training(meta, config)),
        "Data": list(_data(meta)),
        "Evaluation": list(_evaluation(source)),
        "Origin": list(_origin(source)),
    }
    lines = [f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n", f"# {saved.name}\n"]
    lines += [
        f"Weights of step {source.step} of a run of MegaForge, in the format `{target}`. This card says what the "
        f"checkpoint knows. To be added by who publishes it: {', '.join(_TO_ADD)}.\n"
    ]
    for title, rows in sections.items():
        known = [f"| {name} | {value} |" for name, value in rows if value not in (None, "")]
        lines += [f"## {title}\n", "| | |\n|---|---|\n" + "\n".join(known) + "\n" if known else "Not known.\n"]
    lines += ["## Files\n", "| file | bytes | SHA-256 |\n|---|---:|---|"]
    lines += [f"| `{name}` | {size:,} | `{digest}` |" for name, size, digest in _files(saved)]
    return "\n".join(lines) + "\n"


def _model(config: Config) -> Iterator[tuple[str, Any]]:
    model, counted = config.model, total(count_parameters(config.model))
    yield "configuration", f"`{config.name}`"
    yield "parameters", f"{counted.stored:,}, of which a token uses {counted.active:,}"
    yield (
        "layers",
        f"{model.num_layers} of width {model.hidden_size}, pattern `{model.hybrid_layer_pattern or 'default'}`",
    )
    yield "vocabulary", f"{model.vocab_size:,}" if model.vocab_size else None
    yield "sequence length", f"{config.data.seq_length:,} tokens"
    yield "weights", f"{model.quantize_weights or 'full precision'}, as trained"
    yield "adapters", model.peft


def _training(meta: Mapping[str, Any], config: Config | None) -> Iterator[tuple[str, Any]]:
    data = meta.get("state", {}).get("data", {})
    yield "iterations", meta.get("iteration")
    yield "tokens", f"{data['consumed_tokens']:,}" if "consumed_tokens" in data else None
    if config is not None:
        yield "sequences a step", config.training.global_batch_size
        yield "optimizer", f"{config.optimizer.optimizer}, peak learning rate {config.optimizer.lr:g}"
        yield "seed", config.training.seed
        yield "started from", config.checkpoint.load if config.checkpoint.finetune else None


def _data(meta: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    data, tokenizer = meta.get("state", {}).get("data", {}), meta.get("tokenizer") or {}
    yield "order of samples", f"digest `{data['digest']}`" if "digest" in data else None
    for number, one in enumerate(data.get("sources", ())):
        corpus = f", corpus {json.dumps(one['corpus'])}" if one.get("corpus") else ""
        yield f"dataset {number + 1}", f"digest `{one.get('digest')}`{corpus}"
    if tokenizer:
        yield "tokenizer", f"{tokenizer['type']} of {tokenizer['vocab_size']:,} ids, `{tokenizer['fingerprint']}`"


def _evaluation(source: TensorSource) -> Iterator[tuple[str, Any]]:
    state = source.meta.get("state", {})
    best = state.get("callbacks.early_stopping", {})
    if best.get("best") is not None:
        yield (
            f"best {best['metric']} on validation data",
            f"{best['best']:.6g}, after iteration {best['best_iteration']}",
        )
    yield "score of this checkpoint", None if source.metric is None else f"{source.metric:.6g} (lower is better)"
    last = state.get("callbacks.phase6_output", {}).get("final_loss")
    yield "loss of the last step", None if last is None else f"{last:.6g}"


def _origin(source: TensorSource) -> Iterator[tuple[str, Any]]:
    yield "checkpoint", f"`{source.path.name}`"
    if (source.path / SUMS_FILE).is_file():
        yield f"SHA-256 of its `{SUMS_FILE}`", f"`{sums_digest(source.path)}`"
    yield "written by", f"MegaForge {source.meta.get('megaforge_version', 'of an unknown version')}"
    yield "imported from", json.dumps(source.meta["source"]) if "source" in source.meta else None


def _files(saved: Path) -> Iterator[tuple[str, int, str]]:
    folder = saved.is_dir()
    for path in sorted(saved.rglob("*")) if folder else [saved]:
        if path.is_file() and not path.name.startswith("."):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            yield str(path.relative_to(saved)) if folder else path.name, path.stat().st_size, digest
