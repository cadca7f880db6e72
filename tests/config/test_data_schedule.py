"""Data schedules as files: what they say, what stands on what, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaforge.config.cli import parse_config
from megaforge.config.data_schedule import (
    DataSchedule,
    Range,
    SourceFacts,
    Stretch,
    day,
    facts_from,
    joined,
    read_schedule,
    schedule_names,
)
from megaforge.config.yaml_files import preset_names
from megaforge.data.data_source import FILES, unread_settings
from megaforge.errors import UserError
from tests.data.datasets import write_dataset


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("max_epochs: 3\ntemperature: 2\nstretches: [{samples: 5}, {}]\n")
    schedule = read_schedule(
        write(
            tmp_path / "own.yaml",
            "base: base.yaml\n"
            "sources:\n  web: {domain: web, date: 2024-05-01, quality: 0.5}\n  7: {max_epochs: 1}\n"
            "domains: {web: 3, code: 1}\n"
            "stretches:\n"
            "- {tokens: 2K, seq_length: 16, difficulty: {most: 0.5}}\n"
            "- {samples: 9, domains: {code: 1}, quality: {least: 0.25, most: 0.5}, date: {least: 2024-02}}\n"
            "- {temperature: 1, half_life_days: 30}\n",
        )
    )
    assert schedule.max_epochs == 3 and not schedule.optional
    assert schedule.sources == {
        "web": SourceFacts("web", quality=0.5, date=day("2024-05-01")),
        "7": SourceFacts(max_epochs=1.0),
    }
    one, two, three = schedule.stretches
    assert one == Stretch(None, 2000, 16, {"web": 3, "code": 1}, 2.0, {"difficulty": Range(None, 0.5)})
    assert two.domains == {"code": 1} and str(two.buckets["quality"]) == "at least 0.25 and at most 0.5"
    assert two.buckets["date"].least == day("2024-02-01") and three == Stretch(
        domains={"web": 3, "code": 1}, half_life_days=30
    )
    assert schedule.starts(1024, 1) == [0, 125, 134] and schedule.starts(1024, 8) == [0, 128, 137]
    empty = read_schedule(write(tmp_path / "empty.yaml", ""))
    assert empty == DataSchedule(str(tmp_path / "empty.yaml"))


def test_schedules_of_ours_and_what_is_added_to_them(tmp_path: Path) -> None:
    assert schedule_names() == ["corpus/extended", "corpus/reason", "corpus/standard"]
    (standard,) = read_schedule("corpus/standard").stretches
    assert standard.domains == {"web": 60, "books": 20, "code": 15, "academic": 5}
    (more,) = read_schedule("corpus/standard+reason").stretches
    assert sum(more.domains.values()) == 1.25 * sum(standard.domains.values())
    own = write(tmp_path / "a+b.yaml", "base: corpus/extended\noptional: false\n")
    assert read_schedule(own).stretches == read_schedule("corpus/extended").stretches
    assert "reasoning" in read_schedule("corpus/extended+reason").stretches[0].domains
    for name in preset_names():
        if name.startswith(("cdrmix-core-", "cdrmix-reason-", "moe-5b")):
            config = parse_config(["--config", name]).config
            assert config.data.data_schedule is not None and read_schedule(config.data.data_schedule).optional
            large = name.endswith(("40b", "200b"))
            assert config.data.data_schedule.startswith("corpus/extended" if large else "corpus/standard")
            assert config.data.data_schedule.endswith("+reason") == ("reason" in name)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("stretchs: []", "unknown key 'stretchs'; did you mean stretches?"),
        ("- 1", "expected keys such as stretches: and domains:"),
        ("a: [", "is not YAML"),
        ("domains: {web: -1}", "domains: expected shares of at least 0 with a sum above 0, found {'web': -1}"),
        ("domains: {web: 0}", "with a sum above 0"),
        ("domains: web", "domains: expected shares by name"),
        ("domains: {web: x}", "domains: expected a number"),
        ("stretches: []", "stretches: expected a list"),
        ("stretches: [3]", "stretch 1: expected keys such as samples, tokens, seq_length, found 3"),
        ("stretches: [{samples: 4}]", "stretch 1: the last one goes on to the end of the run"),
        ("stretches: [{}, {}]", "stretch 1: say how long it is"),
        ("stretches: [{samples: 0}, {}]", "stretch 1: samples: expected a whole number of at least 1, found 0"),
        ("stretches: [{samples: 1, tokens: 1}, {}]", "stretch 1: samples and tokens say the same thing twice"),
        ("stretches: [{tokens: 2 B}, {}]", "stretch 1: tokens: expected a number such as 250000 or 2B"),
        ("samples: 4", "samples: is a stretch's"),
        ("temperature: 0", "temperature: expected a number above 0"),
        ("temperature: .inf", "temperature: expected a number"),
        ("quality: 0.5", "quality: expected {least: X}, {most: Y} or both"),
        ("quality: {least: 0.5, most: 0.4}", "quality: nothing lies between these"),
        ("quality: {least: 5}", "quality: expected a number from 0 to 1"),
        ("sources: {a: {domian: web}}", "source a: unknown key 'domian'; did you mean domain?"),
        ("sources: {a: {date: May}}", "source a: date: expected a date such as 2024-05-01, found 'May'"),
        ("sources: [a]", "sources: expected names of datasets"),
        ("optional: 1", "optional: expected true or false"),
        ("base: own.yaml", "base: 'own.yaml' is not another schedule"),
        ("base: corpus/standrd", "no schedule has this name; did you mean corpus/standard?"),
        ("base: none.yaml", "none.yaml: cannot be read .No such file"),
    ],
)
def test_what_cannot_be(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=f"--data-schedule .*{complaint}"):
        read_schedule(write(tmp_path / "own.yaml", text))


def test_lengths_fit_the_run(tmp_path: Path) -> None:
    file = write(tmp_path / "own.yaml", "stretches: [{samples: 8, seq_length: 24}, {}]")
    data = ("--data-path", write_dataset(tmp_path / "d", [[1, 2, 3]]), "--data-schedule", file)
    FILES.check(parse_config([*data, "--seq-length", "32"]).config)
    for flags, complaint in (
        (("--seq-length", "16"), "stretch 1 has seq_length 24, and --seq-length 16 is the longest"),
        (("--seq-length", "32", "--cp", "8"), "stretch 1 has seq_length 24, .*a multiple of 16, such as 16"),
    ):
        with pytest.raises(UserError, match=complaint):
            FILES.check(parse_config([*data, *flags]).config)
    told = list(unread_settings(parse_config(["--mock-data", "--data-schedule", file]).config.data))
    assert told == [f"--data-schedule {file}: --mock-data does not heed it: it changes nothing"]
    assert not list(unread_settings(parse_config(["--mock-data", "--data-schedule", "corpus/standard"]).config.data))


def test_facts() -> None:
    known = facts_from({"domain": "web", "quality": 7, "date": "2024", "other": 1})
    assert known == SourceFacts("web", date=day(2024))
    assert joined(SourceFacts(quality=0.5), known) == SourceFacts("web", 0.5, date=day(2024))
    with pytest.raises(ValueError, match="expected a date"):
        day("2024-13-01")
