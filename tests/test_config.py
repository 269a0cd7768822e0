"""Configuration: types, limits, error texts, choices, overrides, TOML, documentation."""

import math
import subprocess
import sys
from collections import OrderedDict
from dataclasses import MISSING, FrozenInstanceError, dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardy.config import (
    Config,
    ConfigError,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Setting,
    Text,
    UnitFloat,
    UserError,
    class_at,
    from_dict,
    keep_known,
    override,
    parse_dotted,
    read_toml,
    settings_of,
    to_dict,
    unknown_name,
)


@dataclass(frozen=True, kw_only=True)
class Slope(Config):
    """Settings inside a variant."""

    section: ClassVar[str] = "engine.slope"
    degrees: PositiveFloat = 3.0
    """How steep."""


@dataclass(frozen=True, kw_only=True)
class Steam(Config):
    """One variant."""

    section: ClassVar[str] = "engine"
    name: Literal["steam"] = "steam"
    """The engine."""
    power: PositiveFloat = 2.0
    """What it gives."""
    coal: NonNegativeInt = 7
    """What it takes."""
    slope: Slope = field(default_factory=Slope)
    """The hill."""


@dataclass(frozen=True, kw_only=True)
class Sail(Config):
    """The other variant."""

    section: ClassVar[str] = "engine"
    name: Literal["sail"] = "sail"
    """The engine."""
    power: PositiveFloat = 1.0
    """What it gives."""
    masts: PositiveInt = 2
    """What carries it."""
    slope: Slope = field(default_factory=Slope)
    """The hill."""


@dataclass(frozen=True, kw_only=True)
class Hull(Config):
    """Every type of setting."""

    section: ClassVar[str] = "hull"
    length: PositiveInt
    """Required."""
    colour: Literal["red", "green", "blue"] = "red"
    """A word."""
    decks: Literal[1, 2, 3] = 1
    """A number among few."""
    filled: UnitFloat = 0.5
    """A share,
    on two lines."""
    draught: NonNegativeFloat | None = None
    """A number or nothing."""
    sound: bool = True
    """A truth."""
    name: str = "ship"
    """A text."""
    flags: tuple[Literal["a", "b", "fever"], ...] = ()
    """Words."""
    loads: tuple[PositiveInt, ...] = (1, 2)
    """Numbers."""
    tilt: float = 0.0
    """Any number."""
    crew: int = 3
    undocumented: int = 0


@dataclass(frozen=True, kw_only=True)
class Ship(Config):
    """All of it."""

    hull: Hull
    engine: Steam | Sail = field(default_factory=Steam)


def ship(**hull):
    return from_dict(Ship, {"hull": {"length": 10} | hull})


def refused(build):
    with pytest.raises(ConfigError) as caught:
        build()
    return str(caught.value)


# Types and limits


@pytest.mark.parametrize(
    ("hull", "text"),
    [
        ({"length": 0}, "hull.length must be a whole number at least 1, got 0"),
        ({"length": 1.0}, "hull.length must be a whole number at least 1, got 1.0"),
        ({"length": True}, "hull.length must be a whole number at least 1, got True"),
        ({"length": "10"}, "hull.length must be a whole number at least 1, got '10'"),
        ({"length": None}, "hull.length must be a whole number at least 1, got None"),
        (
            {"colour": "gren"},
            "hull.colour must be one of red, green, blue, got 'gren'; did you mean 'green'?",
        ),
        ({"colour": 3}, "hull.colour must be one of red, green, blue, got 3"),
        ({"decks": True}, "hull.decks must be one of 1, 2, 3, got True"),
        ({"filled": 1.5}, "hull.filled must be a number at least 0 and at most 1, got 1.5"),
        ({"filled": math.nan}, "hull.filled must be a number at least 0 and at most 1, got nan"),
        ({"draught": -1}, "hull.draught must be a number at least 0 or none, got -1"),
        ({"draught": math.inf}, "hull.draught must be a number at least 0 or none, got inf"),
        ({"draught": 10**400}, f"hull.draught must be a number at least 0 or none, got {10**400}"),
        ({"sound": 1}, "hull.sound must be true or false, got 1"),
        ({"name": 1}, "hull.name must be text, got 1"),
        ({"name": {"a": 1}}, "hull.name must be text, got the table {'a': 1}"),
        (
            {"flags": ["a", "fevr"]},
            "hull.flags must be a list of one of a, b, fever, got ['a', 'fevr']; did you mean 'fever'?",
        ),
        ({"flags": "a"}, "hull.flags must be a list of one of a, b, fever, got 'a'"),
        ({"loads": [1, 0]}, "hull.loads must be a list of a whole number at least 1, got [1, 0]"),
        ({"tilt": "steep"}, "hull.tilt must be a number, got 'steep'"),
    ],
)
def test_a_refusal_names_path_limits_and_value(hull, text):
    assert refused(lambda: ship(**hull)) == text


def test_limits_hold_when_built_directly_too():
    assert refused(lambda: Hull(length=0)) == "hull.length must be a whole number at least 1, got 0"


def test_whole_numbers_become_numbers_and_lists_tuples():
    hull = ship(filled=1, loads=[3], flags=["b", "a"]).hull
    assert (type(hull.filled), hull.loads, hull.flags) == (float, (3,), ("b", "a"))


def test_an_unlimited_number_may_be_infinite():
    assert ship(tilt=math.inf).hull.tilt == math.inf


def test_a_built_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Hull(length=1).length = 2  # pyright: ignore[reportAttributeAccessIssue]


def test_a_config_in_the_place_of_another_is_refused():
    text = refused(lambda: Ship(hull=Slope()))  # pyright: ignore[reportArgumentType]
    assert text.startswith("hull must be a table of settings, got Slope(")


def test_a_config_error_is_a_user_error():
    assert issubclass(ConfigError, UserError)
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize(
    ("limits", "inside", "outside", "text"),
    [
        (Range(least=1), [1, 2, math.inf], [0, math.nan], "at least 1"),
        (Range(above=0), [0.1], [0], "above 0"),
        (Range(most=3), [3, -math.inf], [3.1], "at most 3"),
        (Range(least=0, below=1), [0, 0.99], [1, -0.1], "at least 0 and below 1"),
        (Range(above=0, below=math.inf), [1e300], [math.inf], "above 0"),
        (Range(), [0, -5], [math.nan], ""),
    ],
)
def test_ranges(limits, inside, outside, text):
    assert all(value in limits for value in inside)
    assert not any(value in limits for value in outside)
    assert str(limits) == text


# Unknown and missing names


def test_an_unknown_key_names_its_full_path_and_the_nearest():
    assert refused(lambda: ship(lenght=3)) == (
        "there is no setting 'hull.lenght'; did you mean 'hull.length'? Known: "
        + ", ".join(sorted(f"hull.{name}" for name in to_dict(Hull(length=1))))
    )


def test_an_unknown_section_names_the_nearest():
    text = refused(lambda: from_dict(Ship, {"hul": {}}))
    assert text == "there is no setting 'hul'; did you mean 'hull'? Known: engine, hull"


def test_a_name_near_to_none_gets_no_hint():
    assert unknown_name("xyz", "recipe", ["tiny", "demo"]) == "there is no recipe 'xyz'. Known: demo, tiny"
    assert unknown_name("xyz", "recipe", []) == "there is no recipe 'xyz'. There are none"


def test_a_missing_setting_is_named():
    assert refused(lambda: from_dict(Ship, {"hull": {}})) == "hull.length is required"
    assert refused(lambda: from_dict(Ship, {})) == "hull is required"


def test_a_section_that_is_no_table_is_refused():
    assert refused(lambda: from_dict(Ship, {"hull": 3})) == "hull must be a table of settings, got 3"
    assert refused(lambda: from_dict(Ship, [1])) == "the config must be a table of settings, got [1]"  # pyright: ignore


# Choices


def test_a_choice_is_made_by_name():
    engine = from_dict(Ship, {"hull": {"length": 1}, "engine": {"name": "sail", "masts": 3}}).engine
    assert engine == Sail(masts=3)


def test_an_unknown_choice_names_the_nearest():
    text = refused(lambda: from_dict(Ship, {"hull": {"length": 1}, "engine": {"name": "stem"}}))
    assert text == "there is no engine.name 'stem'; did you mean 'steam'? Known: sail, steam"


def test_a_choice_without_a_name_is_the_default_or_refused():
    assert from_dict(Ship, {"hull": {"length": 1}, "engine": {"power": 1}}).engine == Steam(power=1.0)

    @dataclass(frozen=True, kw_only=True)
    class Bare(Config):
        engine: Steam | Sail

    assert (
        refused(lambda: from_dict(Bare, {"engine": {"power": 1}}))
        == "engine.name is required, one of steam, sail"
    )


def switched(*arguments):
    base = to_dict(Ship(hull=Hull(length=1), engine=Steam(power=9.0, coal=5, slope=Slope(degrees=1.0))))
    changes = parse_dotted(arguments)
    return from_dict(Ship, override(keep_known(Ship, base, chosen=changes), changes)).engine


def test_switching_a_choice_keeps_what_both_share_and_forgets_the_rest():
    assert switched("--engine.name", "sail") == Sail(power=9.0, slope=Slope(degrees=1.0))


def test_switching_a_choice_refuses_a_setting_that_only_the_old_one_has():
    text = refused(lambda: switched("--engine.name", "sail", "--engine.coal", "3"))
    assert text.startswith("there is no setting 'engine.coal'")


def test_staying_with_a_choice_keeps_everything():
    assert switched("--engine.power", "4") == Steam(power=4.0, coal=5, slope=Slope(degrees=1.0))


def test_switching_to_an_unknown_choice_is_left_for_the_refusal():
    assert "no engine.name 'oars'" in refused(lambda: switched("--engine.name", "oars"))


# Words of a command line


@pytest.mark.parametrize(
    ("name", "word", "value"),
    [
        ("length", "1_000", 1000),
        ("filled", "1e-1", 0.1),
        ("filled", "1", 1.0),
        ("draught", "none", None),
        ("draught", "None", None),
        ("draught", "2", 2.0),
        ("sound", "false", False),
        ("sound", "True", True),
        ("name", "none", "none"),
        ("name", "12", "12"),
        ("name", "", ""),
        ("colour", "blue", "blue"),
        ("decks", "2", 2),
        ("flags", "a, b", ("a", "b")),
        ("flags", "", ()),
        ("loads", "3,4", (3, 4)),
        ("tilt", "-2.5", -2.5),
    ],
)
def test_a_word_is_read_by_the_type_of_its_setting(name, word, value):
    read = getattr(ship(**{name: Text(word)}).hull, name)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "word", "text"),
    [
        ("length", "ten", "hull.length must be a whole number at least 1, got 'ten'"),
        ("length", "1.5", "hull.length must be a whole number at least 1, got '1.5'"),
        ("filled", "nan", "hull.filled must be a number at least 0 and at most 1, got nan"),
        ("sound", "yes", "hull.sound must be true or false, got 'yes'"),
        ("decks", "4", "hull.decks must be one of 1, 2, 3, got '4'"),
        ("loads", "1,x", "hull.loads must be a list of a whole number at least 1, got [1, 'x']"),
    ],
)
def test_a_word_that_does_not_fit_is_refused_as_typed(name, word, text):
    assert refused(lambda: ship(**{name: Text(word)})) == text


def test_dotted_arguments_become_nested_tables():
    changes = parse_dotted(["--hull.length", "3", "--engine.slope.degrees=-1", "--hull.name=--x=y"])
    assert changes == {"hull": {"length": "3", "name": "--x=y"}, "engine": {"slope": {"degrees": "-1"}}}
    assert isinstance(changes["hull"]["length"], Text)


def test_hyphens_in_a_name_are_underscores_and_the_last_word_wins():
    assert parse_dotted(["--a.b-c", "1", "--a.b_c", "-2"]) == {"a": {"b_c": "-2"}}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["lr"], "'lr' is not a setting; settings are written --section.name value"),
        (["--lr", "3"], "'--lr' is not a setting; settings are written --section.name value"),
        (["--name=a.b"], "'--name=a.b' is not a setting; settings are written --section.name value"),
        (["--a.b"], "--a.b needs a value"),
        (["--a.b", "--c.d", "3"], "--a.b needs a value"),
    ],
)
def test_words_that_are_no_settings_are_refused(arguments, text):
    assert refused(lambda: parse_dotted(arguments)) == text


# Overrides


def test_an_override_lies_over_tables_and_leaves_its_input_alone():
    data = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert override(data, {"a.c.d": 4, "a": {"f": 5}, "g.h": 6}) == {
        "a": {"b": 1, "c": {"d": 4}, "f": 5},
        "e": 3,
        "g": {"h": 6},
    }
    assert data == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}


def test_an_override_result_shares_no_table_with_its_inputs():
    data, changes = {"a": {"b": 1}}, {"c": {"d": 1}}
    result = override(data, changes)
    result["a"]["b"] = result["c"]["d"] = 2
    assert (data, changes) == ({"a": {"b": 1}}, {"c": {"d": 1}})


def test_an_override_may_turn_a_value_into_a_table_and_back():
    assert override({"a": 1}, {"a.b": 2}) == {"a": {"b": 2}}
    assert override({"a": {"b": 2}}, {"a": 1}) == {"a": 1}


def test_dotted_names_inside_tables_count_as_paths():
    assert override({"a": {"b": {"c": 1}}}, {"a": {"b.c": 2}}) == {"a": {"b": {"c": 2}}}


# Round trip


hulls = st.builds(
    Hull,
    length=st.integers(1, 10**12),
    colour=st.sampled_from(["red", "green", "blue"]),
    decks=st.sampled_from([1, 2, 3]),
    filled=st.floats(0, 1),
    draught=st.none() | st.floats(0, 1e300),
    sound=st.booleans(),
    name=st.text(),
    flags=st.lists(st.sampled_from(["a", "b", "fever"])).map(tuple),
    loads=st.lists(st.integers(1, 9)).map(tuple),
    tilt=st.floats(allow_nan=False),
)
slopes = st.builds(Slope, degrees=st.floats(1e-9, 90))
engines = st.builds(Steam, power=st.floats(1e-9, 1e9), slope=slopes) | st.builds(
    Sail, masts=st.integers(1, 9), slope=slopes
)


@given(st.builds(Ship, hull=hulls, engine=engines))
def test_to_dict_and_from_dict_are_inverse(config):
    assert from_dict(Ship, to_dict(config)) == config


@given(hulls)
def test_numbers_words_and_truths_survive_the_command_line(hull):
    names = ("length", "colour", "decks", "filled", "draught", "sound", "name", "tilt")
    arguments = [f"--hull.{name}={getattr(hull, name)}" for name in names]
    again = from_dict(Ship, parse_dotted(arguments)).hull
    assert [getattr(again, name) for name in names] == [getattr(hull, name) for name in names]


# TOML


def test_toml_is_read(tmp_path):
    (tmp_path / "a.toml").write_text('[hull]\nlength = 3\nname = "été"\n', encoding="utf-8")
    assert read_toml(tmp_path / "a.toml") == {"hull": {"length": 3, "name": "été"}}


def test_toml_faults_name_file_and_line(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[hull]\nlength = \n")
    assert refused(lambda: read_toml(path)).startswith(f"{path} is not valid TOML: ")
    assert "line 2" in refused(lambda: read_toml(path))
    path.write_bytes(b"name = '\xff'")
    assert refused(lambda: read_toml(path)).startswith(f"{path} is not valid TOML: ")


def test_a_toml_file_that_is_missing_or_unreadable_is_named(tmp_path):
    path = tmp_path / "a.toml"
    assert refused(lambda: read_toml(path)) == f"there is no config file {path}"
    assert (
        refused(lambda: read_toml(tmp_path)) == f"the config file {tmp_path} cannot be read: Is a directory"
    )


# Documentation


def test_settings_are_listed_with_path_limits_default_and_doc():
    settings = list(settings_of(Ship))
    assert settings[0] == Setting(
        path="hull.length", allowed="a whole number at least 1", default=MISSING, doc="Required."
    )
    by_path = {setting.path: setting for setting in settings}
    assert by_path["hull.filled"].doc == "A share,\non two lines."
    assert by_path["hull.undocumented"].doc == ""
    assert by_path["hull.loads"].allowed == "a list of a whole number at least 1"
    assert by_path["hull.draught"].allowed == "a number at least 0 or none"


def test_settings_of_a_choice_say_which_one_has_them():
    engine = [(s.path, s.when) for s in settings_of(Ship) if s.path.startswith("engine.")]
    assert engine == [
        ("engine.name", "engine.name=steam"),
        ("engine.power", "engine.name=steam"),
        ("engine.coal", "engine.name=steam"),
        ("engine.slope.degrees", "engine.name=steam"),
        ("engine.name", "engine.name=sail"),
        ("engine.power", "engine.name=sail"),
        ("engine.masts", "engine.name=sail"),
        ("engine.slope.degrees", "engine.name=sail"),
    ]


def test_settings_of_a_class_without_source_have_no_docs():
    code = "\n".join(
        [
            "from dataclasses import dataclass",
            "from hardy.config import Config, settings_of",
            "@dataclass(frozen=True, kw_only=True)",
            "class A(Config):",
            "    b: int = 1",
            "    'The doc.'",
            "print([(s.path, s.doc) for s in settings_of(A)])",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stderr, done.stdout) == ("", "[('b', '')]\n")


def test_a_limit_may_stand_in_any_annotation():
    @dataclass(frozen=True, kw_only=True)
    class Odd(Config):
        section: ClassVar[str] = "odd"
        number: Annotated[int, Range(least=1), Range(most=5)] = 2

    assert (
        refused(lambda: Odd(number=6)) == "odd.number must be a whole number at least 1 and at most 5, got 6"
    )


@dataclass(frozen=True, kw_only=True)
class Tow(Config):
    """A variant with many names."""

    any_name_like: ClassVar[str] = "tug.KIND"
    name: str = "tug.small"
    """Which tug."""
    lines: int = 1
    """How many."""


@dataclass(frozen=True, kw_only=True)
class Barge(Config):
    """Moved by one thing or another."""

    drive: Steam | Tow = field(default_factory=Tow)
    """How it moves."""


def test_a_variant_may_be_chosen_by_any_name_of_a_kind():
    assert from_dict(Barge, {"drive": {"name": "tug.large", "lines": 2}}).drive == Tow(
        name="tug.large", lines=2
    )
    assert isinstance(from_dict(Barge, {"drive": {"name": "steam"}}).drive, Steam)
    assert Tow.takes_name("tug.x") and not Tow.takes_name("tug.") and not Steam.takes_name("tug.x")


def test_names_that_belong_to_no_variant_are_refused_with_the_pattern_shown():
    with pytest.raises(ConfigError, match=r"no drive.name 'tog.large'.*tug.KIND"):
        from_dict(Barge, {"drive": {"name": "tog.large"}})


def test_a_class_is_found_by_its_path():
    assert class_at("collections.OrderedDict", dict, kind="table") is OrderedDict


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("collections.OrderedDirt", r"did you mean 'collections.OrderedDict'\?"),
        ("collections.abc", "there is no table 'collections.abc'"),
        ("collections.deque", "there is no table 'collections.deque'"),
        ("builtins.dict", "there is no table 'builtins.dict'"),
        (
            "colections.X",
            r"table 'colections.X': the module colections cannot be imported \(No module.*module.Class",
        ),
        ("OrderedDict", "table 'OrderedDict': give module.Class"),
    ],
)
def test_a_wrong_path_is_refused(path, text):
    with pytest.raises(ConfigError, match=text):
        class_at(path, dict, kind="table")
