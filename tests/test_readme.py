"""README against the tree, the parser and the code: what it names is there."""

import re
from dataclasses import fields

import pytest
from helpers import ROOT

import ptdpo
from toy_tasks import reproduce

README = (ROOT / "README.md").read_text()


def section(title):
    """The text below a heading that begins with title."""
    return re.search(rf"^## {re.escape(title)}.*?\n(.*?)(?=^## |\Z)", README, re.M | re.S).group(1)


def table(text):
    """The cells of the first table in a text, its head and rule left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_file_table_and_tree():
    """Every listed file exists, and every source file and folder of the top is listed."""
    listed = [cells[0].strip("| `") for cells in table(section("Where things are"))]
    assert len(listed) == len(set(listed))
    for name in listed:
        assert (ROOT / name).exists(), name
    sources = [*ROOT.glob("*.py"), *ROOT.glob("toy_tasks/*.py")]
    for path in sources:
        assert str(path.relative_to(ROOT)) in listed
    folders = {str(p.parent.relative_to(ROOT)) + "/" for p in ROOT.glob("*/*.py")}
    for folder in folders | {"assets/"}:
        assert folder in listed or folder == "toy_tasks/"
    assert any(name.startswith("toy_tasks/") for name in listed)


def test_flags_exist():
    """Whatever README says about ptdpo.py, the parser knows the flags."""
    known = {"--index-url", "--help", "--nproc-per-node"}  # of pip, every parser, torchrun
    known |= {f"--{f.name.replace('_', '-')}" for f in fields(ptdpo.Config)}
    source = (ROOT / "toy_tasks/commands.py").read_text()
    known |= set(re.findall(r'add_argument\("(--[a-z-]+)"', source))
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README))
    assert len(mentioned) > 10 and mentioned <= known, mentioned - known


def test_glossary_is_that_of_the_code():
    """Equal to ptdpo.METRICS, in its order."""
    rows = [(key.strip("| `"), text.strip(" |")) for key, text in table(section("Glossary"))]
    assert rows == list(ptdpo.METRICS.items())


def test_what_a_run_writes(finished):
    """The files of a run are those of the table."""
    listed = " ".join(cells[0] for cells in table(section("What a run writes")))
    run = finished["ptdpo"]
    for path in (*run.iterdir(), *run.parent.glob("*.png")):
        assert path.name in listed


def test_departures_are_numbered_and_named_in_the_code():
    """Six, in order, here and in the docstring of ptdpo.py."""
    numbers = re.findall(r"^(\d)\. \*\*", section("Departures from the paper"), re.M)
    assert numbers == list("123456")
    told = ptdpo.__doc__.split("Departures")[1].split()
    assert [word for word in told if word in numbers] == numbers


def test_promises_name_tests_that_exist():
    """Each test and file that the table refers to."""
    text = section("What it promises")
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"\b(test_\w+)(?!\w*\.py)\b", text))
    assert len(named) > 10
    for name in named - {p.stem for p in (ROOT / "tests").glob("*.py")}:
        assert f"def {name}(" in tests, name
    for name in re.findall(r"(?:tests|assets)/[\w./]*\w\.(?:py|txt)", text):
        assert (ROOT / name).exists(), name
    assert text.index("| promise | shown by |") < text.index("kill -9")


def test_first_screen_and_citation():
    """Two commands, the first before all else, and the BibTeX entry of the paper."""
    top = README[: README.index("## ")]
    install = "pip install -r requirements"
    assert f"{install}.txt && python ptdpo.py --toy" in top
    assert f"{install}-dev.txt && python -m pytest" in top
    assert "https://download.pytorch.org/whl/cpu" in top
    bibtex = section("Citation")
    assert "@article{" in bibtex and "arXiv:2606.07000" in bibtex


@pytest.mark.parametrize("title", ["One training step", "The toy", "Results", "Is it broken?"])
def test_sections(title):
    """They are there, and not empty."""
    assert section(title).strip()


def test_claims_are_those_of_the_committed_summaries():
    """The table of claims, word for word and number for number."""
    names = (*reproduce.EXPERIMENTS, *reproduce.MEASUREMENTS)
    folders = [ROOT / "assets/results" / name for name in names]
    folders = [folder for folder in folders if (folder / "summary.json").exists()]
    assert len(folders) >= 5
    written = re.search(r"<!-- claims -->\n(.*?)\n<!-- end -->", README, re.S).group(1)
    assert written == reproduce.claims_markdown(folders)


def test_results_table():
    """Means and paired intervals of the first table, from the summaries."""
    written = re.search(r"<!-- results -->\n(.*?)\n<!-- end -->", README, re.S).group(1)
    assert written == reproduce.results_markdown(ROOT / "assets/results")


def test_links_and_placeholders():
    """Every file that a link or picture names exists; nothing is left to be filled in."""
    linked = re.findall(r"\]\(((?!https?:|#)[^)]+)\)", README)
    assert len(linked) >= 3 and all((ROOT / name).exists() for name in linked), linked
    named = re.findall(r"`(assets/[\w./-]+)`", README)
    assert named and all((ROOT / name).exists() for name in named), named
    assert not re.search(r"\b(TOY|BASE|LOSS)_[A-Z]+\b|\bRESULTS\b|\bGLOSSARY\b|TODO", README)
    anchors = {
        re.sub(r"[^\w -]", "", h).lower().replace(" ", "-")
        for h in re.findall(r"^## (.*)", README, re.M)
    }
    assert {a[1:] for a in re.findall(r"\]\((#[^)]+)\)", README)} <= anchors
