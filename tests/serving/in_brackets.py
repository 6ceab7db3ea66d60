# SPDX-License-Identifier: Apache-2.0
"""A plugin for `vllm serve`: a reasoning parser whose marks are single bytes."""

from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser


@ReasoningParserManager.register_module("in-brackets")
class InBrackets(BaseThinkingReasoningParser):
    start_token, end_token = "<", ">"
