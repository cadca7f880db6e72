"""Pickled files of Megatron-LM and of torch.distributed.checkpoint, read without running anything from them.

A pickle names functions to call and classes to make. Here no name is ever imported: of a few programs known to put
plain data into such files, every class becomes an :class:`Inert` that keeps what it was given; all others are refused.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from megaforge.errors import UserError

# Programs and classes whose data stand in Megatron's checkpoints: its arguments, random states, file positions.
_MODULES = ("megatron.", "transformer_engine.", "numpy.", "torch.distributed.checkpoint.")
_CLASSES = frozenset(
    (
        *("argparse.Namespace", "types.SimpleNamespace", "signal.Signals", "_io.BytesIO", "io.BytesIO"),
        *("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.Path", "datetime.timedelta"),
        *("torch.serialization._get_layout", "_codecs.encode"),
    )
)
_PLAIN: dict[str, Any] = {
    "torch.Size": tuple,
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    **{str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
}
# How Python 3.11.0 to 3.11.3 pickles a member of an enumeration: the class and the name of the member.
_MEMBER = "builtins.getattr"
_SHOWN = 5


class Inert:
    """What a pickle says of an object whose class is not used.

    Attributes:
        name: of the class, ``module.class``.
        arguments: that it was made from.
        state: that was put into it afterwards.
    """

    name = ""
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any, **named: Any) -> Inert:
        made = object.__new__(cls)
        made.arguments, made.state = arguments, {}
        return made

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Everything is in ``__new__``, which a pickle may call alone."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, key: str, default: Any = None) -> Any:
        """An attribute that it would have."""
        return self.state.get(key, default) if isinstance(self.state, dict) else default


def _inert(name: str) -> type[Inert]:
    return type("Inert", (Inert,), {"name": name})


def _member(owner: Any, name: Any) -> Inert:
    """A member of an enumeration that is data: inert, made from its name. No attribute is looked up."""
    if not (isinstance(owner, type) and issubclass(owner, Inert) and isinstance(name, str)):
        raise _Refused(_MEMBER)
    return owner(name)


def _is_data(name: str) -> bool:
    return name in _CLASSES or name.startswith(_MODULES)


def _refusal(file: Path, names: list[str]) -> UserError:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return UserError(
        f"{file}: it holds pickled code, which is not run: {', '.join(names[:_SHOWN])}{more}; a checkpoint of "
        "Megatron-LM has none of these"
    )


def _unreadable(file: Path, error: Exception) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{file}: not a file of Megatron-LM that can be read safely ({reason})")


class _Refused(Exception):
    """The pickle names something that is not plain data."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == _MEMBER:
            return _member
        if full in _PLAIN:
            return _PLAIN[full]
        if not _is_data(full):
            raise _Refused(full)
        return _inert(full)


def read_pickle(file: Path) -> Any:
    """The content of a pickle, its objects as :class:`Inert`.

    Raises:
        UserError: it is missing, damaged, or names code; the text says which.
    """
    try:
        with open(file, "rb") as stream:
            return _Unpickler(cast(BinaryIO, stream)).load()
    except _Refused as refused:
        raise _refusal(file, [str(refused)]) from None
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file") from None
    except Exception as error:  # a damaged pickle makes Python raise almost anything
        raise _unreadable(file, error) from error


def read_torch(file: Path) -> Any:
    """The content of a file of ``torch.save``: tensors as views of the mapped file, other objects as :class:`Inert`.

    Raises:
        UserError: it is missing, damaged, of torch before 1.6, or names code; the text says which.
    """
    return _load(file, lambda: str(file), mmap=True)


def read_torch_at(file: Path, stream: BinaryIO) -> Any:
    """:func:`read_torch` of one entry of ``file``, whose bytes are all that ``stream`` has."""

    def start() -> BinaryIO:
        stream.seek(0)
        return stream

    return _load(file, start, mmap=False)


@contextmanager
def _allowed(names: Iterable[str]) -> Iterator[None]:
    """Inside, ``torch.load`` makes an :class:`Inert` of each of ``names``, and nothing of what others have allowed."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    known: list[Any] = [(_member if name == _MEMBER else _inert(name), name) for name in names]
    torch.serialization.add_safe_globals(known)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _load(file: Path, given: Callable[[], str | BinaryIO], *, mmap: bool) -> Any:
    try:
        with _allowed(()):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(given())
        if refused := sorted(name for name in names if name != _MEMBER and not _is_data(name)):
            raise _refusal(file, refused)
        with _allowed(names):
            return torch.load(given(), map_location="cpu", weights_only=True, mmap=mmap)
    except UserError:
        raise
    except _Refused as refused_member:
        raise _refusal(file, [str(refused_member)]) from None
    except FileNotFoundError:
        raise UserError(f"{file}: there is no such file") from None
    except Exception as error:  # a damaged or foreign file makes torch raise almost anything
        raise _unreadable(file, error) from error
