"""Retrieval from a memory that an agent has left in a file: behind ``<search>the king</search>`` stand the chunks that
are nearest to what the model makes of ``the king``, as ``<result>...</result>``."""

from __future__ import annotations

from pathlib import Path

from megaforge.errors import UserError
from megaforge.inference.tool_calls import ToolSetting
from megaforge.reasoning.agent.episode import Context
from megaforge.reasoning.agent.reader import Reader
from megaforge.reasoning.memory.agent_memory import AgentMemory, MemoryShape
from megaforge.reasoning.memory.file import load_memory


class Retrieval:
    """See the module. The memory stays as it is."""

    opens, closes = "<search>", "</search>"

    def __init__(self, reader: Reader, memory: AgentMemory, setting: ToolSetting) -> None:
        self._reader, self._memory = reader, memory
        self._tokenizer = setting.tokenizer
        self._room, self._count = setting.config.data.seq_length, setting.config.rl.memory_top_k

    @classmethod
    def of(cls, setting: ToolSetting) -> Retrieval:
        """
        Raises:
            UserError: the model has no summariser, or the memory's file is not there or another model's.
        """
        config, file = setting.config, setting.memory
        assert file is not None, "check_tool_flags asks for it"
        if not config.model.agent_heads:
            raise UserError(
                "--tools retrieval: this model has nothing that makes keys; use one that was trained with "
                "--agent-heads --objective agent"
            )
        reader = Reader(setting.model, config.model, config.data.seq_length, rows=1)
        reader.share_heads()
        memory = AgentMemory(MemoryShape.of(config), reader.heads.policy.weight.dtype)
        if not load_memory(Path(file), memory, reader.digest()):
            raise UserError(f"--memory {file}: there is no such file; python tools/agent.py --memory FILE writes one")
        return cls(reader, memory, setting)

    def __call__(self, request: str) -> str:
        """Up to ``--memory-top-k`` chunks, the nearest first."""
        tokens = tuple(self._tokenizer.encode(request))
        if not 0 < len(tokens) <= self._room:
            return f"<result>error: a request of {len(tokens)} tokens, not 1 to {self._room}</result>"
        context = Context(tokens, (0, 0), len(tokens) - 1)
        seen = self._reader.read([context])
        assert seen is not None, "there is a context to read"
        found = self._memory.fork().retrieve(seen[context].key, self._count)
        return f"<result>{' '.join(self._tokenizer.decode(list(chunk)).strip() for chunk in found)}</result>"
