"""The Power of Ten, adapted to Python, C++ and CUDA: what is measured on the code and on a run, and its score.

The rules are Holzmann's (IEEE Computer, June 2006), written for C in flight software; a score here is no certificate.
"""
