#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# `vllm serve` with ReDrafter on a small machine without a GPU, after the set-up.
#
#   scripts/serve.sh                                 SmolLM2-135M-Instruct and its drafter
#   scripts/serve.sh TARGET DRAFTER_DIR [FLAG...]    your own; flags are those of `vllm serve`
#
# What it does beyond `vllm serve`: Intel's OpenMP runtime (GNU's threads spin while they wait), a
# thread for each physical core, no compilation (which takes minutes), bfloat16, 1 GiB of KV cache
# instead of a share of the memory, and 16 requests at a time. Your flags come last and win.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/scripts/install.sh"
unset PYTHONPATH PYTHONHOME
bin="${VLLM_REDRAFTER_VENV:-$root/.venv}/bin"

pair=()
if [[ $# -ge 1 && "$1" != -* ]]; then
  [[ $# -ge 2 && "$2" != -* ]] || { echo "error: after the target '$1' give the drafter's directory" >&2; exit 2; }
  pair=("$1" "$2")
  shift 2
fi
settings="$("$bin/python" -m vllm_redrafter.bench.serve_settings "${pair[@]}")"
eval "$settings"
exec "$bin/vllm" serve "$TARGET" --dtype bfloat16 --enforce-eager --max-num-seqs 16 \
  --kv-cache-memory-bytes "$((1 << 30))" --speculative-config "$SPECULATIVE_CONFIG" "$@"
