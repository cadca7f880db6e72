"""The fast path of preprocessing: ``gigatoken`` (github.com/marcelroed/gigatoken), used only where proven equal.

It encodes byte-level BPE some fifty times faster than ``tokenizers``. It is a young package, so it is trusted for one
tokenizer at a time: :func:`prove` compares both on text made to find differences (odd Unicode, long runs, literal
control tokens) and on the first documents at hand, and any difference means the slow path.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from megaforge.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from megaforge.errors import require

# The encoder's memory may grow until the process holds the first figure, and by the second in any case.
_RESIDENT_BYTES, _LEAST_GROWTH = 236 << 20, 48 << 20
_FRAGMENTS = (
    "Hello, world! It's they'll we've I'M DON'T can't",
    "  leading and trailing   \t\t tabs \r\n\r\n\n\n   \n x",
    "def f(x_1: int) -> str:\n    return f'{x_1!r}'  # comment\n\n\nclass A(B): ...\n",
    "1234567890 3.14159e-10 0x7fff_ffff 1,000,000 ½ ² ٣٤ ৪৫",
    "naïve café Straße ﬁ ﬂ ﷺ Å A\u030a e\u0301 \u1e9b\u0323 İ ı ſ",
    "漢字とかな交じり文。 这是中文。 한국어 문장 ภาษาไทย हिन्दी العربية עברית",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 \U0001f9d1\u200d\U0001f680 \U00010348 \U0010ffff \ue000 \ufffd \ufeff",
    "\x00 \x01\x1f\x7f \x85 \xa0 \xad \u1680 \u2003 \u2028 \u2029 \u202e \u200b \u3000",
    "a" * 700 + " " * 300 + "\n" * 120 + "-" * 200 + "!?" * 60 + "ab" * 150 + "0" * 150,
    "snake_case camelCase SCREAMING_CASE kebab-case https://example.org/a?b=c&d=%20#e <a href='x'>&amp;</a>",
    "",
    " ",
)
# Unicode ranges to draw random characters from: scripts, marks, symbols, private use and the planes beyond 16 bits.
_BLOCKS = (
    *((0x20, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x400, 0x6FF), (0x900, 0xDFF), (0x2000, 0x2BFF)),
    *((0x3000, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xFFFF), (0x1F000, 0x1FAFF), (0x10000, 0x10FFFF)),
)


class FastEncoder:
    """A ``gigatoken`` encoder of one tokenizer's definition (``tokenizer.json`` content without control tokens)."""

    def __init__(self, definition: str) -> None:
        from gigatoken.gigatoken_rs import load_hf_json

        self._load: Callable[[str], Any] = load_hf_json
        self.definition = definition
        self._backend = load_hf_json(definition)
        self._limit = max(_RESIDENT_BYTES, _resident_bytes() + _LEAST_GROWTH)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of every text, each uint32 [tokens]."""
        encode = self._backend.encode
        arrays = [encode(text) for text in texts]
        self._bound_cache()
        return arrays

    def _bound_cache(self) -> None:
        """The encoder remembers every word it met, without end: past a limit it starts afresh."""
        if _resident_bytes() > self._limit:
            del self._backend
            self._backend = self._load(self.definition)
            self._limit = max(self._limit, _resident_bytes() + _LEAST_GROWTH)


def fast_definition(tokenizer: Tokenizer) -> str | None:
    """The definition a :class:`FastEncoder` needs, or None for kinds of tokenizer it does not serve."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    orjson = require("orjson", extra="data", purpose="the fast tokenizer")  # the definition may weigh tens of MB
    return str(orjson.dumps(tokenizer.definition_without_controls()), "utf-8")


def proven_encoder(tokenizer: Tokenizer, documents: Iterable[str] = ()) -> tuple[FastEncoder | None, str | None]:
    """The fast encoder of a tokenizer where it is equal to it, and else why not (None: it is for other kinds)."""
    definition = fast_definition(tokenizer)
    if definition is None:
        return None, None
    encoder = None
    try:
        encoder = FastEncoder(definition)
        difference = prove(tokenizer, encoder, list(documents))
    except ImportError:
        difference = "it is not installed (pip install 'megaforge[data]')"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # its refusals and its Rust panics (no Exception) cost speed, not the run
        difference = f"it cannot load this tokenizer ({error})"
    return (encoder, None) if difference is None else (None, difference)


def prove(tokenizer: Tokenizer, encoder: FastEncoder, documents: Sequence[str]) -> str | None:
    """Compares the encoder with the tokenizer; returns None where they agree, else the first difference in words."""
    controls = list(getattr(tokenizer, "control_tokens", {}))
    texts = [*_probe_texts(controls), *documents]
    expected = tokenizer.encode_batch(texts)
    for text, slow, fast in zip(texts, expected, encoder.encode(texts), strict=True):
        if fast.tolist() != slow:
            return f"ids differ on {text[:40]!r}"
    return None


def _probe_texts(controls: Sequence[str]) -> list[str]:
    """About 30 kB of text: the fragments, seeded mixtures of them, random Unicode, and every control token as text."""
    source = random.Random(0)
    texts = list(_FRAGMENTS)
    for literal in controls[:64]:
        texts += [literal, f"a{literal}b {literal}\n{literal}{literal}", literal[:-1], f" {literal.upper()}"]
    for _ in range(80):
        low, high = source.choice(_BLOCKS)
        text = "".join(chr(source.randint(low, high)) for _ in range(source.randint(1, 40)))
        texts.append(source.choice(("", " ", "\n", "x", "1")) + text + source.choice(("", "  ", "'s", "\r\n", "9")))
    for _ in range(16):
        pieces = [source.choice(_FRAGMENTS)[: source.randint(1, 60)] for _ in range(4)]
        texts.append(source.choice(("", " ", "\n ")).join(pieces))
    return texts


def _resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say (then the cache is not bounded by it)."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0
