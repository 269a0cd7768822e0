"""The verb `compare`."""

import pytest

from hardy.cli.compare import notes_on, read_all
from hardy.cli.compare_groups import grouped
from hardy.cli.main import main
from hardy.config import UserError


def test_a_table_is_printed_with_what_must_be_known(make_run, capsys):
    cut = make_run("cut", config={"optim.lr": 0.5}, lines=[{"step": 1, "loss": 2.0}])
    assert main(["compare", str(make_run("ab-0")), str(make_run("ab-1", seed=1)), str(cut)]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "| ab (2 runs) |   2 |   0 1 |" in shown.out
    assert "- cut: unfinished: 1 of 4 steps\n" in shown.out
    assert "Settings that differ:\n\n| setting  | ab (2 runs) | cut |" in shown.out
    assert "| optim.lr | 0.01        | 0.5 |" in shown.out


def test_a_real_run_alone_is_fine(finished_run, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["compare", str(finished_run), "--html", str(page), "--title", "One <run>"]) == 0
    assert capsys.readouterr().out.startswith("| run |")
    assert "<h1>One &lt;run&gt;</h1>" in page.read_text()


@pytest.mark.parametrize(("form", "start"), [("latex", "\\begin{tabular}"), ("csv", "run,n,seeds\na,1,0\n")])
def test_other_formats_keep_notes_apart(form, start, make_run, capsys):
    assert main(["compare", str(make_run("a", lines=[])), "--format", form]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(start)
    assert shown.err == "hardy: a: no step is recorded\n"


def test_everything_is_written_where_asked(make_run, tmp_path, capsys):
    out, page, figures = tmp_path / "table.csv", tmp_path / "page.html", tmp_path / "figures"
    words = ["--format", "csv", "--out", str(out), "--html", str(page), "--figures", str(figures)]
    assert main(["compare", str(make_run("a")), *words]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"wrote {out}\nwrote {page}\nwrote {figures}/validation_loss_by_step.png\n" in shown.err
    assert out.read_text().startswith("run,n,seeds,validation_loss,")
    assert (figures / "training_loss_by_tokens.svg").stat().st_size > 1000


def test_names_are_folders_or_whole_paths_where_those_are_alike(make_run, tmp_path):
    folders = [make_run("a", parent=tmp_path / side) for side in ("left", "right")] + [make_run("b")]
    assert [run.name for run in read_all(folders)] == [str(folders[0]), str(folders[1]), "b"]


def test_what_cannot_be_compared_is_refused(make_run, tmp_path, capsys):
    folder = make_run("a")
    with pytest.raises(UserError, match="a is given twice; leave one out"):
        read_all([folder, tmp_path / "." / "a"])
    with pytest.raises(UserError, match=r"there is no folder .*nothing; give the folders of runs"):
        read_all([tmp_path / "nothing"])
    assert main(["compare", str(tmp_path)]) == 2
    assert f"{tmp_path} is no run folder: config.json is missing" in capsys.readouterr().err
    assert main(["compare", str(folder), "--out", str(tmp_path / "none" / "file")]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["compare"]) == 2


def notes(*folders):
    return notes_on(grouped(read_all(folders)))


def test_notes_tell_what_makes_a_comparison_unfair(make_run):
    other = make_run("other", config={"data.source": "pydocs", "data.pack": 1, "model.name": "60m"})
    found = notes(make_run("a"), other, make_run("b", config={"data.x": 1, "data.y": 1, "data.z": 1}))
    assert "the models differ (model.name): losses are not of one thing" in found
    assert any(note.startswith("the data differ (data.") and "and 2 more" in note for note in found)


def test_notes_tell_of_twins_and_of_other_code_within_a_group(make_run):
    starts = [[{"from_step": 0, "commit": commit}] for commit in ("abc", "def")]
    found = notes(make_run("ab-0", starts=starts[0]), make_run("ab-1", starts=starts[1]))
    assert found == [
        "ab (2 runs): seed 0 occurs more than once; the interval takes all as independent",
        "ab (2 runs): run.commit is not the same in all of its runs",
    ]
    assert notes(make_run("b")) == []
