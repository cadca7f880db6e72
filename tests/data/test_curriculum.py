"""Data schedules on datasets: shares, buckets, caps, and one order whatever reads it."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaforge.config.batch_schedule import BatchSchedule
from megaforge.config.cli import parse_config
from megaforge.config.data_schedule import SourceFacts, day, read_schedule
from megaforge.data.augment.source import augmented
from megaforge.data.curriculum import Source, apply_schedule, facts_of
from megaforge.data.data_source import source_kind
from megaforge.data.loader import GlobalBatchLoader
from megaforge.data.sample_schedule import Caps, Plan, SampleSchedule, ScheduleChange
from megaforge.data.samples import TrainingData
from megaforge.errors import UserError
from megaforge.training.lengths import Progress, check_end
from tests.data.datasets import random_documents, write_dataset, write_sidecar


def schedule(tmp_path: Path, text: str) -> Any:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    return read_schedule(str(file))


WEB, NEWS, CODE = (
    Source("corpus/web", 900, SourceFacts("web", quality=0.2, difficulty=0.1, length=30, date=day("2020-01-01"))),
    Source("corpus/news", 100, SourceFacts("web", quality=0.9, difficulty=0.5, length=90, date=day("2022-12-31"))),
    Source("corpus/code", 500, SourceFacts("code", quality=0.6, difficulty=0.9, length=10, date=day("2021-01-01"))),
)


def weights(tmp_path: Path, text: str, *sources: Source) -> list[tuple[float, ...]]:
    found = apply_schedule(schedule(tmp_path, text), sources or (WEB, NEWS, CODE), seq_length=8, unit=1)
    assert found is not None
    totals = [sum(change.weights or ()) for change in found.changes]
    return [
        tuple(round(weight / total, 6) for weight in change.weights or ())
        for change, total in zip(found.changes, totals, strict=True)
    ]


def test_weights(tmp_path: Path) -> None:
    assert weights(tmp_path, "") == [(0.6, pytest.approx(1 / 15, abs=1e-6), pytest.approx(1 / 3, abs=1e-6))]
    assert weights(tmp_path, "domains: {web: 1, code: 3}") == [(0.225, 0.025, 0.75)]
    assert weights(tmp_path, "{domains: {web: 1, code: 1}, temperature: 2}") == [(0.375, 0.125, 0.5)]
    assert weights(tmp_path, "{domains: {web: 1, code: 0}}") == [(0.9, 0.1, 0)]
    buckets = (
        "stretches: [{samples: 4, difficulty: {most: 0.2}}, {samples: 4, length: {most: 40}}, {quality: {least: 0.6}}]"
    )
    assert weights(tmp_path, buckets) == [(1, 0, 0), (0.642857, 0, 0.357143), (0, 0.166667, 0.833333)]
    assert weights(tmp_path, "{date: {least: 2021-06-01}}") == [(0, 1, 0)]
    aged = weights(tmp_path, "{domains: {web: 1}, half_life_days: 1095}")  # web is 1095 days older than news
    assert aged == [(pytest.approx(0.45 / 0.55, abs=1e-6), pytest.approx(0.1 / 0.55, abs=1e-6), 0)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("domains: {wbe: 1}", "stretch 1: domain wbe: no source of --data-path has it; did you mean web."),
        ("{domains: {code: 1}, quality: {least: 0.7}}", "domain code: no source of code there lies in its buckets"),
        ("quality: {least: 0.95}", "stretch 1: no source has quality at least 0.95; corpus/web has quality 0.2"),
        ("sources: {wbe: {}}", "sources has wbe, and --data-path has no such dataset"),
    ],
)
def test_buckets_that_nothing_is_in(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        weights(tmp_path, text)


def test_facts_that_nobody_says(tmp_path: Path) -> None:
    plain = Source("corpus/plain", 10, SourceFacts("web"))
    for text in ("quality: {least: 0.1}", "half_life_days: 3"):
        with pytest.raises(
            UserError, match="nobody says (the quality|that) of corpus/plain: add it to the file: sources"
        ):
            weights(tmp_path, text, plain)
    own = schedule(tmp_path, "sources: {plain: {quality: 0.5}, corpus/plain: {quality: 0.7}}")
    assert facts_of(own, "corpus/plain").quality == 0.7 and facts_of(own, "other/plain").quality == 0.5
    assert facts_of(own, "web") == facts_of(None, "web") == SourceFacts()


def test_optional_schedules_go_by_what_is_there() -> None:
    ours = read_schedule("corpus/standard")
    apply = {"seq_length": 8, "unit": 1}
    assert apply_schedule(ours, [Source("a", 10, SourceFacts())], **apply) is None
    assert apply_schedule(ours, [WEB, CODE], weighted=True, **apply) is None
    found = apply_schedule(ours, [WEB, CODE, Source("m", 9, SourceFacts("music"))], **apply)
    assert found is not None and found.changes[0].weights == (60, 15, 0)
    assert [notice.partition(": ")[2] for notice in found.notices] == [
        "stretch 1: no dataset is of domain books; its 20.0% go to the others",
        "stretch 1: no dataset is of domain academic; its 5.0% go to the others",
        "stretch 1: it gives no share to music, so none of it is read there",
    ]


def walk(plan: Plan, shares: list[list[float]], caps: Caps) -> None:
    """Reads sample by sample: no source beyond its cap, and none left out before it."""
    owner = [source for source, own in enumerate(shares) for _ in own]
    read = [0] * len(shares)
    assert plan.end is not None
    for k in range(plan.end):
        stage = plan.stage_at(k)
        stream, _ = stage.blend.locate(k - stage.start)
        read[owner[stream]] += stage.sequence_length
        for source, cap in enumerate(caps.tokens):
            if cap is not None:
                room = read[source] + stage.sequence_length <= cap
                assert read[source] <= cap and (room or k + 1 == plan.end or not plan.stage_at(k + 1).weights[source])
    with pytest.raises(UserError, match=f"after {plan.end:,} samples, and sample {plan.end:,} was asked for"):
        plan.stage_at(plan.end)


def test_caps() -> None:
    rng = random.Random(7)
    for _ in range(40):
        count = rng.randrange(1, 5)
        shares = [[1 / lanes] * lanes for lanes in (rng.randrange(1, 4) for _ in range(count))]
        caps = Caps(tuple(rng.randrange(0, 900) for _ in range(count)), tuple(rng.randrange(2) for _ in range(count)))
        weights = [rng.uniform(0.01, 1) for _ in range(count)]
        walk(Plan(SampleSchedule(1, rng.randrange(1, 9)), weights, shares, caps), shares, caps)
    changes = (ScheduleChange(9, 2), ScheduleChange(20, 5, (0.1, 0.9)))
    caps = Caps((400, 300), (0, 1))
    plan = Plan(SampleSchedule(1, 4, changes), [0.9, 0.1], [[1.0], [0.5, 0.5]], caps)
    walk(plan, [[1.0], [0.5, 0.5]], caps)
    assert plan.length_starts == [0, 9, 20] and plan.starts[:3] == [0, 9, 20] and len(plan.starts) == 4
    with pytest.raises(UserError, match="after 6 samples what a stretch reads has been read .* to sample 9"):
        Plan(SampleSchedule(1, 4, changes), [1.0, 0.0], None, Caps((26, None), (0, 1)))


def test_a_domain_goes_on_with_its_other_sources() -> None:
    caps = Caps((8, None, None), (0, 0, 1))
    plan = Plan(SampleSchedule(1, 4), [1.0, 3.0, 4.0], None, caps)
    assert [stage.weights for stage in plan.stages] == [(0.125, 0.375, 0.5), (0, 0.5, 0.5)] and plan.end is None


TEXT = """
max_epochs: 40
sources:
  a: {domain: web, quality: 0.2, max_epochs: 2}
  b: {domain: web, quality: 0.8}
  c: {domain: code, quality: 0.5}
domains: {web: 60, code: 40}
stretches:
- {samples: 32, seq_length: 8}
- {tokens: 2K, seq_length: 16, domains: {web: 90, code: 10}}
- {samples: 64, quality: {least: 0.4}}
- {samples: 160, temperature: 3}
- {domains: {web: 1, code: 3}}
"""
FIM = ("--fim-data", "--fim-rate", "0.3", "--fim-domain-rates", "code:0.9")
TOKENS = ("--fim-prefix-token", "990", "--fim-middle-token", "991", "--fim-suffix-token", "992")
LENGTH, GLOBAL = 24, 16


def opened(tmp_path: Path, *flags: str) -> Any:
    paths = [str(tmp_path / name) for name in "abc"]
    if not Path(f"{paths[0]}.bin").exists():
        for seed, path in enumerate(paths):
            write_dataset(Path(path), random_documents(seed, 60, 40, 900))
        (tmp_path / "own.yaml").write_text(TEXT)
    given = ("--data-path", *paths, "--data-schedule", str(tmp_path / "own.yaml"), "--seq-length", str(LENGTH))
    config = parse_config([*given, "--global-batch-size", str(GLOBAL), "--split", "1", *FIM, *TOKENS, *flags]).config
    return augmented(source_kind(config.data).open(config, None), config, None)


def digests(data: Any, dp: int, workers: int, first: int, count: int) -> list[str]:
    """SHA-256 of each global batch, put together from all ranks."""
    micro = 4 if dp < 4 else 2
    loaders = [GlobalBatchLoader(data, BatchSchedule(GLOBAL), micro, rank, dp, first, workers) for rank in range(dp)]
    found = []
    for ranks in itertools.islice(zip(*loaders, strict=True), count):
        whole = hashlib.sha256()
        for micro_batches in zip(*ranks, strict=True):
            for batch in micro_batches:
                for row in zip(batch.tokens.numpy(), batch.labels.numpy(), strict=True):
                    whole.update(row[0].tobytes() + row[1].tobytes())
        found.append(whole.hexdigest())
    return found


def test_one_order_with_five_stretches_and_fill_in_the_middle(tmp_path: Path) -> None:
    """However it is read; killed and resumed at another dp; and read further."""
    data, steps = opened(tmp_path), 30
    reference = digests(data, 1, 0, 0, steps)
    assert len(set(reference)) == steps
    for dp, workers in ((2, 2), (4, 0), (1, 3)):
        assert digests(opened(tmp_path), dp, workers, 0, steps) == reference
    stop = random.Random(5).randrange(1, steps)
    resumed = opened(tmp_path)
    resumed.check_state(data.state(stop * GLOBAL))
    assert digests(resumed, 2, 1, stop * GLOBAL, steps - stop) == reference[stop:]
    assert digests(opened(tmp_path), 4, 1, 0, steps + 9)[:steps] == reference
    lengths = [data.sequence_length(k) for k in (0, 31, 32, 32 + 127, 160, 600)]
    assert lengths == [8, 8, 16, 16, 24, 24]
    assert [opened(tmp_path).domain(k) for k in (0, 1)] == [data.domain(k) for k in (0, 1)]
    unlike = digests(opened(tmp_path, "--fim-rate", "0"), 1, 0, 0, 9)
    assert unlike != reference[:9]


def test_past_stretches_may_not_change_and_later_ones_may(tmp_path: Path) -> None:
    data = opened(tmp_path)
    early, late = data.state(48), data.state(400)
    assert len(early["stages"]) == 2
    file = tmp_path / "own.yaml"
    file.write_text(TEXT.replace("{web: 1, code: 3}", "{web: 1, code: 1}"))
    opened(tmp_path).check_state(early)
    with pytest.raises(UserError, match="the blend of --data-path"):
        opened(tmp_path).check_state(late)
    file.write_text(TEXT.replace("samples: 32, seq_length: 8", "samples: 48, seq_length: 8"))
    with pytest.raises(UserError, match="it read 2 stages .* and now 1"):
        opened(tmp_path).check_state(early)


def test_domains_come_from_the_description_too(tmp_path: Path) -> None:
    data = [write_dataset(tmp_path / name, [[1, 2, 3, 4]] * 8) for name in ("x", "y")]
    for prefix, domain in zip(data, ("web", "code"), strict=True):
        write_sidecar(prefix, corpus={"domain": domain, "quality": 0.5})
    ours = SampleSchedule(1, 4, curriculum=read_schedule("corpus/standard"))
    found = TrainingData([(None, prefix) for prefix in data], "1", ours)
    assert {found.domain(k) for k in range(9)} == {"web", "code"} and found.plan.stages[0].weights == (0.8, 0.2)
    assert found.end is not None, "four epochs"
    check_end(2, Progress(found, BatchSchedule(4)))
    with pytest.raises(UserError, match="--train-iters 20 reads 80 samples, and after .*: make the run shorter"):
        check_end(20, Progress(found, BatchSchedule(4)))
    whole = sum(found.passes(found.end)) / 2
    assert Fraction(3) < whole <= 4
    plain = TrainingData([(None, write_dataset(tmp_path / "z", [[1, 2, 3]]))], "1", ours)
    assert plain.end is None and "data are read as that has them" in plain.notices[-1] and plain.domain(0) is None
    assert json.dumps(found.state(3)) and np.isclose(sum(found.plan.stages[0].weights), 1)
