#!/usr/bin/env python3
"""A model that was trained by --objective rlvr, or any other, answers questions about texts, whole or chunk by chunk.

    python tools/answer.py --load runs/rlvr --task kv_chunks --chunks 3 16 --examples 100
    python tools/answer.py --load runs/reader --task kv_chunks --chunks 4 16 64 --chunk-tokens 16 --memory-tokens 4
    python tools/answer.py --load runs/reader --input book.txt --question "ask k3"
    torchrun --nproc-per-node 2 tools/answer.py --load runs/rlvr --task kv_chunks

With --chunk-tokens a text of any length is read piece by piece: the model sees its memory, a chunk and the question,
and what it writes is its memory from then on. It writes the most likely tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.arguments import ArgumentParser, integer
from megaforge.config.entry import run_entry
from megaforge.inference.desk import Desk, ask_at
from megaforge.inference.open_model import add_model_flags
from megaforge.inference.text_flags import add_text_flags, check_text_flags, read_input
from megaforge.inference.tool_calls import ToolCalls, ToolSetting, add_tool_flags, check_tool_flags

if TYPE_CHECKING:
    from megaforge.inference.restore import TrainedModel
    from megaforge.reasoning.rlvr.conversation import Asked


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = ArgumentParser(description=__doc__)
    add_model_flags(parser)
    add_text_flags(parser)
    parser.add_argument(
        "--seed", type=integer(0, 2**63 - 1), help="of the texts of --task (default: the run's, and 1 more: new texts)"
    )
    parser.add_argument(
        "--chunk-tokens",
        type=integer(0),
        metavar="N",
        help="tokens of a piece; 0: the text is in the prompt (default: as in training)",
    )
    parser.add_argument("--memory-tokens", type=integer(1), help="of the memory, at most (default: as in training)")
    parser.add_argument("--max-new-tokens", type=integer(1), help="of an answer, at most (default: as in training)")
    parser.add_argument("--batch-size", type=integer(1), default=64, help="texts read side by side")
    parser.add_argument("--json", action="store_true", help="print a JSON object a text, and one for each length")
    add_tool_flags(parser)
    flags = parser.parse_args(arguments)
    check_tool_flags(flags)
    check_text_flags(flags, of_task=("seed",))
    return flags


class AnswerDesk(Desk):
    """Answers."""

    def __init__(self, flags: argparse.Namespace, trained: TrainedModel) -> None:
        from megaforge.reasoning.rlvr.conversation import Sizes
        from megaforge.reasoning.rlvr.writing import Pen

        super().__init__(flags, trained)
        how = trained.config.rollout
        self.piece = how.rl_chunk_tokens if flags.chunk_tokens is None else flags.chunk_tokens or None
        self.sizes = Sizes.of(how, self.tokenizer)
        self.sizes = replace(
            self.sizes,
            answer=flags.max_new_tokens or self.sizes.answer,
            memory=flags.memory_tokens or self.sizes.memory,
        )
        tools = None
        if names := flags.tools or how.rl_tools:
            tools = ToolCalls.of(names, ToolSetting(trained.model, trained.config, self.tokenizer, flags.memory))
        self.pen = Pen(trained.model, self.tokenizer, 0.0, flags.batch_size, tools)

    def ask_task(self) -> None:
        """New texts of a task: how many answers are right."""
        from megaforge.reasoning.rlvr.prompts import task_prompt
        from megaforge.tasks.chunked import make_chunked

        flags, config = self.flags, self.trained.config
        seed = config.training.seed + 1 if flags.seed is None else flags.seed
        for chunks in flags.chunks or [config.rollout.rl_task_chunks]:
            examples = [
                make_chunked(flags.task, seed, number, chunks, config.tasks.task_chunk_tokens)
                for number in range(flags.examples or 100)
            ]
            asked = [task_prompt(one, self.tokenizer, self.piece).asked for one in examples]
            found = self._answered(asked)
            right = [text.split() == one.answer.split() for (text, _), one in zip(found, examples, strict=True)]
            if flags.json:
                for number, (text, memories) in enumerate(found):
                    line = {"chunks": chunks, "example": number, "answer": text, "right": right[number]}
                    self.show(json.dumps({**line, "memories": memories}))
            numbers = {"task": flags.task, "chunks": chunks, "examples": len(right)}
            numbers["accuracy"] = sum(right) / len(right)
            said = f"{flags.task}, {chunks} chunks: {numbers['accuracy']:.1%} of {len(right)} texts answered right"
            self.show(json.dumps(numbers) if flags.json else said)

    def ask_input(self) -> None:
        """A text of the user's."""
        from megaforge.reasoning.rlvr.conversation import Asked, in_chunks

        flags = self.flags
        text, tokens = read_input(flags.input, self.tokenizer)
        asked = []
        for question in flags.question:
            if self.piece is None:
                asked.append(Asked(tuple(self.tokenizer.encode(f"{text} {question}"))))
            else:
                asked.append(Asked(tuple(self.tokenizer.encode(question)), in_chunks(tokens, self.piece)))
        for question, (answer, memories) in zip(flags.question, self._answered(asked), strict=True):
            record = {"question": question, "answer": answer, "memories": memories}
            self.show(json.dumps(record) if flags.json else f"{question}: {answer}")

    def _answered(self, asked: list[Asked]) -> list[tuple[str, list[str]]]:
        """Of each the answer, and what was in memory behind each chunk."""
        from megaforge.reasoning.rlvr.conversation import Conversation, converse

        talks = [Conversation(number, one, self.sizes) for number, one in enumerate(asked)]
        written = converse(talks, self.pen, 0)
        decode = self.tokenizer.decode
        return [
            (self.pen.text(one), [decode(list(memory)) for memory in talk.memories])
            for one, talk in zip(written, talks, strict=True)
        ]


def main() -> int:
    return ask_at(AnswerDesk, parse_arguments())


if __name__ == "__main__":
    run_entry(main)
