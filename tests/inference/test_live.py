"""Texts from a model that is being trained are those of the model at rest, at every layout of its training."""

from __future__ import annotations

import pytest

from megaforge.inference.generation import Continuations, Sampling
from megaforge.inference.live import LiveModel
from tests.nn.support import perturb
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import trainer_of
from tests.training.tiny import VOCAB, arguments, write_dataset

PROMPTS = [[5, 6, 7], [1], [9, 8, 7, 6, 5], [5, 6, 7], [2, 3]]
LAYOUTS = [
    ("--tp", "2", "--sp", "--pp", "2", "--pipeline-schedule", "zb-v", "--micro-batch-size", "1"),
    ("--ep", "2", "--pp", "2", "--vpp", "2", "--micro-batch-size", "1"),
]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def written(argv: list[str]) -> list[list[int]]:
    """What a rank writes: of even replicas all prompts, of odd ones two, so that these are idle sooner."""
    trainer = trainer_of(argv)
    perturb(trainer.model, trainer.ctx, 0.3)
    model = LiveModel(trainer.engine.model, trainer.engine.plan)
    count = 2 if trainer.ctx.dp.rank % 2 else len(PROMPTS)
    texts: list[list[int]] = [[] for _ in range(count)]
    with model.writing():
        batch = Continuations(model, PROMPTS[:count], Sampling(), seeds=range(count), unusable=[VOCAB - 1])
        for _ in range(3 + 2 * count):
            for number, token in batch.draw().items():
                texts[number].append(token)
            batch.drop([number for number in batch.going_on if len(texts[number]) > 3 + number])
    return texts


def test_each_layout_writes_the_same(ranks: RankPool, prefix: str) -> None:
    argv = arguments(prefix, "--hybrid-layer-pattern", "RE*ER-*-", "--fp64")
    expected = written(argv)
    assert [len(text) for text in expected] == [4, 5, 6, 7, 8] and len({*map(tuple, expected)}) == 5
    for layout in LAYOUTS:
        found = ranks.run(4, written, [*argv, *layout])
        assert all(one == expected[: len(one)] for one in found), layout
        assert any(len(one) == 5 for one in found)


def test_whole_texts_alone(prefix: str, ranks: RankPool) -> None:
    with pytest.raises(AssertionError, match="--cp 2: texts are written by ranks that have whole ones; use --cp 1"):
        ranks.run(2, written, arguments(prefix, "--cp", "2", "--hybrid-layer-pattern", "R-*-"))
