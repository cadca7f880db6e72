"""``tools/plan.py compression``: what ``--compress-activations`` saves, and how far it moves gradients."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaforge.config.cli import parse_config
from megaforge.planning.measured_activations import compare as kept_bytes
from megaforge.planning.plan_request import COMPRESSED, parse_compression
from megaforge.planning.table import table
from megaforge.verification.parity import VOCABULARY, one_rank, parity_config, write_documents

WITHOUT = ("--recompute", "selective")


@dataclass(frozen=True)
class Effect:
    """On the gradients of one step of one kind of parameter, together.

    Attributes:
        error: norm of the difference over that of the gradient.
        cosine: between the two.
        ratio: of their norms.
    """

    error: float
    cosine: float
    ratio: float


def effects(name: str, flags: Sequence[str] = ()) -> dict[str, Effect]:
    """By parameters of one name in all blocks, then ``all``: the first step of the configuration ``name`` with
    ``flags`` on top, weights with noise, on one CPU rank in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        documents = os.path.join(folder, "documents")
        configs = [
            parity_config(documents, "fp32", None, ("--device", "cpu", *flags, *more), name)
            for more in (WITHOUT, COMPRESSED)
        ]
        _ = write_documents(documents, configs[0].model.vocab_size or VOCABULARY)
        found = [one_rank(config, torch.device("cpu")).gradients[0] for config in configs]
    exact, moved = found
    groups: dict[str, list[str]] = {}
    for parameter in exact:
        words = [word for word in parameter.split(".") if not word.isdigit()]
        groups.setdefault(".".join(words), []).append(parameter)
    groups["all"] = list(exact)
    return {
        kind: _effect([exact[n] for n in names], [moved[n] for n in names])
        for kind, names in groups.items()
        if any(bool(exact[n].any()) for n in names)
    }


def _effect(exact: list[Tensor], moved: list[Tensor]) -> Effect:
    one, other = (torch.cat([tensor.double().flatten() for tensor in tensors]) for tensors in (exact, moved))
    size, theirs = float(one.norm()), float(other.norm())
    return Effect(float((other - one).norm()) / size, float(one @ other) / (size * theirs or 1.0), theirs / size)


def run(arguments: Sequence[str], prog: str = "plan.py compression") -> None:
    """Prints bytes of one micro-batch, and a row for each kind of parameter.

    Raises:
        UserError: a flag is wrong, or the model does not go with it.
    """
    name, flags = parse_compression(arguments, prog)
    found = effects(name, flags)
    sized = parse_config(["--config", name, *flags]).config.model.vocab_size is not None
    size = () if sized else ("--vocab-size", str(VOCABULARY))
    plain, coded = (kept_bytes(("--config", name, *flags, *size, *more)).measured for more in (WITHOUT, COMPRESSED))
    print(f"kept for the backward pass: {plain:,.0f} bytes, in 8 bits {coded:,.0f} ({coded / plain:.1%})")
    rows = [("gradient of", "error", "cosine", "norm")]
    rows += [(kind, f"{e.error:.2%}", f"{e.cosine:.6f}", f"{e.ratio:.4f}") for kind, e in found.items()]
    print(table(rows))
