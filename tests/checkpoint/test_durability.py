"""What a checkpoint directory survives: damage, crashes at any moment, full disks, read-only media, hostile files."""

from __future__ import annotations

import builtins
import errno
import hashlib
import json
import logging
import os
import pickletools
import shutil
import signal
import subprocess

import pytest
import torch

from megaforge.checkpoint import checkpoint as checkpoint_module
from megaforge.checkpoint.checkpoint import load_checkpoint, read_meta, save_checkpoint
from megaforge.checkpoint.directory import Retention, commit
from megaforge.checkpoint.find import find_checkpoint, holds_no_checkpoint
from megaforge.checkpoint.hashed_file import FileRecord
from megaforge.checkpoint.manifest import MANIFEST_FILE, SUMS_FILE, read_manifest, write_manifest
from megaforge.checkpoint.shards import TensorEntry
from megaforge.config.checkpoint_config import CheckpointConfig
from megaforge.errors import CheckpointError, DamagedCheckpointError, UserError
from megaforge.parallel.context import ParallelContext
from megaforge.parallel.param_spec import ParamSpec
from tests.checkpoint.model_entries import INIT, save_and_retain

CTX = ParallelContext.single()
DATA_FILE = "rank_00000.safetensors"


def _entries(value: float) -> list[TensorEntry]:
    return [TensorEntry(name, ParamSpec(name, (8, 4), INIT), torch.full((8, 4), value)) for name in ("a", "b")]


def _save(directory, step, value=None, **how):
    value = float(step) if value is None else value
    return save_and_retain(directory, step, _entries(value), {"value": value}, CTX, **how)


def _assert_whole(path) -> float:
    """Loads ``path`` and checks that tensors and meta are of one save; returns its value."""
    entries = _entries(-1.0)
    meta = load_checkpoint(path, entries, CTX)
    assert all((entry.tensor == meta["value"]).all() for entry in entries)
    return meta["value"]


def _names(directory):
    return sorted(path.name for path in directory.iterdir())


def _flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped data bit": lambda path: _flip_bit(path / DATA_FILE, -5),
    "flipped header bit": lambda path: _flip_bit(path / DATA_FILE, 20),
    "truncated": lambda path: os.truncate(path / DATA_FILE, 100),
    "longer": lambda path: os.truncate(path / DATA_FILE, 10_000),
    "missing file": lambda path: (path / DATA_FILE).unlink(),
    "flipped manifest bit": lambda path: _flip_bit(path / MANIFEST_FILE, 30),
    "missing manifest": lambda path: (path / MANIFEST_FILE).unlink(),
    "missing sums": lambda path: (path / SUMS_FILE).unlink(),
    "half-written directory": lambda path: [file.unlink() for file in path.iterdir() if file.name != DATA_FILE],
    "empty directory": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_set_aside_and_the_one_before_it_is_used(tmp_path, caplog, damage):
    old, new = _save(tmp_path, 1), _save(tmp_path, 2)
    DAMAGES[damage](new)
    with pytest.raises(CheckpointError, match="step_0000002"):
        load_checkpoint(new, _entries(0.0), CTX)
    assert find_checkpoint(tmp_path, CTX, quarantine_damaged=True) == old
    assert _names(tmp_path) == ["latest", "step_0000001", "step_0000002.damaged"]
    assert len(caplog.records) == 1 and "renamed to step_0000002.damaged" in caplog.text
    if damage in ("truncated", "longer"):
        assert "bytes instead of" in caplog.text
    assert find_checkpoint(tmp_path, CTX, quarantine_damaged=True) == old
    assert len(caplog.records) == 1
    assert _assert_whole(old) == 1.0
    assert _assert_whole(_save(tmp_path, 2, 2.5)) == 2.5  # the name is free again


def test_every_flipped_byte_is_found(tmp_path):
    path = _save(tmp_path, 1)
    for name in (DATA_FILE, MANIFEST_FILE):
        for position in range(0, (path / name).stat().st_size, 7):
            _flip_bit(path / name, position)
            with pytest.raises(UserError, match=name):
                find_checkpoint(path, CTX)
            _flip_bit(path / name, position)
    assert find_checkpoint(path, CTX) == path


def test_sha256sum_agrees(tmp_path):
    path = _save(tmp_path, 1)
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum on this machine")
    run = subprocess.run(["sha256sum", "-c", SUMS_FILE], cwd=path, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and run.stdout.count("OK") == 2


def test_a_damaged_checkpoint_named_directly_is_an_error_and_stays_where_it_is(tmp_path):
    path = _save(tmp_path, 1)
    _flip_bit(path / DATA_FILE, -1)
    with pytest.raises(UserError, match=f"{path}.*{DATA_FILE} has been altered"):
        find_checkpoint(path, CTX)
    assert path.is_dir()


def test_a_run_whose_checkpoints_were_all_set_aside_does_not_start_anew(tmp_path):
    """The same line again must not train another model under the old name; the refusal says what happened there."""
    _flip_bit(_save(tmp_path, 1) / DATA_FILE, -1)
    with pytest.raises(UserError, match="none of its checkpoints is valid"):
        find_checkpoint(tmp_path, CTX, quarantine_damaged=True)
    with pytest.raises(UserError, match="1 set aside there as damaged or abandoned; to start anew, name a new"):
        find_checkpoint(tmp_path, CTX, quarantine_damaged=True)


def test_who_only_reads_renames_nothing(tmp_path, caplog):
    old, new = _save(tmp_path, 1), _save(tmp_path, 2)
    _flip_bit(new / DATA_FILE, -1)
    assert find_checkpoint(tmp_path, CTX) == old
    assert new.is_dir() and "step_0000002 is unusable" in caplog.text


def test_a_run_that_goes_back_sets_the_later_steps_aside(tmp_path, caplog):
    """Steps 2 to 10 are there, the run goes on from 4: the newest is its own newest, and none of its own is removed."""
    caplog.set_level(logging.WARNING)
    for step in (2, 4, 6, 8, 10):
        _save(tmp_path, step, goes_on_from=max(0, step - 2), metric=1.0 if step == 10 else 5.0)
    assert not caplog.records, "nothing comes after a run that goes forward"
    for step in (5, 6, 7):
        _save(tmp_path, step, -float(step), goes_on_from=max(4, step - 1), keep_last=2, keep_best=1, metric=2.0 + step)
        assert find_checkpoint(tmp_path, CTX).name == f"step_{step:07d}"
    aside = [f"step_{step:07d}.abandoned" for step in (10, 6, 8)]
    kept = ["step_0000002", "step_0000006", "step_0000007"]  # 2: the best of this line, as early as it is
    assert _names(tmp_path) == sorted(["latest", *kept, *aside])
    assert len(caplog.records) == 1 and all(name in caplog.text for name in aside)
    assert _assert_whole(tmp_path / "step_0000006") == -6.0
    assert _assert_whole(tmp_path / "step_0000006.abandoned") == 6.0


def test_what_cannot_be_set_aside_stops_the_save_before_it_writes(tmp_path, monkeypatch):
    old, later = _save(tmp_path, 1), _save(tmp_path, 3)

    def refuse(*args, **kwargs):
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CheckpointError, match=r"after step 1, .*cannot be set aside \(Permission denied\)"):
        _save(tmp_path, 2, goes_on_from=1)
    assert _names(tmp_path) == ["latest", old.name, later.name]


def test_where_nothing_was_ever_saved(tmp_path):
    assert holds_no_checkpoint(tmp_path / "nowhere", CTX) and holds_no_checkpoint(tmp_path, CTX)
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / ".tmp_step_0000003").mkdir()  # killed during its first save
    assert holds_no_checkpoint(tmp_path, CTX)
    path = _save(tmp_path, 1)
    assert not holds_no_checkpoint(tmp_path, CTX) and not holds_no_checkpoint(path, CTX)
    assert not holds_no_checkpoint(tmp_path / "metrics.jsonl", CTX)
    path.rename(tmp_path / "step_0000001.damaged")  # something was there: a person decides
    assert not holds_no_checkpoint(tmp_path, CTX)


def test_where_no_checkpoint_is_the_error_says_what_is_there(tmp_path):
    with pytest.raises(UserError, match=r"--load .*nowhere: does not exist"):
        find_checkpoint(tmp_path / "nowhere", CTX)
    with pytest.raises(UserError, match=r"no checkpoint .* it is empty"):
        find_checkpoint(tmp_path, CTX)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"no checkpoint .* it holds notes\.txt"):
        find_checkpoint(tmp_path, CTX)
    with pytest.raises(UserError, match="is a file.*convert_checkpoint.py --load"):
        find_checkpoint(tmp_path / "notes.txt", CTX)
    path = _save(tmp_path, 3)
    (path / DATA_FILE).unlink()
    with pytest.raises(UserError, match=rf"none .* is valid: step_0000003 \({DATA_FILE} is missing\)"):
        find_checkpoint(tmp_path, CTX)


def test_unreadable_is_not_damaged(tmp_path, monkeypatch):
    """A disk that does not answer proves nothing: the checkpoint is passed over, not renamed."""
    old, new = _save(tmp_path, 1), _save(tmp_path, 2)
    digest = hashlib.file_digest

    def failing(file, name):
        if "step_0000002" in str(file.name):
            raise OSError(errno.EIO, "Input/output error")
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", failing)
    assert find_checkpoint(tmp_path, CTX, quarantine_damaged=True) == old
    assert new.is_dir()


def _die_at(call: int, action) -> int:
    """Runs ``action`` in a child that dies before its ``call``-th durable operation; returns its exit code."""
    child = os.fork()
    if child == 0:
        seen = 0
        real = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")}

        def mortal(name):
            def operation(*args, **kwargs):
                nonlocal seen
                seen += 1
                if seen == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real[name](*args, **kwargs)

            return operation

        for name in real:
            setattr(os, name, mortal(name))
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("step", [2, 1], ids=["new step", "same step again"])
def test_killed_at_any_moment_of_a_save(tmp_path, step):
    died, values = 0, set()
    for call in range(1, 40):
        directory = tmp_path / str(call)
        _save(directory, 1, 1.0)
        if _die_at(call, lambda directory=directory: _save(directory, step, 7.0)) != -signal.SIGKILL:
            break
        died += 1
        found = find_checkpoint(directory, CTX)
        values.add(_assert_whole(found))
        _save(directory, 3)  # the next run is not in the way of what was left
        assert _assert_whole(find_checkpoint(directory, CTX)) == 3.0
        assert not [name for name in _names(directory) if name.startswith(".tmp")]
        assert not any("damaged" in name for name in _names(directory))
    assert died >= 7
    assert values == {1.0, 7.0}


@pytest.mark.parametrize("operation", ["fsync", "mkdir"])
def test_disk_full_leaves_the_old_checkpoint(tmp_path, monkeypatch, operation):
    old = _save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, operation, full)
    with pytest.raises(CheckpointError, match=r"step 2 was not written, earlier ones stay valid: .*No space left"):
        _save(tmp_path, 2)
    monkeypatch.undo()
    assert _names(tmp_path) == ["latest", "step_0000001"]
    assert find_checkpoint(tmp_path, CTX) == old and _assert_whole(old) == 1.0


def test_the_directory_itself_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"--save .*file"):
        _save(tmp_path / "file" / "runs", 1)


def test_read_only_media(tmp_path, monkeypatch):
    old, new = _save(tmp_path, 1), _save(tmp_path, 2)
    _flip_bit(new / DATA_FILE, -1)
    opened = builtins.open

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    def read_only(file, mode="r", *args, **kwargs):
        return refuse() if set(mode) & set("wxa+") else opened(file, mode, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", read_only)
    for operation in ("rename", "replace", "mkdir", "unlink", "rmdir"):
        monkeypatch.setattr(os, operation, refuse)
    assert find_checkpoint(tmp_path, CTX, quarantine_damaged=True) == old
    assert _assert_whole(old) == 1.0


def test_latest_names_the_newest_commit(tmp_path):
    _save(tmp_path, 1)
    _save(tmp_path, 2)
    assert (tmp_path / "latest").read_text() == "step_0000002\n"
    (tmp_path / "latest").write_text("step_0000001\n")  # a hint; the truth is what verifies
    assert find_checkpoint(tmp_path, CTX).name == "step_0000002"
    (tmp_path / "latest").unlink()
    assert find_checkpoint(tmp_path, CTX).name == "step_0000002"


def test_keep_last_and_keep_best(tmp_path):
    metrics = {1: 5.0, 2: 1.0, 3: 4.0, 4: float("nan"), 5: None, 6: 9.0}
    for step, metric in metrics.items():
        _save(tmp_path, step, keep_last=2, keep_best=1, metric=metric)
    assert _names(tmp_path) == ["latest", "step_0000002", "step_0000005", "step_0000006"]
    _save(tmp_path, 7, keep_last=1)
    assert _names(tmp_path) == ["latest", "step_0000007"]


def test_keep_every(tmp_path):
    """Multiples stay, the newest too, and the rest goes."""
    for step in range(1, 8):
        _save(tmp_path, step, keep_last=1, keep_every=3)
    assert _names(tmp_path) == ["latest", "step_0000003", "step_0000006", "step_0000007"]
    flags = CheckpointConfig(keep_last=0, save_retain_interval=4)
    assert (Retention.of(flags), Retention.of(CheckpointConfig(keep_last=0)).last) == (Retention(1, 0, 4), 0)


def test_scores_of_another_metric_do_not_count(tmp_path):
    """Perplexities of 20 follow losses of 3: the best perplexity stays, not a loss that looks smaller."""
    for step, name, score in ((1, "loss", 3.0), (2, "perplexity", 20.0), (3, "perplexity", 25.0), (4, "loss", 2.9)):
        meta = {"value": 0.0, "config": {"training": {"early_stopping_metric": name}}}
        save_and_retain(
            tmp_path, step, _entries(0.0), meta, CTX, keep_last=2 if step < 3 else 1, keep_best=1, metric=score
        )
        if step == 3:
            assert _names(tmp_path) == ["latest", "step_0000002", "step_0000003"]
    assert _names(tmp_path) == ["latest", "step_0000004"]


def test_keep_last_zero_keeps_all_and_the_newest_written_never_goes(tmp_path):
    for step in (5, 6, 7):
        _save(tmp_path, step)
    assert len(_names(tmp_path)) == 4
    _save(tmp_path, 1, keep_last=2)  # a run started over in the same directory
    assert _names(tmp_path) == ["latest", "step_0000001", "step_0000006", "step_0000007"]


def test_nothing_is_deleted_when_the_newest_does_not_read_back(tmp_path, monkeypatch):
    old = _save(tmp_path, 1)

    def faulty_disk(directory, manifest):
        path = commit(directory, manifest)
        os.truncate(path / DATA_FILE, (path / DATA_FILE).stat().st_size - 1)
        return path

    monkeypatch.setattr("megaforge.checkpoint.directory.commit", faulty_disk)
    with pytest.raises(CheckpointError, match=r"step_0000002 does not read back .* older ones are kept"):
        _save(tmp_path, 2, keep_last=1)
    assert find_checkpoint(tmp_path, CTX) == old and _assert_whole(old) == 1.0


def test_meta_must_be_json_and_comes_back_exactly(tmp_path):
    meta = {"loss": 0.1 + 0.2, "text": "größe", "list": [1, None, True], "nested": {"x": 1e-300}}
    path = save_checkpoint(tmp_path, 1, _entries(1.0), meta, CTX)
    assert read_meta(path) == meta
    with pytest.raises(RuntimeError, match="not JSON serializable"):
        save_checkpoint(tmp_path, 2, _entries(1.0), {"bad": torch.tensor(1)}, CTX)
    assert [name for name in _names(tmp_path) if "step_" in name] == ["step_0000001"]


def _refuse_pickle(monkeypatch):
    import pickle

    def refuse(*args, **kwargs):
        raise AssertionError("something was pickled or unpickled")

    for module, names in (
        (pickle, ("load", "loads", "dump", "dumps", "Unpickler", "Pickler")),
        (torch, ("load", "save")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, refuse)


def test_no_file_is_a_pickle_and_none_is_made_or_read(tmp_path, monkeypatch):
    _refuse_pickle(monkeypatch)
    path = _save(tmp_path, 1)
    assert _assert_whole(find_checkpoint(tmp_path, CTX)) == 1.0
    assert _names(path) == [SUMS_FILE, MANIFEST_FILE, DATA_FILE]
    json.loads((path / MANIFEST_FILE).read_text())
    for file in path.iterdir():
        with pytest.raises(ValueError):
            list(pickletools.genops(file.read_bytes()))


def test_a_crafted_pickle_does_not_run(tmp_path):
    path, witness = _save(tmp_path, 1), tmp_path / "executed"
    attack = f"cos\nsystem\n(S'touch {witness}'\ntR.".encode()
    (path / ".metadata").write_bytes(attack)
    assert _assert_whole(path) == 1.0
    (path / DATA_FILE).write_bytes(attack)
    with pytest.raises(CheckpointError, match=DATA_FILE):
        load_checkpoint(path, _entries(0.0), CTX)
    manifest = read_manifest(path)
    forged = {DATA_FILE: FileRecord(len(attack), hashlib.sha256(attack).hexdigest())}
    write_manifest(path, type(manifest)(**{**vars(manifest), "files": forged}))
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_checkpoint(path, _entries(0.0), CTX)
    (path / MANIFEST_FILE).write_bytes(attack)
    (path / SUMS_FILE).write_text(f"{hashlib.sha256(attack).hexdigest()}  {MANIFEST_FILE}\n")
    with pytest.raises(CheckpointError, match="malformed"):
        load_checkpoint(path, _entries(0.0), CTX)
    assert not witness.exists()


def test_a_manifest_cannot_point_outside_its_directory(tmp_path):
    path = _save(tmp_path, 1)
    text = (path / MANIFEST_FILE).read_text().replace(DATA_FILE, f"../{DATA_FILE}")
    (path / MANIFEST_FILE).write_text(text)
    (path / SUMS_FILE).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  {MANIFEST_FILE}\n")
    with pytest.raises(DamagedCheckpointError, match="not a plain file name"):
        read_manifest(path)


def test_a_manifest_of_another_version_says_so(tmp_path):
    path = _save(tmp_path, 1)
    text = (path / MANIFEST_FILE).read_text().replace('"version": 2', '"version": 99')
    (path / MANIFEST_FILE).write_text(text)
    (path / SUMS_FILE).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  {MANIFEST_FILE}\n")
    with pytest.raises(CheckpointError, match=r"version 99; this program reads 'megaforge-checkpoint' version 2"):
        read_meta(path)
    with pytest.raises(UserError, match="none of its checkpoints is valid"):
        find_checkpoint(tmp_path, CTX)
    assert path.is_dir()  # nothing is wrong with it


def test_an_interrupt_stays_an_interrupt_and_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _save(tmp_path, 1)
    assert _names(tmp_path) == []


def test_programming_errors_keep_their_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module.CheckpointWriter, "finish", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        _save(tmp_path, 1)
    assert _names(tmp_path) == []


@pytest.fixture(autouse=True)
def _captured_log(caplog):
    caplog.set_level(logging.WARNING, logger="megaforge")


def test_a_save_that_is_not_published_changes_nothing(tmp_path, monkeypatch):
    """Written files are no checkpoint; what fails while they become one leaves the old ones and no half."""
    old = _save(tmp_path, 1)
    snapshot = checkpoint_module.take_snapshot(2, _entries(2.0), {"value": 2.0}, CTX)
    manifest = checkpoint_module.write_snapshot(snapshot, tmp_path, CTX)
    assert find_checkpoint(tmp_path, CTX) == old and ".tmp_step_0000002" in _names(tmp_path)

    def refuse(*args, **kwargs):
        raise OSError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="step 2 was not written.*Permission"):
        patch.setattr(os, "rename", refuse)
        checkpoint_module.publish_snapshot(manifest, tmp_path, 2, CTX)
    assert _names(tmp_path) == ["latest", old.name]
    manifest = checkpoint_module.write_snapshot(snapshot, tmp_path, CTX)
    new = checkpoint_module.publish_snapshot(manifest, tmp_path, 2, CTX)
    assert find_checkpoint(tmp_path, CTX) == new and _assert_whole(new) == 2.0
