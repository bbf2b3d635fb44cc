"""`tools/faults.py` in its shortest form."""

from tests.test_examples import run


def test_a_little_of_each_tally():
    """It ends well, and says of each method what became of it."""
    output = run("../tools/faults.py", "--quick")
    for row in (
        *("| plain | 1 | 0 | 0 |", "| secant | 1 | 0 | 0 |"),
        *("| plain | graph |", "| secant | graph |"),
        *("0 new traces", "Passed"),
    ):
        assert row in output
