"""The README's code runs as written, and its commands are there."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_examples_run(tmp_path):
    """One after the other."""
    example = "\n".join(blocks("python"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    assert (tmp_path / "my_model" / "saved_model.pb").exists()


def test_two_commands():
    install_and_run, install_and_test = blocks("bash")
    assert install_and_run.startswith('pip install ".[examples]" && ')
    assert install_and_test == 'pip install ".[test]" && python -m pytest\n'


def test_links_to_files():
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / path).exists(), path
