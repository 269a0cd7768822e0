"""The table of the benchmarks' page is the one that its result files give."""

import runpy
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_page_holds_the_table_of_the_result_files():
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    report = runpy.run_path(str(BENCHMARKS / "report.py"))
    assert text == report["page"](text), "run `python benchmarks/report.py`"
    assert text.count("\n| ") >= 3
