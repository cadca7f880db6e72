"""Rules that say what a parameter holds at step 0, as functions of (seed, global name, position) alone.

Random rules are cut into fixed tiles of the global tensor, each drawn from its own counter-based Philox stream
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so a rank draws only the tiles its shard
touches and every sharding slices the same tensor.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

TILE = 256  # edge of a random tile along the last two dimensions; part of the definition of every initial weight

Box = tuple[tuple[int, int], ...]


class InitRule(Protocol):
    """Fills a box of a global tensor."""

    def fill(self, seed: int, name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        """Values of ``box`` of the global tensor ``name`` of ``shape``: float64, on the CPU."""
        ...


def _stream(seed: int, name: str, tile: tuple[int, ...]) -> np.random.Generator:
    key = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    counter = hashlib.sha256(repr(tile).encode()).digest()[:16]
    # The lower half of the counter is left at zero: it counts the draws within the tile.
    high = np.frombuffer(counter, dtype=np.uint64)
    return np.random.Generator(
        np.random.Philox(key=np.frombuffer(key[:16], dtype=np.uint64), counter=np.array([0, 0, *high], dtype=np.uint64))
    )


def _fill_tiles(
    seed: int,
    name: str,
    shape: tuple[int, ...],
    box: Box,
    draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray],
) -> torch.Tensor:
    """Draws the tiles that ``box`` touches and copies out their overlap with it."""
    edges = tuple(1 if dim < len(shape) - 2 else TILE for dim in range(len(shape)))
    out = np.empty([stop - start for start, stop in box])
    ranges = [range(start // edge, -(-stop // edge)) for (start, stop), edge in zip(box, edges, strict=True)]
    for tile in itertools.product(*ranges):
        origin = [index * edge for index, edge in zip(tile, edges, strict=True)]
        size = tuple(min(edge, dim - at) for edge, dim, at in zip(edges, shape, origin, strict=True))
        values = draw(_stream(seed, name, tile), size)
        source, target = [], []
        for at, length, (start, stop) in zip(origin, size, box, strict=True):
            low, high = max(at, start), min(at + length, stop)
            source.append(slice(low - at, high - at))
            target.append(slice(low - start, high - start))
        out[tuple(target)] = values[tuple(source)]
    return torch.from_numpy(out)


@dataclass(frozen=True)
class Normal:
    """Gaussian of mean 0 and standard deviation ``std``; rows from ``valid_rows`` on (vocabulary padding) are zero."""

    std: float
    valid_rows: int | None = None

    def fill(self, seed: int, name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        out = _fill_tiles(seed, name, shape, box, lambda rng, size: rng.standard_normal(size) * self.std)
        if self.valid_rows is not None:
            out[max(0, self.valid_rows - box[0][0]) :] = 0
        return out


@dataclass(frozen=True)
class Uniform:
    """Uniform on [-bound, bound); rows from ``valid_rows`` on are zero."""

    bound: float
    valid_rows: int | None = None

    def fill(self, seed: int, name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        out = _fill_tiles(seed, name, shape, box, lambda rng, size: rng.uniform(-self.bound, self.bound, size))
        if self.valid_rows is not None:
            out[max(0, self.valid_rows - box[0][0]) :] = 0
        return out


@dataclass(frozen=True)
class Constant:
    """Every element is ``value``."""

    value: float

    def fill(self, seed: int, name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        return torch.full([stop - start for start, stop in box], self.value, dtype=torch.float64)


@dataclass(frozen=True)
class Elementwise:
    """A formula of the element's index along the last dimension: ``formula(i)`` takes and returns float64 [n]."""

    formula: Callable[[torch.Tensor], torch.Tensor]

    def fill(self, seed: int, name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        start, stop = box[-1]
        values = self.formula(torch.arange(start, stop, dtype=torch.float64))
        return values.expand([high - low for low, high in box]).clone()


@dataclass(frozen=True)
class OfModule:
    """``rule`` as it draws for the name of the module that has the parameter: ``mixer.w2``, not ``mixer.w2.weight``."""

    rule: InitRule

    def fill(self, seed: int, name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        return self.rule.fill(seed, name.rpartition(".")[0], shape, box)


@dataclass(frozen=True)
class Orthogonal:
    """A (semi-)orthogonal matrix times ``gain`` (Saxe et al., arXiv 1312.6120), as torch.nn.init.orthogonal_.

    An orthogonal matrix has no independent tiles, so each rank builds the whole matrix of this one parameter; a
    leading dimension (experts) gives independent matrices. Rows from ``valid_rows`` on are zero.
    """

    gain: float = 1.0
    valid_rows: int | None = None

    def fill(self, seed: int, name: str, shape: tuple[int, ...], box: Box) -> torch.Tensor:
        out = torch.empty([stop - start for start, stop in box], dtype=torch.float64)
        lead = [range(start, stop) for start, stop in box[:-2]]
        rows, cols = shape[-2:]
        rows = rows if self.valid_rows is None else self.valid_rows
        for index in itertools.product(*lead):
            part = (*((i, i + 1) for i in index), (0, rows), (0, cols))
            gaussian = _fill_tiles(
                seed, name, (*shape[:-2], rows, cols), part, lambda rng, size: rng.standard_normal(size)
            )
            gaussian = gaussian.reshape(rows, cols)
            q, r = torch.linalg.qr(gaussian if rows >= cols else gaussian.T)
            q = q * r.diagonal().sign()
            full = torch.zeros(shape[-2:], dtype=torch.float64)
            full[:rows] = (q if rows >= cols else q.T) * self.gain
            local = tuple(i - start for i, (start, _) in zip(index, box, strict=False))
            out[local] = full[tuple(slice(start, stop) for start, stop in box[-2:])]
        return out
