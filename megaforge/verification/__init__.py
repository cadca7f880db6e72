"""Proofs that layouts agree, and that a run starts: parity, dry runs, what the documents say of them."""
