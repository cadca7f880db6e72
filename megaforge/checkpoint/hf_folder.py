"""A model's directory in Hugging Face's form: its configuration, and its safetensors files by the names in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from megaforge.checkpoint.hashed_file import sync_all
from megaforge.checkpoint.safetensors_file import SafetensorsFile, Slot
from megaforge.durable import sync_path
from megaforge.errors import DamagedCheckpointError, UserError
from megaforge.json_text import parse_json

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
# What makes a tokenizer, and how its model is asked to generate.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "generation_config.json"),
)
_Result = TypeVar("_Result")


class HFFolder:
    """The tensors of a directory, by name, and its configuration.

    Raises:
        UserError: it is not such a directory, or files of it are missing or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory)
        try:
            self.config: dict[str, Any] = dict(parse_json((self.path / CONFIG_FILE).read_bytes()))
            files = [SafetensorsFile(file) for file in self._weights()]
        except OSError as error:
            raise UserError(f"{self.path}: its {CONFIG_FILE} cannot be read ({error.strerror})") from error
        except (KeyError, AttributeError) as error:
            raise UserError(f"{self.path}: {INDEX_FILE} names no files of weights ({error!r})") from error
        except (ValueError, TypeError, DamagedCheckpointError) as error:
            raise UserError(f"{self.path}: {error}") from error
        self._files = {slot.name: file for file in files for slot in file.slots()}
        self.slots: dict[str, Slot] = {slot.name: slot for file in files for slot in file.slots()}
        if not self.slots:
            pickled = sorted(file.name for file in self.path.glob("*.bin"))
            found = f"; {pickled[0]} is pickled, which is not read: save it as safetensors" if pickled else ""
            raise UserError(f"{self.path}: there are no weights in it (*.safetensors){found}")

    def _weights(self) -> list[Path]:
        index = self.path / INDEX_FILE
        if index.is_file():
            named = sorted(set(dict(parse_json(index.read_bytes()))["weight_map"].values()))
            if missing := [name for name in named if not (self.path / name).is_file()]:
                raise UserError(f"{self.path}: {INDEX_FILE} names files that are missing: {', '.join(missing[:5])}")
            return [self.path / name for name in named]
        whole = self.path / WEIGHTS_FILE
        return [whole] if whole.is_file() else sorted(self.path.glob("*.safetensors"))

    def tensor(self, name: str) -> Tensor:
        """A view of the mapped file."""
        return self._files[name].tensor(name)

    def __contains__(self, name: str) -> bool:
        return name in self.slots


def publish_directory(directory: str | Path, write: Callable[[Path], _Result]) -> _Result:
    """Makes ``directory`` of what ``write`` writes into an empty one, whole or not at all; the disk has it then.

    Raises:
        UserError: it exists and is not empty, or cannot be written.
    """
    folder = Path(directory)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--save {folder}: it exists and is not an empty directory; name another one")
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        result = write(temporary)
        sync_all([*temporary.rglob("*"), temporary])
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
        sync_path(folder.parent)
    except OSError as error:
        raise UserError(f"--save {folder}: it was not written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return result


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copies a tokenizer's files from one directory to another; which there were."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    return names
