"""Tokenizers: round trips, control tokens in text, fingerprints, errors; and their training."""

from __future__ import annotations

import base64
import dataclasses
import json
import random
from pathlib import Path
from types import MappingProxyType

import pytest

from megaforge.data import tiktoken_tokenizer
from megaforge.data.tokenizer import Tokenizer, guess_tokenizer_type, load_tokenizer
from megaforge.data.tokenizer_files import there_is
from megaforge.data.train_tokenizer import TokenizerSettings, train_tokenizer
from megaforge.errors import UserError
from tests.data.corpus_files import bpe_tokenizer, documents, write_jsonl

pytest.importorskip("tokenizers", reason="needs the data extra")
pytest.importorskip("sentencepiece", reason="needs the data extra")


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bpe_tokenizer(tmp_path_factory.mktemp("bpe") / "tok.json")


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("sp")
    corpus = write_jsonl(directory / "c.jsonl", documents(300, seed=5))
    train_tokenizer(TokenizerSettings((str(corpus),), str(directory / "sp.model"), 420, kind="sentencepiece"))
    return str(directory / "sp.model")


def load(path: str) -> Tokenizer:
    return load_tokenizer(guess_tokenizer_type(path), path)


@pytest.mark.parametrize("name", ["bpe_file", "sentencepiece_file"])
def test_text_comes_back_and_holds_no_control_id(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load(request.getfixturevalue(name))
    assert tokenizer.eod is not None
    texts = [
        *documents(50, seed=1),
        "<|endoftext|>",
        "</s>",
        "<s>a</s>",
        "a<|endoftext|><|endoftext|>b",
        "<unk><|pad|>",
    ]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eod]) == text
        assert tokenizer.eod not in ids
        assert ids == tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_the_library_alone_would_have_made_control_ids(bpe_file: str) -> None:
    """What the guard guards against: without it the literal becomes the id."""
    import tokenizers

    tokenizer = load(bpe_file)
    plain = tokenizers.Tokenizer.from_file(bpe_file)
    assert tokenizer.eod in plain.encode("a<|endoftext|>b", add_special_tokens=False).ids
    assert tokenizer.eod not in tokenizer.encode("a<|endoftext|>b")


def test_a_control_token_that_the_merges_can_spell_is_still_text(tmp_path: Path) -> None:
    vocab = {"<": 0, "e": 1, ">": 2, "<e": 3, "<e>": 4, "a": 5}
    definition = {
        "version": "1.0",
        "added_tokens": [
            {"id": 4, "content": "<e>", "special": True}
            | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["<", "e"], ["<e", ">"]]},
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition))
    tokenizer = load_tokenizer("HuggingFaceTokenizer", str(tmp_path), eod_token="<e>")
    assert tokenizer.eod == 4
    assert tokenizer.encode("a<e>a<e") == [5, 0, 1, 2, 5, 3]
    assert tokenizer.decode(tokenizer.encode("a<e>a")) == "a<e>a"


def test_the_end_of_document_token_need_not_be_marked_special(bpe_file: str, tmp_path: Path) -> None:
    definition = json.loads(Path(bpe_file).read_text())
    for token in definition["added_tokens"]:
        token["special"] = False
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition))
    tokenizer = load(str(path))
    assert tokenizer.eod not in tokenizer.encode("x<|endoftext|>y")


def test_tokenizer_config_names_the_end_of_document_token(bpe_file: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(Path(bpe_file).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|pad|>"}}))
    assert load_tokenizer("HuggingFaceTokenizer", str(tmp_path)).eod == 1
    assert load(bpe_file).eod == 0


def test_truncation_and_padding_in_the_file_are_ignored(bpe_file: str, tmp_path: Path) -> None:
    import tokenizers

    other = tokenizers.Tokenizer.from_file(bpe_file)
    other.enable_truncation(4)
    other.enable_padding(length=16)
    other.save(str(tmp_path / "t.json"))
    text = "tensor parallel loss state attention"
    assert load(str(tmp_path / "t.json")).encode(text) == load(bpe_file).encode(text)


def test_fingerprint_follows_the_ids_not_the_file(bpe_file: str, tmp_path: Path) -> None:
    import tokenizers

    original = load(bpe_file)
    again = tmp_path / "again.json"
    tokenizers.Tokenizer.from_file(bpe_file).save(str(again), pretty=False)
    assert load(str(again)).fingerprint == original.fingerprint

    definition = json.loads(Path(bpe_file).read_text())
    definition["model"]["merges"][10], definition["model"]["merges"][11] = (
        definition["model"]["merges"][11],
        definition["model"]["merges"][10],
    )
    (tmp_path / "merges.json").write_text(json.dumps(definition))
    assert load(str(tmp_path / "merges.json")).fingerprint != original.fingerprint


@pytest.mark.parametrize("name", ["bpe_file", "sentencepiece_file"])
@pytest.mark.parametrize("text", ["caf\udce9", "\ud83d", "x" * 100 + "\udfff"])
def test_half_characters_are_refused(name: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load(request.getfixturevalue(name))
    with pytest.raises(UserError, match=f"character {len(text)} is a lone surrogate"):
        tokenizer.encode_batch(["fine", text])


def test_null_tokenizer() -> None:
    tokenizer = load("50")
    assert (tokenizer.encode("3 1 49"), tokenizer.eod, tokenizer.vocab_size) == ([3, 1, 49], 50, 51)
    assert tokenizer.decode([3, 1, 50]) == "3 1"
    with pytest.raises(UserError, match="'50'"):
        tokenizer.encode("50")


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("HuggingFaceTokenizer", "missing.json", "No such file"),
        ("HuggingFaceTokenizer", "{bad}", "not a tokenizer.json"),
        ("SentencePieceTokenizer", "{bad}", "not a SentencePiece model"),
        ("GPT9Tokenizer", "x", "choose one of"),
        ("NullTokenizer", "-3", "32000"),
    ],
)
def test_errors_name_the_flag(kind: str, model: str, message: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("[1, 2]")
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(kind, model.format(bad=bad))
    assert "--tokenizer-" in str(error.value)


def test_training_is_deterministic_and_bounded(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", documents(400, seed=3))
    files = [tmp_path / f"{n}.json" for n in "abc"]
    for path in files[:2]:
        assert train_tokenizer(TokenizerSettings((str(corpus),), str(path), 380)) == 380
    assert files[0].read_bytes() == files[1].read_bytes()
    train_tokenizer(TokenizerSettings((str(corpus),), str(files[2]), 380, max_bytes=2000))
    assert files[2].read_bytes() != files[0].read_bytes()


def test_training_refuses_what_cannot_work(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", documents(20))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"body": "b"}\n')
    cases = [
        (TokenizerSettings((str(corpus),), str(tmp_path / "t.json"), 100), "--vocab-size 100"),
        (TokenizerSettings((str(corpus),), str(tmp_path / "t.bin"), 300), "--output"),
        (TokenizerSettings((str(empty),), str(tmp_path / "t.json"), 300), "empty"),
        (TokenizerSettings((str(corpus),), str(tmp_path / "t.json"), 300, model_type="bpe"), "--model-type bpe is for"),
        (
            TokenizerSettings((str(corpus),), str(tmp_path / "t.model"), 300, "sentencepiece", "word"),
            "--model-type word",
        ),
        (TokenizerSettings((str(empty),), str(tmp_path / "t.model"), 300, kind="sentencepiece"), "empty"),
        (TokenizerSettings((str(bad),), str(tmp_path / "t.json"), 300), "bad.jsonl, line 2"),
    ]
    for settings, message in cases:
        with pytest.raises(UserError, match=message):
            train_tokenizer(settings)
    assert not list(tmp_path.glob("t.*"))


@pytest.mark.parametrize("model_type", [None, "bpe"])
def test_sentencepiece_learns_from_long_lines_and_lines_with_its_mark(tmp_path: Path, model_type: str | None) -> None:
    """It would leave both out without a word: lines above its limit, and those that hold U+2585."""
    source = random.Random(0)
    words = [source.choice(["alpha", "beta", "gamma", "delta"]) for _ in range(30000)]
    for name, text, part in (
        ("long", " ".join(words), " ".join(words[:100])),
        ("unbroken", "".join(words), "".join(words[:100])),
        ("wide", "漢字" * 20000, "漢字" * 100),
        ("mark", " ".join(f"alpha \u2585 {word}" for word in words[:300]), " alpha" * 100),
    ):
        corpus = write_jsonl(tmp_path / f"{name}.jsonl", [text, "tiny"])
        model = tmp_path / f"{name}.model"
        train_tokenizer(TokenizerSettings((str(corpus),), str(model), 300, "sentencepiece", model_type))
        assert len(load(str(model)).encode(part)) < len(part) / 2, f"{name}: nothing was learned"


def test_sentencepiece_keeps_a_frequent_word_where_there_is_room_for_one_piece(tmp_path: Path) -> None:
    """Of 275 tokens 259 are bytes and control tokens, and 15 the letters and digits of the text."""
    source = random.Random(2)
    corpus = write_jsonl(tmp_path / "c.jsonl", [" ".join(f"word{source.randrange(1000)}" for _ in range(20000))])
    settings = TokenizerSettings((str(corpus),), str(tmp_path / "t.model"), 275, kind="sentencepiece")
    train_tokenizer(settings)
    assert len(load(settings.output).encode(" word")) == 1
    train_tokenizer(dataclasses.replace(settings, model_type="bpe", force=True))
    assert len(load(settings.output).encode(" word")) == 4  # one pair of letters


def test_no_text_gives_no_advice_on_the_vocabulary(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", ["", ""])
    for kind, output in (("bpe", "t.json"), ("sentencepiece", "t.model")):
        with pytest.raises(UserError, match="the corpus is empty"):
            train_tokenizer(TokenizerSettings((str(corpus),), str(tmp_path / output), 300, kind=kind))
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_training_replaces_no_other_result(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", documents(100, seed=3))
    output = tmp_path / "new" / "directory" / "t.json"
    settings = TokenizerSettings((str(corpus),), str(output), 300)
    train_tokenizer(settings)
    before = output.read_bytes()
    train_tokenizer(settings)
    other = dataclasses.replace(settings, vocab_size=310)
    with pytest.raises(UserError, match=f"--output {output} exists.*--force"):
        train_tokenizer(other)
    assert output.read_bytes() == before
    assert train_tokenizer(dataclasses.replace(other, force=True)) == 310

    output.write_text('{"my": "notes"}')
    with pytest.raises(UserError, match="is not a tokenizer"):
        train_tokenizer(settings)
    assert output.read_text() == '{"my": "notes"}'


@pytest.fixture
def published(bpe_file: str, tmp_path: Path) -> dict[str, str]:
    """The same vocabulary in the forms in which others publish theirs."""
    definition = json.loads(Path(bpe_file).read_text())
    vocab, merges = definition["model"]["vocab"], definition["model"]["merges"]
    (tmp_path / "pair").mkdir()
    (tmp_path / "pair" / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "pair" / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "tokenizer.json").write_text(json.dumps(definition))
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_text(json.dumps(definition))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    return {
        "directory": str(tmp_path / "directory"),
        "vocabulary and merges": f"{tmp_path}/pair/vocab.json,{tmp_path}/pair/merges.txt",
        "directory of both": str(tmp_path / "pair"),
        "hub name": "some/model",
    }


@pytest.mark.parametrize("form", ["directory", "vocabulary and merges", "directory of both", "hub name"])
def test_tokenizers_in_the_forms_in_which_others_publish_them(
    form: str, bpe_file: str, published: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    expected, tokenizer = load(bpe_file), load(published[form])
    texts = documents(40)
    assert tokenizer.encode_batch(texts) == expected.encode_batch(texts)
    assert (tokenizer.eod, tokenizer.pad, tokenizer.bos) == (expected.eod, expected.pad, expected.bos) == (0, 1, None)
    assert there_is(published[form]) and not there_is(published[form] + "-missing")


def test_a_hub_name_that_is_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("Qwen/Qwen3-0.6B", "gpt2"):
        with pytest.raises(UserError, match=rf"{name}: there is no such file.*{tmp_path}.*hf download {name}"):
            guess_tokenizer_type(name)


def tiktoken_file(bpe_file: str, path: Path) -> int:
    """Our BPE as a tiktoken file: rank = id - 2 (two control tokens come first). Returns the number of tokens."""
    import tokenizers

    vocab = json.loads(Path(bpe_file).read_text())["model"]["vocab"]
    characters = {c: b for b, c in _bytes_to_characters().items()}
    assert set(characters) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ranks = {bytes(characters[c] for c in token): number - 2 for token, number in vocab.items() if number > 1}
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return len(ranks)


def _bytes_to_characters() -> dict[int, str]:
    """GPT-2's table."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@pytest.mark.parametrize("name", ["t.tiktoken", "tokenizer.model"])
def test_tiktoken_files(name: str, bpe_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tiktoken", reason="needs the data extra")
    path = tmp_path / name
    count = tiktoken_file(bpe_file, path)
    with pytest.raises(UserError, match=f"of {count} tokens.*cl100k_base.*tokenizer.json"):
        load(str(path))
    known = tiktoken_tokenizer.PUBLISHED[50256]
    encoding = dataclasses.replace(known, control_tokens=MappingProxyType({"<|endoftext|>": count + 1}))
    monkeypatch.setitem(tiktoken_tokenizer.PUBLISHED, count, encoding)
    tokenizer, expected = load(str(path)), load(bpe_file)
    assert tokenizer.type == "TikTokenizer" == load(str(tmp_path)).type
    texts = documents(60)
    assert tokenizer.encode_batch(texts) == [[i - 2 for i in ids] for ids in expected.encode_batch(texts)]
    assert (tokenizer.eod, tokenizer.vocab_size, tokenizer.missing_ids()) == (count + 1, count + 2, [count])
    assert tokenizer.decode([*tokenizer.encode("a<|endoftext|>b"), count, count + 1]) == "a<|endoftext|>b"
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode("\ud83d")
    monkeypatch.setitem(tiktoken_tokenizer.PUBLISHED, count, known)
    path.write_text("!!! 1\n")
    with pytest.raises(UserError, match="line 1: not a tiktoken file"):
        load_tokenizer("TikTokenizer", str(path))


def test_the_published_tiktoken_patterns_are_the_librarys(monkeypatch: pytest.MonkeyPatch) -> None:
    public = pytest.importorskip("tiktoken_ext.openai_public", reason="needs the data extra")
    tiktoken = pytest.importorskip("tiktoken")
    monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {bytes([b]): b for b in range(256)})
    for size, published in tiktoken_tokenizer.PUBLISHED.items():
        if size == 128000:
            assert published.control_tokens["<|eot_id|>"] == 128009 and len(published.control_tokens) == 256
            continue
        theirs = getattr(public, published.name)()
        assert dict(published.control_tokens) == theirs["special_tokens"]
        ranks = {**theirs["mergeable_ranks"], b"ab": 256, b"  ": 257, b"12": 258, b"'s": 259}
        pair = [
            tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
            for pattern in (published.pattern, theirs["pat_str"])
        ]
        for text in [*documents(60), "ab  ab's12 1234\n\n  x\r\n AB'S"]:
            assert pair[0].encode_ordinary(text) == pair[1].encode_ordinary(text)
