"""Prefixes: against attention by its definition, packed or apart, in generation, at every layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megaforge.checkpoint.adapter_files import AdapterFolder, model_config
from megaforge.checkpoint.export_hf import export_hf
from megaforge.checkpoint.peft_files import export
from megaforge.checkpoint.prefix_files import PrefixFolder
from megaforge.checkpoint.sources import open_source
from megaforge.errors import UserError
from megaforge.nn.attention import KVCache, SelfAttention
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.packed_sequence import PackedSequence
from tests.nn.support import perturb
from tests.parallel.pool import RankPool
from tests.parallel.test_pipeline_model import compare, observed, trainer_of
from tests.peft.test_adapter_files import TOKENS, logits
from tests.peft.test_lora import MODEL, SIZES, small_model, train
from tests.training.tiny import VOCAB, arguments, dense_arguments, make_trainer, write_dataset

PREFIXED = ("prefix", "p_tuning_v2")
RUN = ("--train-iters", "2", "--fp64", "--lr", "1e-2", "--micro-batch-size", "1", "--global-batch-size", "4")
SIZE = ("--prefix-length", "3", "--num-query-groups", "2")
LAYOUTS = (("--tp", "2", "--sp", "--recompute", "selective"), ("--pp", "2"), ("--ep", "2", "--zero", "2"))


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "train_text_document")


def flags(method: str) -> tuple[str, ...]:
    return (*SIZE, "--peft", method, *(("--prefix-hidden-size", "6") if method == "prefix" else ()))


@pytest.mark.parametrize("method", PREFIXED)
def test_the_layout_changes_nothing(ranks: RankPool, prefix: str, method: str) -> None:
    more = flags(method)
    one = train(arguments(prefix, *MODEL, *SIZES, *RUN, *more))
    assert all(".prefix." in name for name in one["gradients"])
    for layout in LAYOUTS[: 3 if method == "prefix" else 1]:
        compare(ranks.run(2, train, arguments(prefix, *MODEL, *SIZES, *RUN, *more, *layout)), one, 1e-10)


def tuned(prefix: str, method: str, *more: str) -> Any:
    model = small_model(prefix, *flags(method), *more)
    perturb(model, ParallelContext.single(), 0.3)
    return model


def by_definition(layer: SelfAttention, x: Tensor) -> Tensor:
    """Of one document [s, 1, h], without positions: softmax over the prefix and the tokens up to each."""
    fused = x[:, 0] @ layer.qkv.weight.t()
    heads, groups, width, length = layer.heads, layer.groups, layer.head_dim, len(x)
    query, key, value = fused.split([heads * width, groups * width, groups * width], -1)
    assert layer.prefix is not None
    first_keys, first_values = layer.prefix.keys_values()
    out = []
    for head in range(heads):
        group = head // (heads // groups)
        keys = torch.cat([first_keys[group], key.view(length, groups, width)[:, group]])
        values = torch.cat([first_values[group], value.view(length, groups, width)[:, group]])
        scores = query.view(length, heads, width)[:, head] @ keys.t() / width**0.5
        hidden = torch.ones(length, len(keys)).tril(len(first_keys[group])) == 0
        out.append(torch.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ values)
    return torch.cat(out, -1).unsqueeze(1) @ layer.output.weight.t()


@pytest.mark.parametrize("method", PREFIXED)
def test_it_is_the_definition_gradients_included(prefix: str, method: str) -> None:
    model = tuned(prefix, method, "--hybrid-layer-pattern", "*-", "--position-embedding-type", "none")
    layer = model.layers["0"].mixer
    for length in (1, 2, 9):
        x = torch.randn(length, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
        info = model.pack(torch.zeros(1, length, dtype=torch.long), None)
        found, expected = layer(x, info)[0], by_definition(layer, x)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
        given = list(layer.prefix.parameters())
        pairs = [torch.autograd.grad(out.square().sum(), given) for out in (found, expected)]
        for ours, theirs in zip(*pairs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_packed_documents_are_those_apart_gradients_included(prefix: str) -> None:
    model = tuned(prefix, "p_tuning_v2")
    given = [p for p in model.parameters() if p.requires_grad]
    tokens = torch.arange(48).view(2, 24) % VOCAB
    starts = torch.zeros(2, 24, dtype=torch.bool)
    starts[0, [0, 1, 9]], starts[1, 0] = True, True  # one has a token, and one sequence is one document
    out = model(tokens, tokens.roll(1), torch.ones(2, 24), starts).loss_sum
    losses = []
    for row, first, last in ((0, 0, 1), (0, 1, 9), (0, 9, 24), (1, 0, 24)):
        at = slice(row, row + 1), slice(first, last)
        losses.append(model(tokens[at], tokens.roll(1)[at], torch.ones(1, last - first)).loss_sum)
    apart = torch.stack(losses).sum()
    torch.testing.assert_close(out, apart, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(out, given), torch.autograd.grad(apart, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        assert bool(one.any())


def test_generation_has_it_too(prefix: str) -> None:
    """Taken in at once, and token by token, and prompts of other lengths beside each other."""
    model = tuned(prefix, "prefix").eval()
    tokens = torch.arange(16).view(2, 8)
    with torch.no_grad():
        whole = model.logits(tokens)
        state = model.new_state()
        steps = [model.logits(tokens[:, :3], state=state)]
        steps += [model.logits(tokens[:, place : place + 1], state=state) for place in range(3, 8)]
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-9, atol=1e-11)
        for p in model.parameters():
            if p.requires_grad:
                p.zero_()
        assert (model.logits(tokens) - whole).abs().max() > 1e-3


def test_a_recorded_step_sees_what_others_see(prefix: str) -> None:
    """One whose place the device alone knows, of a cache with more room than is used and padding in front."""
    layer = tuned(prefix, "p_tuning_v2").layers["1"].mixer
    torch.manual_seed(0)
    keys, values = (torch.randn(2, 2, 12, layer.head_dim, dtype=torch.float64) for _ in range(2))
    query, key, value = (torch.randn(2, n, 1, layer.head_dim, dtype=torch.float64) for n in (layer.heads, 2, 2))
    padding = torch.tensor([0, 3])
    plain = KVCache(keys.clone(), values.clone(), length=7)
    info = PackedSequence(2, 1, torch.device("cpu"), offset=7, padding_B=padding)
    expected = layer.prefix.attend(query, key, value, info, plain)
    place = torch.tensor([7])
    recorded = plain.slots(2, 12)
    recorded.fill(KVCache(keys, values, length=7))
    found = layer.prefix.attend(query, key, value, PackedSequence.at(place, padding), recorded.recorded(place))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_a_model_without_attention_is_refused(prefix: str) -> None:
    with pytest.raises(UserError, match="--peft prefix: this model has no attention layer"):
        small_model(prefix, "--hybrid-layer-pattern", "RE", "--peft", "prefix")


LEARNED = ("--position-embedding-type", "learned_absolute", "--max-position-embeddings", "32")
DENSE = ("--activation", "swiglu", "--num-query-groups", "2")


def prefix_run(data: str, folder: Path, method: str, *more: str) -> tuple[str, str]:
    """A base with noise on it, and a prefix of it with noise, trained for a step."""
    base, tuned = str(folder / "base"), str(folder / method)
    model = dense_arguments(data, "*-*-", *DENSE, "--train-iters", "1", "--lr", "1e-2", *more)
    if not Path(base).exists():
        observed(trainer_of([*model, "--save", base]))
    trainer = make_trainer(
        [*model, "--prefix-length", "3", *flags(method)[4:], "--pretrained-checkpoint", base, "--save", tuned]
    )
    for name, parameter in trainer.model.named_parameters():
        if ".prefix." in name:
            with torch.no_grad():
                parameter.mul_(5)
    trainer.train()
    return base, tuned


@pytest.mark.parametrize("method", PREFIXED)
def test_files_are_those_of_peft(prefix: str, tmp_path: Path, method: str) -> None:
    """peft puts the prefix before the exported base and computes the same; what it writes is read, and begins a run."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base, tuned = prefix_run(prefix, tmp_path, method)
    export_hf(open_source(base), tmp_path / "hf")
    assert export(open_source(tuned), tmp_path / "adapter") == "prefixes of 2 layers"
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    alone = hf(TOKENS).logits.detach().clone()
    model = peft.PeftModel.from_pretrained(hf, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        theirs = model(TOKENS).logits
    assert (theirs - alone).abs().max() > 1e-2
    torch.testing.assert_close(logits(tuned), theirs, rtol=0, atol=1e-5)
    model.save_pretrained(str(tmp_path / "again"))
    for folder in ("adapter", "again"):
        torch.testing.assert_close(logits(base, adapter=str(tmp_path / folder)), theirs, rtol=0, atol=1e-5, msg=folder)
    line = [*dense_arguments(prefix, "*-*-", *DENSE, "--train-iters", "1"), "--pretrained-checkpoint", base]
    line += ["--peft-from", str(tmp_path / "again"), "--peft"]
    begun = make_trainer([*line, "p_tuning_v2", "--prefix-length", "3"]).model
    with torch.no_grad():
        torch.testing.assert_close(begun.logits(TOKENS), theirs, rtol=0, atol=1e-5)
    for more, said in (
        (("p_tuning_v2", "--prefix-length", "4"), "use --prefix-length 3"),
        (("lora",), "it is a prefix; use --peft p_tuning_v2"),
    ):
        with pytest.raises(UserError, match=said):
            make_trainer([*line, *more])


def test_a_prefix_comes_from_and_to_any_layout(ranks: RankPool, prefix: str, tmp_path: Path) -> None:
    base, tuned = prefix_run(prefix, tmp_path, "p_tuning_v2")
    export(open_source(tuned), tmp_path / "adapter")
    begun = [*dense_arguments(prefix, "*-*-", *DENSE, "--train-iters", "1", "--lr", "1e-30"), "--prefix-length", "3"]
    begun += ["--peft", "p_tuning_v2", "--pretrained-checkpoint", base, "--peft-from", str(tmp_path / "adapter")]
    for layout in (("--tp", "2"), ("--pp", "2")):
        ranks.run(2, run, [*begun, *layout, "--save", str(tmp_path / layout[0])])
        export(open_source(tmp_path / layout[0]), tmp_path / f"adapter{layout[0]}")
        found, expected = (PrefixFolder(tmp_path / f"adapter{name}").table for name in (layout[0], ""))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def run(argv: list[str]) -> None:
    trainer_of(argv).train()


def test_learned_positions_and_another_model_are_refused(prefix: str, tmp_path: Path) -> None:
    _, tuned = prefix_run(prefix, tmp_path, "p_tuning_v2", *LEARNED)
    with pytest.raises(UserError, match="only a rotary embedding allows"):
        export(open_source(tuned), tmp_path / "no")
    base, tuned = prefix_run(prefix, tmp_path / "rope", "p_tuning_v2")
    export(open_source(tuned), tmp_path / "adapter")
    shorter = dataclasses.replace(model_config(open_source(base)), num_layers=1, hybrid_layer_pattern="*-")
    with pytest.raises(UserError, match=r"4 x 2 x 3 x \d+ there, and 2 x 2 x 3 x \d+ in the model"):
        PrefixFolder(tmp_path / "adapter").values(shorter)
    with pytest.raises(UserError, match="'PREFIX_TUNING': only LORA or ADALORA is read beside matrices"):
        AdapterFolder(tmp_path / "adapter")
