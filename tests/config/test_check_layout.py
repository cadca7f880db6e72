from __future__ import annotations

import pytest

from megaforge.config.check_layout import check_layout, with_tokenizer_vocab
from megaforge.config.cli import parse_config
from megaforge.config.pattern import kinds_of
from megaforge.errors import UserError
from megaforge.registry import LAYER_KINDS


def complaint(world_size: int, *argv: str) -> str:
    with pytest.raises(UserError) as caught:
        check_layout(parse_config(argv).config, world_size)
    return str(caught.value)


def test_dp_and_micro_batches_follow() -> None:
    layout = check_layout(parse_config(["--tp", "2", "--micro-batch-size", "3", "--global-batch-size", "24"]).config, 8)
    assert (layout.tp, layout.dp, layout.batches.size, layout.micro_batches) == (2, 4, 24, 2)
    inferred = check_layout(parse_config(["--tp", "2", "--micro-batch-size", "3"]).config, 8)
    assert (inferred.batches.size, inferred.micro_batches, inferred.notes) == (12, 1, ())
    staged = check_layout(parse_config(["--tp", "2", "--pp", "2", "--global-batch-size", "8"]).config, 8)
    assert (staged.dp, staged.micro_batches) == (2, 4)


def test_context_parallel_ranks_share_samples() -> None:
    layout = check_layout(parse_config(["--tp", "2", "--cp", "2", "--global-batch-size", "6"]).config, 8)
    assert (layout.tp, layout.cp, layout.dp, layout.micro_batches) == (2, 2, 2, 3)
    check_layout(parse_config(["--tp", "2", "--cp", "2", "--seq-length", "12"]).config, 4)


ATTENTION = ("--layer-schedule", "attention", "--ffn", "dense")
RWKV = ("--layer-schedule", "rwkv")


@pytest.mark.parametrize(
    ("world_size", "argv", "message"),
    [
        (8, ["--tp", "2", "--pp", "3"],
         "--pp 3 does not divide the 4 ranks that --tp 2 leaves of the 8 that were started; use --pp 1, 2 or 4"),
        (1, ["--vpp", "2", "--num-layers-per-virtual-pipeline-stage", "1"],
         "--num-layers-per-virtual-pipeline-stage 1 and --vpp 2 say the same thing twice; give one of them"),
        (8, ["--ep", "4", "--num-experts", "6"],
         "--ep 4 does not divide both --num-experts 6 and the 8 ranks of a pipeline stage; use --ep 1 or 2"),
        (8, ["--ep", "8", "--tp", "2", "--etp", "2"],
         "--ep 8 does not divide both --num-experts 8 and the 4 ranks that --etp 2 leaves of the 8 of a pipeline "
         "stage; use --ep 1, 2 or 4"),
        (6, ["--ep", "4", "--tp", "2"],
         "--ep 4 does not divide both --num-experts 8 and the 6 ranks of a pipeline stage; use --ep 1 or 2"),
        (8, ["--etp", "3"],
         "--etp 3 does not divide both --ffn-hidden-size 3072 and the 8 ranks of a pipeline stage; "
         "use --etp 1, 2, 4 or 8"),
        (2, [*ATTENTION, "--ep", "2"],
         "--ep 2 splits experts, and this model has none; leave it out, or use --ffn moe"),
        (2, [*ATTENTION, "--etp", "2"],
         "--etp 2 splits experts, and this model has none; leave it out, or use --ffn moe"),
        (4, [*RWKV, "--tp", "4", "--moe-shared-expert-intermediate-size", "90"],
         "--tp 4 does not divide --moe-shared-expert-intermediate-size 90; use --tp 1 or 2"),
        (12, ["--tp", "2", "--cp", "4", "--seq-length", "24"],
         "--cp 4 does not divide the 6 ranks that --tp 2 leaves of the 12 that were started; use --cp 1, 2, 3 or 6"),
        (6, ["--cp", "3", "--seq-length", "1024"],
         "--seq-length 1024 is not divisible by 2 x cp = 6: --cp 3 cuts each sequence into 6 chunks; "
         "use --seq-length 1020 or 1026, or --cp 1 or 2"),
        (4, ["--cp", "4", "--seq-length", "7"],
         "--seq-length 7 is not divisible by 2 x cp = 8: --cp 4 cuts each sequence into 8 chunks; "
         "use --seq-length 8, or --cp 1"),
        (4, ["--tp", "2", "--sp", "--cp", "2", "--seq-length", "12"],
         "--seq-length 12 is not divisible by 2 x cp x tp = 8 (--sequence-parallel cuts each chunk over --tp 2): --cp "
         "2 cuts each sequence into 4 chunks; use --seq-length 8 or 16, or --cp 1"),
        (4, ["--tp", "3"],
         "--tp 3 does not divide the 4 ranks that were started; use --tp 1, 2 or 4, or start 3 ranks"),
        (1, ["--tp", "2"],
         "--tp 2 does not divide the 1 ranks that were started; use --tp 1, or start 2 ranks"),
        (4, [*ATTENTION, "--tp", "4", "--num-attention-heads", "6"],
         "--tp 4 does not divide --num-attention-heads 6; use --tp 1 or 2"),
        (4, [*ATTENTION, "--tp", "4", "--num-query-groups", "2"],
         "--tp 4 does not divide --num-query-groups 2; use --tp 1 or 2"),
        (4, [*RWKV, "--tp", "4", "--hidden-size", "384"],
         "--tp 4 does not divide the 6 RWKV heads (--hidden-size 384 / --rwkv-head-size 64); use --tp 1 or 2"),
        (4, ["--tp", "4", "--ffn-hidden-size", "1002"],
         "--tp 4 does not divide --ffn-hidden-size 1002; use --tp 1 or 2"),
        (4, ["--tp", "4", "--vocab-size", "50257", "--make-vocab-size-divisible-by", "2"],
         "--tp 4 does not divide the vocabulary of 50257 padded to 50258 (--make-vocab-size-divisible-by 2); "
         "use --tp 1 or 2"),
        (2, ["--tp", "2", "--sp", "--seq-length", "33"],
         "--tp 2 does not divide --seq-length 33, which --sequence-parallel cuts; use --tp 1"),
        (4, ["--tp", "2", "--micro-batch-size", "4", "--global-batch-size", "10"],
         "--global-batch-size 10 is not divisible by --micro-batch-size 4 x dp 2 = 8; "
         "use --global-batch-size 8 or 16, or --micro-batch-size 1"),
        (2, ["--micro-batch-size", "8", "--global-batch-size", "8"],
         "--global-batch-size 8 is not divisible by --micro-batch-size 8 x dp 2 = 16; "
         "use --global-batch-size 16, or --micro-batch-size 4"),
        (2, ["--micro-batch-size", "2", "--step-batch-size-schedule", "0:6", "1K:16"],
         "--step-batch-size-schedule 0:6 1K:16: a batch of 6 is not divisible by --micro-batch-size 2 x dp 2 = 4; use "
         "multiples of 4"),
        (2, ["--micro-batch-size", "2", "--global-batch-size", "16", "--rampup-batch-size", "8", "2", "90"],
         "--rampup-batch-size 8 2 90: its START and INCREMENT are not both divisible by --micro-batch-size 2 x dp 2 = "
         "4; use multiples of 4"),
        (4, ["--global-batch-size", "3"],
         "--global-batch-size 3 is not divisible by --micro-batch-size 1 x dp 4 = 4; use --global-batch-size 4"),
        (1, ["--seq-length", "64", "--max-position-embeddings", "32"],
         "--seq-length 64 exceeds --max-position-embeddings 32; "
         "use --seq-length 32 or raise --max-position-embeddings"),
        (1, ["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "200"],
         "--lr-wsd-decay-iters 200 exceeds the schedule's 100 iterations (--lr-decay-iters, or --train-iters); "
         "use --lr-wsd-decay-iters 100 or fewer"),
        (2, ["--grad-reduce-in-bf16", "--fp64"],
         "--grad-reduce-in-bf16 would undo --fp64; drop one of the two"),
        (2, ["--grad-reduce-in-bf16", "--grad-compression", "powersgd"],
         "--grad-reduce-in-bf16 and --grad-compression powersgd exclude each other; drop one of the two"),
        (2, ["--grad-compression", "bf16", "--zero", "2"],
         "--grad-compression bf16 needs whole gradients, which --zero 2 does not keep; use --zero 1"),
        (2, ["--grad-compression", "powersgd", "--fp16"],
         "--grad-compression powersgd carries losses over to steps with another --fp16 loss scale; use --bf16"),
        (2, ["--grad-compression", "bf16", "--fp64"],
         "--grad-compression bf16 would undo --fp64; drop one of the two"),
        (2, ["--distributed-backend", "nccl", "--device", "cpu"],
         "--distributed-backend nccl does not serve --device cpu; use --distributed-backend gloo"),
    ],
)  # fmt: skip
def test_each_error_names_flag_value_and_a_way_out(world_size: int, argv: list[str], message: str) -> None:
    assert complaint(world_size, *argv) == message


@pytest.mark.parametrize(
    ("world_size", "argv", "etp"),
    [
        (128, ["--config", "cdrmix-core-40b", "--tp", "8", "--pp", "4", "--ep", "8"], 4),
        (32, ["--config", "cdrmix-core-40b", "--tp", "8", "--ep", "4"], 8),
        (8, ["--tp", "4", "--ep", "8"], 1),
        (8, ["--tp", "4", "--cp", "2", "--ep", "4"], 2),
        (8, ["--tp", "4", "--ep", "2"], 4),
        (8, ["--tp", "4", "--ep", "2", "--etp", "1"], 1),
        (12, ["--tp", "12", "--ep", "2", "--layer-schedule", "rwkv", "--ffn-hidden-size", "1002"], 6),
        (8, ["--tp", "2"], 2),
    ],
)
def test_experts_follow_tp_as_far_as_ep_leaves_room(world_size: int, argv: list[str], etp: int) -> None:
    layout = check_layout(parse_config(argv).config, world_size)
    tp = int(argv[argv.index("--tp") + 1])
    assert layout.etp == etp
    said = [note for note in layout.notes if note.startswith(f"--etp {etp}, as none was given: ")]
    assert len(said) == (etp < tp and "--etp" not in argv)
    assert not said or f"--tp {tp} that leaves room for --ep" in said[0]


def test_only_what_the_model_has_must_divide() -> None:
    check_layout(parse_config([*RWKV, "--tp", "4", "--num-attention-heads", "6", "--hidden-size", "768"]).config, 4)
    check_layout(
        parse_config([*ATTENTION, "--tp", "4", "--hidden-size", "384", "--num-attention-heads", "4"]).config, 4
    )
    check_layout(parse_config(["--tp", "2", "--seq-length", "33"]).config, 2)
    check_layout(parse_config(["--tp", "4", "--vocab-size", "50257"]).config, 4)
    check_layout(parse_config(["--tp", "4", "--etp", "1", "--ep", "8", "--ffn-hidden-size", "1001"]).config, 8)


@pytest.mark.parametrize(
    ("argv", "kinds"),
    [
        (["--hybrid-layer-pattern", "R-R-"], "R"),
        (["--hybrid-layer-pattern", "*-"], "*"),
        (["--hybrid-layer-pattern", "RE*E", "--layer-schedule", "rwkv"], "R*"),
        (["--layer-schedule", "interleave-x"], "R*"),
        (["--transformer-pct", "0"], "R"),
        (["--transformer-pct", "100"], "*"),
        (["--transformer-pct", "1"], "R"),
        (["--layer-schedule", "attention"], "*"),
        (["--layer-schedule", "rwkv"], "R"),
    ],
)
def test_mixer_kinds(argv: list[str], kinds: str) -> None:
    present = kinds_of(parse_config(argv).config.model)
    assert {kind for kind in present if kind.is_mixer} == {LAYER_KINDS.get(letter) for letter in kinds}


def test_notes_on_what_changes_nothing() -> None:
    layout = check_layout(parse_config(["--sp", "--config", "cdrmix-core-1b", "--train-iters", "20"]).config, 1)
    assert [note.split()[0] for note in layout.notes] == ["--sequence-parallel", "--lr-warmup-iters"]


def test_notes_on_sharing_and_compression() -> None:
    alone = check_layout(parse_config(["--zero", "2"]).config, 1)
    assert alone.notes == ("--zero 2 has nothing to shard at dp 1: it saves nothing",)
    [note] = check_layout(parse_config(["--zero", "1", "--grad-compression", "powersgd"]).config, 2).notes
    assert note.startswith("--grad-compression powersgd: what is learned now depends on the number of data-parallel")
    assert note.endswith("--load starts without the losses kept so far")
    [_, note] = check_layout(parse_config(["--zero", "1", "--grad-compression", "bf16"]).config, 1).notes
    assert note.endswith("at dp 1 nothing is sent")
    assert check_layout(parse_config(["--zero-stage", "2", "--bf16"]).config, 2).notes == ()
    rounded = parse_config(["--grad-reduce-in-bf16"]).config
    assert check_layout(rounded, 1).notes == ()
    assert [note.split(":")[0] for note in check_layout(rounded, 2).notes] == ["--grad-reduce-in-bf16"]


def test_the_vocabulary_comes_from_the_tokenizer_unless_given() -> None:
    assert with_tokenizer_vocab(parse_config([]).config, 4096).model.vocab_size == 4096
    assert with_tokenizer_vocab(parse_config(["--vocab-size", "5000"]).config, 4096).model.vocab_size == 5000
    with pytest.raises(
        UserError, match="--vocab-size 4000: the tokenizer has 4096 entries; use --vocab-size 4096 or more"
    ):
        with_tokenizer_vocab(parse_config(["--vocab-size", "4000"]).config, 4096)


def test_dropped_attention_gathers_keys_and_values() -> None:
    line = ["--cp", "2", "--cp-comm-type", "p2p", "--seq-length", "64"]
    assert check_layout(parse_config(line).config, 2).notes == ()
    [note] = check_layout(parse_config([*line, "--attention-dropout", "0.1"]).config, 2).notes
    assert note.startswith("--attention-dropout gathers keys and values")


def test_experts_of_a_width_of_their_own_are_named_so() -> None:
    line = ("--etp", "2", "--tp", "2", "--moe-ffn-hidden-size", "33")
    assert complaint(2, *line).startswith("--etp 2 does not divide both --moe-ffn-hidden-size 33")
