"""From blocks of rows to one vector: leave out what is not finite, check, prepare, decide, add up.

All decisions come from numbers that were added up over the workers holding the other columns, so all take the
same ones. Letters: N rows given, R of them finite, n in view of the rule, f faulty, d columns of a block.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from hardy.config import ConfigError, NonNegativeInt, Range, UserError
from hardy.distributed.aggregation.call import (
    Call,
    Outcome,
    checked_blocks,
    checked_first_columns,
    checked_own_row,
    checked_references,
    checked_sample_weights,
    checked_workers,
)
from hardy.distributed.aggregation.coordinate import TrimmedMean
from hardy.distributed.aggregation.history import History
from hardy.distributed.aggregation.memory import Memory
from hardy.distributed.aggregation.names import BY_DISTANCE, ONLY_SHORTEN
from hardy.distributed.aggregation.preaggregation import NearestNeighbourMixing, PreAggregator
from hardy.distributed.aggregation.rule import CoordinateRule, Rule, Weighing, WeightRule
from hardy.distributed.aggregation.settings import check_settings
from hardy.distributed.aggregation.stack import (
    RowNumbers,
    Total,
    exact_products,
    identity,
    row_numbers,
    weighted_sums,
)
from hardy.distributed.aggregation.view import View, gram, with_last_vector

logger = logging.getLogger(__name__)

MOST_ROWS_LOOKED_FOR = 10_000


class TooManyFaultyRowsError(UserError):
    """More rows held NaN or infinity than the rule was told to expect."""


@dataclass(frozen=True, kw_only=True)
class _Manner:
    """What an aggregator is told besides its rule."""

    num_faulty: NonNegativeInt
    on_excess: Literal["warn", "error"]
    seed: int
    rows_are: Literal["rows", "workers"]
    history: Annotated[float, Range(least=0, below=1)]

    def __post_init__(self) -> None:
        check_settings(self, section="")


class Aggregator:
    """A rule, what comes before it, and what it carries from step to step.

    Args:
        rule: how the rows become one vector.
        num_faulty: f, rows that may be anything. Each row that is removed counts as one of them.
        pre: what is done to the rows before, in order.
        on_excess: what to do when more than f rows hold NaN or infinity: "warn" goes on with the others.
        seed: of what is drawn.
        rows_are: whose the rows are, for texts: rows that were handed in, or a run's workers, whose user
            knows settings.
        history: decay at which rows are averaged over the steps, worker by worker, before they are judged
            (`history`); 0 judges each step by itself. Takes memory of one row per worker. Needs a rule of
            `names.BY_DISTANCE` and the same workers at each step.

    Raises:
        ConfigError: a value that is refused, `pre` makes new rows where it matters whose a row is, or the
            rule cannot judge averages.

    Example:
        >>> from hardy.distributed.aggregation.coordinate import Median
        >>> rows = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, torch.nan], [9.0, 3.0]])
        >>> outcome = Aggregator(Median(), num_faulty=1)([rows])
        >>> outcome.vectors, outcome.removed
        ([tensor([2., 2.])], (2,))
    """

    def __init__(
        self,
        rule: Rule,
        *,
        num_faulty: int,
        pre: Sequence[PreAggregator] = (),
        on_excess: Literal["warn", "error"] = "warn",
        seed: int = 0,
        rows_are: Literal["rows", "workers"] = "rows",
        history: float = 0.0,
    ) -> None:
        manner = _Manner(
            num_faulty=num_faulty, on_excess=on_excess, seed=seed, rows_are=rows_are, history=history
        )
        if history and rule.name not in BY_DISTANCE:
            raise ConfigError(
                f"history={history:g} needs a rule that judges by distances alone "
                f"({', '.join(sorted(BY_DISTANCE))}), and {rule.name!r} does not; choose one, or set it to 0"
            )
        self._keeps_rows = all(step.keeps_rows for step in pre)
        mixing = [
            repr(step.name)
            for step in pre
            if (rule.names_rows and not step.keeps_rows) or (history and step.name not in ONLY_SHORTEN)
        ]
        if mixing:
            who = f"history={history:g}" if history else f"the rule {rule.name!r}"
            raise ConfigError(f"{who} must know whose a row is; leave out {', '.join(mixing)}, which mixes")
        self.rule, self.num_faulty, self.pre = rule, manner.num_faulty, tuple(pre)
        self.on_excess, self.seed, self.history = manner.on_excess, manner.seed, manner.history
        self._rows_are: Literal["rows", "workers"] = rows_are
        self._memory = Memory(state=rule.start())
        self._told: tuple[int, ...] = ()

    @property
    def needs_reference(self) -> bool:
        """Whether a trusted gradient must be given."""
        return self.rule.needs_reference

    @property
    def needs_gram(self) -> bool:
        """Whether the Gram matrix is formed."""
        return self.rule.forms_gram or any(step.needs_gram for step in self.pre)

    @property
    def is_coordinate(self) -> bool:
        """Whether each coordinate is looked at alone, so that columns may be given bit by bit."""
        return self.rule.is_coordinate and not self.pre

    @property
    def is_self_reported(self) -> bool:
        """Whether `weigh` will do: squared norms, and dots with the trusted gradient, are all it needs."""
        return self.rule.is_self_reported and not self.needs_gram

    def check(self, num_rows: int) -> None:
        """Refuse a stack of so many rows.

        Raises:
            ConfigError: names the rule, n, f, the largest f that would do and the smallest n.
        """
        if self._withstands(num_rows, self.num_faulty):
            return
        names = " after ".join(repr(part.name) for part in (self.rule, *reversed(self.pre)))
        refusal = f"{names} cannot bear {self._named_f} among {num_rows} {self._rows_are}"
        legal = [f for f in range(num_rows) if self._withstands(num_rows, f)]
        ways = [f"lower it to at most {max(legal)}"] if legal else []
        if not self.rule.is_feasible(num_rows, self.num_faulty):
            refusal += ", whose subsets are too many to be tried"
        else:
            larger = range(num_rows + 1, MOST_ROWS_LOOKED_FOR)
            enough = next((n for n in larger if self._withstands(n, self.num_faulty)), None)
            ways += [] if enough is None else [f"let at least {enough} {self._rows_are} take part"]
        raise ConfigError(f"{refusal}; {', or '.join(ways or ['choose another rule'])}")

    @torch.no_grad()
    def __call__(
        self,
        blocks: Sequence[Tensor],
        *,
        references: Sequence[Tensor] | None = None,
        own_row: int | None = None,
        sample_weights: Tensor | None = None,
        workers: Sequence[int] | None = None,
        step: int = 0,
        total: Total = identity,
        first_columns: Sequence[int] | None = None,
    ) -> Outcome:
        """Return the vector of the rows.

        Args:
            blocks: [N, d] each, floating, any devices: disjoint columns of one stack. They are only read.
            references: the trusted gradient, [d] per block.
            own_row: of the worker itself, for the rule that needs it.
            sample_weights: [N], how much each row counts in an average of rules that heed it.
            workers: who sent the rows, for rules that remember senders; none is 0 to N - 1.
            step: number of the step, on which draws depend.
            total: adds over the workers that hold the other columns.
            first_columns: where each block begins among the columns of all workers, for rules that draw some;
                none counts from 0 over the blocks.

        Raises:
            ConfigError: too few rows for f.
            TooManyFaultyRowsError: more bad rows than f, where `on_excess` is "error".
            ValueError: blocks, references or weights that do not fit together.
        """
        blocks = checked_blocks(blocks)
        num_rows = blocks[0].shape[0]
        self.check(num_rows)
        trusted = checked_references(blocks, references, self.rule.name) if self.needs_reference else None
        own_row = checked_own_row(own_row, num_rows, required=self.rule.name == "monna")
        with exact_products():
            call = Call(
                blocks=blocks,
                references=trusted,
                numbers=row_numbers(blocks, trusted, total),
                sample_weights_N=checked_sample_weights(sample_weights, num_rows),
                own_row=own_row,
                workers=checked_workers(workers, num_rows),
                step=step,
                total=total,
                first_columns=checked_first_columns(blocks, first_columns),
            )
            return self._aggregate(call)

    @torch.no_grad()
    def weigh(
        self,
        squares_N: Tensor,
        dots_N: Tensor | None = None,
        reference_square: float | Tensor | None = None,
        *,
        sample_weights: Tensor | None = None,
        step: int = 0,
    ) -> Outcome:
        """Return weights from what each worker reports: squared norm and dot with the trusted gradient.

        Rows whose numbers are not finite are removed. Two things need the rows themselves and are left out:
        small distances of dSTAR are not formed again directly, and a bad trusted gradient leaves the step
        out.

        Raises:
            ConfigError: the rule needs more than that, or too few rows for f.
            ValueError: the rule needs the dots, and they are missing.
        """
        if not self.is_self_reported:
            raise ConfigError(
                f"the rule {self.rule.name!r} after {[step.name for step in self.pre]} needs the rows "
                f"themselves, not only their norms; exchange them"
            )
        self.check(len(squares_N))
        if self.needs_reference and (dots_N is None or reference_square is None):
            raise ValueError(f"the rule {self.rule.name!r} needs dots_N and reference_square")
        numbers = RowNumbers(
            squares_N=squares_N.detach().double().cpu(),
            dots_N=dots_N.detach().double().cpu() if self.needs_reference and dots_N is not None else None,
            reference_square=torch.nan if reference_square is None else float(reference_square),
        )
        weights_N = checked_sample_weights(sample_weights, len(squares_N))
        workers = checked_workers(None, len(squares_N))
        return self._aggregate(Call(numbers=numbers, sample_weights_N=weights_N, workers=workers, step=step))

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on: tensors, of this worker's columns, and plain values."""
        return self._memory.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take it back."""
        self._memory = Memory.of(state_dict, decay=self.history)

    def forget_columns(self) -> None:
        """Begin anew with vectors and rows of earlier steps: the columns will be others from now on."""
        self._memory = Memory(state=self._memory.state)

    @property
    def _named_f(self) -> str:
        """f under the name by which it was given."""
        return f"{'strategy.f' if self._rows_are == 'workers' else 'num_faulty'}={self.num_faulty}"

    def _withstands(self, num_rows: int, num_faulty: int) -> bool:
        for step in self.pre:
            num_rows = step.rows_left(num_rows)
            if step.needs_majority and num_rows <= 2 * num_faulty:
                return False
        enough = num_rows >= max(self.rule.least_rows(num_faulty), 1)
        return enough and self.rule.is_feasible(num_rows, num_faulty)

    def _aggregate(self, call: Call) -> Outcome:
        good_N = call.good_rows()
        rows = [int(row) for row in good_N.nonzero()[:, 0]]
        removed = tuple(int(row) for row in (~good_N).nonzero()[:, 0])
        self._watch_excess(removed)
        counts = {"removed": float(len(removed)), "excess": float(len(removed) > self.num_faulty)}
        base = Outcome(vectors=None, weights=None, taken="nothing", removed=removed, metrics=counts)
        if not rows:
            return base
        num_faulty = max(self.num_faulty - len(removed), 0)
        last = self._memory.vector_for(call.blocks or []) if self.rule.has_memory else None
        history = None
        if self.history:
            judged, view, history = self._looked_back(call, rows, num_faulty)
        else:
            judged = view = self._view(call, rows, num_faulty, last)
        if isinstance(self.rule, CoordinateRule):
            return self._reduce(self.rule, view, num_faulty, base)
        assert isinstance(self.rule, WeightRule), "a rule is one of the two kinds"
        decided = self.rule.weigh(judged, num_faulty, self._memory.state)
        outcome = self._carry_out(call, rows, view, decided, base, last)
        self._remember(call, rows, decided, outcome)
        self._memory = replace(self._memory, history=history)
        if last is None or call.blocks is None or outcome.vectors is None:
            return outcome
        pairs = zip(outcome.vectors, call.blocks, strict=True)
        return replace(outcome, vectors=[vector.to(block.dtype) for vector, block in pairs])

    def _watch_excess(self, removed: tuple[int, ...]) -> None:
        if len(removed) <= self.num_faulty:
            return
        text = (
            f"{self._rows_are} {list(removed)} hold NaN or infinity, {len(removed)} where {self._named_f} "
            f"was expected"
        )
        if self.on_excess == "error":
            section = "strategy." if self._rows_are == "workers" else ""
            raise TooManyFaultyRowsError(
                f"{text}; raise it, or set {section}on_excess='warn' to go on with the others"
            )
        if removed != self._told:  # a worker that fails at every step is told of once
            logger.warning("%s", text)
            self._told = removed

    def _looked_back(self, call: Call, rows: list[int], num_faulty: int) -> tuple[View, View, History]:
        """Return the averages of the good rows, the rows themselves, and the history with these."""
        assert call.blocks is not None, "rules of distances are given the rows"
        if call.workers != tuple(range(len(call.workers))):
            raise ValueError(
                f"history={self.history:g} needs all workers in order at each step, got {list(call.workers)}"
            )
        view = self._view(call, rows, num_faulty, forms_gram=False)
        known = self._memory.history or History.start(call.blocks, self.history)
        history = known.with_rows(call.blocks, rows, view.mix_nR.diagonal())
        numbers = row_numbers(history.blocks, None, call.total)
        averages = self._view(
            replace(call, blocks=history.blocks, numbers=numbers), rows, num_faulty, is_prepared=True
        )
        return averages.scaled(history.corrections(rows)), view, history

    def _view(
        self,
        call: Call,
        rows: list[int],
        num_faulty: int,
        last: Sequence[Tensor] | None = None,
        *,
        forms_gram: bool = True,
        is_prepared: bool = False,
    ) -> View:
        """Return what the rule is to see: the good rows, prepared, and the last vector at the end."""
        numbers, num_rows = call.numbers, len(rows)
        squares_m, matrix = numbers.squares_N[rows], None
        if last is not None:
            own = row_numbers([vector[None] for vector in last], None, call.total)
            squares_m = torch.cat([squares_m, own.squares_N])
        if self.needs_gram and forms_gram:
            assert call.blocks is not None, "only rules of norms and dots come without blocks"
            matrix = gram(call.blocks, rows, squares_m, call.total, extras=last)
        in_use = call.rows(rows)
        view = View(
            mix_nR=torch.eye(num_rows, len(squares_m), dtype=torch.float64),
            squares_n=squares_m[:num_rows],
            sample_weights_n=call.sample_weights_N[rows],
            dots_n=None if numbers.dots_N is None else numbers.dots_N[rows],
            reference_square=numbers.reference_square,
            gram=matrix,
            own_row=rows.index(call.own_row) if call.own_row in rows else None,
            step=call.step,
            seed=self.seed,
            workers=tuple(call.workers[row] for row in rows),
            rows=in_use,
        )
        if self.rule.remembers_rows and in_use is not None:
            view = replace(view, changes_n=self._memory.changes(in_use, view.workers))
        for step in () if is_prepared else self.pre:
            view = step.apply(view, num_faulty, self.seed)
        return view if last is None else with_last_vector(view, squares_m[-1])

    def _reduce(self, rule: CoordinateRule, view: View, num_faulty: int, base: Outcome) -> Outcome:
        assert view.rows is not None, "columns are reduced where they are"
        picked = rule.pick(view, num_faulty)
        mix_nR = view.mix_nR if picked is None else view.mix_nR[picked]
        vectors = view.rows.reduced(mix_nR, partial(rule.reduce, num_faulty=num_faulty))
        return replace(base, vectors=vectors, taken="rows")

    def _carry_out(
        self,
        call: Call,
        rows: list[int],
        view: View,
        decided: Weighing,
        base: Outcome,
        last: Sequence[Tensor] | None,
    ) -> Outcome:
        """Return what the decision leads to."""
        metrics = {**base.metrics, **decided.metrics}
        if "accepted" in metrics and self._keeps_rows:
            metrics["accepted"] = [rows[place] for place in metrics["accepted"]]
        base = replace(base, metrics=metrics)
        if decided.weights_n is not None:
            weights_R = decided.weights_n @ view.mix_nR
            weights_N = torch.zeros_like(call.numbers.squares_N)
            weights_N[rows] = weights_R[: len(rows)]
            base = replace(base, weights=weights_N, taken="rows")
            if call.blocks is None:
                return base
            of_last = 0.0 if last is None else weights_R[-1].item()
            vectors = weighted_sums(
                call.blocks, weights_N, extras=last, extra_weight=of_last, exact=last is not None
            )
            return replace(base, vectors=vectors)
        if decided.instead == "reference":
            return replace(base, vectors=call.trusted_vectors(), taken="reference")
        return self._fall_back(call, base) if decided.instead == "fallback" else base

    def _fall_back(self, call: Call, base: Outcome) -> Outcome:
        """Return what the trimmed mean of mixed rows gives, where the rows are here and enough."""
        fallback = Aggregator(
            TrimmedMean(),
            num_faulty=self.num_faulty,
            pre=(NearestNeighbourMixing(),),
            seed=self.seed,
            rows_are=self._rows_are,
        )
        num_rows = len(call.workers)
        if call.blocks is None or not fallback._withstands(num_rows, self.num_faulty):
            return base
        numbers = replace(call.numbers, dots_N=None)
        outcome = fallback._aggregate(replace(call, references=None, numbers=numbers))
        return replace(outcome, metrics={**outcome.metrics, **base.metrics, "fallback": 1.0})

    def _remember(self, call: Call, rows: list[int], decided: Weighing, outcome: Outcome) -> None:
        """Keep what the next step depends on."""
        memory, state = self._memory, decided.state
        if self.rule.has_memory and outcome.vectors is not None:
            memory = replace(memory, vector=[vector.clone() for vector in outcome.vectors])
        if self.rule.remembers_rows and call.blocks is not None:
            memory = memory.with_rows(call.blocks, rows, call.workers)
            if outcome.vectors is not None:
                given = row_numbers([vector[None] for vector in outcome.vectors], None, call.total)
                state = self.rule.moved(state, given.squares_N.sqrt().item())
        self._memory = replace(memory, state=state)
