"""Every product with a trained matrix is a layer of the linear family: nobody else multiplies."""

from __future__ import annotations

import ast

from tests.test_limits import REPO

PRODUCTS = {
    "linear",
    "matmul",
    "mm",
    "bmm",
    "addmm",
    "addmm_",
    "baddbmm",
    "einsum",
    "dot",
    "mv",
    "tensordot",
    "grouped_mm",
}


def products(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        called = node.func if isinstance(node, ast.Call) else None
        name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else None
        if name in PRODUCTS or isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult):
            found.append(ast.unparse(node))
    return found


def test_layers_and_models_multiply_by_no_matrix_of_their_own() -> None:
    room = REPO / "megaforge"
    files = [file for folder in ("nn", "models") for file in (room / folder).rglob("*.py")]
    assert len(files) > 15
    found = {f"{file.relative_to(room)}: {product}" for file in files for product in products(file.read_text("utf-8"))}
    assert found == set()


def test_each_kind_of_product_is_seen() -> None:
    for line in ("x @ self.w", "y @= w", "F.linear(x, w)", "torch.einsum('i,i', a, b)", "x.mm(w)", "matmul(x, w)"):
        assert len(products(line)) == 1, line
    assert products("x * w\nself.linear\n@decorator\ndef f(): ...") == []
