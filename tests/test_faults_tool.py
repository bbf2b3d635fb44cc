"""`tools/faults.py` in its shortest form."""

import re

from tests.test_examples import run


def test_a_little_of_each_tally():
    """It ends well, and says of each method what became of it."""
    output = run("../tools/faults.py", "--quick")
    # A kill may tear the backup that is being written.
    for method in ("plain", "secant"):
        kills = rf"^\| {method} \| (1 \| 0|0 \| 1) \| 0 \|"
        assert re.search(kills, output, re.MULTILINE)
        assert f"| {method} | graph |" in output
    assert "0 new traces" in output
    assert "Passed" in output
