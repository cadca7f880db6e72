"""PDF files: the text of their pages, one document each."""

from __future__ import annotations

import io
import logging

from megaforge.data.corpus.decode import NotText
from megaforge.data.corpus.readers.text import WholeTexts
from megaforge.data.corpus.records import TEXT
from megaforge.errors import require


class PdfFiles(WholeTexts):
    """The text layer of a PDF; a scan without one is dropped with that reason."""

    suffixes = (".pdf",)

    def kind(self, path: str) -> str:
        """See :class:`Reader`."""
        return TEXT

    def text(self, data: bytes) -> str:
        """See :class:`WholeTexts`: pages with an empty line between them."""
        pypdf = require("pypdf", extra="corpus", purpose="reading PDF")
        logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it tells every flaw that it reads over
        try:
            pages = [page.extract_text().strip() for page in pypdf.PdfReader(io.BytesIO(data)).pages]
        except Exception as error:  # a damaged file gives whatever its parser stumbles over
            raise NotText(f"a PDF that cannot be read ({type(error).__name__}: {error})") from error
        return "\n\n".join(page for page in pages if page)
