"""Rule 10: all warnings on, none left, and static analysis: ruff and mypy as the code's own settings have them."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path

from megaforge.compliance.code import Code
from megaforge.compliance.measure import Finding, Measure, Rule, not_measured

MINUTES = 10
_WAIVER = re.compile(r"#\s*(noqa\b|type:\s*ignore|pragma:\s*no cover|ruff:\s*noqa|mypy:|fmt:\s*off).*")
_NATIVE_WAIVER = re.compile(r"NOLINT.*|#\s*pragma\s+(?:(?:GCC|clang)\s+diagnostic\s+ignored|nv_diag_suppress).*")


@functools.lru_cache(maxsize=2)
def warnings(code: Code) -> tuple[list[Finding], list[str]]:
    """What ruff and mypy find, and which of them looked."""
    found: list[Finding] = []
    ran = []
    for name, run in (("ruff", _ruff), ("mypy", _mypy)):
        if importlib.util.find_spec(name) is not None and (findings := run(code)) is not None:
            found += findings
            ran.append(name)
    return found, ran


def _run(code: Code, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=code.root,
        capture_output=True,
        text=True,
        timeout=60 * MINUTES,
        check=False,
    )


def _ruff(code: Code) -> list[Finding] | None:
    done = _run(code, "ruff", "check", "--output-format", "json", "--no-cache", *_targets(code))
    if done.returncode not in (0, 1):
        return None
    return [
        Finding(f"{_relative(code, one['filename'])}:{one['location']['row']}", f"ruff {one['code']}: {one['message']}")
        for one in json.loads(done.stdout)
    ]


def _mypy(code: Code) -> list[Finding] | None:
    settings = code.root / "pyproject.toml"
    own = settings.is_file() and "[tool.mypy]" in settings.read_text(encoding="utf-8")
    done = _run(code, "mypy", "--no-error-summary", *([] if own else _targets(code)))
    if done.returncode not in (0, 1):
        return None
    lines = (re.match(r"(.+?):(\d+): error: (.*)", line) for line in done.stdout.splitlines())
    return [Finding(f"{_relative(code, line[1])}:{line[2]}", f"mypy: {line[3]}") for line in lines if line]


def _targets(code: Code) -> list[str]:
    return [module.path for module in code.modules]


def _relative(code: Code, file: str) -> str:
    path = Path(file)
    return str(path.relative_to(code.root.resolve())) if path.is_absolute() else file


def waivers(code: Code) -> list[Finding]:
    """Comments that silence a tool."""
    found = []
    for module in code.modules:
        for token in tokenize.generate_tokens(io.StringIO(module.source).readline):
            if token.type == tokenize.COMMENT and (waiver := _WAIVER.search(token.string)):
                found.append(Finding(f"{module.path}:{token.start[0]}", waiver[0].strip()))
    for file in code.native:
        for waiver in _NATIVE_WAIVER.finditer(file.source):
            found.append(Finding(f"{file.path}:{file.source.count(chr(10), 0, waiver.start()) + 1}", waiver[0].strip()))
    return found


def clean_files(code: Code) -> Measure:
    """Files in which no tool finds anything, and that silence none."""
    found, ran = warnings(code)
    if not ran:
        return not_measured("files", "neither ruff nor mypy is installed (extra 'compliance'), or they do not run here")
    silenced = [Finding(one.place, f"a waiver: {one.text}") for one in waivers(code)]
    by_file = dict(_by_file([*found, *silenced]))
    files = [module.path for module in code.modules] + [file.path for file in code.native]
    findings = tuple(one for path in files for one in by_file.get(path, []))
    clean = sum(path not in by_file for path in files)
    note = f"by {' and '.join(ran)} with the code's own settings; a waiver counts as a warning ({len(silenced)})"
    return Measure("files", len(files), clean, findings, note)


def _by_file(findings: list[Finding]) -> Iterator[tuple[str, list[Finding]]]:
    grouped: Mapping[str, list[Finding]] = {one.place.rpartition(":")[0]: [] for one in findings}
    for one in findings:
        grouped[one.place.rpartition(":")[0]].append(one)
    yield from grouped.items()


CLEAN = Rule(
    10,
    "all warnings on, none left; static analysis",
    "files with a finding of ruff or mypy, or with a comment that silences one",
    clean_files,
    weight=2,
)
