"""How tools write pictures: of a kind that the name says, whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megaforge.data.outputs import make_parents, temporary_path
from megaforge.durable import replacing
from megaforge.errors import UserError

IMAGES = (".png", ".svg", ".pdf")


def check_image(name: str | os.PathLike[str], flag: str = "--output", others: tuple[str, ...] = ()) -> str:
    """The suffix of ``name``: one of :data:`IMAGES` or ``others``.

    Raises:
        UserError: it is another one, or ``name`` is a directory.
    """
    suffix, kinds = Path(name).suffix.lower(), (*IMAGES, *others)
    if suffix not in kinds:
        raise UserError(f"{flag} {name}: its ending must say what to write: {', '.join(kinds)}")
    if os.path.isdir(name):
        raise UserError(f"{flag} {name}: is a directory; name a file in it")
    return suffix


def save_image(figure: Any, name: str | os.PathLike[str], flag: str = "--output") -> None:
    """Writes a matplotlib figure. Parents are made; a picture of that name is replaced once the new one is whole.

    Raises:
        UserError: it cannot be written.
    """
    make_parents(name, flag)
    try:
        with replacing(name, temporary_path(str(name))) as temporary:
            figure.savefig(temporary, format=Path(name).suffix.lower()[1:])
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {name}: cannot be written ({error})") from error
