"""Another pipeline's configuration: read, checked, and what it is as our settings; a run by it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaforge.config.cli import parse_config
from megaforge.config.phase5_config import GrokfastSection, ModelSection, TrainingConfig
from megaforge.errors import UserError
from tests.training.tiny import VOCAB, make_trainer, record, write_dataset
from tools import phase_interface

EXAMPLE = Path(__file__).parent / "phase5_example.yaml"


def test_the_preset_is_the_published_example() -> None:
    example = TrainingConfig.from_file(EXAMPLE)
    assert example.validate() is True
    preset = parse_config(["--config", "phase5-base"], prog="test")
    for section, values in example.settings().items():
        for name, value in values.items():
            ours = getattr(getattr(preset.config, section), name)
            assert (list(ours) if isinstance(ours, tuple) else ours) == value, name
            assert preset.origins[f"{section}.{name}"] == "preset phase5-base"
    written = [key for key, origin in preset.origins.items() if origin == "preset phase5-base"]
    assert len(written) == sum(map(len, example.settings().values()))
    assert preset.config.model.num_attention_heads == 12 and preset.config.training.global_batch_size == 512
    assert example.settings() == TrainingConfig().settings()  # what is left out is the example's


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model: {model_size: huge}", "model.model_size huge: choose tiny, small, base, large or xlarge"),
        ("model: {quantization_bit_width: 3}", "model.quantization_bit_width 3: choose 1, 1.58, 4 or 8"),
        ("model: {bitnet_layers: []}", "model.bitnet_layers"),
        ("model: {num_heads: 7}", "model.hidden_size 768 is not divisible by model.num_heads 7"),
        ("distributed: {backend: smoke}", "distributed.backend smoke"),
        ("distributed: {world_size: 0}", "distributed.world_size 0: must be above 0"),
        ("optimization: {warmup_steps: -1}", "optimization.warmup_steps -1: must be at least 0"),
        ("grokfast: {acceleration_factor: 0.5}", "grokfast.acceleration_factor 0.5"),
        ("nasa_compliance: {min_compliance_score: 2}", "nasa_compliance.min_compliance_score 2"),
        ("nasa_compliance: {compliance_level: high}", "compliance_level high"),
        ("model: {hiden_size: 3}", "model: unknown key 'hiden_size'; did you mean hidden_size?"),
        ("modell: {}", "unknown key 'modell'; did you mean model?"),
        ("model: {num_layers: 1.5}", "model.num_layers: expected an integer, got 1.5"),
        ("model: {use_bitnet_linear: 1}", "expected true or false, got 1"),
        ("model: {bitnet_layers: all}", "expected a list of names, got 'all'"),
        ("optimization: {learning_rate: fast}", "expected a number, got 'fast'"),
        ("optimization: [1]", "expected 'key: value' lines"),
        ("a: b: c", "this is not YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, change: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(change)
    with pytest.raises(UserError) as caught:
        TrainingConfig.from_file(file).validate()
    assert message in str(caught.value)
    with pytest.raises(UserError, match="cannot read it"):
        TrainingConfig.from_file(tmp_path / "none.yaml")


def test_each_switch_changes_what_it_is_of() -> None:
    plain = TrainingConfig(model=ModelSection(use_bitnet_linear=False), grokfast=GrokfastSection(enabled=False))
    assert "quantize_weights" not in plain.settings()["model"] and "plateau_boost" not in plain.settings()["optimizer"]
    ternary = TrainingConfig(model=ModelSection(model_size="tiny", quantization_bit_width=1.58)).settings()["model"]
    assert ternary["quantize_weights"] == "ternary" and ternary["hidden_size"] == 256


def test_a_run_by_such_a_file(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    small = {"model_size": "tiny", "hidden_size": 32, "num_layers": 1, "num_heads": 4, "max_sequence_length": 24}
    steps = {
        "num_epochs": 2,
        "batch_size": 2,
        "eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 2,
    }
    content = {"model": small | {"vocab_size": 62}, "optimization": steps, "distributed": {"enabled": False}}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump({"training": content}))
    ours = tmp_path / "ours.yaml"
    monkeypatch.setattr(sys, "argv", ["x", "config", str(tmp_path / "theirs.yaml"), "--save", str(ours)])
    assert phase_interface.main() == 0
    said = capsys.readouterr().out
    assert "find_unused_parameters false" in said and "nasa_compliance: --phase6-output has" in said
    with pytest.raises(UserError, match="it exists"):
        phase_interface.main()
    prefix = write_dataset(tmp_path / "train_text_document")
    data = ("--data-path", prefix, "--split", "80,20,0", "--device", "cpu", "--num-workers", "0")
    null = ("--tokenizer-type", "NullTokenizer", "--tokenizer-model", str(VOCAB), "--ffn-hidden-size", "48")
    trainer = make_trainer(["--config", str(ours), *data, *null, "--save", str(tmp_path / "run")])
    found = record(trainer)
    trainer.train()
    kinds = [entry["kind"] for entry in found.records]
    assert kinds.count("evaluation") == 2 and trainer.iteration == kinds.count("step") > 4
    assert trainer.config.training.global_batch_size == trainer.config.training.eval_global_batch_size == 4
