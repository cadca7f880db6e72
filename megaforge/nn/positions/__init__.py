"""The values of ``--position-embedding-type``; needs no torch until one is built."""
