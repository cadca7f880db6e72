"""What is taken out, and the test that has to notice."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        file: below ``megaforge/``.
        code: what stands there, once.
        instead: what stands there then.
        test: what pytest is given: a file, or one test of it.
    """

    file: str
    code: str
    instead: str
    test: str

    def __str__(self) -> str:
        return f"{self.file}: {self.code}"


def _gone(file: str, code: str, test: str) -> Mutation:
    return Mutation(file, code, "pass", test)


FOLDER = "tests/checkpoint/test_hf_folder.py"
CHECKPOINT, DURABILITY = "tests/checkpoint/test_directory.py", "tests/checkpoint/test_durability.py"
RUN_MEMORY = "tests/reasoning/test_run_memory.py"
MUTATIONS = (
    # Waits for the disk.
    _gone("durable.py", "os.fsync(descriptor)", "tests/test_durable.py"),
    _gone("durable.py", "sync_path(part)", "tests/test_durable.py"),
    _gone("durable.py", "sync_path(Path(path).parent)", "tests/test_durable.py"),
    Mutation(
        "checkpoint/directory.py",
        "sync_all([*write_manifest(temporary, manifest), temporary, hint])",
        "write_manifest(temporary, manifest)",
        CHECKPOINT,
    ),
    _gone("checkpoint/directory.py", "sync_all([*temporary.iterdir(), temporary])", CHECKPOINT),
    Mutation(
        "checkpoint/directory.py",
        "    finally:\n        hint.unlink(missing_ok=True)\n    sync_path(directory)",
        "    finally:\n        hint.unlink(missing_ok=True)",
        CHECKPOINT,
    ),
    Mutation(
        "checkpoint/directory.py",
        "os.rename(temporary, final)\n        sync_path(directory)",
        "os.rename(temporary, final)",
        CHECKPOINT,
    ),
    _gone("checkpoint/directory.py", "sync_path(path.parent)", CHECKPOINT),
    _gone("checkpoint/hashed_file.py", "os.fsync(self._file.fileno())", "tests/checkpoint/test_hashed_file.py"),
    Mutation(
        "checkpoint/hashed_file.py",
        "lambda descriptor: os.fdatasync(descriptor)",
        "lambda descriptor: None",
        "tests/checkpoint/test_hashed_file.py",
    ),
    Mutation("checkpoint/hashed_file.py", "_Helper(sync_path, 1)", "_Helper(lambda path: None, 1)", CHECKPOINT),
    _gone(
        "checkpoint/hf_folder.py", 'sync_all([*temporary.rglob("*"), temporary])', "tests/checkpoint/test_hf_folder.py"
    ),
    _gone("checkpoint/hf_folder.py", "sync_path(folder.parent)", FOLDER),
    Mutation("reasoning/memory/archive.py", "sync_path(path)\n", "pass\n", RUN_MEMORY),
    _gone("reasoning/memory/archive.py", "sync_path(path.parent)", RUN_MEMORY),
    _gone("data/indexed_dataset.py", "os.fsync(file.fileno())", "tests/data/test_indexed_dataset.py"),
    _gone("data/indexed_dataset.py", "sync_path(bin_path(prefix).parent)", "tests/data/test_indexed_dataset.py"),
    _gone("monitor/events.py", "os.fsync(descriptor)", "tests/monitor/test_events.py"),
    Mutation(
        "monitor/events.py",
        "            if end == 0:\n                sync_path(path.parent)  # its name is new\n",
        "",
        "tests/monitor/test_events.py",
    ),
    _gone("monitor/sinks.py", "os.fsync(self._file.fileno())", "tests/monitor/test_sinks.py"),
    _gone("durable.py", "os.fsync(aside.fileno())", "tests/monitor/test_sinks.py"),
    _gone("resilience/faults.py", "os.fsync(mark.fileno())", "tests/resilience/test_faults.py"),
    # Names that are given once the content is whole.
    Mutation("durable.py", "os.replace(part, path)", "__import__('shutil').copy(part, path)", "tests/test_durable.py"),
    Mutation(
        "checkpoint/directory.py",
        "os.replace(hint, directory / LATEST_FILE)",
        "shutil.copy(hint, directory / LATEST_FILE)",
        CHECKPOINT,
    ),
    Mutation("checkpoint/directory.py", "os.rename(final, replaced)", "shutil.rmtree(final)", DURABILITY),
    Mutation(
        "checkpoint/directory.py",
        "    try:\n        os.rename(temporary, final)\n    except",
        "    try:\n        shutil.copytree(temporary, final)\n    except",
        CHECKPOINT,
    ),
    Mutation(
        "checkpoint/directory.py",
        "os.rename(temporary, final)\n        sync_path",
        "shutil.copytree(temporary, final)\n        sync_path",
        CHECKPOINT,
    ),
    _gone("checkpoint/directory.py", "os.rename(replaced, final)", CHECKPOINT),
    _gone("checkpoint/directory.py", "os.rename(path, target)", CHECKPOINT),
    Mutation(
        "checkpoint/directory.py",
        "os.rename(path, trash)\n        shutil.rmtree(trash)",
        "shutil.rmtree(path)",
        CHECKPOINT,
    ),
    Mutation(
        "checkpoint/hf_folder.py",
        "os.replace(temporary, folder)",
        "shutil.copytree(temporary, folder)",
        FOLDER,
    ),
    Mutation(
        "data/indexed_dataset.py",
        "os.replace(tokens, bin_path(prefix))",
        "__import__('shutil').copy(tokens, bin_path(prefix))",
        "tests/data/test_indexed_dataset.py",
    ),
    Mutation(
        "data/indexed_dataset.py",
        "os.replace(index, idx_path(prefix))",
        "__import__('shutil').copy(index, idx_path(prefix))",
        "tests/data/test_indexed_dataset.py",
    ),
    Mutation(
        "data/preprocess/ranks.py",
        "os.replace(temporary, self._directory / name)",
        "__import__('shutil').copy(temporary, self._directory / name)",
        "tests/tools/test_offline_tools.py::test_what_a_rank_says_is_whole_before_others_see_it",
    ),
    _gone("data/skip_list.py", "file.rename(target)", "tests/data/test_skipped.py"),
    _gone("monitor/audit.py", "path.rename(moved)", "tests/monitor/test_audit.py"),
    Mutation(
        "resilience/transfer.py",
        "os.replace(self._arriving, self._folder / self.move.name)",
        "__import__('shutil').copy(self._arriving, self._folder / self.move.name)",
        "tests/resilience/test_transfer.py",
    ),
    # Checksums and signatures.
    Mutation("checkpoint/find.py", "None if digest == record.sha256 else", "None if digest else", DURABILITY),
    Mutation("checkpoint/find.py", "None if size == record.bytes else", "None if size + 1 else", DURABILITY),
    Mutation(
        "checkpoint/manifest.py",
        'if f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_FILE}" not in sums.splitlines():',
        "if not sums:",
        DURABILITY,
    ),
    Mutation(
        "data/sidecar.py",
        "_compare(dataset.idx_path, sidecar, index, sidecar.idx_sha256)",
        "pass",
        "tests/data/test_run_dataset.py",
    ),
    Mutation(
        "data/sidecar.py",
        "_compare(dataset.bin_path, sidecar, _sha256(dataset.bin_path), sidecar.bin_sha256)",
        "pass",
        "tests/data/test_run_dataset.py",
    ),
    Mutation(
        "data/preprocess/shard.py",
        'kept["files"] == _digests(prefix)',
        'kept["files"]',
        "tests/data/test_preprocess.py",
    ),
    Mutation(
        "monitor/audit.py",
        'record.get("hash") != _hash(record)',
        'not record.get("hash")',
        "tests/monitor/test_audit.py",
    ),
    Mutation(
        "monitor/audit.py",
        'record.get("previous") != trail.head["hash"]',
        'not record.get("previous")',
        "tests/monitor/test_audit.py",
    ),
    Mutation(
        "resilience/transfer.py",
        "self._digest.hexdigest() != self.move.record.sha256",
        "not self._digest.hexdigest()",
        "tests/resilience/test_transfer.py",
    ),
    Mutation("checkpoint/anchors.py", "count > len(trail.hashes)", "count < 0", "tests/training/test_auditing.py"),
)

_WAITS = {"fsync", "fdatasync", "sync_path", "sync_all"}
_NAMES = {"replace", "rename"}


def sites() -> Iterator[tuple[str, str]]:
    """Every file and call of the program that waits for the disk or gives a name (checksums are compared in too many
    forms to be found)."""
    for path in sorted((ROOT / "megaforge").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and _durable(node.func):
                yield str(path.relative_to(ROOT / "megaforge")), ast.unparse(node)


def _durable(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id in _WAITS
    if not isinstance(function, ast.Attribute):
        return False
    of_os = isinstance(function.value, ast.Name) and function.value.id == "os"
    return function.attr in _WAITS or function.attr == "rename" or (of_os and function.attr in _NAMES)
