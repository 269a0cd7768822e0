"""What every aggregation rule promises: one table of rules, each with what it promises and its plain twin."""

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hardy.config import ConfigError
from hardy.distributed.aggregation import RULES, build_aggregator, stack
from hardy.distributed.aggregation.columns import drawn_columns
from hardy.distributed.simulation import SimWorld
from hardy.reference import aggregation as twin
from hardy.reference import dstar as trusted_twin
from hardy.rng import generator_for

NUM_ROWS, WIDTH, FAULTY = 13, 41, 2
OWN = 4


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A rule and which promises it makes beyond those that all make."""

    rule: str
    twin: Callable[..., Any]
    """twin(X, f, g_v) -> u, in float64; X may be changed."""
    arguments: dict[str, Any] = field(default_factory=dict)
    pre: tuple[str, ...] = ()
    translates: bool = True
    rotates: bool = True
    scales: bool = True
    is_mean_without_faulty: bool = False
    in_honest_box: bool = False
    kappa: Callable[[float], float] | None = None
    """kappa(r): bound on the squared error over the honest variance."""
    is_robust: bool = True
    keeps_equal_rows: bool = True
    least: Callable[[int], int] = lambda f: 2 * f + 1

    @property
    def id(self):
        words = [*self.pre, self.rule, *(f"{key}={value}" for key, value in self.arguments.items())]
        return "-".join(words)

    def build(self, num_faulty=FAULTY):
        return build_aggregator(self.rule, num_faulty=num_faulty, arguments=self.arguments, pre=self.pre)

    def run(self, blocks, *, num_faulty=FAULTY, reference=None, own_row=OWN, **others):
        aggregator = self.build(num_faulty)
        references = split_like(reference, blocks) if aggregator.needs_reference else None
        return aggregator(blocks, references=references, own_row=own_row, **others)


def by_trust(rule):
    return lambda X, f, g: rule(X, g)


def by_rows(rule):
    return lambda X, f, g: rule(X)


def by_rows_and_f(rule):
    return lambda X, f, g: rule(X, f)


def dstar_twin(**settings):
    def run(X, f, g):
        return trusted_twin.dstar([X], [g], trusted_twin.Settings(**settings))[-1].u

    return run


DNC_COLUMNS, DNC_ROUNDS = 30, 3


def dnc_twin(X, f, g):
    draws = [
        drawn_columns(X.shape[1], DNC_COLUMNS, seed=0, purpose=["dnc", round_, 0]).tolist()
        for round_ in range(DNC_ROUNDS)
    ]
    return twin.dnc_subsampled(X, f, draws)


TRUSTED = {"translates": False, "least": lambda f: f + 1}
ENTRIES = [
    Entry(
        rule="mean", twin=by_rows(twin.mean), is_mean_without_faulty=True, is_robust=False, least=lambda f: 1
    ),
    Entry(
        rule="median",
        twin=by_rows(twin.median),
        rotates=False,
        in_honest_box=True,
        kappa=lambda r: 4 * (1 + r) ** 2,
    ),
    Entry(
        rule="trimmed_mean",
        twin=by_rows_and_f(twin.trimmed_mean),
        rotates=False,
        is_mean_without_faulty=True,
        in_honest_box=True,
        kappa=lambda r: 6 * r * (1 + r),
    ),
    Entry(rule="meamed", twin=by_rows_and_f(twin.meamed), rotates=False, is_mean_without_faulty=True),
    Entry(rule="phocas", twin=by_rows_and_f(twin.phocas), rotates=False, is_mean_without_faulty=True),
    Entry(
        rule="sign_majority",
        twin=by_rows(twin.sign_majority),
        translates=False,
        rotates=False,
        scales=False,
        keeps_equal_rows=False,
    ),
    Entry(
        rule="bulyan",
        twin=by_rows_and_f(twin.bulyan),
        rotates=False,
        is_mean_without_faulty=True,
        least=lambda f: 4 * f + 3,
    ),
    Entry(
        rule="krum",
        twin=by_rows_and_f(twin.krum),
        kappa=lambda r: 6 * (1 + r),
        least=lambda f: 2 * f + 3,
    ),
    Entry(
        rule="krum",
        arguments={"neighbours": "byzfl"},
        twin=lambda X, f, g: X[min(range(len(X)), key=twin.krum_scores(X, f, len(X) - f - 1).__getitem__)],
    ),
    Entry(
        rule="multi_krum",
        twin=by_rows_and_f(twin.multi_krum),
        is_mean_without_faulty=True,
        least=lambda f: 2 * f + 3,
    ),
    Entry(
        rule="multi_krum",
        arguments={"keep": 3},
        twin=lambda X, f, g: twin.multi_krum(X, f, keep=3),
        least=lambda f: 2 * f + 3,
    ),
    Entry(rule="geometric_median", twin=by_rows(twin.geometric_median), kappa=lambda r: 4 * (1 + r) ** 2),
    Entry(
        rule="centered_clip",
        twin=lambda X, f, g: twin.centered_clip(X, 0 * X[0]),
        translates=False,
    ),
    Entry(
        rule="centered_clip",
        arguments={"tau": 2.0, "rounds": 2},
        twin=lambda X, f, g: twin.centered_clip(X, 0 * X[0], rounds=2, tau=2.0),
        translates=False,
        scales=False,
        keeps_equal_rows=False,
    ),
    Entry(rule="mda", twin=by_rows_and_f(twin.mda), is_mean_without_faulty=True),
    Entry(rule="smea", twin=by_rows_and_f(twin.smea), is_mean_without_faulty=True),
    Entry(rule="monna", twin=lambda X, f, g: twin.monna(X, f, OWN), is_mean_without_faulty=True),
    Entry(rule="caf", twin=by_rows_and_f(twin.caf), is_mean_without_faulty=True),
    Entry(rule="dnc", twin=by_rows_and_f(twin.dnc), is_mean_without_faulty=True),
    Entry(
        rule="dnc",
        arguments={"columns": DNC_COLUMNS, "rounds": DNC_ROUNDS},
        twin=dnc_twin,
        rotates=False,
        is_mean_without_faulty=True,
    ),
    Entry(rule="cge", twin=by_rows_and_f(twin.cge), translates=False, is_mean_without_faulty=True),
    Entry(rule="aksel", twin=by_rows(twin.aksel), rotates=False),
    Entry(rule="fltrust", twin=by_trust(trusted_twin.fltrust), **TRUSTED),
    Entry(rule="zeno_plus_plus", twin=by_trust(trusted_twin.zeno_plus_plus), **TRUSTED),
    Entry(
        rule="zeno_plus_plus",
        arguments={"rho": 0.3, "epsilon": 0.1},
        twin=lambda X, f, g: trusted_twin.zeno_plus_plus(X, g, rho=0.3, eps=0.1),
        scales=False,
        **TRUSTED,
    ),
    Entry(rule="diversefl", twin=by_trust(trusted_twin.diversefl), **TRUSTED),
    Entry(rule="dstar", twin=dstar_twin(), translates=False),
    Entry(rule="dstar", arguments={"scale": "none"}, twin=dstar_twin(scale="none"), translates=False),
    Entry(rule="dstar", arguments={"scale": "unit"}, twin=dstar_twin(scale="unit"), translates=False),
    Entry(  # its first step
        rule="kardam",
        twin=lambda X, f, g: twin.trimmed_mean(twin.nnm(X, f), f),
        rotates=False,
        is_mean_without_faulty=True,
        least=lambda f: 3 * f + 1,
    ),
    Entry(rule="norm_clip", twin=by_rows(twin.norm_clip), translates=False),
    Entry(
        rule="norm_clip",
        arguments={"norm": 3.0},
        twin=lambda X, f, g: twin.norm_clip(X, 3.0),
        translates=False,
        scales=False,
        keeps_equal_rows=False,
    ),
    Entry(rule="norm_screen", twin=by_rows(twin.norm_screen), translates=False),
    Entry(
        rule="trimmed_mean",
        pre=("nnm",),
        twin=lambda X, f, g: twin.trimmed_mean(twin.nnm(X, f), f),
        rotates=False,
        is_mean_without_faulty=True,
        kappa=lambda r: 8 * r / (1 + r) * (6 * r * (1 + r) + 1),
    ),
    Entry(
        rule="krum",
        pre=("nnm",),
        twin=lambda X, f, g: twin.krum(twin.nnm(X, f), f),
        kappa=lambda r: 8 * r / (1 + r) * (6 * (1 + r) + 1),
        least=lambda f: 2 * f + 3,
    ),
    Entry(
        rule="mean",
        pre=("arc",),
        twin=lambda X, f, g: twin.mean(twin.arc(X, f)),
        translates=False,
        is_mean_without_faulty=True,
    ),
    Entry(
        rule="geometric_median",
        pre=("clip:4", "nnm"),
        twin=lambda X, f, g: twin.geometric_median(twin.nnm(twin.clip(X, 4.0), f)),
        translates=False,
        scales=False,
        keeps_equal_rows=False,
    ),
    Entry(
        rule="dstar",
        pre=("nnm",),
        twin=lambda X, f, g: trusted_twin.dstar([twin.nnm(X, f)], [g], trusted_twin.Settings())[-1].u,
        translates=False,
    ),
]
each = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)


def promising(name):
    return pytest.mark.parametrize(
        "entry", [entry for entry in ENTRIES if getattr(entry, name)], ids=lambda entry: entry.id
    )


def rows_for(name, *, num_rows=NUM_ROWS, width=WIDTH, spread=0.8, dtype=torch.float32):
    """Return a stack whose rows agree a little, and a trusted gradient that resembles them."""
    draw = generator_for(0, "contract", name)
    centre = torch.randn(width, generator=draw, dtype=torch.float64)
    noise = torch.randn(num_rows + 1, width, generator=draw, dtype=torch.float64)
    rows = centre + spread * noise * torch.linspace(0.5, 1.5, num_rows + 1, dtype=torch.float64)[:, None]
    return rows[:-1].to(dtype), rows[-1].to(dtype)


def split_like(vector, blocks):
    return list(vector.split([block.shape[1] for block in blocks]))


def whole(outcome):
    assert outcome.taken == "rows"
    return torch.cat([vector.double() for vector in outcome.vectors])


def close(got, want, tolerance=1e-6):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(1.0, want.abs().max().item()))


def test_the_table_has_every_rule():
    assert {entry.rule for entry in ENTRIES} == set(RULES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@each
def test_equals_its_twin(entry, dtype):
    for trial in range(3):
        X, g = rows_for(trial, dtype=dtype)
        want = entry.twin(X.double(), FAULTY, g.double())
        got = entry.run([X], reference=g)
        assert got.vectors[0].dtype == dtype
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
        close(whole(got), want, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each
def test_order_of_rows_does_not_matter(entry, dtype):
    X, g = rows_for("order", dtype=dtype)
    order = torch.randperm(NUM_ROWS, generator=generator_for(1, "order"))
    here, there = (
        entry.run([X], reference=g),
        entry.run([X[order]], reference=g, own_row=order.tolist().index(OWN)),
    )
    close(whole(there), whole(here), 1e-6 if dtype == torch.float32 else 2**-8)
    if here.weights is not None:
        torch.testing.assert_close(there.weights, here.weights[order], rtol=1e-6, atol=1e-7)


@promising("translates")
def test_moves_along(entry):
    X, g = rows_for("move", dtype=torch.float64)
    shift = torch.linspace(-3, 5, WIDTH, dtype=torch.float64)
    close(whole(entry.run([X + shift])), whole(entry.run([X])) + shift, 1e-9)


MAY_STAY = ("dstar", "norm_screen")  # a trusted gradient that moves along, and equal shares: then they do too


@pytest.mark.parametrize(
    "entry",
    [e for e in ENTRIES if not e.translates and e.rule not in MAY_STAY],
    ids=lambda entry: entry.id,
)
def test_what_does_not_move_along_says_so(entry):
    X, g = rows_for("move", dtype=torch.float64)
    shift = torch.linspace(-30, 50, WIDTH, dtype=torch.float64)
    there = whole(entry.run([X + shift], reference=g + 1 + shift))
    assert (there - shift - whole(entry.run([X], reference=g + 1))).abs().max() > 1e-3


@promising("scales")
def test_grows_along(entry):
    X, g = rows_for("grow")
    for factor in (2.0**-40, 2.0**70):
        got = entry.run([X * factor], reference=g * factor)
        close(whole(got) / factor, whole(entry.run([X], reference=g)))


@promising("rotates")
def test_turns_along(entry):
    X, g = rows_for("turn", dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator_for(2, "turn"), dtype=torch.float64))[0]
    close(whole(entry.run([X @ Q], reference=g @ Q)), whole(entry.run([X], reference=g)) @ Q, 1e-9)


@each
def test_is_odd(entry):
    X, g = rows_for("odd")
    close(whole(entry.run([-X], reference=-g)), -whole(entry.run([X], reference=g)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@promising("keeps_equal_rows")
def test_equal_rows_give_that_row(entry, dtype):
    X = rows_for("equal", dtype=dtype)[0][:1].expand(NUM_ROWS, WIDTH)
    close(whole(entry.run([X], reference=X[0])), X[0].double(), 1e-6 if dtype == torch.float32 else 2**-8)


@promising("is_mean_without_faulty")
def test_is_the_mean_without_faulty_rows(entry):
    X, g = rows_for("no fault")
    close(whole(entry.run([X], num_faulty=0, reference=g)), X.double().mean(0))


@pytest.mark.parametrize("num_rows", [1, 2, 3])
@each
def test_a_few_rows_will_do_without_faulty_ones(entry, num_rows):
    X, g = rows_for("few", num_rows=num_rows)
    arguments = dict(entry.arguments)
    if arguments.pop("keep", None) is not None:
        arguments["keep"] = 1
    aggregator = build_aggregator(entry.rule, num_faulty=0, arguments=arguments, pre=entry.pre)
    outcome = aggregator([X], references=[g] if aggregator.needs_reference else None, own_row=0)
    assert outcome.vectors[0].isfinite().all()
    if num_rows == 1 and entry.keeps_equal_rows and not aggregator.needs_reference:
        close(outcome.vectors[0], X[0])


def attacked(honest, num_faulty, trial):
    """Return bad rows: crude, hidden, close to honest ones, all at one place or apart."""
    mu, sigma = honest.mean(0), honest.std(0)
    draw = generator_for(3, "attack", trial)
    noise = torch.randn(num_faulty, honest.shape[1], generator=draw, dtype=honest.dtype)
    kinds = [
        -10 * mu + 0 * noise,
        -0.5 * mu + 0 * noise,
        mu - 1.5 * sigma + 0 * noise,
        mu + 3 * sigma.norm() * noise / noise.norm(dim=1, keepdim=True),
        honest[:1] + 0 * noise,
        1e6 * noise,
        -honest[:num_faulty],
        (mu + 2 * sigma)[None] + 1e-3 * noise,
    ]
    return kinds[trial % len(kinds)]


@promising("kappa")
def test_error_stays_within_its_bound(entry):
    worst = 0.0
    for trial in range(200):
        f = 1 + trial % 4
        n = max(entry.least(f), 2 * f + 1) + trial % 5
        honest, _ = rows_for(("kappa", trial), num_rows=n - f, width=1 + trial % 7, dtype=torch.float64)
        if len(honest) < 2:
            continue
        outcome = entry.run([torch.cat([honest, attacked(honest, f, trial)])], num_faulty=f, own_row=0)
        error = (whole(outcome) - honest.mean(0)).square().sum()
        variance = (honest - honest.mean(0)).square().sum(1).mean()
        worst = max(worst, (error / variance).item() / entry.kappa(f / (n - 2 * f)))
    assert 0 < worst <= 1


@promising("in_honest_box")
def test_stays_between_honest_values(entry):
    for trial in range(50):
        f = 1 + trial % 5
        honest, _ = rows_for(("box", trial), num_rows=f + 1 + trial % 3)
        outcome = entry.run([torch.cat([honest, attacked(honest, f, trial)])], num_faulty=f, own_row=0)
        assert (outcome.vectors[0] >= honest.min(0).values - 1e-6).all()
        assert (outcome.vectors[0] <= honest.max(0).values + 1e-6).all()


BAD = {
    "NaN row": lambda row: row.fill_(torch.nan),
    "one NaN": lambda row: row[3].fill_(torch.nan),
    "Inf": lambda row: row[7].fill_(torch.inf),
    "-Inf": lambda row: row.fill_(-torch.inf),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
@each
def test_rows_that_are_not_finite_are_as_if_they_were_not_there(entry, spoil, dtype):
    X, g = rows_for("bad", dtype=dtype)
    spoil(X[1]), spoil(X[9])
    got = entry.run([X[:, :20], X[:, 20:]], reference=g)
    good = [row for row in range(NUM_ROWS) if row not in (1, 9)]
    want = entry.run([X[good][:, :20], X[good][:, 20:]], num_faulty=0, reference=g, own_row=good.index(OWN))
    assert got.removed == (1, 9) and got.metrics["removed"] == 2.0 and got.metrics["excess"] == 0.0
    close(whole(got), whole(want))  # products of more rows may be rounded otherwise
    if got.weights is not None:
        close(got.weights[good], want.weights)
        assert got.weights[[1, 9]].eq(0).all()


@each
def test_one_bad_row_leaves_the_others_their_guard(entry):
    X, g = rows_for("one bad")
    X[1] = torch.nan
    good = [row for row in range(NUM_ROWS) if row != 1]
    want = entry.run([X[good]], num_faulty=FAULTY - 1, reference=g, own_row=good.index(OWN))
    close(whole(entry.run([X], reference=g)), whole(want))


@each
def test_more_bad_rows_than_expected_are_reported_and_left_out(entry, caplog):
    X, g = rows_for("excess")
    X[[0, 1, 2]] = torch.inf
    with caplog.at_level(logging.WARNING):
        got = entry.run([X], reference=g)
    assert "3 where num_faulty=2 was expected" in caplog.text and got.metrics["excess"] == 1.0
    want = entry.run([X[3:]], num_faulty=0, reference=g, own_row=OWN - 3)
    close(whole(got), whole(want))


@each
def test_without_any_good_row_the_step_is_left_out(entry):
    X, g = rows_for("none")
    outcome = entry.run([X.fill_(torch.nan)], reference=g)
    assert outcome.vectors is None and outcome.taken == "nothing" and len(outcome.removed) == NUM_ROWS


HUGE = [1e12, 1e20, 3e38]


@pytest.mark.parametrize("size", HUGE)
@promising("is_robust")
def test_huge_rows_are_ordinary_bad_rows(entry, size):
    """Bounded whatever their size, and as far away as they are counts no more."""
    X, g = rows_for("huge")
    bad = torch.sign(rows_for("signs")[0][:FAULTY])
    X[:FAULTY] = 1e4 * bad
    want = whole(entry.run([X], reference=g))
    X[:FAULTY] = size * bad
    got = whole(entry.run([X], reference=g))
    assert got.norm() <= 3 * X[FAULTY:].norm(dim=1).max()
    if entry.scales and entry.rule != "dstar":  # nothing depends on where exactly an outlier is
        close(got, want, 1e-3)


def test_one_bad_row_moves_the_mean_anywhere():
    X, g = rows_for("mean")
    X[3] = 1e20
    assert ENTRIES[0].run([X]).vectors[0].norm() > 1e18


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.rule != "mean"], ids=lambda entry: entry.id)
def test_columns_of_one_huge_row_stay_with_it(entry):
    X, g = rows_for("one huge")
    X[0, 0] = 1e20
    assert whole(entry.run([X], reference=g)).norm() <= 3 * X[1:].norm(dim=1).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@each
def test_rows_are_only_read_and_nothing_is_recorded(entry, dtype):
    X, g = rows_for("read", dtype=dtype)
    X[2, 5] = torch.nan
    before, trusted = X.clone(), g.clone()
    X.requires_grad_(), g.requires_grad_()
    outcome = entry.run([X], reference=g)
    assert torch.equal(X.nan_to_num(7), before.nan_to_num(7)) and torch.equal(g, trusted)
    vector = outcome.vectors[0]
    assert (vector.dtype, vector.device, vector.requires_grad) == (dtype, X.device, False)
    assert vector.shape == (WIDTH,) and vector.data_ptr() not in {row.data_ptr() for row in X}


@pytest.mark.parametrize("width", [0, 1])
@each
def test_narrow_stacks_will_do(entry, width):
    X, g = rows_for("narrow", width=width)
    assert entry.run([X], reference=g).vectors[0].shape == (width,) if width else True
    outcome = entry.run([X, torch.zeros(NUM_ROWS, 0)], reference=g)
    assert outcome.vectors is None or [len(v) for v in outcome.vectors] == [width, 0]


@each
def test_no_blocks_are_refused(entry):
    with pytest.raises(ValueError, match="there are no blocks"):
        entry.build()([])


@pytest.mark.parametrize("chunk", [1, 7, 2**17])
@each
def test_chunks_and_blocks_do_not_matter(entry, chunk, monkeypatch):
    X, g = rows_for("chunks")
    want = entry.run([X], reference=g)
    monkeypatch.setattr(stack, "CPU_CHUNK", chunk)
    for cuts in ([41], [1, 30, 10], [0, 41]):
        got = entry.run(list(X.split(cuts, dim=1)), reference=g)
        assert [len(vector) for vector in got.vectors] == cuts
        close(whole(got), whole(want))


@pytest.mark.parametrize(
    "cuts", [[41], [20, 21], [1, 9, 31], [8, 0, 13, 19, 1]], ids=lambda cuts: str(len(cuts))
)
@each
def test_workers_with_some_columns_each_decide_as_one_with_all(entry, cuts):
    X, g = rows_for("shards")
    X[9, 40] = torch.nan
    want = entry.run([X], reference=g)
    shards, trusted = X.split(cuts, dim=1), g.split(cuts)

    def body(comm):
        begins = [sum(cuts[: comm.rank])]
        return entry.run(
            [shards[comm.rank]], reference=trusted[comm.rank], total=comm.sum, first_columns=begins
        )

    got = SimWorld(len(cuts)).run(body)
    close(torch.cat([outcome.vectors[0] for outcome in got]).double(), whole(want))
    for outcome in got:
        assert (outcome.removed, outcome.taken) == (want.removed, want.taken)
        assert outcome.metrics.get("accepted") == want.metrics.get("accepted")


@each
def test_a_run_that_is_resumed_changes_no_bit(entry, tmp_path):
    steps = [rows_for(("resume", step)) for step in range(6)]

    def go_on(aggregator, part):
        vectors = []
        for number, (X, g) in part:
            references = [g] if aggregator.needs_reference else None
            vectors.append(aggregator([X], references=references, own_row=OWN, step=number).vectors[0])
        return vectors

    numbered = list(enumerate(steps))
    want = go_on(entry.build(), numbered)
    first = entry.build()
    go_on(first, numbered[:3])
    torch.save(first.state_dict(), tmp_path / "state")
    go_on(first, numbered[3:])  # what was saved does not change with it
    second = entry.build()
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for got, exact in zip(go_on(second, numbered[3:]), want[3:], strict=True):
        assert torch.equal(got, exact)


@each
def test_too_many_faulty_rows_are_refused(entry):
    f = 3
    least = max(entry.least(f), (entry.arguments.get("keep") or 0) + f)
    aggregator = entry.build(f)
    aggregator.check(least)
    if entry.rule == "mean" and not entry.pre:
        return
    with pytest.raises(ConfigError) as caught:
        aggregator.check(least - 1)
    said = str(caught.value)
    assert entry.rule in said and f"num_faulty={f} among {least - 1} rows" in said
    assert f"let at least {least} rows take part" in str(caught.value)
    for legal in (2, 1):
        if max(entry.least(legal), (entry.arguments.get("keep") or 0) + legal) <= least - 1:
            assert f"at most {legal}, or" in str(caught.value)
            break
    with pytest.raises(ConfigError):
        entry.run([torch.ones(least - 1, 3)], num_faulty=f, reference=torch.ones(3), own_row=0)


class Peak(TorchDispatchMode):
    """Adds up the bytes of storages that operations make and that are still alive, and keeps the peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        where, size = storage.data_ptr(), storage.nbytes()
        if size == 0:
            return
        self.known.add(where)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, where, size)

    def _gone(self, where, size):
        self.known.discard(where)
        self.live -= size


@each
def test_memory_is_a_few_chunks(entry):
    """The result, at most n rows of a chunk, again for mixtures of them, and a few rows of temporaries."""
    chunk, num_chunks = stack.CPU_CHUNK, 8
    X, g = rows_for("memory", width=num_chunks * chunk)
    kept = [X, g, *X.unbind(), *g.split(chunk)]
    with Peak() as account:
        account.known |= {tensor.untyped_storage().data_ptr() for tensor in kept}
        entry.run([X], reference=g)
    mixtures = 1 if not entry.pre and entry.rule not in ("kardam", "aksel", "dstar") else 2
    rows_kept = NUM_ROWS * num_chunks if entry.rule == "kardam" else 0
    vectors = {"centered_clip": 3, "kardam": 1}.get(entry.rule, 1)
    allowed = vectors * num_chunks + rows_kept + mixtures * NUM_ROWS + 5
    assert account.peak <= 4 * chunk * allowed + 100_000
