"""Adapters in the files of Hugging Face's ``peft``: ``adapter_config.json`` and ``adapter_model.safetensors``.

Models of a published architecture (:data:`megaforge.registry.ARCHITECTURES`) have that one's names, so that ``peft``
puts the adapter beside the exported model; others have ours. ``megaforge_adapter.json`` beside them says which base
they belong to. They are made of a checkpoint, which is whole whatever layout wrote it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from megaforge.checkpoint.adapter_formats import LOW_RANK_FORMATS, LowRankFormat, Pair, as_one
from megaforge.checkpoint.architectures.base import Part, choose
from megaforge.checkpoint.four_bit_source import widened
from megaforge.checkpoint.hf_folder import publish_directory
from megaforge.checkpoint.safetensors_file import SafetensorsFile, Slot, file_order, write_safetensors
from megaforge.checkpoint.sources import TensorInfo, TensorSource, open_source
from megaforge.config.fields import either
from megaforge.config.launcher import print_rank_0
from megaforge.config.model_config import ModelConfig
from megaforge.config.schema import config_from_dict
from megaforge.errors import DamagedCheckpointError, UserError
from megaforge.json_text import parse_json
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.param_spec import Box, ParamSpec, named_specs
from megaforge.peft.lora import adapters
from megaforge.peft.merging import Delta
from megaforge.peft.targets import targets_of
from megaforge.registry import ARCHITECTURES

CONFIG_FILE, WEIGHTS_FILE, OWN_FILE = "adapter_config.json", "adapter_model.safetensors", "megaforge_adapter.json"
_PREFIX = "base_model.model."
_SAMPLES, _ELEMENTS = 8, 4096  # what a fingerprint looks at: tensors, and elements of each
_SHOWN = 5


class Place(NamedTuple):
    """A matrix that others know by a name of its own, as a part of a parameter of ours."""

    parameter: str
    box: Box
    transposed: bool

    @property
    def rows(self) -> tuple[int, int]:
        """Its output features among those of the parameter."""
        return self.box[-1 if self.transposed else -2]


class BaseModel:
    """What adapters are of: the model without any."""

    def __init__(self, cfg: ModelConfig) -> None:
        self.cfg = dataclasses.replace(cfg, peft=None)
        self._model = HybridModel(make_layer_context(self.cfg, ParallelContext.single("meta")))
        self.specs: dict[str, ParamSpec] = {spec.name: spec for spec, _ in named_specs(self._model)}
        self.fan_in_fan_out = False

    @cached_property
    def places(self) -> dict[str, Place]:
        """Every matrix that may have an adapter, by the name of the module that it is in elsewhere; where no published
        architecture is this model, by our own."""
        own = {}
        transposed = set()
        for target in targets_of(self._model):
            name, spec = f"{target.path}.weight", target.spec
            if target.layer.transposed:
                transposed.add(name)
            rows, columns = target.rows, (0, target.layer.in_features)
            box = (columns, rows) if target.layer.transposed else (rows, columns)
            for expert in range(spec.shape[0]) if spec.expert_dim is not None else (None,):
                of_expert: Box = () if expert is None else ((expert, expert + 1),)
                key = target.name if expert is None else f"{target.name}.{expert}"
                own[key] = Place(name, (*of_expert, *box), target.layer.transposed)
        theirs = self._published()
        if theirs is None:
            return own
        able = {place.parameter for place in own.values()}
        self.fan_in_fan_out = any(part.transposed and part.ours not in transposed for part in theirs)
        return {
            part.theirs.removesuffix(".weight"): Place(part.ours, part.box, part.ours in transposed)
            for part in theirs
            if part.ours in able and part.theirs.endswith(".weight")
        }

    def _published(self) -> list[Part] | None:
        try:
            kind = choose(self.cfg, "the model", "", [ARCHITECTURES.get(name) for name in ARCHITECTURES.names()])
        except UserError:
            return None
        return list(kind.parts(self.cfg, self.specs))


def fingerprint(source: TensorSource, specs: Mapping[str, ParamSpec]) -> str:
    """What tells a base from others: a hash of samples of its weights in fp32, the same in every form of checkpoint."""
    names = sorted(name for name, spec in specs.items() if spec.role != "state")
    digest = hashlib.sha256()
    for name in names[:: max(1, len(names) // _SAMPLES)]:
        if name not in source.tensors:
            raise UserError(f"--load {source.path}: the weight {name} is missing")
        shape = source.tensors[name].shape
        row = max(1, math.prod(shape[1:]))
        box = tuple((0, size) for size in shape)
        if shape and shape[0] * row > _ELEMENTS:
            box = ((0, max(1, min(shape[0], _ELEMENTS // row))), *box[1:])
        values = source.read(name, box).float().contiguous().view(-1)[:_ELEMENTS]
        digest.update(f"{name}{shape}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def model_config(source: TensorSource) -> ModelConfig:
    """The model that ``source`` is a checkpoint of.

    Raises:
        UserError: it does not say which.
    """
    if "config" not in source.meta:
        raise UserError(f"--load {source.path}: it does not say which model it is of")
    return config_from_dict(source.meta["config"], source=str(source.path)).model


def pairs_of(source: TensorSource, base: BaseModel, cfg: ModelConfig) -> Iterator[tuple[str, Pair]]:
    """The adapters that a checkpoint holds, by the names of :attr:`BaseModel.places`. Where several of ours stand
    beside one matrix there (q, k and v that are fused), they become one, of their ranks together."""
    model = HybridModel(make_layer_context(cfg, ParallelContext.single("meta")))
    held = {f"{path}.weight": (path, adapter) for path, _, adapter in adapters(model)}
    for name, place in base.places.items():
        if place.parameter not in held:
            continue
        path, adapter = held[place.parameter]
        expert = place.box[0][0] if len(place.box) == 3 else None
        start, stop = place.rows
        pairs = []
        for one in adapter.factors:
            low, high = max(start, one.start), min(stop, one.stop)
            if low >= high:
                continue
            read = (source.read(f"{path}.lora.{one.prefix}{letter}") for letter in adapter.letters)
            first, second, *values = (whole if expert is None else whole[expert] for whole in read)
            placed = second.new_zeros(stop - start, second.shape[1])
            placed[low - start : high - start] = second[low - one.start : high - one.start]
            pairs.append(Pair(first, placed, one.scale, values[0].view(-1) if values else None))
        if pairs:
            yield name, as_one(pairs)


def export_peft(source: TensorSource, directory: str | Path) -> int:
    """Writes the adapters of the checkpoint ``source``.

    Returns:
        How many matrices have one.

    Raises:
        UserError: it has none of this kind, or ``directory`` is not empty or cannot be written.
    """
    cfg = model_config(source)
    if not cfg.has_adapters:
        raise UserError(f"--to peft: {source.path} has no adapters of --peft lora")
    base = BaseModel(cfg)
    pairs = dict(pairs_of(source, base, cfg))
    steps = int(source.meta["config"].get("training", {}).get("train_iters", 0)) or 1
    written, said = _format_of(cfg).write(cfg, pairs, steps)
    tensors = {_PREFIX + name: tensor for name, tensor in written.items()}
    said["fan_in_fan_out"] = base.fan_in_fan_out
    write_folder(source, base, cfg, tensors, said, directory)
    return len(pairs)


def write_folder(
    source: TensorSource,
    base: BaseModel,
    cfg: ModelConfig,
    tensors: Mapping[str, Tensor],
    said: Mapping[str, Any],
    directory: str | Path,
) -> None:
    """Writes ``tensors`` and ``said``, the configuration, of the checkpoint ``source``, and which base they are of.

    Raises:
        UserError: ``directory`` is not empty or cannot be written.
    """
    own = {"base": _base_of(source, base, cfg), "step": source.step, "format": 1}

    def write(folder: Path) -> None:
        slots = sorted((Slot(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()), key=file_order)
        _ = write_safetensors(folder / WEIGHTS_FILE, slots, (tensors[s.name] for s in slots), {"format": "pt"})
        for file, content in ((CONFIG_FILE, said), (OWN_FILE, own)):
            (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    publish_directory(directory, write)


def _base_of(source: TensorSource, base: BaseModel, cfg: ModelConfig) -> str | None:
    """The fingerprint of the weights that adapters stand beside; codes were made of those of another checkpoint."""
    if not cfg.replaces_weights:
        return fingerprint(source, base.specs)
    trained_from = source.meta["config"].get("checkpoint", {}).get("pretrained_checkpoint")
    try:
        return None if trained_from is None else fingerprint(open_source(trained_from), base.specs)
    except (UserError, OSError):
        print_rank_0(f"--to peft: {trained_from}, which the codes are of, is gone: {OWN_FILE} names no base")
        return None


def _format_of(cfg: ModelConfig) -> LowRankFormat:
    method = cfg.peft_method
    assert method is not None
    return LOW_RANK_FORMATS[method.peft_type or "LORA"]


class Folder:
    """What an adapter's files have in common, ours and ``peft``'s.

    Attributes:
        path: the folder.
        flag: what named it, for messages.
        config: what ``adapter_config.json`` says.
        tensors: by their names, without what stands before all.
        base: the fingerprint of the model that it is of, or None.

    Raises:
        UserError: it is not such a folder.
    """

    def __init__(self, directory: str | Path, flag: str = "--adapter") -> None:
        self.path, self.flag = Path(directory), flag
        try:
            self.config = dict(parse_json((self.path / CONFIG_FILE).read_bytes()))
            file = SafetensorsFile(self.path / WEIGHTS_FILE)
            self.tensors = {slot.name.removeprefix(_PREFIX): file.tensor(slot.name) for slot in file.slots()}
            own = self.path / OWN_FILE
            self.base: str | None = dict(parse_json(own.read_bytes())).get("base") if own.is_file() else None
        except OSError as error:
            raise self.wrong(
                f"{error.filename and Path(error.filename).name} cannot be read ({error.strerror})"
            ) from error
        except (ValueError, TypeError, DamagedCheckpointError) as error:
            raise self.wrong(str(error)) from error

    def wrong(self, text: str) -> UserError:
        """An error about it."""
        return UserError(f"{self.flag} {self.path}: {text}")

    def check_base(self, source: TensorSource, base: BaseModel) -> None:
        """
        Raises:
            UserError: it was trained beside other weights.
        """
        if self.base is not None and (here := fingerprint(source, base.specs)) != self.base:
            raise self.wrong(
                f"it was trained beside other weights (base {self.base}) than those of {source.path} ({here})"
            )


class AdapterFolder(Folder):
    """The files of adapters beside matrices.

    Attributes:
        pairs: by the names of modules.

    Raises:
        UserError: it is not such a folder, is of another method, or its files do not belong together.
    """

    def __init__(self, directory: str | Path, flag: str = "--adapter") -> None:
        super().__init__(directory, flag)
        kind = self.config.get("peft_type")
        form = LOW_RANK_FORMATS.get(kind or "")
        if form is None:
            raise self.wrong(f"peft_type {kind!r}: only {either(LOW_RANK_FORMATS)} is read beside matrices")
        if self.config.get("use_dora") or self.config.get("bias", "none") != "none":
            raise self.wrong("use_dora and bias other than none are not read")
        try:
            self.pairs = form.read(self.config, self.tensors)
        except ValueError as error:
            raise self.wrong(f"{WEIGHTS_FILE}: {error}") from error

    def deltas(self, base: BaseModel) -> dict[str, list[Delta]]:
        """What it adds to the parameters of ``base``.

        Raises:
            UserError: a module or a shape is not that model's.
        """
        found: dict[str, list[Delta]] = defaultdict(list)
        unknown = sorted(self.pairs.keys() - base.places.keys())
        if unknown:
            there = ", ".join(list(base.places)[:_SHOWN])
            raise self.wrong(f"the model has no matrix {unknown[0]} ({len(unknown)} such); it has {there}, ...")
        for module, pair in self.pairs.items():
            place = base.places[module]
            sizes = [stop - start for start, stop in place.box[-2:]]
            shape = (pair.second.shape[0], pair.first.shape[1])
            if shape != (tuple(sizes[::-1]) if place.transposed else tuple(sizes)):
                raise self.wrong(f"{module} is {shape[0]} x {shape[1]} there, and {sizes[0]} x {sizes[1]} in the model")
            found[place.parameter].append(_delta(place, pair))
        return dict(found)


class MergedSource(TensorSource):
    """A checkpoint whose adapters, or those of a folder, are merged into its matrices; weights alone."""

    def __init__(self, source: TensorSource, adapter: str | None = None) -> None:
        """
        Raises:
            UserError: there is no adapter, or it is of another base.
        """
        cfg = model_config(source)
        if (cfg.peft is not None and not cfg.has_adapters) or (cfg.peft is None and adapter is None):
            raise UserError(f"--merge: {source.path} has no adapters of --peft lora; add --adapter DIR")
        if cfg.peft is not None and adapter is not None:
            raise UserError(f"--adapter {adapter}: {source.path} has adapters of its own; leave one out")
        base = BaseModel(cfg)
        self.path, self.step, self.metric, self.encrypted = source.path, source.step, source.metric, source.encrypted
        self._source = source = widened(source, cfg)
        if adapter is None:
            self._deltas = _own_deltas(source, base, cfg)
        else:
            folder = AdapterFolder(adapter)
            folder.check_base(source, base)
            self._deltas = folder.deltas(base)
        config = dict(source.meta["config"])
        config["model"] = {**config["model"], "peft": None}
        self.meta = {key: value for key, value in source.meta.items() if key != "state"} | {"config": config}
        self.tensors: dict[str, TensorInfo] = {name: source.tensors[name] for name in base.specs}

    def read(self, key: str, box: Box | None = None) -> Tensor:
        out = self._source.read(key, box)
        at = tuple((0, size) for size in self.tensors[key].shape) if box is None else box
        for delta in self._deltas.get(key, ()):
            out = delta.add(out, at)
        return out


def _own_deltas(source: TensorSource, base: BaseModel, cfg: ModelConfig) -> dict[str, list[Delta]]:
    found: dict[str, list[Delta]] = defaultdict(list)
    for name, pair in pairs_of(source, base, cfg):
        place = base.places[name]
        found[place.parameter].append(_delta(place, pair))
    return dict(found)


def _delta(place: Place, pair: Pair) -> Delta:
    return Delta(place.box, pair.inner, pair.second, pair.scale, place.transposed)
