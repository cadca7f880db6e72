"""Operators. Each is a package with one face, and all have one form::

    OP/__init__.py     the face: functions whose docstrings give shapes and dtypes. The input's device and dtype choose
                       who computes; where the slow form has to, it says so once (native.say_fallback)
    OP/reference.py    the definition, in plain torch: the oracle of every other form
    OP/native.py       schemas, shapes and autograd (native.define) of compiled operators, whose code is in csrc/OP
    OP/anything.py     other forms: blocks in plain torch, Triton, a package of others

Every form passes the tests of the face against the reference. Nothing here communicates.
"""
