"""Web pages to the text of their main content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megaforge.config.fields import flag
from megaforge.data.corpus.columns import one_array, with_rows
from megaforge.data.corpus.records import HTML, TEXT, replaced
from megaforge.data.corpus.stage import Outcome, RowStage, Scope, StageSettings
from megaforge.errors import require


@dataclass(frozen=True)
class HtmlSettings(StageSettings):
    """``html``: the text of web pages (records of kind html), by resiliparse."""

    main_content: bool = flag(True, "leave out menus, banners and footers; a page without main content keeps all")
    links: bool = flag(False, "keep the addresses of links")
    alt_texts: bool = flag(False, "keep the descriptions of pictures")
    least_share: float = flag(
        0.05, "a main content below this share of the page's text is not believed", least=0, most=1
    )

    def open(self, scope: Scope) -> Html:
        """See :class:`StageSettings`."""
        extract = require("resiliparse.extract.html2text", extra="corpus", purpose="stage html").extract_plain_text
        return Html(self, extract)


class Html(RowStage):
    """Puts text in place of markup; drops pages without any."""

    def __init__(self, settings: HtmlSettings, extract: Any) -> None:
        self._settings, self._extract = settings, extract

    def apply(self, records: Any) -> Outcome:
        """See :class:`RowStage`."""
        pages = pc.equal(records["kind"], HTML).to_numpy().astype(bool)
        if not pages.any():
            return Outcome(records)
        found = [self._text(markup) for markup in one_array(records["text"]).filter(pa.array(pages)).to_pylist()]
        text = with_rows(records["text"], pages, [one for one, _ in found])
        kind = np.where(pages, TEXT, records["kind"].to_numpy())
        rewrites: list[str | None] = [None] * len(pages)
        reasons: list[str | None] = [None] * len(pages)
        for row, (one, how) in zip(np.flatnonzero(pages).tolist(), found, strict=True):
            rewrites[row] = how
            reasons[row] = None if one.strip() else "a page without text"
        counts = {how: sum(1 for _, one in found if one == how) for how in {how for _, how in found}}
        return Outcome(
            replaced(records, text=text, kind=kind.tolist()), reasons, rewrites, dict(sorted(counts.items()))
        )

    def _text(self, markup: str) -> tuple[str, str]:
        """The text, and how it was taken."""
        keep = {"links": self._settings.links, "alt_texts": self._settings.alt_texts}
        whole = self._extract(markup, preserve_formatting=True, **keep)
        if not self._settings.main_content:
            return whole, "text of the page"
        main = self._extract(markup, preserve_formatting=True, main_content=True, **keep)
        if len(main) <= self._settings.least_share * len(whole):
            return whole, "text of the page (its main content was not found)"
        return main, "main content of the page"
