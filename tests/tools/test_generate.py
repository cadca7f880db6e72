"""``tools/generate.py``: many prompts, samples and stop strings; what is printed, and what is refused."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from megaforge.config.model_config import ModelConfig
from megaforge.data.tokenizer import NullTokenizer
from megaforge.errors import UserError
from megaforge.inference.generation import Sampling
from megaforge.inference.prompts import Prompt, read_prompts
from megaforge.inference.restore import TrainedModel
from megaforge.inference.staged import StagedModel
from megaforge.models.hybrid import HybridModel
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.init import initialize_parameters
from megaforge.parallel.layer_context import make_layer_context
from tests.inference.continue_one import generate as continued
from tests.nn.support import perturb
from tests.training.tiny import make_config

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import generate as tool
from generate import Writer, parse_arguments

TOKENIZER = NullTokenizer("50")  # ids 0 to 50, of a model's 61


def made(**more: Any) -> StagedModel:
    cfg = ModelConfig(
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        rwkv_head_size=8,
        num_experts=4,
        vocab_size=61,
        hybrid_layer_pattern="RE*-",
        **more,
    )
    ctx = ParallelContext.single()
    model = HybridModel(make_layer_context(cfg, ctx))
    initialize_parameters(model, ctx, seed=5)
    perturb(model, ctx)
    return StagedModel(model.eval())


@pytest.fixture(scope="module")
def model() -> StagedModel:
    return made()


def written(model: StagedModel, prompts: list[str], capsys: pytest.CaptureFixture[str], *more: str) -> str:
    flags = parse_arguments(["--load", "x", "--prompt", "x", "--max-new-tokens", "12", "--temperature", "9", *more])
    trained = TrainedModel(model, model.ctx, make_config([]), {}, Path("x"))
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.seed, flags.min_p, flags.repetition_penalty)
    Writer(flags, trained, TOKENIZER).write([Prompt("p", text) for text in prompts], sampling)
    return capsys.readouterr().out


def test_one_text_is_prompt_and_continuation(model: StagedModel, capsys: pytest.CaptureFixture[str]) -> None:
    text = written(model, ["5 17 3"], capsys)
    words = text.split()
    assert text.startswith("5 17 3 ") and text.endswith("\n") and 3 < len(words) <= 15
    assert max(map(int, words)) < 50, "neither the end of a document nor what only the model has"


def test_many_texts_do_not_depend_on_their_company(model: StagedModel, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["5 17 3", "7", "1 2 3 4 5 6", "7"]
    records = [
        json.loads(line) for line in written(model, prompts, capsys, "--json", "--num-samples", "2").splitlines()
    ]
    assert [(r["index"], r["sample"], r["prompt"]) for r in records] == [
        (index, sample, prompt) for index, prompt in enumerate(prompts) for sample in range(2)
    ]
    for batch in ("1", "3"):
        flags = ("--json", "--num-samples", "2", "--batch-size", batch)
        assert [json.loads(line) for line in written(model, prompts, capsys, *flags).splitlines()] == records
    for record in records:
        alone = written(model, [record["prompt"]], capsys, "--seed", str(record["sample"]))
        assert alone == record["prompt"] + record["text"] + "\n"
        assert record["tokens"] == len(record["text"].split())
    assert {r["end"] for r in records} <= {"length", "eod"}


def test_plain_output_names_what_it_shows(model: StagedModel, capsys: pytest.CaptureFixture[str]) -> None:
    lines = written(model, ["7", "8"], capsys).splitlines()
    assert [lines[0], lines[2]] == ["--- prompt 1, sample 1", "--- prompt 2, sample 1"]
    assert lines[1].startswith("7 ") and lines[3].startswith("8 ")


def test_the_end_of_a_document_may_be_ignored(model: StagedModel, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--json", "--num-samples", "16", "--max-new-tokens", "40", "--prefill-chunk", "1")
    ends = [json.loads(line)["end"] for line in written(model, ["7 8 9"], capsys, *flags).splitlines()]
    assert set(ends) == {"length", "eod"}
    records = [json.loads(line) for line in written(model, ["7 8 9"], capsys, *flags, "--ignore-eod").splitlines()]
    assert {(r["end"], r["tokens"]) for r in records} == {("length", 40)}
    assert "50" not in " ".join(r["text"] for r in records).split()


def test_graphs_are_for_gpus(monkeypatch: pytest.MonkeyPatch, model: StagedModel) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", "--load", "x", "--prompt", "a", "--cuda-graph"])
    monkeypatch.setattr(
        tool, "open_model", lambda flags: TrainedModel(model, model.ctx, make_config([]), {}, Path("x"))
    )
    with pytest.raises(UserError, match="--cuda-graph: there are none on --device cpu"):
        tool.main()


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_speculation_writes_the_same_and_tells_what_was_accepted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    model = made(mtp_num_layers=2, mtp_mode=mode)
    trained = TrainedModel(model, model.ctx, make_config([]), {}, Path("x"))
    monkeypatch.setattr(TrainedModel, "load_tokenizer", lambda *given: TOKENIZER)
    monkeypatch.setattr(tool, "open_model", lambda flags: trained)
    line = ["generate.py", "--load", "x", "--prompt", "5 17 3", "--prompt", "7", "--temperature", "0"]
    texts = []
    for more in ([], ["--speculate", "mtp"]):
        monkeypatch.setattr(sys, "argv", [*line, "--max-new-tokens", "12", "--json", "--num-samples", "2", *more])
        assert tool.main() == 0
        said = capsys.readouterr()
        texts.append(said.out)
    assert texts[0] == texts[1]
    assert re.search(r"--speculate mtp: \d+ of \d+ drafts accepted in \d+ passes .* tokens a second", said.err)


@pytest.mark.parametrize(
    "flags,message",
    [
        (("--temperature", "0.5"), "add --temperature 0 \\(it is 0.5\\)"),
        (("--temperature", "0", "--repetition-penalty", "1.2"), "--repetition-penalty 1.2"),
        (("--temperature", "0", "--cuda-graph"), "leave --cuda-graph out"),
    ],
)
def test_what_does_not_go_with_speculation_is_named(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=f"--speculate mtp: .*{message}"):
        parse_arguments(["--load", "x", "--prompt", "a", "--speculate", "mtp", *flags])


def test_prompts_may_be_given_again() -> None:
    assert parse_arguments(["--load", "x", "--prompt", "a", "--prompt", "b c"]).prompt == ["a", "b c"]


def test_timing_counts_first_tokens_apart() -> None:
    timing = tool.Timing()
    for first, seconds, tokens in ((True, 3.0, 2), (False, 0.5, 2), (True, 1.0, 1), (False, 0.25, 1)):
        timing.drawn(seconds, tokens, first)
    assert timing.line(5_000_000) == (
        "--timing: first tokens after 2.000 s (mean of batches: 2), then 3 tokens in 0.750 s (4.0 a second); "
        "peak memory 5 MB"
    )
    assert "then 0 tokens in 0.000 s; peak" in tool.Timing([1.0]).line(1)


def test_stop_strings_end_a_text(model: StagedModel, capsys: pytest.CaptureFixture[str]) -> None:
    whole = written(model, ["7"], capsys)
    stop = f" {whole.split()[4]} "
    expected = whole[: whole.index(stop, 1)]
    [record] = [json.loads(written(model, ["7"], capsys, "--json", "--stop", "none", "--stop", stop))]
    assert record["end"] == "stop" and "7" + record["text"] == expected
    assert written(model, ["7"], capsys, "--stop", stop) == expected + "\n"


def test_no_new_tokens_is_the_prompt(model: StagedModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert written(model, ["7"], capsys, "--max-new-tokens", "0") == "7\n"


def test_the_recorded_end_of_document_ends_a_text(model: StagedModel) -> None:
    tokens = list(continued(model, [7], 12, Sampling(temperature=0)))
    assert list(continued(model, [7], 12, Sampling(temperature=0), tokens[2])) == tokens[: tokens.index(tokens[2])]


def test_prompts_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\n two \xe2\x80\xa8x\n")
    assert [p.text for p in read_prompts(str(file), False)] == ["one", " two \u2028x"]
    file.write_text('{"prompt": "a\\nb"}\n\n{"text": "c"}\n{"messages": [{"role": "user", "content": "d"}]}\n')
    prompts = read_prompts(str(file), True)
    assert [p.text for p in prompts] == ["a\nb", "c", "d"]
    assert prompts[2].record() == {"messages": [{"role": "user", "content": "d"}]}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("ünï\n".encode())))
    assert [p.text for p in read_prompts("-", False)] == ["ünï"]
    with pytest.raises(UserError, match="line 4 holds messages; add --chat-template"):
        prompts[2].encode(TOKENIZER, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b"\n \n", "holds no prompt"),
        (b"x\n", "line 1 is not JSON"),
        (b'{"prompt": "a"}\n{"prompt": 3}\n', "line 2 is not a prompt"),
        (b'{"messages": [{"role": "user"}]}\n', "line 1 is not a prompt"),
        (b"[1]\n", "line 1 is not a prompt"),
        (b"\xff\n", "byte 0 is not UTF-8"),
        (None, "No such file"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "p.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"--prompt-file .*{message}"):
        read_prompts(str(file), True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-new-tokens", "-1"), "--max-new-tokens -1"),
        (("--num-samples", "0"), "--num-samples 0"),
        (("--batch-size", "0"), "--batch-size 0"),
        (("--prefill-chunk", "0"), "--prefill-chunk 0"),
        (("--min-p", "1.5"), "--min-p 1.5"),
        (("--repetition-penalty", "0"), "--repetition-penalty 0"),
        (("--stop", ""), "--stop ''"),
        (("--prompt-format", "jsonl"), "--prompt-format jsonl"),
    ],
)
def test_bad_flags_are_named(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_arguments(["--load", "x", "--prompt", "x", *flags])
