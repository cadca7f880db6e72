"""GPU time by kind of kernel, from a profile."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

KINDS = (
    ("wkv", r"wkv"),
    ("products", r"gemm|cutlass|nvjet|cublas|xmma|grouped_mm"),
    ("attention", r"flash|fmha|attention|softmax"),
    ("communication", r"nccl"),
    ("copies", r"memcpy|memset"),
    ("elementwise", r"elementwise|vectorized|reduce|triton|cat|index|scatter|gather|norm|fill"),
)


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    name = kernel.lower()
    return next((kind for kind, words in KINDS if re.search(words, name)), "other")


def by_kind(times: Iterable[tuple[str, float]]) -> Counter[str]:
    """Microseconds of each kind, from (kernel, microseconds)."""
    total: Counter[str] = Counter()
    for kernel, microseconds in times:
        total[kind_of(kernel)] += microseconds
    return total
