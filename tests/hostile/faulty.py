# SPDX-License-Identifier: Apache-2.0
"""A worker extension whose drafting fails now and then: `vllm serve --worker-extension-cls`."""

from __future__ import annotations

from typing import Any

from engine_cases.faults import Fault


class FaultyDrafting:
    """Mixed into the worker; the client asks for it over vLLM's `/collective_rpc`."""

    def inject_faults(self, percent: str) -> str:
        """Let that share of the calls fail at every place of drafting."""
        from vllm_redrafter.engine.v1 import drafting

        runner: Any = self.model_runner  # type: ignore[attr-defined]
        seams = (
            (runner.drafter, "draft"),
            (drafting, "suffix_lookup"),
            (drafting, "choose_tree"),
            (runner._drafting._planner, "plan"),
        )
        for seed, (owner, name) in enumerate(seams):
            fault = Fault(getattr(owner, name), share=float(percent) / 100, seed=seed)
            setattr(owner, name, fault)
        return ", ".join(name for _, name in seams)
