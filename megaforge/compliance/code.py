"""The code that is measured: its files, parsed once, and the functions in them."""

from __future__ import annotations

import ast
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megaforge.errors import UserError

OWN = Path(__file__).parents[2]
_OF_REPOSITORY = ("megaforge", "tools", "examples", "csrc")  # tests are not code that runs
_LEFT_OUT = frozenset({"tests", "build", "node_modules", "__pycache__", "runs", "site-packages"})
NATIVE = (".c", ".cc", ".cpp", ".h", ".hpp", ".cu", ".cuh")


_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


@dataclass(frozen=True)
class Function:
    """A function or method of Python.

    Attributes:
        name: its path in the module, as ``Class.method`` or ``outer.inner``.
        node: of the tree.
        owner: the class that it is a method of, or nothing.
    """

    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    owner: str = ""

    @property
    def body(self) -> list[ast.stmt]:
        """Its statements without the docstring."""
        first = self.node.body[0]
        said = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str
        return self.node.body[1:] if said else self.node.body

    @property
    def lines(self) -> int:
        """From its first line, decorators left out, to its last one."""
        return _lines(self.node)

    @property
    def body_lines(self) -> int:
        """Of its statements without the docstring, and without functions and classes in it: those count by themselves,
        as their checks do."""
        body = self.body
        lines = (body[-1].end_lineno or body[-1].lineno) - body[0].lineno + 1 if body else 0
        return lines - sum(_lines(node) - 1 for node in self.own_nodes() if isinstance(node, _DEFINITIONS))

    def own_nodes(self) -> Iterator[ast.AST]:
        """What it consists of, in its order, without functions and classes in it."""
        todo: list[ast.AST] = [*reversed(self.body)]
        while todo:
            node = todo.pop()
            yield node
            if not isinstance(node, _DEFINITIONS):
                todo += [*ast.iter_child_nodes(node)][::-1]


@dataclass(frozen=True)
class Module:
    """A file of Python.

    Attributes:
        path: relative to the code's root.
        dotted: the name by which others import it.
    """

    path: str
    dotted: str
    source: str
    tree: ast.Module

    @functools.cached_property
    def nodes(self) -> list[ast.AST]:
        """All of the tree."""
        return list(ast.walk(self.tree))

    @functools.cached_property
    def functions(self) -> list[Function]:
        """All functions and methods, those within others too."""
        found: list[Function] = []
        todo: list[tuple[ast.AST, str, str]] = [(self.tree, "", "")]
        while todo:
            node, prefix, owner = todo.pop()
            for child in ast.iter_child_nodes(node):
                inner = (prefix, owner)
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.append(Function(f"{prefix}{child.name}", child, owner))
                    inner = (f"{prefix}{child.name}.", "")
                elif isinstance(child, ast.ClassDef):
                    inner = (f"{prefix}{child.name}.", f"{prefix}{child.name}")
                todo.append((child, *inner))
        return sorted(found, key=lambda function: function.node.lineno)


@dataclass(frozen=True)
class NativeFile:
    """A file of C++ or CUDA; ``path`` is relative to the code's root."""

    path: str
    source: str


@dataclass(frozen=True, eq=False)
class Code:
    """What is measured. ``root``: the folder that paths are relative to."""

    root: Path
    modules: tuple[Module, ...]
    native: tuple[NativeFile, ...]

    @functools.cached_property
    def functions(self) -> list[tuple[Module, Function]]:
        """All functions of Python."""
        return [(module, function) for module in self.modules for function in module.functions]


def read_code(root: Path = OWN) -> Code:
    """The code below ``root``: of this repository its package, tools, examples, native sources and entry scripts; of
    another folder all but tests and what is built.

    Raises:
        UserError: there is none, or a file is not Python.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such directory; name one with code in it")
    modules, native = [], []
    for path in _files(root):
        relative = str(path.relative_to(root))
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 ({error})") from error
        if path.suffix in NATIVE:
            native.append(NativeFile(relative, source))
            continue
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{path}: this is not Python ({error})") from error
        parts = path.relative_to(root).with_suffix("").parts
        modules.append(Module(relative, ".".join(parts).removesuffix(".__init__"), source, tree))
    if not modules and not native:
        raise UserError(f"{root}: holds no file of Python, C++ or CUDA")
    return Code(root, tuple(modules), tuple(native))


def _files(root: Path) -> list[Path]:
    suffixes = (".py", *NATIVE)
    own = (root / "megaforge").is_dir()
    repository = own and (root / "pyproject.toml").is_file()  # else an installed package, among others
    folders = _OF_REPOSITORY if repository else ("megaforge",)
    tops = [root / name for name in folders if (root / name).is_dir()] if own else [root]
    found = [path for path in root.iterdir() if path.suffix == ".py"] if repository else []
    for top in tops:
        for folder, inner, names in os.walk(top):
            inner[:] = [name for name in inner if name not in _LEFT_OUT and not name.startswith(".")]
            found += [Path(folder, name) for name in names if name.endswith(suffixes)]
    return sorted(found)
