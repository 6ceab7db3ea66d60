#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets everything up and runs the tests that need neither a GPU nor long. Arguments go to pytest;
# a -m of yours replaces the default one.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/scripts/install.sh" test train docs
cd "$root"
unset PYTHONPATH PYTHONHOME
exec "${VLLM_REDRAFTER_VENV:-$root/.venv}/bin/python" -m pytest -q -m "not slow and not gpu" "$@"
