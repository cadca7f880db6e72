"""One rule for the vocabulary, and the token that ends documents as their dataset records it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaforge.config.cli import format_config, parse_config
from megaforge.config.config import Config
from megaforge.data.preprocess.driver import preprocess
from megaforge.data.preprocess.plan import PreprocessSettings
from megaforge.data.run_tokenizer import with_run_tokenizer
from megaforge.errors import UserError
from tests.data.corpus_files import bpe_tokenizer, documents, write_jsonl
from tests.data.datasets import write_dataset, write_sidecar


def config_of(*argv: str) -> Config:
    return parse_config(argv, prog="test").config


@pytest.mark.parametrize(
    ("argv", "size", "told"),
    [
        (("--config", "cdrmix-core-1b"), 50272, ""),
        (("--config", "cdrmix-core-1b", "--tokenizer-model", "31999"), 32000, ""),
        (("--config", "own.yaml", "--tokenizer-model", "31999"), 32000, ""),
        (("--config", "cdrmix-core-1b", "--vocab-size", "50272", "--tokenizer-model", "31999"), 50272, "18,304 rows"),
        (("--vocab-size", "32001", "--tokenizer-model", "31999"), 32001, "128 rows"),
        (("--vocab-size", "32000", "--tokenizer-model", "31990"), 32000, ""),
        (("--config", "sized.yaml", "--tokenizer-model", "31999"), 40000, "8,064 rows"),
    ],
)
def test_the_vocabulary_is_the_tokenizers_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], size: int, told: str
) -> None:
    """Rows are those of the padded matrices: 50,304 - 32,000 and so on."""
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("base: cdrmix-core-1b\n")
    Path("sized.yaml").write_text("base: cdrmix-core-1b\nmodel: {vocab_size: 40000}\n")
    config, tokenizer, notes = with_run_tokenizer(config_of(*argv))
    assert config.model.vocab_size == size and (tokenizer is None) == ("--tokenizer-model" not in argv)
    assert bool(notes) == bool(told)
    if told:
        rows = int(told.split()[0].replace(",", ""))
        matrices = 1 + config.model.untie_embeddings_and_output_weights
        assert told in notes[0] and f"{rows * config.model.hidden_size * matrices:,} parameters" in notes[0]


def test_print_config_says_whose_vocabulary_it_is() -> None:
    text = format_config(parse_config(["--config", "cdrmix-core-1b", "--tokenizer-model", "31999"]))
    line = next(line for line in text.splitlines() if "vocab_size:" in line and "null" in line)
    assert "--tokenizer-model, in place of 50272 (preset cdrmix-core-1b)" in line


def test_a_vocabulary_below_the_tokenizers_is_refused() -> None:
    with pytest.raises(UserError, match="--vocab-size 100: the tokenizer has 201 entries"):
        with_run_tokenizer(config_of("--vocab-size", "100", "--tokenizer-model", "200"))


def test_the_type_is_told_from_the_model() -> None:
    _, tokenizer, _ = with_run_tokenizer(config_of("--tokenizer-model", "200"))
    assert tokenizer is not None and tokenizer.type == "NullTokenizer"


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_documents_end_as_the_dataset_says(tmp_path: Path, special: bool, named: bool) -> None:
    """Named with --eod-token, or by its id alone as older datasets record it; special in the tokenizer or not."""
    path = tmp_path / "tok.json"
    definition = json.loads(Path(bpe_tokenizer(tmp_path / "base.json")).read_text())
    stop = 1 + max(definition["model"]["vocab"].values())
    definition["added_tokens"].append(dict(definition["added_tokens"][0], id=stop, content="<|stop|>", special=special))
    path.write_text(json.dumps(definition))
    corpus = write_jsonl(tmp_path / "c.jsonl", documents(5))
    preprocess(
        PreprocessSettings(
            (str(corpus),),
            str(tmp_path / "d"),
            "HuggingFaceTokenizer",
            str(path),
            eod_token="<|stop|>",
            append_eod=True,
        )
    )
    prefix = tmp_path / "d_text_document"
    sidecar = json.loads(Path(f"{prefix}.json").read_text())
    assert sidecar["tokenizer"]["eod_token"] == "<|stop|>" and sidecar["tokenizer"]["eod"] == stop
    if not named:
        del sidecar["tokenizer"]["eod_token"]
        Path(f"{prefix}.json").write_text(json.dumps(sidecar))
    _, plain, _ = with_run_tokenizer(config_of("--tokenizer-model", str(path)))
    _, tokenizer, _ = with_run_tokenizer(config_of("--tokenizer-model", str(path), "--data-path", str(prefix)))
    assert plain is not None and tokenizer is not None and plain.eod != stop
    assert (tokenizer.eod, tokenizer.fingerprint) == (stop, sidecar["tokenizer"]["fingerprint"])


def test_datasets_that_disagree_are_refused_before_the_run(tmp_path: Path) -> None:
    a, b = (write_dataset(tmp_path / name, [[1, 2]]) for name in "ab")
    write_sidecar(a, settings={"append_eod": True})
    write_sidecar(b, settings={"append_eod": False})
    with pytest.raises(UserError, match=r"--append-eod is True in .*a\.json and False in .*b\.json"):
        with_run_tokenizer(config_of("--tokenizer-model", "999", "--data-path", "1", a, "1", b))
