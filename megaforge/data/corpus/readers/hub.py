"""Data sets of the Hugging Face hub, or files of a builder of ``datasets``, read as a stream: a shard a unit.

A place is a row of its shard.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megaforge.data.corpus.readers.reader import Reader, Rows, missing_column
from megaforge.data.corpus.recipe import SourceSettings
from megaforge.data.text.readers import not_a_string
from megaforge.errors import UserError, require

_ROWS = 1024
_TRIES, _FIRST_WAIT = 3, 1.0  # seconds, doubled from try to try


@dataclass(frozen=True)
class HubShard:
    """One shard of a data set; ``files`` are given to its builder."""

    files: tuple[str, ...]
    shard: int
    shards: int

    def to_path(self) -> str:
        """The shard as the path of a unit."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_path(cls, path: str) -> HubShard:
        """The shard from :meth:`to_path`."""
        value = json.loads(path)
        return cls(tuple(value["files"]), value["shard"], value["shards"])


class HubShards(Reader):
    """Rows with the text in column ``text_field``."""

    whole = False
    unit = "row"

    def read(self, path: str, source: SourceSettings, start: int, stop: int | None) -> Iterator[Rows]:
        """See :class:`Reader`. A connection that breaks is taken up again at the row where it broke, three times."""
        part = HubShard.from_path(path)
        where = f"{source.hub}@{part.shard}/{part.shards}"
        place, failures, rows = 0, 0, Rows()
        while True:
            try:
                stream = open_stream(source, part.files).shard(num_shards=part.shards, index=part.shard)
                for record in stream.skip(place) if place else stream:
                    _add(rows, place, record, source, where)
                    place, failures = place + 1, 0
                    if len(rows.texts) == _ROWS:
                        yield rows
                        rows = Rows()
                break
            except UserError:
                raise
            except Exception as error:  # of any of the libraries that fetch
                failures += 1
                if failures == _TRIES:
                    words = str(error).partition("\n")[0]
                    raise UserError(f"{where}: broke at row {place:,} ({type(error).__name__}: {words})") from error
                time.sleep(_FIRST_WAIT * 2 ** (failures - 1))
        yield rows


def open_stream(source: SourceSettings, files: tuple[str, ...]) -> Any:
    """The stream of a source's data set.

    Raises:
        UserError: ``datasets`` is not installed.
    """
    datasets = require("datasets", extra="corpus", purpose=f"hub: {source.hub}")
    given = {"data_files": list(files)} if files else {}
    return datasets.load_dataset(source.hub, source.subset, split=source.split, streaming=True, **given)


def shards_of(source: SourceSettings, files: tuple[str, ...]) -> int:
    """The number of shards of a source's data set.

    Raises:
        UserError: it cannot be found or reached.
    """
    for attempt in range(_TRIES):
        try:
            return int(open_stream(source, files).num_shards)
        except UserError:
            raise
        except Exception as error:  # of any of the libraries that fetch
            if attempt == _TRIES - 1 or isinstance(error, (FileNotFoundError, ValueError)):
                words = str(error).partition("\n")[0]
                raise UserError(f"hub: {source.hub}: cannot be opened ({type(error).__name__}: {words})") from error
            time.sleep(_FIRST_WAIT * 2**attempt)
    raise AssertionError("unreachable")


def _add(rows: Rows, place: int, record: dict[str, Any], source: SourceSettings, where: str) -> None:
    if source.text_field not in record:
        raise missing_column(where, source.text_field, list(record))
    text = record[source.text_field]
    if isinstance(text, str):
        names = {"url": source.url_field, "licence": source.licence_field, "date": source.date_field}
        rows.add(place, text, None, {name: record.get(key) for name, key in names.items()})
    else:
        rows.add(place, None, not_a_string(source.text_field, text))
