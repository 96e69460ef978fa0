"""README and docs against the tree: what they name is there, and what they quote is true."""

import json
import re

import pytest
from helpers import ROOT

import ptdpo
from experiments import reproduce, summaries

README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {"README.md": README, **DOCS}


def test_readme_is_one_page():
    """At most 160 lines, 2,000 words and two tables; a picture and two commands come first."""
    assert len(README.splitlines()) <= 160
    assert len(README.split()) <= 2000
    assert len(re.findall(r"^\|(?:-+\|)+$", README, re.MULTILINE)) <= 2
    assert "@@" not in README and "TODO" not in README
    top = README[: README.index("## ")]
    assert "![" in top
    assert "pip install -r requirements.txt && python ptdpo.py --toy" in top
    assert "pip install -r requirements-dev.txt && python -m pytest" in top


@pytest.mark.parametrize("name", PAGES)
def test_links_and_files_exist(name):
    """Every file that a link, a picture or inline code names."""
    folder = ROOT if name == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\(((?!https?:|#)[^)#]+)", PAGES[name]):
        assert (folder / target).exists(), target
    named = re.findall(r"\b((?:experiments|assets|tests|toy_tasks|docs)/[\w./-]*\w)", PAGES[name])
    for target in named:
        if "mine" not in target:  # the reader's own, in the exercises
            assert (ROOT / target).exists() or (ROOT / f"{target}.py").exists(), target


@pytest.mark.parametrize("name", PAGES)
def test_modules_exist(name):
    """Every `python -m experiments.NAME`."""
    for module in re.findall(r"experiments\.([a-z]\w+)", PAGES[name]):
        assert (ROOT / "experiments" / f"{module}.py").exists(), module


def test_flags_exist():
    """Every flag that README gives to ptdpo.py."""
    with pytest.raises(SystemExit):
        ptdpo.parse(["--help"])
    known = {"--toy", "--model", "--resume", "--eval", "--help", "--help-metrics", "--out"}
    known |= {"--overwrite", "--index-url"}
    known |= {"--" + name.replace("_", "-") for name in vars(ptdpo.Config())}
    gone = set(re.search(r"Earlier versions had (.*?):", README, re.DOTALL)[1].split("`")[1::2])
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) - gone
    assert len(mentioned) >= 8
    assert mentioned <= known, mentioned - known


def test_the_six_lines_are_those_of_the_step():
    """The calls in the table of the step stand in train_step, in that order."""
    source = (ROOT / "ptdpo.py").read_text()
    step = source[source.index("def train_step") : source.index("class Policy")]
    rows = re.findall(r"^\| \d\. .* \| `.*?= (\w+)\(", README, re.MULTILINE)
    assert len(rows) == 6
    places = [step.index(f"= {name}(") for name in rows]
    assert places == sorted(places)
    # Six departures, here and in the docstring of ptdpo.py.
    section = README[README.index("## Departures") :]
    assert re.findall(r"^(\d)\. ", section, re.MULTILINE) == list("123456")
    assert re.findall(r"^  (\d)\. ", ptdpo.__doc__, re.MULTILINE) == list("123456")


def test_promises_name_tests_that_exist():
    """Each test that docs/promises.md refers to."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    files = {path.stem for path in (ROOT / "tests").glob("*.py")}
    named = set(re.findall(r"\b(test_\w+)\b(?!\.py)", DOCS["promises.md"])) - files
    assert len(named) > 10
    for name in named:
        assert f"def {name}(" in tests, name


def test_tables_of_results_are_those_of_the_summaries():
    """docs/results.md holds the claims of every experiment, number for number."""
    paths = list((ROOT / "experiments" / "results").rglob("summary.json"))
    assert {path.parent.name for path in paths} == set(reproduce.EXPERIMENTS)
    for path in paths:
        claims = json.loads(path.read_text())["claims"]
        assert summaries.list_claims(claims) in DOCS["results.md"], path
