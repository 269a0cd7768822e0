"""Pages in a real browser: Chromium by Playwright, from disk, without a network."""

import json
import math
import random
import re
import shutil
import time

import pytest

from hardy.cli.main import main
from hardy.cli.page import Bar, Bars, Table, Text, Verdict, write_page
from hardy.cli.page_curves import Curve, Curves, Mark

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PLOT = ".stage > svg"
EVIL = "</script><img src=x onerror=\"document.title='taken'\">"


def browser_path():
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser():
    found = browser_path()
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found)
        yield opened
        opened.close()


@pytest.fixture
def show(browser):
    """Open a file and return the page; at the end it must have said, asked and failed nothing."""
    contexts, wrong, expected = [], [], []

    def open_page(path, *, width=1280, height=900, provoked="", **more):
        expected.append(provoked)
        context = browser.new_context(viewport={"width": width, "height": height}, offline=True, **more)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        here = path.as_uri()
        page.on("request", lambda request: request.url == here or wrong.append(f"request: {request.url}"))
        page.goto(here)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in wrong if not any(part and part in text for part in expected)] == []


def loss(step, *, shift=0.0):
    return 2 + shift + 3 * math.exp(-step / 100) + 0.1 * math.sin(step)


@pytest.fixture(scope="module")
def small_page(tmp_path_factory):
    """Three runs of 400 steps, two of them with a band; an anomaly, tables, bars, words that are code."""
    steps = list(range(1, 401))
    x = {"step": steps, "tokens": [1000 * s for s in steps], "time (s)": [0.5 * s for s in steps]}
    mark = Mark(x={axis: places[199] for axis, places in x.items()}, text="step 200: left out")
    few = {axis: places[99::100] for axis, places in x.items()}
    curves = []
    for name, group, shift in (("a-0", "a", 0.0), ("a-1", "a", 0.2), (EVIL, EVIL, 1.0)):
        y = [loss(step, shift=shift) for step in steps]
        about = {"name": name, "group": group}
        marks = [mark] if name == EVIL else []
        curves.append(Curve(**about, kind="training", x=x, y=y, marks=marks))
        curves.append(Curve(**about, kind="validation", x=few, y=y[99::100], style="dots"))
    middle = [loss(step, shift=0.1) for step in few["step"]]
    low, high = [v - 0.1 for v in middle], [v + 0.1 for v in middle]
    curves.append(Curve(name="a", group="a", kind="mean", x=few, y=middle, low=low, high=high))
    claims = [["x", Verdict(text="1", holds=True)], ["y", Verdict(text="2", holds=False)]]
    wide = [EVIL, *["1.234 ± 0.567"] * 12]
    sections = [
        Text(title=EVIL, paragraphs=[EVIL], is_warning=True),
        Table(title="Table", heading=[EVIL, *"abcdefghijkl"], rows=[wide], note="A note."),
        Table(title="Claims", heading=["claim", "got"], rows=claims),
        Curves(title="Loss", curves=curves, axes=list(x), y_label="loss"),
        Bars(title="Memory", bars=[Bar(label=EVIL, value=3.0, text="3 MB", spread=1.0)]),
    ]
    path = tmp_path_factory.mktemp("page") / "page.html"
    return write_page(path, title="Small", sections=sections, lead="Two runs.")


def box_of(page, selector):
    page.locator(selector).first.scroll_into_view_if_needed()
    return page.locator(selector).first.bounding_box()


def paths(page, **about):
    """Return the drawn paths of curves as lists of points."""
    where = "".join(f'[data-{key}="{value}"]' for key, value in about.items())
    texts = page.eval_on_selector_all(
        f"{PLOT} path.curve{where}", "all => all.map(one => one.getAttribute('d'))"
    )
    return [[tuple(map(float, pair.split())) for pair in re.split("[ML]", text) if pair] for text in texts]


def ticks(page):
    """Return what stands below the x axis."""
    return page.eval_on_selector_all(
        f"{PLOT} text.below:not(.label)", "all => all.map(one => one.textContent)"
    )


def press(page, text):
    page.get_by_role("button", name=text, exact=True).click()


def until(holds, *, patience_s=5.0):
    """Wait for what the browser does in its own time; the page's policy forbids Playwright's way."""
    end = time.perf_counter() + patience_s
    while not holds():
        assert time.perf_counter() < end, "it never came"
        time.sleep(0.02)


def drag(page, start, end):
    box = box_of(page, PLOT)
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=4)
    page.mouse.up()


def test_curves_are_drawn_where_their_numbers_are(small_page, show):
    page = show(small_page)
    page.locator("input.smoothing").fill("0")
    (drawn,) = paths(page, name="a-0", kind="training")
    assert len(drawn) == 400
    box = page.eval_on_selector(
        f"{PLOT} rect.frame",
        "one => ({...one.getBBox(), x: one.x.baseVal.value, width: one.width.baseVal.value})",
    )
    assert drawn[0][0] == pytest.approx(box["x"], abs=0.2)
    assert drawn[-1][0] == pytest.approx(box["x"] + box["width"], abs=0.2)
    # pixels are a straight line of the values: y falls as the loss rises
    (_, y0), (_, y1) = drawn[0], drawn[-1]
    slope = (y1 - y0) / (loss(400) - loss(1))
    assert slope < 0
    assert all(
        y == pytest.approx(y0 + slope * (loss(i + 1) - loss(1)), abs=0.2) for i, (_, y) in enumerate(drawn)
    )
    assert page.locator(f"{PLOT} path.band").count() == 1
    assert page.locator(f"{PLOT} path.mark").count() == 1
    assert page.locator(f"{PLOT} circle.dot").count() == 12


def test_buttons_hide_and_show_by_mouse_and_keyboard(small_page, show):
    page = show(small_page)
    assert len(paths(page)) == 7
    press(page, "a-0")
    assert (len(paths(page)), paths(page, name="a-0")) == (5, [])
    assert page.get_by_role("button", name="a-0", exact=True).get_attribute("aria-pressed") == "false"
    assert page.get_by_role("button", name="a", exact=True).get_attribute("aria-pressed") == "true"
    press(page, "a")
    assert {len(paths(page)), len(paths(page, name="a-1"))} == {2, 0}
    page.get_by_role("button", name="a", exact=True).focus()
    page.keyboard.press("Enter")
    assert len(paths(page)) == 7
    press(page, "validation")
    assert len(paths(page, kind="validation")) == 0
    press(page, "training")
    press(page, "mean")
    assert "Nothing is shown" in page.locator(f"{PLOT} text.empty").text_content()
    press(page, "training")
    press(page, "▾ anomalies")
    assert page.locator(f"{PLOT} path.mark").count() == 0


def test_zoom_by_drag_wheel_and_keys_and_back(small_page, show):
    page = show(small_page)
    whole = ticks(page)
    assert whole[-1] == "400"
    drag(page, (0.5, 0.4), (0.75, 0.4))
    zoomed = [float(tick) for tick in ticks(page)]
    assert 150 < min(zoomed) < max(zoomed) < 320
    press(page, "whole range")
    assert ticks(page) == whole
    page.mouse.wheel(0, -200)  # the pointer is on the button: nothing happens
    assert ticks(page) == whole
    page.locator(PLOT).hover()
    page.mouse.wheel(0, -200)
    until(lambda: ticks(page) != whole)
    assert "1 to 400" not in page.locator(PLOT).get_attribute("aria-label")
    page.locator(PLOT).dblclick()
    assert ticks(page) == whole
    page.locator(PLOT).focus()
    page.keyboard.press("+")
    inside = ticks(page)
    assert inside != whole
    page.keyboard.press("ArrowRight")
    assert float(ticks(page)[-1]) > float(inside[-1])
    page.keyboard.press("0")
    assert ticks(page) == whole


def test_a_box_zooms_both_ways_and_shows_more_of_a_curve(small_page, show):
    page = show(small_page)
    before = paths(page, name="a-1", kind="training")[0]
    drag(page, (0.3, 0.5), (0.6, 0.9))
    after = paths(page, name="a-1", kind="training")[0]
    assert len(after) < len(before)
    assert after[5][0] - after[4][0] == pytest.approx((before[5][0] - before[4][0]) / 0.33, rel=0.15)


def test_the_x_axis_and_the_y_axis_can_be_chosen(small_page, show):
    page = show(small_page)
    assert ticks(page)[-1] == "400"
    page.locator("select.axis").select_option("tokens")
    assert ticks(page)[-1] == "400k"
    page.locator("select.axis").select_option("time (s)")
    assert ticks(page)[-1] == "200"
    assert page.locator(f"{PLOT} text.label").first.text_content() == "time (s)"
    page.locator("input.smoothing").fill("0")
    (linear,) = paths(page, name="a-0", kind="training")
    press(page, "log y axis")
    (log,) = paths(page, name="a-0", kind="training")
    share = (log[50][1] - log[0][1]) / (log[-1][1] - log[0][1])
    wanted = math.log(loss(51) / loss(1)) / math.log(loss(400) / loss(1))
    assert share == pytest.approx(wanted, abs=0.01)
    assert linear[50][1] != pytest.approx(log[50][1], abs=1)


def test_smoothing_is_an_average_without_a_bias_at_the_start(small_page, show):
    page = show(small_page)
    assert page.locator("input.smoothing").input_value() == "0.9"
    page.locator("input.smoothing").fill("0")
    (raw,) = paths(page, name="a-0", kind="training")
    page.locator("input.smoothing").fill("0.5")
    page.locator(PLOT).hover(position={"x": 60, "y": 100})
    sum_, weight = 0.0, 0.0
    for step in (1, 2, 3):
        sum_, weight = 0.5 * sum_ + 0.5 * loss(step), 0.5 * weight + 0.5
    got = page.evaluate("values => smoothed(values, 0.5)[2]", [loss(step) for step in (1, 2, 3)])
    assert got == pytest.approx(sum_ / weight)
    assert page.evaluate("smoothed([null, 4, null, 4], 0.9)") == [
        None,
        pytest.approx(4),
        None,
        pytest.approx(4),
    ]
    assert paths(page, name="a-0", kind="training")[0] != raw
    assert page.locator(f"{PLOT} path.raw").count() == 3


def test_a_box_tells_the_values_under_the_pointer(small_page, show):
    page = show(small_page)
    page.locator("input.smoothing").fill("0")
    box = box_of(page, PLOT)
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    values = page.locator(".values")
    assert values.is_visible()
    step = int(re.search(r"step (\d+)\n", values.inner_text())[1])
    rows = values.locator("li").all_inner_texts()
    told = {re.split(r", (?=training)", row)[0]: row.split("\n")[-1] for row in rows if "training" in row}
    assert float(told["a-0"]) == pytest.approx(loss(step), abs=0.06)
    assert float(told[EVIL]) == pytest.approx(loss(step, shift=1.0), abs=0.06)
    assert any(re.search(r"\(\d\.\d+ to \d\.\d+\)", row) for row in rows)
    page.mouse.move(5, 5)
    assert not values.is_visible()


def test_numbers_are_unpacked_as_they_were_packed(small_page, show):
    from hardy.cli.page_curves import encode

    page = show(small_page)
    values = [1.25, 1.5, 1.75, None, None, -2.0, 3e6]
    assert page.evaluate("packed => decode(packed)", encode(values, decimals=2)) == values
    assert page.evaluate("packed => decode(packed)", encode([], decimals=0)) == []
    shown = page.evaluate(
        "(() => { const y = Array(50000).fill(1); y[31234] = 9; return chosen(y, 0, 50000); })()"
    )
    assert 31234 in shown
    assert len(shown) <= 2000


def test_words_from_runs_do_nothing(small_page, show):
    page = show(small_page, provoked="Executing inline script violates")
    assert page.title() == "Small"
    assert page.locator("img").count() == 0
    assert page.get_by_role("button", name=EVIL, exact=True).count() == 1
    blocked = page.evaluate(
        """() => new Promise(done => {
            document.addEventListener('securitypolicyviolation', event => done(event.violatedDirective));
            const more = document.createElement('script');
            more.textContent = 'document.title = "taken"';
            document.body.append(more);
        })"""
    )
    assert blocked.startswith("script-src")
    assert page.title() == "Small"


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_sticks_out_at_any_width(small_page, show, width):
    page = show(small_page, width=width, height=740)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        """width => [...document.querySelectorAll('body *')].filter(one => {
            const box = one.getBoundingClientRect();
            return box.width > 0 && (box.right > width + 1 || box.left < -1) && !one.closest('.scroll, svg');
        }).map(one => one.outerHTML.slice(0, 80))""",
        width,
    )
    assert outside == []
    plot = box_of(page, PLOT)
    assert plot["width"] > 0.85 * width * min(1, 1216 / width)
    small = page.evaluate(
        "[...document.querySelectorAll('p, td, th, button, li')]"
        ".map(one => parseFloat(getComputedStyle(one).fontSize))"
    )
    assert min(small) >= 12
    if width == 360:
        heights = page.eval_on_selector_all(
            "button.group", "all => all.map(one => one.getBoundingClientRect().height)"
        )
        assert min(heights) >= 30  # a finger finds them


CONTRASTS = """() => {
    const parts = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92
        : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const paper = one => {
        for (; one; one = one.parentElement) {
            const colour = parts(getComputedStyle(one).backgroundColor);
            if (colour.length === 3 || colour[3] > 0) return colour;
        }
        return [255, 255, 255];
    };
    const found = {};
    const words = 'h1, h2, p, th, td, button, label, li span, svg text, select, output';
    for (const one of document.querySelectorAll(words)) {
        if (!one.textContent.trim() || one.getBoundingClientRect().width === 0) continue;
        const style = getComputedStyle(one);
        const ink = parts(one.closest('svg') ? style.fill : style.color);
        const [low, high] = [light(ink), light(paper(one))].sort((a, b) => a - b);
        found[one.tagName + '.' + one.getAttribute('class')] = (high + 0.05) / (low + 0.05);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_in_the_light_and_in_the_dark(small_page, show, scheme):
    page = show(small_page, color_scheme=scheme)
    press(page, "validation")  # one that is off
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) < 150) == (scheme == "dark")
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 12
    assert {name: value for name, value in contrasts.items() if value < 4.5} == {}


def test_a_picture_follows_the_width(small_page, show):
    page = show(small_page)
    page.set_viewport_size({"width": 400, "height": 800})
    until(lambda: float(page.locator(PLOT).get_attribute("viewBox").split()[2]) < 400)
    assert max(x for x, _ in paths(page, name="a-0", kind="training")[0]) < 400


def test_without_javascript_a_table_stands_for_the_picture(small_page, show, tmp_path):
    as_read = small_page.read_text().replace("noscript>", "article>")  # what is inside is shown then
    (tmp_path / "page.html").write_text(as_read)
    page = show(tmp_path / "page.html", java_script_enabled=False, width=360)
    assert page.get_by_text("The picture needs JavaScript").is_visible()
    assert page.locator("article td").count() > 20
    assert page.locator(".bar").first.bounding_box()["width"] > 50
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_on_paper_the_controls_are_gone_and_the_ink_is_dark(small_page, show):
    page = show(small_page, color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator(".controls").is_visible()
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.slow
def test_ten_runs_of_ten_thousand_steps_are_small_and_open_at_once(make_run, show, tmp_path):
    folders = []
    for number in range(10):
        noise = random.Random(number)
        lines, tokens = [], 0
        for step in range(1, 10_001):
            tokens += 16_384 - noise.randrange(9)
            value = 2 + 3 * math.exp(-step / 900) + noise.gauss(0, 0.05)
            line = {"step": step, "loss": value, "tokens": tokens, "step_time_s": noise.uniform(0.2, 0.25)}
            lines.append(line | ({"validation_loss": value} if step % 100 == 0 else {}))
        folders.append(make_run(f"run-{number}", config={"optim.lr": number}, lines=lines))
    file = tmp_path / "page.html"
    assert (
        main(["compare", *map(str, folders), "--out", str(tmp_path / "table.md"), "--html", str(file)]) == 0
    )
    assert file.stat().st_size < 2_000_000
    data = json.loads(re.search(r'type="application/json" id="[\w-]+">(.*?)</script>', file.read_text())[1])
    assert len(data["curves"]) == 20
    began = time.perf_counter()
    page = show(file)  # returns after the load event; the script has run by then
    page.wait_for_selector(f"{PLOT} path.curve")
    assert time.perf_counter() - began < 2
    assert len(paths(page, kind="training")) == 10
    assert (
        page.evaluate(
            "decode(JSON.parse(document.querySelector('script[id]').textContent).curves[0].y).length"
        )
        == 10_000
    )
    longest = max(map(len, paths(page, kind="training")))
    assert 1000 < longest <= 2000
