"""What the answers of episodes are worth by ``--rl-reward``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megaforge.config.config import Config
from megaforge.data.tokenizer import Tokenizer
from megaforge.parallel.agree import together
from megaforge.reasoning.agent.episode import Context, Episode
from megaforge.reasoning.agent.reader import Reader
from megaforge.reasoning.packing import Tokens
from megaforge.reasoning.rewards import Rewards
from megaforge.tasks.questions import Question


class AnswerWorth:
    """Where ``exact`` is all that is asked for, an episode's verdict says it. Else an answer that is not right is
    written: as many tokens as the right one has, the most likely each, up to the end of a document."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self._rewards, self._tokenizer = Rewards(config.rewards), tokenizer
        self.verdict_says_it = set(self._rewards.weights) == {"exact"}

    def of(self, question: Tokens, answer: Tokens, written: Tokens) -> float:
        """What the text ``written`` is worth to a question with that answer; all are tokens."""
        if self.verdict_says_it:
            return self._rewards.weights["exact"] * (written[: len(answer)] == answer)
        decode = self._tokenizer.decode
        asked = Question(decode(list(question)), decode(list(answer)).strip())
        return self._rewards(asked, decode(list(written)).strip())

    def give(self, episodes: Sequence[Episode], reader: Reader) -> None:
        """Says what this rank's episodes, which were played, are worth (:attr:`Episode.worth`). Collective.

        Raises:
            UserError: on every rank: a reward is no number.
        """
        written = [one.answer if one.verdict else () for one in episodes]
        if not self.verdict_says_it:
            self._write(episodes, written, reader)
        pairs = list(zip(episodes, written, strict=True))
        worths = together(reader.ctx, lambda: [self.of(one.question, one.answer, text) for one, text in pairs])
        for one, worth in zip(episodes, worths, strict=True):
            one.worth = worth

    @torch.no_grad()
    def _write(self, episodes: Sequence[Episode], written: list[Tokens], reader: Reader) -> None:
        """Puts into ``written`` what episodes without the right answer write."""
        writing = [n for n, one in enumerate(episodes) if not one.verdict]
        while True:
            seen = {n: _behind(episodes[n], written[n]) for n in writing}
            following = reader.following(list(dict.fromkeys(seen.values())))
            if following is None:
                return
            for n, context in seen.items():
                if following[context] == self._tokenizer.eod:
                    writing.remove(n)
                    continue
                written[n] += (following[context],)
                if len(written[n]) == len(episodes[n].answer):
                    writing.remove(n)


def _behind(episode: Episode, written: Tokens) -> Context:
    tokens = (*episode.window, *episode.question, *written)
    return Context(tokens, (0, 0), len(tokens) - 1)
