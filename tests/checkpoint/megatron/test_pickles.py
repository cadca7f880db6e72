"""Nothing that a pickle names is imported or run."""

from __future__ import annotations

import argparse
import io
import pathlib
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta

from megaforge.checkpoint.megatron.pickles import Inert, read_pickle, read_torch, read_torch_at
from megaforge.errors import UserError


class Code:
    """What it makes when it is unpickled is another thing than itself."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = function, arguments

    def __reduce__(self) -> Any:
        return self.made


def test_data_of_known_programs_become_inert(tmp_path: Path) -> None:
    args = argparse.Namespace(layers=3, where=pathlib.PurePosixPath("a/b"), dtype=torch.bfloat16)
    state = {"args": args, "random": np.arange(3), "weight": torch.arange(6.0).view(2, 3), "size": torch.Size([2])}
    torch.save(state, tmp_path / "state.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):  # as megatron-core does for its whole process
        allowed = set(torch.serialization.get_safe_globals())
        read = read_torch(tmp_path / "state.pt")
        assert set(torch.serialization.get_safe_globals()) == allowed
    assert isinstance(read["args"], Inert) and read["args"].name == "argparse.Namespace"
    assert read["args"].get("layers") == 3 and read["args"].get("none", 5) == 5
    assert read["args"].get("dtype") is torch.bfloat16 and read["args"].get("where").arguments == ("a", "b")
    assert isinstance(read["random"], Inert) and torch.equal(read["weight"], state["weight"])
    _pickle(tmp_path / "meta", {MetadataIndex("a", [1, 2], 0): StorageMeta(modules=["m"])})
    ((key, value),) = read_pickle(tmp_path / "meta").items()
    assert key.get("fqn") == "a" and key.get("offset") == (1, 2) and value.get("modules") == ["m"]


def test_members_of_enumerations_are_data_however_they_are_pickled(tmp_path: Path) -> None:
    """Early releases of Python 3.11 pickle them by their class and name."""
    member = Code(getattr, signal.Signals, "SIGTERM")
    torch.save({"signal": member}, tmp_path / "a.pt")
    _pickle(tmp_path / "a", {"signal": member})
    for read, file in ((read_torch, "a.pt"), (read_pickle, "a")):
        found = read(tmp_path / file)["signal"]
        assert isinstance(found, Inert) and (found.name, found.arguments) == ("signal.Signals", ("SIGTERM",))


def _pickle(file: Path, value: Any) -> None:
    file.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("function", [eval, getattr, exec, __import__, torch.load])
def test_code_is_refused_by_name(function: Any, tmp_path: Path) -> None:
    made = tmp_path / "made"
    code = Code(exec, f"open({str(made)!r}, 'w')") if function is exec else Code(function, "1", "real")
    torch.save({"model": code}, tmp_path / "a.pt")
    _pickle(tmp_path / "a", {"model": code})
    for read, file in ((read_torch, "a.pt"), (read_pickle, "a")):
        with pytest.raises(UserError, match=f"{file}: it holds pickled code, which is not run: .*{function.__name__}"):
            read(tmp_path / file)
    with pytest.raises(UserError, match="pickled code"):
        read_torch_at(tmp_path / "a.pt", io.BytesIO((tmp_path / "a.pt").read_bytes()))
    assert not made.exists()


def test_what_is_no_such_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no pickle")
    (tmp_path / "empty").write_bytes(b"")
    for read in (read_torch, read_pickle):
        with pytest.raises(UserError, match="there is no such file"):
            read(tmp_path / "missing")
        for name in ("text", "empty"):
            with pytest.raises(UserError, match=f"{name}: not a file of Megatron-LM that can be read safely"):
                read(tmp_path / name)
