"""Every wait for the disk, rename and checksum of the program taken out once: a named test has to fail each time.

``python -m tests.mutations [FILE ...]`` copies the tree, and for each row of :mod:`tests.mutations.table` changes one
piece of code in the copy, runs the row's test and puts the code back. Status 1 when a test passes all the same.

``--checks N`` takes out assertions and raised exceptions instead, N of all in the program at random (``--seed``), one
at a time, and runs the test of their module: rule 5 of ``docs/compliance.md`` is worth something only where checks are
seen. Status 1 when more than half of them are not.
"""
