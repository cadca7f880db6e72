"""Sequences whose tokens are cut over the ranks of cp: who holds which chunk, and how mixers see the rest."""
