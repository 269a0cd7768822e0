"""The verb `local-steps`: how many steps replicas should take alone for an exchange to pay."""

import argparse
import dataclasses

from hardy.cli.failure import SUCCESS
from hardy.cli.output import print_json
from hardy.cli.parser import Parser
from hardy.distributed.local.steps import WARNING, plan_local_steps


def add_local_steps(parser: Parser) -> None:
    """Add the options of `hardy local-steps`."""
    parser.add_argument(
        "--step-s", type=float, required=True, metavar="S", help="seconds of an optimizer step"
    )
    parser.add_argument("--exchange-s", type=float, required=True, metavar="S", help="seconds of an exchange")
    parser.add_argument(
        "--overhead", type=float, default=0.05, metavar="Q", help="share of the time for exchanges"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def local_steps_verb(arguments: argparse.Namespace) -> int:
    """Run `hardy local-steps`."""
    plan = plan_local_steps(
        step_s=arguments.step_s, exchange_s=arguments.exchange_s, overhead=arguments.overhead
    )
    if arguments.json:
        rows = [dataclasses.asdict(row) for row in plan.rows]
        print_json({"local_steps": plan.local_steps, "rows": rows, "warning": WARNING})
    else:
        print(plan.text())
    return SUCCESS
