# SPDX-License-Identifier: Apache-2.0
"""Command-line options and YAML files from the dataclasses of `training.options`."""

import argparse
import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any

from vllm_redrafter.cli import UserError
from vllm_redrafter.reading import one_line, shown


def add_fields(parser: argparse.ArgumentParser, options: type) -> None:
    """Declare one flag for every field, and `--config` for a file with the same names."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help="YAML file with the names below (without --); flags win over it",
    )  # fmt: skip
    for field in dataclasses.fields(options):
        text = field.metadata["help"].replace("%", "%%")
        if field.default is not None and not field.metadata.get("required"):
            shown = field.default
            if isinstance(shown, tuple):
                shown = " ".join(v if isinstance(v, str) else f"{v:g}" for v in shown)
            if isinstance(shown, bool):
                shown = "yes" if shown else "no"
            text += f" (default: {shown})"
        kind, many = _kind(options, field.name)
        # Absent unless given, so that a file's value can stand in its place.
        keywords: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords |= {"type": kind, "metavar": field.name.upper().rsplit("_", 1)[-1]}
            if many:
                keywords["nargs"] = "+"
            if "choices" in field.metadata:
                keywords |= {"choices": field.metadata["choices"], "metavar": None}
        parser.add_argument("--" + field.name.replace("_", "-"), **keywords)


def read_fields(args: argparse.Namespace, options: type) -> Any:
    """The dataclass from the file, if one was given, and the flags.

    Raises:
        UserError: an unreadable file, an unknown name, or a value of the wrong type.
    """
    names = {field.name for field in dataclasses.fields(options)}
    values = _read_yaml(args.config, options) if args.config else {}
    values |= {name: value for name, value in vars(args).items() if name in names}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return options(**values)


def _read_yaml(path: Path, options: type) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise UserError(
            "--config needs the package `pyyaml`: pip install 'vllm-redrafter[train]'"
        ) from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config {path} cannot be read ({one_line(error)}).") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must hold lines of the form `name: value`.")
    names = [field.name for field in dataclasses.fields(options)]
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; see --help for all names."
            raise UserError(f"--config {path} has an unknown name {shown(key)}{hint}")
        values[name] = _converted(value, options, name, path)
    return values


def _converted(value: Any, options: type, name: str, path: Path) -> Any:
    kind, many = _kind(options, name)
    if value is None:
        return None
    try:
        if many:
            return [kind(one) for one in (value if isinstance(value, list) else [value])]
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError
            return value
        # YAML reads 1e-3 as a string: float() takes both. An int must be written as one.
        if isinstance(value, bool) or (kind is int and not isinstance(value, int)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"--config {path}: {name} is {shown(value)}; it must be "
            f"{'a list of ' if many else ''}{kind.__name__}."
        ) from error


def _kind(options: type, name: str) -> tuple[type, bool]:
    """The plain type of a field, and whether it holds several."""
    hint = typing.get_type_hints(options)[name]
    plain = [kind for kind in typing.get_args(hint) if kind not in (type(None), Ellipsis)]
    if typing.get_origin(hint) is tuple:
        return plain[0], True
    return (plain[0] if plain else hint), False
