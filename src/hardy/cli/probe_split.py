"""Which texts train a probe and which test it: groups (authors, documents, files) stay whole.

Texts of one file resemble each other, so a probe that was trained on some knows more of the others than of
texts it has never met; the accuracy on them would flatter it.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hardy.config import UserError
from hardy.rng import numpy_generator_for

Array = NDArray[Any]
TRIES = 20
"""Starts from which a split is looked for until every class is on either side."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which texts train and which test."""

    train: Array
    test: Array
    num_train_groups: int
    num_test_groups: int


def split_by_group(
    labels: Sequence[str], groups: Sequence[Hashable] | None = None, *, test_share: float, seed: int
) -> Split:
    """Return a random split that parts no group and has each class on either side.

    Of each class about `test_share` of the texts test, as near as whole groups come.

    Args:
        labels: class of each text.
        groups: of each text; none takes every text as a group of its own.
        test_share: above 0, below 1.
        seed: of the draw.

    Raises:
        UserError: a class cannot be on either side.

    Example:
        >>> split = split_by_group(["a", "b"] * 4, [0, 0, 1, 1, 2, 2, 3, 3], test_share=0.25, seed=0)
        >>> len(split.train), split.num_train_groups, len(split.test), split.num_test_groups
        (6, 3, 2, 1)
    """
    members: dict[Hashable, list[int]] = {}
    for place, group in enumerate(range(len(labels)) if groups is None else groups):
        members.setdefault(group, []).append(place)
    places = list(members.values())
    counts = [Counter(labels[place] for place in inner) for inner in places]
    balance = _Balance(labels, test_share=test_share)
    order = _order(counts, seed=seed)
    for attempt in range(TRIES):
        draw = numpy_generator_for(seed, "probe", "split", "start", attempt).random(len(counts))
        tested = balance.chosen(counts, order, start=[bool(at < 0.5) for at in draw] if attempt else None)
        if not balance.missing():
            break
    else:
        raise UserError(_refusal(balance.missing()[0], counts))
    train, test = (
        [place for inner, is_test in zip(places, tested, strict=True) if is_test == side for place in inner]
        for side in (False, True)
    )
    return Split(
        train=np.sort(np.asarray(train)),
        test=np.sort(np.asarray(test)),
        num_train_groups=len(tested) - sum(tested),
        num_test_groups=sum(tested),
    )


def _order(counts: list[Counter[str]], *, seed: int) -> list[int]:
    """Return the groups' numbers, class by class, those of a class (their most frequent) at random."""
    of_class: dict[str, list[int]] = {}
    for number, inner in enumerate(counts):
        of_class.setdefault(min(inner, key=lambda name: (-inner[name], name)), []).append(number)
    order: list[int] = []
    for name in sorted(of_class):
        order += numpy_generator_for(seed, "probe", "split", name).permutation(of_class[name]).tolist()
    return order


class _Balance:
    """How many texts of each class test, and how far that is from what is wanted."""

    def __init__(self, labels: Sequence[str], *, test_share: float) -> None:
        self.totals = Counter(labels)
        self.wanted = {
            name: min(total - 1, max(1, round(test_share * total))) for name, total in self.totals.items()
        }
        self.tested: Counter[str] = Counter()

    def chosen(self, counts: list[Counter[str]], order: list[int], *, start: list[bool] | None) -> list[bool]:
        """Return which groups test.

        From `start` (none: no group tests) each group in turn changes sides where that helps, until none
        does. The first round knows shares only, lest a class's largest group test because it came first.
        """
        is_test = list(start or [False] * len(counts))
        self.tested = sum((inner for inner, at in zip(counts, is_test, strict=True) if at), Counter[str]())
        num_moved, missing_weighs = 1, 0
        while num_moved or missing_weighs == 0:
            num_moved = 0
            for number in order:
                sign = -1 if is_test[number] else 1
                moved = {name: sign * count for name, count in counts[number].items()}
                gain = sum(
                    self.off(name, by=0, missing_weighs=missing_weighs)
                    - self.off(name, by=by, missing_weighs=missing_weighs)
                    for name, by in moved.items()
                )
                if gain > 1e-9:  # less is rounding, by which sides would change for ever
                    self.tested.update(moved)
                    is_test[number] = not is_test[number]
                    num_moved += 1
            missing_weighs = len(self.totals)  # more than all else together
        return is_test

    def off(self, name: str, *, by: int, missing_weighs: int) -> float:
        """Return how far a class is from what is wanted, were there `by` more test texts of it."""
        tested, total = self.tested[name] + by, self.totals[name]
        return ((tested - self.wanted[name]) / total) ** 2 + missing_weighs * (tested in (0, total))

    def missing(self) -> list[str]:
        """Return the classes that are on one side only."""
        return [name for name, total in sorted(self.totals.items()) if self.tested[name] in (0, total)]


def _refusal(name: str, counts: list[Counter[str]]) -> str:
    num_groups, num_texts = sum(name in inner for inner in counts), sum(inner[name] for inner in counts)
    if num_groups == 1:
        stands = f"has 1 group ({num_texts} text{'s' * (num_texts > 1)})"
    else:
        stands = f"has {num_groups} groups, and no split was found that parts those of all classes"
    return (
        f"class {name!r} {stands}; every class needs a group to train on and another to test on: give it "
        f"texts of more groups (of a --task by more --examples), or leave it out"
    )
