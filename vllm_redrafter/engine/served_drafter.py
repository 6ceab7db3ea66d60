# SPDX-License-Identifier: Apache-2.0
"""``vllm serve DRAFTER_DIR``: a drafter in the target's place serves the target that it names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vllm_redrafter.drafter.config import MODEL_TYPES, model_type_of, read_json
from vllm_redrafter.options import OptionError, is_method

logger = logging.getLogger("vllm.vllm_redrafter")


def is_drafter(model: Any) -> bool:
    """Whether ``model`` is a local drafter's directory."""
    return bool(model) and model_type_of(str(model)) in MODEL_TYPES


def asked_by_model(model: str, given: dict[str, Any]) -> dict[str, Any] | None:
    """The speculative_config that serving ``model`` means; None if it is no drafter.

    Args:
        given: the user's speculative_config, which may be empty.

    Raises:
        OptionError: a drafter, and ``given`` asks for another one or for another method.
    """
    if not is_drafter(model):
        return None
    method, drafter = given.get("method"), given.get("model")
    if (method is not None and not is_method(method)) or (
        drafter and Path(str(drafter)).resolve() != Path(model).resolve()
    ):
        raise OptionError(
            f"'{model}' is a drafter, not a target, and speculative_config asks for another one; "
            "give the target's directory or name as the model to serve."
        )
    return {**given, "model": model}


def named_target(drafter: str) -> str:
    """The target of a drafter's directory: a directory, or a name on the hub.

    ``target`` of config.json may be a directory, the name of one beside the drafter's, or
    ``owner/name``.

    Raises:
        OptionError: none is named, or there is none of that name.
    """
    name = read_json(Path(drafter) / "config.json").get("target")
    cure = (
        f"run `vllm serve TARGET --speculative-config '{{\"model\": \"{drafter}\"}}'`, with the "
        "target's directory or name."
    )
    if not isinstance(name, str) or not name:
        raise OptionError(
            f"'{drafter}' is a drafter, not a target, and its config.json does not name its "
            f"target: {cure}"
        )
    for place in (Path(name), Path(drafter).resolve().parent / name):
        if (place / "config.json").is_file() and not is_drafter(place):
            return str(place)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise OptionError(
        f"'{drafter}' is a drafter, not a target, and its target '{name}' was not found here or "
        f"beside it: {cure}"
    )


def serve_named_target(engine_args: Any, drafter: str) -> None:
    """Put the drafter's target in its place."""
    engine_args.model = named_target(drafter)
    logger.info("Serving '%s' with the drafter '%s'.", engine_args.model, drafter)
