# SPDX-License-Identifier: Apache-2.0
"""Measuring: what `vllm-redrafter bench`, the demo and the scripts in `benchmarks` have in common.

Modules, from the engines up: `engine_process` (one vLLM in a process of its own), `engines` (those
of a comparison), `own_counters`, `machine`, `energy`; `variants` (what is compared), `compare`
(engines take turns on the same prompts), `batches` (at several batch sizes), `server` and `rates`
(request rates through `vllm serve`); `models`, `prompts` (what is asked), `progress`; `figures`,
`recommend`, `markdown`, `plots` (what is said about it), `run` (all of it); `report` (the demo's
table), `serve_settings` (what `scripts/serve.sh` sets).
"""
