"""A file of packed weights computes what the trained model does: bit for bit, at any layout, with kernels or not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaforge.checkpoint.packed_file import TrainedFile, open_quantized, write_packed
from megaforge.checkpoint.safetensors_file import SafetensorsFile
from megaforge.checkpoint.sources import open_source
from megaforge.config.run_config import ParallelConfig
from megaforge.config.schema import config_from_dict
from megaforge.errors import UserError
from megaforge.inference.generation import Continuations, Sampling
from megaforge.inference.restore import TrainedModel, load_trained_model
from megaforge.inference.staged import StagedModel
from megaforge.models.stages import build_model, plan_pipeline
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.layer_context import compute_dtype, make_layer_context
from megaforge.quant.packed import PackedLinear, quantized_layers
from tests.parallel.pool import RankPool
from tests.training.tiny import arguments, make_trainer, write_dataset
from tools import convert_checkpoint, evaluate, generate

TERNARY = ("--quantize-weights", "ternary", "--sub-norm")
CHOOSING = ("--quant-clip-interval", "1", "--quant-clip-grid", "0.5", "0.7", "--eval-iters", "1")
SCHEMES = {
    "ternary": TERNARY,
    "ternary-bf16": (*TERNARY, "--bf16", "--hadamard", "8", "--bitnet-layers", "attention", "moe", "--add-bias-linear"),
    "binary": ("--quantize-weights", "binary", "--quant-granularity", "channel", "--activation", "swiglu"),
    "int4-groups": ("--quantize-weights", "int4", "--quant-granularity", "group", "--quant-group-size", "8"),
    "int4-asymmetric": ("--quantize-weights", "int4", "--asymmetric-weights", "--asymmetric-activations"),
    "static": (*TERNARY, "--bf16", "--online-calibration", "--quant-clip", "both", *CHOOSING),
    "int8": ("--quantize-weights", "int8", "--quantize-activations", "none", "--activation", "swiglu"),
}
TOKENS = torch.arange(24).view(2, 12) * 7 % 61


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each scheme a folder with a checkpoint of it, ``run``, and a packed file, ``packed.safetensors``."""
    folder = tmp_path_factory.mktemp("runs")
    prefix = write_dataset(folder / "train_text_document")
    for name, flags in SCHEMES.items():
        more = ("--train-iters", "1", "--save", str(folder / name / "run"), "--hybrid-layer-pattern", "RE*-")
        make_trainer(arguments(prefix, *more, *flags)).train()
        write_packed(open_source(folder / name / "run"), folder / name / "packed.safetensors")
    return {name: folder / name for name in SCHEMES}


def logits(model: StagedModel) -> Tensor:
    return model._chunk.logits(TOKENS).float()


def loaded(path: Path, **more: Any) -> TrainedModel:
    return load_trained_model(str(path), device="cpu", **more)


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_file_computes_what_the_checkpoint_does(runs: dict[str, Path], scheme: str) -> None:
    expected = logits(loaded(runs[scheme] / "run").model)
    packed = loaded(runs[scheme] / "packed.safetensors")
    assert torch.equal(logits(packed.model), expected) and packed.config.name == "custom"
    fast = logits(loaded(runs[scheme] / "packed.safetensors", kernels=True).model)
    direct = logits(loaded(runs[scheme] / "run", kernels=True).model)
    assert torch.equal(fast, direct)
    if scheme == "int4-groups":  # sums of groups are scaled before they are added
        torch.testing.assert_close(fast, expected, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(fast, expected)


class Made(TorchDispatchMode):
    """Notes the shapes of all fp32 and 16-bit tensors that get memory."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out.is_meta and out.is_floating_point():
            self.shapes.add(tuple(out.shape))
        return out


def test_a_packed_model_is_never_whole(runs: dict[str, Path]) -> None:
    """Its quantized matrices get no memory as weights, not even while it is built."""
    with Made() as made:
        model = loaded(runs["ternary"] / "packed.safetensors").model._chunk
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    specs = open_quantized(open_source(runs["ternary"] / "run")).specs
    matrices = {spec.shape for spec in specs.values() if spec.quantized}
    assert len(matrices) > 3 and specs["embedding.weight"].shape in made.shapes
    assert matrices & made.shapes <= {(32, 32)}  # other things are as large


def greedy(path: Path, **more: Any) -> list[dict[int, int]]:
    prompts = [[5, 17, 3], [40], [9, 9, 9, 2, 60]]
    drawn = Continuations(loaded(path, **more).model, prompts, Sampling(temperature=0), seeds=[0, 1, 2])
    return [drawn.draw() for _ in range(24)]


@pytest.mark.parametrize("scheme", ["ternary", "ternary-bf16", "binary", "int4-asymmetric"])
def test_greedy_generation_gives_the_tokens_of_the_trained_model(runs: dict[str, Path], scheme: str) -> None:
    expected = greedy(runs[scheme] / "run")  # weights that are quantized in each product
    assert len({token for tokens in expected for token in tokens.values()}) > 1
    for kernels in (False, True):
        assert greedy(runs[scheme] / "packed.safetensors", kernels=kernels) == expected


def test_kernels_take_what_they_can_and_the_rest_is_said(runs: dict[str, Path], capsys: Any) -> None:
    ops = [op for _, _, op in quantized_layers(loaded(runs["ternary"] / "run", kernels=True).model._chunk)]
    assert len(ops) == 10 and all(isinstance(op, PackedLinear) and op.uses_kernels for op in ops)
    assert "no packed kernel" not in capsys.readouterr().err
    loaded(runs["int8"] / "packed.safetensors", kernels=True)
    assert "10 of 10 quantized matrices have no packed kernel" in capsys.readouterr().err


@torch.no_grad()
def test_static_steps_and_clips_are_in_the_file(runs: dict[str, Path]) -> None:
    """Its numbers are others than those of the same weights without them; llama.cpp's and transformers' have no such
    thing."""
    model = loaded(runs["static"] / "packed.safetensors", kernels=True).model
    [*ops] = (op for _, _, op in quantized_layers(model._chunk))
    assert all(isinstance(op, PackedLinear) and op.uses_kernels for op in ops)
    assert all(op.ranges is not None and op.ranges.has_input and op.ranges.clip is not None for op in ops)
    expected = logits(model)
    for op in ops:
        op.ranges.clip.fill_(1.0)  # type: ignore[union-attr]
    assert not torch.equal(logits(model), expected)


def test_codes_take_the_bits_that_they_should(runs: dict[str, Path]) -> None:
    bits = {"ternary": 2, "binary": 1, "int4-asymmetric": 4, "int8": 8}
    for scheme, width in bits.items():
        file = SafetensorsFile(runs[scheme] / "packed.safetensors")
        slots = {slot.name: slot for slot in file.slots()}
        assert slots["layers.1.mixer.qkv.weight.codes"].shape == (96, 32 * width // 8)
        assert "layers.1.mixer.qkv.weight" not in slots and slots["embedding.weight"].dtype == torch.float32
        assert slots["layers.1.mixer.qkv.weight.step"].shape == ((96,) if scheme == "binary" else (3,))


def at_layout(file: str, tp: int, pp: int) -> Tensor | None:
    """The scores of one rank after the last token."""
    ctx, trained = ParallelContext.create(tp=tp, pp=pp), TrainedFile(file)
    config = config_from_dict(trained.meta["config"])
    plan = plan_pipeline(config.model, ParallelConfig(pipeline_model_parallel_size=pp), 1, 64)
    model = build_model(make_layer_context(config.model, ctx, dtype=compute_dtype(config.training)), plan)
    trained.load(model, ctx, kernels=True)
    staged = StagedModel(model.eval(), plan)
    return staged.logits(TOKENS, staged.new_state())


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["ternary", "binary", "int4-groups"])
def test_any_layout_reads_it(ranks: RankPool, runs: dict[str, Path], scheme: str) -> None:
    file = runs[scheme] / "packed.safetensors"
    expected = logits(loaded(file).model)[:, -1]
    found = ranks.run(4, at_layout, str(file), 2, 2)
    assert found[0] is found[1] is None
    for scores in found[2:]:
        torch.testing.assert_close(scores.float(), expected[:, : scores.shape[1]], rtol=1e-4, atol=1e-5)


def test_the_tools_read_it(runs: dict[str, Path], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def run(tool: Any, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [tool.__name__, *arguments])
        assert tool.main() == 0
        return capsys.readouterr().out

    file = str(tmp_path / "model.safetensors")
    said = run(convert_checkpoint, "--load", str(runs["ternary"] / "run"), "--save", file, "--to", "packed")
    assert "2.0" in said.splitlines()[1] and "bits each" in said
    prompt = ("--prompt", "5 17 3", "--max-new-tokens", "8", "--temperature", "0", "--device", "cpu")
    texts = {run(generate, "--load", load, *prompt) for load in (file, str(runs["ternary"] / "run"))}
    assert len(texts | {run(generate, "--load", file, "--use-custom-kernels", *prompt)}) == 1
    data = str(runs["ternary"].parent / "train_text_document")
    numbers = {
        run(evaluate, "--load", load, "--input", data, "--device", "cpu", *more).split("\n", 1)[1]
        for load in (file, str(runs["ternary"] / "run"))
        for more in ((), ("--use-custom-kernels",))
    }
    assert len(numbers) == 1


def test_wrong_uses_are_one_error(runs: dict[str, Path], tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "train_text_document")
    plain = tmp_path / "plain"
    make_trainer(arguments(prefix, "--train-iters", "1", "--save", str(plain))).train()
    with pytest.raises(UserError, match="no matrix of its model is quantized"):
        write_packed(open_source(plain), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="--use-custom-kernels: no matrix of .* is quantized"):
        loaded(plain, kernels=True)
    packed = runs["ternary"] / "packed.safetensors"
    with pytest.raises(UserError, match="packed codes in place of weights"):
        open_source(packed)
    with pytest.raises(UserError, match="it exists"):
        write_packed(open_source(runs["ternary"] / "run"), packed)
    with pytest.raises(UserError, match="keeps no average"):
        loaded(packed, ema=True)
    with pytest.raises(UserError, match="cannot be read"):
        loaded(tmp_path / "none.safetensors")


@torch.no_grad()
def test_a_file_of_plain_weights_is_read_too(runs: dict[str, Path], tmp_path: Path) -> None:
    from megaforge.checkpoint.convert import write_file

    file = tmp_path / "plain.safetensors"
    write_file(open_source(runs["ternary"] / "run"), file)
    assert torch.equal(logits(loaded(file).model), logits(loaded(runs["ternary"] / "run").model))
