"""The split of texts: groups stay whole, classes are on either side, and what cannot be is refused."""

import itertools

import numpy as np
import pytest

from hardy.cli.probe_split import split_by_group
from hardy.config import UserError
from hardy.rng import numpy_generator_for

LABELS = ["a"] * 60 + ["b"] * 30 + ["c"] * 2


def test_every_class_is_on_either_side():
    for share in (0.01, 0.25, 0.99):
        split = split_by_group(LABELS, test_share=share, seed=0)
        assert sorted([*split.train, *split.test]) == list(range(92))
        for part in (split.train, split.test):
            assert set(np.asarray(LABELS)[part]) == {"a", "b", "c"}
        assert (split.num_train_groups, split.num_test_groups) == (len(split.train), len(split.test))


def test_texts_without_groups_are_drawn_class_by_class():
    split = split_by_group(LABELS, test_share=0.25, seed=0)
    wanted = []
    for name, start, total, num_test in (("a", 0, 60, 15), ("b", 60, 30, 8), ("c", 90, 2, 1)):
        order = numpy_generator_for(0, "probe", "split", name).permutation(np.arange(start, start + total))
        wanted += sorted(order[:num_test])
    assert split.test.tolist() == wanted


def drawn(seed, *, num_texts=120, num_groups=30, num_classes=3):
    """Return labels and groups of unequal sizes, most of them with several classes."""
    generator = np.random.default_rng(seed)
    groups = (num_groups * generator.random(num_texts) ** 2).astype(int)
    labels = (
        groups * generator.integers(1, 3, num_texts) + generator.integers(0, 2, num_texts)
    ) % num_classes
    return [str(label) for label in labels], [f"group {group}" for group in groups]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("seed", range(10))
def test_no_group_is_on_both_sides(seed, share):
    labels, groups = drawn(seed)
    split = split_by_group(labels, groups, test_share=share, seed=seed)
    sides = [{groups[place] for place in part} for part in (split.train, split.test)]
    assert not sides[0] & sides[1]
    assert [len(side) for side in sides] == [split.num_train_groups, split.num_test_groups]
    assert sorted([*split.train, *split.test]) == list(range(len(labels)))
    for name in set(labels):
        tested, total = sum(labels[place] == name for place in split.test), labels.count(name)
        assert 0 < tested < total
        assert abs(tested - share * total) <= 3, "stratified, as near as groups come"


@pytest.mark.parametrize("seed", range(5))
def test_a_large_group_trains_where_a_small_one_is_enough_to_test(seed):
    labels, groups = ["a"] * 40 + ["b"] * 40, [0] * 30 + list(range(1, 51))
    split = split_by_group(labels, groups, test_share=0.25, seed=seed)
    assert (len(split.test), split.num_test_groups) == (20, 20)


def test_the_split_depends_on_the_seed_alone():
    labels, groups = drawn(0)
    first, again, other = (
        split_by_group(labels, groups, test_share=0.25, seed=seed).test.tolist() for seed in (0, 0, 1)
    )
    assert first == again != other
    renamed = split_by_group(labels, [group.upper() for group in groups], test_share=0.25, seed=0)
    assert renamed.test.tolist() == first


def test_a_split_is_found_wherever_there_is_one():
    """Few groups, every class in two or three of them: against all ways to part them."""
    found = {True: 0, False: 0}
    for seed in range(300):
        generator = np.random.default_rng(seed)
        num_groups = int(generator.integers(3, 7))
        of_class = [
            generator.choice(num_groups, size=generator.integers(2, 4), replace=False) for _ in range(6)
        ]
        labels = [str(name) for name, inner in enumerate(of_class) for _ in inner]
        groups = [group for inner in of_class for group in inner]
        exists = any(
            all(len({sides[group] for group in inner}) == 2 for inner in of_class)
            for sides in itertools.product((0, 1), repeat=num_groups)
        )
        found[exists] += 1
        if exists:
            split_by_group(labels, groups, test_share=0.25, seed=0)
        else:
            with pytest.raises(UserError, match="no split was found"):
                split_by_group(labels, groups, test_share=0.25, seed=0)
    assert min(found.values()) > 20


@pytest.mark.parametrize(
    ("labels", "groups", "text"),
    [
        ("aabb", [0, 1, 2, 2], "class 'b' has 1 group (2 texts); every class needs a group to train on and"),
        ("aab", None, "class 'b' has 1 group (1 text); every class"),
        ("aabbcc", [0, 1, 1, 2, 0, 2], "class 'a' has 2 groups, and no split was found that parts those of"),
    ],
)
def test_a_class_that_cannot_be_on_either_side_is_refused(labels, groups, text):
    with pytest.raises(UserError) as error:
        split_by_group(list(labels), groups, test_share=0.25, seed=0)
    assert str(error.value).startswith(text) or (len(labels) == 6 and "has 2 groups" in str(error.value))
    assert "give it texts of more groups (of a --task by more --examples), or leave it out" in str(
        error.value
    )
