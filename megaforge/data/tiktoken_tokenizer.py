"""Tokenizers kept as a ``tiktoken`` file: a line ``base64 rank`` a token. How words are split is not in the file: it is
told from the number of tokens, by which the published ones differ."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from megaforge.data.tokenizer import Tokenizer, check_unicode, read_tokenizer_file
from megaforge.data.tokenizer_files import find_tokenizer
from megaforge.errors import UserError, require

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_O200K = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)


@dataclass(frozen=True)
class Published:
    """A published encoding: its name, the expression that finds words, and its control tokens."""

    name: str
    pattern: str
    control_tokens: MappingProxyType[str, int]


def _llama3() -> dict[str, int]:
    names = ["begin_of_text", "end_of_text", *(f"reserved_special_token_{n}" for n in range(4))]
    names += ["start_header_id", "end_header_id", "reserved_special_token_4", "eot_id"]
    names += [f"reserved_special_token_{n}" for n in range(5, 251)]
    return {f"<|{name}|>": 128000 + number for number, name in enumerate(names)}


_CL100K_TOKENS = {"fim_prefix": 100258, "fim_middle": 100259, "fim_suffix": 100260, "endofprompt": 100276}
# By the number of tokens in the file (github.com/openai/tiktoken; github.com/meta-llama/llama3).
PUBLISHED = {
    50256: Published("r50k_base", _GPT2, MappingProxyType({"<|endoftext|>": 50256})),
    50280: Published("p50k_base", _GPT2, MappingProxyType({"<|endoftext|>": 50256})),
    100256: Published(
        "cl100k_base",
        _CL100K,
        MappingProxyType({"<|endoftext|>": 100257} | {f"<|{name}|>": i for name, i in _CL100K_TOKENS.items()}),
    ),
    128000: Published("Llama 3", _CL100K, MappingProxyType(_llama3())),
    199998: Published("o200k_base", _O200K, MappingProxyType({"<|endoftext|>": 199999, "<|endofprompt|>": 200018})),
}
_ENDS = ("<|endoftext|>", "<|end_of_text|>")


class TikTokenizer(Tokenizer):
    """A ``tiktoken`` file, run by OpenAI's ``tiktoken``. Control tokens in text are text."""

    def __init__(self, model: str, eod_token: str | None = None) -> None:
        tiktoken = require("tiktoken", extra="data", purpose=f"--tokenizer-model {model}")
        self.type, self.model_path = "TikTokenizer", model
        (path,) = find_tokenizer(model, self.type).paths
        ranks = _ranks(path)
        published = PUBLISHED.get(len(ranks))
        if published is None:
            known = ", ".join(f"{size:,} ({encoding.name})" for size, encoding in PUBLISHED.items())
            raise UserError(
                f"--tokenizer-model {path}: a tiktoken file of {len(ranks):,} tokens, and how words are split is "
                f"known for {known} only; use the model's tokenizer.json"
            )
        self.control_tokens = published.control_tokens
        self._encoding = tiktoken.Encoding(
            published.name,
            pat_str=published.pattern,
            mergeable_ranks=ranks,
            special_tokens=dict(self.control_tokens),
        )
        self.vocab_size = int(self._encoding.n_vocab)
        self.eod = self._find_eod(eod_token)
        self.bos = self.control_tokens.get("<|begin_of_text|>")
        self.pad = None
        described = json.dumps([published.pattern, dict(self.control_tokens)], sort_keys=True)
        content = b"".join(token + b"\0%d\n" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1]))
        self.fingerprint = hashlib.sha256(content + described.encode()).hexdigest()
        self._known = {*ranks.values(), *self.control_tokens.values()}

    def missing_ids(self) -> list[int]:
        """See :class:`Tokenizer`."""
        return [number for number in range(self.vocab_size) if number not in self._known]

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            check_unicode(text)  # the library would write something else in its place
        return [list(self._encoding.encode_ordinary(text)) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """See :class:`Tokenizer`."""
        controls = {*self.control_tokens.values(), *self.missing_ids()}
        return str(self._encoding.decode([int(i) for i in ids if int(i) not in controls]))

    def _find_eod(self, eod_token: str | None) -> int | None:
        if eod_token is None:
            return next((self.control_tokens[name] for name in _ENDS if name in self.control_tokens), None)
        if eod_token not in self.control_tokens:
            known = ", ".join(list(self.control_tokens)[:8])
            raise UserError(f"--tokenizer-model {self.model_path} has no token {eod_token!r}; its own: {known}")
        return self.control_tokens[eod_token]


def _ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_tokenizer_file(path).splitlines(), 1):
        try:
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise UserError(f"--tokenizer-model {path}, line {number}: not a tiktoken file ({error})") from error
    return ranks
