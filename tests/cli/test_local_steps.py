"""The verb `local-steps`."""

import json

from hardy.cli.main import main


def test_the_least_number_of_steps_is_shown_with_its_neighbours_and_the_warning(capsys):
    assert main(["local-steps", "--step-s", "0.5", "--exchange-s", "2"]) == 0
    text = capsys.readouterr().out
    assert "76" in text and "heuristic" in text


def test_as_json(capsys):
    assert (
        main(["local-steps", "--step-s", "0.1", "--exchange-s", "0.8", "--overhead", "0.25", "--json"]) == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert plan["local_steps"] == 24 and {row["local_steps"] for row in plan["rows"]} >= {24}


def test_what_makes_no_sense_is_refused(capsys):
    assert main(["local-steps", "--step-s", "0.5", "--exchange-s", "2", "--overhead", "1"]) == 2
    assert "overhead" in capsys.readouterr().err
