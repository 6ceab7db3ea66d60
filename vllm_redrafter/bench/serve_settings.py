# SPDX-License-Identifier: Apache-2.0
"""What `scripts/serve.sh` sets before it starts `vllm serve`, as lines for a shell.

python -m vllm_redrafter.bench.serve_settings [TARGET DRAFTER_DIR]
"""

import json
import shlex
import sys

from vllm_redrafter.bench.engines import default_threads, openmp_environment
from vllm_redrafter.bench.variants import BUNDLED_DRAFTER, redrafter_config
from vllm_redrafter.demo.target import smollm2


def lines(target: str | None, drafter: str | None) -> list[str]:
    """Environment variables, and TARGET and SPECULATIVE_CONFIG.

    Args:
        target: of `vllm serve`; None for SmolLM2-135M-Instruct, downloaded once.
        drafter: its drafter; None for the one in this package.
    """
    spec = redrafter_config(drafter or BUNDLED_DRAFTER)
    exported = {**openmp_environment(), "OMP_NUM_THREADS": str(default_threads())}
    own = {"TARGET": target or str(smollm2()), "SPECULATIVE_CONFIG": json.dumps(spec)}
    return [f"export {name}={shlex.quote(value)}" for name, value in exported.items()] + [
        f"{name}={shlex.quote(value)}" for name, value in own.items()
    ]


if __name__ == "__main__":
    given = sys.argv[1:3]
    print("\n".join(lines(*given) if len(given) == 2 else lines(None, None)))
