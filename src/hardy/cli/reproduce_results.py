"""What an experiment claims, what its result file says, and whether both still belong together.

An experiment is a folder with `expected.toml` (what is claimed), `run.py` (measures) and
`results/comparison.json` (what came out, and where). This module reads and judges; it imports no torch.
"""

import ast
import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import hardy
from hardy.config import UserError, reason_of

RESULT_FILE = Path("results") / "comparison.json"
"""Of an experiment, inside its folder."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One sentence with a limit."""

    name: str
    """What the number is called in `run.py`."""
    text: str
    """The sentence."""
    side: str
    """`most` or `least`."""
    limit: float
    """What the number may be at most, or must be at least."""
    unit: str = ""
    """Of the number, where the sentence does not say it."""
    is_main: bool = False
    """Whether it stands in the table of the project's README even when it holds."""

    @property
    def expected(self) -> str:
        """The limit in words."""
        return f"at {self.side} {self.limit:g}{self.unit and ' ' + self.unit}"

    def holds(self, got: float | None) -> bool:
        """Whether a number keeps the limit; one that is not there or not finite does not.

        Example:
            >>> claim = Claim(name="gap", text="the gap is small", side="most", limit=1.5)
            >>> claim.expected, claim.holds(1.5), claim.holds(1.6), claim.holds(None)
            ('at most 1.5', True, False, False)
        """
        if got is None or not math.isfinite(got):
            return False
        return got <= self.limit if self.side == "most" else got >= self.limit


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A claim, and what was measured."""

    claim: Claim
    """The claim."""
    got: float | None
    """None where no number came out."""
    by_seed: tuple[float | None, ...] = ()
    """The same number of each seed alone; empty where it was not recorded, or nothing is drawn."""

    @property
    def holds(self) -> bool:
        """Whether the claim holds."""
        return self.claim.holds(self.got)

    @property
    def spread(self) -> float | None:
        """Half of the range over the seeds."""
        known = [value for value in self.by_seed if value is not None and math.isfinite(value)]
        return (max(known) - min(known)) / 2 if len(known) > 1 else None

    @property
    def got_text(self) -> str:
        """The number with its spread.

        Example:
            >>> claim = Claim(name="gap", text="the gap is small", side="most", limit=1, unit="%")
            >>> Outcome(claim=claim, got=0.5, by_seed=(0.4, 0.6)).got_text
            '0.5 ± 0.1 %'
        """
        if self.got is None or not math.isfinite(self.got):
            return "no number"
        spread = "" if self.spread is None else f" ± {self.spread:.2g}"
        return f"{self.got:.4g}{spread}{self.claim.unit and ' ' + self.claim.unit}"

    @property
    def verdict(self) -> str:
        """holds or missed."""
        return "holds" if self.holds else "missed"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One result file."""

    experiment: str
    """Name of the folder."""
    got: Mapping[str, float | None]
    """The number of each claim."""
    by_seed: Mapping[str, tuple[float | None, ...]]
    """The number of each claim, seed by seed."""
    seeds: tuple[int, ...]
    """Seeds of the trainings that are reported; empty where nothing is drawn."""
    duration_s: float | None
    """Seconds of the whole run; None where it was not recorded."""
    settings_hash: str | None
    """Of what was run; None where it was not recorded."""
    circumstances: Mapping[str, Any]
    """Machine, versions, commit, time."""
    measured: Mapping[str, Any]
    """All that was measured, in the experiment's own form."""

    @property
    def minutes_text(self) -> str:
        """Minutes that the run took.

        Example:
            >>> read_result({"experiment": "x", "duration_s": 90.0}).minutes_text
            '1.5 min'
        """
        return "minutes not recorded" if self.duration_s is None else f"{self.duration_s / 60:.2g} min"

    @property
    def where(self) -> str:
        """Machine, versions, commit and date in one line."""
        known = self.circumstances
        cores = f"{known['cores']} cores" if known.get("cores") else None
        processes = f"{known['processes']} processes of one thread" if known.get("processes") else None
        commit = str(known.get("commit") or "")
        changed = " with changes" if commit.endswith("+changes") else ""
        said = [known.get("processor"), known.get("machine"), cores, processes, self.minutes_text]
        said += [f"torch {known['torch']}", f"Python {known['python']}", f"commit {commit[:7]}{changed}"]
        return ", ".join(str(part) for part in [*said, str(known["time"])[:10]] if part)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One folder of experiments."""

    folder: Path
    """Where it lies."""
    title: str
    """What is compared with what."""
    method: str
    """The methods that are tried, by name."""
    papers: tuple[str, ...]
    """Their numbers on arXiv."""
    minutes: float | None
    """About how long it takes on two idle cores; None when nobody said."""
    claims: tuple[Claim, ...]
    """What is claimed, in order."""

    @property
    def name(self) -> str:
        """What `hardy reproduce` calls it."""
        return self.folder.name

    @cached_property
    def settings_hash(self) -> str:
        """Hash of the claims, the settings and the scripts, not of hardy itself."""
        return hash_of(settings_files(self.folder))

    @property
    def result(self) -> Result | None:
        """The result that stands in the repository; None where it was never run."""
        return load_result(self.folder / RESULT_FILE)

    def outcomes(self, result: Result) -> tuple[Outcome, ...]:
        """Return every claim with what a result says of it."""
        return tuple(
            Outcome(
                claim=claim, got=result.got.get(claim.name), by_seed=tuple(result.by_seed.get(claim.name, ()))
            )
            for claim in self.claims
        )


def load_experiment(folder: Path) -> Experiment:
    """Read `expected.toml`: title, method, papers and minutes, then a table for each claim.

    Raises:
        UserError: the file is missing or is no TOML, a claim has no sentence, or not exactly one limit.
    """
    path = folder / "expected.toml"
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {reason_of(error)}; every experiment says there what it claims") from None
    return Experiment(
        folder=folder,
        title=said.get("title", folder.name),
        method=said.get("method", folder.name),
        papers=tuple(said.get("papers", ())),
        minutes=said.get("minutes"),
        claims=tuple(_claim(path, name, table) for name, table in said.items() if isinstance(table, dict)),
    )


def _claim(path: Path, name: str, table: Mapping[str, Any]) -> Claim:
    sides = [side for side in ("most", "least") if side in table]
    if "claim" not in table or len(sides) != 1:
        raise UserError(f"{path}: [{name}] must have `claim`, a sentence, and one of `most` and `least`")
    return Claim(
        name=name,
        text=table["claim"],
        side=sides[0],
        limit=table[sides[0]],
        unit=table.get("unit", ""),
        is_main=table.get("main", False),
    )


def load_experiments(folder: Path) -> dict[str, Experiment]:
    """Return all experiments of a folder by name."""
    return {path.parent.name: load_experiment(path.parent) for path in sorted(folder.glob("*/run.py"))}


def load_result(path: Path) -> Result | None:
    """Return a result file; None where there is none.

    Raises:
        UserError: the file is no JSON.
    """
    if not path.exists():
        return None
    try:
        return read_result(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path}: {error}; delete it and run the experiment again") from None


def read_result(held: Mapping[str, Any]) -> Result:
    """Return what a result file holds; the form is that of `result_text`."""
    claims = held.get("claims", [])
    return Result(
        experiment=held["experiment"],
        got={claim["name"]: claim["got"] for claim in claims},
        by_seed={claim["name"]: tuple(claim["by_seed"]) for claim in claims},
        seeds=tuple(held.get("seeds", ())),
        duration_s=held.get("duration_s"),
        settings_hash=held.get("settings_hash"),
        circumstances=held.get("circumstances", {}),
        measured=held.get("measured", {}),
    )


def result_text(experiment: Experiment, result: Result) -> str:
    """Return the text of a result file: claims with their numbers first, all that was measured last."""
    claims = [
        {
            "name": outcome.claim.name,
            "claim": outcome.claim.text,
            "expected": outcome.claim.expected,
            "got": outcome.got,
            "by_seed": list(outcome.by_seed),
            "spread": outcome.spread,
            "holds": outcome.holds,
        }
        for outcome in experiment.outcomes(result)
    ]
    held = {
        "experiment": result.experiment,
        "claims": claims,
        "seeds": list(result.seeds),
        "duration_s": result.duration_s,
        "settings_hash": result.settings_hash,
        "circumstances": dict(result.circumstances),
        "measured": dict(result.measured),
    }
    return json.dumps(finite(held), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Return a value as JSON holds it: None for a number that is not finite.

    Example:
        >>> finite({"losses": (1.0, math.inf)})
        {'losses': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def settings_files(folder: Path) -> list[Path]:
    """Return what decides an experiment's numbers: its scripts, TOML, text, and shared scripts it imports."""
    found = sorted(path for ending in ("py", "toml", "txt") for path in folder.glob(f"*.{ending}"))
    for path in found:  # grows on the way
        if path.suffix == ".py":
            shared = (folder.parent / f"{name}.py" for name in sorted(_imported(path)))
            found += [other for other in shared if other.exists() and other not in found]
    return found


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def library_hash() -> str:
    """Return a hash of hardy's own files but those of the command line, which train nothing."""
    root = Path(hardy.__file__).parent
    files = (path for path in root.rglob("*") if path.suffix in (".py", ".cpp", ".hpp"))
    return hash_of(sorted(path for path in files if path.relative_to(root).parts[0] != "cli"))


def hash_of(files: Iterable[Path]) -> str:
    """Return a hash of names and contents."""
    digest = blake2b(digest_size=8)
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def claims_table(outcomes: Sequence[Outcome], *, command: str, seeds: Sequence[int]) -> str:
    """Return claim, command, expected and got as Markdown."""
    got = "got"
    if len(seeds) > 1:
        is_known = any(outcome.spread is not None for outcome in outcomes)
        got += f" ± half the range of {len(seeds)} seeds" if is_known else f", {len(seeds)} seeds"
    lines = [f"| claim | command | expected | {got} | |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        claim, verdict = outcome.claim, outcome.verdict if outcome.holds else f"**{outcome.verdict}**"
        lines.append(f"| {claim.text} | `{command}` | {claim.expected} | {outcome.got_text} | {verdict} |")
    return "\n".join(lines)


def evidence(experiments: Iterable[Experiment]) -> list[tuple[Experiment, Outcome]]:
    """Return the main claims, and all that were missed, with what the result files say."""
    found = []
    for experiment in experiments:
        result = experiment.result
        if result is not None:
            outcomes = experiment.outcomes(result)
            found += [(experiment, o) for o in outcomes if o.claim.is_main or not o.holds]
    return found


def minutes_of(experiments: Iterable[Experiment]) -> float:
    """Return about how long experiments take together on two idle cores."""
    return sum(experiment.minutes or 0 for experiment in experiments)


def evidence_table(experiments: Sequence[Experiment]) -> str:
    """Return the table of the project's README, and how many claims hold in all."""
    lines = ["| method | claim | expected | got | |", "|---|---|---|---|---|"]
    for experiment, outcome in evidence(experiments):
        link = f"[{experiment.method}](experiments/{experiment.name}/README.md)"
        verdict = outcome.verdict if outcome.holds else f"**{outcome.verdict}**"
        cells = [link, outcome.claim.text, outcome.claim.expected, outcome.got_text, verdict]
        lines.append("| " + " | ".join(cells) + " |")
    known = [(one, one.result) for one in experiments]
    outcomes = [o for one, result in known if result is not None for o in one.outcomes(result)]
    hold = sum(outcome.holds for outcome in outcomes)
    never = [one.name for one, result in known if result is None]
    said = f"{hold} of {len(outcomes)} claims hold; shown are the main ones and all that were missed."
    said += f" To run all again takes {minutes_of(experiments):g} minutes on two idle cores by our estimates."
    if never:
        said += f" Not run yet: {', '.join(never)}."
    return "\n".join([*lines, "", said])
