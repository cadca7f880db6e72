"""What an augmentation is: a change of sample k that is a pure function of (its tokens, seed, k)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megaforge.config.config import Config
from megaforge.data.sample_order import key_of, splitmix64
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError


class Augmentation:
    """Changes samples as they are read. Registered by its name in :data:`megaforge.registry.AUGMENTATIONS`; a run has
    those whose :meth:`of` gives one.

    Randomness comes from :func:`uniform` alone, keyed by the sample: resume, workers and layout change nothing.
    """

    @classmethod
    def of(cls, config: Config, tokenizer: Tokenizer | None) -> Augmentation | None:
        """What the flags ask for; None: nothing.

        Raises:
            UserError: the tokenizer lacks a token that it needs.
        """
        raise NotImplementedError

    def rewrite(self, k: int, domain: str | None, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> None:
        """Changes the tokens of sample ``k``, inputs and labels alike, in place: int64 and bool [S + n]; ``marks`` has
        where documents begin."""

    def shown(self, k: int, inputs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """What the model reads in place of the inputs of sample ``k``, int64 [S]; the labels stay."""
        return inputs

    def state(self) -> dict[str, Any]:
        """What the changes depend on, as checkpoints keep it (JSON), by flag."""
        raise NotImplementedError


def uniform(count: int, *key: object) -> npt.NDArray[np.float64]:
    """``count`` numbers in [0, 1) that depend on ``key`` (JSON-like parts) alone."""
    drawn = splitmix64(key_of(*key), np.arange(count, dtype=np.uint64))
    return (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53


def token_id(
    flag: str, name: str | None, usual: Sequence[str], tokenizer: Tokenizer | None, vocab_size: int | None
) -> int:
    """The id of a control token.

    Args:
        flag: that names it.
        name: what was given there: a control token of the tokenizer, or an id.
        usual: the names that published tokenizers have for it, where nothing was given.
        vocab_size: of the model; None checks nothing.

    Raises:
        UserError: there is no such token, or no such id.
    """
    known = {} if tokenizer is None else tokenizer.control_tokens
    found = name if name is not None else next((one for one in usual if one in known), None)
    if found is None:
        where = "there is no --tokenizer-model" if tokenizer is None else f"{tokenizer.model_path} has none"
        raise UserError(
            f"{flag}: no token is named, and {where} of the names {', '.join(usual)}; name one of its control tokens, "
            "or an id that no text has (tools/train_tokenizer.py --special-tokens adds some)"
        )
    if found in known:
        return known[found]
    if not found.isdecimal():
        there = f"it has {', '.join(known)}" if known else "there are none"
        raise UserError(f"{flag} {found}: no control token of the tokenizer has this name ({there}); or give an id")
    if vocab_size is not None and int(found) >= vocab_size:
        raise UserError(f"{flag} {found}: the model's vocabulary has ids 0..{vocab_size - 1}; give one of these")
    return int(found)
