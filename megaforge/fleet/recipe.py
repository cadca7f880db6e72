"""``fleet.yaml``: which models are trained, with which flags, and how many at once.

output: runs/fleet
mode: parallel
flags: {config: cdrmix-test, data_path: corpus/train_text_document, tokenizer_model: corpus/tok.json}
models:
  - {name: small, flags: {seed: 1}}
  - {name: sharded, ranks: 2, flags: {seed: 2, tp: 2}}
sweep: {lr: [1e-3, 3e-3]}
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megaforge.config.fields import flag
from megaforge.config.schema import settings
from megaforge.config.yaml_nodes import at, compose, mapping_of, read_dataclass
from megaforge.errors import UserError

MODES = ("series", "parallel")
LAUNCHERS = ("local", "slurm", "submitit-local")
SCRIPTS = ("pretrain_cdrmix.py", "finetune_cdrmix.py", "pretrain_gpt.py", "pretrain_hybrid.py")
MOST_WORKERS = 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_OWN_FLAGS = ("save", "load", "metrics_file", "print_config", "dry_run", "help")  # the fleet gives these, or none may


@dataclass(frozen=True)
class FleetSettings:
    """How the models of a fleet are run; all that has defaults has them from source 002 where it names them."""

    output: str | None = flag(None, "directory of the fleet; each model saves in a directory of its name there")
    mode: str = flag("series", "one model after the other, or several at once", choices=MODES)
    workers: int = flag(3, "models at once in parallel mode, if the machine has room", least=1, most=MOST_WORKERS)
    threads: int | None = flag(
        None, "threads of each rank; default: the CPUs, divided among the models that run at once", least=1, most=4096
    )
    memory_per_worker_gb: float = flag(
        8.0, "memory that a model needs, GB, until the first one has been measured", above=0, most=1e6
    )
    cpus_per_worker: float = flag(
        2.0, "CPUs for each model at once; 2: half as many models as CPUs", above=0, most=4096
    )
    high_load: float = flag(0.8, "share of the CPUs that others keep busy above which one model runs", above=0, most=1)
    min_free_memory_gb: float = flag(8.0, "free memory, GB, below which one model runs at a time", least=0, most=1e6)
    disk_gb_per_model: float = flag(1.0, "free disk that each model needs, GB", least=0, most=1e9)
    monitor_seconds: float = flag(5.0, "between looks at the machine", least=0.1, most=3600)
    log_seconds: float = flag(30.0, "between lines of progress", least=0.1, most=86400)
    stop_seconds: float = flag(120.0, "how long a model that is to end may save, before it is killed", least=1)
    retries: int = flag(1, "how often a model that failed is started again from its checkpoint", least=0, most=100)
    launcher: str = flag(
        "local", "processes of this machine, a SLURM job per model, or submitit's own processes", choices=LAUNCHERS
    )
    slurm_partition: str | None = flag(None, "SLURM's partition")
    slurm_minutes: int = flag(60, "time of each SLURM job, minutes", least=1, most=1 << 20)
    slurm_gpus: int = flag(0, "GPUs of each SLURM job", least=0, most=1024)
    slurm_cpus: int | None = flag(None, "CPUs of each SLURM job; default: its ranks times threads", least=1, most=4096)

    def validate(self) -> None:
        """Nothing here depends on anything else but for the launcher's flags.

        Raises:
            UserError: a SLURM setting without SLURM.
        """
        if self.launcher != "slurm" and (self.slurm_partition or self.slurm_gpus or self.slurm_cpus):
            raise UserError(f"--launcher {self.launcher}: slurm_ settings are for launcher slurm; leave them out")


@dataclass(frozen=True)
class ModelSettings:
    """One model of a fleet.

    Attributes:
        name: of its directory, its log and its row in tables.
        flags: its flags with their values, without those that the fleet gives.
        swept: the values of the sweep's flags, by flag.
        where: its place in the file, for messages.
    """

    name: str
    script: str
    ranks: int
    output: str | None
    flags: Mapping[str, tuple[str, ...]]
    swept: Mapping[str, str]
    where: str

    @property
    def words(self) -> list[str]:
        """Its command line, without the flags that the fleet gives."""
        return [word for name, values in self.flags.items() for word in words_of(name, values)]

    def directory(self, fleet_output: Path) -> Path:
        """Where it saves."""
        return fleet_output / self.name if self.output is None else Path(self.output)


@dataclass(frozen=True)
class _ModelEntry:
    """A model's own keys in the file, but for its flags."""

    name: str = flag("", "what it is called: letters, digits, dots, dashes and underscores")
    script: str = flag("pretrain_cdrmix.py", "what trains it", choices=SCRIPTS)
    ranks: int = flag(1, "processes, which torchrun starts where there are several", least=1, most=1 << 20)
    output: str | None = flag(None, "where it saves; default: the fleet's output and its name")

    def validate(self) -> None:
        """
        Raises:
            UserError: the name cannot be a directory's.
        """
        if not _NAME.fullmatch(self.name):
            raise UserError(f"name {self.name!r}: give one of letters, digits, dots, dashes and underscores")


@dataclass(frozen=True)
class Fleet:
    """A whole ``fleet.yaml``: settings, and its models in their order."""

    settings: FleetSettings
    models: tuple[ModelSettings, ...]


def read_fleet(path: str) -> Fleet:
    """Reads and checks a file.

    Raises:
        UserError: it cannot be read, a key is unknown, or models do not fit together; with file and line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot read it: {getattr(error, 'strerror', None) or error}") from error
    node = compose(text, path)
    entries = mapping_of(node, path, "the file")
    own = {name: value for name, value in entries.items() if name in ("flags", "models", "sweep")}
    fleet = read_dataclass(FleetSettings, _without(node, own), path, "fleet")
    shared = _flags(own.get("flags"), path, "flags")
    models = tuple(_swept(_models(own.get("models"), shared, path), _sweep(own.get("sweep"), path)))
    if not models:
        raise UserError(f"{path}: models is missing; name at least one model")
    check_models(models, Path(fleet.output or "."))
    return Fleet(fleet, models)


def _without(node: yaml.Node | None, taken: Mapping[str, yaml.Node]) -> yaml.Node | None:
    """The mapping without the entries of ``taken``."""
    if not isinstance(node, yaml.MappingNode):
        return node
    kept = [(key, value) for key, value in node.value if key.value not in taken]
    return yaml.MappingNode(node.tag, kept, node.start_mark, node.end_mark)


def check_models(models: Sequence[ModelSettings], output: Path) -> None:
    """
    Raises:
        UserError: two models have one name, or save in one directory or one within the other's.
    """
    names, places = dict[str, str](), dict[Path, str]()
    for model in models:
        if model.name in names:
            raise UserError(
                f"{model.where}: two models are called {model.name} (the other: {names[model.name]}); rename one"
            )
        names[model.name] = model.where
        place = model.directory(output).resolve()
        for other, name in places.items():
            if place == other or place in other.parents or other in place.parents:
                raise UserError(
                    f"{model.where}: {model.name} saves in {place}, and {name} in {other}; give each its own directory"
                )
        places[place] = model.name


def _models(node: yaml.Node | None, shared: Mapping[str, tuple[str, ...]], path: str) -> list[ModelSettings]:
    if node is None:
        return []
    if not isinstance(node, yaml.SequenceNode):
        raise UserError(f"{at(path, node)}: models must be a list, each entry 'name: ...' and its flags")
    found = []
    for entry in node.value:
        inner = mapping_of(entry, path, "models")
        flags = {"flags": inner["flags"]} if "flags" in inner else {}
        own = read_dataclass(_ModelEntry, _without(entry, flags), path, "models")
        given = {**shared, **_flags(flags.get("flags"), path, f"flags of {own.name}")}
        found.append(ModelSettings(own.name, own.script, own.ranks, own.output, given, {}, at(path, entry)))
    return found


def words_of(name: str, values: Sequence[str]) -> list[str]:
    """A flag as the command line has it: a switch is ``--name`` or ``--no-name``."""
    setting = next((one for one in settings().values() if name in (one.flag, *one.aliases)), None)
    if setting is not None and setting.kind is bool and not setting.optional and not setting.sequence:
        text = "".join(values).lower()
        if text in ("true", "yes", "on"):
            return [name]
        if text in ("false", "no", "off"):
            return ["--no-" + name.removeprefix("--")]
    return [name, *values]


def _flags(node: yaml.Node | None, path: str, what: str) -> dict[str, tuple[str, ...]]:
    """Flag -> its words. Values stand as they are written, so ``1e-3`` and ``none`` mean what they do on the command
    line."""
    found = {}
    for key, value in mapping_of(node, path, what).items():
        name = _flag_name(key, at(path, value))
        parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
        found[name] = tuple(_word(part, path, key) for part in parts)
    return found


def _flag_name(key: str, where: str) -> str:
    name = key.lstrip("-").replace("-", "_")
    if name in _OWN_FLAGS:
        raise UserError(f"{where}: {key}: the fleet gives each model its own; leave it out")
    return "--" + name.replace("_", "-")


def _word(node: yaml.Node, path: str, key: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or node.value == "":
        raise UserError(f"{at(path, node)}: {key}: expected one value or a list of values, as on the command line")
    return str(node.value)


def _sweep(node: yaml.Node | None, path: str) -> dict[str, list[str]]:
    """Flag -> the values that it takes in turn."""
    found = {}
    for key, value in mapping_of(node, path, "sweep").items():
        if not isinstance(value, yaml.SequenceNode) or not value.value:
            raise UserError(f"{at(path, value)}: sweep.{key}: expected a list of values to try")
        words = [_word(part, path, key) for part in value.value]
        if len(set(words)) < len(words):
            raise UserError(f"{at(path, value)}: sweep.{key}: a value stands there twice; keep one")
        found[_flag_name(key, at(path, value))] = words
    return found


def _swept(models: Sequence[ModelSettings], sweep: Mapping[str, Sequence[str]]) -> list[ModelSettings]:
    """Every model with every combination of the sweep's values, named after them."""
    if not sweep:
        return list(models)
    found = []
    for model in models:
        for values in itertools.product(*sweep.values()):
            chosen = dict(zip(sweep, values, strict=True))
            text = "_".join(f"{name.removeprefix('--')}-{value}" for name, value in chosen.items())
            name = f"{model.name}_{re.sub('[^A-Za-z0-9._-]+', '-', text)}"
            if model.output is not None or len(name) > 100:
                raise UserError(f"{model.where}: sweep: {name}: leave output out, and keep names and values short")
            flags = {**model.flags, **{key: (value,) for key, value in chosen.items()}}
            found.append(dataclasses.replace(model, name=name, flags=flags, swept=chosen))
    return found
