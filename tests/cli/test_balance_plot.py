"""The timeline as a picture."""

import pytest

from hardy.balance.cost import DecoderSizes, analytic_cost
from hardy.balance.planner import plan
from hardy.cli.balance_plot import draw_timeline
from hardy.config import UserError

COST = analytic_cost(DecoderSizes(4, 64, 160, 4, 4, 16, 512), cap_tokens=100)
MADE = plan([90, 80, 40, 30, 20, 10, 5], world_size=2, cost=COST)


def test_a_picture_is_written(tmp_path):
    path = draw_timeline(MADE, tmp_path / "plan.png")
    assert path.stat().st_size > 5000


def test_where_it_cannot_be_it_says_so(tmp_path):
    with pytest.raises(UserError, match="png could not be written: No such file or directory$"):
        draw_timeline(MADE, tmp_path / "none" / "plan.png")
