"""Global batches: the same samples in the same order for any ranks, workers, batch sizes, resumes and run lengths."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from pathlib import Path

import pytest
import torch

from megaforge.config.batch_schedule import BatchSchedule
from megaforge.data.sample_schedule import ScheduleChange
from megaforge.data.samples import Batch, DataChecks, GlobalBatchLoader, SampleSchedule, TrainingData
from megaforge.errors import UserError
from tests.data.datasets import labels_of, random_documents, write_dataset

LENGTH, GLOBAL = 32, 16
WHOLE = BatchSchedule(GLOBAL)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("order")
    return [write_dataset(folder / f"s{i}", random_documents(i, 90, 60)) for i in range(2)]


def make(prefixes: list[str], **options: object) -> TrainingData:
    schedule = SampleSchedule(3, LENGTH, options.pop("changes", ()), lanes=5)  # type: ignore[arg-type]
    return TrainingData(list(zip((0.75, 0.25), prefixes, strict=True)), "98,2", schedule, **options)  # type: ignore[arg-type]


def global_batches(
    data: TrainingData,
    dp: int,
    micro: int,
    workers: int,
    consumed: int,
    count: int,
    batches: BatchSchedule = WHOLE,
) -> list[torch.Tensor]:
    """The ranks' micro-batches put back together: per global batch int64 [size, 3, s] of tokens, labels, starts."""
    loaders = [GlobalBatchLoader(data, batches, micro, rank, dp, consumed, workers) for rank in range(dp)]
    whole = []
    for ranks in itertools.islice(zip(*loaders, strict=True), count):
        rows = []
        for micro_batches in zip(*ranks, strict=True):
            for batch in micro_batches:
                assert batch.tokens.shape == batch.labels.shape == (micro, batch.tokens.shape[1])
                rows.append(torch.stack([batch.tokens, batch.labels, batch.document_start.long()], dim=1))
        whole.append(torch.cat(rows))
    assert all(loader.consumed_samples == consumed + sum(map(len, whole)) for loader in loaders)
    return whole


def digest(batches: list[torch.Tensor]) -> str:
    stream = hashlib.sha256()
    for batch in batches:
        for row in batch:
            stream.update(row.numpy().tobytes())
    return stream.hexdigest()


def test_data_order(prefixes: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """One digest of the first half epoch, however it is read; then of three epochs, which must begin with it."""
    data = make(prefixes)
    steps = sum(data.epoch_tokens) // (2 * LENGTH * GLOBAL)
    identities = [data.locate(k) for k in range(steps * GLOBAL)]
    reference = digest(
        [torch.stack([direct(data, k) for k in range(g * GLOBAL, (g + 1) * GLOBAL)]) for g in range(steps)]
    )
    digests = {}
    for dp, micro, workers in [(1, 16, 0), (1, 1, 2), (2, 4, 1), (2, 8, 0), (4, 2, 3), (4, 4, 0), (1, 4, 5)]:
        digests[f"dp {dp}, micro-batch {micro}, {workers} workers"] = digest(
            global_batches(make(prefixes), dp, micro, workers, 0, steps)
        )
    digests["global batch 8"] = digest(global_batches(data, 2, 2, 1, 0, 2 * steps, BatchSchedule(8)))
    stop = random.Random(LENGTH).randrange(1, steps)
    before = global_batches(make(prefixes), 4, 2, 2, 0, stop)
    resumed = make(prefixes)
    resumed.check_state(data.state(stop * GLOBAL))
    after = global_batches(resumed, 2, 1, 1, stop * GLOBAL, steps - stop)
    digests[f"dp 4 killed at step {stop}, resumed at dp 2"] = digest(before + after)
    extended = global_batches(make(prefixes), 1, 16, 1, 0, 6 * steps)
    digests["extended from 0.5 to 3 epochs"] = digest(extended[:steps])
    with capsys.disabled():
        print(f"\ndata order of the first {len(identities)} samples: {reference}")
    assert {name: value for name, value in digests.items() if value != reference} == {}
    assert len(set(identities)) == len(identities)


def direct(data: TrainingData, k: int) -> torch.Tensor:
    sample = data.sample(k)
    return torch.stack([sample.tokens[:-1], sample.tokens[1:], sample.document_start[:-1].long()])


def test_batches_share_nothing_between_ranks(prefixes: list[str]) -> None:
    data = make(prefixes)
    rows = global_batches(data, 4, 2, 0, 32, 1)[0]
    assert [row.tolist() for row in rows] == [direct(data, k).tolist() for k in range(32, 48)]


def test_loader_goes_on_from_what_it_handed_out(prefixes: list[str]) -> None:
    """Batches built ahead but never handed out are not counted as read."""
    loader = GlobalBatchLoader(make(prefixes), BatchSchedule(GLOBAL), 8, num_workers=3)
    first = [next(iter(loader)) for _ in range(3)]
    assert loader.consumed_samples == 3 * GLOBAL
    straight = list(itertools.islice(GlobalBatchLoader(make(prefixes), BatchSchedule(GLOBAL), 8), 3))
    for ours, expected in zip(first, straight, strict=True):
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(ours, expected, strict=True))


def test_batch_dtypes_and_mask(prefixes: list[str]) -> None:
    (batch,) = next(iter(GlobalBatchLoader(make(prefixes), BatchSchedule(4), 4)))
    assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert (batch.loss_mask.dtype, batch.document_start.dtype) == (torch.float32, torch.bool)
    assert torch.equal(batch.loss_mask, torch.ones(4, LENGTH))
    assert batch.later == ()
    tensors = (batch.tokens, batch.labels, batch.loss_mask, batch.document_start)
    assert all(tensor.is_contiguous() for tensor in tensors)
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])


def test_loss_is_masked_where_the_next_document_begins(prefixes: list[str]) -> None:
    data = make(prefixes, eod_mask_loss=True)
    (batch,) = next(iter(GlobalBatchLoader(data, BatchSchedule(4), 4)))
    expected = torch.stack([~data.sample(row).document_start[1:] for row in range(4)]).float()
    assert torch.equal(batch.loss_mask, expected) and 0 < expected.sum() < 4 * LENGTH


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("eod_mask_loss", [False, True])
@pytest.mark.parametrize("ahead", [1, 2, 5, 40])
def test_later_labels_are_the_stream_itself(prefixes: list[str], micro: int, eod_mask_loss: bool, ahead: int) -> None:
    """One stream, whose samples follow each other: what comes after each token is read off it, wherever samples end."""
    data = TrainingData([(1.0, prefixes[0])], "1", SampleSchedule(3, LENGTH), eod_mask_loss=eod_mask_loss)
    samples = [data.sample(k) for k in range(6)]
    stream = torch.cat([sample.tokens[:-1] for sample in samples])
    starts = torch.cat([sample.document_start[:-1] for sample in samples])
    plain = GlobalBatchLoader(data, BatchSchedule(4), micro)
    loader = GlobalBatchLoader(data, BatchSchedule(4), micro, look_ahead=ahead)
    for number, (batch, same) in enumerate(zip(next(iter(loader)), next(iter(plain)), strict=True)):
        for name in ("tokens", "labels", "loss_mask", "document_start"):
            assert torch.equal(getattr(batch, name), getattr(same, name)), name
        assert len(batch.later) == len(batch.same_document) == ahead - 1
        for depth, (labels, mask) in enumerate(batch.later, start=2):
            assert labels.is_contiguous() and mask.is_contiguous() and mask.dtype == torch.float32
            for row in range(micro):
                first = (number * micro + row) * LENGTH
                assert torch.equal(labels[row], stream[first + depth : first + depth + LENGTH]), depth
                begins = [bool(starts[first + i + 1 : first + i + depth + 1].any()) for i in range(LENGTH)]
                assert mask[row].tolist() == [0.0 if eod_mask_loss and one else 1.0 for one in begins], depth
                assert batch.same_document[depth - 2][row].tolist() == [not one for one in begins], depth


def test_later_labels_end_with_a_validation_view(prefixes: list[str]) -> None:
    """Every token is predicted once from every distance, but the first ones, which have nothing so far before them."""
    view = TrainingData([(1.0, prefixes[0])], "50,50", SampleSchedule(3, LENGTH)).validation(sequence_length=24)
    batches = [batch for step in GlobalBatchLoader(view, BatchSchedule(8), 2, look_ahead=4) for batch in step]
    for depth in (2, 3, 4):
        assert sum(int(batch.later[depth - 2][1].sum()) for batch in batches) == labels_of(view) - (depth - 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_ends_on_all_ranks_and_counts_each_target_once(prefixes: list[str], workers: int) -> None:
    view = make(prefixes).validation(sequence_length=24)
    per_rank: list[list[list[Batch]]] = [
        list(GlobalBatchLoader(view, BatchSchedule(8), 2, rank, 2, num_workers=workers)) for rank in range(2)
    ]
    assert len(per_rank[0]) == len(per_rank[1]) == -(-len(view) // 8)
    batches = [batch for rank in per_rank for step in rank for batch in step]
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == labels_of(view)
    assert len(view) % 8, "the last global batch must need padding for this test to mean anything"


def test_lengths_change_between_global_batches_only(prefixes: list[str]) -> None:
    data = make(prefixes, changes=(ScheduleChange(8, sequence_length=64),))
    lengths = [
        step[0].tokens.shape[1] for step in itertools.islice(GlobalBatchLoader(data, BatchSchedule(4), 2, 0, 2), 4)
    ]
    assert lengths == [32, 32, 64, 64]
    with pytest.raises(UserError, match="sample 8, inside a global batch of 16"):
        GlobalBatchLoader(data, BatchSchedule(16), 2)
    with pytest.raises(UserError, match="follows sample 2"):
        GlobalBatchLoader(data, BatchSchedule(4), 2, consumed_samples=2)
    GlobalBatchLoader(data, BatchSchedule(16), 2, consumed_samples=8)


def test_indivisible_batches_name_the_flags(prefixes: list[str]) -> None:
    with pytest.raises(UserError, match="--global-batch-size 10 .*--micro-batch-size 4 .* 2 data-parallel ranks; 8 is"):
        GlobalBatchLoader(make(prefixes), BatchSchedule(10), 4, 0, 2)
    with pytest.raises(UserError, match="--rampup-batch-size: a batch of 4 .* 2 data-parallel ranks; 8 is"):
        GlobalBatchLoader(make(prefixes), BatchSchedule(16, (4, 4, 90)), 4, 0, 2)


def test_batches_that_grow_read_the_same_samples(prefixes: list[str]) -> None:
    """8, 8, 8, 12, 12, 16: of one rank, of two, and of two that go on from one in the middle."""
    ramp = BatchSchedule(16, (8, 4, 48))
    whole = global_batches(make(prefixes), 1, 4, 0, 0, 6, ramp)
    assert [len(batch) for batch in whole] == [8, 8, 8, 12, 12, 16]
    expected = digest([torch.stack([direct(make(prefixes), k) for k in range(64)])])
    assert digest(whole) == expected
    assert digest(global_batches(make(prefixes), 2, 2, 2, 0, 6, ramp)) == expected
    resumed = global_batches(make(prefixes), 2, 2, 1, 36, 2, ramp)
    assert digest(whole[:4] + resumed) == expected
    early = dataclasses.replace(ramp, before=24)  # --reset-data after the first three
    assert [len(batch) for batch in global_batches(make(prefixes), 1, 4, 0, 0, 4, early)] == [12, 12, 16, 16]
    assert [len(batch) for batch in global_batches(make(prefixes), 1, 4, 0, 8, 3, early)] == [12, 12, 16]


def test_a_length_may_change_where_a_batch_of_a_ramp_begins(prefixes: list[str]) -> None:
    ramp = BatchSchedule(8, (4, 4, 8))  # 4, 4, 8, 8 ...
    data = make(prefixes, changes=(ScheduleChange(4, sequence_length=64), ScheduleChange(16, sequence_length=32)))
    lengths = [step[0].tokens.shape[1] for step in itertools.islice(GlobalBatchLoader(data, ramp, 2), 4)]
    assert lengths == [32, 64, 64, 32]
    for sample, size in ((2, 4), (12, 8)):
        data = make(prefixes, changes=(ScheduleChange(sample, sequence_length=64),))
        with pytest.raises(UserError, match=f"sample {sample}, inside a global batch of {size}"):
            GlobalBatchLoader(data, ramp, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_reach_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr("megaforge.data.run_dataset._SCAN_BYTES", 0)
    prefix = write_dataset(tmp_path / "d", [[1, 2, 999]])
    data = TrainingData([(1.0, prefix)], "1", SampleSchedule(1, 4), checks=DataChecks(10))
    with pytest.raises(UserError, match="999"):
        next(iter(GlobalBatchLoader(data, BatchSchedule(1), 1, num_workers=workers)))
