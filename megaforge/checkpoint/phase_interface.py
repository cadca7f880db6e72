"""The folders by which training phases hand a model on: compressed weights in, a trained model out.

In: ``compression_metadata.json`` and ``compressed_model.pt``. Out: ``trained_model.pt`` and ``phase5_metadata.json``.
The names of files and keys are the other phases' own.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import megaforge
from megaforge.checkpoint.checkpoint import save_checkpoint
from megaforge.checkpoint.compatible import describe_run
from megaforge.checkpoint.model_card import CARD_FILE, write_card
from megaforge.checkpoint.packed_file import refuse_unfinished
from megaforge.checkpoint.shards import TensorEntry
from megaforge.checkpoint.sources import TensorSource
from megaforge.checkpoint.stateful import state_prefixes
from megaforge.config.config import Config
from megaforge.config.schema import config_from_dict, suggestion
from megaforge.durable import replacing
from megaforge.errors import UserError
from megaforge.json_text import parse_json
from megaforge.models.parameter_count import declared_parameters
from megaforge.parallel.context import ParallelContext

COMPRESSED, COMPRESSION = "compressed_model.pt", "compression_metadata.json"
TRAINED, FINISHED = "trained_model.pt", "phase5_metadata.json"
METHOD, WIDTH = "bitnet", 1
STATE = "phase6_output"  # what a run that writes the output keeps in its checkpoints
_WRAPPERS = ("model_state_dict", "state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


class Compliance(NamedTuple):
    """What the report of a run came to: its score, and whether it passed what was asked for."""

    score: float
    passed: bool


def load_phase4_models(phase4_dir: str | Path) -> dict[str, Any]:
    """What phase 4 left in a folder. Nothing of the files is executed.

    Returns:
        ``metadata`` (the JSON), ``weights`` (tensors by name, on the CPU) and ``compression_stats`` (the metadata's
        ``stats``, or nothing).

    Raises:
        UserError: a file is missing or damaged, or the weights were compressed otherwise than to 1 bit by BitNet.
    """
    folder = Path(phase4_dir)
    metadata = _read_json(folder / COMPRESSION)
    method, width = metadata.get("compression_method"), metadata.get("bit_width")
    if method != METHOD or type(width) is not int or width != WIDTH:
        raise UserError(
            f"{folder / COMPRESSION}: compression_method is {method!r} and bit_width {width!r}; this phase takes "
            f"{METHOD!r} and {WIDTH}"
        )
    stats = metadata.get("stats", {})
    return {"metadata": metadata, "weights": _read_tensors(folder / COMPRESSED), "compression_stats": stats}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: it cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{file}: this is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: it holds no object of keys and values")
    return content


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{file}: it cannot be read ({error.strerror})") from error
    except Exception as error:  # a damaged or foreign file makes torch raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file}: not a file of tensors that torch can read safely ({reason})") from error
    while isinstance(content, dict) and (inner := next((key for key in _WRAPPERS if key in content), None)):
        content = content[inner]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{file}: holds something else than named tensors")
    return {_bare(str(name)): value for name, value in content.items()}


def _bare(name: str) -> str:
    while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name


def import_phase4(
    phase4_dir: str | Path, directory: str | Path, config: Config, tokenizer: Mapping[str, Any] | None = None
) -> Path:
    """Writes phase 4's weights as a checkpoint of step 0 below ``directory``: a run starts from them by ``--load`` and
    ``--finetune``. Values are kept, as fp32 (fp64 where they come as such); of the vocabulary, rows of zeros are added
    up to the padding.

    Args:
        config: of the model that the weights are of; their names are its global names.
        tokenizer: its identity, as a checkpoint records it.

    Raises:
        UserError: naming the tensor that the model has not, lacks, or has in another shape.
    """
    phase4 = load_phase4_models(phase4_dir)
    file, weights, specs = Path(phase4_dir) / COMPRESSED, phase4["weights"], declared_parameters(config.model)
    if unknown := next((name for name in weights if name not in specs), None):
        raise UserError(f"{file}: the model has no parameter {unknown}" + suggestion(unknown, specs))
    if missing := [name for name in specs if name not in weights]:
        raise UserError(f"{file}: {len(missing)} weights of the model are missing, the first is {missing[0]}")
    entries = []
    for name, spec in specs.items():
        value = weights[name].to(torch.float64 if weights[name].dtype == torch.float64 else torch.float32)
        rows = spec.shape[0] - value.shape[0] if value.dim() == len(spec.shape) else 0
        if name in ("embedding.weight", "head.weight") and value.shape[0] == config.model.vocab_size and rows > 0:
            value = torch.cat([value, value.new_zeros(rows, *value.shape[1:])])
        if tuple(value.shape) != spec.shape:
            raise UserError(f"{file}: {name} has the shape {tuple(value.shape)}, the model's is {spec.shape}")
        entries.append(TensorEntry(name, spec, value.contiguous()))
    meta = describe_run(config, tokenizer) | {
        "megaforge_version": megaforge.__version__,
        "source": {"format": "phase4", "file": COMPRESSED, "metadata": phase4["metadata"]},
    }
    return save_checkpoint(directory, 0, entries, meta, ParallelContext.single())


def prepare_phase6_output(
    model: nn.Module | Mapping[str, Tensor],
    training_results: Mapping[str, Any],
    output_dir: str | Path,
    *,
    bitnet_optimized: bool = True,
    compliance: Compliance | None = None,
) -> Path:
    """Writes the folder that phase 6 reads: ``trained_model.pt``, which torch loads with ``weights_only``, and
    ``phase5_metadata.json``.

    Args:
        model: a module, or whole tensors by name.
        training_results: goes into the file; of it ``final_loss`` and ``training_time`` (seconds) into the metadata,
            null where they are unknown.
        bitnet_optimized: whether matrices of the model are quantized.
        compliance: what the report of the run came to: ``nasa_compliant`` and ``nasa_compliance_score``; None: nobody
            measured it, which is false and null.

    Returns:
        The folder.

    Raises:
        UserError: it cannot be written.
    """
    folder = Path(output_dir)
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    state = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    seconds = training_results.get("training_time")
    trained = {
        "model_state_dict": state,
        "training_results": dict(training_results),
        "phase5_complete": True,
        "bitnet_optimized": bitnet_optimized,
        "nasa_compliant": compliance is not None and compliance.passed,
    }
    metadata = {
        "training_completion_time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "final_loss": training_results.get("final_loss"),
        "training_duration_hours": None if seconds is None else seconds / 3600,
        "nasa_compliance_score": None if compliance is None else round(compliance.score, 6),
        "ready_for_phase6": True,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / TRAINED) as temporary:
            torch.save(trained, temporary)
        with replacing(folder / FINISHED) as temporary:
            temporary.write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: it cannot be written ({error.strerror})") from error
    return folder


def export_phase6(source: TensorSource, output_dir: str | Path, compliance: Compliance | None = None) -> Path:
    """:func:`prepare_phase6_output` of a checkpoint, whatever layout wrote it: its weights in full precision by their
    global names, and what its run knew of itself; a model card beside them.

    Raises:
        UserError: its quantization is still coming in, or the folder cannot be written.
    """
    if "config" in source.meta:
        refuse_unfinished(source, config_from_dict(source.meta["config"], source=str(source.path)))
    prefixes = state_prefixes(source.meta)
    weights = {key: source.read(key).clone() for key in source.tensors if not key.startswith(prefixes)}
    results = training_results(source.meta)
    quantized = _quantized(source.meta)
    folder = prepare_phase6_output(weights, results, output_dir, bitnet_optimized=quantized, compliance=compliance)
    try:
        (folder / CARD_FILE).unlink(missing_ok=True)  # of an earlier output
    except OSError as error:
        raise UserError(f"{folder / CARD_FILE}: it cannot be replaced ({error.strerror})") from error
    if write_card(source, folder, "phase6") is None:
        raise UserError(f"{folder / CARD_FILE}: another has written it just now")
    return folder


def training_results(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's ``meta`` says of its run; ``final_loss`` and ``training_time`` (seconds) where the run kept
    them (``--phase6-output``)."""
    kept = meta.get("state", {}).get(f"callbacks.{STATE}", {})
    results = {"iterations": meta.get("iteration"), **kept}
    return {name: value for name, value in results.items() if value is not None}


def _quantized(meta: Mapping[str, Any]) -> bool:
    model = meta.get("config", {}).get("model", {})
    return bool(model.get("quantize_weights") or model.get("converters"))
