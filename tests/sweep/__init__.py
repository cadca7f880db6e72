"""Random wrong inputs for every command: none may end in a traceback, hang, or be taken without a word.

    python -m tests.sweep --cases 500 --seed 1          every command; nightly.sh runs this
    python -m tests.sweep generate evaluate             some of them

A case is a command line that works with one thing made wrong: a value of another type or out of its bounds, a path
that is missing, empty, a directory or not writable, a file of another encoding or cut short, an unknown flag, a closed
pipe. The flags come from the command's own argument parser, so a new flag is swept without a word here.
"""
