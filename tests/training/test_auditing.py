"""What a run puts on record, and what is found of a run whose record or checkpoints were changed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from megaforge.checkpoint.anchors import check_checkpoints
from megaforge.checkpoint.manifest import sums_digest
from megaforge.errors import UserError
from megaforge.monitor.audit import AUDIT_FILE, read_trail
from tests.training.tiny import arguments, make_trainer, write_dataset
from tools.audit import main


def command(monkeypatch: pytest.MonkeyPatch, *line: str) -> int:
    monkeypatch.setattr(sys, "argv", ["audit.py", *line])
    return main()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that paused once and is complete, and its flags."""
    folder = tmp_path_factory.mktemp("audited")
    prefix, save = write_dataset(folder / "data"), folder / "run"
    own = ("--save", str(save), "--load", str(save), "--train-iters", "6", "--save-interval", "2")
    flags = arguments(prefix, *own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGAFORGE_AUDIT_KEY", "07" * 32)
        make_trainer([*flags, "--audit-trail", "--exit-interval", "4"]).train()
        make_trainer([*flags, "--audit-trail"]).train()
    return save, flags


def test_a_run_is_on_record(
    run: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, _ = run
    path = save / AUDIT_FILE
    records = read_trail(path).records
    kinds = [record["kind"] for record in records]
    attempt = ["configuration", "environment", "data", "start", "load", "train"]
    assert kinds[:7] == ["begin", *attempt] and kinds[-3:] == ["end", "goodput", "signature"]
    assert kinds.count("configuration") == 2
    saved = {record["path"]: record["sums"] for record in records if record["kind"] == "save"}
    assert saved["step_0000006"] == sums_digest(save / "step_0000006") and len(saved) == 3
    config = next(record for record in records if record["kind"] == "configuration")
    assert config["config"]["training"]["train_iters"] == 6 and "07" * 8 not in path.read_text()
    monkeypatch.setenv("MEGAFORGE_AUDIT_KEY", "07" * 32)
    assert command(monkeypatch, "public-key") == 0
    public = capsys.readouterr().out.strip()
    assert command(monkeypatch, "verify", str(save), "--public-key", public) == 0
    assert f"{len(kinds)} records" in capsys.readouterr().out
    assert command(monkeypatch, "show", str(save), "--kind", "end") == 0
    assert "--exit-interval 4" in capsys.readouterr().out


def test_what_was_changed_afterwards_is_found(
    run: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, flags = run
    path, more = save / AUDIT_FILE, [*flags, "--audit-trail", "--train-iters", "8"]
    content = path.read_bytes()
    kinds = [record["kind"] for record in read_trail(path).records]
    path.write_bytes(b"".join(content.splitlines(keepends=True)[: kinds.index("save")]))
    assert command(monkeypatch, "verify", str(save)) == 1
    assert "its end was cut off" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"step_0000006: the trail had .* set-aside"):
        make_trainer(more)
    path.write_bytes(content.replace(b'"reason":"--exit-interval 4"', b'"reason":"--exit-interval 5"'))
    assert command(monkeypatch, "verify", str(save)) == 1
    assert "(stop): its content is not what was hashed" in capsys.readouterr().out
    with pytest.raises(UserError, match="altered"):
        make_trainer(more)

    path.write_bytes(content)
    shutil.move(save / "step_0000004", tmp_path / "moved")
    shutil.copytree(save / "step_0000002", save / "step_0000004")
    assert check_checkpoints(save, read_trail(path)) == [
        "step_0000004: it is not the checkpoint that the trail says was saved"
    ]
    shutil.rmtree(save / "step_0000004")
    shutil.move(tmp_path / "moved", save / "step_0000004")

    name = read_trail(path).name
    path.unlink()
    with pytest.raises(UserError, match="it was saved under the audit trail"):
        make_trainer(more)
    with pytest.raises(UserError, match="--reason TEXT says why"):
        command(monkeypatch, "set-aside", str(save))
    assert command(monkeypatch, "set-aside", str(save), "--reason", "it was lost") == 0
    make_trainer(more).train()
    assert command(monkeypatch, "verify", str(save)) == 0
    assert f"an earlier trail, {name}, was set aside" in capsys.readouterr().out
    make_trainer([*flags, "--train-iters", "8"])
    assert "this run puts nothing on record: add --audit-trail" in capsys.readouterr().err
