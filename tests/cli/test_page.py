"""Pages that need nothing but a browser: what is in the file. How they behave: test_page_browser.py."""

import base64
import hashlib
import re
import tomllib
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

from hardy.cli.page import (
    NUM_COLOURS,
    SCRIPTS,
    STYLES,
    Bar,
    Bars,
    Image,
    Table,
    Text,
    Verdict,
    page_html,
    write_page,
)
from hardy.cli.page_curves import Curve, Curves, Mark
from hardy.config import UserError

EVIL = "</script></style><img src=x onerror=alert(1)>\"'&{{script}}"
PIXEL = base64.b64decode("R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==")


class Elements(HTMLParser):
    """Collects the start tags with their attributes, and the text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def of(*sections, title="t", lead=""):
    return page_html(title=title, sections=sections, lead=lead)


def every_section(tmp_path, word):
    (tmp_path / "dot.gif").write_bytes(PIXEL)
    mark = Mark(x={word: 1.0}, text=word)
    curve = Curve(name=word, group=word, kind=word, x={word: [1.0, 2.0]}, y=[1.0, 2.0], marks=[mark])
    return [
        Text(title=word, paragraphs=[word], is_warning=True),
        Table(title=word, heading=[word], rows=[[word], [Verdict(text=word, holds=False)]], note=word),
        Table(title=word, heading=[word], rows=[[word]], is_folded=True),
        Bars(title=word, bars=[Bar(label=word, value=1.0, text=word)], note=word),
        Image(title=word, file=tmp_path / "dot.gif", description=word),
        Curves(title=word, curves=[curve], axes=[word], y_label=word, note=word),
    ]


def test_whatever_words_a_page_is_given_they_stay_words(tmp_path):
    harmless, evil = (of(*every_section(tmp_path, word), title=word, lead=word) for word in ("word", EVIL))
    assert [tag for tag, _ in Elements(evil).tags] == [tag for tag, _ in Elements(harmless).tags]
    assert not any(name.startswith("on") for _, attrs in Elements(evil).tags for name in attrs)
    assert evil.count("</script>") == harmless.count("</script>")
    assert EVIL in Elements(evil).text


def test_a_page_names_no_other_place(tmp_path):
    page = of(*every_section(tmp_path, "word"))
    links = [
        v for _, attrs in Elements(page).tags for k, v in attrs.items() if k in ("src", "href", "action")
    ]
    assert links
    assert all(link.startswith("data:") for link in links)
    without_namespace = page.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", without_namespace)
    assert not re.search(
        r"\b(fetch|XMLHttpRequest|WebSocket|importScripts|sendBeacon)\b|innerHTML|eval\(", page
    )


def test_the_policy_lets_run_what_the_page_holds_and_nothing_else():
    page = of(Text(title="a", paragraphs=["b"]))
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert len(script) == 1
    assert (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
        in policy
    )


def test_tables_mark_words_rows_and_verdicts():
    rows = [
        ["edit", "rank 4", Verdict(text="0.91", holds=True)],
        ["apollo", "x", Verdict(text="2", holds=False)],
    ]
    page = of(Table(title="Claims", heading=["claim", "how", "got"], rows=rows, words=2, note="of 3 seeds"))
    assert '<th scope="col" class="word">how</th><th scope="col">got</th>' in page
    assert (
        '<th scope="row" class="word">edit</th><td class="word">rank 4</td><td><span class="holds">✓ 0.91'
        in page
    )
    assert '<td><span class="misses">✗ 2</span></td>' in page
    assert '<p class="note">of 3 seeds</p>' in page
    assert 'role="region" aria-label="Claims"' in page
    plain = of(Table(title="", heading=["a"], rows=[["1"]], words=0))
    assert "<td>1</td>" in plain
    assert '<th scope="row"' not in plain


def test_a_folded_table_opens_by_itself():
    page = of(Table(title="More", heading=["a"], rows=[["b"]], is_folded=True))
    assert "<details><summary><h2>More</h2></summary><div" in page


def test_bars_are_as_long_as_their_values():
    bars = [
        Bar(label="a", value=30.0, text="30 MB", colour=NUM_COLOURS + 1, spread=10.0),
        Bar(label="b", value=10.0, text="10 MB"),
    ]
    page = of(Bars(title="Memory", bars=bars))
    assert 'class="bar c1" style="width:75.00%"' in page
    assert 'class="whisker" style="left:50.00%;width:50.00%"' in page
    assert 'class="bar c0" style="width:25.00%"' in page
    assert page.count("whisker") == 1 + "".join(of()).count("whisker")
    assert "width:0.00%" in of(Bars(title="Nothing", bars=[Bar(label="a", value=0.0, text="0")]))


def test_an_image_travels_with_the_page(tmp_path):
    (tmp_path / "dot.gif").write_bytes(PIXEL)
    page = of(Image(title="", file=tmp_path / "dot.gif", description="a dot"))
    assert f'<img src="data:image/gif;base64,{base64.b64encode(PIXEL).decode()}" alt="a dot">' in page
    with pytest.raises(UserError, match=r"the picture .*none\.png cannot be read"):
        of(Image(title="", file=tmp_path / "none.png", description=""))
    with pytest.raises(UserError, match=r"a\.txt is no picture by its name; give a PNG"):
        of(Image(title="", file=Path("a.txt"), description=""))


def test_a_page_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(UserError, match=r"the page .*page\.html could not be written: No such file"):
        write_page(tmp_path / "none" / "page.html", title="t", sections=[])


def test_the_same_page_is_the_same_file(tmp_path):
    sections = every_section(tmp_path, "word")
    pages = [write_page(tmp_path / name, title="t", sections=sections).read_bytes() for name in "ab"]
    assert pages[0] == pages[1]
    assert b"{{" not in pages[0]


def test_the_files_of_a_page_come_with_the_package():
    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "hardy"
    ]
    packed = {path.name for pattern in patterns for path in (root / "src" / "hardy").glob(pattern)}
    there = {path.name for path in (resources.files("hardy.cli") / "page_files").iterdir()}
    assert there == {"page.html", *STYLES, *SCRIPTS}
    assert there <= packed


def contrast(one, other):
    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("place", [0, 1], ids=["light", "dark"])
def test_words_and_curves_stand_out(place):
    css = (resources.files("hardy.cli") / "page_files" / "page.css").read_text()
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", re.findall(r":root \{(.*?)\}", css, re.DOTALL)[place]))
    for ink in ("ink", "soft", "accent", "good", "bad"):
        assert min(contrast(colours[paper], colours[ink]) for paper in ("paper", "card")) >= 4.5, ink
    assert contrast(colours["warn"], colours["ink"]) >= 4.5
    for number in range(NUM_COLOURS):
        assert contrast(colours["paper"], colours[f"c{number}"]) >= 3, number
