"""The whole pipeline: the same bytes at any number of workers and after any kill; nothing is lost without a reason."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megaforge.data.corpus import partition, report, tasks
from megaforge.data.corpus.explain import explain_documents
from megaforge.data.corpus.job import item_name
from megaforge.data.corpus.pipeline import CorpusSettings, prepare_corpus
from megaforge.data.corpus.work import Work
from megaforge.data.indexed_dataset import IndexedDataset
from megaforge.data.preprocess.only_run import only_run
from megaforge.data.preprocess.ranks import SingleRank
from megaforge.data.sidecar import read_sidecar
from megaforge.data.text.readers import open_text
from megaforge.data.tokenizer import load_tokenizer
from megaforge.errors import UserError
from tests.data.corpus_files import bpe_tokenizer

WORDS = "the cat sat on a mat and saw some birds fly over rivers under grey skies near old stone walls".split()
RECIPE = """
partition_mb: 0.02
sources:
  - {name: web, files: [web], domain: web, licence: CC0}
  - {name: notes, files: ["notes/*"], domain: books}
stages:
  - length: {minimum: 20}
  - exact: {buckets: 3}
  - length: {maximum: 1500}
shard: {tokenizer_model: tok.json, length_buckets: [300, 900], jsonl: true, webdataset: true}
"""


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Iterator[None]:
    """The report's own test draws them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_pictures", lambda *arguments: [])
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of sources in every format, with planted duplicates, short, long and empty documents."""
    folder = tmp_path_factory.mktemp("corpus")
    bpe_tokenizer(folder / "tok.json")
    source = random.Random(1)
    texts = [" ".join(source.choices(WORDS, k=source.randint(1, 300))) for _ in range(150)]
    texts += texts[10:30] + ["", "short", "x" * 1600]
    source.shuffle(texts)
    (folder / "web").mkdir()
    (folder / "notes").mkdir()
    lines = [json.dumps({"text": text, "url": f"http://h/{n}"}) + "\n" for n, text in enumerate(texts)]
    (folder / "web" / "a.jsonl").write_text("".join(lines[:100]))
    (folder / "web" / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[100:140]).encode()))
    pq.write_table(pa.table({"text": texts[140:], "license": ["MIT"] * len(texts[140:])}), folder / "web" / "c.parquet")
    for number in range(6):
        (folder / "notes" / f"{number}.md").write_text(texts[number] + "\n" + "note " * number)
    (folder / "web" / "page.html").write_text("<html><body>hello</body></html>")
    (folder / "web" / "picture.png").write_bytes(b"\x89PNG")
    (folder / "corpus.yaml").write_text(RECIPE)
    return folder


def run(world: Path, output: Path, **settings: Any) -> dict[str, str]:
    prepare_corpus(CorpusSettings(str(world / settings.pop("recipe", "corpus.yaml")), str(output), **settings))
    return contents(output)


def contents(output: Path) -> dict[str, str]:
    """SHA-256 of every file by its name in the output, those of the report apart."""
    files = [path for path in output.rglob("*") if path.is_file() and path.suffix not in (".png", ".md", ".html")]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def expected(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The corpus as one undisturbed worker makes it."""
    output = tmp_path_factory.mktemp("made") / "out"
    return output, run(world, output)


def test_every_document_is_kept_or_has_a_reason(world: Path, expected: tuple[Path, dict[str, str]]) -> None:
    output = expected[0]
    rows = [row for file in sorted((output / "lineage").iterdir()) for row in pq.read_table(file).to_pylist()]
    assert len(rows) == 173 + 6 + 1 and len({row["id"] for row in rows}) == len(rows)
    assert all((row["dataset"] is None) != (row["reason"] is None) for row in rows)
    dropped = {row["stage"] for row in rows if row["reason"]}
    assert dropped == {"read", "length", "exact", "length (2)"}
    digests = [row["digest"] for row in rows if row["dataset"]]
    assert len(set(digests)) == len(digests)
    licences = {row["licence"] for row in rows if row["path"].endswith("c.parquet")}
    assert licences == {"MIT"} and {row["licence"] for row in rows if row["source"] == "notes"} == {None}
    assert "not text by its name" in (output / "files.skipped.tsv").read_text()
    manifest = json.loads((output / "corpus.json").read_text())
    assert sum(one["documents"] for one in manifest["datasets"]) == manifest["documents"] == len(digests)
    first, *_, last = manifest["stages"]
    assert first["documents"] == len(rows) and last["kept"] == len(digests)
    for one, following in zip(manifest["stages"], manifest["stages"][1:], strict=False):
        assert one["kept"] == following["documents"]
        assert one["documents"] - one["kept"] == sum(one["reasons"].values())


def test_datasets_hold_the_kept_texts_in_order(world: Path, expected: tuple[Path, dict[str, str]]) -> None:
    """Decoded tokens against the lineage's digests, and the bucket of each document."""
    output = expected[0]
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(world / "tok.json"), None)
    manifest = json.loads((output / "corpus.json").read_text())
    assert {one["name"] for one in manifest["datasets"]} >= {"web-web-l0", "web-web-l1", "web-web-l2", "notes-books-l0"}
    rows = [row for file in sorted((output / "lineage").iterdir()) for row in pq.read_table(file).to_pylist()]
    for one in manifest["datasets"]:
        own = [row for row in rows if row["dataset"] == one["name"]]
        dataset = IndexedDataset(output / one["prefix"])
        assert dataset.num_documents == one["documents"] == len(own) and dataset.num_tokens == one["tokens"]
        starts, lengths = dataset.document_extents()
        low, high = one["characters"]
        for row, start, length in zip(own, starts, lengths, strict=True):
            ids = dataset.tokens[start : start + length].tolist()
            assert ids[-1] == tokenizer.eod
            text = tokenizer.decode(ids[:-1])
            assert hashlib.sha256(text.encode()).hexdigest() == row["final_digest"]
            assert (low or 0) <= row["characters"] < (high or 10**9)
        sidecar = read_sidecar(output / one["prefix"])
        assert sidecar is not None and sidecar.corpus["digest"] == manifest["digest"]
        assert sidecar.corpus["domain"] == one["domain"] and sidecar.corpus["characters"] == one["characters"]


def test_other_tools_read_the_exports(expected: tuple[Path, dict[str, str]]) -> None:
    """JSON Lines, and tar shards by the package that defines them, hold the kept documents in order."""
    webdataset = pytest.importorskip("webdataset", reason="needs the test extra")
    output = expected[0]
    rows = [row for file in sorted((output / "lineage").iterdir()) for row in pq.read_table(file).to_pylist()]
    for name in ("web-web-l0", "notes-books-l1"):
        own = [row for row in rows if row["dataset"] == name]
        with open_text(str(output / "jsonl" / f"{name}.jsonl.zst"), "text") as reader:
            texts = [text for chunk in reader.chunks(None) for text in chunk.texts]
        assert [hashlib.sha256(text.encode()).hexdigest() for text in texts] == [row["final_digest"] for row in own]
        folder = output / "webdataset" / name
        shards = json.loads((folder / "index.json").read_text())["shardlist"]
        urls = [str(folder / shard["url"]) for shard in shards]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode())
        assert [sample["txt"] for sample in samples] == texts
        assert [sample["json"]["path"] for sample in samples] == [row["path"] for row in own]
        assert sum(shard["nsamples"] for shard in shards) == len(own)
        for shard, url in zip(shards, urls, strict=True):
            content = Path(url).read_bytes()
            assert (len(content), hashlib.md5(content).hexdigest()) == (shard["filesize"], shard["md5sum"])


def test_two_workers_give_the_same_bytes(world: Path, expected: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    assert run(world, tmp_path / "out", workers=2) == expected[1]


def test_data_sets_are_read_as_streams(tmp_path: Path) -> None:
    """Two files make two shards of the local builder."""
    pytest.importorskip("datasets", reason="needs the corpus extra")
    for name in "ab":
        lines = [json.dumps({"text": f"{name}{number} " * 30, "url": f"http://{name}/{number}"}) for number in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    recipe = SMALL.replace("files: [s.jsonl]", "hub: json, files: [a.jsonl, b.jsonl]")
    prepare_corpus(small(tmp_path, [], recipe))
    rows = [row for file in sorted((tmp_path / "out" / "lineage").iterdir()) for row in pq.read_table(file).to_pylist()]
    assert [row["url"] for row in rows] == [f"http://{name}/{number}" for name in "ab" for number in range(3)]
    assert {row["path"] for row in rows} == {"json@0/2", "json@1/2"}
    with pytest.raises(UserError, match="sources: s: hub: json: cannot be opened"):
        prepare_corpus(small(tmp_path, [], recipe.replace("a.jsonl", "none.jsonl")))


class Killed(BaseException):
    """The process ends here."""


def counted(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[tuple[str, int]]:
    """Tasks that were begun; the run is killed within the one after ``limit``, before or after its files are there."""
    begun: list[tuple[str, int]] = []
    finish: Callable[..., None] = Work.finish

    def stop(self: Work, phase: str, item: str, result: object) -> None:
        begun.append((phase, int(item)))
        if len(begun) > limit:
            raise Killed
        finish(self, phase, item, result)

    monkeypatch.setattr(Work, "finish", stop)
    return begun


def test_a_killed_run_continues_to_the_same_bytes(
    world: Path, expected: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed again and again, two tasks after each start: none but the one in flight is done twice."""
    output, done = tmp_path / "out", list[tuple[str, int]]()
    for _ in range(200):
        with monkeypatch.context() as patch:
            begun = counted(patch, 2)
            try:
                found = run(world, output)
            except Killed:
                done += begun[:-1]
                assert not (output / "corpus.json").exists()
                continue
            done += begun
            break
    assert len(done) == len(set(done)) > 20, "a finished task was done again"
    assert found == expected[1]


def test_what_stands_there_is_kept_or_refused(
    world: Path, expected: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    output, files = expected
    assert run(world, output) == files and "already made" in capsys.readouterr().err
    (world / "other.yaml").write_text(RECIPE.replace("minimum: 20", "minimum: 30"))
    with pytest.raises(UserError, match="holds a corpus of other sources or another recipe"):
        run(world, output, recipe="other.yaml")
    assert contents(output) == files


def test_explain_says_why(expected: tuple[Path, dict[str, str]]) -> None:
    output = str(expected[0])
    rows = [row for file in sorted((expected[0] / "lineage").iterdir()) for row in pq.read_table(file).to_pylist()]
    copy = next(row for row in rows if row["stage"] == "exact")
    words = explain_documents(output, f"{copy['id'] >> 32}-{copy['id'] & 0xFFFFFFFF}", None, None)
    assert "dropped by exact: the same text as another document (of " in words and copy["digest"] in words
    page = next(row for row in rows if row["url"] == "http://h/5")
    assert f"from web: web/a.jsonl, at {page['place']:,}" in explain_documents(output, None, "http://h/5", None)
    assert "kept, in the dataset notes-books" in explain_documents(output, None, None, "notes/5.md")
    with pytest.raises(UserError, match="--url http://h/999: .* has read no such document"):
        explain_documents(output, None, "http://h/999", None)
    with pytest.raises(UserError, match="no finished corpus"):
        explain_documents(str(expected[0].parent), "0-0", None, None)


SMALL = """
sources:
  - {name: s, files: [s.jsonl], domain: web}
stages: [length]
shard: {jsonl: true}
"""


def small(tmp_path: Path, lines: list[str], recipe: str = SMALL) -> CorpusSettings:
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    (tmp_path / "corpus.yaml").write_text(recipe)
    return CorpusSettings(str(tmp_path / "corpus.yaml"), str(tmp_path / "out"))


def test_bad_records_fail_or_are_skipped(tmp_path: Path) -> None:
    good = json.dumps({"text": "good " * 20})
    settings = small(tmp_path, [good, "", "{bad", '{"text": "\\ud800 ' + "x" * 60 + '"}', good])
    with pytest.raises(UserError, match=r"s.jsonl, line 3: not valid JSON .*pass --on-error skip"):
        prepare_corpus(settings)
    assert not (tmp_path / "out" / "corpus.json").exists()
    prepare_corpus(CorpusSettings(settings.config, settings.output, on_error="skip"))
    manifest = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert manifest["documents"] == 2 and sum(manifest["stages"][0]["reasons"].values()) == 2
    (tmp_path / "s.jsonl").unlink()
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(f"{good}\n".encode() * 30000)[:-4])
    (tmp_path / "corpus.yaml").write_text(SMALL.replace("s.jsonl", "cut.jsonl.gz"))
    fresh = CorpusSettings(settings.config, str(tmp_path / "new"))
    with pytest.raises(UserError, match=r"cut.jsonl.gz: damaged or cut short .*pass --on-error skip"):
        prepare_corpus(fresh)
    prepare_corpus(CorpusSettings(fresh.config, fresh.output, on_error="skip"))
    manifest = json.loads((tmp_path / "new" / "corpus.json").read_text())
    assert manifest["stages"][0]["reasons"] == {"a file that cannot be read on": 1} and manifest["documents"] > 1000


def test_a_corpus_that_a_filter_empties_names_it(tmp_path: Path) -> None:
    settings = small(tmp_path, [json.dumps({"text": "tiny"})] * 3)
    with pytest.raises(UserError, match=r"the corpus is empty: of 3 documents length dropped 3 \(too short\)"):
        prepare_corpus(settings)
    (tmp_path / "empty").mkdir()
    settings = small(tmp_path, [], SMALL.replace("s.jsonl", "empty"))
    with pytest.raises(UserError, match="sources: s: no file to read in empty"):
        prepare_corpus(settings)
    settings = small(tmp_path, [], SMALL.replace("s.jsonl", "none.jsonl"))
    with pytest.raises(UserError, match="sources: s: files: none.jsonl does not exist"):
        prepare_corpus(settings)


def test_a_full_disk_ends_the_run_and_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(tmp_path, [json.dumps({"text": "good " * 20})] * 3)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "write_lineage", full)
        with pytest.raises(
            UserError, match="cannot write somewhere: No space left on device; what is finished is kept"
        ):
            prepare_corpus(settings)
    prepare_corpus(settings)


def test_a_file_that_changes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(tmp_path, [json.dumps({"text": "good " * 20})] * 3)
    read = partition._pieces

    def grow(*arguments: Any) -> Any:
        with (tmp_path / "s.jsonl").open("a") as file:
            file.write("\n")
        return read(*arguments)

    monkeypatch.setattr(partition, "_pieces", grow)
    with pytest.raises(UserError, match="s.jsonl changed since the run began"):
        prepare_corpus(settings)


def test_a_corpus_without_a_duplicate_passes_the_joins(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {number} " * 20}) for number in range(3)]
    prepare_corpus(small(tmp_path, lines, SMALL.replace("[length]", "[exact, length, exact]")))
    manifest = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert manifest["documents"] == 3
    assert [stage["name"] for stage in manifest["stages"]] == ["read", "exact", "length", "exact (2)"]


def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    settings = small(tmp_path, [json.dumps({"text": "good " * 20})] * 3)
    output = Path(settings.output)
    with only_run(output, output / "work", SingleRank(), "--output") as wrong:
        assert wrong is None
        with pytest.raises(UserError, match="another process is writing"):
            prepare_corpus(settings)
    assert item_name(7) == "000007"


def test_every_stage_by_its_name_and_files_that_stages_read(world: Path, tmp_path: Path) -> None:
    (world / "evaluation.txt").write_text("nothing of this is in any of the documents that the test is made of\n")
    (world / "blocked.txt").write_text("unspeakable\n")
    recipe = world / "stages.yaml"
    stages = (
        "[html, normalise, length, heuristics, {blocklist: {words: [blocked.txt]}}, {quality: {least: 0.1}}, pii, "
        "exact, url, {host_cap: {by: host}}, paragraphs, minhash, simhash, {decontaminate: {files: [evaluation.txt]}}]"
    )
    if importlib.util.find_spec("ftfy") is None:
        stages = stages.replace("normalise", "{normalise: {mojibake: false}}")
    recipe.write_text(
        f"sources: [{{name: notes, files: [notes]}}]\nstages: {stages}\nshard: {{tokenizer_model: tok.json}}\n"
    )
    output = tmp_path / "out"
    run(world, output, recipe="stages.yaml")
    manifest = json.loads((output / "corpus.json").read_text())
    assert manifest["documents"] > 0 and len(manifest["stages"]) == 15
    run(world, output, recipe="stages.yaml")
    (world / "evaluation.txt").write_text("another text that is held out, of enough words to be looked for\n")
    with pytest.raises(UserError, match="of other sources or another recipe"):
        run(world, output, recipe="stages.yaml")
