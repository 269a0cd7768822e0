"""Tables of coefficients."""

from hardy.balance.cost_tables import FLEXSP, FLEXSP_BANDWIDTH, HYDRAULIS


def test_all_rows_are_there():
    assert {name: (len(m.times), len(m.memory)) for name, m in HYDRAULIS.items()} == {
        "hydraulis-7b": (13, 5),
        "hydraulis-13b": (12, 4),
        "hydraulis-32b": (15, 5),
        "hydraulis-7b-a100": (10, 4),
    }
    assert len(FLEXSP) == 6 and list(FLEXSP_BANDWIDTH) == [2, 4, 8, 16, 32, 64]


def test_a_stage_is_never_slower_than_fewer_stages():
    for machine in HYDRAULIS.values():
        linear = {(row.tensor, row.pipeline): row.b for row in machine.times}
        for (tensor, pipeline), b in linear.items():
            assert all(b < other for (t, p), other in linear.items() if t == tensor and p < pipeline)
