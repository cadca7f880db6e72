"""``--data-path chat://FILE.jsonl``: conversations and prompts with answers, of which the answers are learnt.

A line is ``{"messages": [{"role": ..., "content": ...}, ...]}``, which a chat template renders, or
``{"prompt": ..., "response": ...}``. Several conversations share a sequence; each is a document, which sees no other.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megaforge.config.config import Config
from megaforge.data.chat_template import ChatTemplate, load_chat_template
from megaforge.data.data_source import DataSource, SampleView
from megaforge.data.sample_order import key_of, shuffled
from megaforge.data.tokenizer import Tokenizer
from megaforge.errors import UserError
from megaforge.json_text import parse_json

SCHEME = "chat://"
_ANSWERS = "assistant"  # the role whose messages are learnt
_FORM = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


class Conversation(NamedTuple):
    """Its token ids, and which of them are to be learnt."""

    ids: list[int]
    learnt: list[bool]


class ReadsAnswers(Protocol):
    """What makes conversations of a file.

    Attributes:
        noun: what people call several of them.
    """

    noun: str

    def read(self, file: str) -> Iterator[Conversation]:
        """
        Raises:
            UserError: the file cannot be read, or a line is something else; with the line's number.
        """


class Reader:
    """Reads conversations as the flags say."""

    noun = "conversations"

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.prompts_too = tokenizer, config.chat.train_on_prompts
        self._named = config.chat.chat_template
        self._template: ChatTemplate | None = load_chat_template(self._named, tokenizer) if self._named else None

    def read(self, file: str) -> Iterator[Conversation]:
        """
        Raises:
            UserError: the file cannot be read, or a line is something else; with the line's number.
        """
        path = file.removeprefix(SCHEME)
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise UserError(f"--data-path {file}: {path} cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise UserError(f"--data-path {file}: byte {error.start} is not UTF-8") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield self.encode(line, f"{path}: line {number}")

    def encode(self, line: str, place: str) -> Conversation:
        """One line; errors call it ``place``."""
        found = self._encode(line, place)
        return found._replace(learnt=[True] * len(found.ids)) if self.prompts_too else found

    def _encode(self, line: str, place: str) -> Conversation:
        try:
            record = parse_json(line)
        except ValueError as error:
            raise UserError(f"{place} is not JSON ({error})") from error
        record = record if isinstance(record, dict) else {}
        if "messages" in record:
            return self._messages(_checked(record["messages"], place), place)
        prompt, response = record.get("prompt"), record.get("response")
        if not isinstance(prompt, str) or not isinstance(response, str) or not response:
            raise UserError(f'{place}: give {{"prompt": "...", "response": "..."}} or {_FORM}')
        if self._template is not None:
            turns = [{"role": "user", "content": prompt}, {"role": _ANSWERS, "content": response}]
            return self._messages(turns, place)
        asked, said = self.tokenizer.encode(prompt), self._ended(self.tokenizer.encode(response))
        return Conversation([*asked, *said], [False] * len(asked) + [True] * len(said))

    def _messages(self, messages: list[dict[str, Any]], place: str) -> Conversation:
        """An answer is what the template makes of its message beyond the prompt that asks for it."""
        if self._template is None:
            self._template = load_chat_template(self._named, self.tokenizer)
        ids = self._template.encode(messages, self.tokenizer, asks=False)
        learnt = [False] * len(ids)
        for number, message in enumerate(messages):
            if message["role"] == _ANSWERS:
                asked = self._template.encode(messages[:number], self.tokenizer) if number else []
                told = self._template.encode(messages[: number + 1], self.tokenizer, asks=False)
                if ids[: len(told)] != told or told[: len(asked)] != asked:
                    raise UserError(
                        f"{place}: --chat-template {self._template.name} renders an answer otherwise once more follows,"
                        " so nobody can say which tokens are its own; give another template, or one answer a line"
                    )
                learnt[len(asked) : len(told)] = [True] * (len(told) - len(asked))
        ended = self._ended(ids)
        return Conversation(ended, learnt + [messages[-1]["role"] == _ANSWERS] * (len(ended) - len(ids)))

    def _ended(self, ids: list[int]) -> list[int]:
        eod = self.tokenizer.eod
        return ids if eod is None or ids[-1:] == [eod] else [*ids, eod]


def _checked(messages: Any, place: str) -> list[dict[str, Any]]:
    rows = messages if isinstance(messages, list) else []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or not isinstance(row.get("role"), str) or "content" not in row:
            raise UserError(f"{place}: message {number} has no role or no content; write {_FORM}")
    if not any(row["role"] == _ANSWERS for row in rows):
        raise UserError(f"{place}: no message has the role {_ANSWERS}, so there is nothing to learn; write {_FORM}")
    return rows


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Items of ``lengths``, each at most ``room``, in as few bins as best fit finds, the longest first.

    Returns:
        The items of each bin.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, bin), ascending
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        at = bisect_left(free, (lengths[item], -1))
        left, number = free.pop(at) if at < len(free) else (room, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(item)
        insort(free, (left - lengths[item], number))
    return bins


class Packed(SampleView):
    """Conversations packed into sequences; the same of a file at every layout."""

    def __init__(self, conversations: Sequence[Conversation], length: int) -> None:
        """``length``: of a sequence, in labels."""
        self._length = length
        cut = [Conversation(ids[: length + 1], learnt[: length + 1]) for ids, learnt in conversations]
        self.cut = sum(len(one.ids) > length + 1 for one in conversations)
        self.kept = [one for one in cut if any(one.learnt[1:])]
        self.lost = len(cut) - len(self.kept)
        self.bins = pack([len(one.ids) for one in self.kept], length + 1)
        said = json.dumps([[one.ids, one.learnt] for one in self.kept]).encode()
        self.digest = hashlib.sha256(said).hexdigest()

    def __len__(self) -> int:
        return len(self.bins)

    def sequence_length(self, k: int) -> int:
        return self._length

    def fill(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> int:
        tokens[:] = 0
        end = 0
        for item in self.bins[k] if k < len(self.bins) else ():
            ids = self.kept[item].ids
            tokens[end : end + len(ids)] = ids
            marks[end] = True
            end += len(ids)
        if end < len(marks):
            marks[end] = True  # what fills the sequence up is a document of its own
        return max(end - 1, 0)

    def weigh(self, k: int, counts: npt.NDArray[np.float32]) -> None:
        learnt = np.zeros(len(counts) + 1, np.bool_)
        end = 0
        for item in self.bins[k] if k < len(self.bins) else ():
            own = self.kept[item].learnt
            learnt[end + 1 : end + len(own)] = own[1:]  # the first token follows another conversation
            end += len(own)
        counts[~learnt[1:]] = 0.0

    def describe(self, file: str, noun: str = "conversations") -> str:
        """What became of the file, for people; ``noun`` is what it holds."""
        places = sum(len(one.ids) for one in self.kept)
        share = places / max(1, len(self.bins) * (self._length + 1))
        text = f"{file}: {len(self.kept)} {noun} in {len(self.bins)} sequences, {share:.0%} full"
        text += f"; {self.cut} are longer than --seq-length {self._length} and lose their end" if self.cut else ""
        return text + (f"; {self.lost} of which no answer would be left are left out" if self.lost else "")


class ChatData(DataSource):
    """The sequences of a file again and again, each pass in another order."""

    def __init__(self, config: Config, reader: ReadsAnswers) -> None:
        """
        Raises:
            UserError: a file cannot be read or holds nothing to learn.
        """
        [self._file], self._seed = config.data.data_path, config.training.seed
        self._length, self._reader = config.data.seq_length, reader
        self._valid = config.data.valid_data_path
        self._packed = self._open(self._file)
        self.notices = [self._packed.describe(self._file, reader.noun)]
        self._order: dict[int, npt.NDArray[np.intp]] = {}

    def _open(self, file: str) -> Packed:
        packed = Packed(list(self._reader.read(file)), self._length)
        if not len(packed):
            raise UserError(
                f"--data-path {file}: there is no answer in it that --seq-length {self._length} has room for"
            )
        return packed

    def _number(self, k: int) -> int:
        epoch, place = divmod(k, len(self._packed))
        if epoch not in self._order:
            key = key_of("chat", self._seed, self._packed.digest, epoch)
            self._order = {epoch: shuffled(key, np.arange(len(self._packed)))}
        return int(self._order[epoch][place])

    def sequence_length(self, k: int) -> int:
        return self._length

    def fill(self, k: int, tokens: npt.NDArray[np.int64], marks: npt.NDArray[np.bool_]) -> int:
        return self._packed.fill(self._number(k), tokens, marks)

    def weigh(self, k: int, counts: npt.NDArray[np.float32]) -> None:
        self._packed.weigh(self._number(k), counts)

    @property
    def epoch_tokens(self) -> Sequence[int]:
        return (len(self._packed) * self._length,)

    def tokens_before(self, samples: int) -> int:
        return samples * self._length

    def state(self, consumed_samples: int) -> dict[str, Any]:
        return {"digest": self._packed.digest, "seed": self._seed, "seq_length": self._length}

    def validation(self, split: str = "valid") -> SampleView:
        if split != "valid" or len(self._valid) != 1:
            scheme = self._file.partition("://")[0]
            raise UserError(
                f"--eval-iters: name {self._reader.noun} to evaluate on: --valid-data-path {scheme}://FILE.jsonl"
            )
        return self._open(self._valid[0])


def open_chat(config: Config, tokenizer: Tokenizer | None) -> ChatData:
    """
    Raises:
        UserError: there is no tokenizer, or as :class:`ChatData`.
    """
    if tokenizer is None:
        raise UserError(f"--data-path {config.data.data_path[0]}: add --tokenizer-model")
    return ChatData(config, Reader(config, tokenizer))
