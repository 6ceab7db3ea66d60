# SPDX-License-Identifier: Apache-2.0
"""CUDA builds of torch from PyPI, installed beside the environment, and what runs under them."""
