"""Checkpoints of other programs, told by what is there, and the command that makes one of ours of them."""

from __future__ import annotations

from pathlib import Path

MEGATRON_LATEST = "latest_checkpointed_iteration.txt"
_FILES = {".pth": "rwkv7"}  # by their suffix
_DIRECTORIES = {  # by what is in them
    "config.json": "hf",
    MEGATRON_LATEST: "megatron",
    **dict.fromkeys(("common.pt", "mp_rank_00", "mp_rank_00_000", "mp_rank_00_000_000"), "megatron"),
}


def conversion_of(path: Path) -> str | None:
    """What to do with the file or directory ``path`` where it has another program's form; None where it has none."""
    kinds = _DIRECTORIES if path.is_dir() else {}
    found = next((kind for name, kind in kinds.items() if (path / name).exists()), _FILES.get(path.suffix))
    if found is None or not path.exists():
        return None
    return (
        f"it has another program's form; make a checkpoint of it: python tools/convert_checkpoint.py --from {found} "
        f"{path} --save NEW_DIRECTORY"
    )
