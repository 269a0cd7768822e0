"""The verb `cite`: the BibTeX of what a run used."""

import argparse
import sys
from pathlib import Path

from hardy.cli.citations import HARDY, entries, uses
from hardy.cli.failure import SUCCESS
from hardy.cli.output import print_json
from hardy.cli.parser import Parser
from hardy.config import UserError
from hardy.train.folder import RunFolder


def add_cite(parser: Parser) -> None:
    """Add the options of `hardy cite`."""
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--list", action="store_true", help="print every entry there is")
    parser.add_argument("--json", action="store_true", help="say which setting asks for which entry, as JSON")


def cite_verb(arguments: argparse.Namespace) -> int:
    """Run `hardy cite`: entries on stdout; on stderr what was used and has none."""
    if arguments.list == (arguments.run is not None):
        raise UserError("give a run folder, or --list for every entry there is (see `hardy cite --help`)")
    known = entries()
    if arguments.list:
        print("\n\n".join(known.values()))
        return SUCCESS
    used = list(uses(RunFolder(arguments.run).read_config()))
    keys = dict.fromkeys([HARDY, *(key for use in used for key in use.keys or ())])
    if arguments.json:
        rows = [{"setting": u.setting, "value": u.value, "keys": u.keys} for u in used]
        print_json({"keys": list(keys), "used": rows})
        return SUCCESS
    print("\n\n".join(known[key] for key in keys))
    for use in used:
        if use.keys is None:
            print(
                f"hardy: no entry for {use.setting}={use.value}; look up whom to cite for it", file=sys.stderr
            )
    return SUCCESS
