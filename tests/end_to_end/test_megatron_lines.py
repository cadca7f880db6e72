"""Scripts of Megatron-LM's examples, unchanged but for paths: the model that they name, two steps of a small one."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from megaforge.config.cli import parse_config
from megaforge.data.indexed_dataset import IndexedDatasetWriter
from megaforge.pretrain import pretrain
from megaforge.training.prepare import prepare
from megaforge.training.setup import build_trainer, make_context
from tests.parallel.pool import RankPool
from tests.training.tiny import record

LINES = Path(__file__).parents[1] / "config" / "megatron_lines"
NAMED = {  # ranks, parameters
    "mixtral_8x7b": (32, 46_702_792_704),
    "gpt3_175b": (128, 174_604_836_864),
    "llama3_8b_bf16": (8, 8_030_261_248),
    "mamba_800m": (8, 448_375_680),
}
SMALL = dict(
    pair.split("=")
    for pair in (
        "--num-layers=4 --hidden-size=32 --ffn-hidden-size=48 --num-attention-heads=8 --num-query-groups=8 "
        "--kv-channels=4 --seq-length=16 --max-position-embeddings=32 --global-batch-size=8 --train-iters=2 "
        "--lr-decay-iters=2 --lr-warmup-iters=1 --train-samples=16 --lr-decay-samples=16 --lr-warmup-samples=8 "
        "--eval-iters=1 --vocab-size=64 --split=80,20,0 --num-workers=0 --init-method-std=0.02"
    ).split()
)
LAYOUTS = {
    "mixtral_8x7b": {"--pipeline-model-parallel-size": "2", "--expert-model-parallel-size": "4"},
    "gpt3_175b": {"--tensor-model-parallel-size": "2", "--pipeline-model-parallel-size": "2"},
    "llama3_8b_bf16": {},
    "mamba_800m": {
        "--tensor-model-parallel-size": "2",
        "--hybrid-layer-pattern": "M--*M-",
        "--micro-batch-size": "2",
        "--hidden-size": "256",  # eight heads, one for each group
    },
}
VOCABULARIES = {"mixtral_8x7b": 256, "gpt3_175b": 300, "llama3_8b_bf16": 64, "mamba_800m": 256}
BACKEND = ("--distributed-backend", "gloo")  # of a CPU, where a line says nccl
TRACKERS = ("--wandb-project", "--wandb-exp-name", "--tensorboard-dir", "--profile-step-start", "--profile-step-end")


def words(name: str, folder: Path) -> list[str]:
    text = re.sub("^#.*", "", (LINES / f"{name}.txt").read_text("utf-8"), flags=re.MULTILINE)
    for place in ("TOKENIZER", "DATA", "VOCABULARY", "MERGES", "SAVE"):
        text = text.replace(f"${place}", str(folder / place.lower()))
    return shlex.split(text.replace("'99,1,0'", "\"'99,1,0'\""))  # Megatron-LM's arrays keep these quotes


def replaced(line: list[str], values: dict[str, str], left_out: tuple[str, ...] = ()) -> list[str]:
    """The line with other values, as far as it has these flags, and without some."""
    out: list[str] = []
    for number, word in enumerate(line):
        before = line[number - 1] if number else ""
        if word not in left_out and before not in left_out:
            out.append(values.get(before, word))
    return out


def sentencepiece(path: Path, size: int) -> None:
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2", reason="needs the data extra").ModelProto()
    for piece, kind in (("<unk>", 2), ("<s>", 3), ("</s>", 3)):
        proto.pieces.add(piece=piece, score=0, type=kind)
    for number in range(size - 3):
        proto.pieces.add(piece=f"w{number}", score=-number, type=1)
    path.write_bytes(proto.SerializeToString())


def byte_pairs(vocabulary: Path, merges: Path, size: int) -> None:
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    pairs = [f"{one} {other}" for one in letters for other in letters][: size - 1 - len(letters)]
    names = [*letters, *(pair.replace(" ", "") for pair in pairs), "<|endoftext|>"]
    vocabulary.write_text(json.dumps({name: number for number, name in enumerate(names)}), "utf-8")
    merges.write_text("\n".join(("#version: 0.2", *pairs, "")), "utf-8")


def corpus(prefix: Path, vocabulary: int) -> None:
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(60):
            writer.add_document(rng.integers(3, vocabulary, int(rng.integers(5, 90))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("lines")
    corpus(made / "data", 250)
    return made


@pytest.mark.parametrize("name", NAMED)
def test_the_model_that_the_line_names(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sentencepiece(folder / "tokenizer", 32_000)
    byte_pairs(folder / "vocabulary", folder / "merges", 50_257)
    ranks, parameters = NAMED[name]
    dry = ("--dry-run", "--dry-run-world-size", str(ranks), "--dry-run-ranks", "0", "--device", "cpu", *BACKEND)
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words(name, folder), *dry])
    assert pretrain("pretrain_gpt.py", "", as_megatron=True) == 0
    out, err = capfd.readouterr()
    assert f"megatron on {ranks} ranks" in out and f"\n{parameters:,} parameters\n" in out
    assert re.match(r"\d+ blocks: \d+ x (attention|Mamba-2) ", err)


def two_steps(lines: dict[str, list[str]]) -> dict[str, list[float]]:
    """The losses of each line's run, on one rank of a group that exists already."""
    import torch.distributed as dist

    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    losses = {}
    try:
        for name, line in lines.items():
            config = parse_config(line, as_megatron=True).config
            trainer = build_trainer(prepare(config), make_context(config, "cpu"))
            recorder = record(trainer)
            trainer.train()
            losses[name] = [one["loss"] for one in recorder.records if one["kind"] == "step"]
    finally:
        gc.enable()  # --manual-gc
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
    return losses


def test_each_line_trains_two_steps_on_eight_ranks(folder: Path, ranks: RankPool) -> None:
    sentencepiece(folder / "tokenizer", 256)
    byte_pairs(folder / "vocabulary", folder / "merges", 300)
    lines = {}
    for name, layout in LAYOUTS.items():
        line = replaced(words(name, folder), SMALL | layout, TRACKERS)
        start = line.index("--step-batch-size-schedule") if "--step-batch-size-schedule" in line else None
        if start is not None:
            line[start + 1 : start + 7] = ["0:4", "64:8"]
        lines[name] = [*(word for word in line if word != "--profile"), "--device", "cpu", *BACKEND]
        lines[name][lines[name].index("--save") + 1] += f"/{name}"
        lines[name][lines[name].index("--load") + 1] += f"/{name}"
    [losses, *others] = ranks.run(8, two_steps, lines)
    assert set(losses) == set(NAMED) and all(len(steps) == 2 for steps in losses.values())
    for name, vocabulary in VOCABULARIES.items():
        assert abs(losses[name][0] - math.log(vocabulary)) < 0.3, name
    assert all(other in (losses, {name: [] for name in losses}) for other in others)
