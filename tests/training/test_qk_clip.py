"""QK-clip against one step and its own scaling written out, and at every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megaforge.nn.attention import SelfAttention
from megaforge.parallel.packed_sequence import PackedSequence
from tests.nn.support import perturb
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, flags, train
from tests.training.tiny import make_trainer, weights, write_dataset

CLIP = ("--qk-clip", "--qk-clip-threshold", "0.3", "--qk-clip-alpha", "0.3")
# Two query heads a key head, packed documents, biases; evaluations are the same without it.
MODEL = ("--num-query-groups", "2", "--add-bias-linear", "--fp64", "--eval-iters", "0", "--eval-interval", "0")
LIMIT, ALPHA = 0.3, 0.3


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def stepped(argv: list[str], spy: list[tuple[Tensor, Tensor, Any]] | None = None) -> tuple[Any, dict[str, Tensor]]:
    """One step, and the queries and keys of each micro-batch."""
    trainer = make_trainer(argv)
    perturb(trainer.model, trainer.ctx, 0.2)
    [layer, *_] = [module for module in trainer.model.modules() if isinstance(module, SelfAttention)]

    def see(module: SelfAttention, given: tuple[Tensor, PackedSequence, Any], out: Any) -> None:
        x, info = given[:2]
        spy.append((x.detach(), module.qkv.weight.detach().clone(), info)) if spy is not None else None

    layer.register_forward_hook(see)
    trainer.train()
    return trainer, weights(trainer)


def test_rows_of_heads_beyond_the_limit_are_scaled(prefix: str) -> None:
    argv = flags(
        prefix,
        *MODEL,
        "--train-iters",
        "1",
        "--hybrid-layer-pattern",
        "*-",
        "--position-embedding-type",
        "none",
    )
    seen: list[tuple[Tensor, Tensor, Any]] = []
    trainer, plain = stepped(argv, seen)
    _, clipped = stepped([*argv, *CLIP])
    name = next(name for name in plain if name.endswith("qkv.weight"))
    bias_before = make_trainer(argv)
    perturb(bias_before.model, bias_before.ctx, 0.2)
    bias = weights(bias_before)[name.replace("weight", "bias")]
    heads, groups, d = 4, 2, 8
    largest = torch.full((groups,), -torch.inf, dtype=torch.float64)
    for x, weight, info in seen:
        q, k, _ = (x @ weight.T + bias).split((heads * d, groups * d, groups * d), -1)
        for b in range(x.shape[1]):
            documents = info.document_ids_BS[b]
            visible = (documents[:, None] == documents[None]).tril()
            for h in range(heads):
                group = h // 2
                scores = q[:, b, h * d : h * d + d] @ k[:, b, group * d : group * d + d].T / d**0.5
                largest[group] = max(largest[group], scores[visible].max())
    assert largest.max() > LIMIT
    share = (LIMIT / largest).clamp(max=1.0)
    rows = torch.cat(
        [(share**ALPHA).repeat_interleave(2 * d), (share ** (1 - ALPHA)).repeat_interleave(d), torch.ones(groups * d)]
    )
    for key, tensor in plain.items():
        if key == name:
            tensor = tensor * rows[:, None]
        elif key == name.replace("weight", "bias"):
            tensor = tensor * rows
        torch.testing.assert_close(clipped[key], tensor, rtol=1e-12, atol=1e-15, msg=key)


@pytest.fixture(scope="module")
def expected(prefix: str) -> dict[str, Any]:
    outcome = train(flags(prefix, *MODEL, *CLIP))
    steps = [record for record in outcome["records"] if record["kind"] == "step"]
    assert [step["qk_clipped"] for step in steps] == [1.0, 1.0] and steps[0]["max_attention_logit"] > LIMIT
    assert any(
        not torch.equal(tensor, outcome["weights"][name])
        for name, tensor in train(flags(prefix, *MODEL))["weights"].items()
    )
    return outcome


@pytest.mark.parametrize(
    "layout",
    [
        ("--tp", "2", "--pp", "2", "--recompute", "full"),
        ("--cp", "2", "--zero", "2", "--micro-batch-size", "1"),
        ("--cp", "2", "--cp-comm-type", "p2p", "--tp", "2", "--sp", "--recompute", "selective"),
    ],
    ids=" ".join,
)
def test_no_layout_changes_it(ranks: RankPool, prefix: str, expected: dict[str, Any], layout: tuple[str, ...]) -> None:
    compare(ranks.run(4, train, flags(prefix, *MODEL, *CLIP, *layout)), expected, 1e-10)


def test_16_bit_weights_are_their_scaled_masters(prefix: str) -> None:
    argv = flags(
        prefix,
        "--bf16",
        *CLIP,
        "--num-query-groups",
        "2",
        "--train-iters",
        "1",
        "--eval-iters",
        "0",
        "--eval-interval",
        "0",
    )
    trainer = make_trainer(argv)
    perturb(trainer.model, trainer.ctx, 0.2)
    trainer.optimizer.main.after_load()
    trainer.train()
    named = {main.spec.name: main for main in trainer.optimizer.main.trained}
    for name, main in named.items():
        assert torch.equal(main.parameter, main.master.to(main.parameter.dtype)), name
