"""Preprocessing: the bytes, one result whatever the workers, compression and restarts, control tokens, bad input."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megaforge.data import fast_bpe
from megaforge.data.preprocess import shard as shard_module
from megaforge.data.preprocess.driver import preprocess
from megaforge.data.preprocess.plan import PreprocessSettings, ShardQueue, Source, cut_into_shards
from megaforge.data.preprocess.shard import SlowEncoder, WorkerSpec, make_encoder
from megaforge.data.sidecar import read_sidecar
from megaforge.data.tokenizer import guess_tokenizer_type, load_tokenizer
from megaforge.errors import UserError
from tests.data.corpus_files import bpe_tokenizer, documents, write_jsonl
from tests.data.datasets import second_reader

for package in ("tokenizers", "sentencepiece", "orjson"):
    pytest.importorskip(package, reason="needs the data extra")
zstandard = pytest.importorskip("zstandard", reason="needs the data extra")


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bpe_tokenizer(tmp_path_factory.mktemp("bpe") / "tok.json")


def settings(corpus: Path | Sequence[Path], prefix: Path, model: str, **changes: Any) -> PreprocessSettings:
    inputs = [corpus] if isinstance(corpus, Path) else corpus
    values: dict[str, Any] = {
        "inputs": tuple(map(str, inputs)),
        "output_prefix": str(prefix),
        "tokenizer_type": guess_tokenizer_type(model),
        "tokenizer_model": model,
        "append_eod": True,
    }
    return PreprocessSettings(**{**values, **changes})


def digests(prefix: str) -> tuple[str, str]:
    """SHA-256 of the two files."""
    bin_digest, idx_digest = (
        hashlib.sha256(Path(f"{prefix}.{kind}").read_bytes()).hexdigest() for kind in ("bin", "idx")
    )
    return bin_digest, idx_digest


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("append_eod", [True, False])
def test_an_independent_reader_finds_the_tokens(fast: bool, append_eod: bool, bpe: str, tmp_path: Path) -> None:
    texts = documents(120)
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    (prefix,) = preprocess(settings(corpus, tmp_path / "p", bpe, fast=fast, append_eod=append_eod))
    tokenizer = load_tokenizer("HuggingFaceTokenizer", bpe)
    eod = [tokenizer.eod] if append_eod else []
    expected = [[tokenizer.encode(text) + eod] if text else [] for text in texts]
    assert second_reader(prefix) == expected
    assert Path(f"{prefix}.idx").stat().st_size == 34 + 12 * sum(map(len, expected)) + 8 * (len(texts) + 1)
    assert not list(tmp_path.glob("*.partial"))


def test_sidecar_describes_the_dataset(bpe: str, tmp_path: Path) -> None:
    texts = documents(50)
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    (prefix,) = preprocess(settings(corpus, tmp_path / "p", bpe))
    content = json.loads(Path(f"{prefix}.json").read_text())
    tokenizer = load_tokenizer("HuggingFaceTokenizer", bpe)
    tokens = Path(f"{prefix}.bin").stat().st_size // 2
    assert content["tokenizer"]["fingerprint"] == tokenizer.fingerprint
    assert (content["documents"], content["sequences"], content["tokens"]) == (50, sum(map(bool, texts)), tokens)
    assert content["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert (content["bin_sha256"], content["idx_sha256"]) == digests(prefix)
    recorded = {"path": str(corpus), "bytes": corpus.stat().st_size}
    assert content["sources"] == [recorded | {"sha256": hashlib.sha256(corpus.read_bytes()).hexdigest()}]
    sidecar = read_sidecar(prefix)
    assert sidecar is not None and sidecar.tokens == tokens


def test_workers_files_compression_and_shards_change_nothing(bpe: str, tmp_path: Path) -> None:
    texts = documents(9000, longest=100)  # about 4 MB: several shards of 1 MiB
    whole = write_jsonl(tmp_path / "c.jsonl", texts)
    content = whole.read_bytes()
    assert len(content) > 3 << 20
    middle = content.index(b"\n", len(content) // 3) + 1
    parts = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.jsonl.zst"]
    parts[0].write_bytes(content[:middle])
    parts[1].write_bytes(gzip.compress(content[middle:]))
    parts[2].write_bytes(zstandard.compress(content))
    results = set()
    for number, (corpus, changes) in enumerate(
        [
            (whole, {}),
            (whole, {"workers": 2, "shard_mb": 1}),
            (whole, {"workers": 3, "shard_mb": 1, "fast": False}),
            (parts[:2], {"shard_mb": 1}),
            (parts[:2], {"shard_mb": 1, "workers": 2}),
            (parts[2], {"shard_mb": 1}),
            (parts[2], {"shard_mb": 1, "workers": 2}),
        ]
    ):
        (prefix,) = preprocess(settings(corpus, tmp_path / f"p{number}", bpe, **changes))
        results.add(digests(prefix))
    assert len(results) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_share_out_every_shard_once(size: int, tmp_path: Path) -> None:
    sources = [Source(name, count, 0, "") for name, count in (("a", 10), ("b", 95), ("c.gz", 60), ("d", 5), ("e", 7))]
    ranks = []
    for rank in range(size):
        queue, given = ShardQueue(cut_into_shards(sources, 20), rank, size), []
        while (shard := queue.next()) is not None:
            given.append(shard)
            queue.finished(shard, end=shard.open_ended and shard.segments[0][1] >= 100)
        ranks.append(given)
    ranges = sorted(segment for given in ranks for shard in given for segment in shard.segments if segment[0] != 2)
    assert ranges == [(0, 0, None), (1, 0, 20), (1, 20, 40), (1, 40, 60), (1, 60, 80), (1, 80, None)] + [
        (3, 0, None),
        (4, 0, None),
    ]
    assert max(sum(not shard.open_ended for shard in given) for given in ranks) <= -(-7 // size) + 1
    stream = sorted(s.segments[0][1] for given in ranks for s in given if s.open_ended)
    assert stream[:6] == [0, 20, 40, 60, 80, 100] and len(stream) == len(set(stream)) <= 5 + size


@pytest.mark.parametrize("fast", [True, False])
def test_literal_control_tokens_stay_text(fast: bool, bpe: str, tmp_path: Path) -> None:
    if fast:
        pytest.importorskip("gigatoken", reason="needs the data extra")
    texts = ["<|endoftext|>", "a<|endoftext|>b<|pad|>", "x <|endoftext|>\n<|endoftext|>", "plain"]
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    (prefix,) = preprocess(settings(corpus, tmp_path / "p", bpe, fast=fast))
    tokenizer = load_tokenizer("HuggingFaceTokenizer", bpe)
    for text, (sequence,) in zip(texts, second_reader(prefix), strict=True):
        assert sequence[-1] == tokenizer.eod
        assert not {0, 1} & set(sequence[:-1])
        assert tokenizer.decode(sequence) == text


def test_the_fast_path_is_used_and_equal(bpe: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gigatoken", reason="needs the data extra")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", bpe)
    definition = fast_bpe.fast_definition(tokenizer)
    assert definition is not None
    encoder = fast_bpe.FastEncoder(definition)
    texts = documents(400, seed=9)
    assert fast_bpe.prove(tokenizer, encoder, texts) is None
    slow = SlowEncoder(tokenizer).encode(texts)
    assert all(np.array_equal(a, b) for a, b in zip(encoder.encode(texts), slow, strict=True))


def test_the_fast_encoder_may_forget_what_it_knows(bpe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken", reason="needs the data extra")
    tokenizer = load_tokenizer("HuggingFaceTokenizer", bpe)
    encoder = fast_bpe.FastEncoder(str(fast_bpe.fast_definition(tokenizer)))
    first = encoder._backend
    monkeypatch.setattr(encoder, "_limit", 0)
    texts = documents(30)
    before = [array.tolist() for array in encoder.encode(texts)]
    assert encoder._backend is not first
    assert [array.tolist() for array in encoder.encode(texts)] == before == tokenizer.encode_batch(texts)


@pytest.mark.parametrize("fault", ["wrong", "panics"])
def test_a_fast_path_that_errs_is_not_used(
    fault: str, bpe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gigatoken", reason="needs the data extra")

    class Panic(BaseException):
        pass

    def encode(self: fast_bpe.FastEncoder, texts: Sequence[str]) -> list[np.ndarray]:
        if fault == "panics":
            raise Panic("in Rust")
        return [np.array([7] * (len(text) // 4), np.uint32) for text in texts]

    corpus = write_jsonl(tmp_path / "c.jsonl", documents(30))
    (expected,) = preprocess(settings(corpus, tmp_path / "slow", bpe, fast=False))
    monkeypatch.setattr(fast_bpe.FastEncoder, "encode", encode)
    (prefix,) = preprocess(settings(corpus, tmp_path / "p", bpe))
    assert digests(prefix) == digests(expected)
    assert capsys.readouterr().err.count("the fast path (gigatoken) is off") == 1


def test_the_slow_encoder_may_cut_long_documents(bpe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer("HuggingFaceTokenizer", bpe)
    assert tokenizer.cuts_at_lines
    monkeypatch.setattr(shard_module, "_SLOW_BATCH", 40)
    source = random.Random(0)
    ends = ["\n", "\n\n", " \n", "\n  ", "\r\n", "\n\t", "\n'", "\n\u2028"]
    texts = ["".join(source.choices(["a1", "return", ";", " x", "é", "'s", *ends], k=80)) for _ in range(30)]
    texts += ["short", "", *documents(40, seed=4, longest=200)]
    texts += ["\n".join(source.choices(["a", "b)", "12", "", " d", "é", "'ll"], k=400)) for _ in range(30)]
    cuts = [list(shard_module._cut_at_lines(text)) for text in texts]
    assert max(map(len, cuts)) > 5 and ["".join(parts) for parts in cuts] == texts
    expected = tokenizer.encode_batch(texts)
    assert [array.tolist() for array in SlowEncoder(tokenizer).encode(texts)] == expected


def test_sentencepiece_and_null_tokenizers(tmp_path: Path) -> None:
    from megaforge.data.train_tokenizer import TokenizerSettings, train_tokenizer

    texts = documents(60)
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    model = str(tmp_path / "sp.model")
    train_tokenizer(TokenizerSettings((str(corpus),), model, 420, kind="sentencepiece"))
    (prefix,) = preprocess(settings(corpus, tmp_path / "sp", model, workers=2))
    tokenizer = load_tokenizer("SentencePieceTokenizer", model)
    assert second_reader(prefix) == [[[*tokenizer.encode(t), tokenizer.eod]] if t else [] for t in texts]

    numbers = write_jsonl(tmp_path / "n.jsonl", ["1 2 3", "", "70000"], key="ids")
    (prefix,) = preprocess(settings(numbers, tmp_path / "n", "80000", json_keys=("ids",)))
    assert prefix.endswith("n_ids_document")
    assert second_reader(prefix) == [[[1, 2, 3, 80000]], [], [[70000, 80000]]]


BAD_LINES = ['{"text": "half', '{"body": "x"}', '{"text": 3}', "[1]", '"text"', '{"text": "\\ud800"}']


@pytest.mark.parametrize(("bad", "workers"), [*((bad, 1) for bad in BAD_LINES), (BAD_LINES[0], 2)])
def test_a_bad_line_is_named_with_its_file_and_number(bad: str, workers: int, bpe: str, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in documents(3500 if workers == 2 else 30, longest=100)]
    lines.insert(len(lines) - 10, bad)
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("\n".join(lines) + "\n\n")
    with pytest.raises(UserError, match=rf"{corpus}, line {len(lines) - 10}: .*--on-error skip"):
        preprocess(settings(corpus, tmp_path / "p", bpe, workers=workers, shard_mb=1))
    assert not list(tmp_path.glob("p*document.???"))


def test_bad_lines_can_be_skipped_and_are_reported(
    bpe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = documents(6000, longest=100)
    lines = [json.dumps({"text": text}) for text in texts]
    clean = write_jsonl(tmp_path / "clean.jsonl", texts)
    for at, bad in ((5990, "{"), (3000, '{"body": 1}'), (4, "")):
        lines.insert(at, bad)
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("\n".join(lines))
    (prefix,) = preprocess(settings(corpus, tmp_path / "p", bpe, on_error="skip", workers=2, shard_mb=1))
    errors = capsys.readouterr().err
    assert f"left out 1: the record has no key 'text'; for example {corpus}, line 3002 (--json-key)" in errors
    assert f"left out 1: not valid JSON; for example {corpus}, line 5993 (" in errors
    assert f"left out 2 in all (--on-error skip) listed in {prefix}.skipped.tsv" in errors
    assert len(Path(f"{prefix}.skipped.tsv").read_text().splitlines()) == 2
    sidecar = json.loads(Path(f"{prefix}.json").read_text())
    assert sidecar["skipped_lines"] == 2
    assert sidecar["skipped"] == {"the record has no key 'text'": 1, "not valid JSON": 1}
    (expected,) = preprocess(settings(clean, tmp_path / "q", bpe))
    assert digests(prefix) == digests(expected)


class Interrupted(Exception):
    """Stands for a kill."""


class CountingEncoder:
    """The reference encoder, which counts texts and can stop after some."""

    def __init__(self, spec: WorkerSpec, limit: int | None) -> None:
        self.inner, self.count, self.limit = make_encoder(spec), 0, limit

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        self.count += len(texts)
        if self.limit is not None and self.count > self.limit:
            raise Interrupted
        return self.inner.encode(texts)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Any:
    made: list[CountingEncoder] = []
    limits: list[int | None] = []

    def make(spec: WorkerSpec) -> CountingEncoder:
        made.append(CountingEncoder(spec, limits[0]))
        return made[-1]

    def run(limit: int | None, wanted: PreprocessSettings) -> tuple[int, list[str] | None]:
        limits[:] = [limit]
        try:
            return -1, preprocess(wanted)
        except Interrupted:
            return made[-1].count, None

    monkeypatch.setattr(shard_module, "make_encoder", make)
    return run, made


def test_finished_shards_survive_and_damaged_ones_do_not(counted: Any, bpe: str, tmp_path: Path) -> None:
    run, made = counted
    corpus = write_jsonl(tmp_path / "c.jsonl", documents(9000, longest=100))
    wanted = settings(corpus, tmp_path / "p", bpe, fast=False, shard_mb=1)
    _, (expected,) = run(None, settings(corpus, tmp_path / "q", bpe, fast=False))
    done, _ = run(6500, wanted)
    kept = sorted((tmp_path / "p_text_document.partial").glob("*.manifest.json"))
    assert len(kept) >= 2
    run(None, wanted)
    finished = made[-1].count
    assert 0 < finished < 9000 - 2000
    assert digests(str(tmp_path / "p_text_document")) == digests(expected)

    run(6500, PreprocessSettings(**{**vars(wanted), "force": True}))
    damaged = sorted((tmp_path / "p_text_document.partial").glob("*.bin"))[0]
    data = bytearray(damaged.read_bytes())
    data[100] ^= 1
    damaged.write_bytes(data)
    run(None, PreprocessSettings(**{**vars(wanted), "force": True}))
    assert made[-1].count > finished
    assert digests(str(tmp_path / "p_text_document")) == digests(expected)


def test_other_settings_or_text_start_afresh(counted: Any, bpe: str, tmp_path: Path) -> None:
    run, made = counted
    texts = documents(6500, longest=100)
    corpus = write_jsonl(tmp_path / "c.jsonl", texts)
    wanted = settings(corpus, tmp_path / "p", bpe, fast=False, shard_mb=1)
    run(5500, wanted)
    assert list((tmp_path / "p_text_document.partial").glob("*.manifest.json"))
    run(None, PreprocessSettings(**{**vars(wanted), "append_eod": False}))
    assert made[-1].count == 6500
    run(5500, PreprocessSettings(**{**vars(wanted), "force": True}))
    write_jsonl(corpus, [text[::-1] for text in texts])  # the same size, another text
    run(None, PreprocessSettings(**{**vars(wanted), "force": True}))
    assert made[-1].count == 6500


def test_an_up_to_date_dataset_is_left_alone(
    counted: Any, bpe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, made = counted
    corpus = write_jsonl(tmp_path / "c.jsonl", documents(20))
    wanted = settings(corpus, tmp_path / "p", bpe, fast=False)
    run(None, wanted)
    run(None, wanted)
    assert len(made) == 1 and "already made" in capsys.readouterr().err
    Path(tmp_path / "p_text_document.bin").write_bytes(b"")
    run(None, wanted)
    assert len(made) == 2, "what the same command made and lost is made again"


def test_another_dataset_is_replaced_only_by_force(counted: Any, bpe: str, tmp_path: Path) -> None:
    run, made = counted
    corpus = write_jsonl(tmp_path / "c.jsonl", documents(20))
    moved = tmp_path / "elsewhere" / "d.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(corpus.read_bytes())
    wanted = settings(corpus, tmp_path / "new" / "directory" / "p", bpe, fast=False)
    _, (prefix,) = run(None, wanted)
    run(None, dataclasses.replace(wanted, inputs=(str(moved),)))
    assert len(made) == 1, "the same text from another place"
    before = digests(prefix)
    write_jsonl(corpus, documents(20, seed=2))
    for changes, reason in (
        ({}, "made from other text"),
        ({"append_eod": False}, "made with another choice of settings"),
    ):
        with pytest.raises(UserError, match=f"exists .{reason}.; .*--force"):
            run(None, dataclasses.replace(wanted, **changes))
        assert digests(prefix) == before
    run(5, dataclasses.replace(wanted, force=True))
    run(None, wanted)
    assert digests(prefix) != before, "a forced run that was killed goes on without another --force"

    Path(f"{prefix}.json").write_text('{"my": "notes"}')
    with pytest.raises(UserError, match="not described by a .json of this tool"):
        run(None, wanted)
    for kind in ("bin", "idx"):
        Path(f"{prefix}.{kind}").unlink()
    with pytest.raises(UserError, match="not described"):
        run(None, wanted)
    assert Path(f"{prefix}.json").read_text() == '{"my": "notes"}'


def test_many_bad_lines_are_counted_and_the_first_are_named(
    bpe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "fine"}\n' + "{]\n" * 2500)
    (prefix,) = preprocess(settings(corpus, tmp_path / "p", bpe, on_error="skip", fast=False))
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    assert len(errors) == 2 and errors[0].startswith("left out 2,500: not valid JSON; for example")
    assert "left out 2,500 in all (--on-error skip), 1,000 of them listed" in errors[1]
    assert json.loads(Path(f"{prefix}.json").read_text())["skipped_lines"] == 2500


def test_text_files_are_one_document_each(bpe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [text for text in documents(4) if text]
    paths = []
    for number, text in enumerate(texts):
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_text(text)
    (prefix,) = preprocess(settings(paths, tmp_path / "p", bpe, fast=False))
    tokenizer = load_tokenizer("HuggingFaceTokenizer", bpe)
    expected = [[[*tokenizer.encode(text.replace("\r\n", "\n")), tokenizer.eod]] for text in texts]
    assert second_reader(prefix) == expected
    assert f"{paths[0]}: one document" in capsys.readouterr().err


def test_what_cannot_work_is_refused_by_name(bpe: str, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", documents(5))
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    blank = write_jsonl(tmp_path / "blank.jsonl", ["", ""])
    bare = tmp_path / "bare.json"
    definition = json.loads(Path(bpe).read_text())
    bare.write_text(json.dumps({**definition, "added_tokens": []}))
    out = tmp_path / "p"
    cases = [
        (settings(empty, out, bpe), "corpus is empty"),
        (settings(blank, out, bpe), "corpus is empty"),
        (settings(tmp_path / "none.jsonl", out, bpe), "none.jsonl: No such file"),
        (settings(corpus, out, bpe, workers=0), "--workers 0"),
        (settings(corpus, corpus / "p", bpe), "--output-prefix"),
        (settings(corpus, out, str(bare)), "--eod-token"),
        (settings(corpus, out, bpe, eod_token="<nope>"), "<nope>"),
        (settings(corpus, out, bpe, json_keys=("text", "text")), "--json-keys"),
    ]
    for wanted, message in cases:
        with pytest.raises(UserError, match=message):
            preprocess(wanted)
    assert not [path for path in tmp_path.glob("p*") if path.suffix in (".bin", ".idx", ".json")]
    assert not list(tmp_path.glob("p*.partial/*.bin"))


def test_parquet_gives_the_tokens_of_the_same_lines(bpe: str, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs the parquet extra")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = documents(9000, longest=100)
    lines = write_jsonl(tmp_path / "c.jsonl", texts)
    table = tmp_path / "c.parquet"
    parquet.write_table(arrow.table({"text": texts}), table, row_group_size=1000)
    assert len(cut_into_shards([Source.of(str(table), "text")], 1 << 20)[0]) > 2
    (expected,) = preprocess(settings(lines, tmp_path / "q", bpe))
    for number, workers in enumerate((1, 2)):
        (prefix,) = preprocess(settings(table, tmp_path / f"p{number}", bpe, workers=workers, shard_mb=1))
        assert digests(prefix) == digests(expected)
