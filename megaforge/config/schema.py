"""What settings there are: every field of :class:`Config` with its flag, its type and how text becomes its value.

The command line, the YAML reader, ``--print-config`` and the checkpoint's copy of the configuration all read this one
list, which is derived from the dataclasses; nothing else names a flag.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from megaforge.config.config import Config
from megaforge.config.fields import Bounds
from megaforge.config.launcher import print_rank_0
from megaforge.errors import UserError
from megaforge.registry import Registry, load_extensions

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_EXPECTED = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Setting:
    """One field of one section.

    Attributes:
        section, name: where it stands, e.g. ``training`` and ``micro_batch_size``.
        kind: int, float, bool or str; of the elements when ``sequence``.
        optional: whether None is a value of it (written ``none`` on the command line, ``null`` in YAML).
        sequence: whether it holds a tuple.
        bounds: which numbers it takes.
        words: further values by the words for them.
    """

    section: str
    name: str
    kind: type
    optional: bool
    sequence: bool
    default: Any
    help: str
    choices: tuple[Any, ...] | Registry | None
    aliases: tuple[str, ...]
    metavar: str | None
    bounds: Bounds
    words: Mapping[str, Any]

    @property
    def key(self) -> str:
        """``section.name``: its identity in origins and error messages."""
        return f"{self.section}.{self.name}"

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def parse(self, text: str) -> Any:
        """The value (of one element, for a sequence) that ``text`` spells.

        Raises:
            ValueError: with what was expected, as the end of a sentence.
        """
        if self.optional and text.lower() in ("none", "null"):
            return None
        if text in self.words:
            return self.words[text]
        if self.kind is bool:
            if text.lower() not in _TRUE + _FALSE:
                raise ValueError(f"expected {_EXPECTED[bool]}")
            return text.lower() in _TRUE
        try:
            value = self.kind(text)
        except ValueError as error:
            raise ValueError(f"expected {self._expected}") from error
        return self._checked(value)

    def accept(self, value: Any) -> Any:
        """The value that a JSON-able ``value`` stands for: lists become tuples, integers numbers.

        Raises:
            ValueError: it has another type, or is none of the choices.
        """
        if value is None and self.optional:
            return None
        if self.sequence:
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"expected a list, got {value!r}")
            return tuple(self._typed(element) for element in value)
        return self._typed(value)

    @property
    def _expected(self) -> str:
        return " or ".join([_EXPECTED[self.kind], *self.words])

    def written(self, value: Any) -> Any:
        """``value``, or the word for it."""
        return next((word for word, meant in self.words.items() if meant == value), value)

    def _typed(self, value: Any) -> Any:
        if isinstance(value, str) and value in self.words:
            return self.words[value]
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind:
            raise ValueError(f"expected {self._expected}, got {value!r}")
        return self._checked(value)

    def _checked(self, value: Any) -> Any:
        if type(value) in (int, float):
            self.bounds.check(value)
        if isinstance(self.choices, tuple) and value not in self.choices:  # a registry is complete only later
            *others, last = map(str, self.choices)
            raise ValueError(f"choose {', '.join(others)} or {last}" if others else f"there is {last} only")
        return value


def setting_for(section: str, field: dataclasses.Field[Any], annotation: Any) -> Setting:
    """The setting that a dataclass' field, made by :func:`megaforge.config.fields.flag`, declares."""
    alternatives = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    plain = [alternative for alternative in alternatives if alternative is not types.NoneType]
    sequence = typing.get_origin(plain[0]) is tuple
    kind = typing.get_args(plain[0])[0] if sequence else plain[0]
    if len(plain) != 1 or kind not in _EXPECTED:
        raise TypeError(f"{section}.{field.name}: no flag can hold the type {annotation}")
    default = field.default if field.default is not dataclasses.MISSING else typing.cast(Any, field.default_factory)()
    return Setting(
        section, field.name, kind, len(plain) != len(alternatives), sequence, default,
        field.metadata["help"], field.metadata["choices"], field.metadata["aliases"], field.metadata["metavar"],
        field.metadata["bounds"], field.metadata["words"],
    )  # fmt: skip


@functools.cache
def sections() -> Mapping[str, type]:
    """The section dataclasses of :class:`Config` by name, in order."""
    hints = typing.get_type_hints(Config)
    return {name: hint for name, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}


@functools.cache
def settings() -> Mapping[str, Setting]:
    """Every setting by its key ``section.name``, in the order of the dataclasses.

    Raises:
        TypeError: two fields claim one flag, or a field has a type no flag can hold.
    """
    found: dict[str, Setting] = {}
    owner: dict[str, str] = {}
    for section, cls in sections().items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            setting = setting_for(section, field, hints[field.name])
            found[setting.key] = setting
            for spelling in (setting.flag, *setting.aliases):
                if owner.setdefault(spelling, setting.key) != setting.key:
                    raise TypeError(f"{setting.key} and {owner[spelling]} both claim the flag {spelling}")
    return found


def setting_of(section: str, name: str) -> Setting | None:
    """The setting that ``name`` (a field's name or alias, with dashes or underscores) means in ``section``."""
    name = name.replace("-", "_")
    for setting in settings().values():
        aliases = [alias.lstrip("-").replace("-", "_") for alias in setting.aliases]
        if setting.section == section and name in (setting.name, *aliases):
            return setting
    return None


def suggestion(word: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` when one of ``known`` resembles ``word``, else nothing."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def build_config(name: str, values: Mapping[str, Any], source: str | None = None) -> Config:
    """A :class:`Config` whose settings are ``values`` by key, and defaults elsewhere; imports its ``--extensions``."""
    by_section: dict[str, dict[str, Any]] = {section: {} for section in sections()}
    for key, value in values.items():
        setting = settings()[key]
        by_section[setting.section][setting.name] = value
    training = by_section["training"]
    training["extensions"] = tuple(_extension(one, source) for one in training.get("extensions", ()))
    return Config(name=name, **{section: cls(**by_section[section]) for section, cls in sections().items()})


def _extension(name: str, source: str | None) -> str:
    """Imports one; where a checkpoint names it, it may be gone, and what uses the checkpoint may not need it."""
    try:
        return load_extensions((name,))[0]
    except UserError as error:
        if source is None:
            raise
        print_rank_0(f"{source}: {error}; what it registers is unknown here")
        return name


def config_to_dict(config: Config) -> dict[str, Any]:
    """``config`` as JSON-able nested dictionaries: ``name`` and one dictionary a section."""
    out: dict[str, Any] = {"name": config.name}
    for section in sections():
        out[section] = {}
    for setting in settings().values():
        value = getattr(getattr(config, setting.section), setting.name)
        out[setting.section][setting.name] = list(value) if isinstance(value, tuple) else value
    return out


def config_from_dict(data: Mapping[str, Any], source: str = "configuration") -> Config:
    """The :class:`Config` that :func:`config_to_dict` wrote; keys that are missing take their defaults.

    Raises:
        UserError: a key is unknown or has the wrong type; the message names ``source`` and the key.
    """
    values: dict[str, Any] = {}
    for section, content in data.items():
        if section == "name":
            continue
        if section not in sections() or not isinstance(content, Mapping):
            raise UserError(f"{source}: '{section}' is not a section{suggestion(section, sections())}")
        for name, value in content.items():
            setting = setting_of(section, name)
            if setting is None:
                known = [one.name for one in settings().values() if one.section == section]
                raise UserError(f"{source}: unknown key '{section}.{name}'{suggestion(name, known)}")
            try:
                values[setting.key] = setting.accept(value)
            except ValueError as error:
                raise UserError(f"{source}: {setting.key}: {error}") from error
    return build_config(str(data.get("name", "custom")), values, source)
