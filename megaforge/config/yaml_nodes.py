"""YAML as nodes that know their lines: what every file of ours in YAML is read with."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from megaforge.config.fields import check_fields
from megaforge.config.schema import Setting, setting_for, suggestion
from megaforge.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Section = TypeVar("Section", bound="DataclassInstance")


def read_dataclass(cls: type[Section], node: yaml.Node | None, label: str, what: str, **given: Any) -> Section:
    """An instance of the dataclass ``cls``, whose fields are :func:`megaforge.config.fields.flag`, from a mapping node.

    Args:
        node: the mapping; None or an empty one gives the defaults.
        label: the file's name, for messages.
        what: what the mapping is called in messages, such as ``stages.length``.
        given: fields that the mapping does not hold.

    Raises:
        UserError: an unknown key (with the nearest known one), a value of a wrong type or beyond its bounds, or what
            the dataclass' own ``validate`` refuses.
    """
    fields = {one.name: one for one in dataclasses.fields(cls) if one.name not in given}
    hints = typing.get_type_hints(cls)
    values = dict(given)
    for name, value in mapping_of(node, label, what).items():
        key = name.replace("-", "_")
        if key not in fields:
            raise UserError(f"{at(label, value)}: {what}: unknown key '{name}'{suggestion(key, fields)}")
        try:
            values[key] = value_of(setting_for(what, fields[key], hints[key]), value)
        except ValueError as error:
            raise UserError(f"{at(label, value)}: {what}.{name}: {error}") from error
    section = cls(**values)
    where = f"{at(label, node)}: " if node is not None else ""
    try:
        check_fields(section)
        getattr(section, "validate", lambda: None)()
    except UserError as error:
        raise UserError(f"{where}{what}: {str(error).removeprefix('--')}") from error
    return section


def value_of(setting: Setting, node: yaml.Node) -> Any:
    """The setting's value from a node; scalars are read by the declared type, so ``1e-3`` is a number in YAML too."""
    if setting.sequence:
        elements = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return tuple(_scalar(setting, element) for element in elements)
    return _scalar(setting, node)


def _scalar(setting: Setting, node: yaml.Node) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError("expected one value, got a " + ("list" if isinstance(node, yaml.SequenceNode) else "mapping"))
    quoted = node.style in ("'", '"')
    if node.tag == "tag:yaml.org,2002:null":
        if not setting.optional:
            raise ValueError("needs a value")
        return None
    if quoted and setting.kind is not str:
        raise ValueError(f"got the text '{node.value}' in quotes; leave the quotes out")
    try:
        return setting.parse(node.value)
    except ValueError as error:
        raise ValueError(f"{error}, got '{node.value}'") from error


def compose(text: str, label: str) -> yaml.Node | None:
    """The text's root node; None of an empty text.

    Raises:
        UserError: it is not YAML.
    """
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{label}:{mark.line + 1}" if mark else label
        raise UserError(f"{where}: this is not YAML: {getattr(error, 'problem', None) or error}") from error
    except RecursionError as error:
        raise UserError(f"{label}: it is nested too deeply") from error


def mapping_of(node: yaml.Node | None, label: str, what: str) -> dict[str, yaml.Node]:
    """The entries of a mapping node by key; an empty file or section has none."""
    if node is None or node.tag == "tag:yaml.org,2002:null":
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{at(label, node)}: {what} must hold 'key: value' lines")
    entries: dict[str, yaml.Node] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{at(label, key)}: a key must be a word")
        if key.value in entries:
            raise UserError(f"{at(label, key)}: '{key.value}' occurs twice; keep one")
        entries[key.value] = value
    return entries


def at(label: str, node: yaml.Node) -> str:
    """``FILE:LINE`` of a node."""
    return f"{label}:{node.start_mark.line + 1}"
