#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Sets everything up and runs the demo. Arguments go to `vllm-redrafter demo` (try --help).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/scripts/install.sh"
unset PYTHONPATH PYTHONHOME
exec "${VLLM_REDRAFTER_VENV:-$root/.venv}/bin/vllm-redrafter" demo "$@"
