# SPDX-License-Identifier: Apache-2.0
"""Runs the PTX that nvcc makes of csrc/cuda on the CPU, checks every access and counts.

``parse``: text to instructions; ``memory``: bounds, alignment, races; ``instructions``: what each
one does; ``machine``: a grid of blocks; ``operators``: the launches of the project's operators.
"""
