"""The built page is that of the sources, and of nothing else."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path

from megaforge.dashboard.app import STATIC
from tests.end_to_end.launch import REPO

SOURCES = REPO / "dashboard"
REMEDY = "build the page: cd dashboard && npm ci && npm run build"


def digests(folder: Path, files: list[Path]) -> dict[str, str]:
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_page_was_built_of_these_sources() -> None:
    note = json.loads((STATIC / "BUILD.json").read_text())
    sources = [*SOURCES.glob("*.html"), *SOURCES.glob("*.json"), *SOURCES.glob("*.ts"), *SOURCES.glob("src/*")]
    assert note["sources"] == digests(SOURCES, sources), REMEDY
    built = [file for file in STATIC.iterdir() if file.name != "BUILD.json"]
    assert note["built"] == digests(STATIC, built), REMEDY


def test_users_get_the_page_without_node_and_its_licenses() -> None:
    with (REPO / "pyproject.toml").open("rb") as file:
        packaged = tomllib.load(file)["tool"]["setuptools"]["package-data"]["megaforge.dashboard"]
    assert packaged == ["static/*"] and all(file.is_file() for file in STATIC.iterdir())
    licenses = (STATIC / "licenses.md").read_text()
    assert all(name in licenses for name in ("react", "react-dom", "uplot", "Permission is hereby granted"))
    assert sum(file.stat().st_size for file in STATIC.iterdir()) < 500_000
