# SPDX-License-Identifier: Apache-2.0
"""The hook table against vLLM's sources as text: nothing is imported, so any wheel will do.

``compat.check_hooks`` asks the vLLM that is installed. This asks a folder that holds the package
folder ``vllm``, for instance an unpacked CUDA wheel on a machine without a GPU, and sees more: the
attributes that methods assign, and the exact signatures, which ``extract`` writes down so that a
test can compare versions without their wheels.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm_redrafter.engine.compat import Hook

Function = ast.FunctionDef | ast.AsyncFunctionDef
# A name may be imported from where it is imported from again; nothing sane goes deeper.
MOST_STEPS = 20


class SourceError(ValueError):
    """A folder that does not hold vLLM's sources."""


@dataclass(frozen=True)
class Symbol:
    """A definition: ``node`` is None for a module."""

    module: str
    node: ast.stmt | None


class VllmSource:
    """The sources of one vLLM.

    Args:
        root: the folder that holds the package folder ``vllm``.

    Raises:
        SourceError: it does not.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        if not (root / "vllm" / "__init__.py").is_file():
            raise SourceError(
                f"'{root}' does not hold vLLM's sources; give the folder that a wheel of vLLM was "
                "unpacked into, the one with vllm/__init__.py in it."
            )
        self._trees: dict[str, ast.Module | None] = {}

    def version(self) -> str:
        """The version that the sources say, without a local part such as ``+cpu``; '' if none."""
        tree = self.tree("vllm._version")
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                if any(getattr(target, "id", "") == "__version__" for target in node.targets):
                    return str(node.value.value).split("+")[0]
        return ""

    # -- looking things up -----------------------------------------------------------------

    def tree(self, module: str) -> ast.Module | None:
        """The syntax tree of a module; None if there is no such file."""
        if module not in self._trees:
            path = self._path(module)
            self._trees[module] = ast.parse(path.read_text(encoding="utf-8")) if path else None
        return self._trees[module]

    def _path(self, module: str) -> Path | None:
        base = self.root.joinpath(*module.split("."))
        for path in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
            if path.is_file():
                return path
        return None

    def find(self, where: str) -> Symbol | str:
        """The definition that ``module:qualname`` names, or what is missing, in words."""
        module, _, qualname = where.partition(":")
        if self.tree(module) is None:
            return f"no module '{module}'"
        first, *rest = qualname.split(".")
        found = self._name(module, first)
        if found is None:
            return f"no '{first}' in '{module}'"
        for part in rest:
            inner = self.member(found, part)
            if inner is None:
                return f"no '{part}' in '{found.module}'"
            found = inner
        return found

    def _name(self, module: str, name: str, steps: int = 0) -> Symbol | None:
        """A name of a module's top level, through imports and plain aliases."""
        tree = self.tree(module)
        if tree is None or steps > MOST_STEPS:
            return None
        fallback = None
        for node in statements(tree.body):
            if isinstance(node, ast.ClassDef | Function) and node.name == name:
                if not is_overload(node):
                    return Symbol(module, node)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        found = self._imported(self._absolute(module, node), alias.name, steps)
                        fallback = found or fallback or Symbol(module, node)
            elif isinstance(node, ast.Assign | ast.AnnAssign) and name in assigned(node):
                value = node.value
                if isinstance(value, ast.Name) and value.id != name:
                    return self._name(module, value.id, steps + 1) or Symbol(module, node)
                fallback = fallback or Symbol(module, node)
        return fallback

    def _imported(self, module: str, name: str, steps: int) -> Symbol | None:
        found = self._name(module, name, steps + 1)
        if found is None and self.tree(f"{module}.{name}") is not None:
            return Symbol(f"{module}.{name}", None)
        return found

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        path = self._path(module)
        parts = module.split(".")
        up = node.level - 1 if path is not None and path.name == "__init__.py" else node.level
        return ".".join([*parts[: len(parts) - up], *filter(None, [node.module])])

    def member(self, symbol: Symbol, name: str) -> Symbol | None:
        """An attribute of what ``symbol`` is: of a class, of an instance, or of a module."""
        if symbol.node is None:
            return self._name(symbol.module, name)
        instance_of = None
        if isinstance(symbol.node, ast.AnnAssign):  # ``thing: Class``
            instance_of = ast.unparse(symbol.node.annotation).strip("\"'")
        elif isinstance(symbol.node, ast.Assign) and isinstance(symbol.node.value, ast.Call):
            instance_of = ast.unparse(symbol.node.value.func)  # ``thing = Class(...)``
        if instance_of is not None:
            owner = self._name(symbol.module, instance_of)
            return self.member(owner, name) if owner else None
        for owner in self.classes(symbol):
            for node in statements(owner.node.body):
                if isinstance(node, ast.ClassDef | Function) and node.name == name:
                    if not is_overload(node):
                        return Symbol(owner.module, node)
                elif isinstance(node, ast.Assign | ast.AnnAssign) and name in assigned(node):
                    return Symbol(owner.module, node)
        return None

    def classes(self, symbol: Symbol) -> Iterator[Any]:
        """A class and its bases inside vLLM, depth first."""
        if not isinstance(symbol.node, ast.ClassDef):
            return
        yield symbol
        for base in symbol.node.bases:
            plain = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(plain, ast.Name):
                owner = self._name(symbol.module, plain.id)
                if owner is not None and owner != symbol:
                    yield from self.classes(owner)

    # -- describing them -------------------------------------------------------------------

    def parameters(self, symbol: Symbol) -> list[str] | None:
        """A signature as ``["a", "b=", "*", "c"]`` (``=``: has a default); None if not callable."""
        node = symbol.node
        if isinstance(node, ast.ClassDef):
            init = self.member(symbol, "__init__")
            return self.parameters(init)[1:] if init else []
        if not isinstance(node, Function):
            return None
        spec, out = node.args, []
        plain = [*spec.posonlyargs, *spec.args]
        first_default = len(plain) - len(spec.defaults)
        for i, argument in enumerate(plain):
            out.append(argument.arg + ("=" if i >= first_default else ""))
        if spec.vararg:
            out.append(f"*{spec.vararg.arg}")
        elif spec.kwonlyargs:
            out.append("*")
        for argument, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
            out.append(argument.arg + ("=" if default is not None else ""))
        if spec.kwarg:
            out.append(f"**{spec.kwarg.arg}")
        return out

    def fields(self, symbol: Symbol) -> list[str]:
        """What a class and its bases declare with a type, in order."""
        return list(
            dict.fromkeys(
                node.target.id
                for owner in self.classes(symbol)
                for node in statements(owner.node.body)
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            )
        )

    def attributes(self, symbol: Symbol) -> set[str]:
        """What an instance can have: methods, class variables, and all that is put on ``self``."""
        names = set()
        for owner in self.classes(symbol):
            for node in statements(owner.node.body):
                if isinstance(node, ast.ClassDef | Function):
                    names.add(node.name)
                elif isinstance(node, ast.Assign | ast.AnnAssign):
                    names |= assigned(node)
            for node in ast.walk(owner.node):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    if isinstance(node.value, ast.Name) and node.value.id == "self":
                        names.add(node.attr)
        return names

    # -- the table -------------------------------------------------------------------------

    def describe(self, hook: Hook) -> dict[str, Any] | str:
        """What the sources say about one hook, as JSON; or what is missing, in words."""
        found = self.find(hook.where)
        if isinstance(found, str):
            return found
        entry: dict[str, Any] = {"kind": kind(found)}
        parameters = self.parameters(found)
        if parameters is not None:
            entry["parameters"] = ", ".join(parameters)
        if hook.fields:
            entry["fields"] = " ".join(self.fields(found))
        if hook.attributes:
            entry["attributes"] = " ".join(sorted(self.attributes(found)))
        return entry

    def extract(self, hooks: tuple[Hook, ...]) -> dict[str, Any]:
        """All that ``check_description`` needs, for every hook that is there."""
        described = {hook.where: self.describe(hook) for hook in hooks}
        return {where: entry for where, entry in described.items() if not isinstance(entry, str)}

    def check(self, hook: Hook) -> str | None:
        """What is wrong with one hook, or None."""
        entry = self.describe(hook)
        return f"missing ({entry})" if isinstance(entry, str) else check_description(hook, entry)


def check_description(hook: Hook, entry: dict[str, Any]) -> str | None:
    """What is wrong with a hook that ``VllmSource.describe`` described, or None.

    Parameters must be there in the table's order, because some are passed by place.
    """
    if hook.parameters:
        if "parameters" not in entry:
            return "cannot be called"
        have = [name.strip("*=") for name in entry["parameters"].split(", ")]
        lost = [name for name in hook.parameters if name not in have]
        if lost:
            return f"has no parameter {lost[0]!r}"
        places = [have.index(name) for name in hook.parameters]
        if places != sorted(places):
            return f"takes its parameters in another order: {entry['parameters']}"
    for what, names in (("field", hook.fields), ("attribute", hook.attributes)):
        have = entry.get(f"{what}s", "").split()
        lost = [name for name in names if name not in have]
        if lost:
            return f"has no {what} {lost[0]!r}"
    return None


def kind(symbol: Symbol) -> str:
    """ "module", "class", "function", "property" or "value"."""
    if symbol.node is None:
        return "module"
    if isinstance(symbol.node, ast.ClassDef):
        return "class"
    if isinstance(symbol.node, Function):
        decorators = {ast.unparse(d) for d in symbol.node.decorator_list}
        return "property" if decorators & {"property", "cached_property"} else "function"
    return "value"


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """A block's statements, and those inside its ``if``, ``try`` and ``with``."""
    for node in body:
        yield node
        for inner in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from statements(getattr(node, inner, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from statements(handler.body)


def assigned(node: ast.Assign | ast.AnnAssign) -> set[str]:
    """Names that a statement assigns or declares."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    flat = [
        name
        for target in targets
        for name in (target.elts if isinstance(target, ast.Tuple) else [target])
    ]
    return {name.id for name in flat if isinstance(name, ast.Name)}


def is_overload(node: ast.stmt) -> bool:
    """A signature for type checkers only."""
    return any(
        ast.unparse(decorator).split(".")[-1] == "overload"
        for decorator in getattr(node, "decorator_list", ())
    )


@lru_cache(maxsize=1)
def installed() -> VllmSource:
    """The sources of the vLLM that ``import vllm`` would take.

    Raises:
        SourceError: there is none.
    """
    import importlib.util

    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SourceError("vLLM is not installed; install it or put its folder on PYTHONPATH.")
    return VllmSource(Path(spec.origin).parents[1])
