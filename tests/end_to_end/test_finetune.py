"""finetune_cdrmix.py as a user runs it: answers of a file, LoRA, evaluated, generated from, exported and merged."""

from __future__ import annotations

import json
from pathlib import Path

from tests.data.corpus_files import bpe_tokenizer
from tests.end_to_end.launch import records, run
from tests.training.tiny import dense_arguments, make_trainer

SMALL = ("--seq-length", "32", "--micro-batch-size", "2", "--global-batch-size", "4", "--device", "cpu")


def test_answers_are_learnt_and_the_adapter_goes_its_way(tmp_path: Path) -> None:
    tokenizer = bpe_tokenizer(tmp_path / "tokenizer.json")
    rows = [{"prompt": f"say {word}:", "response": f" {word} {word}"} for word in ("the", "cat", "dog", "sun", "one")]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
    data, base, tuned, adapter = f"chat://{file}", *(str(tmp_path / name) for name in ("base", "tuned", "adapter"))
    given = dense_arguments(data, "R-*-", *SMALL)
    start = given.index("--tokenizer-type")
    own = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer))
    given = [*given[:start], *own, *given[start + 4 :]]
    make_trainer([*given, "--train-iters", "1", "--train-on-prompts", "--save", base]).train()

    line = ("--pretrained-checkpoint", base, "--save", tuned, "--load", tuned, "--data-path", data, *SMALL)
    more = ("--valid-data-path", data, "--eval-iters", "2", "--eval-interval", "10", "--peft", "lora", "--lr", "3e-2")
    metrics = tmp_path / "metrics.jsonl"
    done = run(1, "finetune_cdrmix.py", *line, *more, "--train-iters", "30", "--metrics-file", str(metrics))
    assert done.status == 0, done.out + done.err
    assert "20 conversations in" in done.out + done.err
    losses = [one["loss"] for one in records(metrics) if one["kind"] == "step"]
    assert losses[-1] < losses[0] - 0.2

    assert run(1, "tools/convert_checkpoint.py", "--load", tuned, "--save", adapter, "--to", "peft").status == 0
    texts = []
    for load in (("--load", tuned), ("--load", base, "--adapter", adapter)):
        ask = ("--prompt", "say cat:", "--temperature", "0", "--max-new-tokens", "8", "--device", "cpu", "--json")
        made = run(1, "tools/generate.py", *load, *ask)
        assert made.status == 0, made.out + made.err
        texts.append(next(json.loads(row)["text"] for row in made.out.splitlines() if row.startswith("{")))
    assert texts[0] == texts[1]
