"""Named terms and what they add to a loss."""

from __future__ import annotations

import pytest
import torch

from megaforge.errors import UserError
from megaforge.nn.losses import LossTerm, add_terms, total_loss


def test_the_loss_is_the_weighted_sum_of_means() -> None:
    a, b, c = (torch.tensor(value, requires_grad=True) for value in (6.0, 10.0, 5.0))
    terms = {"a": LossTerm(a, "labels"), "b": LossTerm(b, "tokens", 0.5), "c": LossTerm(c, "tokens", 0.0)}
    loss = total_loss(terms, {"labels": torch.tensor(3.0, dtype=torch.float64), "tokens": 4.0})
    assert loss is not None and loss.dtype == torch.float32 and float(loss.detach()) == 2 + 1.25
    loss.backward()
    assert float(a.grad) == torch.tensor(1.0).div(3) and float(b.grad) == 0.125 and c.grad is None  # type: ignore[arg-type]
    assert total_loss({}, {}) is None and total_loss({"c": terms["c"]}, {}) is None


def test_a_sum_in_16_bits_is_divided_in_fp32() -> None:
    a = torch.tensor(1000.0, dtype=torch.bfloat16, requires_grad=True)
    count = torch.tensor(3001.0, dtype=torch.float64)
    loss = total_loss({"a": LossTerm(a, "labels", 0.5)}, {"labels": count})
    assert loss is not None and loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(500 / 3001, rel=1e-6), "3001 is not a number of bf16"


def test_what_is_not_counted_is_named() -> None:
    terms = {"a": LossTerm(torch.tensor(1.0), "labels"), "mine": LossTerm(torch.tensor(1.0), "dozens")}
    with pytest.raises(UserError, match="'mine' is divided by 'dozens', which is not counted; counts are labels"):
        total_loss(terms, {"labels": 1.0})


def test_terms_of_one_name_add_up() -> None:
    known = {"z": LossTerm(torch.tensor(1.0), "tokens", 0.1)}
    add_terms(known, {"z": LossTerm(torch.tensor(2.0), "tokens", 0.1), "y": LossTerm(torch.tensor(5.0), "labels")})
    assert float(known["z"].sum) == 3.0 and known["z"].weight == 0.1 and float(known["y"].sum) == 5.0
