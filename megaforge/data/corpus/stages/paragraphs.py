"""Paragraphs that the corpus has already: copied passages stay once, templates of many documents go altogether."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megaforge.config.fields import flag
from megaforge.data.corpus.columns import flat_bytes, one_array, with_rows
from megaforge.data.corpus.records import CODE, replaced
from megaforge.data.corpus.stage import JoinStage, Outcome, Scope, StageSettings
from megaforge.data.corpus.words import hash_spans, lines_of

_DECISION = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        ("reason", pa.string()),
        ("line", pa.int64()),
        ("template", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class ParagraphsSettings(StageSettings):
    """``paragraphs``: lines of text (a paragraph each, as most text has them) that occur again; never of code."""

    minimum: int = flag(80, "bytes of the shortest paragraph that is compared", least=1)
    template_documents: int = flag(
        10, "documents with one paragraph that make it a template, removed from all", least=2
    )
    template_minimum: int = flag(20, "bytes of the shortest paragraph that may be a template", least=1)
    least_left: float = flag(0.2, "share of its bytes that a document must keep, or it is dropped", least=0, most=1)
    buckets: int = flag(64, "pieces that the comparison is cut into; more need less memory", least=1, most=1 << 16)

    def open(self, scope: Scope) -> Paragraphs:
        """See :class:`StageSettings`."""
        return Paragraphs(self)


class Paragraphs(JoinStage):
    """Removes a paragraph from all documents but the first that has it; a template from all."""

    def __init__(self, settings: ParagraphsSettings) -> None:
        self._settings, self.buckets = settings, settings.buckets

    def sketch(self, records: Any) -> Any:
        """See :class:`JoinStage`: the hash of each paragraph that is long enough, and its number in the document."""
        data, offsets = flat_bytes(records["text"])
        first, starts, ends = lines_of(data, offsets)
        row = np.repeat(np.arange(records.num_rows), np.diff(first))
        prose = pc.not_equal(records["kind"], CODE).to_numpy().astype(bool)
        size = ends - starts
        line = np.arange(len(row)) - first[row]
        chosen = (size >= min(self._settings.minimum, self._settings.template_minimum)) & prose[row]
        return pa.table(
            {
                "key": hash_spans(data, starts[chosen], ends[chosen]),
                "id": records["id"].to_numpy()[row[chosen]],
                "line": line[chosen],
                "size": size[chosen],
            }
        )

    def join(self, sketches: Any) -> Any:
        """See :class:`JoinStage`: the paragraphs to remove."""
        key, ids, line, size = (sketches[name].to_numpy() for name in ("key", "id", "line", "size"))
        order = np.lexsort((line, ids, key))
        key, ids, line, size = key[order], ids[order], line[order], size[order]
        begins = np.ones(len(key), bool)
        begins[1:] = key[1:] != key[:-1]
        another = begins.copy()
        another[1:] |= ids[1:] != ids[:-1]
        group = np.cumsum(begins) - 1
        documents = np.bincount(group, another, int(begins.sum()))[group] if len(key) else np.zeros(0)
        template = documents >= self._settings.template_documents
        owner = ids[np.maximum.accumulate(np.where(begins, np.arange(len(ids)), 0))] if len(ids) else ids
        again = (ids != owner) & (size >= self._settings.minimum)
        gone = template | again
        return pa.Table.from_arrays(
            [
                pa.array(ids[gone]),
                pa.nulls(int(gone.sum()), pa.string()),
                pa.array(line[gone]),
                pa.array(template[gone]),
            ],
            schema=_DECISION,
        )

    def apply(self, records: Any, decisions: Any) -> Outcome:
        """See :class:`JoinStage`: the texts without their removed paragraphs."""
        ids, line, template = (decisions[name].to_numpy(zero_copy_only=False) for name in ("id", "line", "template"))
        text = one_array(records["text"])
        data, offsets = flat_bytes(text)
        first, starts, ends = lines_of(data, offsets)
        rows = np.searchsorted(records["id"].to_numpy(), ids)
        order = np.lexsort((line, rows))
        rows, line, marked = rows[order], line[order], template[order]
        reasons: list[str | None] = [None] * len(text)
        rewrites: list[str | None] = [None] * len(text)
        changed, begins = np.unique(rows, return_index=True)
        left = []
        for row, begin, end in zip(changed.tolist(), begins.tolist(), [*begins.tolist(), len(rows)][1:], strict=True):
            own = data[offsets[row] : offsets[row + 1]]
            gone = first[row] + line[begin:end]
            spans = (starts[gone] - offsets[row]).tolist(), (ends[gone] - offsets[row]).tolist()
            left.append(_without(own.tobytes(), *spans))
            templates = int(marked[begin:end].sum())
            rewrites[row] = f"removed {end - begin - templates} repeated paragraphs and {templates} of templates"
            if len(left[-1]) < self._settings.least_left * len(own) or not left[-1].decode().strip():
                reasons[row] = f"little is left of it ({rewrites[row]})"
        text = with_rows(text, np.isin(np.arange(len(text)), changed), left)
        counts = {"repeated paragraphs": int((~template).sum()), "paragraphs of templates": int(template.sum())}
        return Outcome(replaced(records, text=text), reasons, rewrites, {name: n for name, n in counts.items() if n})


def _without(text: bytes, starts: list[int], ends: list[int]) -> bytes:
    """The text without these lines, ascending, each with the line feed that parts it from the next."""
    kept, at = [], 0
    for start, end in zip(starts, ends, strict=True):
        kept.append(text[at:start])
        at = end + 1
    left = b"".join([*kept, text[at:]])
    return left[:-1] if ends[-1] == len(text) else left
