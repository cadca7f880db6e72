"""``--dry-run``: the job's own checks, at any number of ranks, in this process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megaforge.config.cli import parse_config
from megaforge.errors import UserError
from megaforge.training.dry_run import dry_run

TEST = ["--config", "cdrmix-test", "--vocab-size", "500", "--dry-run"]


def test_prints_what_the_ranks_hold(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--tp 2 --dry-run --dry-run-world-size 64 --micro-batch-size 1 --global-batch-size 64"
    dry_run(parse_config([*TEST, *flags.split()]).config)
    text = capsys.readouterr().out
    assert "cdrmix-test on 64 ranks: --tp 2" in text and "(dp 32)" in text
    assert "dry run of 64 ranks" in text
    assert not dist.is_initialized()


def test_refuses_what_the_job_would_refuse() -> None:
    with pytest.raises(UserError, match="--tp 3"):
        dry_run(parse_config([*TEST, "--tp", "3", "--dry-run", "--dry-run-world-size", "6"]).config)
    with pytest.raises(UserError, match="ranks 0 to 7"):
        dry_run(parse_config([*TEST, "--dry-run", "--dry-run-world-size", "8", "--dry-run-ranks", "8"]).config)
    with pytest.raises(UserError, match="--dry-run-ranks some"):
        parse_config([*TEST, "--dry-run-ranks", "some"])


def test_a_model_that_fits_no_machine_is_tried_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real parameters would fill gigabytes: nothing of more than a megabyte may be made outside the meta device."""
    empty = torch.empty

    def small(*args: object, **kwargs: object) -> torch.Tensor:
        out = empty(*args, **kwargs)  # type: ignore[call-overload]
        assert out.is_meta or out.nbytes < 1 << 20, f"{tuple(out.shape)} was allocated"
        return out

    monkeypatch.setattr(torch, "empty", small)
    flags = "--config cdrmix-core-4b --num-layers 4 --tp 8 --sp --dry-run --dry-run-world-size 16 --dry-run-ranks 9"
    dry_run(parse_config(flags.split()).config)
