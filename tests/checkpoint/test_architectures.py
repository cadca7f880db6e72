"""Models of published architectures, trained here: others compute the same from what is exported and train on from it
alike, and it comes back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from megaforge.checkpoint import convert
from megaforge.checkpoint.architectures.base import Given, choose
from megaforge.checkpoint.export_hf import export_hf
from megaforge.checkpoint.import_hf import config_of, import_hf
from megaforge.checkpoint.published_import import Import
from megaforge.checkpoint.safetensors_file import SafetensorsFile, Slot, write_safetensors
from megaforge.checkpoint.sources import open_source
from megaforge.config.cli import parse_config
from megaforge.config.run_config import ParallelConfig
from megaforge.config.yaml_files import preset_names
from megaforge.errors import UserError
from megaforge.inference.restore import load_trained_model
from megaforge.nn.rope import Rotary
from megaforge.registry import ARCHITECTURES
from tests.checkpoint.published_models import MODELS, flags, train
from tests.training.tiny import make_trainer

TOKENS = torch.arange(24).view(2, 12) * 7 % 61
# What flash-linear-attention calls the tensors of RWKV-7's second block, and its shapes at 64 channels.
BLOCK = {
    **{f"attn.x_{mix}": (1, 1, 64) for mix in "rwkvag"},
    **{f"attn.{letter}_lora.lora.0.weight": (32, 64) for letter in "wav"},
    **{f"attn.{letter}_lora.lora.2.weight": (64, 32) for letter in "wav"},
    **{f"attn.{letter}_lora.lora.2.bias": (64,) for letter in "wav"},
    "attn.g_lora.lora.0.weight": (32, 64),
    "attn.g_lora.lora.2.weight": (64, 32),
    **{f"attn.{name}_proj.weight": (64, 64) for name in "rkvo"},
    "attn.k_k": (64,),
    "attn.k_a": (64,),
    "attn.r_k": (1, 64),
    "ffn.x_k": (64,),
    **{f"{norm}.{kind}": (64,) for norm in ("attn_norm", "ffn_norm", "attn.g_norm") for kind in ("weight", "bias")},
    "ffn.key.weight": (48, 64),
    "ffn.value.weight": (64, 48),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Each model's run and what it was exported as, in files of at most 30 kB."""
    made = {}
    for kind in MODELS:
        folder = tmp_path_factory.mktemp(kind)
        run = train(kind, folder)
        done = export_hf(open_source(run), folder / "hf", shard_bytes=30_000)
        assert done.model_type == ("llama" if kind == "mistral" else kind) and done.shards > 1
        made[kind] = run, folder / "hf"
    return made


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "rwkv7"])
def test_transformers_computes_the_same(exported: dict[str, tuple[Path, Path]], kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'test'")
    run, folder = exported[kind]
    if kind == "mistral":  # written as a Llama; named as what it also is
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "mistral", "sliding_window": None}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert type(theirs).__name__ == ARCHITECTURES.get(kind).class_name
    trained = load_trained_model(str(run), device="cpu")
    ours = trained.model._chunk.logits(TOKENS)[..., :62]
    torch.testing.assert_close(theirs(TOKENS).logits, ours, rtol=0, atol=1e-5)
    assert float(ours.std()) > 1e-3
    rotary = Rotary.of(trained.config.model)
    if rotary is not None and kind != "gpt2":  # what 12 tokens hardly tell
        frequencies = rotary.frequencies(torch.device("cpu")) / rotary.stretch
        torch.testing.assert_close(theirs.model.rotary_emb.inv_freq.double(), frequencies, rtol=1e-6, atol=0)
    theirs.save_pretrained(tmp_path / "theirs")  # in their own hand
    assert config_of(tmp_path / "theirs") == config_of(folder)


@pytest.mark.parametrize("kind", MODELS)
def test_weights_come_back_bit_for_bit(
    exported: dict[str, tuple[Path, Path]], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = exported[kind]
    monkeypatch.setattr(convert, "_PIECE", 3000)  # tensors are cut
    layout = ParallelConfig(tensor_model_parallel_size=1 if kind == "rwkv7" else 2)
    import_hf(Import(folder, tmp_path / "again", parallel=layout, dp=2))
    before, after = open_source(run), open_source(tmp_path / "again")
    assert {key for key in before.tensors if not key.startswith(("optimizer.", "data."))} >= after.tensors.keys()
    for name in after.tensors:
        kept = 62 if name in ("embedding.weight", "head.weight") else None
        assert torch.equal(before.read(name)[:kept], after.read(name)[:kept]), name
    model = parse_config(["--config", str(tmp_path / "again" / "model.yaml")], prog="test").config.model
    assert model == config_of(folder)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_training_goes_on_in_transformers(exported: dict[str, tuple[Path, Path]], kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'test'")
    run, folder = exported[kind]
    data = run.parent
    how = ("--load", str(run), "--finetune", "--train-iters", "3", "--weight-decay", "0", "--adam-beta2", "0.95")
    trainer = make_trainer(flags(kind, data, *how))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    adam = torch.optim.AdamW(theirs.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
    loader = iter(trainer._loader(trainer.data, trainer.batches, 0))
    for _ in range(3):
        batches = next(loader)
        loss = torch.zeros(())
        for batch in batches:
            logits = theirs(batch.tokens).logits
            losses = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
            loss = loss + (losses * batch.loss_mask.flatten()).sum()
        loss = loss / sum(batch.loss_mask.sum() for batch in batches)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        adam.step()
        assert trainer.train_step(batches).loss == pytest.approx(loss.item(), rel=0, abs=1e-5)


def test_names_without_their_prefix(exported: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """As in the files that GPT-2 was published in."""
    run, folder = exported["gpt2"]
    files = [SafetensorsFile(file) for file in sorted(folder.glob("*.safetensors"))]
    found = {slot.name: file.tensor(slot.name) for file in files for slot in file.slots()}
    plain = {name.removeprefix("transformer."): value for name, value in found.items()}
    plain |= {"h.0.attn.bias": torch.ones(1, 1, 24, 24)}
    slots = [Slot(name, value.dtype, tuple(value.shape)) for name, value in plain.items()]
    write_safetensors(tmp_path / "model.safetensors", slots, plain.values())
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    import_hf(Import(tmp_path, tmp_path / "again"))
    after = open_source(tmp_path / "again")
    assert torch.equal(open_source(run).read("layers.1.mixer.qkv.weight"), after.read("layers.1.mixer.qkv.weight"))


def test_rwkv7_is_named_as_in_flash_linear_attention(exported: dict[str, tuple[Path, Path]]) -> None:
    _, folder = exported["rwkv7"]
    slots = {slot.name: slot.shape for file in folder.glob("*.safetensors") for slot in SafetensorsFile(file).slots()}
    second = {name.removeprefix("model.layers.1."): shape for name, shape in slots.items() if "layers.1." in name}
    assert second == BLOCK
    first = {name.removeprefix("model.layers.0.") for name in slots if "layers.0." in name}
    assert first == {name for name in BLOCK if "v_lora" not in name} | {"pre_norm.weight", "pre_norm.bias"}
    ends = {name for name in slots if "layers." not in name}
    assert ends == {"model.embeddings.weight", "model.norm.weight", "model.norm.bias", "lm_head.weight"}
    config = json.loads((folder / "config.json").read_text())
    assert (config["head_dim"], config["intermediate_size"], config["attn"]) == (64, 48, None)


def test_presets_say_which_of_their_parts_no_format_holds() -> None:
    known = [ARCHITECTURES.get(name) for name in ARCHITECTURES.names()]
    for preset in preset_names():
        sizes = ["--vocab-size", "256", "--max-position-embeddings", "4096"]
        config = parse_config(["--config", preset, *sizes], prog="test").config
        if preset == "megatron":  # pretrain_gpt.py by its defaults
            assert choose(config.model, "the model", "--to hf", known).name == "gpt2"
            continue
        part = "has RWKV-7 layers with a mixture of experts, attention" if "cdrmix" in preset else "has (--act|RWKV-7)"
        part = "predicts 3 further tokens" if "moe-" in preset else part
        with pytest.raises(UserError, match=f"the model {part}"):
            choose(config.model, "the model", "--to hf", known)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("llama", ("--normalization", "layernorm"), "layer norms, which llama, .* train with --normalization rmsnorm"),
        ("llama", ("--rotary-interleaved",), "--rotary-interleaved, which llama"),
        ("llama", ("--rotary-seq-len-interpolation-factor", "2"), "--use-rope-scaling with --rotary-seq-len"),
        ("gpt2", ("--activation", "relu2"), "--activation relu2, which gpt2, .* train with --activation gelu"),
        ("qwen3", ("--add-bias-linear",), "has --qk-layernorm, which llama"),
        ("qwen3_moe", ("--moe-shared-expert-intermediate-size", "16"), "a shared expert, which qwen3_moe"),
        ("mixtral", ("--moe-router-score-function", "sigmoid"), "sigmoid scores, which mixtral"),
        ("mixtral", ("--moe-router-pre-softmax",), "--moe-router-pre-softmax, which mixtral"),
        ("mixtral", ("--moe-router-topk-scaling-factor", "2"), "scaled routing weights, which mixtral"),
        ("rwkv7", ("--normalization", "rmsnorm", "--norm-epsilon", "1e-6"), "RMS norms, and --norm-epsilon 1e-06"),
        ("rwkv7", ("--rwkv-head-size", "32"), "with another epsilon there, which .* --to rwkv7"),
    ],
)
def test_what_an_architecture_lacks_is_named(kind: str, more: tuple[str, ...], message: str, tmp_path: Path) -> None:
    cfg = parse_config(flags(kind, tmp_path, "--vocab-size", "62", *more), prog="test").config.model
    known = [ARCHITECTURES.get(name) for name in ARCHITECTURES.names()]
    with pytest.raises(UserError, match=message):
        choose(cfg, "the model", "--to hf", known)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("mixtral", {"sliding_window": 4096}, "sliding_window 4096: attention here sees all"),
        ("mistral", {}, "sliding_window 4096"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window True"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ("qwen3_moe", {"num_experts": 0}, "odd num_experts: 0"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu': gpt2 is known with gelu_new"),
        ("rwkv7", {"attn": {"layers": [1]}}, "attention layers among"),
        ("rwkv7", {"head_dim": 32}, "norm_eps"),
        ("rwkv7", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("llama", {"rope_parameters": [1]}, "odd rope_parameters"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "linear without a factor"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rms_norm_eps": "small"}, "odd rms_norm_eps: 'small'"),
    ],
)
def test_models_that_we_do_not_have_are_refused(kind: str, change: dict, message: str) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    one = ARCHITECTURES.get(kind)
    with pytest.raises(UserError, match=message):
        one.model(Given(Path("dir"), {**sizes, "intermediate_size": 96, **change}, one.defaults))
