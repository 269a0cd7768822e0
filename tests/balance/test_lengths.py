"""Sources of lengths, and what becomes of those too long."""

import numpy as np
import pytest

from hardy.balance.lengths import SOURCES, draw_lengths, fit_lengths, token_batches
from hardy.config import UserError


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_is_positive_and_repeats(source):
    a, b = (draw_lengths(source, 500, np.random.default_rng(3)) for _ in range(2))
    assert a.dtype == np.int64 and a.min() >= 1 and (a == b).all()


def test_wikipedia_is_like_its_statistic():
    drawn = draw_lengths("wikipedia", 400_000, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(1013.6, rel=0.03)
    for percent, wanted in ((5, 67), (25, 146), (50, 347), (75, 862), (90, 2112), (95, 3720), (99, 10919)):
        assert np.percentile(drawn, percent) == pytest.approx(wanted, rel=0.03)


def test_mixtures_have_their_means():
    drawn = draw_lengths("sft-mix", 1_000_000, np.random.default_rng(0))
    assert drawn[drawn < 15000].mean() == pytest.approx(1000, rel=0.05)
    assert draw_lengths("web-32k", 200_000, np.random.default_rng(0)).clip(max=32768).mean() == pytest.approx(
        750, rel=0.1
    )
    tail = draw_lengths("github-like", 200_000, np.random.default_rng(0)) >= 20000
    assert tail.mean() == pytest.approx(0.04, abs=0.01)


def test_files(tmp_path):
    (tmp_path / "plain.txt").write_text("# mine\n5\n7\n")
    assert draw_lengths(str(tmp_path / "plain.txt"), 5, np.random.default_rng(0)).tolist() == [5, 7, 5, 7, 5]
    (tmp_path / "bins.csv").write_text("lo,hi,documents,tokens\n1,1,3,3\n10,20,1,12\n")
    drawn = draw_lengths(str(tmp_path / "bins.csv"), 4000, np.random.default_rng(0))
    assert (drawn == 1).mean() == pytest.approx(0.75, abs=0.03)
    assert drawn[drawn > 1].min() >= 10 and drawn.max() <= 20
    assert drawn[drawn > 1].mean() == pytest.approx(12, rel=0.03)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("a.txt", "5\n0\n", "line 2: expected a length of at least 1, got '0'"),
        ("a.txt", "# nothing\n", "no lengths"),
        ("a.csv", "1,2,3\n", "line 1: expected lo,hi,documents,tokens"),
        ("a.csv", "3,2,1,5\n", "1 <= lo <= hi"),
        ("a.csv", "1,2,0,0\n", "no documents"),
    ],
)
def test_files_that_cannot_be_read_say_where(tmp_path, name, text, error):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=error):
        draw_lengths(str(tmp_path / name), 5, np.random.default_rng(0))


def test_an_unknown_source_names_the_nearest():
    with pytest.raises(UserError, match="wikipedia"):
        draw_lengths("wikipeda", 5, np.random.default_rng(0))


def test_nothing_is_cut_in_silence():
    with pytest.raises(UserError, match="2 sequences are longer than 4 tokens, the first is 1 with 9; raise"):
        fit_lengths([3, 9, 5], most_tokens=4, overlong="error")
    cut = fit_lengths([3, 9, 5], most_tokens=4, overlong="truncate")
    assert (cut.lengths.tolist(), cut.changed) == ([3, 4, 4], 2)
    dropped = fit_lengths([3, 9, 5, 2], most_tokens=4, overlong="drop")
    assert (dropped.lengths.tolist(), dropped.origin.tolist(), dropped.changed) == ([3, 2], [0, 3], 2)
    split = fit_lengths([8, 9, 1], most_tokens=4, overlong="split")
    assert split.lengths.tolist() == [4, 4, 4, 4, 1, 1] and split.origin.tolist() == [0, 0, 1, 1, 1, 2]
    assert fit_lengths([3], most_tokens=4, overlong="error").changed == 0


def test_a_batch_ends_before_its_budget_and_nothing_is_lost():
    found = token_batches(np.array([3, 3, 9, 1, 2, 5]), budget_tokens=6)
    assert [batch.tolist() for batch in found] == [[0, 1], [2], [3, 4]]
