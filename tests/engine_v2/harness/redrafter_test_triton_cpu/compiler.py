# SPDX-License-Identifier: Apache-2.0
"""A compiler that is never asked to compile."""

from triton.backends import compiler as base


class NoCompiler(base.BaseBackend):
    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "none"

    def parse_options(self, options):
        return options

    def add_stages(self, stages, options, language):
        raise NotImplementedError("set TRITON_INTERPRET=1")

    def load_dialects(self, context):
        pass

    def get_module_map(self):
        return {}


del base
