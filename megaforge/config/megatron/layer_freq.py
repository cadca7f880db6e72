"""``--moe-layer-freq``: which layers have a mixture of experts, as Megatron-LM writes it."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megaforge.config.megatron.line import Line

FLAG = "--moe-layer-freq"
_MOST = 100_000


def layer_freq(line: Line) -> None:
    """A number N (layers 0, N, 2N ...) or a list such as ``([0]*3+[1]*58)`` becomes a pattern of attention blocks."""
    found = line.find(FLAG)
    if found is None:
        return
    line.drop(FLAG)
    text = " ".join(found.values)
    layers = line.value("--num-layers", "--encoder-num-layers")
    if text == "1":
        line.needless.append(f"{FLAG} 1")
        return
    attention = line.as_there or line.value("--layer-schedule") == "attention"
    choices = _choices(text, int(layers)) if layers is not None and layers.isdigit() else None
    if choices is None or not attention or line.find("--hybrid-layer-pattern") is not None:
        line.refused.append(
            f"{found.written}: write --hybrid-layer-pattern, with E for a mixture of experts and - for a dense FFN"
        )
    elif len(choices) != int(layers or 0):
        line.refused.append(f"{found.written}: names {len(choices)} layers, and there are {layers} (--num-layers)")
    else:
        line.add("--hybrid-layer-pattern", "".join("*E" if chosen else "*-" for chosen in choices))
        line.notes.append(f"{found.written}: E and - in --hybrid-layer-pattern, which stands for it")


def _choices(text: str, layers: int) -> list[int] | None:
    """1 for each layer with experts, else 0; None where the text says something else."""
    if layers > _MOST:
        return None
    if text.isdigit():
        every = int(text)
        return [int(layer % every == 0) for layer in range(layers)] if every else None
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, list) else None


def _value(node: ast.expr) -> int | list[int]:
    """Lists of 0 and 1, joined by ``+`` and repeated by ``*``: nothing else is computed."""
    if isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value <= _MOST:
        return node.value
    if isinstance(node, ast.List):
        return [element for element in map(_value, node.elts) if isinstance(element, int)]
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add) and isinstance(left, list) and isinstance(right, list):
            return left + right
        if isinstance(node.op, ast.Mult) and isinstance(left, list) and isinstance(right, int):
            if len(left) * right <= _MOST:
                return left * right
    raise ValueError
