"""``corpus.yaml``: what a corpus is made from, by which stages, and into which datasets.

model_scale: 1b
sources:
  - {name: docs, files: [/usr/share/doc], domain: web}
stages:
  - html
  - length: {minimum: 50}
shard: {tokenizer_model: tok.json}
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megaforge.config.fields import flag
from megaforge.config.yaml_nodes import at, compose, mapping_of, read_dataclass
from megaforge.data.corpus.stage import Scope, StageSettings
from megaforge.data.tokenizer import TOKENIZER_TYPES
from megaforge.errors import UserError
from megaforge.registry import CORPUS_STAGES, load_extensions

SCALES = ("1b", "4b", "40b", "200b")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")


@dataclass(frozen=True)
class SourceSettings:
    """One entry of ``sources``: where documents come from, and what is said of all of them."""

    name: str = flag("", "what the source is called: letters, digits, dots and underscores")
    files: tuple[str, ...] = flag((), "files, directories, patterns with *, and addresses, read in this order")
    hub: str | None = flag(None, "a data set of the Hugging Face hub, or a builder such as csv that reads the files")
    subset: str | None = flag(None, "with hub: the data set's configuration")
    split: str = flag("train", "with hub: its split")
    domain: str = flag("text", "the kind of text, as curricula name it: web, books, code, academic ...")
    licence: str | None = flag(None, "the licence of all its documents, where a record does not name one")
    text_field: str = flag("text", "the key or column of the text")
    url_field: str = flag("url", "the key or column of a document's address")
    licence_field: str = flag("license", "the key or column of a document's licence")
    date_field: str = flag("date", "the key or column of a document's date")
    exclude: tuple[str, ...] = flag((), "names or relative paths that are left out, with *")
    max_file_mb: float = flag(16.0, "larger files that are one document are left out, MiB", above=0)

    def validate(self) -> None:
        """
        Raises:
            UserError: fields that do not fit each other.
        """
        if not _NAME.fullmatch(self.name):
            raise UserError(f"name {self.name!r}: give one of letters, digits, dots and underscores")
        if not _NAME.fullmatch(self.domain):
            raise UserError(f"domain {self.domain!r}: give one of letters, digits, dots and underscores")
        if not self.files and self.hub is None:
            raise UserError(f"{self.name}: files is missing; name files, directories or patterns, or a data set by hub")
        if self.hub is None and (self.subset is not None or self.split != "train"):
            raise UserError(f"{self.name}: subset and split are of a data set; name it with hub, or leave them out")


@dataclass(frozen=True)
class ShardSettings:
    """``shard``: how the kept documents become datasets."""

    tokenizer_model: str | None = flag(None, "tokenizer.json, SentencePiece or tiktoken file, or a directory of one")
    tokenizer_type: str | None = flag(None, "default: told from tokenizer_model", choices=TOKENIZER_TYPES)
    eod_token: str | None = flag(None, "the token that ends documents; default: the tokenizer's own")
    append_eod: bool = flag(True, "end every document with the end-of-document token")
    length_buckets: tuple[int, ...] = flag(
        (2000, 16000), "characters at which documents change to the dataset of the next length", least=1
    )
    quality_buckets: tuple[float, ...] = flag(
        (), "quality scores at which documents change to the next dataset", above=0, below=1
    )
    jsonl: bool = flag(False, "also write the kept documents as JSON Lines, as tokenizers and other tools read them")
    webdataset: bool = flag(
        False, "also write the kept documents as WebDataset tar shards, one a partition, with an index"
    )

    def validate(self) -> None:
        """
        Raises:
            UserError: the buckets do not ascend.
        """
        for name in ("length_buckets", "quality_buckets"):
            edges = getattr(self, name)
            if list(edges) != sorted(set(edges)):
                raise UserError(f"{name} {list(edges)}: give ascending numbers")
        if not (self.tokenizer_model or self.jsonl or self.webdataset):
            raise UserError("tokenizer_model is missing; name one, or ask for jsonl or webdataset alone")


@dataclass(frozen=True)
class RunSettings:
    """The keys of the file itself."""

    model_scale: str | None = flag(None, "the size of the model that the corpus is for", choices=SCALES)
    partition_mb: float = flag(16.0, "MiB of input to a partition, the unit of work", above=0)
    extensions: tuple[str, ...] = flag((), "Python files or modules that register stages or readers")


@dataclass(frozen=True)
class Recipe:
    """A corpus.yaml that was read and checked.

    Attributes:
        label: the file's name.
        stages: (name, settings) in order.
    """

    label: str
    scope: Scope
    run: RunSettings
    sources: tuple[SourceSettings, ...]
    stages: tuple[tuple[str, StageSettings], ...]
    shard: ShardSettings

    def described(self) -> dict[str, Any]:
        """Everything that the result depends on, JSON-like."""
        return {
            "run": {"model_scale": self.run.model_scale, "partition_mb": self.run.partition_mb},
            "sources": [dataclasses.asdict(source) for source in self.sources],
            "stages": [[name, dataclasses.asdict(settings)] for name, settings in self.stages],  # type: ignore[call-overload]
            "stage_files": [_digests(settings.inputs(self.scope)) for _, settings in self.stages],
            "shard": dataclasses.asdict(self.shard),
        }


def _digests(files: Sequence[Path]) -> list[str]:
    """What the files hold, as SHA-256 each.

    Raises:
        UserError: one cannot be read.
    """
    digests = []
    for path in files:
        try:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise UserError(f"{path}: a stage needs it and cannot read it: {error.strerror or error}") from error
    return digests


def read_recipe(path: Path, label: str | None = None, directory: Path | None = None) -> Recipe:
    """Reads and checks a corpus.yaml.

    Args:
        label: what the file is called in messages; its path by default.
        directory: where its relative names start; beside the file by default.

    Raises:
        UserError: it cannot be read, an unknown key or stage (with the nearest name), a value out of bounds, two
            sources of one name, nothing to do.
    """
    label = label or str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {label}: cannot read it: {getattr(error, 'strerror', None) or error}") from error
    root = compose(text, label)
    entries = mapping_of(root, label, "the file")
    own = [one.name for one in dataclasses.fields(RunSettings)]
    rest = {key: node for key, node in entries.items() if key not in ("sources", "stages", "shard")}
    top = yaml.MappingNode("tag:yaml.org,2002:map", [], root.start_mark if root is not None else None)
    top.value = [(key, value) for key, value in (root.value if root is not None else []) if key.value in rest]
    for key, node in rest.items():
        if key not in own:
            raise UserError(f"{at(label, node)}: unknown key '{key}'{_nearest(key, own)}")
    run = read_dataclass(RunSettings, top if rest else None, label, "corpus")
    directory = directory or path.absolute().parent
    load_extensions(tuple(str(directory / name) if name.endswith(".py") else name for name in run.extensions))
    sources = _sources(entries.get("sources"), label)
    stages = _stages(entries.get("stages"), label)
    if "shard" not in entries:
        raise UserError(f"{label}: 'shard' is missing; add, for example, shard: {{tokenizer_model: tokenizer.json}}")
    shard = read_dataclass(ShardSettings, entries["shard"], label, "shard")
    return Recipe(label, Scope(directory, run.model_scale), run, sources, stages, shard)


def _nearest(key: str, own: Sequence[str]) -> str:
    from megaforge.config.schema import suggestion

    return suggestion(key, [*own, "sources", "stages", "shard"])


def _items(node: yaml.Node | None, label: str, what: str) -> list[yaml.Node]:
    if node is None or node.tag == "tag:yaml.org,2002:null":
        return []
    if not isinstance(node, yaml.SequenceNode):
        raise UserError(f"{at(label, node)}: {what} must be a list of '- ...' lines")
    return list(node.value)


def _sources(node: yaml.Node | None, label: str) -> tuple[SourceSettings, ...]:
    sources: dict[str, SourceSettings] = {}
    for item in _items(node, label, "sources"):
        source = read_dataclass(SourceSettings, item, label, "sources")
        if source.name in sources:
            raise UserError(f"{at(label, item)}: sources: two are called {source.name!r}; rename one")
        sources[source.name] = source
    if not sources:
        raise UserError(
            f"{label}: 'sources' is missing; add, for example, sources: [{{name: web, files: [DIRECTORY]}}]"
        )
    return tuple(sources.values())


def _stages(node: yaml.Node | None, label: str) -> tuple[tuple[str, StageSettings], ...]:
    stages = []
    for item in _items(node, label, "stages"):
        if isinstance(item, yaml.ScalarNode):
            name, settings = item.value, None
        else:
            entries = mapping_of(item, label, "a stage")
            if len(entries) != 1:
                raise UserError(f"{at(label, item)}: a stage is '- NAME' or '- NAME: {{key: value}}'")
            ((name, settings),) = entries.items()
        try:
            cls = CORPUS_STAGES.get(name)
        except UserError as error:
            words = str(error).replace("named by --extensions", "named by the key 'extensions'")
            raise UserError(f"{at(label, item)}: stages: {words}") from error
        stages.append((name, read_dataclass(cls, settings, label, f"stages.{name}")))
    return tuple(stages)
