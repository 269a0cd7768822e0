"""The verb `compare`: runs side by side, as a table, as pictures and as a page."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hardy.cli.compare_groups import Group, differences, grouped
from hardy.cli.compare_page import sections_of
from hardy.cli.compare_runs import Run, read_run
from hardy.cli.compare_simulated import RESULTS, read_simulation
from hardy.cli.compare_table import FORMATS, READING, differences_grid, markdown, reading
from hardy.cli.failure import SUCCESS
from hardy.cli.page import write_page
from hardy.cli.parser import Parser
from hardy.config import UserError

LIKE_WITH_LIKE = {"model.": "models", "data.": "data", "task.": "tasks"}
"""Settings without which losses cannot be compared, and how a note calls them."""


def add_compare(parser: Parser) -> None:
    """Add the options of `hardy compare`."""
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="run folder, or what `hardy simulate --out` wrote"
    )
    parser.add_argument(
        "--format", choices=list(FORMATS), default="markdown", help="of the table (default: markdown)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, do not print it")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page with curves that needs no network"
    )
    parser.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="draw curves and bars there (PNG and SVG)"
    )
    parser.add_argument("--title", default="Runs compared", help="of the page (default: 'Runs compared')")


def compare_help() -> str:
    """Return what a comparison tells."""
    return READING


def compare_verb(arguments: argparse.Namespace) -> int:
    """Run `hardy compare`."""
    groups = grouped(read_all(arguments.runs))
    notes = notes_on(groups)
    table = FORMATS[arguments.format](groups)
    if arguments.format == "markdown":
        table = "\n\n".join([table, *_below(groups, notes)])
    else:
        print("".join(f"hardy: {note}\n" for note in notes), end="", file=sys.stderr)
    written = [] if arguments.out is None else [_write(arguments.out, table)]
    if arguments.html is not None:
        lead = f"{sum(len(group.runs) for group in groups)} runs in {len(groups)} groups of equal settings."
        sections = sections_of(groups, notes)
        written.append(write_page(arguments.html, title=arguments.title, sections=sections, lead=lead))
    if arguments.figures is not None:
        from hardy.cli.compare_figures import draw_figures

        written += draw_figures(groups, arguments.figures)
    print("".join(f"wrote {path}\n" for path in written), end="", file=sys.stderr)
    if arguments.out is None:
        print(table)
    return SUCCESS


def read_all(folders: Sequence[Path]) -> list[Run]:
    """Return the runs in folders, named by the folder, or by the whole path where two names are alike.

    Raises:
        UserError: a folder is given twice, is missing, or holds nothing to compare.
    """
    places = Counter(folder.resolve() for folder in folders)
    twice = [folder for folder in folders if places[folder.resolve()] > 1]
    if twice:
        raise UserError(f"{twice[0]} is given twice; leave one out")
    names = Counter(folder.resolve().name for folder in folders)
    runs: list[Run] = []
    for folder in folders:
        short = folder.resolve().name
        name = short if names[short] == 1 else str(folder)
        file = folder / RESULTS if folder.is_dir() else folder
        if folder.is_dir() and not file.exists():
            runs.append(read_run(folder, name=name))
        elif file.exists():
            runs += read_simulation(file, name=name)
        else:
            raise UserError(f"there is no folder {folder}; give the folders of runs, such as runs/tiny-1")
    return runs


def notes_on(groups: Sequence[Group]) -> list[str]:
    """Return what a reader must know before comparing."""
    runs = [run for group in groups for run in group.runs]
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    found = differences(groups)
    differing = [*found.shared, *found.own]
    for start, what in LIKE_WITH_LIKE.items():
        found = [key for key in differing if key.startswith(start)]
        if found:
            shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if found[3:] else "")
            notes.append(f"the {what} differ ({shown}): losses are not of one thing")
    for group in groups:
        twins = [seed for seed, count in Counter(run.seed for run in group.runs).items() if count > 1]
        if twins:
            notes.append(
                f"{group.label}: seed {twins[0]} occurs more than once; the interval takes all as independent"
            )
        for key in ("run.commit", "run.torch", "run.platform"):
            if len({run.config.get(key) for run in group.runs}) > 1:
                notes.append(f"{group.label}: {key} is not the same in all of its runs")
    return notes


def _below(groups: Sequence[Group], notes: Sequence[str]) -> list[str]:
    """Return the paragraphs below a table in Markdown."""
    parts = [reading(groups)]
    if notes:
        parts.append("\n".join(["Notes:", "", *(f"- {note}" for note in notes)]))
    found = differences(groups)
    if found.shared:
        grid = differences_grid(groups, found.shared)
        parts.append("Settings that differ:\n\n" + markdown(grid, words=len(grid.heading)))
    if found.own:
        parts.append(
            f"{len(found.own)} more settings belong to one of the groups alone; `--html` lists them."
        )
    return parts


def _write(path: Path, text: str) -> Path:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path} could not be written: {error.strerror}") from None
    return path
