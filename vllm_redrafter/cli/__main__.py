# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_redrafter.cli`, for an environment whose scripts are not on the PATH."""

import sys

from vllm_redrafter.cli import main

sys.exit(main())
