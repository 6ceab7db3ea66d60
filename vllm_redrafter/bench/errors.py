# SPDX-License-Identifier: Apache-2.0
"""The exception of `vllm-redrafter bench`."""


class BenchError(ValueError):
    """Something the user can mend; the message is one sentence that says how."""
