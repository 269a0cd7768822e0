"""What a page about experiments shows."""

from hardy.cli.page import Image, Table, Text, page_html
from hardy.cli.reproduce_page import Shown, lead, sections
from hardy.cli.reproduce_results import load_experiment


def test_claims_verdicts_circumstances_and_pictures_are_shown(toys):
    alpha, beta = (load_experiment(toys / name) for name in ("alpha", "beta"))
    (toys / "alpha" / "results" / "curve.png").write_bytes(b"\x89PNG\r\n")
    shown = [
        Shown(experiment=alpha, result=alpha.result, pictures=toys / "alpha" / "results"),
        Shown(experiment=beta, result=None, pictures=toys / "beta" / "results"),
    ]
    table, image, text = sections(shown)
    assert isinstance(table, Table)
    assert table.title == "alpha: A toy"
    assert [[*row[:3], row[3].text, row[3].holds] for row in table.rows] == [
        ["the gap is small", "at most 1 %", "0.5 ± 0.25 %", "holds", True],
        ["there is a gain", "at least 1.5", "2", "holds", True],
    ]
    assert "commit 0123456" in table.note
    assert isinstance(image, Image)
    assert image.title == "alpha: curve"
    assert isinstance(text, Text)
    assert text.is_warning
    assert lead(shown) == "2 of 2 claims of 2 experiments hold."
    page = page_html(title="Reproductions", sections=[table, text])
    assert "the gap is small" in page
    assert "hardy reproduce beta" in page
