"""The site: its code runs, its commands are there, its reference is whole."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from typing import NamedTuple

import pytest

from tests.test_house import PUBLIC
from tests.test_package import ROOT
from tests.test_package import run_python

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^([ >]*)```(.*?)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
# Blocks that need another package, or a newer Keras, say so in their title. The
# test extra does not bring all of them: where the module is missing the code is
# compiled.
OTHERS = {
    "tf-keras": "tf_keras",
    "optax": "optax",
    "davda54/sam": "sam",
    "KerasTuner": "keras_tuner",
    "ONNX": "tf2onnx",
    "LiteRT": "keras.src.export.litert",
}


class Block(NamedTuple):
    """A block of code of a page."""

    language: str
    title: str
    line: int
    code: str


def blocks(page):
    text = page.read_text()
    for match in FENCE.finditer(text):
        language, _, options = match[2].partition(" ")
        title = re.search(r'title="([^"]*)"', options)
        yield Block(
            language,
            title[1] if title else "",
            text[: match.start()].count("\n") + 2,
            textwrap.dedent(match[3].replace("\n" + match[1], "\n")),
        )


def name_of(page):
    return page.relative_to(DOCS).as_posix()


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@every_page
@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
def test_the_code_runs(page, tmp_path, monkeypatch):
    """The blocks of a page, one after the other, in one namespace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    sources = []
    for block in blocks(page):
        assert block.language in ("python", "bash", "text"), block
        if block.language == "python" and not block.title:
            # Errors name the line of the page.
            sources.append("\n" * (block.line - 1) + block.code)
    if page.name == "distributed.md":
        # Replicas of other tests are of other numbers, and would have to meet.
        code = "\n".join(source.lstrip("\n") for source in sources)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True
        )
        return
    namespace = {"__name__": "docs"}
    for source in sources:
        exec(compile(source, page, "exec"), namespace)


WITH_OTHERS = [
    (page, block) for page in PAGES for block in blocks(page) if block.title
]


@pytest.mark.parametrize(
    ("page", "block"), WITH_OTHERS, ids=[b.title for _, b in WITH_OTHERS]
)
def test_the_code_with_other_packages_runs(page, block, tmp_path):
    """After those before it, in a process of its own: not all get along."""
    compile(block.code, page, "exec")
    module = OTHERS[block.title]
    if importlib.util.find_spec(module) is None:
        return
    before = [
        other.code
        for other in blocks(page)
        if other.line < block.line
        and other.language == "python"
        and not other.title
    ]
    script = tmp_path / "script.py"
    script.write_text("\n".join([f"import {module}", *before, block.code]))
    run_python(f"exec(open({str(script)!r}).read())", cwd=tmp_path)


@every_page
def test_lines_of_code_are_short(page):
    """Longer ones would have to be scrolled."""
    for block in blocks(page):
        for line in block.code.splitlines():
            assert len(line) <= 80, line


def test_commands_are_there():
    """Scripts and their options, and the extras of the package."""
    project = (ROOT / "pyproject.toml").read_text()
    _, _, optional = project.partition("[project.optional-dependencies]")
    extras = re.findall(r"^(\w+) = \[", optional, re.MULTILINE)
    for page in PAGES:
        for block in blocks(page):
            if block.language != "bash":
                continue
            for line in block.code.splitlines():
                check_command(line, extras)


def check_command(line, extras):
    words = line.split()
    if words[:2] == ["pip", "install"]:
        for name in re.findall(r"\[(\w+)\]", line):
            assert name in extras, line
    elif words[0] == "python" and words[1] != "-m":
        source = (ROOT / words[1]).read_text()
        for option in re.findall(r" (--[\w-]+)", line):
            assert f'"{option}"' in source, line
    else:
        assert line in ("python -m pytest", "mkdocs serve"), line


def public_names():
    """Every name that a user can import, with its module."""
    names = set()
    for module in ["keras_lesam", *PUBLIC]:
        for name in importlib.import_module(module).__all__:
            value = getattr(importlib.import_module(module), name)
            if callable(value):
                names.add(f"{module}.{name}")
    return names


def test_the_reference_has_every_public_name():
    text = "\n".join(p.read_text() for p in (DOCS / "reference").glob("*.md"))
    found = re.findall(r"^::: (\S+)$", text, re.MULTILINE)
    assert len(found) == len(set(found))
    modules = {name for name in found if name in PUBLIC}
    assert modules == set(PUBLIC) - {"keras_lesam"}
    assert set(found) - modules == public_names()
    assert "keras_lesam.__version__" in text


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r": ([\w/-]+\.(?:md|ipynb))$", text, re.MULTILINE))
    pages = {name_of(p) for p in [*PAGES, *DOCS.rglob("*.ipynb")]}
    assert listed == pages


def test_what_pages_include_is_there():
    for page in PAGES:
        for path in re.findall(r'--8<-- "([^":]+)', page.read_text()):
            text = (ROOT / path).read_text()
            assert "```python" not in text, "code belongs to a page"


def test_pages_are_short():
    """An answer in a minute: what is included comes below it."""
    for page in PAGES:
        lines = len(page.read_text().splitlines())
        assert lines <= 250, (page, lines)


def test_links_between_pages():
    """And pictures; anchors are checked where the site is built."""
    pictures = {
        f"pictures/{path.name}"
        for folder in ("results", "benchmark")
        for path in (ROOT / "examples" / folder).glob("*.png")
    }
    tables = {
        f"tables/{path.name}"
        for folder in ("examples/results", "tools/results")
        for path in (ROOT / folder).glob("*.md")
    }
    for page in PAGES:
        text = re.sub(r"`[^`]*`", "", FENCE.sub("", page.read_text()))
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            path = (page.parent / target).resolve()
            inside = path.relative_to(DOCS).as_posix()
            assert path.exists() or inside in pictures | tables, (page, target)
