"""Training and validation samples: what they hold, what they refuse, and where a saved state may continue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaforge.data import run_dataset
from megaforge.data.sample_schedule import ScheduleChange
from megaforge.data.samples import DataChecks, SampleSchedule, TrainingData
from megaforge.errors import UserError
from tests.data.datasets import labels_of, random_documents, write_dataset, write_sidecar

RANGES = {"split_order": "sequential"}  # where a test must know which documents are held out


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "a", random_documents(1, 60, 12))


@pytest.fixture
def other(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "b", random_documents(2, 40, 9))


def make(*prefixes: str, split: str = "1", length: int = 16, seed: int = 5, **options: Any) -> TrainingData:
    schedule = SampleSchedule(seed, length, options.pop("changes", ()), options.pop("lanes", 1))
    return TrainingData([(1.0, prefix) for prefix in prefixes], split, schedule, **options)


def test_windows_overlap_by_the_label_of_the_last_token(prefix: str) -> None:
    data = make(prefix)
    for k in range(40):
        one, two = data.sample(k), data.sample(k + 1)
        assert one.tokens.dtype.is_signed and one.tokens.shape == one.document_start.shape == (17,)
        assert one.tokens[-1] == two.tokens[0] and one.document_start[-1] == two.document_start[0]
        assert (two.cursor, two.targets, two.source) == (one.cursor + 16, 16, 0)


def test_an_epoch_predicts_every_token_once(prefix: str) -> None:
    data = make(prefix)
    tokens = data.epoch_tokens[0]
    read = np.concatenate([data.sample(k).tokens[:-1].numpy() for k in range(-(-tokens // 16))])[:tokens]
    assert sorted(read.tolist()) == sorted(data._sources[0].dataset.tokens.tolist())


def test_document_starts_delimit_real_documents(tmp_path: Path) -> None:
    """Every stretch between two marks is one of the documents, whole."""
    documents = [[i, *range(100 * i, 100 * i + i)] for i in range(1, 9)]
    data = make(write_dataset(tmp_path / "d", documents), length=300)
    sample = data.sample(0)
    starts = np.flatnonzero(sample.document_start.numpy()).tolist()
    stretches = [sample.tokens[a:b].tolist() for a, b in zip(starts, starts[1:], strict=False)]
    assert starts[0] == 0 and len(stretches) > 30 and all(stretch in documents for stretch in stretches)


def test_training_split_is_the_first_documents_only(tmp_path: Path) -> None:
    data = make(write_dataset(tmp_path / "d", [[i] * 3 for i in range(100)]), split="80,15,5", length=24, **RANGES)
    seen = {int(t) for k in range(30) for t in data.sample(k).tokens}
    assert seen == set(range(80))
    for split, expected in (("valid", range(80, 95)), ("test", range(95, 100))):
        view = data.validation(split)
        assert {int(t) for k in range(len(view)) for t in view.sample(k).tokens} - {0} == set(expected)


def test_sequences_longer_than_the_source_wrap_around(tmp_path: Path) -> None:
    data = make(write_dataset(tmp_path / "d", [[1], [2, 3]]), length=50)
    sample = data.sample(3)
    assert sorted(sample.tokens.tolist())[::17] == [1, 2, 3] and int(sample.document_start.sum()) >= 32


def test_longer_sequences_continue_where_the_shorter_stopped(prefix: str, other: str) -> None:
    """Three stages of other lengths and mixes read each source's stream once, without gap or repeat."""
    changes = (ScheduleChange(23, sequence_length=64), ScheduleChange(40, sequence_length=7, weights=(3.0, 1.0)))
    data = make(prefix, other, changes=changes)
    plain = [make(prefix, length=1), make(other, length=1)]
    cursors = [0, 0]
    for k in range(60):
        sample = data.sample(k)
        assert sample.targets == (16 if k < 23 else 64 if k < 40 else 7) == data.sequence_length(k)
        assert sample.cursor == cursors[sample.source]
        cursors[sample.source] += sample.targets
        alone = plain[sample.source].sample(sample.cursor)
        assert sample.tokens[:2].tolist() == alone.tokens.tolist()
    assert data.plan.tokens_before(60) == sum(cursors)
    assert [data.sample(k).tokens.tolist() for k in range(23)] == [
        make(prefix, other).sample(k).tokens.tolist() for k in range(23)
    ]


def test_lanes_mix_documents_and_an_epoch_still_predicts_every_token_once(tmp_path: Path) -> None:
    """Eight lanes of long documents: neighbouring samples differ in document, and the lanes together read them all."""
    documents = [[i] * 160 for i in range(1, 33)]
    prefix = write_dataset(tmp_path / "d", documents)
    data = make(prefix, length=16, lanes=8)
    read = [data.sample(k) for k in range(32 * 160 // 16)]
    assert [sample.lane for sample in read[:8]] == list(range(8))
    assert len({int(sample.tokens[0]) for sample in read[:8]}) == 8
    counts = np.bincount(np.concatenate([sample.tokens[:-1].numpy() for sample in read]), minlength=33)
    assert counts[1:].tolist() == [160] * 32
    assert len({int(sample.tokens[0]) for sample in map(make(prefix, length=16).sample, range(8))}) == 1


def test_lanes_continue_across_a_change_of_length(tmp_path: Path) -> None:
    """Each lane is one stream, read without gap or repeat whatever the stage."""
    prefix = write_dataset(tmp_path / "d", random_documents(3, 40, 30))
    data = make(prefix, lanes=3, changes=(ScheduleChange(20, sequence_length=40),))
    ends: dict[int, tuple[int, int]] = {}
    for k in range(50):
        sample = data.sample(k)
        cursor, token = ends.get(sample.lane, (0, int(sample.tokens[0])))
        assert (sample.cursor, int(sample.tokens[0])) == (cursor, token)
        ends[sample.lane] = (sample.cursor + sample.targets, int(sample.tokens[-1]))
    assert len(ends) == 3


def test_schedule_errors() -> None:
    for changes, message in (
        ((ScheduleChange(5), ScheduleChange(5)), "ascending"),
        ((ScheduleChange(0, 9),), "ascending"),
        ((ScheduleChange(5, 0),), "--seq-length 0"),
        ((ScheduleChange(5, None, (1.0, 1.0)),), "not 1 numbers"),
        ((ScheduleChange(5, None, (0.0,)),), "sum above zero"),
    ):
        with pytest.raises(UserError, match=message):
            make("none", changes=changes)
    with pytest.raises(UserError, match="--seq-length -1"):
        make("none", length=-1)


def test_adding_a_source_keeps_the_order_of_the_others(prefix: str, other: str) -> None:
    def tokens_of_first(data: TrainingData) -> list[list[int]]:
        found = [data.sample(k) for k in range(30)]
        return [sample.tokens.tolist() for sample in found if sample.source == 0]

    mixed = tokens_of_first(make(prefix, other))
    assert mixed == tokens_of_first(make(prefix))[: len(mixed)] and len(mixed) == 15


def test_one_dataset_listed_twice_is_read_in_two_orders(prefix: str) -> None:
    data = make(prefix, prefix)
    one, two = data.sample(0), data.sample(1)
    assert {one.source, two.source} == {0, 1} and one.tokens.tolist() != two.tokens.tolist()


def test_content_not_name_decides(tmp_path: Path, prefix: str) -> None:
    documents = random_documents(1, 60, 12)
    copy = write_dataset(tmp_path / "elsewhere" / "c", documents)
    assert make(copy).digest == make(prefix).digest
    write_sidecar(copy)
    assert make(copy).digest == make(prefix).digest
    documents[30] = [t ^ 1 for t in documents[30]] or [1]
    assert make(write_dataset(tmp_path / "c", documents)).digest != make(prefix).digest


def test_large_files_are_probed_at_both_ends_and_between(tmp_path: Path) -> None:
    tokens = np.arange(3 << 20).astype(np.uint16)
    digests = set()
    for change in (slice(0), slice(0, 1), slice(tokens.size - 1, None), slice(1_500_000, 1_550_000)):
        changed = tokens.copy()
        changed[change] += 1
        digests.add(make(write_dataset(tmp_path / "d", [changed])).digest)  # type: ignore[list-item]
    assert len(digests) == 4


def test_files_replaced_beside_a_sidecar_are_refused(tmp_path: Path, prefix: str) -> None:
    sidecar = write_sidecar(prefix).read_text()
    write_dataset(tmp_path / "a", [[1, 2, 3]])
    Path(f"{prefix}.json").write_text(sidecar)
    with pytest.raises(UserError, match=r"a\.json describes other files"):
        make(prefix)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a dataset description"),
        ('{"format": "megaforge-dataset", "version": 9}', "version 9"),
        ('{"format": "megaforge-dataset", "version": 1, "tokens": "many"}', "\"tokens\" is 'many'"),
    ],
)
def test_bad_sidecars_are_named(prefix: str, text: str, message: str) -> None:
    Path(f"{prefix}.json").write_text(text)
    with pytest.raises(UserError, match=f"a.json.*{message}"):
        make(prefix)


def test_another_tokenizer_is_refused_naming_both(prefix: str) -> None:
    assert make(prefix, checks=DataChecks(fingerprint="b" * 64, eod=0)).notices == [
        f"{prefix} has no .json beside it, so its tokenizer cannot be checked"
    ]
    write_sidecar(prefix)
    assert make(prefix, checks=DataChecks(fingerprint="a" * 64, eod=0)).notices == []
    with pytest.raises(UserError, match=f"{'a' * 64}.*--tokenizer-model.*{'b' * 64}"):
        make(prefix, checks=DataChecks(fingerprint="b" * 64, eod=0))


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2], [999]])
    make(prefix, checks=DataChecks(1000))
    with pytest.raises(UserError, match="d.bin holds token id 999.*0..499"):
        make(prefix, checks=DataChecks(500))
    with pytest.raises(UserError, match="d.bin holds token id 999.*0..998"):
        make(prefix, checks=DataChecks(999))
    write_sidecar(prefix)
    make(prefix, checks=DataChecks(1000))
    with pytest.raises(UserError, match="d.bin holds ids of a tokenizer of 1,000.*d.json.*500"):
        make(prefix, checks=DataChecks(500))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="token id 999"):
        patch.setattr(run_dataset, "_SCAN_CHUNK", 2)
        make(write_dataset(tmp_path / "late", [[1, 2], [3], [999]]), checks=DataChecks(500))
    with pytest.raises(UserError, match="token id -1"):
        make(write_dataset(tmp_path / "small", [[1, -1]], "int8"), checks=DataChecks(500))
    negative = write_dataset(tmp_path / "n", [[1, -2], [3]], "int32")
    with pytest.raises(UserError, match="n.bin holds token id -2"):
        make(negative, checks=DataChecks(500))
    monkeypatch.setattr(run_dataset, "_SCAN_BYTES", 0)
    data = make(negative, checks=DataChecks(500))
    with pytest.raises(UserError, match="n.bin holds token id -2"):
        data.sample(0)


def test_empty_corpus_and_empty_splits_are_refused(tmp_path: Path) -> None:
    for documents in ([], [[], []]):
        with pytest.raises(UserError, match=r"empty\.bin is empty"):
            make(write_dataset(tmp_path / "empty", documents))
    few = write_dataset(tmp_path / "few", [[1, 2], [3]])
    with pytest.raises(UserError, match="--split 0,1 leaves no training tokens in .*few"):
        make(few, split="0,1")
    with pytest.raises(UserError, match="--split 99,1,0 leaves no documents.*'valid'.*second number"):
        make(few, split="99,1,0").validation()


def test_state_continues_only_the_same_past(tmp_path: Path, prefix: str, other: str) -> None:
    data = make(prefix, other, split="90,10")
    state = data.state(40)
    assert (state["consumed_samples"], state["consumed_tokens"]) == (40, 640)
    data.check_state(state)
    make(prefix, other, split="90,10").check_state(state)
    # A stage that begins where the run stands, or later, leaves its past alone.
    make(prefix, other, split="90,10", changes=(ScheduleChange(40, 64),)).check_state(state)
    for changed, field in (
        (make(prefix, other, split="90,10", seed=6), "seed"),
        (make(prefix, other, split="80,20"), "split"),
        (make(prefix, other, split="90,10", length=32), "samples: --seq-length was 16 and is now 32; restore"),
        (make(prefix, other, split="90,10", changes=(ScheduleChange(39, 64),)), "it read 1 stages.*and now 2;"),
        (make(other, prefix, split="90,10"), "the content of the --data-path files was"),
        (TrainingData([(2, prefix), (1, other)], "90,10", SampleSchedule(5, 16)), "samples: the blend of --data-path"),
    ):
        with pytest.raises(UserError, match=field):
            changed.check_state(state)
    for field, words in (
        ("version", "the version of the data order"),
        ("schedule_digest", "the sample schedule"),
        ("consumed_tokens", "the number of tokens read"),
    ):
        with pytest.raises(UserError, match=f"{words} was 99 and is now"):
            data.check_state({**state, field: 99})
        with pytest.raises(UserError, match=f"no field '{field}'"):
            data.check_state({key: value for key, value in state.items() if key != field})


def test_state_survives_json(prefix: str) -> None:
    data = make(prefix, split="99,1,0")
    data.check_state(json.loads(json.dumps(data.state(12))))


def test_validation_predicts_every_token_once_in_order(tmp_path: Path) -> None:
    documents = [list(range(1, 40)), [], [50, 51], list(range(60, 75))]
    view = make(write_dataset(tmp_path / "d", [[7, 7], *documents]), split="20,80", length=10, **RANGES).validation()
    flat = [token for document in documents for token in document]
    labels: list[int] = []
    for k in range(len(view)):
        sample = view.sample(k)
        labels += sample.tokens[1 : sample.targets + 1].tolist()
        assert sample.tokens[: sample.targets + 1].tolist() == flat[k * 10 : k * 10 + 11]
    assert labels == flat[1:] and len(labels) == labels_of(view)
    assert len(view) == 6 and view.sample(5).tokens[6:].tolist() == [0] * 5
    assert view.sample(5).document_start.tolist() == [False] * 6 + [True] + [False] * 4, "padding is a document apart"
    with pytest.raises(IndexError):
        view.sample(6)


def test_validation_alternates_sources_by_size(tmp_path: Path) -> None:
    prefixes = [write_dataset(tmp_path / f"d{n}", [[1], [n] * 10 * n]) for n in (6, 2)]
    view = make(*prefixes, split="1,1", length=10, **RANGES).validation()
    assert [view.sample(k).source for k in range(len(view))] == [0, 0, 1, 0, 0, 0, 1, 0]


def test_bytes_per_token_weighs_the_sources(tmp_path: Path) -> None:
    one = write_dataset(tmp_path / "a", [[1] * 10, [2] * 30])
    two = write_dataset(tmp_path / "b", [[1] * 10, [2] * 10])
    write_sidecar(one)
    assert make(one, two, split="1,1", **RANGES).bytes_per_token() is None
    write_sidecar(two, text_bytes=450)
    assert make(one, two, split="1,1", **RANGES).bytes_per_token() == pytest.approx((30 * 2.5 + 10 * 4.5) / 40)
    assert make(one, two, split="1,1", **RANGES).bytes_per_token("test") is None


def test_samples_count_from_zero(prefix: str) -> None:
    with pytest.raises(IndexError):
        make(prefix).sample(-1)


def test_data_with_nothing_to_predict_are_refused(tmp_path: Path) -> None:
    """Documents of one token whose first token does not count; without the mask they predict one another."""
    ones = write_dataset(tmp_path / "ones", [[i] for i in range(20)])
    assert labels_of(make(ones, split="1,1").validation()) == 9
    with pytest.raises(UserError, match="ones: there is nothing to predict in its training part.*--eod-mask-loss"):
        make(ones, split="1,1", eod_mask_loss=True)
    mixed = make(write_dataset(tmp_path / "m", [[1, 2], [3], [4]]), split="1,2", eod_mask_loss=True, **RANGES)
    with pytest.raises(UserError, match="--split 1,2: there is nothing to predict in its 'valid' part"):
        mixed.validation()


def test_datasets_of_their_own_for_validation_and_test(tmp_path: Path, prefix: str, other: str) -> None:
    """All of them is read, in proportion to their sizes; training reads none of it, and no order changes."""
    third = write_dataset(tmp_path / "c", [[7] * 30])
    data, plain = make(prefix, held_out={"valid": [other, third], "test": []}), make(prefix)
    view = data.validation()
    expected = [t for own in data._others["valid"] for t in own.dataset.tokens.tolist()]
    seen = [view.sample(k) for k in range(len(view))]
    assert sum(one.targets for one in seen) == len(expected) - 2, "all but the first token of each is predicted"
    assert {int(t) for one in seen for t in one.tokens} == set(expected) | {0}
    assert all((data.sample(k).tokens == plain.sample(k).tokens).all() for k in range(9))
    assert data.state(9) == plain.state(9) and data.epoch_tokens == plain.epoch_tokens
    with pytest.raises(UserError, match="name datasets of their own by --test-data-path"):
        data.validation("test")


def test_without_weights_each_counts_by_its_size(prefix: str, other: str) -> None:
    data = TrainingData([(None, prefix), (None, other)], "1", SampleSchedule(5, 16))
    sizes = data.epoch_tokens
    assert data.plan.stages[0].weights == pytest.approx([size / sum(sizes) for size in sizes])
    assert data.passes(400)[0] == pytest.approx(data.passes(400)[1], rel=0.05)
