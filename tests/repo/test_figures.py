"""The pages of docs/papers show what the result files hold, in words and in pictures."""

import ast
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import pytest

from hardy.cli.reproduce_results import load_experiments

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MOST_BYTES, MOST_LINES = 90_000, 90
sys.path.insert(0, str(DOCS))
import figures  # noqa: E402  the path is set above
import figures_data  # noqa: E402
import figures_panels  # noqa: E402

sys.path.remove(str(DOCS))
DRAWN = [page for page in figures.PAGES if not page.not_run]
REMEDY = f"run `{figures.COMMAND}`"


def page_name(page):
    return page.name


def as_json(panels):
    return json.loads(json.dumps(panels))


def bar_widths(text, color):
    """Return the signed widths of an SVG's bars of one colour, in the order in which they were drawn."""
    widths = []
    for path in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}path"):
        if f"fill: {color.lower()}" in path.get("style", ""):
            xs = [float(x) for x in re.findall(r"[ML] (\S+) \S+", path.get("d"))]
            widths.append(xs[1] - xs[0])
    return widths


def test_every_method_has_its_page():
    pages = {path.stem for path in (DOCS / "papers").glob("*.md")}
    assert pages == {page.name for page in figures.PAGES}
    shown = (DOCS / "index.md").read_text() + (DOCS / "which-method.md").read_text()
    for name in pages:
        assert shown.count(f"(papers/{name}.md)") >= 2, "link it from docs/index.md and docs/which-method.md"


@pytest.mark.parametrize("page", figures.PAGES, ids=page_name)
def test_a_page_holds_what_was_measured(page):
    text = page.path.read_text(encoding="utf-8")
    assert text == page.text(text), REMEDY
    before, after = text.split(figures.BEGIN)[0], text.split(figures.END)[1]
    assert len(before.splitlines()) + len(after.splitlines()) <= MOST_LINES
    for heading in ("When to use it", "Use it", "Defaults", "Cost", "What we measured"):
        assert f"\n## {heading}" in text
    assert re.search(r"\n## .*not recovered|\n## .*could not be recovered", text)
    assert "src/hardy/reference/" in text and "](../../" in text


@pytest.mark.parametrize("page", DRAWN, ids=page_name)
def test_a_picture_shows_the_result_files(page):
    text = page.picture.read_text(encoding="utf-8")
    panels = as_json(page.panels())
    assert figures_panels.panels_of(text) == panels, REMEDY
    assert len(text.encode()) < MOST_BYTES
    assert "<dc:date>" not in text and 'style="fill: #ffffff"' in text
    assert f"(../figures/{page.name}.svg)" in page.path.read_text(encoding="utf-8")
    if f"Matplotlib v{matplotlib.__version__}," in text:  # another one may draw otherwise
        assert text == figures_panels.svg(panels), REMEDY


def test_there_are_no_other_pictures():
    assert {path.stem for path in (DOCS / "figures").iterdir()} == {page.name for page in DRAWN}


def test_another_result_is_noticed(tmp_path, monkeypatch):
    for folder in ("experiments/smmf", "benchmarks/results"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    path = tmp_path / "experiments/smmf/results/comparison.json"
    held = json.loads(path.read_text())
    held["measured"]["rows"][1]["losses"][2] += 0.01
    held["claims"][0]["got"] = 17.5
    path.write_text(json.dumps(held))
    (page,) = (page for page in figures.PAGES if page.name == "smmf")
    before, text = figures_panels.panels_of(page.picture.read_text()), page.path.read_text()
    monkeypatch.setattr(figures_data, "ROOT", tmp_path)
    assert as_json(page.panels()) != before
    assert "got 17.5" in page.text(text)


def test_a_page_without_a_result_says_so(tmp_path, monkeypatch):
    (page,) = (page for page in figures.PAGES if page.name == "dstar")
    shutil.copytree(ROOT / "experiments/dstar", tmp_path / "experiments/dstar")
    monkeypatch.setattr(figures_data, "ROOT", tmp_path)
    assert page.not_run == ["robust"]
    assert "Not run yet. To fill this in: `hardy reproduce robust --write`" in page.text(
        page.path.read_text()
    )


def test_no_measured_number_is_written_in_the_script():
    tree = ast.parse((DOCS / "figures_data.py").read_text())
    numbers = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    written = {n for n in numbers if isinstance(n, int | float) and not isinstance(n, bool)}
    assert written <= {0, 1, 7, 100, 168, 1024}, "percent, K, places of a commit, matrices of a benchmark"


def test_bars_are_as_long_as_their_means():
    found = {"a": 1.0, "b": 2.0, "c": -0.5}
    panel = figures_panels.bars("t", {"": {k: figures_panels.spread(v, [v]) for k, v in found.items()}})
    text = figures_panels.svg([panel])
    widths = bar_widths(text, figures_panels.COLORS[0])
    assert [w / widths[0] for w in widths] == pytest.approx([1, 2, -0.5], rel=1e-4)
    shown = re.findall(r">([^<>]+)</text>", text)
    assert {"a", "b", "c"} < set(shown)
    assert shown.count("1") == shown.count("2") == 1 and shown.count("-0.5") >= 1


def test_a_lost_run_has_no_bar():
    series = {
        "one": {"a": figures_panels.spread(None, [None, 1.0])},
        "two": {"a": figures_panels.spread(1.0)},
    }
    text = figures_panels.svg([figures_panels.bars("t", series)])
    blue, orange = (len(bar_widths(text, color)) for color in figures_panels.COLORS[:2])
    assert ">lost</text>" in text
    assert (blue, orange) == (1, 2), "the legend's patch alone, and a bar besides"


def test_bars_and_labels_of_two_series_stand_side_by_side():
    first, second = ({"a": figures_panels.spread(x), "b": figures_panels.spread(2 * x)} for x in (1.0, 3.0))
    text = figures_panels.svg([figures_panels.bars("t", {"x": first, "y": second})])
    assert {"x", "y"} < set(re.findall(r">([^<>]+)</text>", text))
    blue, orange = (bar_widths(text, color)[:2] for color in figures_panels.COLORS[:2])
    assert [w / blue[0] for w in [*blue, *orange]] == pytest.approx([1, 2, 3, 6], rel=1e-4)


def test_data_travels_with_a_picture():
    panel = figures_panels.curves("a < b & c", {"x": [(1, 0.5), (2, 0.25)]}, x="rounds")
    text = figures_panels.svg([panel])
    assert figures_panels.panels_of(text) == [panel]
    assert text == figures_panels.svg([panel])
    with pytest.raises(ValueError, match=r"not drawn by docs/figures\.py"):
        figures_panels.panels_of("<svg xmlns='http://www.w3.org/2000/svg'/>")


def test_percents_are_of_means_and_of_seeds():
    found = figures_data._percents([2.0, 3.0], [1.0, 4.0])
    assert found == {"mean": 0.0, "seeds": [100.0, -25.0]}
    assert figures_data._percents([2.0, None], [1.0, 4.0])["mean"] is None


def test_the_least_accuracy_is_that_of_the_worst_attack():
    table = {
        attack: {"mean": [{"accuracy": x} for x in seeds]}
        for attack, seeds in {"none": [0.0, 0.0], "a": [1.0, 0.5], "b": [0.25, 0.75]}.items()
    }
    assert figures_data._least(table, "mean") == {"mean": 0.5, "seeds": [0.25, 0.75]}


def test_the_newest_line_of_a_benchmark_counts(tmp_path, monkeypatch):
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    rows = [{"case": "a", "value": 1}, {"case": "b", "value": 2}, {"case": "a", "value": 3}]
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "benchmarks/results/x.jsonl").write_text(text)
    monkeypatch.setattr(figures_data, "ROOT", tmp_path)
    found = figures_data.benchmark("x", key=("case",))
    assert {key: row["value"] for key, row in found.items()} == {("a",): 3, ("b",): 2}


def test_the_log_has_every_experiment_that_missed_a_claim():
    log = (DOCS / "log.md").read_text(encoding="utf-8")
    for name, one in load_experiments(ROOT / "experiments").items():
        outcomes = one.outcomes(one.result) if one.result else ()
        if not all(outcome.holds for outcome in outcomes):
            assert f"`experiments/{name}`" in log, f"docs/log.md says nothing of what {name} missed"
