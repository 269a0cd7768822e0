"""What a page about experiments shows: every claim with its verdict, where it was measured, pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hardy.cli.page import Image, Section, Table, Text, Verdict
from hardy.cli.reproduce_results import Experiment, Result

HEADING = ("claim", "expected", "got", "")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One experiment and one result of it."""

    experiment: Experiment
    """What was claimed."""
    result: Result | None
    """What came out; None where it was not run."""
    pictures: Path
    """Folder with the pictures of this result."""


def lead(shown: Sequence[Shown]) -> str:
    """Return how many claims hold, in a sentence."""
    known = [o for one in shown if one.result for o in one.experiment.outcomes(one.result)]
    hold = sum(outcome.holds for outcome in known)
    return f"{hold} of {len(known)} claims of {len(shown)} experiments hold."


def sections(shown: Sequence[Shown]) -> list[Section]:
    """Return for each experiment a table of its claims, and its pictures."""
    found: list[Section] = []
    for one in shown:
        experiment, result = one.experiment, one.result
        title = f"{experiment.name}: {experiment.title}"
        if result is None:
            text = f"Not run yet: hardy reproduce {experiment.name}"
            found.append(Text(title=title, paragraphs=[text], is_warning=True))
            continue
        rows = [
            [o.claim.text, o.claim.expected, o.got_text, Verdict(text=o.verdict, holds=o.holds)]
            for o in experiment.outcomes(result)
        ]
        papers = ", ".join(f"arXiv {paper}" for paper in experiment.papers)
        note = f"{experiment.method} ({papers}). ± is half the range over the seeds. {result.where}."
        found.append(Table(title=title, heading=HEADING, rows=rows, note=note))
        found += [
            Image(title=f"{experiment.name}: {file.stem}", file=file, description=f"{file.stem}, {title}")
            for file in sorted(one.pictures.glob("*.png"))
        ]
    return found
