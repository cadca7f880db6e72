"""Factors on groups of parameters: which they are, what they do to an update, what is refused."""

from __future__ import annotations

import pytest
import torch

from megaforge.config.groups import KINDS, ROLES, group_factors
from megaforge.errors import UserError
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import trainer_of
from tests.training.tiny import arguments, make_trainer, weights, write_dataset


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("groups") / "a_text_document")


def moved(argv: list[str]) -> dict[str, torch.Tensor]:
    """What one step adds to each weight."""
    trainer = make_trainer(argv)
    before = weights(trainer)
    trainer.train()
    return {name: after - before[name] for name, after in weights(trainer).items()}


def test_rates_and_decays_of_groups(prefix: str) -> None:
    line = arguments(prefix, "--fp64", "--train-iters", "1", "--weight-decay", "0.1")
    plain, none = moved(line), moved([*line, "--weight-decay", "0"])
    rates = moved([*line, "--lr-mult", "embedding=0.5", "norm=0"])
    decays = moved([*line, "--wd-mult", "attention=3", "embedding=0"])
    kinds = {main.spec.name: main.spec.kind for main in make_trainer(line).optimizer.main.trained}
    assert {"embedding", "norm", "attention"} <= set(kinds.values())
    for name, kind in kinds.items():
        factor = {"embedding": 0.5, "norm": 0.0}.get(kind, 1.0)
        torch.testing.assert_close(rates[name], factor * plain[name], rtol=1e-6, atol=1e-13)
        share = {"attention": 3.0, "embedding": 0.0}.get(kind, 1.0)
        expected = none[name] + share * (plain[name] - none[name])
        torch.testing.assert_close(decays[name], expected, rtol=1e-6, atol=1e-13)


def test_roles_and_rules_are_groups_and_factors_multiply(prefix: str) -> None:
    line = arguments(prefix, "--lr-mult", "matrix=0.5", "adam=0.5", "lookup=4")
    for main in make_trainer(line).optimizer.main.trained:
        declared = main.parameter.spec.lr_mult  # type: ignore[attr-defined]
        assert main.spec.lr_mult == declared * 0.5 * {"matrix": 0.5, "lookup": 4.0}.get(main.spec.role, 1.0)


def run(argv: list[str]) -> float:
    trainer = trainer_of(argv)
    trainer.train()
    return trainer.evaluate().loss


def test_a_layout_changes_nothing(prefix: str, ranks: RankPool) -> None:
    line = arguments(prefix, "--lr-mult", "embedding=0.2", "norm=3", "--wd-mult", "matrix=20", "--eval-iters", "1")
    [alone] = ranks.run(1, run, line)
    [plain] = ranks.run(1, run, arguments(prefix, "--eval-iters", "1"))
    assert abs(alone - plain) > 1e-4
    assert ranks.run(2, run, [*line, "--pp", "2"]) == pytest.approx([alone] * 2, rel=1e-5)
    assert ranks.run(2, run, [*line, "--zero", "1"]) == pytest.approx([alone] * 2, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("embedding", "GROUP=FACTOR"),
        ("embedding=x", "GROUP=FACTOR"),
        ("embedding=-1", "at least 0"),
        ("embedding=nan", "at least 0"),
        ("embeding=1", "there is no group embeding; there are embedding, head"),
    ],
)
def test_what_names_no_group_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        group_factors("--lr-mult", [text])
    assert str(caught.value).startswith(f"--lr-mult {text}: ") and words in str(caught.value)
    with pytest.raises(UserError, match="already"):
        group_factors("--lr-mult", ["head=1", "head=2"])
    assert group_factors("--lr-mult", [f"{name}=2" for name in (*KINDS, *ROLES)]).keys() == {*KINDS, *ROLES}


def test_a_group_that_nothing_is_in_is_refused(prefix: str) -> None:
    with pytest.raises(UserError, match="nothing that this run trains is of the group sgd"):
        make_trainer(arguments(prefix, "--wd-mult", "sgd=0"))
