"""The histogram of Wikipedia."""

from hardy.balance.length_tables import WIKIPEDIA


def test_bins_follow_each_other_and_hold_their_tokens():
    assert sum(row[2] for row in WIKIPEDIA) == 1_000_000
    for (_, high, *_), (low, *_) in zip(WIKIPEDIA, WIKIPEDIA[1:], strict=False):
        assert low > high
    gaps = [b[0] for a, b in zip(WIKIPEDIA, WIKIPEDIA[1:], strict=False) if b[0] != a[1] + 1]
    assert all(low > 300_000 for low in gaps), "only where there are hardly any documents are bins left out"
    assert all(low * documents <= tokens <= high * documents for low, high, documents, tokens in WIKIPEDIA)
    mean = sum(row[3] for row in WIKIPEDIA) / 1e6
    assert round(mean, 1) == 1013.6
