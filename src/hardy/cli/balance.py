"""The verb `balance`: how batches of mixed lengths would be planned; all but `profile` is arithmetic."""

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hardy.cli.failure import SUCCESS
from hardy.cli.output import print_json
from hardy.cli.parser import Parser
from hardy.config import UserError

if TYPE_CHECKING:
    from hardy.balance.cost import DecoderSizes, Integers, LengthCostModel
    from hardy.balance.strategies import Strategy

ACTIONS = ("analyze", "plan", "simulate", "propose", "profile")
BRIDGE_GB_S = 10.0
"""About the published all-to-all of 16 A800s (10.33 GB/s), the fewest of FlexSP's that leave a node."""
MEANT_FOR = {"mode": "plan", "png": "plan", "methods": "simulate", "out": "profile", "workers": "profile"}
"""Options that one action reads."""
SCHEME = re.compile(r"(?P<count>\d+)x(?P<degrees>(?:\s*(?:tp|pp|cp)\d+)+)")


def add_balance(parser: Parser) -> None:
    """Add the options of `hardy balance`."""
    add = parser.add_argument
    add("action", choices=ACTIONS, help="what to do; see below")
    add("--lengths", default="wikipedia", metavar="NAME|FILE", help="distribution, histogram.csv, or lengths")
    add("--cost", default="7b", metavar="COST", help="cost preset, file of `profile`, or model (default: 7b)")
    add("--ranks", type=int, default=8, metavar="N", help="default: 8")
    add("--sequences", type=int, metavar="N", help="sequences of a global batch (default: 128)")
    add("--tokens", type=int, metavar="N", help="tokens of a global batch, instead of --sequences")
    add("--batches", type=int, default=20, metavar="N", help="global batches (default: 20)")
    add("--context", type=int, metavar="N", help="longest sequence (default: what fits)")
    add("--overlong", choices=("error", "truncate", "split", "drop"), default="truncate")
    add(
        "--cap-tokens",
        type=int,
        default=8192,
        metavar="N",
        help="tokens that fit on one rank, of a model's cost",
    )
    add("--degree", type=int, default=1, metavar="N", help="ranks of a group where all are equal")
    add("--delay-steps", type=int, default=0, metavar="N", help="batches a document may move (default: 0)")
    add("--objective", choices=("lock_step", "free_running"), default="lock_step", help="when ranks meet")
    add("--mode", choices=("pack", "dispatch", "dynamic_cp"), help="of plan (default: dynamic_cp)")
    add("--methods", metavar="A,B", help="of simulate; the first is what others are measured by")
    add("--strategies", metavar="TEXT", help="'published', or such as '4x tp16 | 1x tp16 + 6x tp8'")
    add("--switch-cost", type=float, default=0.0, metavar="T", help="time to change the strategy")
    add(
        "--bridge-bandwidth",
        type=float,
        default=BRIDGE_GB_S,
        metavar="GB/S",
        help="of a rank, for weights that move to replicas (default: 10, assumed; 0: not counted)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn")
    add("--png", type=Path, metavar="FILE", help="of plan: the timeline as a picture")
    add("--out", type=Path, metavar="FILE", help="of profile: where the cost goes")
    add(
        "--workers",
        type=int,
        metavar="N",
        help="of profile: processes whose groups are timed too (default: 1)",
    )
    add("--json", action="store_true", help="print everything as JSON")


def balance_help() -> str:
    """Return what the actions do, and the names of lengths, costs and methods."""
    return "\n".join(
        [
            "actions:",
            "  analyze   say what the lengths are like and which level of balancing is worth using",
            "  plan      plan one batch and show when each rank works",
            "  simulate  compare ways of planning on the same batches",
            "  propose   select strategies of replicas to keep ready, from simulated batches",
            "  profile   time micro-batches of a model on this machine and fit its cost",
            "",
            "lengths: wikipedia, wikipedia-fit, commoncrawl-like, github-like, web-32k, sft-mix (only",
            "wikipedia has real counts), a .csv of lo,hi,documents,tokens, or a file with one length a line",
            "costs: hydraulis-7b, -13b, -32b, -7b-a100; flexsp-6.7b-192k, -384k, -13b-..., -30b-...",
            "(published coefficients); a file of `profile`; or a model (1m ... 13b), by its operations",
            "methods: random, token_ffd, token_ffd_shuffled, best_fit, karmarkar_karp, longest_first,",
            "static_cp, batch_cp, bucketed_cp, dispatch, dynamic_cp;",
            "hydraulis costs: fixed, balanced, dynamic, bucketed",
        ]
    )


def balance_verb(arguments: argparse.Namespace) -> int:
    """Run `hardy balance`."""
    _check(arguments)
    if arguments.action == "profile":
        from hardy.cli.balance_profile import profile_action

        return profile_action(arguments)
    case = _case(arguments)
    from hardy.cli.balance_actions import RUN

    told, lines = RUN[arguments.action](arguments, case)
    if arguments.json:
        print_json(told)
    else:
        print("\n".join(lines))
    return SUCCESS


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is planned: batches, their cost, strategies where replicas have schemes."""

    batches: "list[Integers]"
    changed: int
    """Sequences that were too long."""
    cost: "LengthCostModel"
    strategies: "tuple[Strategy, ...]"


def _check(arguments: argparse.Namespace) -> None:
    for name, action in MEANT_FOR.items():
        if getattr(arguments, name) is not None and arguments.action != action:
            raise UserError(f"--{name} is for `hardy balance {action}`; leave it out of `{arguments.action}`")
    for name in ("ranks", "sequences", "tokens", "batches", "context", "cap_tokens", "degree"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= arguments.bridge_bandwidth < math.inf:
        raise UserError(
            f"--bridge-bandwidth must be a number of GB/s from 0 on, got "
            f"{arguments.bridge_bandwidth:g}; 0 does not count the bridge"
        )
    if arguments.delay_steps < 0:
        raise UserError(f"--delay-steps must be at least 0, got {arguments.delay_steps}")
    if arguments.sequences and arguments.tokens:
        raise UserError("--sequences and --tokens are two ways to say one thing; give one of them")


def _case(arguments: argparse.Namespace) -> Case:
    import numpy as np

    from hardy.balance.lengths import draw_lengths, fit_lengths, token_batches
    from hardy.balance.level import level_batches
    from hardy.rng import numpy_generator_for

    cost = cost_model(arguments.cost, ranks=arguments.ranks, cap_tokens=arguments.cap_tokens)
    strategies = _strategies(arguments, cost)
    allowed = [own for own in cost.schemes if own.scheme.ranks <= arguments.ranks]
    if not allowed:
        raise UserError(
            f"no scheme of --cost {arguments.cost} has as few as {arguments.ranks} ranks; raise --ranks"
        )
    context = arguments.context or max(own.cap_tokens for own in allowed)
    generator = numpy_generator_for(arguments.seed, "balance", "lengths")
    sequences = arguments.sequences or 128
    count = arguments.batches * sequences
    if arguments.tokens:
        trial = fit_lengths(
            draw_lengths(arguments.lengths, 4096, generator), most_tokens=context, overlong="truncate"
        ).lengths
        count = int(2 * arguments.batches * arguments.tokens / trial.mean()) + 4096
    fitted = fit_lengths(
        draw_lengths(arguments.lengths, count, generator), most_tokens=context, overlong=arguments.overlong
    )
    if arguments.tokens:
        places = token_batches(fitted.lengths, budget_tokens=arguments.tokens)
    else:
        whole = len(fitted.lengths) // sequences
        places = [np.arange(k * sequences, (k + 1) * sequences) for k in range(whole)]
    if arguments.delay_steps:
        places = level_batches(
            places[: arguments.batches],
            cost.times(fitted.lengths),
            fitted.lengths if arguments.tokens else np.ones_like(fitted.lengths),
            room=arguments.tokens or sequences,
            delay_steps=arguments.delay_steps,
        )
    batches = [fitted.lengths[place] for place in places[: arguments.batches]]
    if not batches:
        raise UserError("no whole batch is left; give more lengths, or smaller --sequences or --tokens")
    return Case(batches=batches, changed=fitted.changed, cost=cost, strategies=strategies)


def cost_model(name: str, *, ranks: int, cap_tokens: int) -> "LengthCostModel":
    """Return the cost of a preset, of a file, or of a model by its operations.

    Raises:
        UserError: there is none of this name.
    """
    from hardy.balance.cost import analytic_cost, load_cost
    from hardy.balance.cost_presets import cost_preset
    from hardy.balance.cost_tables import FLEXSP, HYDRAULIS
    from hardy.model.presets import PRESETS

    if name in PRESETS:
        return analytic_cost(model_sizes(name), cap_tokens=cap_tokens, degrees=powers(ranks))
    if name in HYDRAULIS or name in FLEXSP:
        return cost_preset(name)
    if Path(name).exists():
        return load_cost(Path(name))
    from hardy.config import unknown_name

    raise UserError("--cost: " + unknown_name(name, "cost", [*PRESETS, *HYDRAULIS, *FLEXSP]) + ", or a file")


def model_sizes(name: str) -> "DecoderSizes":
    """Return the sizes of a model preset as costs need them."""
    from hardy.balance.cost import DecoderSizes
    from hardy.model.presets import PRESETS

    shape = PRESETS[name]
    return DecoderSizes(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        vocab_size=shape.vocab_size,
    )


def powers(ranks: int) -> list[int]:
    """Return powers of two up to `ranks`.

    Example:
        >>> powers(6)
        [1, 2, 4]
    """
    return [1 << k for k in range(ranks.bit_length())]


def read_strategies(text: str) -> "tuple[Strategy, ...]":
    """Return strategies as they are written in tables.

    Example:
        >>> [len(strategy) for strategy in read_strategies("4x tp16 | 1x tp16 + 2x tp8 pp3")]
        [4, 3]
    """
    from hardy.balance.plan import Scheme

    names = {"tp": "tensor", "pp": "pipeline", "cp": "context"}
    found: list[Strategy] = []
    for part in text.split("|"):
        replicas: list[Scheme] = []
        for term in part.split("+"):
            matched = SCHEME.fullmatch(term.strip())
            if matched is None or matched["count"] == "0":
                raise UserError(f"--strategies: {term.strip()!r} is not like '2x tp8 pp3'")
            degrees = {names[word[:2]]: int(word[2:]) for word in matched["degrees"].split()}
            if min(degrees.values()) < 1:
                raise UserError(f"--strategies: a degree in {term.strip()!r} is below 1")
            replicas += [Scheme(**degrees)] * int(matched["count"])
        found.append(tuple(replicas))
    return tuple(found)


def _strategies(arguments: argparse.Namespace, cost: "LengthCostModel") -> "tuple[Strategy, ...]":
    """Return candidates, where schemes are not context parallelism alone; empty else."""
    from hardy.balance.cost_presets import published_strategies

    if all(own.scheme.ranks == own.scheme.context for own in cost.schemes) and not arguments.strategies:
        return ()
    if arguments.strategies and arguments.strategies != "published":
        return read_strategies(arguments.strategies)
    if (arguments.cost, arguments.ranks) == ("hydraulis-32b", 64):
        return published_strategies()
    if arguments.strategies:
        raise UserError("--strategies published are for --cost hydraulis-32b --ranks 64; write others out")
    return _homogeneous(cost, arguments.ranks)


def _homogeneous(cost: "LengthCostModel", ranks: int) -> "tuple[Strategy, ...]":
    """Return strategies of equal replicas, that of the largest cap first."""
    fitting = [own for own in cost.schemes if ranks % own.scheme.ranks == 0]
    fitting.sort(key=lambda own: (-own.cap_tokens, own.scheme))
    return tuple((own.scheme,) * (ranks // own.scheme.ranks) for own in fitting)
