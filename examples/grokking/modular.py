"""Modular multiplication, the task on which Grokfast was published (Lee et al., arXiv 2405.20233): every sample is
``x * y = z`` for two numbers below a prime p, and only z is predicted.

``--data-path modular://97`` reads it with p = 97: numbers are their own tokens, p is ``=`` and p + 1 is ``*``. Of the
p (p - 1) equations with y > 0 a random half (by ``--seed``) is trained on, in an order that is shuffled anew in each
epoch; the other half validates.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from megaforge.config.config import Config
from megaforge.data.data_source import DataSource, DataSourceKind, SampleView
from megaforge.errors import UserError
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init_rules import Constant, InitRule, Normal, Uniform
from megaforge.parallel.param_spec import ParamSpec, declare, make_parameter, spec_of
from megaforge.registry import CONVERTERS, DATA_SOURCES

LENGTH = 4  # x * y =, of which the last is followed by z


class Equations(SampleView):
    """The equations ``x * y = z`` of some pairs, int64 [n, 2] of x and y."""

    # The tokens that follow x, * and y are given, not predicted: they are marked as what a loss leaves out.
    eod_mask_loss = True

    def __init__(self, p: int, pairs: npt.NDArray[np.int64]) -> None:
        self.p, self.pairs = p, pairs

    def sequence_length(self, k: int) -> int:
        return LENGTH

    def pair(self, k: int) -> npt.NDArray[np.int64] | None:
        """x and y of sample ``k``; None: it is empty, and counts for nothing."""
        return self.pairs[k] if k < len(self.pairs) else None

    def fill(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> int:
        """Writes x * y = z; the label of ``=`` is the only one that counts."""
        pair = self.pair(k)
        if pair is None:
            tokens[:] = 0
            return 0
        x, y = pair
        tokens[: LENGTH + 1] = x, self.p + 1, y, self.p, x * y % self.p
        marks[:LENGTH] = True
        return LENGTH


class HeldOut(Equations):
    """Each equation once; what fills up the last batch is empty."""

    def __len__(self) -> int:
        return len(self.pairs)


class ModularMultiplication(Equations, DataSource):
    """A random half of the equations, in another order in each epoch. As published, an epoch's last batch holds what is
    left of it, and the next one starts with the next batch: its other samples are empty."""

    def __init__(self, p: int, seed: int, batch: int) -> None:
        pairs = np.stack([axis.ravel() for axis in np.meshgrid(np.arange(p), np.arange(1, p), indexing="ij")], 1)
        pairs = pairs[np.random.default_rng(seed).permutation(len(pairs))]
        half = len(pairs) // 2
        super().__init__(p, pairs[:half])
        self._seed, self._held_out, self._epoch = seed, pairs[half:], -(-half // batch) * batch
        self.notices = [f"modular://{p}: {half:,} equations to train on, {len(self._held_out):,} held out"]
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self.pairs))

    def pair(self, k: int) -> npt.NDArray[np.int64] | None:
        epoch, place = divmod(k, self._epoch)
        return self.pairs[self._order(epoch)[place]] if place < len(self.pairs) else None

    def tokens_before(self, samples: int) -> int:
        return samples * LENGTH

    def state(self, consumed_samples: int) -> dict[str, Any]:
        return {"p": self.p, "seed": self._seed}

    def validation(self, split: str = "valid") -> SampleView:
        return HeldOut(self.p, self._held_out)


def prime_of(config: Config) -> int:
    """The p of ``--data-path modular://p``.

    Raises:
        UserError: it is no prime.
    """
    path = config.data.data_path[0]
    text = path.removeprefix("modular://")
    if not text.isdecimal() or int(text) < 3 or any(int(text) % d == 0 for d in range(2, int(int(text) ** 0.5) + 1)):
        raise UserError(f"--data-path {path}: modular:// is followed by an odd prime, such as modular://97")
    return int(text)


def check(config: Config) -> None:
    """Refuses what this task cannot be trained with."""
    p = prime_of(config)
    if config.data.seq_length != LENGTH:
        raise UserError(f"--seq-length {config.data.seq_length}: an equation has {LENGTH} tokens before its answer")
    if (config.model.vocab_size or p + 2) < p + 2:
        raise UserError(f"--vocab-size {config.model.vocab_size}: modular://{p} has {p + 2} tokens")
    if config.model.reset_at_document_boundaries:
        raise UserError("modular:// marks the tokens that are not predicted; add --no-reset-at-document-boundaries")


class Positions(nn.Module):
    """A learned vector of each position, added to the embedding."""

    def __init__(self, size: int, ctx: ParallelContext, dtype: torch.dtype) -> None:
        super().__init__()
        spec = ParamSpec("", (LENGTH, size), Normal(1.0), role="lookup", kind="embedding")
        self.weight = make_parameter(spec, ctx, dtype)

    def forward(self, embedded: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, h]."""
        return embedded + self.weight[: len(embedded), None]


class Unchanged(nn.Module):
    """Stands where a norm was that is applied elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        """x."""
        return x


def norm_stream(model: nn.Module) -> None:
    """The published blocks norm the residual stream itself before attention, not only what attention sees of it."""
    for block in getattr(model, "blocks", ()):
        norm = block.mixer_norm
        block.stream_norm, block.mixer_norm = norm, Unchanged()
        block.register_forward_pre_hook(lambda module, given: (module.stream_norm(given[0]), *given[1:]))


def initialize_as_torch(model: nn.Module) -> None:
    """Initial weights as torch's own modules have them, which the published model is made of: ``Embedding`` normal,
    ``Linear`` uniform within 1/sqrt(inputs), the projection of ``MultiheadAttention`` to q, k and v Xavier's uniform,
    attention's biases zero."""
    for name, module in model.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if weight is None or len(spec_of(weight).shape) < 2:  # of a norm
            continue
        spec = spec_of(weight)
        outputs, inputs = spec.shape
        init: InitRule = Uniform(inputs**-0.5)
        if spec.kind == "embedding":
            init = Normal(1.0)
        elif name.endswith(".qkv"):
            init = Uniform((6 / (inputs + outputs)) ** 0.5)
        declare(weight, replace(spec, init=init))
        if bias is not None:
            declare(bias, replace(spec_of(bias), init=Constant(0.0) if spec.kind == "attention" else init))


def as_published(model: nn.Module, ctx: ParallelContext) -> None:
    """What the published model has and ours has not: learned positions, blocks that norm the stream, torch's initial
    weights, and weight decay of every parameter, norms and biases too."""
    embedding = getattr(model, "embedding", None)
    if embedding is not None:  # on the first pipeline stage
        positions = Positions(embedding.weight.shape[1], ctx, embedding.weight.dtype)
        embedding.positions = positions
        embedding.register_forward_hook(lambda module, given, embedded: positions(embedded))
    norm_stream(model)
    initialize_as_torch(model)
    for parameter in model.parameters():
        declare(parameter, replace(spec_of(parameter), weight_decay=True))


CONVERTERS.register("as_published", as_published)
DATA_SOURCES.register(
    "modular",
    DataSourceKind(
        lambda config, tokenizer: ModularMultiplication(
            prime_of(config), config.training.seed, config.training.global_batch_size or 1
        ),
        check,
    ),
)
