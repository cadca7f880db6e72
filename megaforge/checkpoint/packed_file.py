"""One safetensors file of a quantized model: packed codes and steps of its quantized matrices, and all else as it is
computed with. ``tools/generate.py`` and ``tools/evaluate.py`` read it at any layout.

Of a quantized parameter NAME the file has ``NAME.codes`` (uint8 [(experts,) rows, bytes], the lowest bits of a byte
first: binary 1 bit, a one is +1; ternary 2 bits, code + 1; int4 4 bits, two's complement; int8 a byte), ``NAME.step``
(fp32; what a code of 1 stands for: of each logical matrix, row or group) and with asymmetric levels ``NAME.zero`` (the
code of zero). The header's ``packed`` says of each, in JSON, its ``kind``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megaforge.checkpoint.convert import publish_file
from megaforge.checkpoint.hashed_file import FileRecord
from megaforge.checkpoint.safetensors_file import Slot
from megaforge.checkpoint.sources import FileSource, TensorSource
from megaforge.config.config import Config
from megaforge.config.schema import config_from_dict
from megaforge.errors import UserError
from megaforge.json_text import parse_json
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import compute_dtype, make_layer_context
from megaforge.parallel.param_spec import Box, ParamSpec, give_memory, named_specs, spec_of
from megaforge.quant.packed import PackedLinear, keep_codes, quantized_layers
from megaforge.quant.quantizers import WeightScheme
from megaforge.quant.whole_matrix import CodedMatrix, code_matrix, local_codes, pack_stack, unpack_stack


class QuantizedModel(NamedTuple):
    """A checkpoint's model, for export.

    Attributes:
        dtype: that it computes in.
        specs: of all its parameters, by name.
        schemes: of those that are quantized.
    """

    source: TensorSource
    config: Config
    dtype: torch.dtype
    specs: dict[str, ParamSpec]
    schemes: dict[str, WeightScheme]

    def dtype_of(self, name: str) -> torch.dtype:
        """In which the model computes with a parameter."""
        narrow = self.dtype in (torch.bfloat16, torch.float16)
        return torch.float32 if narrow and self.specs[name].keep_fp32 else self.dtype

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A parameter, or the part ``box`` of it, as the model computes with it."""
        if name not in self.source.tensors:
            raise UserError(f"--load {self.source.path}: the weight {name} is missing")
        return self.source.read(name, box).to(self.dtype_of(name))

    def coded(self, name: str) -> CodedMatrix:
        """A quantized parameter's codes."""
        clip = f"{name.rpartition('.')[0]}.ranges.clip"
        share = self.read(clip)[0] if clip in self.specs and self.config.model.quant_clip != "activations" else None
        return code_matrix(self.read(name), self.specs[name].parts, self.schemes[name], share)


def open_quantized(source: TensorSource) -> QuantizedModel:
    """The model that ``source`` is a checkpoint of.

    Raises:
        UserError: it does not say which, its quantization is still coming in (``--quant-lambda``, ``--quant-stages``),
            or a converter of one's own quantizes it in a way that files do not hold.
    """
    if "config" not in source.meta:
        raise UserError(f"--load {source.path}: it does not say which model it is of")
    config = config_from_dict(source.meta["config"], source=str(source.path))
    refuse_unfinished(source, config)
    if config.model.peft is not None:
        why = "add --merge" if config.model.has_adapters else "they merge into nothing, and no other format has them"
        raise UserError(f"--load {source.path}: it has adapters (--peft {config.model.peft}); {why}")
    model = HybridModel(make_layer_context(config.model, ParallelContext.single("meta")))
    schemes = {spec_of(layer.weight).name: op.weights for _, layer, op in quantized_layers(model) if op.weights}
    specs = {spec.name: spec for spec, _ in named_specs(model)}
    if own := next((name for name, spec in specs.items() if spec.quantized and name not in schemes), None):
        raise UserError(
            f"--load {source.path}: {own} is quantized by --converters {' '.join(config.model.converters)}, whose "
            "codes have no form in files; --quantize-weights has"
        )
    return QuantizedModel(source, config, compute_dtype(config.training), specs, schemes)


def refuse_unfinished(source: TensorSource, config: Config) -> None:
    """What reads a file quantizes by the last codes.

    Raises:
        UserError: the checkpoint's quantization is still coming in (``--quant-lambda``, ``--quant-stages``).
    """
    if "iteration" in source.meta and (why := config.qat.unfinished(int(source.meta["iteration"]))):
        raise UserError(
            f"--load {source.path}: after iteration {source.meta['iteration']} its quantization is not complete ({why})"
            ", and a file holds the last codes alone; train on, or give a later checkpoint"
        )


def write_packed(source: TensorSource, file: str | Path) -> tuple[FileRecord, int, int]:
    """Writes the model of the checkpoint ``source``.

    Returns:
        Length and hash of the file; the bytes of packed codes and steps in it, and how many weights they are of.

    Raises:
        UserError: no matrix of the model is quantized, ``file`` exists, or it cannot be written.
    """
    model = open_quantized(source)
    if not model.schemes:
        raise UserError(
            f"--load {source.path}: no matrix of its model is quantized (--quantize-weights); without --to, --save "
            "FILE has its weights as they are"
        )
    packed: dict[str, Tensor] = {}
    for name, scheme in model.schemes.items():
        matrix = model.coded(name)
        packed[f"{name}.codes"], packed[f"{name}.step"] = pack_stack(matrix.codes, scheme.kind), matrix.step
        if matrix.zero is not None:
            packed[f"{name}.zero"] = matrix.zero
    others = [name for name in model.specs if name not in model.schemes]

    def slot(name: str) -> Slot:
        return Slot(name, model.dtype_of(name), model.specs[name].shape)

    slots = [*map(slot, others), *(Slot(key, value.dtype, tuple(value.shape)) for key, value in packed.items())]
    kinds = json.dumps({name: {"kind": scheme.kind} for name, scheme in model.schemes.items()})
    meta = {key: value for key, value in source.meta.items() if key != "state"}
    meta["state"] = {"data": source.meta.get("state", {}).get("data", {})}  # what evaluations ask of the run's data
    texts = {"step": str(source.step), "metric": json.dumps(source.metric), "meta": json.dumps(meta), "packed": kinds}
    record = publish_file(file, slots, lambda key: packed[key] if key in packed else model.read(key), texts)
    weights = sum(model.specs[name].numel for name in model.schemes)
    return record, sum(value.numel() * value.element_size() for value in packed.values()), weights


class TrainedFile:
    """A file of weights, packed or as they are, to be loaded at any layout.

    Attributes:
        meta: what the checkpoint said that it was made from.

    Raises:
        UserError: there is no such file, or it does not say which model it is of.
    """

    def __init__(self, file: str | Path) -> None:
        self._source = FileSource(file, packed=True)
        self.path, self.meta, self.step = self._source.path, self._source.meta, self._source.step
        try:
            kinds = parse_json(self._source.metadata.get("packed", "{}"))
            self._kinds = {name: str(packed["kind"]) for name, packed in kinds.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--load {file}: its header does not say what is packed in it ({error!r})") from error

    @property
    def is_packed(self) -> bool:
        """Whether codes stand for some of the weights."""
        return bool(self._kinds)

    @torch.no_grad()
    def load(self, model: nn.Module, ctx: ParallelContext, *, kernels: bool) -> None:
        """Fills this rank's part of ``model``; its packed matrices keep codes alone. A model that was built without
        memory (:class:`megaforge.parallel.layer_context.LayerContext`) gets no more than it keeps.

        Raises:
            UserError: the file lacks a weight of the model, or has another shape.
        """
        layers = {spec_of(layer.weight).name: (layer, op) for _, layer, op in quantized_layers(model)}
        for spec, parameter in list(named_specs(model)):
            if spec.name in self._kinds:
                layer, op = layers[spec.name]
                codes, scale = self._local(spec, op.weights, ctx)
                place = ctx.device
                scale = type(scale)(*(None if one is None else one.to(place) for one in scale))
                keep_codes(layer, PackedLinear(op, codes.to(place), scale, dtype=parameter.dtype, kernels=kernels))
                continue
            self._check(spec.name, spec.shape)
            give_memory(parameter, ctx.device)
            for piece in spec.pieces(ctx):
                piece.local_view(parameter).copy_(self._source.read(spec.name, piece.global_box))

    def _local(self, spec: ParamSpec, scheme: WeightScheme | None, ctx: ParallelContext) -> tuple[Tensor, Any]:
        kind = self._kinds[spec.name]
        if scheme is None or scheme.kind != kind:
            raise UserError(f"--load {self.path}: {spec.name} is packed as {kind}, which is not what its model says")
        self._check(f"{spec.name}.codes", None)
        packed = self._source.read(f"{spec.name}.codes")
        zero = f"{spec.name}.zero"
        matrix = CodedMatrix(
            unpack_stack(packed, kind, spec.shape[-1]),
            self._source.read(f"{spec.name}.step"),
            self._source.read(zero) if zero in self._source.tensors else None,
        )
        return local_codes(matrix, spec, scheme, ctx)

    def _check(self, key: str, shape: tuple[int, ...] | None) -> None:
        if key not in self._source.tensors:
            raise UserError(f"--load {self.path}: the weight {key} is missing")
        found = self._source.tensors[key].shape
        if shape is not None and found != shape:
            raise UserError(f"--load {self.path}: {key} has the shape {found}, the model's is {shape}")
