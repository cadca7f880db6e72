"""Every operator has the form that :mod:`megaforge.kernels` describes."""

from __future__ import annotations

import ast
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "megaforge" / "kernels"


def test_every_operator_is_a_package_with_a_reference_and_tests() -> None:
    ops = [path.parent for path in KERNELS.glob("*/__init__.py")]
    assert len(ops) >= 5 and [path.name for path in KERNELS.glob("*.py")].count("native.py") == 1
    assert {path.name for path in KERNELS.glob("*.py")} == {"__init__.py", "native.py"}
    for op in ops:
        assert (op / "reference.py").is_file(), f"{op.name} has no definition"
        assert ast.get_docstring(ast.parse((op / "__init__.py").read_text(encoding="utf-8"))), op.name
        assert (Path(__file__).parent / f"test_{op.name}.py").is_file(), f"{op.name} has no tests"


def test_a_definition_uses_no_other_form() -> None:
    """What the others are compared with is written out."""
    for file in KERNELS.glob("*/reference.py"):
        imported = [
            node.module or "" for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)
        ]
        assert not [module for module in imported if module.startswith("megaforge.")], file
