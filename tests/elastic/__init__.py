"""A run of two nodes loses one of them, goes on with the other, and takes it back: real launches of torchrun on one
machine, each a node of two ranks. It must learn what a run of four ranks learns that nothing happened to.

    python -m tests.elastic            minutes; nightly.sh runs this
"""
