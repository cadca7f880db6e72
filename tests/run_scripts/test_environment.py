"""The functions of run_scripts/environment.sh: which torch is taken, and what a GPU machine gets besides."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def bash(program: str, *arguments: str, path: str = "/usr/bin:/bin") -> subprocess.CompletedProcess[str]:
    source = f'source "{ROOT}/run_scripts/environment.sh"\n{program}'
    return subprocess.run(
        ["bash", "-c", source, "bash", *arguments], capture_output=True, text=True, env={"PATH": path}, timeout=300
    )


def test_scripts_and_package_accept_the_same_torch() -> None:
    """A torch that the script takes and pip then replaces would break a GPU image."""
    versions = (
        *("2.10.0", "2.10.9a0", "2.11.0.dev20260101", "2.11.0a0", "2.11.0", "2.11.1", "2.12.0a0", "2.12.0", "2.13.0"),
        *("2.13.1rc1", "2.14.0", "2.14.0a0", "2.1.0", "3.0.0", ""),
    )
    with (ROOT / "pyproject.toml").open("rb") as file:
        needs = [Requirement(line) for line in tomllib.load(file)["project"]["dependencies"]]
    package = next(need for need in needs if need.name == "torch")
    done = bash('for version in "$@"; do suitable_torch "$version" && echo "$version"; done; true', *versions)
    accepted = done.stdout.split()
    assert accepted == [v for v in versions if v and package.specifier.contains(v, prereleases=True)]
    assert "2.11.0a0" in accepted and package.specifier.contains("2.11.0a0+1234.nv26.1", prereleases=True)


@pytest.mark.parametrize("gpu", [True, False])
def test_a_gpu_machine_gets_the_extra_gpu_without_dependencies(tmp_path: Path, gpu: bool) -> None:
    nvidia_smi, python = tmp_path / "nvidia-smi", tmp_path / "python"
    nvidia_smi.write_text(f"#!/bin/sh\nexit {0 if gpu else 9}\n")  # without a driver it fails
    # Reads pyproject.toml as Python does, and writes down what pip is asked for.
    python.write_text(f'#!/bin/sh\n[ "$1" = - ] && exec {sys.executable} "$@"\necho "$@"\n')
    for file in (nvidia_smi, python):
        file.chmod(0o755)
    done = bash(f'PYTHON="{python}"; install_gpu_extra', path=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    expected = "-m pip install -q --no-deps fla-core>=0.6,<0.7 einops>=0.8\n"
    assert done.stdout == (expected if gpu else "")


def test_a_machine_that_cannot_have_the_extra_goes_on(tmp_path: Path) -> None:
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text("#!/bin/sh\n")
    nvidia_smi.chmod(0o755)
    done = bash("set -e; PYTHON=false; install_gpu_extra; echo on", path=f"{tmp_path}:/usr/bin:/bin")
    assert done.stdout == "on\n" and "left out" in done.stderr
