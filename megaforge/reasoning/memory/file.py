"""An agent's memory in a file, from one call of a tool to the next."""

from __future__ import annotations

from pathlib import Path

from megaforge.checkpoint.safetensors_file import SafetensorsFile, Slot, file_order, write_safetensors
from megaforge.durable import replacing
from megaforge.errors import DamagedCheckpointError, UserError
from megaforge.reasoning.memory.agent_memory import AgentMemory


def save_memory(path: Path, memory: AgentMemory, model: str) -> None:
    """Writes ``path``, or leaves it as it was.

    Args:
        model: a digest of what makes summaries and keys, which mean nothing to another.

    Raises:
        UserError: it cannot be written.
    """
    tensors = memory.state()
    slots = sorted((Slot(name, x.dtype, tuple(x.shape)) for name, x in tensors.items()), key=file_order)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            _ = write_safetensors(temporary, slots, (tensors[slot.name] for slot in slots), {"model": model})
    except OSError as error:
        raise UserError(f"--memory {path}: it was not written ({error.strerror})") from error


def load_memory(path: Path, memory: AgentMemory, model: str) -> bool:
    """Gives ``memory`` what :func:`save_memory` wrote; whether there is such a file.

    Raises:
        UserError: it is no such file, or of another model.
    """
    if not path.exists():
        return False
    try:
        file = SafetensorsFile(path)
        state = {slot.name: file.tensor(slot.name).clone() for slot in file.slots()}
    except (DamagedCheckpointError, OSError) as error:
        raise UserError(f"--memory {path}: it is not a memory's file ({error})") from error
    if missing := memory.state().keys() - state.keys():
        raise UserError(f"--memory {path}: it is not a memory's file (it has no {min(missing)})")
    if file.metadata.get("model") != model:
        raise UserError(
            f"--memory {path}: another model wrote it, whose summaries mean nothing to this one; name a new file"
        )
    memory.load_state(state)
    return True
