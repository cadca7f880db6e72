"""Where a tokenizer lies: ``--tokenizer-model`` as a file, a directory, vocabulary and merges, or a hub's name."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from megaforge.errors import UserError, require

# What a directory may hold, in the order in which it is looked for; several files of a line belong together.
_HELD = (
    ("HuggingFaceTokenizer", ("tokenizer.json",)),
    ("HuggingFaceTokenizer", ("vocab.json", "merges.txt")),
    ("SentencePieceTokenizer", ("tokenizer.model",)),
    ("SentencePieceTokenizer", ("spiece.model",)),
)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_SUFFIXES = (".json", ".model", ".tiktoken", ".txt", ".bpe")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


@dataclass(frozen=True)
class TokenizerFiles:
    """The type of a tokenizer and its files: one, or a vocabulary and its merges."""

    type: str
    paths: tuple[Path, ...]


def pair_of(vocab_file: str | None, merge_file: str | None) -> str | None:
    """``--vocab-file V --merge-file M`` as one ``--tokenizer-model``; None where neither is given.

    Raises:
        UserError: one of them is missing.
    """
    if vocab_file is None and merge_file is None:
        return None
    if vocab_file is None or merge_file is None:
        given = f"--vocab-file {vocab_file}" if merge_file is None else f"--merge-file {merge_file}"
        raise UserError(f"{given}: --vocab-file and --merge-file go together; give both, or --tokenizer-model")
    return f"{vocab_file},{merge_file}"


def find_tokenizer(model: str, wanted: str | None = None) -> TokenizerFiles:
    """The files of ``--tokenizer-model``, of the type ``wanted`` where a directory holds several.

    Raises:
        UserError: nothing is there.
    """
    pair = model.split(",")
    if len(pair) == 2 and not os.path.exists(model):
        return TokenizerFiles("HuggingFaceTokenizer", (Path(pair[0]), Path(pair[1])))
    path = Path(model)
    if path.is_dir():
        return _in_directory(path, model, wanted)
    if path.exists() or path.suffix.lower() in _FILE_SUFFIXES or not _HUB_NAME.fullmatch(model):
        return TokenizerFiles(wanted or _type_of(path), (path,))
    return _in_directory(_in_cache(model), model, wanted)


def there_is(model: str) -> bool:
    """Whether ``--tokenizer-model`` names files that exist."""
    try:
        return all(path.exists() for path in find_tokenizer(model).paths)
    except UserError:
        return False


def _in_directory(directory: Path, model: str, wanted: str | None) -> TokenizerFiles:
    found = [(kind, tuple(directory / name for name in names)) for kind, names in _HELD]
    found += [("TikTokenizer", (path,)) for path in sorted(directory.glob("*.tiktoken"))]
    for kind, paths in found:
        if all(path.is_file() for path in paths):
            kind = _type_of(paths[0]) if kind == "SentencePieceTokenizer" else kind
            if wanted in (None, kind):
                return TokenizerFiles(kind, paths)
    names = ", ".join(" and ".join(names) for _, names in _HELD)
    of_type = "" if wanted is None else f" for a {wanted}"
    raise UserError(f"--tokenizer-model {model}: {directory} holds nothing{of_type}; looked for {names}, *.tiktoken")


def _in_cache(name: str) -> Path:
    """The snapshot directory of a hub's model in the local cache."""
    hub = require("huggingface_hub", extra="data", purpose=f"--tokenizer-model {name}")
    for _, names in _HELD:
        found = hub.try_to_load_from_cache(name, names[0])
        if isinstance(found, str):
            return Path(found).parent
    raise UserError(
        f"--tokenizer-model {name}: there is no such file or directory here, and Hugging Face's cache "
        f"({hub.constants.HF_HUB_CACHE}) holds no tokenizer of that name. Nothing is downloaded: where there is a "
        f"connection, run  hf download {name} --include 'tokenizer*' 'vocab*' 'merges*'  (HF_HOME says where it goes), "
        "or give a directory"
    )


def _type_of(path: Path) -> str:
    """By the name, and for ``.model``, which both kinds have, by the first line."""
    suffix = path.suffix.lower()
    if suffix == ".tiktoken":
        return "TikTokenizer"
    if suffix != ".model":
        return "HuggingFaceTokenizer"
    try:
        with path.open("rb") as file:
            return "TikTokenizer" if _TIKTOKEN_LINE.match(file.readline(1 << 10)) else "SentencePieceTokenizer"
    except OSError:
        return "SentencePieceTokenizer"
