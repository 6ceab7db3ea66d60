# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM calls in every process (group ``vllm.general_plugins``)."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.vllm_redrafter")


def register() -> None:
    """Teach ``EngineArgs`` the method ``redrafter``; change nothing else.

    vLLM runs this in the front end, the engine core and every worker, possibly several times, for
    users who never asked for ReDrafter too: so it is idempotent, cheap, and never raises.
    """
    try:
        from vllm_redrafter.engine.engine_args import install

        install()
    except Exception:
        logger.exception(
            "vllm-redrafter could not register itself and is not available in this process; run "
            "`vllm-redrafter doctor` to see why. Everything else in vLLM is unaffected."
        )
