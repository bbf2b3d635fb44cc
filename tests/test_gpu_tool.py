"""The script for a GPU runs, on what there is."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_a_part_of_it(tmp_path):
    found = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tools" / "gpu"), "--quick"),
            *("--parts", "identical", "pictures", "--output", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 wrong of 3" in found.stdout
    assert "pictures: no --pictures" in found.stdout
    assert len((tmp_path / "identical.jsonl").read_text().splitlines()) == 3
