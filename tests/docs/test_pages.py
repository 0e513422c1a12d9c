"""README and docs say what is so: tables are generated, code runs, commands parse, links lead somewhere."""

import io
import re
import shlex
import sys

import pytest
import typer.main
import yaml

from setflow.cli import app, main
from tools.tables import ROOT, fill, pages

PAGES = pages()
PLACEHOLDERS = re.compile(r"PATH|PROMPT|TRAINED|meta-llama|own\.jsonl|RECIPE|URL")


def code(page, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page) -> list[list[str]]:
    lines = [line for block in code(page, "sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("setflow ")]


def by_page(cases) -> list:
    return [pytest.param(*case, id=f"{case[0].stem}-{number}") for number, case in enumerate(cases)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_making_the_tables_again_changes_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert fill(text) == text, "say make tables"


def test_a_table_that_cannot_be_made_is_refused():
    for call in (
        "nothing",
        "results quality columns=tokens_per_fortnight",
        "results quality where=a:b columns=decoder",
    ):
        with pytest.raises(ValueError, match="table is one of|no field|no row"):
            fill(f"<!-- table: {call} -->\n<!-- end of table -->")


@pytest.mark.parametrize("page", [page for page in PAGES if code(page, "python")], ids=lambda page: page.stem)
def test_python_runs_from_top_to_bottom(page, capsys):
    names: dict = {}
    for block in code(page, "python"):
        exec(compile(block, str(page), "exec"), names)
        assert names.keys() - {"__builtins__"}, "nothing ran"


@pytest.mark.parametrize(("page", "words"), by_page((p, c) for p in PAGES for c in commands(p)))
def test_commands_are_known_with_their_options(page, words):
    command, arguments = typer.main.get_command(app), words[1:]
    while arguments and (known := getattr(command, "commands", {})):
        if arguments[0] in known:
            command, *arguments = known[arguments[0]], *arguments[1:]
        elif "recipe" in known:
            command = known["recipe"]
        else:
            break
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.split("=")[0] for word in arguments if word.startswith("--")} <= options


@pytest.mark.parametrize(
    ("page", "words"), by_page((p, c) for p in PAGES[:1] for c in commands(p) if not PLACEHOLDERS.search(" ".join(c)))
)
def test_commands_of_the_readme_run(page, words, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("2 + 2 = ?\n"))
    assert main(words[1:]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_pages_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in headings}, target


def test_every_page_stands_in_the_navigation():
    def flat(entries):
        for entry in entries:
            yield from flat(next(iter(entry.values()))) if isinstance(entry, dict) else [entry]

    told = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert set(flat(told["nav"])) == {page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]}


def test_the_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
