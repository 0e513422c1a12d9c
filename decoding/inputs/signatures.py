"""What a dataclass takes, read from its source: a mistyped decoder is answered at once, not after seconds of imports.

Nothing is imported and nothing is run. Of ``__post_init__`` the checks are read that stand there without a condition,
such as ``check_count("block_size", self.block_size, 2)``; what else it asks shows when the class is used.
"""

import ast
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import decoding.inputs.checks as checks


@dataclass(frozen=True)
class Signature:
    """What a dataclass says of itself.

    defaults: of its fields in order, None where a field has none. checks: (name of a function of decoding/inputs/checks.py, its
    arguments). module: where it is defined.
    """

    defaults: Mapping[str, ast.expr | None]
    checks: tuple[tuple[str, tuple[ast.expr, ...]], ...]
    module: str

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(self.defaults)

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise the ValueError that an instance with these values of its fields would raise, as far as one can tell."""
        for function, arguments in self.checks:
            try:
                read = [self._value(argument, values) for argument in arguments]
            except (KeyError, ValueError):  # a field that was not given, or no plain value
                continue
            getattr(checks, function)(*read)

    def _value(self, argument: ast.expr, values: Mapping[str, Any]) -> Any:
        match argument:
            case ast.Attribute(value=ast.Name(id="self"), attr=field):
                return values[field]
            case ast.Name(id=name):
                return ast.literal_eval(_constant(self.module, name))
        return ast.literal_eval(argument)


def signature_of(module: str, name: str) -> Signature | None:
    """The signature of class ``name``, which ``module`` defines or imports; None where there is no source to read."""
    found = _find(module, name)
    if found is None:
        return None
    home, defined = found
    defaults: dict[str, ast.expr | None] = {}
    asked: tuple[tuple[str, tuple[ast.expr, ...]], ...] = ()
    for base in defined.bases:
        inherited = signature_of(home, base.id) if isinstance(base, ast.Name) else None
        if inherited is not None:
            defaults |= inherited.defaults
    is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in defined.decorator_list)
    for statement in defined.body if is_dataclass else ():
        match statement:
            case ast.AnnAssign(target=ast.Name(id=field), annotation=kind) if "ClassVar" not in ast.unparse(kind):
                defaults[field] = statement.value
            case ast.FunctionDef(name="__post_init__", body=body):
                asked = tuple(_unconditional_checks(body))
    return Signature(defaults, asked, home)


def _unconditional_checks(body: list[ast.stmt]) -> Iterator[tuple[str, tuple[ast.expr, ...]]]:
    for statement in body:
        match statement:
            case ast.Expr(value=ast.Call(func=ast.Name(id=function), args=arguments, keywords=[])):
                if function.startswith("check_") and hasattr(checks, function):
                    yield function, tuple(arguments)


def _find(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """The module that defines class ``name``, and the class's own source."""
    return next(
        (
            (home, node)
            for home, tree in _homes(module, name)
            for node in tree.body
            if isinstance(node, ast.ClassDef) and node.name == name
        ),
        None,
    )


def _constant(module: str, name: str) -> ast.expr:
    """The value of the constant ``name`` that ``module`` defines or imports; raises KeyError if there is none."""
    for _, tree in _homes(module, name):
        for node in tree.body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return node.value
    raise KeyError(name)


def _homes(module: str, name: str) -> Iterator[tuple[str, ast.Module]]:
    """``module`` and those from which it imports ``name``, with their sources, until there are none."""
    path = _source_file(module)
    if path is None:
        return
    tree = _parsed(path)
    yield module, tree
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            if any(alias.name in (name, "*") and alias.asname in (None, name) for alias in node.names):
                yield from _homes(node.module or "", name)


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _source_file(module: str) -> Path | None:
    """Where the source of ``module`` lies; its packages are not imported for that."""
    top, *rest = module.split(".")
    found = importlib.util.find_spec(top)
    if found is None or found.origin is None:
        return None
    path = Path(found.origin)
    if rest:
        path = path.parent.joinpath(*rest, "__init__.py")
        path = path if path.is_file() else path.parent.with_suffix(".py")
    return path if path.suffix == ".py" and path.is_file() else None
