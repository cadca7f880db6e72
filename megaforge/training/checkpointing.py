"""A run's state as checkpoints hold it: what is saved, and how a run goes on from it."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megaforge
from megaforge.checkpoint import anchors
from megaforge.checkpoint.adapter_files import BaseModel
from megaforge.checkpoint.adapter_start import fill
from megaforge.checkpoint.background import BackgroundSave
from megaforge.checkpoint.checkpoint import Snapshot, load_checkpoint, read_meta, save_snapshot, take_snapshot
from megaforge.checkpoint.compatible import check_compatible, describe_run
from megaforge.checkpoint.directory import Retention, list_steps
from megaforge.checkpoint.encryption import Key, read_key
from megaforge.checkpoint.find import find_checkpoint, holds_no_checkpoint, holds_other_program
from megaforge.checkpoint.manifest import read_manifest
from megaforge.checkpoint.peft_files import beginning, open_folder
from megaforge.checkpoint.sources import open_source
from megaforge.checkpoint.stateful import Stateful, tensors_of
from megaforge.config.checkpoint_config import CheckpointConfig
from megaforge.config.launcher import print_rank_0
from megaforge.data.tokenizer import Tokenizer
from megaforge.device import get_random_state, set_random_state
from megaforge.errors import UserError, require
from megaforge.parallel.agree import exchange, from_first_rank, together
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.flat_shard import Entry
from megaforge.peft.qlora import code_base
from megaforge.resilience.snapshots import SnapshotStore
from megaforge.training.callbacks import LARGER_IS_BETTER, Callback
from megaforge.training.continuing import changed_settings, check_update_rule, settle_schedule
from megaforge.training.lengths import in_iterations

if TYPE_CHECKING:
    from megaforge.training.trainer import Trainer


def tokenizer_identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a checkpoint keeps of the tokenizer: enough to refuse another one, and where this one was."""
    model = tokenizer.model_path
    return {
        "type": tokenizer.type,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "eod_token": tokenizer.eod_token,
        "model": ",".join(os.path.abspath(part) if os.path.exists(part) else part for part in model.split(",")),
    }


def save_run(trainer: Trainer) -> Path:
    """Writes everything that continuing ``trainer`` needs below ``--save``. Collective.

    Raises:
        UserError: on every rank, when any could not write; earlier checkpoints stay valid.
    """
    directory, snapshot = _run_snapshot(trainer)
    path = save_snapshot(snapshot, directory, trainer.ctx, goes_on_from=trainer.saved_iteration)
    trainer.saved_iteration = trainer.iteration
    return path


def start_save(trainer: Trainer, background: BackgroundSave) -> None:
    """:func:`save_run` as far as it needs what the next step changes; ``background`` does the rest. Collective."""
    directory, snapshot = _run_snapshot(trainer)
    keep = Retention.of(trainer.config.checkpoint)
    before = trainer.saved_iteration
    background.start(snapshot, directory, goes_on_from=before, keep=keep, replica=trainer.replica)


def _run_snapshot(trainer: Trainer) -> tuple[Path, Snapshot]:
    if trainer.config.checkpoint.save is None:
        raise UserError("--save is not set, so there is nowhere to write a checkpoint")
    return Path(trainer.config.checkpoint.save), run_snapshot(trainer)


def run_snapshot(trainer: Trainer) -> Snapshot:
    """Everything that continuing ``trainer`` needs, of this rank, in live memory. Collective."""
    parts = stateful_parts(trainer)
    return take_snapshot(
        trainer.iteration,
        [*trainer.optimizer.weight_entries(), *tensors_of(parts)],
        _run_meta(trainer, parts),
        trainer.ctx,
        get_random_state(trainer.ctx.device),
        metric=_score(trainer),
        chunks=len(trainer.model.chunks),
        key=trainer.key,
    )


def agreed_key(ctx: ParallelContext) -> Key:
    """The key of this process's environment, which has to be every rank's. Collective.

    Raises:
        UserError: on every rank: one has none, or another one, or no ``cryptography``.
    """

    def own() -> Key:
        require("cryptography", "encrypt", "--encrypt-checkpoints")
        try:
            return read_key()
        except UserError as error:
            raise UserError(f"--encrypt-checkpoints: {error}") from error

    key = together(ctx, own)
    if len(found := set(exchange(ctx, key.id))) > 1:
        raise UserError(f"--encrypt-checkpoints: the ranks have {len(found)} keys; give all of them the same one")
    return key


def _check_encrypted(path: Path, flags: CheckpointConfig) -> None:
    """
    Raises:
        UserError: the run goes on from an encrypted checkpoint and would leave plain ones.
    """
    if read_manifest(path).seal is not None and flags.save is not None and not flags.encrypt_checkpoints:
        raise UserError(
            f"{path} is encrypted, and --save {flags.save} would hold plain checkpoints: add --encrypt-checkpoints "
            "(tools/convert_checkpoint.py --plain makes a plain one of it)"
        )


def stateful_parts(trainer: Trainer) -> dict[str, Stateful]:
    """What a checkpoint of ``trainer`` keeps besides the weights, by name; a callback's is ``callbacks.STATE_NAME``.

    Raises:
        ValueError: two parts have one name.
    """

    def data_state() -> dict[str, Any]:
        consumed = trainer.consumed_samples
        counts = {"consumed_samples": consumed, "consumed_tokens": trainer.data.tokens_before(consumed)}
        return trainer.data.state(consumed) | counts

    def load_data_state(saved: dict[str, Any]) -> None:
        trainer.data.check_state(saved)
        trainer.consumed_samples = int(saved["consumed_samples"])

    optimizer, scaler, kept = trainer.optimizer, trainer.scaler, trainer.engine.filter
    parts = [
        ("data", Stateful(data_state, load_data_state)),
        ("optimizer", Stateful(lambda: optimizer_state(trainer), optimizer.load_state, optimizer.state_entries)),
        ("scaler", Stateful(scaler.state, scaler.load_state)),
        *([] if kept is None else [("gradient_filter", Stateful(kept.state, kept.load_state, kept.entries))]),
        *trainer.stateful.items(),
        *(_of_callback(callback) for callback in trainer.callbacks if callback.state_name is not None),
    ]
    for name, count in Counter(name for name, _ in parts).items():
        if count > 1:
            raise ValueError(f"{count} parts of the run want to be kept in checkpoints as {name!r}")
    return dict(parts)


def optimizer_state(trainer: Trainer) -> dict[str, Any]:
    """What checkpoints keep of the optimizer besides tensors. Collective: a rank knows the rules of its own stages, and
    one of its stages may have none."""
    state = trainer.optimizer.state()
    everywhere = exchange(trainer.ctx, state["states"])
    return state | {"states": sorted({name for own in everywhere for name in own})}


def _of_callback(callback: Callback) -> tuple[str, Stateful]:
    name = f"callbacks.{callback.state_name}"

    def tensors() -> Iterable[Entry]:
        return [(f"{name}.{key}", declared, tensor) for key, declared, tensor in callback.tensors()]

    return name, Stateful(callback.state, callback.load_state, tensors)


def _run_meta(trainer: Trainer, parts: dict[str, Stateful]) -> dict[str, Any]:
    """The JSON part of a checkpoint."""
    return describe_run(trainer.config, trainer.tokenizer) | {
        "megaforge_version": megaforge.__version__,
        "iteration": trainer.iteration,
        "schedule": trainer.schedule.digest,
        "global_batch_size": trainer.batches.size,
        "started_over": trainer.started_over,
        "earlier": dict(trainer.earlier),
        "state": {name: part.state() for name, part in parts.items()},
        **({} if trainer.audit is None else {anchors.KEY: trainer.audit.head}),
    }


def _score(trainer: Trainer) -> float | None:
    """What ``--keep-best`` ranks this checkpoint by, lower being better; None if this iteration was not evaluated."""
    evaluation = trainer.last_evaluation
    if evaluation is None or evaluation.iteration != trainer.iteration:
        return None
    metric = trainer.config.training.early_stopping_metric
    value = evaluation.values().get(metric)
    return -value if value is not None and metric in LARGER_IS_BETTER else value


def load_run(trainer: Trainer) -> Path | None:
    """Fills ``trainer`` from the newest valid checkpoint of ``--load``, or a snapshot in memory that is newer;
    ``--finetune``: from its weights only; from those of ``--pretrained-checkpoint`` where ``--load`` holds nothing
    yet. Collective.

    Returns:
        The checkpoint, or None where the run starts from the beginning: nothing is there, and nothing needs to be
        (:func:`_may_be_missing`).

    Raises:
        UserError: on every rank: no valid checkpoint, one of another model or tokenizer, or another order of data.
    """
    config, ctx, optimizer = trainer.config, trainer.ctx, trainer.optimizer
    flags, own = config.checkpoint, loads_own_checkpoints(config.checkpoint)
    if flags.load is None and flags.pretrained_checkpoint is None:
        raise UserError("--load is not set, so there is nothing to continue from")
    memory = trainer.snapshots if own and not flags.finetune else None
    newest = 0 if memory is None or flags.load is None else _newest_step(flags.load, ctx)
    path = None if memory is None else memory.find(newest)
    if flags.load is None or (path is None and _may_be_missing(flags, own) and _is_missing(flags.load, ctx)):
        return None if flags.pretrained_checkpoint is None else _load_pretrained(trainer, flags.pretrained_checkpoint)
    if flags.finetune:
        return _load_weights(trainer, flags.load, quarantine_damaged=own)
    path = path or _durable(flags.load, memory, newest, trainer, own)
    together(ctx, lambda: _check_encrypted(path, flags))
    meta = read_meta(path)
    check_compatible(meta, config, trainer.tokenizer, source=str(path))
    _check_is_run(meta, path)
    fresh = _start_over(trainer, meta, own)
    _go_to(trainer, meta, fresh)
    config = in_iterations(config, trainer.progress)
    settled = settle_schedule(config, meta, trainer.iteration, str(path), trainer.progress)
    trainer.config, trainer.schedule, notes = settled
    if "optimizer" not in fresh:
        check_update_rule(optimizer_state(trainer), meta, str(path))
    notes += changed_settings(trainer.config, trainer.batches.size, meta)
    notes += _load_parts(trainer, meta["state"], path, fresh)
    optimizer.after_load()
    for note in notes:
        print_rank_0(note)
    # What lies in --save beyond this iteration is of a past that this run went back behind.
    trainer.saved_iteration = min(newest, trainer.iteration) if in_memory(trainer, path) else trainer.iteration
    return path


def in_memory(trainer: Trainer, path: Path) -> bool:
    """Whether ``path`` is a snapshot, which is not there any more when the machine is off."""
    return trainer.snapshots is not None and path.parent == trainer.snapshots.folder


def _newest_step(directory: str, ctx: ParallelContext) -> int:
    """Of the checkpoints there, which nobody has read yet; 0 where there is none."""

    def newest() -> int:
        return max((step for step, _ in list_steps(Path(directory))), default=0) if os.path.isdir(directory) else 0

    return from_first_rank(ctx, newest)


def _durable(directory: str, memory: SnapshotStore | None, newest: int, trainer: Trainer, own: bool) -> Path:
    """The newest valid checkpoint; where that is not the ``newest`` one, which is damaged, a snapshot in ``memory`` if
    one is newer."""
    try:
        path = find_checkpoint(directory, trainer.ctx, quarantine_damaged=own, events=trainer.events)
    except UserError:
        snapshot = None if memory is None else memory.find(0)
        if snapshot is None:
            raise
        return snapshot
    step = together(trainer.ctx, lambda: read_manifest(path).step)
    snapshot = memory.find(step) if memory is not None and step < newest else None
    return snapshot or path


def _may_be_missing(flags: CheckpointConfig, own: bool) -> bool:
    """Whether a run may start although ``--load`` holds no checkpoint: where it continues itself (``own``), where there
    are other weights to start from, or where the user says so. One step of many, and weights to finetune, must be
    there."""
    if flags.ckpt_step is not None or (flags.finetune and flags.pretrained_checkpoint is None):
        return False
    return own or flags.pretrained_checkpoint is not None or not flags.exit_on_missing_checkpoint


def _is_missing(directory: str, ctx: ParallelContext) -> bool:
    """Whether there is nothing, neither of ours nor of another program, whose model a fresh start would ignore."""
    return holds_no_checkpoint(directory, ctx) and not holds_other_program(directory, ctx)


def _load_weights(trainer: Trainer, directory: str, *, quarantine_damaged: bool = False) -> Path:
    """The weights alone, for a new run."""
    path = find_checkpoint(directory, trainer.ctx, quarantine_damaged=quarantine_damaged, events=trainer.events)
    together(trainer.ctx, lambda: _check_encrypted(path, trainer.config.checkpoint))
    flags = dataclasses.replace(trainer.config.checkpoint, finetune=True)
    config = dataclasses.replace(trainer.config, checkpoint=flags)
    check_compatible(read_meta(path), config, trainer.tokenizer, source=str(path))
    saved = together(trainer.ctx, lambda: set(read_manifest(path).tensors))

    def load(entries: Iterable[Entry]) -> None:
        _ = load_checkpoint(path, entries, trainer.ctx, verify=False, allow_extra=("",), cast=True)

    load(_known_entries(trainer, saved))
    code_base(trainer.model, trainer.ctx, saved, load)
    trainer.optimizer.after_load()
    return path


def _load_pretrained(trainer: Trainer, directory: str) -> Path:
    try:
        path = _load_weights(trainer, directory)
        if trainer.config.model.peft_from is not None:
            _begin_with(trainer, trainer.config.model.peft_from, path)
        return path
    except UserError as error:
        raise UserError(str(error).replace("--load", "--pretrained-checkpoint", 1)) from error


def _begin_with(trainer: Trainer, directory: str, path: Path) -> None:
    """Fills the run's adapters from those of a folder, which has to be of the base ``path``. Collective."""
    ctx, model = trainer.ctx, trainer.config.model
    base = BaseModel(model)
    folder = together(ctx, lambda: open_folder(directory, "--peft-from"))
    from_first_rank(ctx, lambda: folder.check_base(open_source(path), base))
    values = together(ctx, lambda: beginning(folder, base, model))
    fill(trainer.optimizer.weight_entries(), values, ctx)
    trainer.optimizer.after_load()
    print_rank_0(f"--peft-from {directory}: the run goes on with its {len(values)} tensors")


def _known_entries(trainer: Trainer, saved: set[str]) -> list[Entry]:
    """The weights of a run that starts from those that are ``saved``; values that only training writes, and adapters,
    that are not kept there, as of a model that was not quantized, stay as they begin."""
    return [entry for entry in trainer.optimizer.weight_entries() if entry[0] in saved or not _begins_afresh(entry[1])]


def _begins_afresh(declared: Any) -> bool:
    """Whether a run may start from weights without it."""
    spec = getattr(declared, "spec", declared)
    return spec.role == "state" or spec.kind == "adapter"


def _go_to(trainer: Trainer, meta: dict[str, Any], fresh: list[str]) -> None:
    """Sets how far ``trainer`` is."""
    data = meta["state"]["data"]
    trainer.iteration, trainer.earlier = int(meta["iteration"]), Counter(meta["earlier"])
    if "data" in fresh:
        trainer.earlier += Counter(samples=data["consumed_samples"], tokens=data["consumed_tokens"])
    else:
        trainer.consumed_samples = int(data["consumed_samples"])


def _load_parts(trainer: Trainer, saved: dict[str, Any], path: Path, fresh: list[str]) -> list[str]:
    """Fills the weights, the parts of the run that the checkpoint knows, and this rank's random states, but for what
    starts ``fresh``; returns what to tell of parts that only the checkpoint knows."""
    parts = stateful_parts(trainer)
    without = [name for name in ("optimizer", "scaler", "gradient_filter") if "optimizer" in fresh] + ["data"] * (
        "data" in fresh
    )
    known = {name: part for name, part in parts.items() if name in saved and name not in without}
    for name, part in known.items():
        part.load_state(saved[name])
    device = trainer.ctx.device
    random_state = {name: state.clone() for name, state in get_random_state(device).items()}
    _ = load_checkpoint(
        path,
        [*trainer.optimizer.weight_entries(), *tensors_of(known)],
        trainer.ctx,
        None if "random states" in fresh else random_state,
        chunks=len(trainer.model.chunks),
        verify=False,
        allow_extra=tuple(f"{name}." for name in saved if name not in known),
        fetch=trainer.snapshots.fetch if trainer.snapshots is not None and in_memory(trainer, path) else None,
    )
    set_random_state(device, random_state)
    lost = ", ".join(name for name in saved if name not in parts)
    return [f"--load {path}: what it keeps as {lost} is not part of this run, which goes on without it"] if lost else []


def loads_own_checkpoints(config: CheckpointConfig) -> bool:
    """Whether ``--load`` is the very directory that ``--save`` names: the run continues itself, and starts where
    there is nothing yet."""
    if config.save is None or config.load is None:
        return False
    return os.path.realpath(config.load) == os.path.realpath(config.save)


def _check_is_run(meta: dict[str, Any], path: Path) -> None:
    missing = [key for key in ("iteration", "schedule", "state") if key not in meta]
    if missing:
        raise UserError(
            f"--load {path}: it holds weights but no training run to continue (no {', '.join(missing)}); "
            "add --finetune to start a new run from its weights"
        )


def _start_over(trainer: Trainer, meta: dict[str, Any], own: bool) -> list[str]:
    """What does not come from the checkpoint although the run goes on, by the flags; says so.

    A run that is started again by the same line has done so already: its ``own`` checkpoints record it.
    """
    flags = trainer.config.checkpoint
    asked = {
        "optimizer": ("--no-load-optim", not flags.load_optim, "moments and loss scale start afresh"),
        "random states": ("--no-load-rng", not flags.load_rng, "random states start from --seed"),
        "data": ("--reset-data", flags.reset_data, "the data are read from their beginning"),
    }
    done, now = list(meta.get("started_over", [])) if own else [], []
    for what, (flag, given, text) in asked.items():
        if given and what in done:
            print_rank_0(f"{flag}: this run has done so and goes on with its own; --load its step_N does it again")
        elif given:
            now.append(what)
            print_rank_0(f"{flag}: {text}; weights and iteration {meta['iteration']} are kept")
    trainer.started_over = [*done, *now]
    return now


def check_save_directory(config: CheckpointConfig) -> None:
    """Makes sure, before any work is done, that ``--save`` can be written and holds no other run's checkpoints: those
    of later iterations would be taken for this run's newest.

    Raises:
        UserError: it cannot, or it does.
    """
    if config.save is None:
        return
    directory = Path(config.save)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".writable_", dir=directory) as probe:
            probe.write(b"x")
    except OSError as error:
        raise UserError(f"--save {directory}: checkpoints cannot be written there ({error.strerror})") from error
    steps = list_steps(directory)
    loaded = None if config.load is None or config.finetune else Path(os.path.realpath(config.load))
    if steps and (loaded is None or Path(os.path.realpath(directory)) not in (loaded, loaded.parent)):
        how = ("leave out --finetune and use" if config.finetune else "add") + f" --load {directory}"
        raise UserError(
            f"--save {directory}: a run has left its checkpoints there (the newest is {steps[0][1].name}); "
            f"{how} to continue it, or name another directory"
        )
