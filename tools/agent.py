#!/usr/bin/env python3
"""A trained agent (--objective agent) reads long texts chunk by chunk and answers questions about them.

    python tools/agent.py --load runs/agent --task kv_chunks --chunks 16 64 --examples 100
    python tools/agent.py --load runs/agent --task kv_chunks --examples 20 --branches 4 --json
    python tools/agent.py --load runs/agent --input book.txt --question "ask k3" --branches 4 --memory book.memory
    torchrun --nproc-per-node 2 tools/agent.py --load runs/agent --task kv_chunks

With --branches N each text is read in N ways, their actions drawn from the policy; the first of those with the highest
reward is accepted where its advantage (its reward less the mean of all) is at least --agent-accept-threshold. One
branch takes the most probable actions. Answers are written by the most likely tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megaforge.config.arguments import ArgumentParser, integer, number, part_of
from megaforge.config.entry import run_entry
from megaforge.config.launcher import print_rank_0
from megaforge.errors import UserError
from megaforge.inference.desk import Desk, ask_at
from megaforge.inference.open_model import add_model_flags
from megaforge.inference.text_flags import add_text_flags, check_text_flags, read_input
from megaforge.registry import MEMORY_SEARCHES

if TYPE_CHECKING:
    from megaforge.inference.restore import TrainedModel
    from megaforge.reasoning.agent.asking import Asker, Reading
    from megaforge.reasoning.memory.episodic import EpisodicIndex


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command line."""
    parser = ArgumentParser(description=__doc__)
    add_model_flags(parser)
    add_text_flags(parser)
    parser.add_argument("--chunk-tokens", type=integer(1), help="tokens of a chunk (default: as in training)")
    parser.add_argument("--branches", type=integer(1), default=1, help="ways in which each text is read")
    parser.add_argument(
        "--agent-accept-threshold",
        type=number(),
        help="least advantage of a branch that is accepted (default: as in training)",
    )
    parser.add_argument(
        "--agent-memory",
        choices=("episode", "run"),
        help="run: also look up what the run's accepted episodes wrote; episode: do not (default: as in training)",
    )
    parser.add_argument(
        "--agent-memory-archive",
        metavar="FILE",
        help="also look up what that memory has given up, as training wrote it",
    )
    parser.add_argument(
        "--seed", type=integer(0, 2**63 - 1), default=0, help="of the texts of --task, and of the draws"
    )
    parser.add_argument("--max-new-tokens", type=integer(1), default=32, help="of an answer, at most")
    parser.add_argument(
        "--memory-index", type=part_of(MEMORY_SEARCHES), help="what searches the index (default: as in training)"
    )
    parser.add_argument(
        "--memory",
        metavar="FILE",
        help="with --input: begin with the memory in this file, and leave it there at the end",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object a text, and one for each length")
    flags = parser.parse_args(arguments)
    check_text_flags(flags, of_input=("memory",))
    return flags


class AgentDesk(Desk):
    """Reads as the agent does, and answers."""

    def __init__(self, flags: argparse.Namespace, trained: TrainedModel) -> None:
        from megaforge.reasoning.agent.answers import AnswerWorth
        from megaforge.reasoning.agent.asking import Asker, Asking

        super().__init__(flags, trained)
        self.chunk_tokens = flags.chunk_tokens or trained.config.tasks.task_chunk_tokens
        self.threshold = flags.agent_accept_threshold
        if self.threshold is None:
            self.threshold = trained.config.run_memory.agent_accept_threshold
        self.asker: Asker = Asker(
            trained.model,
            trained.config,
            Asking(
                *(flags.branches, flags.seed, self.threshold, flags.max_new_tokens),
                *(self.tokenizer.eod, flags.memory_index),
                worth=AnswerWorth(trained.config, self.tokenizer).of,
                beneath=self._beneath(),
            ),
        )

    def _beneath(self) -> EpisodicIndex | None:
        """What is looked up besides what the readings write: the run's memory, and beneath it its archive."""
        from megaforge.reasoning.agent.run_memory import index_of_run
        from megaforge.reasoning.memory.archive import read_archive

        flags, trained, found = self.flags, self.trained, None
        config = trained.config
        if flags.agent_memory_archive is not None:
            search = flags.memory_index or config.rl.memory_index
            found = read_archive(Path(flags.agent_memory_archive), config.model.memory_dim, search)
            print_rank_0(f"--agent-memory-archive {flags.agent_memory_archive}: {len(found)} chunks are looked up too")
        if (flags.agent_memory or config.run_memory.agent_memory) == "episode":
            return found
        index = index_of_run(config, trained.meta, trained.path, trained.ctx, found)
        if index is None:
            raise UserError(
                f"--agent-memory run: {trained.path} keeps no memory of its run; train with --agent-memory run, or "
                "use --agent-memory episode"
            )
        print_rank_0(
            f"{trained.path}: the {len(index)} chunks of the run's memory are looked up too (--agent-memory episode: "
            "not)"
        )
        return index

    def ask_task(self) -> None:
        """Many texts of a task, each by itself."""
        from megaforge.reasoning.agent.asking import Text
        from megaforge.reasoning.agent.texts import example_tokens

        flags = self.flags
        for chunks in flags.chunks or [self.trained.config.rl.agent_chunks]:
            texts = [
                Text(number, *example_tokens(flags.task, self.tokenizer, flags.seed, number, chunks, self.chunk_tokens))
                for number in range(flags.examples or 100)
            ]
            readings = self.asker.ask_each(texts)
            if flags.json:
                for number, reading in enumerate(readings):
                    self.show(json.dumps({"chunks": chunks, "example": number, **self._record(reading)}))
            self._summary(chunks, readings)

    def _summary(self, chunks: int, readings: list[Reading]) -> None:
        from megaforge.reasoning.agent.asking import mean_numbers

        numbers = {"task": self.flags.task, "chunks": chunks, "examples": len(readings), **mean_numbers(readings)}
        if self.flags.json:
            self.show(json.dumps(numbers))
        else:
            self.show(
                f"{self.flags.task}, {chunks} chunks: {numbers['accuracy']:.1%} of {len(readings)} texts answered "
                f"right, {numbers['actions']:.1f} actions that cost, {numbers['accepted']:.1%} of branches with an "
                f"advantage of at least {self.threshold:g}, {numbers['memory_bytes']:.0f} bytes of "
                "memory"
            )

    def ask_input(self) -> None:
        """One text, one question after the other; what accepted branches wrote to memory stays."""
        from megaforge.reasoning.agent.asking import Text
        from megaforge.reasoning.memory.file import load_memory, save_memory

        flags, size = self.flags, self.chunk_tokens
        _text, tokens = read_input(flags.input, self.tokenizer)
        memory, model = self.asker.root.memory, self.asker.digest()
        if flags.memory is not None and load_memory(Path(flags.memory), memory, model):
            print_rank_0(
                f"--memory {flags.memory}: begins with {memory.entries} chunks and {memory.summaries} summaries"
            )
        chunks = tuple(tokens[start : start + size] for start in range(0, len(tokens), size))
        for place, question in enumerate(flags.question):
            reading = self.asker.ask(Text(place, chunks, tuple(self.tokenizer.encode(question))))
            record = {"question": question, **self._record(reading)}
            self.show(json.dumps(record) if flags.json else self._shown(record))
        if flags.memory is not None and self.trained.ctx.is_first_rank:
            save_memory(Path(flags.memory), memory, model)

    def _record(self, reading: Reading) -> dict[str, object]:
        branches = [
            {
                "actions": list(way.actions),
                "answer": self.tokenizer.decode(list(way.written)),
                "right": way.right,
                "reward": round(way.reward, 6),
                "advantage": round(way.advantage, 6),
                "entries": way.entries,
                "summaries": way.summaries,
            }
            for way in reading.ways
        ]
        return {
            "answer": self.tokenizer.decode(list(reading.best.written)),
            "accepted": reading.accepted,
            "branches": branches,
        }

    def _shown(self, record: dict[str, object]) -> str:
        lines = [f"{record['question']}: {record['answer']}"]
        branches = record["branches"]
        assert isinstance(branches, list)
        for n, way in enumerate(branches):
            mark = ", accepted" if n == record["accepted"] else ""
            said = f"  branch {n} (advantage {way['advantage']:+.3f}{mark}): {way['answer']}"
            lines += [said, f"    {' '.join(way['actions'])}"]
        return "\n".join(lines)


def main() -> int:
    return ask_at(AgentDesk, parse_arguments())


if __name__ == "__main__":
    run_entry(main)
