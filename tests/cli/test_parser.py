"""argparse as hardy wants it."""

import pytest

from hardy.cli.parser import Parser, split_settings
from hardy.config import UserError


def parser():
    made = Parser(prog="hardy go", description="Go.", long_help=lambda: "much more")
    made.add_argument("where", choices=("a", "north"))
    made.add_argument("--dry-run", action="store_true")
    made.add_argument("--steps", type=int)
    made.add_argument("--share", type=float)
    made.add_argument("--format", choices=("csv", "latex"))
    return made


def test_help_ends_with_the_long_part():
    text = parser().format_help()
    assert text.startswith("usage: hardy go") and text.endswith("\nmuch more\n")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], r"the following arguments are required: where \(see `hardy go --help`\)"),
        (["a", "b"], r"'b' is one word too many \(see `hardy go --help`\)"),
        (["a", "--dry-rn"], "there is no option '--dry-rn'; did you mean '--dry-run'"),
        (["a", "--dry"], "there is no option '--dry'"),
        (["a", "--steps", "x"], r"^--steps must be a whole number, got 'x' \(see `hardy go --help`\)$"),
        (["a", "--share", "x"], "^--share must be a number, got 'x'"),
        (["a", "--steps"], r"^--steps needs a value \(see"),
        (["a", "--dry-run=yes"], "^--dry-run: ignored explicit argument 'yes'"),
        (["nort"], "^there is no where 'nort'; did you mean 'north'. Known: a, north"),
        (["a", "--format", "latx"], "^there is no --format 'latx'; did you mean 'latex'. Known: csv, latex"),
        (["a", "--lr", "1"], "there is no option '--lr'; did you mean the setting '--optim.lr'"),
        (["a", "--lr=1"], "there is no option '--lr'; did you mean the setting '--optim.lr'"),
    ],
)
def test_wrong_words_are_refused_with_the_way_out(words, text):
    with pytest.raises(UserError, match=text):
        parser().parse(words, settings=lambda: ["optim.lr", "train.steps"])


def test_right_words_are_parsed():
    arguments = parser().parse(["a", "--steps", "3"])
    assert (arguments.where, arguments.dry_run, arguments.steps) == ("a", False, 3)


def test_settings_are_kept_apart_wherever_they_stand():
    words = ["--a.b", "1", "tiny", "--run-dir", "x.y", "--c.d=--e", "--f.g", "-2", "--json"]
    assert split_settings(words) == (
        ["tiny", "--run-dir", "x.y", "--json"],
        ["--a.b", "1", "--c.d=--e", "--f.g", "-2"],
    )


def test_a_setting_at_the_end_keeps_its_missing_value_for_the_refusal():
    assert split_settings(["--a.b"]) == ([], ["--a.b"])


def test_an_option_whose_value_has_a_dot_is_no_setting():
    assert split_settings(["--run-dir=x.y"]) == (["--run-dir=x.y"], [])
