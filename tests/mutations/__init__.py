"""Every wait for the disk, rename and checksum of the program taken out once: a named test has to fail each time.

``python -m tests.mutations [FILE ...]`` copies the tree, and for each row of :mod:`tests.mutations.table` changes one
piece of code in the copy, runs the row's test and puts the code back. Status 1 when a test passes all the same.
"""
