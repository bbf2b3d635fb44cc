"""What the site takes from the repository as it is: tables and pictures.

Every Markdown file in `TABLES` becomes a page, `tables/<name>.md`, listed on
`tables.md`; every picture in `PICTURES` is at `pictures/<name>`, those of the
benchmark on `benchmark.md`. A new table or picture needs no edit here.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
TABLES = ("examples/results", "examples/benchmark", "tools/results")
PICTURES = ("examples/results", "examples/benchmark")
# In their place pages have the list of the tables, the benchmark's pictures.
LIST = "<!-- all tables -->"
DRAWN = "<!-- pictures of the benchmark -->"


def on_files(files: Any, config: Any) -> Any:
    """Add the tables and the pictures of the repository to the site."""
    for path in found(TABLES, ".md"):
        files.append(
            File.generated(config, f"tables/{path.name}", content=page(path))
        )
    for path in found(PICTURES, ".png"):
        name = f"pictures/{path.name}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """List tables and pictures where a page asks for them."""
    del page
    rows = [
        f"- [{title(path)}](tables/{path.name}) "
        f"(`{path.relative_to(ROOT).as_posix()}`)"
        for path in found(TABLES, ".md")
    ]
    pictures = found(("examples/benchmark",), ".png")
    # That of all tasks first.
    pictures.sort(key=lambda path: not path.name.startswith("results"))
    drawn = [f"![{title(path)}](pictures/{path.name})" for path in pictures]
    markdown = markdown.replace(LIST, "\n".join(rows))
    return markdown.replace(DRAWN, "\n\n".join(drawn))


def found(folders: Any, suffix: str) -> list[Path]:
    """Return the files of some folders, by name."""
    paths = [p for f in folders for p in (ROOT / f).glob(f"*{suffix}")]
    return sorted(paths, key=lambda path: path.name)


def title(path: Path) -> str:
    """Return the first heading of a table, or the name of its file."""
    if path.suffix == ".md":
        first = re.search(r"^# (.+)$", path.read_text(), re.MULTILINE)
        if first:
            return first[1]
    return path.stem.replace("_", " ").capitalize()


def page(path: Path) -> str:
    """Return a table as a page: with a heading, and links that go somewhere."""
    text = path.read_text()
    if not re.search(r"^# ", text, re.MULTILINE):
        text = f"# {title(path)}\n\n{text}"
    return re.sub(r"\[([^\]]*)\]\((?!https?:)([^)]+)\)", _link, text)


def _link(match: re.Match) -> str:
    """Return a link to the same file on the site, or what it says."""
    text, target = match[1], Path(match[2]).name
    if target in {path.name for path in found(PICTURES, ".png")}:
        return f"[{text}](../pictures/{target})"
    if target in {path.name for path in found(TABLES, ".md")}:
        return f"[{text}]({target})"
    return text
