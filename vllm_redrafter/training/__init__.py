# SPDX-License-Identifier: Apache-2.0
"""Training a drafter: the target's own answers as data, and distillation from them.

Nothing here is imported when vLLM loads the plugin. The way through it: `prompts` -> `generate`
(the only part that runs vLLM, in processes of its own) -> `data` (shards and manifest) ->
`dataset` (what can be trained on) -> `batches` (positions and their targets) -> `model` and
`losses` -> `train` (with the `defaults` of the target's size). Beside it `answers` -> `evaluate`:
what a finished drafter is worth on recorded answers.
"""
