# SPDX-License-Identifier: Apache-2.0
"""What vLLM needs to run Model Runner V2 in Triton's interpreter; a vLLM plugin, for tests only.

As a plugin it reaches the processes that vLLM starts too. Where plugins are switched off, whoever
needs it calls `apply`.
"""

from __future__ import annotations

import functools
import inspect


@functools.cache
def apply() -> None:
    """Change vLLM and the interpreter, once per process."""
    from vllm.v1.sample.ops import topk_topp_sampler

    # A Triton kernel that the interpreter cannot run; its PyTorch form is exact too.
    topk_topp_sampler.HAS_TRITON = False
    _keep_async_scheduling()
    _take_integer_masks()


def _keep_async_scheduling() -> None:
    """vLLM switches it off on CPUs; on GPUs it is the default, and V2 is made for it."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config):
        wanted = vllm_config.scheduler_config.async_scheduling
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = bool(wanted)

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def _take_integer_masks() -> None:
    """vLLM's grammar kernel stores with an integer mask, which the interpreter refuses."""
    from triton.runtime.interpreter import InterpreterBuilder

    for name in ("create_masked_load", "create_masked_store"):
        original = getattr(InterpreterBuilder, name)
        at = list(inspect.signature(original).parameters).index("mask") - 1

        def masked(self, *args, _original=original, _at=at):
            args[_at].data = args[_at].data.astype(bool)
            return _original(self, *args)

        setattr(InterpreterBuilder, name, masked)
