# SPDX-License-Identifier: Apache-2.0
"""The one exception of this package, and the sentence for a package that is not installed."""


class TrainingError(ValueError):
    """Something the user can mend; the message is one sentence that says how."""


def missing(package: str, what_for: str, extra: bool = True) -> TrainingError:
    """The error for a package that could not be imported."""
    install = "'vllm-redrafter[train]'" if extra else package
    return TrainingError(f"{what_for} needs the package `{package}`: pip install {install}")
