"""What a dataclass takes, read from its source: a mistyped decoder is answered at once, not after seconds of imports.

Nothing is imported and nothing is run. Of ``__post_init__`` the checks are read that stand there without a condition,
such as ``check_count("block_size", self.block_size, 2)``; what else it asks shows when the class is used.
"""

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decoding import checks


@dataclass(frozen=True)
class Signature:
    """The fields of a dataclass, in order, and its checks: (name of a function of decoding/checks.py, its arguments)."""

    fields: tuple[str, ...]
    checks: tuple[tuple[str, tuple[ast.expr, ...]], ...]
    constants: Mapping[str, ast.expr]  # of the module, by name

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
                return ast.literal_eval(self.constants[name])
        return ast.literal_eval(argument)


def signature_of(module: str, name: str) -> Signature | None:
    """The signature of class ``name``, which ``module`` defines or imports; None where there is no source to read."""
    found = _find(module, name)
    if found is None:
        return None
    home, tree, defined = found
    fields, asked = [], ()
    for base in defined.bases:
        inherited = signature_of(home, base.id) if isinstance(base, ast.Name) else None
        if inherited is not None:
            fields += inherited.fields
    is_dataclass = any("dataclass" in ast.unparse(decorator) for decorator in defined.decorator_list)
    for statement in defined.body if is_dataclass else ():
        match statement:
            case ast.AnnAssign(target=ast.Name(id=field), annotation=kind) if "ClassVar" not in ast.unparse(kind):
                fields.append(field)
            case ast.FunctionDef(name="__post_init__", body=body):
                asked = tuple(_unconditional_checks(body))
    constants = {
        target.id: statement.value
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    return Signature(tuple(dict.fromkeys(fields)), asked, constants)


def _unconditional_checks(body: list[ast.stmt]) -> Iterator[tuple[str, tuple[ast.expr, ...]]]:
    for statement in body:
        match statement:
            case ast.Expr(value=ast.Call(func=ast.Name(id=function), args=arguments, keywords=[])):
                if function.startswith("check_") and hasattr(checks, function):
                    yield function, tuple(arguments)


def _find(module: str, name: str) -> tuple[str, ast.Module, ast.ClassDef] | None:
    """The module that defines class ``name``, its source and that of the class."""
    path = _source_file(module)
    if path is None:
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef(name=found) if found == name:
                return module, tree, node
            case ast.ImportFrom(module=str(other), level=0, names=names):
                if any(alias.name == name and alias.asname in (None, name) or alias.name == "*" for alias in names):
                    if (elsewhere := _find(other, name)) is not None:
                        return elsewhere
    return None


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
