"""A whole run made once more from its receipt, and its results compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megaforge.checkpoint.manifest import sums_digest
from megaforge.config.checkpoint_config import CheckpointConfig
from megaforge.config.config import Config
from megaforge.config.launcher import discover_launch, print_rank_0
from megaforge.config.run_config import LoggingConfig
from megaforge.config.schema import config_from_dict
from megaforge.data.sidecar import digest_of
from megaforge.errors import UserError
from megaforge.json_text import parse_json
from megaforge.monitor.provenance import code_version, environment, source_digest
from megaforge.parallel.context import ParallelContext
from megaforge.training.prepare import prepare
from megaforge.training.receipt import FORMAT, RECEIPT_FILE, VERSION
from megaforge.training.setup import build_trainer, initialize_distributed

_RESULTS = ("iteration", "loss", "grad_norm", "tokens", "evaluation")


def read_receipt(path: Path) -> dict[str, Any]:
    """The receipt in a file, or in a run's directory; its configuration is what was hashed.

    Raises:
        UserError: it cannot be read, or is not a receipt.
    """
    file = path / RECEIPT_FILE if path.is_dir() else path
    try:
        receipt = parse_json(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: the receipt cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{file}: this is not JSON ({error})") from error
    if not isinstance(receipt, dict) or receipt.get("format") != FORMAT or receipt.get("version") != VERSION:
        raise UserError(f"{file}: this is not a receipt of version {VERSION}; name RUN/{RECEIPT_FILE}")
    named = {"configuration", "code", "environment", "data", "layout", "results"} - receipt.keys()
    if named:
        raise UserError(f"{file}: the receipt lacks {', '.join(sorted(named))}")
    if digest_of(receipt["configuration"]["values"]) != receipt["configuration"]["digest"]:
        raise UserError(f"{file}: the configuration is not what its digest says: the receipt was altered")
    return receipt


def differences_of_machine(receipt: Mapping[str, Any]) -> list[str]:
    """What of code and environment is another here than it was then."""
    code, then = {**code_version(), "digest": source_digest()}, receipt["code"]
    found = [
        f"code: {name} was {then.get(name)}, and is {code[name]}"
        for name in ("commit", "dirty", "digest")
        if code[name] != then.get(name)
    ]
    now, was = environment(), receipt["environment"]
    found += [
        f"{name} was {was.get(name)}, and is {now[name]}" for name in ("python", "system") if now[name] != was.get(name)
    ]
    packages = was.get("packages", {})
    return found + [
        f"{name} was {packages.get(name)}, and is {now['packages'].get(name)}"
        for name in sorted(packages.keys() | now["packages"].keys())
        if packages.get(name) != now["packages"].get(name)
    ]


def reproduce(
    receipt: Mapping[str, Any],
    save: Path,
    context: Callable[[Config], ParallelContext] = initialize_distributed,
) -> int:
    """Makes the run again, on as many ranks as it had, into the new directory ``save``, and prints what is the same.

    Returns:
        1 where a result is not the same to the bit, else 0.

    Raises:
        UserError: it was stopped before it was complete, there are other ranks, or what it began with is not there.
    """
    _check(receipt, save)
    for one in differences_of_machine(receipt):
        print_rank_0(f"not as then: {one}")
    config = _again(config_from_dict(receipt["configuration"]["values"], "the receipt"), receipt, save)
    trainer = build_trainer(prepare(config), context(config))
    trainer.train()
    if not trainer.ctx.is_first_rank:
        return 0
    ours = read_receipt(save)
    lines = compare(receipt, ours)
    print("\n".join(f"{'the same' if same else 'NOT the same'}: {text}" for text, same in lines))
    return int(not all(same for _, same in lines))


def compare(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Each result, and whether it is the same in two receipts."""
    same_data = then["data"]["digest"] == now["data"]["digest"]
    lines = [("data and tokenizer", same_data)]
    was, found = then["results"], now["results"]
    for name in _RESULTS:
        text = f"{name} {found.get(name)!r}" + ("" if was.get(name) == found.get(name) else f", then {was.get(name)!r}")
        lines.append((text, was.get(name) == found.get(name)))
    one, other = was["checkpoint"], found["checkpoint"]
    if one["encrypted"] or other["encrypted"]:
        return lines  # each encryption draws its own keys
    apart = sorted(name for name in one["files"].keys() | other["files"].keys() if _of(one, name) != _of(other, name))
    text = f"all {len(one['files'])} files of {one['path']}" if not apart else f"{', '.join(apart)} of {one['path']}"
    return [*lines, (text, not apart)]


def _of(checkpoint: Mapping[str, Any], name: str) -> Any:
    return checkpoint["files"].get(name)


def _check(receipt: Mapping[str, Any], save: Path) -> None:
    if not receipt["results"].get("complete"):
        raise UserError("the receipt is of a run that was asked to end before it was complete; finish it first")
    if save.exists() and any(save.iterdir()):
        raise UserError(f"--save {save}: it is not empty; name a new directory")
    then, now = receipt["layout"]["world"], discover_launch().world_size
    if then != now:
        raise UserError(
            f"the run had {then} rank{'s' * (then > 1)}, and {now} {'were' if now > 1 else 'was'} started: start this "
            f"with torchrun --nproc-per-node {then} (all in all), as other sums differ in their last bits"
        )
    began = receipt["started_from"]
    if began is not None and began.get("path") is not None:
        path = _start(began)
        if not path.is_dir() or (began["sums"] is not None and sums_digest(path) != began["sums"]):
            raise UserError(f"{path}: the run began with this checkpoint, and it is not there, or is another one now")


def _start(began: Mapping[str, Any]) -> Path:
    return Path(began["directory"], began["path"])


def _again(config: Config, receipt: Mapping[str, Any], save: Path) -> Config:
    """``config`` of a run that writes into ``save`` alone, and ends where the other one did."""
    flags, began = config.checkpoint, receipt["started_from"]
    checkpoint = CheckpointConfig(
        save=str(save),
        load=None if began is None else str(_start(began)),
        finetune=began is not None and began["weights_only"],
        save_interval=flags.save_interval,
        keep_last=1,
        load_optim=flags.load_optim,
        load_rng=flags.load_rng,
        reset_data=flags.reset_data,
    )
    return dataclasses.replace(
        config,
        checkpoint=checkpoint,
        logging=LoggingConfig(log_interval=config.logging.log_interval),
        training=dataclasses.replace(config.training, exit_interval=0, exit_duration_in_mins=None),
        length=dataclasses.replace(config.length, exit_interval_epochs=None),
        resilience=dataclasses.replace(config.resilience, snapshot_interval=None, audit_trail=False),
    )
