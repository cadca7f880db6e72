"""What a dataset is held against at the start: its description, its digests, the vocabulary."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from megaforge.data import run_dataset
from megaforge.data import sidecar as manifest_module
from megaforge.data.indexed_dataset import IndexedDataset
from megaforge.data.run_dataset import DataChecks, RunDataset, open_dataset
from megaforge.data.samples import SampleSchedule, TrainingData
from megaforge.data.sidecar import check_agreement, probe_tokens, read_sidecar
from megaforge.errors import UserError
from tests.data.datasets import write_dataset, write_sidecar

EVERYTHING = (1.0, 0.0, 0.0)


def described(prefix: str, **changes: object) -> None:
    """A sidecar with the digests that preprocessing writes."""
    content = Path(f"{prefix}.bin").read_bytes()
    digests = {
        "bin_bytes": len(content),
        "bin_sha256": hashlib.sha256(content).hexdigest(),
        "bin_probe": probe_tokens(IndexedDataset(prefix)),
    }
    write_sidecar(prefix, **{**digests, **changes})


def damage(prefix: str, at: int) -> None:
    with open(f"{prefix}.bin", "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def opened(prefix: str, checks: DataChecks | None = None) -> RunDataset:
    return open_dataset(prefix, EVERYTHING, "shuffled", checks or DataChecks())


def test_a_damaged_token_file_is_found_at_the_start(tmp_path: Path) -> None:
    """Where it is small, wherever the damage is; and its content is another's without a sidecar."""
    prefix = write_dataset(tmp_path / "d", [[1, 2, 3]] * 50)
    described(prefix)
    whole = opened(prefix).digest
    damage(prefix, 77)
    with pytest.raises(UserError, match=r"d\.json describes other files than .*d\.bin, which is damaged"):
        opened(prefix)
    Path(f"{prefix}.json").unlink()
    assert opened(prefix).digest != whole


def test_an_index_of_the_same_tokens_in_other_documents_is_found(tmp_path: Path) -> None:
    prefix, other = (
        write_dataset(tmp_path / "d", [[1, 2, 3]] * 4),
        write_dataset(tmp_path / "e", [[1, 2, 3, 1, 2, 3]] * 2),
    )
    described(prefix)
    opened(prefix)
    os.replace(f"{other}.idx", f"{prefix}.idx")
    with pytest.raises(UserError, match=r"d\.json describes other files than .*d\.idx, which is damaged"):
        opened(prefix)


def test_a_large_file_is_probed_and_verified_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "_WHOLE_BYTES", 0)
    tokens = np.random.default_rng(0).integers(0, 900, 3 << 20).astype(np.uint16)
    prefix = write_dataset(tmp_path / "d", [tokens])  # type: ignore[list-item]
    described(prefix)
    opened(prefix, DataChecks(verify=True))
    between = (1 << 20) + (1 << 14) + 5  # after the first block behind the first MiB
    damage(prefix, between)
    opened(prefix)
    with pytest.raises(UserError, match="which is damaged"):
        opened(prefix, DataChecks(verify=True))
    damage(prefix, between)
    damage(prefix, 6 * (1 << 20) - 1)
    with pytest.raises(UserError, match="which is damaged"):
        opened(prefix)


def test_verifying_needs_recorded_digests(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2]])
    for write in (lambda: None, lambda: write_sidecar(prefix)):
        write()
        with pytest.raises(UserError, match=r"--verify-data: .*d\.json does not record"):
            opened(prefix, DataChecks(verify=True))


def test_foreign_ids_are_found_though_the_sidecar_denies_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start in a small file, as they are read in a large one: in training and validation samples alike."""
    prefix = write_dataset(tmp_path / "d", [[1, 2, 5000], [3, 5000]])
    write_sidecar(prefix)
    with pytest.raises(UserError, match=r"d\.bin holds token id 5000"):
        opened(prefix, DataChecks(1000))
    monkeypatch.setattr(run_dataset, "_SCAN_BYTES", 0)
    data = TrainingData([(1.0, prefix)], "1,1", SampleSchedule(1, 2), checks=DataChecks(1000))
    for view in (data, data.validation()):
        with pytest.raises(UserError, match=r"d\.bin holds token id 5000"):
            view.sample(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": {"type": "NullTokenizer", "fingerprint": "a" * 64, "vocab_size": 1000, "eod": 7}},
         "end-of-document id is 0 in .*a.json and 7 in .*b.json"),
        ({"tokenizer": {"type": "NullTokenizer", "fingerprint": "b" * 64, "vocab_size": 1000, "eod": 0}}, "SHA-256"),
        ({"settings": {"append_eod": False}}, "--append-eod is True in .*a.json and False in .*b.json"),
    ],
)  # fmt: skip
def test_blends_that_disagree_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    a, b, plain = (write_dataset(tmp_path / name, [[1, 2]]) for name in ("a", "b", "plain"))
    write_sidecar(a, settings={"append_eod": True, "json_key": "text"})
    write_sidecar(b, settings={"append_eod": True, "json_key": "content"})
    sources = [(1.0, a), (1.0, plain), (1.0, b)]
    TrainingData(sources, "1", SampleSchedule(1, 2))
    write_sidecar(b, **{"settings": {"append_eod": True}, **change})
    with pytest.raises(UserError, match=message):
        TrainingData(sources, "1", SampleSchedule(1, 2))
    with pytest.raises(UserError, match=message):
        check_agreement([read_sidecar(a), None, read_sidecar(b)])


def test_another_end_of_documents_is_refused(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", [[1, 2]])
    write_sidecar(prefix)
    opened(prefix, DataChecks(fingerprint="a" * 64, eod=0))
    with pytest.raises(UserError, match="ends its documents with token 0 .*the tokenizer here with 9"):
        opened(prefix, DataChecks(fingerprint="a" * 64, eod=9))
