"""Builds the native code ahead of time (native_build.py says what); everything else is in pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))  # build front ends leave it out

import native_build

extensions, commands = native_build.prepare()
setup(ext_modules=extensions, cmdclass=commands)
