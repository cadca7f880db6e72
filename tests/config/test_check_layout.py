from __future__ import annotations

import pytest
import torch.distributed as dist

from megaforge.config.check_layout import check_layout, mixer_kinds, with_tokenizer_vocab
from megaforge.config.cli import parse_config
from megaforge.errors import UserError


def complaint(world_size: int, *argv: str) -> str:
    with pytest.raises(UserError) as caught:
        check_layout(parse_config(argv).config, world_size)
    return str(caught.value)


def test_dp_and_micro_batches_follow() -> None:
    layout = check_layout(parse_config(["--tp", "2", "--micro-batch-size", "3", "--global-batch-size", "24"]).config, 8)
    assert (layout.tp, layout.dp, layout.global_batch_size, layout.micro_batches) == (2, 4, 24, 2)
    inferred = check_layout(parse_config(["--tp", "2", "--micro-batch-size", "3"]).config, 8)
    assert (inferred.global_batch_size, inferred.micro_batches, inferred.notes) == (12, 1, ())
    staged = check_layout(parse_config(["--tp", "2", "--pp", "2", "--global-batch-size", "8"]).config, 8)
    assert (staged.dp, staged.micro_batches) == (2, 4)


ATTENTION = ("--layer-schedule", "attention", "--ffn", "dense")
RWKV = ("--layer-schedule", "rwkv")


@pytest.mark.parametrize(
    ("world_size", "argv", "message"),
    [
        (8, ["--tp", "2", "--pp", "3"],
         "--pp 3 does not divide the 4 ranks that --tp 2 leaves of the 8 that were started; use --pp 1, 2 or 4"),
        (1, ["--vpp", "2", "--num-layers-per-virtual-pipeline-stage", "1"],
         "--num-layers-per-virtual-pipeline-stage 1 and --vpp 2 say the same thing twice; give one of them"),
        (2, ["--cp", "2"], "--cp 2: context parallelism is not implemented yet; use --cp 1"),
        (2, ["--ep", "2"], "--ep 2: expert parallelism is not implemented yet; use --ep 1"),
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
         "--global-batch-size 10 does not divide by --micro-batch-size 4 x dp 2 = 8; "
         "use --global-batch-size 8 or 16, or --micro-batch-size 1"),
        (2, ["--micro-batch-size", "8", "--global-batch-size", "8"],
         "--global-batch-size 8 does not divide by --micro-batch-size 8 x dp 2 = 16; "
         "use --global-batch-size 16, or --micro-batch-size 4"),
        (4, ["--global-batch-size", "3"],
         "--global-batch-size 3 does not divide by --micro-batch-size 1 x dp 4 = 4; use --global-batch-size 4"),
        (1, ["--seq-length", "64", "--max-position-embeddings", "32"],
         "--seq-length 64 exceeds --max-position-embeddings 32; "
         "use --seq-length 32 or raise --max-position-embeddings"),
        (1, ["--lr-decay-style", "WSD", "--lr-wsd-decay-iters", "200"],
         "--lr-wsd-decay-iters 200 exceeds the schedule's 100 iterations (--lr-decay-iters, or --train-iters); "
         "use --lr-wsd-decay-iters 100 or fewer"),
        (2, ["--distributed-backend", "nccl", "--device", "cpu"],
         "--distributed-backend nccl does not serve --device cpu; use --distributed-backend gloo"),
    ],
)  # fmt: skip
def test_each_error_names_flag_value_and_a_way_out(world_size: int, argv: list[str], message: str) -> None:
    assert complaint(world_size, *argv) == message


def test_only_what_the_model_has_must_divide() -> None:
    check_layout(parse_config([*RWKV, "--tp", "4", "--num-attention-heads", "6", "--hidden-size", "768"]).config, 4)
    check_layout(
        parse_config([*ATTENTION, "--tp", "4", "--hidden-size", "384", "--num-attention-heads", "4"]).config, 4
    )
    check_layout(parse_config(["--tp", "2", "--seq-length", "33"]).config, 2)
    check_layout(parse_config(["--tp", "4", "--vocab-size", "50257"]).config, 4)


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
    assert mixer_kinds(parse_config(argv).config.model) == set(kinds)


def test_a_torch_without_a_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_mpi_available", lambda: False)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert complaint(1, "--distributed-backend", "mpi").startswith(
        "--distributed-backend mpi: this torch was built without"
    )
    assert complaint(1, "--distributed-backend", "nccl").endswith("built without NCCL; use --distributed-backend gloo")
    monkeypatch.setattr(dist, "is_mpi_available", lambda: True)
    check_layout(parse_config(["--distributed-backend", "mpi"]).config, 1)


def test_notes_on_what_changes_nothing() -> None:
    layout = check_layout(parse_config(["--sp", "--lr-warmup-iters", "200"]).config, 1)
    assert [note.split()[0] for note in layout.notes] == ["--sequence-parallel", "--lr-warmup-iters"]


def test_the_vocabulary_comes_from_the_tokenizer_unless_given() -> None:
    assert with_tokenizer_vocab(parse_config([]).config, 4096).model.vocab_size == 4096
    assert with_tokenizer_vocab(parse_config(["--vocab-size", "5000"]).config, 4096).model.vocab_size == 5000
    with pytest.raises(
        UserError, match="--vocab-size 4000: the tokenizer has 4096 entries; use --vocab-size 4096 or more"
    ):
        with_tokenizer_vocab(parse_config(["--vocab-size", "4000"]).config, 4096)
