# SPDX-License-Identifier: Apache-2.0
"""See the README beside this package."""
