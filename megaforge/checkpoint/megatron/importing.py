"""Megatron-LM's checkpoints as ours."""

from __future__ import annotations

import logging
from pathlib import Path

from megaforge.checkpoint.megatron.arguments import config_of
from megaforge.checkpoint.megatron.files import LATEST, MegatronFiles
from megaforge.checkpoint.megatron.mp_rank import MpRankFiles
from megaforge.checkpoint.megatron.names import parts
from megaforge.checkpoint.megatron.torch_dist import METADATA, TorchDistFiles
from megaforge.checkpoint.part_source import PartSource, check_parts
from megaforge.checkpoint.published_import import Import, describe_import, write_import
from megaforge.errors import UserError
from megaforge.models.parameter_count import declared_parameters

logger = logging.getLogger(__name__)


def iteration_of(directory: Path) -> Path:
    """The directory of one iteration: ``directory``, or the newest in it.

    Raises:
        UserError: there is none.
    """
    if (directory / METADATA).exists() or next(directory.glob("mp_rank_*"), None):
        return directory
    try:
        newest = (directory / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory}: not a checkpoint of Megatron-LM: it has no {LATEST}, {METADATA} or mp_rank_*"
        ) from error
    path = directory / (newest if newest == "release" else f"iter_{int(newest):07d}" if newest.isdecimal() else "")
    if path == directory or not path.is_dir():
        raise UserError(f"{directory}: its {LATEST} says {newest[:40]!r}, and there is no such iteration")
    return path


def open_megatron(directory: str | Path) -> MegatronFiles:
    """The tensors of a checkpoint of either form.

    Raises:
        UserError: it is none, damaged, incomplete, holds code, or does not say which model it is of.
    """
    path = iteration_of(Path(directory))
    return TorchDistFiles(path) if (path / METADATA).exists() else MpRankFiles(path)


def import_megatron(wanted: Import) -> Path:
    """Writes the weights of the directory ``wanted.path`` as a checkpoint of step 0, a tensor or an expert of it at a
    time. The optimizer's state stays behind.

    Raises:
        UserError: naming the directory and what is wrong with it.
    """
    source = open_source(wanted)
    path = write_import(wanted, config_of(source.files.args, str(source.path)), source)
    logger.warning(
        "weights of iteration %d: the optimizer's state stays behind, so a run from them starts with fresh moments",
        source.files.iteration,
    )
    return path


class MegatronSource(PartSource):
    """A checkpoint of Megatron-LM as tensors of ours."""

    files: MegatronFiles


def open_source(wanted: Import) -> MegatronSource:
    """The tensors of ``wanted.path`` as ours.

    Raises:
        UserError: naming the parts of its model that we lack, the tensors that are missing, or those that do not fit.
    """
    files = open_megatron(wanted.path)
    cfg = config_of(files.args, str(files.path))
    specs = declared_parameters(cfg)
    found = list(parts(cfg, specs, 1.0 if files.args.get("apply_layernorm_1p") else 0.0))
    tied = () if cfg.untie_embeddings_and_output_weights else ("output_layer.weight",)
    check_parts(found, {name: stored.info.shape for name, stored in files.tensors.items()}, str(files.path), tied)
    meta = describe_import(
        wanted, cfg, {"format": "megatron", "directory": wanted.path.name, "iteration": files.iteration}
    )
    source = MegatronSource(files.path, meta, specs, found, lambda part: files.read(part.theirs))
    source.files = files
    return source
