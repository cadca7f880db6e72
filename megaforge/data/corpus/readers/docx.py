"""Word files (.docx): the text of their paragraphs and tables, one document each."""

from __future__ import annotations

import io

from megaforge.data.corpus.decode import NotText
from megaforge.data.corpus.readers.text import WholeTexts
from megaforge.data.corpus.records import TEXT
from megaforge.errors import require


class WordFiles(WholeTexts):
    """Paragraphs, and rows of tables with tabs between their cells, in the order of the file."""

    suffixes = (".docx",)

    def kind(self, path: str) -> str:
        """See :class:`Reader`."""
        return TEXT

    def text(self, data: bytes) -> str:
        """See :class:`WholeTexts`."""
        docx = require("docx", extra="corpus", purpose="reading .docx")
        try:
            parts = []
            for block in docx.Document(io.BytesIO(data)).iter_inner_content():
                if hasattr(block, "rows"):
                    parts += ["\t".join(cell.text for cell in row.cells) for row in block.rows]
                else:
                    parts.append(block.text)
        except Exception as error:  # a damaged file gives whatever its parser stumbles over
            raise NotText(f"a Word file that cannot be read ({type(error).__name__}: {error})") from error
        return "\n".join(parts)
