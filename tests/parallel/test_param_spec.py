"""What a parameter carries besides its values: each is asked for by a function that says what lacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init_rules import Constant
from megaforge.parallel.linear_op import PLAIN, WeightQuantizer, give_quantizer, quantizer_of
from megaforge.parallel.param_spec import ParamSpec, declare, main_grad_of, make_parameter, spec_of


def test_what_a_parameter_lacks_is_said() -> None:
    bare = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"shape \(2, 3\) carries no ParamSpec"):
        spec_of(bare)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) has no quantizer"):
        quantizer_of(bare)
    declare(bare, ParamSpec("layers.0.up.weight", (2, 3), Constant(0.0)))
    with pytest.raises(ValueError, match=r"layers\.0\.up\.weight has no gradient that is reduced"):
        main_grad_of(bare)


def test_what_a_parameter_carries() -> None:
    parameter = make_parameter(ParamSpec("w", (2, 3), Constant(0.0)), ParallelContext.single(), torch.float32)
    other = ParamSpec("v", (2, 3), Constant(1.0))
    declare(parameter, other)
    give_quantizer(parameter, quantizer := WeightQuantizer(PLAIN, transposed=False))
    parameter.__dict__["main_grad"] = gradient = torch.ones(2, 3)
    assert spec_of(parameter) is other and quantizer_of(parameter) is quantizer and main_grad_of(parameter) is gradient
