"""Damaged and hostile files for everything that reads files: each must be read, or refused by one clear error.

A good file of each format is mutated by seed, and read as the program reads it. Anything but the documented error is a
finding: another exception, the death of the process, a read that does not end, memory beyond all proportion. What was
found and mended lies in ``corpus``, and the tests read it again.
"""
