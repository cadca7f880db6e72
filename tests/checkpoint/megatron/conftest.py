"""Checkpoints that megatron-core writes, once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

from tests.checkpoint.megatron import models
from tests.parallel.pool import RankPool


class Written(NamedTuple):
    """Checkpoints by (kind, form), and megatron-core's logits of models.TOKENS by kind."""

    folders: dict[tuple[str, str], Path]
    logits: dict[str, Tensor]


@pytest.fixture(scope="session")
def written(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Written:
    models.available()
    root = tmp_path_factory.mktemp("megatron")
    wanted = [(kind, form) for kind in models.KINDS for form in models.FORMS]
    wanted = [(kind, form) for kind, form in wanted if form != "singletons" or kind == "mixtral"]
    folders = {(kind, form): root / f"{kind}-{form}" for kind, form in wanted}
    ranks.run(4, models.write_all, {key: str(folder) for key, folder in folders.items()})
    own = {kind: str(folders[kind, "torch_dist"]) for kind in models.KINDS}
    return Written(folders, ranks.run(1, models.all_logits, own)[0])
