#!/usr/bin/env python3
"""Continues texts with a trained model.

    python tools/generate.py --load runs/small --prompt "The list of" --max-new-tokens 100
    python tools/generate.py --load runs/small --prompt "def main" --num-samples 4 --stop $'\\n\\n'
    python tools/generate.py --load runs/small --prompt "Once" --prompt "Twice" --max-new-tokens 20
    python tools/generate.py --load runs/small --prompt-file prompts.jsonl --json > answers.jsonl
    git log -1 --format=%s | python tools/generate.py --load runs/small --prompt-file - --temperature 0
    torchrun --nproc-per-node 2 tools/generate.py --load runs/small --prompt "def main" --temperature 0
    python tools/generate.py --load runs/mtp --prompt "def main" --temperature 0 --speculate mtp
    python tools/generate.py --load runs/sums --prompt "Question: 48/2+1? Answer:" --tools calculator

The checkpoint says which model and tokenizer it is. Under torchrun the ranks share the model, whatever layout it was
trained at: --pp stages, each over --tp ranks (all there are by default). One text appears as it is drawn, several when
they are complete. A text depends on its own prompt and seed alone, whatever else is drawn beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.arguments import ArgumentParser, integer, number
from megaforge.config.entry import run_entry
from megaforge.config.launcher import discover_launch, print_rank_0
from megaforge.errors import UserError
from megaforge.inference.open_model import add_model_flags, open_model
from megaforge.inference.tool_calls import ToolCalls, ToolSetting, add_tool_flags, check_tool_flags

if TYPE_CHECKING:
    from megaforge.data.tokenizer import Tokenizer
    from megaforge.inference.generation import Continuations, Sampling
    from megaforge.inference.prompts import Prompt
    from megaforge.inference.restore import TrainedModel
    from megaforge.inference.speculation import SpeculativeContinuations
    from megaforge.inference.text_stream import TextStream


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = ArgumentParser(description=__doc__)
    add_model_flags(parser)
    _add_texts(parser)
    parser.add_argument("--max-new-tokens", type=integer(0), default=100, help="tokens to draw at most")
    parser.add_argument("--temperature", type=number(0), default=0.8, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=integer(0), default=0, help="draw among this many most likely tokens; 0: all")
    parser.add_argument(
        "--top-p", type=number(above=0, most=1), default=0.95, help="draw among the most likely of this total share"
    )
    parser.add_argument(
        "--min-p",
        type=number(0, most=1),
        default=0.0,
        help="draw among those of this share of the likeliest's probability",
    )
    parser.add_argument(
        "--repetition-penalty", type=number(above=0), default=1.0, help="above 1: tokens of the text become less likely"
    )
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), default=0, help="of the draws")
    parser.add_argument(
        "--speculate",
        choices=("mtp",),
        help="mtp: the same greedy texts, several tokens at a time, proposed by the model's further predictions "
        "(--mtp-num-layers); with --temperature 0",
    )
    add_tool_flags(parser)
    flags = parser.parse_args(arguments)
    check_tool_flags(flags)
    _check_speculation(flags)
    if "" in flags.stop:
        raise UserError("--stop '': an empty text would end every continuation at once")
    if flags.prompt_format and flags.prompt_file is None:
        raise UserError(f"--prompt-format {flags.prompt_format}: it is that of a --prompt-file")
    return flags


def _check_speculation(flags: argparse.Namespace) -> None:
    if flags.speculate is None:
        return
    if flags.temperature != 0:
        raise UserError(
            f"--speculate {flags.speculate}: it writes what the most likely tokens give; add --temperature 0 (it is "
            f"{flags.temperature:g})"
        )
    if flags.repetition_penalty != 1:
        raise UserError(
            f"--speculate {flags.speculate}: several tokens are scored at once, without --repetition-penalty "
            f"{flags.repetition_penalty:g} between them; leave one of the two out"
        )
    if flags.tools:
        raise UserError(
            f"--speculate {flags.speculate}: the model's tokens are proposed ahead, and --tools "
            f"{' '.join(flags.tools)} would write between them; leave one of the two out"
        )
    if flags.cuda_graph:
        raise UserError(f"--speculate {flags.speculate}: its steps are of several tokens; leave --cuda-graph out")


def _add_texts(parser: argparse.ArgumentParser) -> None:
    """Flags of what to go on from, and of how many texts in which form."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt", action="append", metavar="TEXT", help="the text to go on from; may be given again, for more texts"
    )
    source.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="a prompt a line; in .jsonl an object a line with 'prompt' or 'messages'; -: standard input",
    )
    parser.add_argument(
        "--prompt-format", choices=("lines", "jsonl"), help="of --prompt-file (default: by its name; - has lines)"
    )
    parser.add_argument(
        "--timing", action="store_true", help="say at the end, on standard error, how long tokens took, and the memory"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a text")
    parser.add_argument(
        "--num-samples", type=integer(1), default=1, help="texts for each prompt, drawn as by --seed, --seed + 1, ..."
    )
    parser.add_argument(
        "--cuda-graph",
        action="store_true",
        help="record the step of a token on a GPU once for each number of texts, and play it again",
    )
    parser.add_argument("--batch-size", type=integer(1), default=16, help="texts drawn at once")
    parser.add_argument(
        "--prefill-chunk",
        type=integer(1),
        default=2048,
        metavar="TOKENS",
        help="tokens of prompts computed at once: longer prompts take no more memory but for their caches",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given again"
    )
    parser.add_argument(
        "--ignore-eod",
        action="store_true",
        help="never draw the end of a document: texts end by length or --stop alone",
    )
    parser.add_argument(
        "--chat-template",
        nargs="?",
        const="",
        metavar="FILE",
        help="a prompt is what the user says: write it as this Jinja file, or the tokenizer's own template, says",
    )


@dataclass
class Text:
    """One continuation as it grows: the ``sample``-th of ``prompt``, number ``index`` of all prompts."""

    prompt: Prompt
    index: int
    sample: int
    stream: TextStream
    tokens: int = 0
    end: str = "length"


@dataclass
class Timing:
    """Seconds and tokens of batches: until the first tokens are drawn, prompts included, and of all that follow."""

    firsts: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0

    def drawn(self, seconds: float, tokens: int, first: bool) -> None:
        if first:
            self.firsts.append(seconds)
        else:
            self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens

    def line(self, peak_bytes: int) -> str:
        """Without a rate where none was measured."""
        mean = sum(self.firsts) / max(len(self.firsts), 1)
        rate = f" ({self.tokens / self.seconds:.1f} a second)" if self.tokens else ""
        return (
            f"--timing: first tokens after {mean:.3f} s (mean of batches: {len(self.firsts)}), then {self.tokens} "
            f"tokens in {self.seconds:.3f} s{rate}; peak memory {peak_bytes / 1e6:.0f} MB"
        )


class Writer:
    """Draws on all ranks; rank 0 prints."""

    def __init__(self, flags: argparse.Namespace, trained: TrainedModel, tokenizer: Tokenizer) -> None:
        from megaforge.data.chat_template import load_chat_template
        from megaforge.inference.generation import unusable_ids
        from megaforge.inference.speculation import Acceptance

        self.flags, self.trained, self.tokenizer, self.timing = flags, trained, tokenizer, Timing()
        self.acceptance = Acceptance()
        self.tools: ToolCalls | None = None
        if flags.tools:
            setting = ToolSetting(trained.model, trained.config, tokenizer, flags.memory)
            self.tools = ToolCalls.of(flags.tools, setting)
        self.template = None
        if flags.chat_template is not None:
            self.template = load_chat_template(flags.chat_template or None, tokenizer)
        # The text of a control token is never shown, so that one of them stops by its id.
        named = {tokenizer.control_tokens[stop]: "stop" for stop in flags.stop if stop in tokenizer.control_tokens}
        self.ends = named if tokenizer.eod is None else {tokenizer.eod: "eod", **named}
        self.stops = [stop for stop in flags.stop if stop not in tokenizer.control_tokens]
        self.unusable = unusable_ids(tokenizer, trained.model.vocab_size)
        if flags.ignore_eod:
            self.unusable += [] if tokenizer.eod is None else [tokenizer.eod]

    def write(self, prompts: list[Prompt], sampling: Sampling) -> None:
        """All texts, ``--batch-size`` at a time."""
        encoded = [prompt.encode(self.tokenizer, self.template) for prompt in prompts]
        alone = len(prompts) * self.flags.num_samples == 1 and not self.flags.json
        jobs = [(index, sample) for index in range(len(prompts)) for sample in range(self.flags.num_samples)]
        for start in range(0, len(jobs), self.flags.batch_size):
            self._write_batch(prompts, encoded, jobs[start : start + self.flags.batch_size], sampling, alone)

    def _write_batch(
        self,
        prompts: list[Prompt],
        encoded: list[list[int]],
        jobs: list[tuple[int, int]],
        sampling: Sampling,
        alone: bool,
    ) -> None:
        from megaforge.inference.generation import Continuations
        from megaforge.inference.text_stream import TextStream
        from megaforge.inference.tool_calls import Insertions

        texts = [
            Text(prompts[index], index, sample, TextStream(self.tokenizer, encoded[index], self.stops))
            for index, sample in jobs
        ]
        seeds = [sampling.seed + sample for _, sample in jobs]
        start = time.perf_counter()
        batch = self._begin([encoded[index] for index, _ in jobs], sampling, seeds)
        asking = None if self.tools is None else Insertions(self.tools)
        if alone and self.template is None:
            self._show(texts[0].prompt.text)
        for step in range(self.flags.max_new_tokens):
            if not batch.going_on:
                break
            drawn = batch.draw()
            now = time.perf_counter()
            self.timing.drawn(now - start, len(drawn), first=step == 0)
            start = now
            done = [number for number, token in drawn.items() if self._take(texts[number], token, alone)]
            if asking is not None and isinstance(batch, Continuations):
                asking.answer(batch, {number: texts[number].stream.text for number in drawn if number not in done})
            batch.drop(done)
        for text in texts:
            self._finish(text, alone)

    def _begin(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]
    ) -> Continuations | SpeculativeContinuations:
        from megaforge.inference.generation import Continuations
        from megaforge.inference.speculation import SpeculativeContinuations

        model, unusable = self.trained.model, self.unusable
        sizes = {"prefill_chunk": self.flags.prefill_chunk, "max_new_tokens": self.flags.max_new_tokens}
        if self.flags.speculate:
            return SpeculativeContinuations(model, prompts, unusable=unusable, acceptance=self.acceptance, **sizes)
        return Continuations(model, prompts, sampling, seeds=seeds, unusable=unusable, **sizes)

    def _take(self, text: Text, token: int, alone: bool) -> bool:
        """Adds a token to a text; whether that ended it."""
        if token in self.ends:
            text.end = self.ends[token]
            return True
        text.tokens += 1
        new = text.stream.add(token)
        if alone:
            self._show(new)
        if text.stream.stopped is not None:
            text.end = "stop"
        return text.stream.stopped is not None

    def _finish(self, text: Text, alone: bool) -> None:
        rest = text.stream.close()
        if alone:
            self._show(rest + "\n")
        elif self.flags.json:
            record = {"index": text.index, "sample": text.sample, **text.prompt.record(), "text": text.stream.text}
            self._show(json.dumps({**record, "tokens": text.tokens, "end": text.end}, ensure_ascii=False) + "\n")
        else:
            head = f"--- prompt {text.index + 1}, sample {text.sample + 1}\n"
            prompt = text.prompt.text if self.template is None else ""
            self._show(f"{head}{prompt}{text.stream.text}\n")

    def _show(self, text: str) -> None:
        if self.trained.ctx.is_first_rank:
            print(text, end="", flush=True)


def main() -> int:
    flags = parse_arguments()
    _ = discover_launch()
    from megaforge.inference.prompts import Prompt, read_prompts

    if flags.prompt_file == "-" and discover_launch().world_size > 1:
        raise UserError("--prompt-file -: the ranks would each read a part of standard input; name a file")
    if flags.prompt_file is None:
        names = ["--prompt"] if len(flags.prompt) == 1 else [f"--prompt {text}" for text in flags.prompt]
        prompts = [Prompt(name, text) for name, text in zip(names, flags.prompt, strict=True)]
    else:
        by_name = "jsonl" if flags.prompt_file.endswith((".jsonl", ".ndjson")) else "lines"
        prompts = read_prompts(flags.prompt_file, (flags.prompt_format or by_name) == "jsonl")
    from megaforge.device import peak_memory_bytes
    from megaforge.inference.generation import Sampling
    from megaforge.parallel.distributed import shutdown

    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.seed, flags.min_p, flags.repetition_penalty)
    sampling.validate(flags.num_samples)
    trained = open_model(flags)
    if flags.cuda_graph:
        trained.model.record_steps()
    writer = Writer(flags, trained, trained.load_tokenizer(flags.tokenizer_model))
    writer.write(prompts, sampling)
    if flags.speculate:
        print_rank_0(writer.acceptance.line(writer.timing.tokens, writer.timing.seconds))
    if writer.tools is not None:
        print_rank_0(writer.tools.line())
    if flags.timing:
        print_rank_0(writer.timing.line(peak_memory_bytes(trained.ctx.device)))
    shutdown()
    return 0


if __name__ == "__main__":
    run_entry(main)
