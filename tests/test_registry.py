"""Registries and the files that add to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaforge.config.cli import config_from_dict, config_to_dict, parse_config
from megaforge.errors import UserError
from megaforge.registry import CALLBACKS, Registry, load_extensions


def test_built_in_parts_are_imported_when_asked_for() -> None:
    registry = Registry("kind of number", {"complex": "numbers:Complex", "missing": "no_such_module:X"})
    assert registry.names() == ("complex", "missing")  # known although it cannot be imported
    assert registry.get("complex").__name__ == registry.get("complex").__name__ == "Complex"


def test_unknown_and_taken_names_are_told() -> None:
    registry = Registry("kind of number", {"complex": "numbers:Complex"})
    with pytest.raises(
        UserError, match=r"'compleks' is not a known kind of number \(there are complex\); did you mean"
    ):
        registry.get("compleks")
    registry.register("one", 1)
    registry.register("one", 1)  # the same file, loaded again
    assert registry.get("one") == 1 and "one" in registry
    with pytest.raises(UserError, match="'complex' is registered already"):
        registry.register("complex", 2)


def test_a_file_imported_under_two_names_registers_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from megaforge.registry import CALLBACKS\ndef twice(): pass\nCALLBACKS.register('twice', twice)"
    (tmp_path / "twice_named.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(CALLBACKS, "_parts", dict(CALLBACKS._parts))
    load_extensions((str(tmp_path / "twice_named.py"),))
    first = CALLBACKS.get("twice")
    load_extensions(("twice_named",))
    assert CALLBACKS.get("twice") is not first
    with pytest.raises(UserError, match="'twice' is registered already"):
        CALLBACKS.register("twice", print)


def test_an_extension_is_imported_once_and_kept_by_its_full_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("print('imported')")
    monkeypatch.chdir(tmp_path)
    config = parse_config(["--extensions", "mine.py"]).config
    assert config.training.extensions == (str(tmp_path / "mine.py"),)
    assert load_extensions(config.training.extensions) == config.training.extensions
    assert capsys.readouterr().out == "imported\n"


def test_a_checkpoint_is_read_where_its_extensions_are_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = str(tmp_path / "gone.py")
    saved = config_to_dict(parse_config([]).config)
    saved["training"]["extensions"] = [gone]
    config = config_from_dict(saved, source="runs/x/step_1")
    assert config.training.extensions == (gone,)
    assert f"runs/x/step_1: --extensions {gone}: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "there is no such file"),
        ("1 / 0", "it failed: ZeroDivisionError"),
        ("import nowhere", "it failed: Module"),
    ],
)
def test_an_extension_that_fails_is_named(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text)
    for _ in range(2):
        with pytest.raises(UserError, match=f"--extensions {path}: {complaint}"):
            load_extensions((str(path),))
    with pytest.raises(UserError, match="--extensions no_such_module: importing it failed"):
        load_extensions(("no_such_module",))
