"""What the frame promises a stage: batches, outcomes, joins by buckets."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from megaforge.data.corpus.records import SCHEMA, make_records, parse_id, partition_of, replaced, row_id, shown_id
from megaforge.data.corpus.stage import Outcome, Scope, by_id, check_outcome, deal, join_all, own_decisions
from megaforge.data.corpus.stages.exact import ExactSettings
from megaforge.data.corpus.stages.length import LengthSettings
from megaforge.errors import UserError

SCOPE = Scope(Path("."))


def test_ids_say_their_partition() -> None:
    for partition, row in ((0, 0), (12, 345), (2**30, 2**32 - 1)):
        identity = row_id(partition, row)
        assert parse_id(shown_id(identity)) == identity and partition_of(identity) == partition
    for wrong in ("", "12", "12-", "-3", "a-1", "1-2-3", "1-²"):
        with pytest.raises(ValueError):
            parse_id(wrong)


def test_records_have_one_schema() -> None:
    records = make_records(["a", "b"], source="s", quality=[0.5, None], rewrites=[["x: y"], []])
    assert records.schema.equals(SCHEMA) and records["quality"].to_pylist() == [0.5, None]
    changed = replaced(records, text=["c", "d"], language=["en", None])
    assert changed.schema.equals(SCHEMA) and changed["text"].to_pylist() == ["c", "d"]
    assert changed["digest"] == records["digest"], "the digest stays that of the text as it was read"


def test_an_outcome_that_breaks_the_contract_is_refused() -> None:
    records = make_records(["a", "b"])
    check_outcome(Outcome(records, [None, "x"], [None, None]), 2, "s")
    for outcome in (
        Outcome(records.slice(1)),
        Outcome(records.drop_columns("url")),
        Outcome(records, [None]),
        Outcome(records, None, ["x"]),
    ):
        with pytest.raises(AssertionError, match="stage s"):
            check_outcome(outcome, 2, "s")


def test_keys_are_dealt_whole_and_in_order() -> None:
    keys = np.array([7, 2**63 + 5, 0, 7, 4, 2**64 - 1, 0], np.uint64)
    table = pa.table({"key": keys, "row": np.arange(7)})
    for buckets in (1, 2, 3, 16):
        dealt = deal(table, buckets)
        assert len(dealt) == buckets and sum(part.num_rows for part in dealt) == 7
        for bucket, part in enumerate(dealt):
            assert all(int(key) % buckets == bucket for key in part["key"].to_pylist())
            assert part["row"].to_pylist() == sorted(part["row"].to_pylist())
    assert [part.num_rows for part in deal(table.slice(0, 0), 3)] == [0, 0, 0]


def test_decisions_find_their_documents() -> None:
    decisions = by_id(pa.table({"id": [9, 3, 5, 3], "reason": ["a", "b", "c", "d"]}))
    assert decisions["reason"].to_pylist() == ["b", "d", "c", "a"]
    assert own_decisions(decisions, make_records(["x"] * 3, id=[3, 4, 9]))["reason"].to_pylist() == ["b", "d", "a"]


def test_length_keeps_both_bounds() -> None:
    stage = LengthSettings(2, 4).open(SCOPE)
    texts = ["", "é", "éé", "👩👩👩👩", "abcde"]
    reasons = stage.apply(make_records(texts)).reasons
    assert reasons == ["too short (0 characters)", "too short (1 characters)", None, None, "too long (5 characters)"]
    with pytest.raises(UserError, match="minimum 5: must be at most maximum, 4"):
        LengthSettings(5, 4).validate()


@pytest.mark.parametrize("buckets", [1, 5])
def test_of_equal_texts_the_best_stays(buckets: int) -> None:
    """Against a dictionary, for random texts, qualities and cuts into partitions."""
    source = random.Random(buckets)
    stage: Any = ExactSettings(buckets).open(SCOPE)
    for scored in (False, True):
        texts = [f"text {source.randrange(12)}" for _ in range(60)]
        quality = [source.choice([0.25, 0.5, 1.0]) if scored else None for _ in texts]
        cuts = [0, 20, 20, 21, 60]
        tables, ids = [], []
        for number, (low, high) in enumerate(zip(cuts, cuts[1:], strict=False)):
            own = [row_id(number, row) for row in range(high - low)]
            tables.append(make_records(texts[low:high], id=own, quality=quality[low:high]))
            ids += own
        best: dict[str, tuple[float, int]] = {}
        for text, score, identity in zip(texts, quality, ids, strict=True):
            best[text] = min(best.get(text, (9.0, 0)), (-(score or 0.0), identity))
        found = [reason for outcome in join_all(stage, tables) for reason in outcome.reasons or ()]
        for text, identity, reason in zip(texts, ids, found, strict=True):
            kept = best[text][1]
            assert reason == (None if identity == kept else f"the same text as another document (of {shown_id(kept)})")
