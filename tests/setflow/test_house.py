"""The rules of the house: floors, packages, pinned versions, and a README that names what exists."""

import ast
import re
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRODUCT = {
    "decoding": 1,
    "sbd": 2,
    "rpt": 2,
    "dfm": 2,
    "steering": 2,
    "finetune": 3,
    "eval": 3,
    "serving": 3,
    "setflow": 4,
}
CHECKOUT = {"benchmarks": 5, "tools": 5}  # for those who make setflow; in no wheel
FLOORS = PRODUCT | CHECKOUT
METHODS = {"sbd", "rpt", "dfm", "steering"}
# Two methods use the pure sampling rules of a third, which never imports them.
NEIGHBOURS = {("sbd", "dfm"), ("rpt", "dfm")}
# The first corridor of the engine is its main path; the wings are what it stands on, each on those before it.
WINGS = {"inputs": (), "forward": ("inputs",), "training": ("inputs", "forward")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_graph() -> dict[str, set[str]]:
    """The modules that each of ours imports, at its top, inside functions and for type checkers alike."""
    names = {module_name(path): path for package in FLOORS for path in sources(package)}
    graph = {}
    for name, path in names.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} imports by dots; name the package"
                for alias in node.names:  # a module, or what a module holds
                    inner = f"{node.module}.{alias.name}"
                    found.add(inner if inner in names else node.module)
        graph[name] = (found & names.keys()) - {name}
    return graph


@pytest.mark.parametrize("package", FLOORS)
def test_a_package_imports_only_from_floors_below(package):
    for path in sources(package):
        for name in imported(path) & FLOORS.keys() - {package}:
            allowed = FLOORS[name] < FLOORS[package] or (package, name) in NEIGHBOURS
            assert allowed, f"{path.relative_to(ROOT)} imports {name}, which is not below {package}"


def test_evaluation_knows_no_method():
    """Decoders come by their specs."""
    for path in sources("eval"):
        assert not imported(path) & METHODS, path.relative_to(ROOT)


def test_no_module_comes_back_to_itself():
    """No circles, not even hidden in functions: whoever reads a module needs to know only what lies below it."""
    try:
        TopologicalSorter(module_graph()).prepare()
    except CycleError as error:
        pytest.fail("a circle of imports: " + " -> ".join(reversed(error.args[1])))


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_of_the_engine_knows_nothing_of_the_main_path(wing):
    """Not for type checkers either."""
    allowed = tuple(f"decoding.{name}" for name in (wing, *WINGS[wing]))
    for name, found in module_graph().items():
        if name.startswith(f"decoding.{wing}."):
            upward = {other for other in found if not other.startswith(allowed)}
            assert not upward, f"{name} imports {', '.join(upward)}"


def test_the_engine_has_no_other_wings():
    assert {path.name for path in (ROOT / "decoding").iterdir() if (path / "__init__.py").is_file()} == WINGS.keys()


@pytest.mark.parametrize("package", ("decoding", "sbd", "rpt"))
def test_files_stay_small(package):
    for path in sources(package):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, path.relative_to(ROOT)


@pytest.mark.parametrize("package", CHECKOUT)
def test_what_is_for_the_checkout_is_in_no_wheel(package):
    assert sources(package)
    assert not any(name.startswith(package) for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"])


@pytest.mark.parametrize("package", PRODUCT)
def test_every_folder_with_code_is_in_the_wheel(package):
    assert package in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    for folder in {path.parent for path in sources(package)}:
        assert (folder / "__init__.py").is_file(), (
            f"{folder.relative_to(ROOT)} has no __init__.py, so no wheel takes it"
        )


def test_versions_are_ranges_here_and_pins_there():
    project = PROJECT["project"]
    for text in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]:
        assert "==" not in text and (">=" in text or text.startswith("setflow[")), text
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins)


def test_readme_and_docs_name_files_that_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = re.compile(r"`([\w./-]+/[\w./-]+\.(?:py|yaml|toml|json))`|`((?:benchmarks|tests)/[\w./*-]+)`")
    names = {
        name for page in pages for found in named.findall(page.read_text(encoding="utf-8")) for name in found if name
    }
    assert names
    missing = {
        name for name in names if not name.startswith(("build/", "./")) and not list(ROOT.glob(name.rstrip("/")))
    }
    assert not missing


def test_no_path_of_any_machine():
    for package in FLOORS:
        for path in sources(package):
            assert not re.search(r"[\"'](/home|/root|/work|/Users)/", path.read_text(encoding="utf-8")), path
