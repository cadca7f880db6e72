"""Megatron-LM's command lines: what each of its flags becomes here, and where a line means something else there.

Its flags that are none of ours stand in tables (``*_rows.py``): another spelling of ours, what is so without the flag,
or what to write instead. A flag that becomes ours leaves its table. What depends on several flags of a line is a rule
(``rules.py``); what depends on values that the line may leave to a file is settled last (``settle.py``).
"""

from megaforge.config.megatron.line import Line, meaning, read_line
from megaforge.config.megatron.notes import notes
from megaforge.config.megatron.settle import settle
from megaforge.config.megatron.table import known_flags, own_flags

# Megatron-LM's defaults, as a preset: what its entries start from.
PRESET = "megatron"

__all__ = ["PRESET", "Line", "known_flags", "meaning", "notes", "own_flags", "read_line", "settle"]
