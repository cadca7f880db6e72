"""What several stages do with a column of texts: its bytes as one array, rewriting the rows that match a pattern."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def one_array(column: Any) -> Any:
    """The column as a single ``large_string`` array."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    return array.cast(pa.large_string())


def flat_bytes(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """The UTF-8 of all rows, one after the other [bytes] uint8, and where each begins [rows + 1] int64."""
    array = one_array(column)
    _, offsets, data = array.buffers()
    if not len(array) or data is None:
        return np.zeros(0, np.uint8), np.zeros(len(array) + 1, np.int64)
    places = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    return np.frombuffer(data, np.uint8)[places[0] : places[-1]], places - places[0]


def matching(column: Any, pattern: str, among: np.ndarray | None = None) -> np.ndarray:
    """Which rows hold a match of the RE2 ``pattern`` [rows] bool; rows out of the mask ``among`` are not looked at."""
    column = one_array(column)
    if among is None or among.all():
        return np.asarray(pc.match_substring_regex(column, pattern).to_numpy(zero_copy_only=False), bool)
    rows = among.copy()
    if rows.any():
        rows[among] = matching(column.filter(pa.array(among)), pattern)
    return rows


def any_of(*patterns: str) -> str:
    """The RE2 pattern of what matches one of ``patterns``: one look at a text in place of several."""
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def with_rows(column: Any, rows: np.ndarray, values: Any) -> Any:
    """The column with ``values`` at the rows of the mask."""
    return pc.replace_with_mask(one_array(column), pa.array(rows), pa.array(values, pa.large_string()))


def rewritten(column: Any, pattern: str, replacement: str, among: np.ndarray | None = None) -> tuple[Any, np.ndarray]:
    """The column with every match of the RE2 ``pattern`` replaced, and which rows had one [rows] bool; rows out of the
    mask ``among`` stay as they are."""
    column = one_array(column)
    rows = matching(column, pattern, among)
    if rows.any():
        changed = pc.replace_substring_regex(column.filter(pa.array(rows)), pattern, replacement)
        column = with_rows(column, rows, changed)
    return column, rows


def quality_of(records: Any) -> np.ndarray:
    """The quality of each row [rows] float32; -1 of one that was not scored."""
    return np.nan_to_num(records["quality"].to_numpy().astype(np.float32), nan=-1.0)
