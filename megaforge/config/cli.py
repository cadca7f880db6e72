"""The command line: flags made from the configuration's dataclasses, on top of ``--config NAME|FILE.yaml``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megaforge.config import megatron
from megaforge.config.arguments import ArgumentParser, integer
from megaforge.config.checkpoint_source import at_step, take_checkpoint_args
from megaforge.config.config import Config
from megaforge.config.data_lists import read_lists
from megaforge.config.entry import launched_rank, run_entry
from megaforge.config.launcher import print_rank_0
from megaforge.config.lengths import choose_lengths
from megaforge.config.partners import check_partners
from megaforge.config.schema import (
    Setting,
    build_config,
    config_from_dict,
    config_to_dict,
    sections,
    settings,
    suggestion,
)
from megaforge.config.shrink import shrink
from megaforge.config.stages import StageB, for_stage_b, settle_places
from megaforge.config.yaml_files import ConfigLayer, load_layer, preset_names
from megaforge.errors import UserError, gathered, raise_all
from megaforge.registry import Registry

__all__ = ["ParsedConfig", "config_from_dict", "config_to_dict", "format_config", "parse_config", "run_entry"]

_STAGE = "stages.stage"


@dataclass(frozen=True)
class ParsedConfig:
    """A configuration and where each of its values came from: ``origins["section.name"]`` is ``default``,
    ``preset NAME``, ``FILE:LINE``, ``checkpoint PATH`` or ``command line FLAG``. ``told`` is what became of flags of
    Megatron-LM's; ``notes`` are these, and where it would mean otherwise. ``stage_b`` is what its files say of a second
    stage, where this is the first of two."""

    config: Config
    origins: Mapping[str, str]
    told: tuple[str, ...] = ()
    stage_b: ConfigLayer | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.told, *megatron.notes(self.config, self.origins))


def parse_config(
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
    as_megatron: bool = False,
    defaults: Mapping[str, Any] | None = None,
    second: StageB | None = None,
) -> ParsedConfig:
    """Turns arguments into a validated configuration. With ``--print-config`` it prints it and ends the program.

    Args:
        argv: arguments without the program's name; None takes those of the process.
        prog: the program's name in messages.
        description: one line for ``--help``.
        as_megatron: where nothing is said, Megatron-LM's defaults hold, and what it requires is required.
        defaults: of settings by key, where neither the line nor ``--config`` says anything.
        second: the line is of two stages, and read for its second one.

    Raises:
        UserError: naming the flag or the file and key, its value and what would work; all that is wrong with the line.
    """
    parser = _make_parser(prog, description)
    words = list(sys.argv[1:] if argv is None else argv)
    line = megatron.read_line([*words, *(second.flags if second else ())], as_megatron)
    slips: list[str] = []
    unread: set[str] = set()
    namespace = _read_flags(parser, line, slips, unread)
    problems = line.refused
    problems += slips
    layer = _layer(namespace.config, as_megatron, problems)
    typed = {key: getattr(namespace, key) for key in settings() if hasattr(namespace, key)}
    if second is not None:
        typed = for_stage_b(typed, layer.stage_b or layer, _keys_of(parser, second.flags, as_megatron))
    stage = _stage_of(layer, typed)
    stage_b = layer.stage_b if stage is None else None
    values, origins = _gather(layer.of_stage_b() if stage == "b" else layer, typed, defaults or {}, prog)
    if slips:
        said = {key.partition(".")[0] for key in typed}
        _refuse(problems, build_config(layer.name, values), sections().keys() - said | unread)
    _leave_vocabulary_to_tokenizer(values, origins)
    taken: list[str] = []
    with gathered(problems):
        choose_lengths(values, origins, typed, lists_all=False)
        read_lists(values, origins, typed)
        at_step(values)
        if stage == "b" and not values.get("dry_run.dry_run"):
            settle_places(values, origins, after_a=second is not None)
        shrink(values, origins, getattr(namespace, "shrink", 1), typed)
        taken = take_checkpoint_args(values, origins, typed)
    megatron.settle(line, values, origins)
    config = build_config(layer.name, values)
    if namespace.print_config and launched_rank()[0] == 0:
        print(format_config(ParsedConfig(config, origins, stage_b=stage_b)))
    notes = [*taken, *_check(config, origins, problems)]
    if namespace.print_config:
        sys.exit(0)
    for note in notes:
        print_rank_0(note)
    return ParsedConfig(config, origins, tuple(line.notes), stage_b)


def _check(config: Config, origins: Mapping[str, str], problems: list[str]) -> list[str]:
    """What to tell of the whole configuration.

    Raises:
        UserError: something is wrong with it, or there are ``problems``.
    """
    with gathered(problems):
        config.validate()
    notes = []
    with gathered(problems):
        notes = check_partners(config, origins)
    raise_all(problems)
    return notes


def _stage_of(layer: ConfigLayer, typed: Mapping[str, tuple[str, Any]]) -> str | None:
    """``--stage``."""
    stage = typed[_STAGE][1] if _STAGE in typed else layer.values.get(_STAGE)
    return None if stage is None else str(stage)


def _gather(
    layer: ConfigLayer, typed: Mapping[str, tuple[str, Any]], defaults: Mapping[str, Any], prog: str | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of settings by key, and where they are from: the line before the files before ``defaults``."""
    origins = dict.fromkeys(settings(), "default") | layer.origins
    origins |= dict.fromkeys(defaults.keys() - layer.values.keys(), f"default of {prog}")
    values = {**defaults, **layer.values}
    for key, (spelling, value) in typed.items():
        values[key] = value
        origins[key] = f"command line {spelling}"
    return values, origins


def parse_stages(
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
    as_megatron: bool = False,
    defaults: Mapping[str, Any] | None = None,
) -> tuple[ParsedConfig, ...]:
    """The configuration of each stage that the line asks for, one or two; as :func:`parse_config`."""
    first = parse_config(argv, prog, description, as_megatron, defaults)
    if first.stage_b is None:
        return (first,)
    second = StageB.of(first.config.stages.stage_b_flags)
    return first, parse_config(argv, prog, description, as_megatron, defaults, second)


def _keys_of(parser: argparse.ArgumentParser, words: Sequence[str], as_megatron: bool) -> set[str]:
    """Of the settings that these words give."""
    given = _read_flags(parser, megatron.read_line(words, as_megatron), [], set())
    return {key for key in settings() if hasattr(given, key)}


def _read_flags(
    parser: argparse.ArgumentParser, line: megatron.Line, slips: list[str], unread: set[str]
) -> argparse.Namespace:
    """What our flags of the line say; what cannot be read goes to ``slips``, the sections that it is of to ``unread``:
    then each flag is read alone."""
    problems: list[str] = []
    with gathered(problems):
        namespace, rest = parser.parse_known_args([word for one in line.given for word in one.words])
        if not rest:
            return namespace
    namespace = argparse.Namespace()
    section_of = {flag: setting.section for setting in settings().values() for flag in (setting.flag, *setting.aliases)}
    for one in filter(lambda one: one.words, line.given):
        before = len(slips)
        with gathered(slips):
            _, rest = parser.parse_known_args(one.words, namespace)
            if rest:
                raise UserError(_unknown(rest[0]))
        if len(slips) > before and one.words[0].partition("=")[0] in section_of:
            unread.add(section_of[one.words[0].partition("=")[0]])
    return namespace


def _refuse(problems: list[str], config: Config, but: Collection[str]) -> None:
    """Tells ``problems`` of a line that could not be read whole, with those of the sections that could and of which it
    says something: what the other flags would have said is not known, nor what goes together."""
    with gathered(problems):
        config.validate(but)
    raise_all(problems)


def _layer(name: str | None, as_megatron: bool, problems: list[str]) -> ConfigLayer:
    """What ``--config`` says, on top of Megatron-LM's defaults where these hold.

    Raises:
        UserError: it says nothing that can be read; with the ``problems`` that the line has besides.
    """
    own = ConfigLayer("custom")
    try:
        own = load_layer(name) if name else own
    except UserError as error:
        raise_all([*problems, str(error)])
    if not as_megatron:
        return own
    base = load_layer(megatron.PRESET)
    name = own.name if name else base.name
    return ConfigLayer(name, base.values | own.values, base.origins | own.origins, own.stage_b)


def _leave_vocabulary_to_tokenizer(values: dict[str, Any], origins: dict[str, str]) -> None:
    """A preset's vocabulary is a guess at the tokenizer's; the user's own word, in a file or a flag, stands."""
    key = "model.vocab_size"
    named = next((n for n in ("tokenizer_model", "vocab_file") if values.get(f"data.{n}") is not None), None)
    if named is not None and values.get(key) and origins[key].startswith("preset "):
        origins[key] = f"--{named.replace('_', '-')}, in place of {values[key]} ({origins[key]})"
        values[key] = None


def format_config(parsed: ParsedConfig) -> str:
    """The configuration as YAML that ``--config`` reads back, each value followed by its origin as a comment; of a
    second stage what its files say."""
    lines = [f"name: {_show(parsed.config.name)}"]
    rows = {
        setting.key: f"  {setting.name}: {_show(_value(parsed.config, setting))}" for setting in settings().values()
    }
    width = min(56, max(map(len, rows.values())))
    for section in sections():
        lines.append(f"{section}:")
        lines += [
            f"{rows[setting.key]:<{width}}  # {parsed.origins[setting.key]}"
            for setting in settings().values()
            if setting.section == section
        ]
    if parsed.stage_b is not None:
        lines += ["stage_b:", *_format_stage_b(parsed.stage_b)]
    return "\n".join(lines)


def _format_stage_b(layer: ConfigLayer) -> Iterator[str]:
    for section in sections():
        own = [setting for setting in settings().values() if setting.section == section and setting.key in layer.values]
        if own:
            yield f"  {section}:"
        for setting in own:
            shown = _show(setting.written(layer.values[setting.key]))
            yield f"    {setting.name}: {shown}  # {layer.origins[setting.key]}"


def _value(config: Config, setting: Setting) -> Any:
    return setting.written(getattr(getattr(config, setting.section), setting.name))


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_show, value)) + "]"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z./][\w./-]*", value) and value.lower() not in ("null", "none"):
        return value
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


class _Record(argparse.Action):
    """Keeps (the spelling used, the value) of a setting, for its origin."""

    def __init__(self, option_strings: Sequence[str], dest: str, setting: Setting, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, **kwargs)
        self.setting = setting

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        spelling = option_string or self.setting.flag
        if self.nargs == 0:
            setattr(namespace, self.dest, (spelling, not spelling.startswith("--no-")))
            return
        texts = values if self.setting.sequence else [values]
        try:
            parsed = [self.setting.parse(text) for text in texts]
        except ValueError as error:
            raise UserError(f"{spelling} {' '.join(texts)}: {error}") from error
        setattr(namespace, self.dest, (spelling, tuple(parsed) if self.setting.sequence else parsed[0]))


def _make_parser(prog: str | None, description: str | None) -> argparse.ArgumentParser:
    usage = "%(prog)s [--config NAME|FILE.yaml] [flags]"
    parser = ArgumentParser(prog=prog, usage=usage, description=description)
    parser.add_argument(
        "--config",
        metavar="NAME|FILE.yaml",
        help=f"start from a preset ({', '.join(preset_names())}) or from a YAML file; other flags override it",
    )
    parser.add_argument("--print-config", action="store_true", help="print every value with its origin, and exit")
    parser.add_argument(
        "--shrink",
        metavar="N",
        type=integer(1, 1 << 16),
        default=argparse.SUPPRESS,
        help="divide the widths of the model of --config by this, to try its depth and layout on a small machine",
    )
    for section, cls in sections().items():
        group = parser.add_argument_group(section, (cls.__doc__ or "").split("\n\n")[0])
        for setting in settings().values():
            if setting.section == section:
                _add_flag(group, setting)
    return parser


def _add_flag(group: argparse._ArgumentGroup, setting: Setting) -> None:
    spellings = [setting.flag, *setting.aliases]
    # SUPPRESS keeps argparse from writing defaults: only what was typed reaches the namespace.
    common: dict[str, Any] = {"dest": setting.key, "setting": setting, "action": _Record, "default": argparse.SUPPRESS}
    default = " ".join(map(str, setting.default)) if setting.sequence else setting.default
    shown = "" if setting.default in (None, ()) else f" [{default}]"
    if isinstance(setting.default, bool):
        shown = f" [{'on' if setting.default else 'off'}]"
    help_text = (setting.help + shown).replace("%", "%%")
    if setting.kind is bool and not setting.optional and not setting.sequence:
        negatives = ["--no-" + spelling.removeprefix("--") for spelling in spellings]
        group.add_argument(*spellings, *negatives, nargs=0, help=help_text, **common)
        return
    choices = setting.choices.names() if isinstance(setting.choices, Registry) else setting.choices
    metavar = setting.metavar or ("{" + ",".join(map(str, choices)) + "}" if choices else None)
    metavar = metavar or "|".join([{int: "N", float: "X", str: "TEXT", bool: "BOOL"}[setting.kind], *setting.words])
    group.add_argument(*spellings, nargs="+" if setting.sequence else None, metavar=metavar, help=help_text, **common)


def _unknown(word: str) -> str:
    flag = word.partition("=")[0]
    if not flag.startswith("-"):
        return f"{word}: no flag takes this word; see --help"
    meant = megatron.meaning(flag)
    if meant:
        return f"{flag}: {meant}"
    known = [*megatron.own_flags(), *megatron.known_flags()]
    return f"{flag}: unknown flag{suggestion(flag, known) or '; see --help'}"
