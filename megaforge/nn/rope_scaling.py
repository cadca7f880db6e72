"""Rotary frequencies for longer sequences than a model was first trained on."""

from __future__ import annotations

import math

from torch import Tensor

# Those of Llama 3.1 to 3.3, which Megatron-LM has no flags for either.
LOW_FREQUENCY_FACTOR, HIGH_FREQUENCY_FACTOR, ORIGINAL_LENGTH = 1.0, 4.0, 8192


def scaled_frequencies(frequencies: Tensor, factor: float) -> Tensor:
    """Llama 3.1's bands (Grattafiori et al., arXiv 2407.21783; ``rope_type`` llama3 of Hugging Face's transformers): a
    pair that turns less than once over ``ORIGINAL_LENGTH`` tokens is slowed down ``factor`` times, one that turns more
    than four times stays, and those between go from the one to the other.

    Args:
        frequencies: fp64 [n], angle from one position to the next.

    Returns:
        fp64 [n].
    """
    turns = ORIGINAL_LENGTH * frequencies / (2 * math.pi)
    kept = ((turns - LOW_FREQUENCY_FACTOR) / (HIGH_FREQUENCY_FACTOR - LOW_FREQUENCY_FACTOR)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)
