# SPDX-License-Identifier: Apache-2.0
"""How much a lookup follows; importable without torch."""

# Occurrences that are followed, and how far.
MAX_CHAINS = 4
MAX_DEPTH = 16
