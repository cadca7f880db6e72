"""``--dry-run``: the job's own checks, at any number of ranks, in this process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megaforge.config.cli import parse_config
from megaforge.errors import UserError
from megaforge.planning.layout import LIBRARIES
from megaforge.planning.state_bytes import StateBytes
from megaforge.verification.dry_run import DryRank, dry_run, fewest_ranks, verdicts

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


@pytest.mark.parametrize("zero", ["0", "1", "2"])
def test_what_no_rule_updates_has_no_gradient(zero: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Biases of experts and the load of the last step are parameters that training writes by itself."""
    flags = (
        "--ffn moe --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
        "--moe-router-load-balancing-type global_aux_loss --zero"
    )
    dry_run(parse_config([*TEST, *flags.split(), zero, "--dry-run-world-size", "4"]).config)
    assert "bytes equal the plan's" in capsys.readouterr().out


def test_what_runs_on_gpus_alone_is_tried_without() -> None:
    dry_run(parse_config([*TEST, "--device", "cuda", "--wkv-backend", "fla"]).config)


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


def dry_rank(rank: int, gigabytes: float) -> DryRank:
    state = StateBytes(0, 0, 0, 0)
    return DryRank(rank, (0,), (), state, state, gigabytes * 1e9 - LIBRARIES, 0.0, 0.0)


def test_the_verdict_is_of_the_fullest_rank() -> None:
    text = verdicts([dry_rank(0, 60.0), dry_rank(8, 76.0)])
    assert text.startswith("the fullest rank, 8, needs 76.00 GB")
    assert "is tight on h100-80g: 95% of 80 GB" in text and "fits on h200-141g: 54%" in text and "to need less" in text
    assert "DOES NOT FIT on h200-141g: 107%" in verdicts([dry_rank(0, 151.0)])
    small = verdicts([dry_rank(0, 71.0)])
    assert "fits on a100-80g: 89%" in small and "to need less" not in small


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ((), 1),
        (("--tp", "4", "--pp", "2"), 8),
        (("--tp", "2", "--ep", "4"), 4),
        (("--tp", "4", "--ep", "2", "--etp", "4", "--pp", "3"), 24),
        (("--cp", "2", "--ep", "8", "--etp", "1"), 8),
    ],
)
def test_the_fewest_ranks_of_a_layout(flags: tuple[str, ...], ranks: int) -> None:
    assert fewest_ranks(parse_config(flags).config) == ranks
