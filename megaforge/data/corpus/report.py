"""``report.md`` and ``report.html``: what is in a corpus, what is not, and why."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaforge.data.corpus.report_data import ATTRIBUTES, ReportData
from megaforge.data.corpus.report_pictures import draw_pictures
from megaforge.data.corpus.work import temporary
from megaforge.durable import give_name

_MOST = 20


@dataclass(frozen=True)
class Table:
    """Rows under a head; numbers are shown with separators."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Picture:
    """A file beside the report, and what it shows."""

    title: str
    file: str


Block = str | Table | Picture


def write_report(output: Path, manifest: dict[str, Any], data: ReportData) -> None:
    """Writes both files and their pictures into ``output``.

    Raises:
        UserError: a picture cannot be written.
    """
    stages = {stage["name"]: stage for stage in manifest["stages"]}
    pictures = draw_pictures(output / "pictures", stages, data)
    sections = _sections(manifest, stages, data, [Picture(*picture) for picture in pictures])
    title = f"Corpus {manifest['digest'][:16]}"
    for name, text in (("report.md", _markdown(title, sections)), ("report.html", _page(title, sections))):
        partial = temporary(output / name)
        partial.write_text(text, encoding="utf-8")
        give_name(partial, output / name)


def _sections(
    manifest: dict[str, Any], stages: dict[str, dict[str, Any]], data: ReportData, pictures: list[Picture]
) -> list[tuple[str, list[Block]]]:
    read = next(iter(stages.values()))
    first, second = data.entropy
    kept = (
        f"{manifest['documents']:,} of {read['documents']:,} documents are kept: {manifest['bytes'] / 1e6:,.2f} MB of "
        f"text, {manifest['tokens']:,} tokens. A byte of them holds {first:.3f} bits, and {second:.3f} where the byte "
        "before it is known."
    )
    sections: list[tuple[str, list[Block]]] = [
        ("What is kept", [kept, _stage_table(stages), *pictures[:1]]),
        ("Why documents are dropped", [*_reason_blocks(data), *pictures[1:2]]),
        ("What stages counted", [*_count_tables(stages)]),
        ("What the corpus is of", [*(_attribute_table(name, data) for name in ATTRIBUTES), *pictures[2:]]),
        ("Groups of like documents", _cluster_blocks(data)),
        ("Datasets", [_dataset_table(manifest)]),
        ("Recipe", [_recipe_table(manifest["recipe"])]),
    ]
    if not pictures:
        sections[0][1].append("Pictures are left out: they need matplotlib (pip install 'megaforge[train]').")
    return [(heading, blocks) for heading, blocks in sections if blocks]


def _stage_table(stages: dict[str, dict[str, Any]]) -> Table:
    rows = [
        (name, one["documents"], one["documents"] - one["kept"], one["kept"], _mb(one["kept_bytes"]), one["rewritten"])
        for name, one in stages.items()
    ]
    return Table(("stage", "came in", "dropped", "passed on", "MB passed on", "rewritten"), rows)


def _reason_blocks(data: ReportData) -> list[Block]:
    if not data.dropped:
        return ["No document was dropped."]
    rows = [
        (stage, reason, number, data.examples[stage, reason][0])
        for (stage, reason), number in data.dropped.most_common()
    ]
    return [Table(("stage", "reason", "documents", "for example"), rows)]


def _count_tables(stages: dict[str, dict[str, Any]]) -> Iterable[Block]:
    for name, one in stages.items():
        if one["counts"]:
            yield Table((name, "number"), sorted(one["counts"].items()))


def _attribute_table(name: str, data: ReportData) -> Table:
    rows: list[Sequence[Any]] = [
        (value, number, data.kept[name][value], data.characters[name][value])
        for value, number in data.read[name].most_common(_MOST)
    ]
    others = len(data.read[name]) - len(rows)
    if others > 0:
        shown = {row[0] for row in rows}
        sums = [sum(n for value, n in counts.items() if value not in shown) for counts in _columns(name, data)]
        rows.append((f"{others:,} others", *sums))
    return Table((name, "read", "kept", "characters kept"), rows)


def _columns(name: str, data: ReportData) -> tuple[Any, Any, Any]:
    return data.read[name], data.kept[name], data.characters[name]


def _cluster_blocks(data: ReportData) -> list[Block]:
    if not data.clusters:
        return []
    gone = sum(data.clusters.values())
    words = f"{len(data.clusters):,} kept documents stand for {gone:,} others that are like them."
    return [words, Table(("kept document", "dropped for it"), data.clusters.most_common(10))]


def _dataset_table(manifest: dict[str, Any]) -> Table:
    rows = [
        (one["name"], one["documents"], _mb(one["bytes"]), one.get("tokens", ""), one.get("prefix", ""))
        for one in manifest["datasets"]
    ]
    return Table(("dataset", "documents", "MB", "tokens", "--data-path"), rows)


def _recipe_table(recipe: dict[str, Any]) -> Table:
    rows = [(f"stage {name}", _settings(settings)) for name, settings in recipe["stages"]]
    rows += [(f"source {source['name']}", _settings(source)) for source in recipe["sources"]]
    rows.append(("shard", _settings(recipe["shard"])))
    return Table(("", "settings"), rows)


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value not in (None, "", [], ()))


def _mb(size: int) -> str:
    return f"{size / 1e6:,.2f}"


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _markdown(title: str, sections: Sequence[tuple[str, list[Block]]]) -> str:
    lines = [f"# {title}", ""]
    for heading, blocks in sections:
        lines += [f"## {heading}", ""]
        for block in blocks:
            if isinstance(block, Table):
                lines.append("| " + " | ".join(map(_escaped, block.head)) + " |")
                lines.append("|" + " --- |" * len(block.head))
                lines += ["| " + " | ".join(_escaped(_cell(value)) for value in row) + " |" for row in block.rows]
            elif isinstance(block, Picture):
                lines.append(f"![{block.title}]({block.file})")
            else:
                lines.append(block)
            lines.append("")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0;font-size:14px}"
    "td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:left;overflow-wrap:anywhere}"
    "td.n{text-align:right}img{max-width:100%}h2{margin-top:2.5rem}"
)


def _page(title: str, sections: Sequence[tuple[str, list[Block]]]) -> str:
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for heading, blocks in sections:
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        for block in blocks:
            if isinstance(block, Table):
                head = "".join(f"<th>{html.escape(name)}</th>" for name in block.head)
                rows = "".join("<tr>" + "".join(map(_html_cell, row)) + "</tr>\n" for row in block.rows)
                parts.append(f"<table><tr>{head}</tr>\n{rows}</table>")
            elif isinstance(block, Picture):
                parts.append(f'<p><img src="{html.escape(block.file)}" alt="{html.escape(block.title)}"></p>')
            else:
                parts.append(f"<p>{html.escape(block)}</p>")
    return "\n".join(parts) + "\n"


def _html_cell(value: Any) -> str:
    return f"<td{' class=n' if isinstance(value, int) else ''}>{html.escape(_cell(value))}</td>"
