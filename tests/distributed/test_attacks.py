"""What every attack promises; building one; data attacks."""

import pytest
import torch

from hardy.config import ConfigError
from hardy.distributed.attacks import ATTACKS, build_attack, flip_labels, permute_targets

N, D, LIARS = 7, 23, (1, 4)
NAMES = sorted(ATTACKS)
ARGUMENTS = {"bit_flip": {"share": 0.3}, "mimic": {"warmup_steps": 3}, "stale": {"steps": 2}}
DRAWN = {"bit_flip", "drift", "fang", "gaussian"}
"""What depends on the seed and the step alike; mimic draws no more than where it begins to learn."""


def stack(seed=0, *, dtype=torch.float32, rows=N, columns=D):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator, dtype=torch.float64) + 0.5).to(dtype)


def median_of(blocks):
    return [block.double().sort(0).values[(len(block) - 1) // 2] for block in blocks]


def made(name, seed=3):
    return build_attack(name, arguments=ARGUMENTS.get(name, {}), seed=seed)


def parts_of(rows, sizes):
    return [part.clone() for part in rows.split(sizes, dim=1)]


def play(attack, blocks, *, references, step=0, **named):
    attack(blocks, attackers=LIARS, references=references, step=step, rule=median_of, **named)
    return blocks


def reference(dtype=torch.float32):
    return stack(99, rows=1, dtype=dtype)[0]


def same(a, b):
    return torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_only_the_rows_of_attackers_change(name, dtype):
    before, g_v = stack(dtype=dtype), reference(dtype)
    (after,) = play(made(name), [before.clone()], references=[g_v])
    changed = [row for row in range(N) if not torch.equal(before[row], after[row])]
    assert changed == [] if name in ("stale", "replay") else set(changed) <= set(LIARS)
    assert changed == list(LIARS) or name in ("stale", "replay", "bit_flip")
    assert g_v.equal(reference(dtype))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [[23], [5, 0, 18], [1, 10, 12]])
def test_blocks_of_a_stack_are_the_stack(name, sizes):
    whole, parts = made(name), made(name)
    for step in range(4):
        rows, g_v = stack(step), reference()
        (dense,) = play(whole, [rows.clone()], references=[g_v], step=step)
        blocks = play(parts, parts_of(rows, sizes), references=list(g_v.split(sizes)), step=step)
        torch.testing.assert_close(torch.cat(blocks, 1), dense, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "optimal"])
@pytest.mark.parametrize("sizes", [[11, 12], [5, 0, 18]])
def test_workers_that_hold_some_columns_each_play_as_one_that_holds_all(name, sizes):
    # A worker's totals come from a first round in which its own numbers are recorded: the rounds are played
    # again, one total further each time, until every worker has seen all totals.
    whole, g_v, firsts = made(name), reference(), [sum(sizes[:i]) for i in range(len(sizes))]
    attacks = [made(name) for _ in sizes]
    for step in range(3):
        rows = stack(step)
        (dense,) = play(whole, [rows.clone()], references=[g_v], step=step)
        shards = played_together(attacks, rows, g_v, sizes, firsts, step)
        torch.testing.assert_close(torch.cat(shards, 1), dense, rtol=2e-6, atol=2e-6, equal_nan=True)


def played_together(attacks, rows, g_v, sizes, firsts, step):
    states, totals = [attack.state_dict() for attack in attacks], []
    while True:
        asked, shards = [], []
        for attack, state, columns, first, part in zip(
            attacks, states, parts_of(rows, sizes), firsts, g_v.split(sizes), strict=True
        ):
            attack.load_state_dict(state)
            total = Recorded(totals)
            try:
                play(attack, [columns], references=[part], step=step, total=total, first_columns=[first])
                shards.append(columns)
            except NotYetKnownError:
                asked.append(total.asked)
        if not asked:
            return shards
        assert not shards, "one worker waits for a total that another does not take part in"
        totals.append(torch.stack(asked).sum(0))


class NotYetKnownError(Exception):
    pass


class Recorded:
    """Answers with the totals that are known; the first unknown one ends the round."""

    def __init__(self, totals):
        self.totals, self.asked = iter(list(totals)), None

    def __call__(self, numbers):
        assert numbers.dtype == torch.float64
        for known in self.totals:
            return known
        self.asked = numbers
        raise NotYetKnownError


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_and_step_play_the_same(name):
    g_v = reference()
    first, second = (play(made(name), [stack()], references=[g_v]) for _ in range(2))
    assert same(first[0], second[0])
    (other,) = play(made(name, seed=4), [stack()], references=[g_v])
    (later,) = play(made(name), [stack()], references=[g_v], step=1)
    assert same(first[0], other) == (name not in DRAWN) or name == "mimic"
    assert same(first[0], later) == (name not in DRAWN)


@pytest.mark.parametrize("name", NAMES)
def test_state_comes_back(name):
    attack, g_v = made(name), reference()
    for step in range(2):
        play(attack, [stack(step)], references=[g_v], step=step)
    state = attack.state_dict()
    assert (state != {}) == (name in ("mimic", "replay", "stale"))
    kept = {key: value.clone() if torch.is_tensor(value) else value for key, value in state.items()}
    again = made(name)
    again.load_state_dict(state)
    for step in range(2, 6):
        went_on, resumed = (play(a, [stack(step)], references=[g_v], step=step)[0] for a in (attack, again))
        assert same(went_on, resumed)
    assert all(same(torch.as_tensor(kept[key]), torch.as_tensor(state[key])) for key in kept)


@pytest.mark.parametrize("name", NAMES)
def test_what_an_attack_needs_is_what_it_looks_at(name):
    attack, rows, g_v = made(name), stack(), reference()
    if ATTACKS[name].needs == "own":
        alone = rows[[1]].clone()
        made(name)([alone], attackers=[0])  # on a stack of one row, before anything is sent
        other = torch.cat([rows[:1] * 5, rows[1:]])
        (after,), (expected,) = (
            play(made(name), [r.clone()], references=None, step=2) for r in (other, rows)
        )
        assert same(after[list(LIARS)], expected[list(LIARS)])
        return
    with pytest.raises(ConfigError, match=rf"'{name}' looks at the honest workers' gradients, but all 7 "):
        attack([rows], attackers=range(N), references=[g_v], rule=median_of)
    if ATTACKS[name].needs == "reference":
        with pytest.raises(
            ConfigError, match=rf"'{name}' works against a trusted gradient, and none was given"
        ):
            attack([rows], attackers=LIARS)
    else:
        first, second = (play(made(name), [stack()], references=r)[0] for r in ([g_v], None))
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", NAMES)
def test_nobody_attacks(name):
    rows = stack()
    made(name)([rows], attackers=[])
    assert torch.equal(rows, stack())


@pytest.mark.parametrize("name", NAMES)
def test_one_honest_row_and_one_column(name):
    rows = stack(rows=3, columns=1)
    made(name)([rows], attackers=[0, 2], references=[reference()[:1]], rule=median_of)
    assert torch.equal(rows[1], stack(rows=3, columns=1)[1])
    if name not in ("nan", "inf", "one_nan", "bit_flip"):
        assert rows.isfinite().all()


def test_an_unknown_attack_or_argument_is_refused():
    with pytest.raises(ConfigError, match="there is no attack 'sign_flop'; did you mean 'sign_flip'"):
        build_attack("sign_flop")
    with pytest.raises(ConfigError, match="no argument of attack 'ipm' 'strenght'; did you mean 'strength'"):
        build_attack("ipm", arguments={"strenght": 2})
    with pytest.raises(ConfigError, match="attack 'zero' takes no arguments, got 'value'"):
        build_attack("zero", arguments={"value": 2})
    with pytest.raises(ConfigError, match="argument of attack 'stale' '_kept'"):
        build_attack("stale", arguments={"_kept": {}})


@pytest.mark.parametrize(
    ("name", "argument", "value", "text"),
    [
        ("alie", "sign", 0, "alie.sign must be one of -1, 1, got 0"),
        ("bit_flip", "share", 0.0, "bit_flip.share must be a number above 0 and at most 1, got 0.0"),
        ("cosine", "q", 0.0, "cosine.q must be a number above 0, got 0.0"),
        ("fang", "b", 1.0, "fang.b must be a number above 1, got 1.0"),
        ("mimic", "worker", -1, "mimic.worker must be a whole number at least 0, got -1"),
        ("min_max", "direction", "std", "min_max.direction must be one of deviation, mean, sign, got 'std'"),
        ("min_sum", "direction", "", "min_sum.direction must be"),
        ("optimal", "base", "fang", "optimal.base must be one of ipm, alie, got 'fang'"),
        ("optimal", "evaluations", 0, "optimal.evaluations must be a whole number at least 1, got 0"),
        ("ipm", "strength", "abc", "ipm.strength must be a number.*, got 'abc'"),
        ("alie", "z", float("nan"), "alie.z must be a number.* or none, got nan"),
        ("huge", "value", True, "huge.value must be a number.*, got True"),
        ("gaussian", "sd", -1, "gaussian.sd must be a number at least 0, got -1"),
        ("mimic", "warmup_steps", 1.5, "mimic.warmup_steps must be a whole number at least 0, got 1.5"),
        ("stale", "steps", 0, "stale.steps must be a whole number at least 1, got 0"),
    ],
)
def test_a_wrong_value_is_refused(name, argument, value, text):
    with pytest.raises(ConfigError, match=text):
        build_attack(name, arguments={argument: value})


def test_labels_are_mirrored_and_ignored_ones_stay():
    labels = torch.tensor([[0, 3], [9, -100]])
    assert flip_labels(labels, 10).tolist() == [[9, 6], [0, -100]]
    assert torch.equal(flip_labels(flip_labels(labels, 10), 10), labels)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_targets_go_through_one_table_without_a_fixed_point(dtype):
    labels = torch.cat([torch.arange(50), torch.tensor([-100, -1]), torch.arange(50)]).to(dtype)
    spoilt = permute_targets(labels, 50, seed=1)
    assert spoilt.dtype == dtype
    assert sorted(spoilt[:50].tolist()) == list(range(50))
    assert (spoilt[:50] != labels[:50]).all()
    assert spoilt[50:52].tolist() == [-100, -1]
    assert torch.equal(spoilt[52:], spoilt[:50])
    assert torch.equal(spoilt, permute_targets(labels, 50, seed=1))
    assert not torch.equal(spoilt, permute_targets(labels, 50, seed=2))
