"""Each rule on code that keeps it and code that does not, counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaforge.compliance import allocation, checks, flow, gates, native, native_rules, scope, tools
from megaforge.compliance.code import Code, read_code
from megaforge.compliance.measure import Measure
from megaforge.errors import UserError
from megaforge.registry import COMPLIANCE_GATES, COMPLIANCE_RULES


def code_of(folder: Path, **files: str) -> Code:
    """Code of files by their name, ``a_py`` for ``a.py``."""
    for name, text in files.items():
        (folder / ".".join(name.rsplit("_", 1))).write_text(text, encoding="utf-8")
    return read_code(folder)


def found(measure: Measure) -> list[str]:
    return [finding.text for finding in measure.findings]


RECURSIVE = """
from b import other
def direct(n: int) -> int:
    return direct(n - 1)
def first() -> None:
    other()
def plain(direct: object) -> None:
    def inner() -> None:
        inner_most()
    def inner_most() -> None:
        pass
    direct()
class A:
    def up(self) -> None:
        self.down()
    def down(self) -> None:
        self.up()
    def first(self) -> None:
        first()
"""


def test_recursion_is_found_through_modules_methods_and_imports(tmp_path: Path) -> None:
    measure = flow.recursion(
        code_of(tmp_path, a_py=RECURSIVE, b_py="from a import first\ndef other() -> None:\n    first()\n")
    )
    assert sorted(text.split()[0] for text in found(measure)) == ["A.down", "A.up", "direct", "first", "other"]
    assert (measure.applicable, measure.compliant) == (9, 4) and measure.findings[0].place == "a.py:3"


def test_loops_without_an_end_are_found(tmp_path: Path) -> None:
    source = "import itertools\nwhile True:\n    break\nwhile 0:\n    pass\nfor i in itertools.count():\n    break\n"
    native_source = "int f() { for (;;) { } while (true) { } for (int i = 0; i < 3; ++i) { } // for(;;)\n return 0; }"
    measure = flow.bounded_loops(code_of(tmp_path, a_py=source + "for i in (1,): pass\n", b_cpp=native_source))
    assert (measure.applicable, measure.compliant) == (7, 3)
    assert [finding.place for finding in measure.findings] == ["a.py:2", "a.py:6", "b.cpp:1", "b.cpp:1"]


def test_a_function_of_61_lines_is_too_long(tmp_path: Path) -> None:
    body = "    pass\n" * 59
    measure = flow.short_functions(code_of(tmp_path, a_py=f"def f():\n{body}", b_py=f"def g():\n{body}    pass\n"))
    assert found(measure) == ["g has 61 lines"] and measure.applicable == 2


LONG = "    x = 1\n" * 9


def test_checks_are_counted_and_tautologies_are_not(tmp_path: Path) -> None:
    two = "def two(x: int) -> None:\n    assert x > 0\n    if x > 5:\n        raise ValueError\n" + LONG
    called = "def called(x: int) -> None:\n    check_range(x)\n    self.require(x)\n" + LONG
    always = "def always(self, x):\n    assert True\n    assert self is not None\n" + LONG
    always += "    assert x == x\n    assert (x, 'said')\n"
    either = "def either(x):\n    assert x or 1\n    assert 1 or x\n    assert x() == x()\n" + LONG
    nested = "def nested(x):\n    def inner():\n        assert x\n        assert not x\n    y = x\n" + LONG
    small = "def small(x):\n    return x\n"
    # The lines of a function within are its own, as its checks are.
    indented = "".join(f"    {line}\n" for line in two.splitlines())
    around = f"def around(x):\n{indented}    return two\n"
    code = code_of(tmp_path, a_py=two + called + always + either + nested + small, b_py=around)
    measure = checks.assertion_density(code)
    assert measure.applicable == 6 and measure.note.startswith("9 checks in 9 functions")
    assert [text.split(":")[0] for text in found(measure)] == ["always", "either", "nested"]
    (outer,) = [function for _, function in code.functions if function.name == "around"]
    assert outer.body_lines == 2


def test_types_and_dropped_results(tmp_path: Path) -> None:
    source = """
def gives() -> int:
    return 1
def generic(run) -> T:
    return run()
def nothing() -> None: ...
class A:
    def typed(self, x: int, *rest: int, key: str = "") -> None:
        nothing()
        generic(3)
        print(gives())
    @staticmethod
    def untyped(x) -> None: ...
    def dropping(self) -> None:
        gives()
        self.own()
    def own(self) -> bool: ...
    def check(self) -> bool: ...
    def checking(self) -> None:
        self.check()
@triton.jit
def kernel(x_ptr, WIDTH):
    gives()
"""
    measure = checks.heeded(code_of(tmp_path, a_py=source))
    assert found(measure) == [
        "generic: no type of run",
        "A.untyped: no type of x",
        "A.dropping drops what gives gives (line 15)",
    ]
    assert (measure.applicable, measure.compliant) == (9, 6)


def test_names_that_functions_change(tmp_path: Path) -> None:
    source = """
A, B = 1, []
C: dict = {}
D = []
E = []
def f(D):
    global A
    A = 2
    B.append(1)
    C["x"] = 1
    D.append(1)
    E = []
    E.append(2)
    return A
"""
    measure = scope.small_scopes(code_of(tmp_path, a_py=source))
    assert sorted(found(measure)) == ["f binds A anew", "f changes B", "f changes C"] and measure.applicable == 5


NATIVE = """#pragma once
#include <vector>
#define SIZE 3
#define PASTE(a, b) a##b  // text
#define LOG(...) f(__VA_ARGS__)
#ifdef __CUDACC__
#define LONG \\
    2
#endif
int plain(int x) { return x; }  // a->b->c
int itself(int x) { return x ? itself(x - 1) : 0; }
int overload(int x) { return overload(x, 1) + other::overload(x); }
int chain(Node* n) { return n->next->value; }
int two(int** rows) { return rows[0][1]; }
int jumps() { again: goto again; }
void call(int (*function)(int)) { function(1); }
"""


def test_rules_of_native_code(tmp_path: Path) -> None:
    pytest.importorskip("lizard")
    code = code_of(tmp_path, a_cuh=NATIVE)
    directives = native_rules.preprocessor(code)
    assert (directives.applicable, directives.compliant) == (6, 3)
    assert [finding.place for finding in directives.findings] == ["a.cuh:4", "a.cuh:5", "a.cuh:6"]
    pointed = native_rules.pointers(code)
    assert {text.split(":")[0] for text in found(pointed)} == {"chain", "two", "call"} and pointed.applicable == 7
    assert found(flow.recursion(code)) == ["itself calls itself", "jumps has a goto"]


def test_what_is_not_there_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = code_of(tmp_path, a_py="X = 1\n", b_cpp="int f() { return 1; }\n")
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(tools.importlib.util, "find_spec", lambda name: None)
    assert native_rules.pointers(code).share is None and "lizard" in native_rules.pointers(code).note
    assert tools.clean_files(code).share is None and "compliance" in tools.clean_files(code).note
    assert allocation.of_code(code).share is None
    (tmp_path / "b.cpp").unlink()
    assert native_rules.preprocessor(read_code(tmp_path)).share is None


def test_warnings_and_waivers(tmp_path: Path) -> None:
    bad = "import os\n\n\ndef f(x: int) -> str:\n    return x\n"
    waived = 'X = "# noqa: in a text"\nY: int = "1"  # type: ignore[assignment]\n'
    code = code_of(tmp_path, bad_py=bad, waived_py=waived, good_py="Z = 1\n", c_cpp="int x;  // NOLINT(readability)\n")
    measure = tools.clean_files(code)
    assert (measure.applicable, measure.compliant) == (4, 1)
    texts = found(measure)
    assert any("ruff F401" in text for text in texts) and any("mypy: Incompatible return" in text for text in texts)
    assert [one.place for one in tools.waivers(code)] == ["waived.py:2", "c.cpp:1"]
    assert gates.NO_WARNING.find(code) == tools.warnings(code)[0] and len(tools.warnings(code)[0]) == 2


def test_gates(tmp_path: Path) -> None:
    source = """
from contextlib import suppress
try:
    f()
except Exception:
    pass
try:
    f()
except (ValueError, BaseException):
    "said"
try:
    f()
except:
    continue_()
try:
    f()
except ValueError:
    pass
with suppress(Exception):
    f()
with suppress(OSError):
    f()
eval("1")
model.eval()
exec(text)
"""
    code = code_of(tmp_path, a_py=source)
    assert [one.place for one in gates.swallowed(code)] == ["a.py:5", "a.py:9", "a.py:19"]
    assert [one.place for one in gates.evaluated(code)] == ["a.py:23", "a.py:25"]


def test_memory_must_not_rise_behind_the_warm_up(tmp_path: Path) -> None:
    def of(*values: float) -> Measure:
        return allocation.of_peaks([(10 * number, value) for number, value in enumerate(values, 1)])

    assert of(1, 5, 5, 5.0001).share == 1 and of(1, 2).share is None and of().share is None
    rising = of(100, 100, 102, 102, 110)
    assert (rising.applicable, rising.compliant) == (3, 1) and rising.findings[0].place == "iteration 30"
    lines = [f'{{"kind": "step", "iteration": {n}, "peak_memory_bytes": {b}}}' for n, b in ((1, 9), (2, 9), (3, 12))]
    (tmp_path / "m.jsonl").write_text("\n".join([*lines, '{"iteration": 3}', "[1]", '{"ki']))
    measure = allocation.of_run(tmp_path / "m.jsonl")
    assert (measure.applicable, measure.compliant) == (1, 0)
    assert allocation.of_run(None).share is None and allocation.of_run(tmp_path / "none").share is None


@pytest.mark.parametrize(("text", "message"), [("def f(:\n", "this is not Python"), (b"\xff\xfe", "as UTF-8")])
def test_bad_code_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    (tmp_path / "a.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"a.py: .*{message}"):
        read_code(tmp_path)


def test_a_folder_without_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no file of Python"):
        read_code(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        read_code(tmp_path / "none")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "a.py").write_text("")
    (tmp_path / "b.py").write_text("def f() -> None: ...\n")
    assert [module.path for module in read_code(tmp_path).modules] == ["b.py"]
    (tmp_path / "megaforge").mkdir()
    (tmp_path / "megaforge" / "c.py").write_text("")
    assert [module.path for module in read_code(tmp_path).modules] == ["megaforge/c.py"]  # among installed packages
    (tmp_path / "pyproject.toml").write_text("")
    assert [module.path for module in read_code(tmp_path).modules] == ["b.py", "megaforge/c.py"]


def test_every_rule_and_gate_is_registered() -> None:
    rules = [COMPLIANCE_RULES.get(name) for name in COMPLIANCE_RULES.names()]
    assert [rule.number for rule in rules] == list(range(1, 11))
    assert {rule.number for rule in rules if rule.weight == 2} == {5, 7, 10}
    assert len({COMPLIANCE_GATES.get(name).name for name in COMPLIANCE_GATES.names()}) == 3
