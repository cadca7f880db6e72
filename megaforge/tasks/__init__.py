"""Tasks that need no download: a seed becomes an example, and an answer is judged.

Evaluation and reinforcement learning share them.
"""
