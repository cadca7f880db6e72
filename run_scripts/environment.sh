# Sourced by the scripts of this folder: gives them a Python with torch and MegaForge in it.
#
#   use_environment EXTRAS     e.g. use_environment data,train
#
# An active environment that already holds a suitable torch (a GPU image, your own venv) is used as it is, its torch
# untouched; otherwise a venv is made in .venv. Running it again changes nothing. Sets $PYTHON and puts it on PATH.
#
# MEGAFORGE_TORCH_INDEX   package index for torch, e.g. https://download.pytorch.org/whl/cpu (default: pip's own)

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# torchrun --max-restarts: ranks that are started again must not read where those before them were (torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Whether MegaForge runs on a torch of this version, as pyproject.toml has it: releases, and alphas that images carry.
suitable_torch() {
    case "$1" in 2.11.*|2.12.*|2.13.*) return 0 ;; *) return 1 ;; esac
}

# Where there is a GPU, what the extra gpu names, except what a CUDA build of torch brings. Without dependencies, which
# could replace torch. Nothing needs it: without it MegaForge's own kernels and torch do the work.
install_gpu_extra() {
    local packages
    command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 || return 0
    mapfile -t packages < <("$PYTHON" - "$REPO/pyproject.toml" <<'PY'
import re, sys, tomllib
with open(sys.argv[1], "rb") as file:
    extra = tomllib.load(file)["project"]["optional-dependencies"]["gpu"]
print(*(package for package in extra if re.split("[^a-z0-9-]", package)[0] != "triton"), sep="\n")
PY
    )
    "$PYTHON" -m pip install -q --no-deps "${packages[@]}" ||
        say "left out: ${packages[*]} could not be installed (RWKV-7 runs on MegaForge's own kernels)"
}

torch_version_of() {
    "$1" -c 'import torch; print(torch.__version__.split("+")[0])' 2>/dev/null
}

use_environment() {
    local extras="$1" active version stamp wanted constraints
    local pins="$REPO/constraints.txt"
    command -v python3 >/dev/null || fail "python3 is not on PATH; install Python 3.11 or newer"
    command -v g++ >/dev/null || fail "g++ is not on PATH; install gcc (Debian: apt-get install build-essential)"
    active="$(command -v python3)"
    version="$(torch_version_of "$active" || true)"
    if suitable_torch "$version"; then
        PYTHON="$active"
        pins="" # what the image has stays as it is
        say "using the active Python ($PYTHON) and its torch $version"
    else
        PYTHON="$REPO/.venv/bin/python"
        if [ ! -x "$PYTHON" ]; then
            say "making a virtual environment in .venv"
            python3 -m venv "$REPO/.venv" || fail "python3 -m venv failed (Debian: apt-get install python3-venv)"
        fi
        export PATH="$REPO/.venv/bin:$PATH"
        version="$(torch_version_of "$PYTHON" || true)"
        if [ "torch==$version" != "$(grep '^torch==' "$REPO/constraints.txt")" ]; then
            say "installing torch (constraints.txt pins $(grep '^torch==' "$REPO/constraints.txt"))"
            "$PYTHON" -m pip install -q -c "$REPO/constraints.txt" ${MEGAFORGE_TORCH_INDEX:+--index-url "$MEGAFORGE_TORCH_INDEX"} torch numpy
            version="$(torch_version_of "$PYTHON")"
        fi
    fi
    wanted="$extras $version $(cat "$REPO/pyproject.toml" "$REPO/setup.py" "$REPO/native_build.py" "$REPO/constraints.txt" | cksum) $(find "$REPO/csrc" -type f -exec cksum {} + | sort | cksum) $REPO"
    stamp="$("$PYTHON" -c 'import sys; print(sys.prefix)')/.megaforge-$(printf '%s' "$extras" | tr ',' '-')"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && "$PYTHON" -c 'import megaforge' 2>/dev/null; then
        say "MegaForge [$extras] is already installed"
        return
    fi
    say "building and installing MegaForge [$extras]"
    constraints="$(mktemp)"
    [ -z "$pins" ] || sed '/^torch==/d' "$pins" >"$constraints"
    echo "torch==$version" >>"$constraints"
    "$PYTHON" -m pip install -q -c "$constraints" "setuptools>=77" wheel pybind11 ninja
    say "$("$PYTHON" "$REPO/native_build.py" 2>/dev/null)" # pip keeps to itself what the build prints
    "$PYTHON" -m pip install -q -c "$constraints" --no-build-isolation -e "$REPO[$extras]"
    install_gpu_extra
    rm -f "$constraints"
    { printf '%s' "$wanted" >"$stamp"; } 2>/dev/null || true
}
