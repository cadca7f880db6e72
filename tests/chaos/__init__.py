"""Faults in a real job: a run of several ranks on real text meets the faults of a seeded plan, one after another.

Each fault strikes in the run's own processes (:mod:`megaforge.resilience.faults`); torchrun starts the ranks again, and
when its restarts are used up the job is launched anew. A run of the same line that nothing disturbed is its measure:
every iteration's numbers and the bytes of the last checkpoint must be the same.
"""
