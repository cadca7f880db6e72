"""Tokenizers behind one small face: text to ids and back, and a fingerprint of what defines the ids.

A control token (end of document, beginning of text, padding, ...) marks structure, so it may only be put there by the
program. The same characters inside a document are text: :meth:`Tokenizer.encode` never turns them into a control id.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megaforge.data.tokenizer_files import find_tokenizer
from megaforge.errors import UserError, require
from megaforge.json_text import parse_json

TOKENIZER_TYPES = ("HuggingFaceTokenizer", "SentencePieceTokenizer", "TikTokenizer", "NullTokenizer")
_PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>")
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "<|startoftext|>", "[BOS]")

# End-of-document names in the order in which published tokenizers mean them when no configuration names one.
_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|eod|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")


def check_unicode(text: str) -> None:
    """Refuses a lone surrogate: half a character of JSON, or a byte of a command line that is not UTF-8.

    Raises:
        UserError: naming the place in the text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = ascii(text[max(0, error.start - 20) : error.start + 20])
        raise UserError(
            f"the text {around} cannot be encoded: its character {error.start + 1} is a lone surrogate (half a "
            "character, or a byte that is not UTF-8); give valid UTF-8"
        ) from error


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        type: one of :data:`TOKENIZER_TYPES`.
        model_path: the file (or the number, for NullTokenizer) it was loaded from.
        vocab_size: the largest id + 1.
        eod: the end-of-document id, or None where the tokenizer has none.
        bos: the id that begins a text, or None.
        pad: the id that fills a batch up, or None.
        eod_token: the name that was given for it, or None where the tokenizer's own choice stands.
        fingerprint: SHA-256 (hex) over the content that defines the ids.
        cuts_at_lines: whether text may be cut after a line end between two printable ASCII characters without a change
            of its ids; long documents can then be encoded in parts.
        control_tokens: the control tokens that have names, and their ids.
    """

    type: str
    model_path: str
    vocab_size: int
    eod: int | None
    bos: int | None = None
    pad: int | None = None
    eod_token: str | None = None
    fingerprint: str
    cuts_at_lines: bool = False
    control_tokens: Mapping[str, int] = MappingProxyType({})

    @property
    def eos(self) -> int | None:
        """The id that ends a text: the end-of-document id."""
        return self.eod

    def missing_ids(self) -> list[int]:
        """Ids below :attr:`vocab_size` that stand for nothing."""
        return []

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; no control id is added, and none comes from literal control tokens in the text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of every text.

        Raises:
            UserError: a text is no Unicode (:func:`check_unicode`), or not in this tokenizer's language.
        """
        try:
            return self._encode_batch(texts)
        except (TypeError, UnicodeError):  # what the libraries make of half a character
            for text in texts:
                check_unicode(text)
            raise

    @abstractmethod
    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of every text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; control ids are left out."""


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` (or a directory that holds one), run by Hugging Face's ``tokenizers``.

    The file's special tokens are its control tokens, and so is the end-of-document token in every case. Truncation
    and padding that the file may ask for are ignored: a document is encoded whole.
    """

    def __init__(self, model: str, eod_token: str | None = None) -> None:
        tokenizers = require("tokenizers", extra="data", purpose=f"--tokenizer-model {model}")
        self.type, self.model_path = "HuggingFaceTokenizer", model
        path, *merges = find_tokenizer(model, self.type).paths
        self.definition = _from_merges(path, merges[0]) if merges else _read_tokenizer_json(path)
        before = [dict(token) for token in self.definition["added_tokens"]]
        config = path.with_name("tokenizer_config.json")
        eod = eod_token or _named_in(config, "eos_token") or self._guess(_EOD_NAMES)
        if eod is not None:
            self._make_control(eod, path)
        try:
            if before == self.definition["added_tokens"] and not merges:
                self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            else:
                self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(self.definition))
        except Exception as error:  # the library raises bare Exception for whatever it cannot read
            raise UserError(f"--tokenizer-model {path}: 'tokenizers' cannot load it ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.control_tokens = {t["content"]: int(t["id"]) for t in self.definition["added_tokens"] if t["special"]}
        self.vocab_size = _largest_id(self.definition) + 1
        self.eod = None if eod is None else self.control_tokens[eod]
        self.bos = self.control_tokens.get(_named_in(config, "bos_token") or self._guess(_BOS_NAMES) or "")
        self.pad = self.control_tokens.get(_named_in(config, "pad_token") or self._guess(_PAD_NAMES) or "")
        self.fingerprint = _fingerprint(self.definition)
        self.cuts_at_lines = _splits_like_gpt2(self.definition)
        self._leaky = self._find_leaks()

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self._leaky is not None:
            return [self._encode_guarded(text) for text in texts]
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def missing_ids(self) -> list[int]:
        """See :class:`Tokenizer`."""
        return [number for number in range(self.vocab_size) if self._tokenizer.id_to_token(number) is None]

    def definition_without_controls(self) -> dict[str, Any]:
        """The ``tokenizer.json`` content less its control tokens: every encoder of it treats them as text."""
        kept = [token for token in self.definition["added_tokens"] if not token["special"]]
        return {**self.definition, "added_tokens": kept, "post_processor": None}

    def _guess(self, wanted: Sequence[str]) -> str | None:
        names = {token["content"] for token in self.definition["added_tokens"]}
        return next((name for name in wanted if name in names), None)

    def _make_control(self, eod: str, path: Path) -> None:
        for token in self.definition["added_tokens"]:
            if token["content"] == eod:
                token["special"] = True
                return
        known = ", ".join(token["content"] for token in self.definition["added_tokens"][:8]) or "none"
        raise UserError(f"--tokenizer-model {path} has no token {eod!r} to end documents; its added tokens: {known}")

    def _find_leaks(self) -> re.Pattern[str] | None:
        """A pattern of the control tokens whose text alone would give their id, as some models' own merges do."""
        leaks = []
        for literal, control_id in self.control_tokens.items():
            probes = [literal, f"a{literal}b", f" {literal} ", f"\n{literal}\n", literal + literal]
            encodings = self._tokenizer.encode_batch_fast(probes, add_special_tokens=False)
            if any(control_id in encoding.ids for encoding in encodings):
                leaks.append(literal)
        return re.compile("|".join(map(re.escape, sorted(leaks, key=len, reverse=True)))) if leaks else None

    def _encode_guarded(self, text: str) -> list[int]:
        """Encodes around literal control tokens: cut after their first character, no piece can become the id."""
        assert self._leaky is not None
        cuts = [0, *(match.start() + 1 for match in self._leaky.finditer(text)), len(text)]
        pieces = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        ids = [i for e in self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False) for i in e.ids]
        found = self._leaky.search(text)
        if found is not None and not set(ids).isdisjoint(self.control_tokens.values()):
            raise UserError(
                f"--tokenizer-model {self.model_path}: the text contains the control token {found.group()!r} and this "
                "tokenizer cannot write it as ordinary text; remove it from the text or choose another tokenizer"
            )
        return ids


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model``; its own end-of-sentence piece (``</s>``) ends documents.

    The library never produces control pieces from text, so literal ones need no further care.
    """

    def __init__(self, model: str, eod_token: str | None = None) -> None:
        sentencepiece = require("sentencepiece", extra="data", purpose=f"--tokenizer-model {model}")
        self.type, self.model_path = "SentencePieceTokenizer", model
        (path,) = find_tokenizer(model, self.type).paths
        content = read_tokenizer_file(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except Exception as error:  # protobuf's RuntimeError, or whatever a later version raises
            raise UserError(f"--tokenizer-model {model}: not a SentencePiece model ({error})") from error
        self.vocab_size = int(self._model.get_piece_size())
        self.eod = self._eod(eod_token)
        self.bos, self.pad = (int(i) if i >= 0 else None for i in (self._model.bos_id(), self._model.pad_id()))
        controls = (number for number in range(self.vocab_size) if self._model.is_control(number))
        self.control_tokens = {str(self._model.id_to_piece(number)): number for number in controls}
        self.fingerprint = hashlib.sha256(content).hexdigest()

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in self._model.encode(list(texts), num_threads=1)]

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        return str(self._model.decode([int(i) for i in ids if not self._model.is_control(int(i))]))

    def _eod(self, eod_token: str | None) -> int | None:
        if eod_token is not None:
            token_id = int(self._model.piece_to_id(eod_token))
            if not self._model.is_control(token_id):
                raise UserError(f"--tokenizer-model {self.model_path} has no control piece {eod_token!r}; try '</s>'")
            return token_id
        eos = int(self._model.eos_id())
        return eos if eos >= 0 else None


class NullTokenizer(Tokenizer):
    """``--tokenizer-model N``: text is space-separated integers below N, and N itself ends documents."""

    def __init__(self, model: str, eod_token: str | None = None) -> None:
        if not model.isdecimal() or int(model) < 1:
            raise UserError(f"--tokenizer-model {model}: NullTokenizer takes its number of ids, for example 32000")
        if eod_token is not None:
            raise UserError(f"--eod-token {eod_token}: NullTokenizer has no named tokens; id {model} ends documents")
        self.type, self.model_path = "NullTokenizer", model
        self.eod = int(model)
        self.vocab_size = self.eod + 1
        self.fingerprint = hashlib.sha256(f"NullTokenizer:{self.eod}".encode()).hexdigest()

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self._id(word) for word in text.split()] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        return " ".join(str(int(i)) for i in ids if int(i) != self.eod)

    def _id(self, word: str) -> int:
        if not word.isdecimal() or int(word) >= int(self.model_path):
            raise UserError(f"NullTokenizer: {word!r} is not an integer in [0, {self.model_path})")
        return int(word)


def load_tokenizer(tokenizer_type: str, tokenizer_model: str, eod_token: str | None = None) -> Tokenizer:
    """The tokenizer that ``--tokenizer-type`` and ``--tokenizer-model`` name.

    ``eod_token`` names the token that ends documents; by default the model's own configuration does.

    Raises:
        UserError: the type is unknown, the file is missing or of another kind, or an extra is not installed.
    """
    from megaforge.data.tiktoken_tokenizer import TikTokenizer  # it is built on this module

    classes: dict[str, Callable[[str, str | None], Tokenizer]] = {
        "HuggingFaceTokenizer": HuggingFaceTokenizer,
        "SentencePieceTokenizer": SentencePieceTokenizer,
        "TikTokenizer": TikTokenizer,
        "NullTokenizer": NullTokenizer,
    }
    if tokenizer_type not in classes:
        raise UserError(f"--tokenizer-type {tokenizer_type} is unknown; choose one of {', '.join(TOKENIZER_TYPES)}")
    if not tokenizer_model:
        raise UserError("--tokenizer-model is missing; give a tokenizer.json or a SentencePiece .model")
    tokenizer = classes[tokenizer_type](tokenizer_model, eod_token)
    tokenizer.eod_token = eod_token
    return tokenizer


def guess_tokenizer_type(tokenizer_model: str) -> str:
    """The type a ``--tokenizer-model`` alone implies: a number is Null, else the files tell.

    Raises:
        UserError: it is not there.
    """
    if tokenizer_model.isdecimal() and not os.path.exists(tokenizer_model):
        return "NullTokenizer"
    return find_tokenizer(tokenizer_model).type


def read_tokenizer_file(path: Path) -> bytes:
    """The content of a tokenizer's file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"--tokenizer-model {path}: {error.strerror}; make one with tools/train_tokenizer.py"
        ) from error


def _read_tokenizer_json(path: Path) -> dict[str, Any]:
    try:
        definition = parse_json(read_tokenizer_file(path))
    except ValueError as error:
        raise UserError(f"--tokenizer-model {path}: not a tokenizer.json ({error})") from error
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        raise UserError(f"--tokenizer-model {path}: not a tokenizer.json (it has no 'model')")
    added = definition["added_tokens"] = definition.get("added_tokens") or []
    if not isinstance(added, list) or not all(map(_is_added_token, added)):
        raise UserError(f"--tokenizer-model {path}: not a tokenizer.json (its 'added_tokens' are not tokens)")
    definition["truncation"] = definition["padding"] = None
    return definition


def _is_added_token(token: Any) -> bool:
    kinds = (("content", str), ("id", int), ("special", bool))
    return isinstance(token, dict) and all(isinstance(token.get(name), kind) for name, kind in kinds)


def _from_merges(vocab: Path, merges: Path) -> dict[str, Any]:
    """A GPT-2 vocabulary and its merges as the content of a ``tokenizer.json``."""
    tokenizers = require("tokenizers", extra="data", purpose=f"--vocab-file {vocab}")
    for path in (vocab, merges):
        _ = read_tokenizer_file(path)
    try:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise UserError(f"--vocab-file {vocab} --merge-file {merges}: not a BPE vocabulary ({error})") from error
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens([name for name in (*_EOD_NAMES, *_BOS_NAMES, *_PAD_NAMES) if name in known])
    definition: dict[str, Any] = json.loads(tokenizer.to_str())
    return definition


def _splits_like_gpt2(definition: dict[str, Any]) -> bool:
    """Whether words are found by GPT-2's expression alone, which never looks across a line end within text."""
    split = definition.get("pre_tokenizer") or {}
    plain = split.get("type") == "ByteLevel" and split.get("use_regex", True) and not split.get("add_prefix_space")
    return plain and not definition.get("normalizer") and all(t["special"] for t in definition["added_tokens"])


def _largest_id(definition: dict[str, Any]) -> int:
    """The largest id of the model's vocabulary (a map, or a list in id order) and of the added tokens."""
    vocab = definition["model"].get("vocab") or {}
    largest = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1
    return max([largest, *(int(token["id"]) for token in definition["added_tokens"])])


def _fingerprint(definition: dict[str, Any]) -> str:
    """SHA-256 over the definition in a canonical form, so that saving a tokenizer again does not change it.

    Vocabulary and merges, nearly all of it, are hashed as joined text: much quicker than canonical JSON of the whole.
    """
    model = dict(definition["model"])
    digest = hashlib.sha256()
    if isinstance(model.get("vocab"), dict):
        vocab = sorted(model.pop("vocab").items(), key=lambda item: item[1])
        digest.update("\0".join(token for token, _ in vocab).encode("utf-8", "surrogatepass"))
        digest.update(b"\0" + ",".join(str(number) for _, number in vocab).encode())
    if isinstance(model.get("merges"), list):  # older files hold "a b", newer ones ["a", "b"]
        merges = model.pop("merges")
        if merges and not isinstance(merges[0], str):
            merges = map(" ".join, merges)
        digest.update("\0\n".join(["", *merges]).encode("utf-8", "surrogatepass"))
    rest = {**{name: value for name, value in definition.items() if name != "version"}, "model": model}
    digest.update(b"\0\n" + json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
    return digest.hexdigest()


def _named_in(path: Path, key: str) -> str | None:
    """The token that ``key`` names in a ``tokenizer_config.json`` beside the tokenizer, if there is one."""
    try:
        token = parse_json(path.read_bytes()).get(key)
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None
