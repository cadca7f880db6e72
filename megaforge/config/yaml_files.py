"""Configurations in YAML: the presets of this package and the user's own files.

A file holds the sections of :class:`megaforge.config.config.Config`, and may name another one to start from::

    base: cdrmix-core-1b        # a preset, or a file beside this one
    optimizer:
      lr: 2e-4
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from megaforge.config.lengths import choose_lengths
from megaforge.config.schema import sections, setting_of, settings, suggestion
from megaforge.config.yaml_nodes import at, compose, mapping_of, value_of
from megaforge.errors import UserError

_STAGE_B = "stage_b"
_TOP_LEVEL = ("name", "base", _STAGE_B)


@dataclass
class ConfigLayer:
    """Settings from files: values and where each came from (``preset NAME`` or ``FILE:LINE``), by key; ``stage_b`` has
    those of a second stage, which hold over these."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    stage_b: ConfigLayer | None = None

    def of_stage_b(self) -> ConfigLayer:
        """Both together, as stage B has them."""
        own = self.stage_b or ConfigLayer(self.name)
        values, origins = self.values | own.values, self.origins | own.origins
        choose_lengths(values, origins, own.values, lists_all=True)
        return ConfigLayer(self.name, values, origins)


def preset_names() -> list[str]:
    """Names that ``--config`` knows."""
    folder = resources.files("megaforge.config") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_layer(name_or_file: str, beside: Path | None = None, including: tuple[str, ...] = ()) -> ConfigLayer:
    """Reads a preset by name, or a YAML file by path, on top of its ``base``.

    Args:
        name_or_file: what ``--config`` or ``base:`` says; a path when it ends in .yaml or .yml or holds a slash.
        beside: directory that a relative path starts from.
        including: the files that led here, to refuse a circle.

    Raises:
        UserError: no such preset or file, text that is no YAML, unknown sections or keys, values of a wrong type.
    """
    is_path = name_or_file.endswith((".yaml", ".yml")) or "/" in name_or_file
    if is_path:
        path = Path(beside or ".", name_or_file)
        identity, label = str(path), str(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"--config {path}: cannot read it: {reason}") from error
    else:
        if name_or_file not in preset_names():
            hint = suggestion(name_or_file, preset_names())
            raise UserError(
                f"--config {name_or_file}: no preset has this name{hint}\n"
                f"presets: {', '.join(preset_names())}; a file of your own must end in .yaml"
            )
        path, identity, label = None, name_or_file, f"preset {name_or_file}"
        text = (resources.files("megaforge.config") / "presets" / f"{name_or_file}.yaml").read_text(encoding="utf-8")
    if identity in including:
        raise UserError(f"{label}: 'base' leads back to itself: {' -> '.join((*including, identity))}")

    entries = mapping_of(compose(text, label), label, "the file")
    layer = ConfigLayer(Path(name_or_file).stem if is_path else name_or_file)
    if "base" in entries:
        base = load_layer(_text(entries["base"], label, "base"), path.parent if path else None, (*including, identity))
        layer.values, layer.origins, layer.stage_b = base.values, base.origins, base.stage_b
    if "name" in entries:
        layer.name = _text(entries["name"], label, "name")
    _read_sections(layer, {key: node for key, node in entries.items() if key not in _TOP_LEVEL}, label)
    if _STAGE_B in entries:
        layer.stage_b = layer.stage_b or ConfigLayer(layer.name)
        _read_sections(layer.stage_b, mapping_of(entries[_STAGE_B], label, f"section '{_STAGE_B}'"), label)
    return layer


def _read_sections(layer: ConfigLayer, entries: Mapping[str, yaml.Node], label: str) -> None:
    written = set[str]()
    for section, node in entries.items():
        if section not in sections():
            hint = suggestion(section, [*sections(), *_TOP_LEVEL])
            raise UserError(f"{at(label, node)}: unknown section '{section}'{hint}")
        written |= _read_section(layer, section, node, label)
    choose_lengths(layer.values, layer.origins, written, lists_all=True)


def _read_section(layer: ConfigLayer, section: str, node: yaml.Node, label: str) -> set[str]:
    """Reads a section into ``layer``; returns the keys of its settings."""
    written: dict[str, str] = {}
    for name, value in mapping_of(node, label, f"section '{section}'").items():
        setting = setting_of(section, name)
        if setting is None:
            raise UserError(f"{at(label, value)}: unknown key '{section}.{name}'{_nearest(section, name)}")
        if setting.key in written:
            raise UserError(f"{at(label, value)}: '{name}' is '{written[setting.key]}' by another name; keep one")
        written[setting.key] = name
        try:
            layer.values[setting.key] = value_of(setting, value)
        except ValueError as error:
            raise UserError(f"{at(label, value)}: {section}.{name}: {error}") from error
        layer.origins[setting.key] = label if label.startswith("preset ") else at(label, value)
    return set(written)


def _nearest(section: str, name: str) -> str:
    """A hint for an unknown key: the nearest of its section, or the section it belongs to."""
    for other in sections():
        moved = setting_of(other, name)
        if moved is not None:
            return f"; it belongs in section '{other}'"
    return suggestion(name.replace("-", "_"), [one.name for one in settings().values() if one.section == section])


def _text(node: yaml.Node, label: str, key: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or not node.value:
        raise UserError(f"{at(label, node)}: '{key}' must be a name")
    return node.value
