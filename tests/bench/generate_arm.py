"""One program that generates, in a process of its own: what ``bench_generate.py`` starts and asks, a line at a time.

    python tests/bench/generate_arm.py '{"program": "ours", "path": "runs/x", "dtype": "bf16", "batch": 8,
                                         "prompt": 256, "vocab": 65536}'

It answers each line of standard input with one of JSON: ``first`` reads prompts anew and draws a token of each,
``tokens N`` draws N more, ``memory`` says what the process had at most since it was ready (megabytes).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

Draw = Callable[[], list[int]]
Begin = Callable[[Tensor], Draw]  # reads prompts [b, s]; the next token of each text


def ours(asked: dict[str, Any]) -> Begin:
    """The model and the loop of ``tools/generate.py``, without text."""
    from megaforge.inference.generation import Continuations, Sampling
    from megaforge.inference.restore import load_trained_model

    model = load_trained_model(asked["path"], device="cpu", dtype=asked["dtype"]).model

    def begin(prompts: Tensor) -> Draw:
        texts = Continuations(model, prompts.tolist(), Sampling(temperature=0))
        return lambda: list(texts.draw().values())

    return begin


def rwkv(asked: dict[str, Any]) -> Begin:
    """BlinkDL's package, which has no batches."""
    os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
    from rwkv.model import RWKV

    model = RWKV(str(Path(asked["path"]).with_suffix("")), f"cpu {asked['dtype']}")

    def begin(prompts: Tensor) -> Draw:
        [given] = prompts.tolist()
        state: Any = None

        @torch.no_grad()
        def draw() -> list[int]:
            nonlocal given, state
            scores, state = model.forward(given, state)
            given = [int(scores.argmax())]
            return given

        return draw

    return begin


def transformers(asked: dict[str, Any]) -> Begin:
    """Hugging Face's model with its cache, without the checks and processors around ``generate``."""
    from transformers import AutoModelForCausalLM

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[asked["dtype"]]
    model = AutoModelForCausalLM.from_pretrained(asked["path"], dtype=dtype).eval()

    def begin(prompts: Tensor) -> Draw:
        given, cache = prompts, None

        @torch.no_grad()
        def draw() -> list[int]:
            nonlocal given, cache
            out = model(given, past_key_values=cache, use_cache=True, logits_to_keep=1)
            given, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            return given.flatten().tolist()

        return draw

    return begin


PROGRAMS: dict[str, Callable[[dict[str, Any]], Begin]] = {"ours": ours, "rwkv": rwkv, "transformers": transformers}


def forget_peak() -> None:
    """The kernel counts this process's largest resident set from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_megabytes() -> float:
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return next(int(line.split()[1]) / 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def main() -> None:
    asked = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what packages print is no answer
    begin = PROGRAMS[asked["program"]](asked)
    loaded = peak_megabytes()
    if Path("/proc/self/clear_refs").exists():  # Linux
        forget_peak()
    shape, generator = (asked["batch"], asked["prompt"]), torch.Generator().manual_seed(1)
    prompts = torch.randint(0, asked["vocab"], shape, generator=generator)
    print(json.dumps({"loaded": loaded}), file=answers)
    draw: Draw | None = None
    for line in sys.stdin:
        word, *count = line.split()
        answer: dict[str, Any] = {}
        start = time.perf_counter()
        if word == "first":
            draw = begin(prompts)
            answer["tokens"] = [draw()]
        elif word == "tokens":
            assert draw is not None, "texts begin with 'first'"
            answer["tokens"] = [draw() for _ in range(int(count[0]))]
        answer["seconds"] = time.perf_counter() - start
        answer["megabytes"] = peak_megabytes()
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
