"""A run that begins with the adapters of a folder, ours or peft's, at any layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megaforge.checkpoint.adapter_files import AdapterFolder, export_peft
from megaforge.checkpoint.convert import write_directory
from megaforge.checkpoint.sources import open_source
from megaforge.errors import UserError
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import trainer_of
from tests.peft.test_adapter_files import LLAMA, RUN, TOKENS, _Base, experts_run, logits, lora_run
from tests.peft.test_lora import LORA, MODEL, SIZES
from tests.training.tiny import arguments, dense_arguments, make_trainer, write_dataset


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def test_it_begins_where_the_folder_ended(prefix: str, tmp_path: Path) -> None:
    tuned = lora_run(prefix, tmp_path)
    export_peft(open_source(tuned), tmp_path / "adapter")
    begin = [*dense_arguments(prefix, "*-*-", *LLAMA, *RUN), "--pretrained-checkpoint", str(tmp_path / "base")]
    lora = ("--peft", "lora", "--lora-rank", "4", "--lora-rank-pattern", "v_proj=2")
    start = ("--peft-from", str(tmp_path / "adapter"))
    for more in ((), ("--lora-alpha", "8")):  # another scale is in B
        trainer = make_trainer([*begin, *lora, *start, *more])
        torch.testing.assert_close(trainer.model.eval().logits(TOKENS), logits(tuned), rtol=1e-5, atol=1e-5)
    four_bits = (*begin, *lora, *start, "--peft", "qlora", "--qlora-block-size", "16")
    assert torch.equal(
        make_trainer(four_bits).model.get_parameter("layers.0.ffn.down.lora.B"),
        trainer_of([*begin, *lora, *start]).model.get_parameter("layers.0.ffn.down.lora.B"),
    )
    for wrong, said in (
        (("--lora-rank", "2"), r"has rank 4 there, 2 here; use --lora-rank 4"),
        (("--peft-targets", "ffn", "--lora-rank-pattern", "down=4"), "it has one for .*give the --peft-targets"),
    ):
        with pytest.raises(UserError, match=said):
            make_trainer([*begin, *lora, *start, *wrong])


def begun(argv: list[str]) -> dict[str, torch.Tensor]:
    trainer = trainer_of(argv)
    trainer.train()
    return {}


def test_experts_and_shards_begin_so_too(ranks: RankPool, prefix: str, tmp_path: Path) -> None:
    """A step of almost no rate leaves what was begun with."""
    flags = arguments(prefix, *MODEL, *SIZES, *LORA, *RUN, "--fp64", "--global-batch-size", "4")
    flags += ["--micro-batch-size", "1"]
    experts_run([*flags, "--save", str(tmp_path / "tuned")])
    export_peft(open_source(tmp_path / "tuned"), tmp_path / "adapter")
    write_directory(_Base(tmp_path / "tuned"), tmp_path / "base")
    base = str(tmp_path / "base")
    more = ("--pretrained-checkpoint", base, "--peft-from", str(tmp_path / "adapter"), "--lr", "1e-30")
    line = [*flags, *more, "--save", str(tmp_path / "again"), "--ep", "2", "--zero", "1"]
    ranks.run(2, begun, line)
    export_peft(open_source(tmp_path / "again"), tmp_path / "same")
    one, other = (AdapterFolder(tmp_path / name).pairs for name in ("adapter", "same"))
    assert one.keys() == other.keys()
    for module, pair in one.items():
        for ours, theirs in zip(pair[:2], other[module][:2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-20, msg=module)
