"""What adapters begin with in a run that goes on with those of a folder of ``peft``'s files (``--peft-from``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megaforge.checkpoint.adapter_files import AdapterFolder, BaseModel
from megaforge.checkpoint.adapter_formats import Pair
from megaforge.config.model_config import ModelConfig
from megaforge.errors import UserError
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import Entry
from megaforge.parallel.layer_context import make_layer_context
from megaforge.parallel.param_spec import ParamSpec
from megaforge.peft.adalora import VALUES
from megaforge.peft.adapter import Factors
from megaforge.peft.lora import adapters


class _Place(NamedTuple):
    """Of an adapter of ours: the name of its parameters up to A and B, the ends of these names, the factors, and the
    names of the modules that have it in the folder, one for each expert."""

    prefix: str
    letters: tuple[str, ...]
    factors: Factors
    modules: tuple[str, ...]


def starting_values(folder: AdapterFolder, base: BaseModel, cfg: ModelConfig) -> dict[str, Tensor]:
    """The factors of the run's adapters, whole, by the names of its parameters. The folder's scale is in B, where the
    run has another.

    Raises:
        UserError: the run's adapters are not those of the folder, in places or ranks.
    """
    places, values = list(_places(base, cfg)), {}
    known = {module for place in places for module in place.modules}
    for missing, text in ((known - folder.pairs.keys(), "has none for"), (folder.pairs.keys() - known, "has one for")):
        if missing:
            raise UserError(
                f"--peft-from {folder.path}: it {text} {min(missing)} ({len(missing)} such), unlike this run; give the "
                "--peft-targets that it was trained with"
            )
    for place in places:
        pairs = [folder.pairs[module] for module in place.modules]
        _check(folder, place, pairs)
        for letter, each in _factors(pairs, place.letters).items():
            whole = torch.stack(each) if base.specs[_weight(place)].expert_dim is not None else each[0]
            values[place.prefix + letter] = whole * (pairs[0].scale / place.factors.scale) if letter == "B" else whole
    return values


def _factors(pairs: list[Pair], letters: tuple[str, ...]) -> dict[str, list[Tensor]]:
    """Those of each expert, by letter. What the run has no place for between A and B is in A; what it has and the
    folder has not is 1."""
    between = VALUES in letters
    found = {"A": [one.first if between else one.inner for one in pairs], "B": [one.second for one in pairs]}
    if between:
        ones = (one.first.new_ones(len(one.first)) if one.values is None else one.values for one in pairs)
        found[VALUES] = [values.view(-1, 1) for values in ones]
    return found


def _weight(place: _Place) -> str:
    return place.prefix.rpartition(".lora.")[0] + ".weight"


def _check(folder: AdapterFolder, place: _Place, pairs: list[Pair]) -> None:
    for module, (first, *_) in zip(place.modules, pairs, strict=True):
        if first.shape[0] != place.factors.rank:
            raise UserError(
                f"--peft-from {folder.path}: {module} has rank {first.shape[0]} there, {place.factors.rank} here; use "
                f"--lora-rank {first.shape[0]}, or --lora-rank-pattern for some"
            )


def _places(base: BaseModel, cfg: ModelConfig) -> Iterable[_Place]:
    model = HybridModel(make_layer_context(cfg, ParallelContext.single("meta")))
    by_rows: dict[tuple[str, tuple[int, int]], list[tuple[int, str]]] = {}
    for module, place in base.places.items():
        expert = place.box[0][0] if len(place.box) == 3 else 0
        by_rows.setdefault((place.parameter, place.rows), []).append((expert, module))
    for path, _, adapter in adapters(model):
        for one in adapter.factors:
            found = by_rows.get((f"{path}.weight", (one.start, one.stop)))
            if found is None:
                raise UserError(
                    f"--peft-from: files of this architecture have one adapter for what are several matrices of "
                    f"{path}; merge it (--adapter DIR --merge) and train another"
                )
            modules = tuple(module for _, module in sorted(found))
            yield _Place(f"{path}.lora.{one.prefix}", adapter.letters, one, modules)


@torch.no_grad()
def fill(entries: Iterable[Entry], values: Mapping[str, Tensor], ctx: ParallelContext) -> None:
    """Copies whole tensors into what this rank holds of them."""
    for name, declared, tensor in entries:
        if name in values and isinstance(declared, ParamSpec):
            for piece in declared.pieces(ctx):
                _copy(piece.local_view(tensor), values[name], piece.global_box)
        elif name in values and declared is not None:
            for part in declared.pieces(ctx):
                _copy(part.local_view(tensor), values[name], part.global_box)


def _copy(target: Tensor, whole: Tensor, box: tuple[tuple[int, int], ...]) -> None:
    target.copy_(whole[tuple(slice(start, stop) for start, stop in box)])
