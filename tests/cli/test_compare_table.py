"""The table of a comparison."""

import csv
import io

import pytest

from hardy.cli.compare_groups import Estimate, grouped
from hardy.cli.compare_runs import read_run
from hardy.cli.compare_table import FORMATS, MEASURES, Grid, Measure, latex, markdown, measured, reading, told


@pytest.fixture
def groups(make_run):
    names = ("plain-0", "plain-1", "a_b|c%=")
    lines = [{"step": 1, "loss": 2.5, "step_time_s": 7200.0, "bytes_sent": 3_000_000, "lost": 1}]
    folders = [make_run(names[0]), make_run(names[1], seed=1), make_run(names[2], lines=lines)]
    folders[2].joinpath("config.json").write_text('{"train": {"seed": 5}}')
    return grouped([read_run(folder, name=folder.name) for folder in folders])


def test_columns_that_no_run_has_are_left_out(groups):
    assert measured(groups) == [
        *("validation_loss", "best_validation_loss", "training_loss", "steps", "tokens", "wall_s"),
        *("tokens_per_s", "bytes_sent", "skipped_steps", "lost"),
    ]
    assert "waited" not in FORMATS["markdown"](groups)


def test_markdown(groups):
    lines = FORMATS["markdown"](groups).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert cells[0][:6] == [
        *("run", "n", "seeds", "validation loss, last", "validation loss, best", "training loss, last 5 %")
    ]
    assert set(lines[1]) == set("| :-")
    assert cells[2][:6] == ["plain (2 runs)", "2", "0 1", "2.0 ± 6.4", "2.0 ± 6.4", "1.000 ± 0"]
    assert cells[3][:6] == [r"a_b\|c%=", "1", "5", "-", "-", "2.500"]
    assert cells[2][8] == "0.0 ± 0"  # hours, as the other one took two
    assert cells[0][8] == "wall time (h)"
    assert len({len(line) for line in lines}) == 1


def test_latex_compiles_by_its_looks(groups):
    text = FORMATS["latex"](groups)
    assert text.startswith("\\begin{tabular}{lrrrrrrrrrrrr}\n\\toprule\nrun & n & seeds & validation loss")
    assert r"training loss, last 5 \%" in text
    assert r"2.0 $\pm$ 6.4" in text
    assert r"a\_b|c\%= & 1 & 5" in text
    rows = text.splitlines()[2:-2]
    assert {row.count(" & ") for row in rows if row != "\\midrule"} == {12}


def test_latex_letters_with_a_meaning_are_written_out():
    text = latex(Grid(heading=["a"], rows=[[r"\{$&#%_~^}"]]), words=1)
    assert r"\textbackslash{}\{\$\&\#\%\_\textasciitilde{}\textasciicircum{}\}" in text


def test_csv_holds_full_precision_and_base_units(groups):
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"](groups))))
    assert [row["run"] for row in rows] == ["plain (2 runs)", "a_b|c%="]
    assert float(rows[0]["validation_loss"]) == 2.0
    assert float(rows[0]["validation_loss_ci95"]) == pytest.approx(12.7062047 * 0.5, abs=1e-6)
    assert (rows[1]["validation_loss"], rows[1]["validation_loss_ci95"]) == ("", "")
    assert (rows[1]["wall_s"], rows[1]["bytes_sent"], rows[1]["seeds"]) == ("7200.0", "3000000.0", "5")


def test_a_name_is_no_formula_in_a_spreadsheet(make_run):
    folder = make_run("=1+1")
    text = FORMATS["csv"](grouped([read_run(folder, name="=1+1")]))
    assert text.splitlines()[1].startswith("'=1+1,")


@pytest.mark.parametrize(
    ("kind", "mean", "half", "heading", "cell"),
    [
        ("loss", 2.46666, None, "x", "2.467"),
        ("loss", 2.46666, 0.0312, "x", "2.467 ± 0.031"),
        ("loss", 2.46666, 0.0, "x", "2.467 ± 0"),
        ("loss", 2.46666, 12.0, "x", "2 ± 12"),
        ("count", 60.0, 0.0, "x", "60"),
        ("count", 1.5, 19.06, "x", "1.5 ± 19.1"),
        ("count", 10_000.0, None, "x", "10,000"),
        ("tokens", 122_880.0, 0.0, "x", "122,880"),
        ("tokens", 163_820_134.0, 1_500_000.0, "x (millions)", "163.820 ± 1.500"),
        ("rate", 8225.3, 10.4, "x", "8,225 ± 10"),
        ("seconds", 59.96, None, "x (s)", "60.0"),
        ("seconds", 90.0, 6.0, "x (min)", "1.5 ± 0.1"),
        ("seconds", 7200.0, None, "x (h)", "2.0"),
        ("bytes", 999.0, None, "x (B)", "999"),
        ("bytes", 7_880_000.0, 0.0, "x (MB)", "7.88 ± 0"),
        ("bytes", 26_950_000_000.0, 1e9, "x (GB)", "26.95 ± 1.00"),
    ],
)
def test_cells_say_no_more_than_is_known(kind, mean, half, heading, cell):
    found = Estimate(mean=mean, half_width=half, count=2)
    assert told(Measure(heading="x", kind=kind), [found]) == (heading, [cell])


def test_a_column_has_one_unit_by_its_largest_value():
    found = [Estimate(mean=mean, half_width=None, count=1) for mean in (2e9, 5e6)]
    assert told(Measure(heading="x", kind="bytes"), [*found, None]) == ("x (GB)", ["2.00", "0.01", "-"])


def test_the_reading_explains_the_columns_that_are_there(groups):
    assert reading(groups).endswith(
        "Skipped steps: loss or gradient not finite, or a spike; lost: messages or workers that did not "
        "arrive."
    )
    assert "rollbacks" not in reading(groups)


def test_a_cell_cannot_break_a_markdown_table():
    text = markdown(Grid(heading=["a", "b"], rows=[["x|y\nz", "<b>"]]), words=1)
    assert text.splitlines()[2] == r"| x\|y z | &lt;b> |"


def test_headings_are_all_different():
    assert len({measure.heading for measure in MEASURES.values()}) == len(MEASURES)
