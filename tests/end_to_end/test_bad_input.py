"""What a mistake gets: one clear error on every rank, a status that is not zero, and no hang."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from megaforge.checkpoint.find import find_checkpoint
from megaforge.data.indexed_dataset import IndexedDatasetWriter
from megaforge.errors import UserError
from megaforge.parallel.context import ParallelContext
from tests.end_to_end.launch import run
from tests.parallel.pool import RankPool
from tests.training.tiny import arguments, make_config, make_trainer, write_dataset

SCRIPT = "pretrain_cdrmix.py"


def build_and_train(argv: list[str]) -> str:
    """The entry script's work on one rank of a group that exists already; the error's text, or how it ended well."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    try:
        tp = make_config(argv).parallel.tensor_model_parallel_size
        context: list[ParallelContext] = []
        if size % tp == 0:
            context.append(ParallelContext.create(tp=tp))
        make_trainer(argv, *context).train()
    except UserError as error:
        return str(error)
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
    return "trained"


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "data_text_document", documents=12)


def trained(prefix: str, folder: Path, ranks: RankPool) -> str:
    """A finished run's --save directory with the checkpoints of iterations 1 and 2."""
    save = str(folder / "run")
    flags = arguments(prefix, "--train-iters", "2", "--save", save, "--save-interval", "1", "--tp", "2")
    assert ranks.run(2, build_and_train, flags) == ["trained", "trained"]
    return save


def refused(ranks: RankPool, prefix: str, *flags: str) -> str:
    """The one message that both ranks end with."""
    first, second = ranks.run(2, build_and_train, arguments(prefix, *flags))
    assert first == second
    assert first != "trained"
    return first


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (("--tp", "2", "--num-attention-heads", "1", "--kv-channels", "8"), ("--tp 2", "--num-attention-heads 1")),
        (("--tp", "2", "--rwkv-head-size", "32"), ("--tp 2", "RWKV heads")),
        (
            ("--tp", "2", "--make-vocab-size-divisible-by", "1", "--vocab-size", "63"),
            ("--tp 2", "vocabulary of 63"),
        ),
        (("--tp", "3"), ("--tp 3", "2 ranks")),
        (("--global-batch-size", "6", "--micro-batch-size", "2"), ("--global-batch-size 6", "dp 2")),
        (("--tokenizer-model", "20"), ("token id", "0..20")),
        (("--load", "/nowhere/at/all"), ("--load /nowhere/at/all", "does not exist")),
        (("--save", "/proc/none"), ("--save /proc/none",)),
        (("--metrics-file", "/proc/none/m.jsonl"), ("--metrics-file /proc/none/m.jsonl",)),
        (("--data-path", "/nowhere/data"), ("/nowhere/data.idx", "does not exist")),
        (("--eval-iters", "1", "--split", "100,0,0"), ("--split 100,0,0",)),
        (("--early-stopping-patience", "2"), ("--early-stopping-patience 2", "--eval-iters")),
        (("--eval-iters", "1", "--early-stopping-metric", "bits_per_byte"), ("--early-stopping-metric bits_per_byte",)),
    ],
)
def test_a_wrong_flag_is_named(ranks: RankPool, prefix: str, flags: tuple[str, ...], names: tuple[str, ...]) -> None:
    message = refused(ranks, prefix, *flags)
    assert all(name in message for name in names), message


@pytest.mark.parametrize(
    ("suffix", "damage", "word"),
    [
        (".bin", "missing", "does not exist"),
        (".idx", "missing", "does not exist"),
        (".bin", "truncated", "truncated"),
        (".idx", "truncated", "truncated"),
        (".bin", "empty", "truncated"),
        (".idx", "foreign", "not a Megatron index"),
    ],
)
def test_bad_dataset_files_are_named(ranks: RankPool, prefix: str, suffix: str, damage: str, word: str) -> None:
    path = Path(prefix + suffix)
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        path.write_bytes(b"PK\x03\x04" + bytes(200))
    else:
        os.truncate(path, 0 if damage == "empty" else path.stat().st_size - 10)
    message = refused(ranks, prefix)
    assert path.name in message and word in message, message


def test_the_datasets_tokenizer_is_told_apart(ranks: RankPool, tmp_path: Path, corpus: Path) -> None:
    other = tmp_path / "other.json"
    content = json.loads((corpus / "tok.json").read_text(encoding="utf-8"))
    content["model"]["merges"].pop()
    other.write_text(json.dumps(content), encoding="utf-8")
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(other))
    message = refused(ranks, str(corpus / "text_text_document"), *flags)
    assert "another tokenizer" in message and "text_text_document" in message


def test_an_empty_corpus_is_named(ranks: RankPool, tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "none_text_document", np.uint16):
        pass
    assert "none_text_document.bin is empty" in refused(ranks, str(tmp_path / "none_text_document"))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(ranks: RankPool, prefix: str, tmp_path: Path) -> None:
    save = trained(prefix, tmp_path, ranks)
    for number, (expected, path) in enumerate(((1, "step_0000002"), (0, "step_0000001"))):
        damaged = next(Path(save, path).glob("*.safetensors"))
        content = bytearray(damaged.read_bytes())
        content[-3] ^= 1
        damaged.write_bytes(content)
        if expected:
            flags = arguments(prefix, "--train-iters", "3", "--load", save, "--save", str(tmp_path / "again"))
            assert ranks.run(2, build_and_train, flags) == ["trained", "trained"], number
            assert find_checkpoint(tmp_path / "again", ParallelContext.single()).name == "step_0000003"
    message = refused(ranks, prefix, "--load", save)
    assert "none of its checkpoints is valid" in message and save in message, message
    names = [path.name for path in Path(save).iterdir()]
    assert not any("damaged" in name for name in names), "only the run that will save there renames"
    assert "none of its checkpoints is valid" in refused(ranks, prefix, "--load", save, "--save", save)
    assert (Path(save) / "step_0000002.damaged").is_dir()
    assert "step_0000002.damaged" in refused(ranks, prefix, "--load", save, "--save", save), "it does not start anew"


def test_a_new_run_does_not_mix_its_checkpoints_with_anothers(ranks: RankPool, prefix: str, tmp_path: Path) -> None:
    save = trained(prefix, tmp_path, ranks)
    for flags in ((), ("--load", save, "--finetune")):
        assert f"--load {save} to continue" in refused(ranks, prefix, "--save", save, *flags)


def test_another_model_is_refused_by_its_fields(ranks: RankPool, prefix: str, tmp_path: Path) -> None:
    save = trained(prefix, tmp_path, ranks)
    message = refused(ranks, prefix, "--load", save, "--num-experts", "8")
    assert "--num-experts 4 in the checkpoint, 8 here" in message


def test_the_real_script_ends_every_rank(prefix: str) -> None:
    """Through torchrun: the message once, though both ranks found the mistake."""
    outcome = run(2, SCRIPT, *arguments(prefix, "--tp", "2", "--num-attention-heads", "1", "--kv-channels", "8"))
    assert outcome.status != 0
    assert len(outcome.errors) == 1 and "--num-attention-heads 1" in outcome.errors[0], outcome.err


def test_a_full_disk_leaves_the_old_checkpoint(prefix: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the write fails with an OSError all the same."""
    save = tmp_path / "run"
    first = run(1, SCRIPT, *arguments(prefix, "--train-iters", "1", "--save", str(save)))
    assert first.status == 0, first.err
    size = max(file.stat().st_size for file in save.rglob("*") if file.is_file())

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    flags = arguments(prefix, "--train-iters", "3", "--save", str(save), "--load", str(save), "--save-interval", "1")
    outcome = run(2, SCRIPT, *flags, "--tp", "1", preexec_fn=limit)
    assert outcome.status != 0
    assert len(outcome.errors) == 1 and f"--save {save}" in outcome.errors[0], outcome.err
    assert "earlier ones stay valid" in outcome.errors[0]
    assert find_checkpoint(save, ParallelContext.single()).name == "step_0000001"
    assert [path.name for path in save.iterdir() if path.name.startswith(".tmp")] == []
    again = arguments(prefix, "--train-iters", "2", "--save", str(save), "--load", str(save))
    assert run(1, SCRIPT, *again).status == 0


def test_the_data_may_not_change_under_a_run(ranks: RankPool, prefix: str, tmp_path: Path) -> None:
    save = trained(prefix, tmp_path, ranks)
    for suffix in (".bin", ".idx"):
        shutil.copy(write_dataset(tmp_path / "other_text_document", documents=12, seed=5) + suffix, prefix + suffix)
    assert "--data-path" in refused(ranks, prefix, "--load", save)
