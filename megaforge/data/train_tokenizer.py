"""Trains a tokenizer on JSONL text: byte-level BPE by Hugging Face ``tokenizers``, or SentencePiece.

Both see at most about ``max_bytes`` of text. A larger corpus is sampled by document, by a hash of each document's text,
so the sample is spread over the whole corpus, the same every time, and memory does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megaforge.data.outputs import atomic_output
from megaforge.data.text.expand import expand_inputs
from megaforge.data.text.readers import input_size, read_texts
from megaforge.data.tokenizer import load_tokenizer
from megaforge.errors import UserError, require

END_OF_TEXT = "<|endoftext|>"
KINDS = ("bpe", "sentencepiece")
MODEL_TYPES = ("unigram", "bpe")
_TYPES = {"bpe": "HuggingFaceTokenizer", "sentencepiece": "SentencePieceTokenizer"}
_SENTENCE_CHARACTERS = 1 << 14
_RESERVED = re.compile("\u2585")  # SentencePiece marks unknown characters with it and leaves out lines that hold it
_LEAST_VOCAB = {"bpe": 257, "sentencepiece": 260}  # 256 bytes and the control tokens


@dataclass(frozen=True)
class TokenizerSettings:
    """The flags of ``tools/train_tokenizer.py``."""

    inputs: tuple[str, ...]
    output: str
    vocab_size: int
    kind: str = "bpe"
    model_type: str | None = None  # of SentencePiece; None: its own default, unigram
    json_key: str = "text"
    max_bytes: int = 256 << 20
    special_tokens: tuple[str, ...] = ()
    force: bool = False

    def validate(self) -> None:
        """Raises UserError where the flags alone are wrong."""
        if self.kind not in KINDS:
            raise UserError(f"--type {self.kind}: choose one of {', '.join(KINDS)}")
        if self.model_type is not None and self.kind != "sentencepiece":
            raise UserError(f"--model-type {self.model_type} is for --type sentencepiece; leave it out, or add that")
        if self.model_type not in (None, *MODEL_TYPES):
            raise UserError(f"--model-type {self.model_type}: choose one of {', '.join(MODEL_TYPES)}")
        least = _LEAST_VOCAB[self.kind] + len(self.special_tokens)
        if self.vocab_size < least:
            raise UserError(f"--vocab-size {self.vocab_size} has no room for all bytes; at least {least} is needed")
        suffix = {"bpe": ".json", "sentencepiece": ".model"}[self.kind]
        if not self.output.endswith(suffix):
            raise UserError(f"--output {self.output}: a {self.kind} tokenizer is kept in a file that ends in {suffix}")
        if self.max_bytes < 1:
            raise UserError(f"--max-bytes {self.max_bytes}: choose a positive number")


def train_tokenizer(settings: TokenizerSettings) -> int:
    """Writes the tokenizer file, atomically; returns its vocabulary size, which a small corpus may keep below the goal.

    Raises:
        UserError: a flag is wrong, a line is bad, the corpus is empty, or too small for the vocabulary, or another
            result stands at ``--output``.
    """
    settings.validate()
    if not settings.force and os.path.exists(settings.output) and not _is_tokenizer(settings):
        raise UserError(f"--output {settings.output} exists and is not a tokenizer; name another file, or pass --force")
    texts = _Texts(settings)
    content, size = (_train_bpe if settings.kind == "bpe" else _train_sentencepiece)(settings, texts)
    if not texts.size:
        raise UserError(f"--input {' '.join(settings.inputs)}: the corpus is empty")
    with atomic_output(settings.output, settings.force) as file:
        file.write(content)
    note = "" if size == settings.vocab_size else f" (asked for {settings.vocab_size:,}: the text has no more to merge)"
    print(
        f"{settings.output}: {size:,} tokens{note}, from {texts.count:,} documents, {texts.size / 1e6:,.1f} MB",
        file=sys.stderr,
    )
    return size


def _is_tokenizer(settings: TokenizerSettings) -> bool:
    """Whether what stands at ``--output`` can be loaded as the kind that is wanted."""
    try:
        _ = load_tokenizer(_TYPES[settings.kind], settings.output)
    except UserError:
        return False
    return True


class _Texts:
    """The sample's texts, in input order, with what was taken."""

    def __init__(self, settings: TokenizerSettings) -> None:
        self._settings = settings
        self.count = self.size = 0

    def __iter__(self) -> Iterator[str]:
        inputs = expand_inputs(self._settings.inputs)
        total = sum(input_size(path, self._settings.json_key) for path in inputs)
        share = self._settings.max_bytes / total if total > self._settings.max_bytes else 1.0
        for path in inputs:
            for text in read_texts(path, self._settings.json_key):
                if share < 1.0:
                    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
                    if int.from_bytes(digest, "big") >= share * 2.0**64:
                        continue
                self.count += 1
                self.size += len(text)
                yield text


def _train_bpe(settings: TokenizerSettings, texts: _Texts) -> tuple[bytes, int]:
    """GPT-2's byte-level BPE (Radford et al. 2019): any text can be written, and read back byte for byte."""
    tokenizers = require("tokenizers", extra="data", purpose="training a BPE tokenizer")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[END_OF_TEXT, *settings.special_tokens],
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True).encode(), int(tokenizer.get_vocab_size())


def _train_sentencepiece(settings: TokenizerSettings, texts: _Texts) -> tuple[bytes, int]:
    """A SentencePiece model (Kudo and Richardson 2018) that keeps white space and falls back to bytes.

    As ``spm_train`` does, it is a unigram model (Kudo 2018, arXiv 1804.10959) unless BPE is asked for, which Llama 2
    uses. A unigram model keeps whole frequent words even where there is room for few pieces.
    """
    sentencepiece = require("sentencepiece", extra="data", purpose="--type sentencepiece")
    model = io.BytesIO()
    options: dict[str, Any] = {
        "vocab_size": settings.vocab_size,
        "model_type": settings.model_type or MODEL_TYPES[0],
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "max_sentence_length": 4 * _SENTENCE_CHARACTERS,
        "num_threads": 1,
        "minloglevel": 2,
        "control_symbols": list(settings.special_tokens),
    }
    lines = (part for text in texts for part in _sentences(text))
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **options)
    except RuntimeError as error:
        if not texts.size:
            return b"", 0
        raise UserError(
            f"--vocab-size {settings.vocab_size}: SentencePiece cannot train it ({error}); choose another"
        ) from error
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return model.getvalue(), int(processor.get_piece_size())


def _sentences(text: str) -> Iterator[str]:
    """The text in parts that SentencePiece trains on: it would leave out long lines, and lines with its own mark.

    A long line is cut before its last space that leaves the part short enough; the space belongs to the next word.
    """
    for line in text.split("\n"):
        for part in _RESERVED.split(line):
            start = 0
            while len(part) - start > _SENTENCE_CHARACTERS:
                space = part.rfind(" ", start + 1, start + _SENTENCE_CHARACTERS)
                end = space if space > 0 else start + _SENTENCE_CHARACTERS
                yield part[start:end]
                start = end
            if start < len(part):
                yield part[start:]
