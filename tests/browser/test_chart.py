"""The chart in a real browser."""

import shutil
import statistics

import pytest

from minimind_nb.monitor.charts import inspect
from minimind_nb.monitor.comparison import compare
from minimind_nb.monitor.metrics import History, MetricsLog

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium")
LIGHT, DARK = "background:#fff;color:#222", "background:#111;color:#eee"


@pytest.fixture(scope="module")
def chromium():
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def chromium_page(chromium):
    """A page that fails the test if a script raised or logged an error."""
    page = chromium.new_page(viewport={"width": 900, "height": 700})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    yield page
    page.close()
    assert not errors


@pytest.fixture
def make_run(tmp_path):
    """A function that makes the history of a run whose loss falls by 0.01 a step."""

    def make(name="run", steps=200, lost=(), start=4.0):
        history = History(tmp_path / name / "metrics.jsonl")
        history.path.parent.mkdir(parents=True, exist_ok=True)
        with MetricsLog(history.path) as log:
            for step in range(steps + 1):
                at = {"step": step, "tokens": 1000 * step, "seconds": 6.0 * step}
                loss = float("nan") if step in lost else start - 0.01 * step
                if step:
                    log.append("train", **at, loss=loss, learning_rate=1e-5 * step)
                if step % 50 == 0:
                    log.append("eval", **at, loss=start + 0.5 - 0.01 * step)
        history.refresh()
        return history

    return make


def show(page, *outputs, style=LIGHT):
    page.set_content(f'<body style="{style}">{"".join(outputs)}</body>')


def legend(page):
    """The cells of each row of the legend, by name."""
    rows = page.locator(".minimind-chart > table tr").all()[1:]
    cells = (row.locator("td").all_inner_texts() for row in rows)
    return {name.strip(): values for name, *values in cells}


def ticks(page):
    """The numbers along the x axis."""
    return page.locator(".minimind-chart text.x").all_text_contents()


def at(page, x, y=0.5):
    """The place in the first chart at these shares of its plot."""
    box = page.locator(".minimind-chart > svg").first.bounding_box()
    return box["x"] + 62 + x * (box["width"] - 74), box["y"] + 10 + y * (
        box["height"] - 52
    )


def drag(page, start, end):
    page.mouse.move(*at(page, start))
    page.mouse.down()
    page.mouse.move(*at(page, end), steps=4)
    page.mouse.up()


def test_the_script_replaces_the_picture(chromium_page, make_run):
    show(chromium_page, inspect(make_run())._repr_mimebundle_()["text/html"])
    assert chromium_page.locator("img").count() == 0
    assert chromium_page.locator(".minimind-chart .title").inner_text() == "run"
    last = legend(chromium_page)
    assert last["training"] == ["200", "2", "2.023", ""]
    assert last["validation"] == ["200", "", "", "2.500"]


def test_a_resume_is_a_visible_line(chromium_page, make_run):
    history = make_run()
    resume = {
        "kind": "event",
        "event": "resume",
        "step": 100,
        "tokens": 1,
        "seconds": 1,
    }
    history.rows.append(resume)
    show(chromium_page, inspect(history).html())
    line = chromium_page.locator(".resume").first
    assert line.get_attribute("d").count("M") == 1
    assert "none" not in line.evaluate("node => getComputedStyle(node).stroke")
    assert chromium_page.get_by_text("dashed: resumed").is_visible()


def test_without_scripts_the_picture_stays(chromium, make_run):
    page = chromium.new_context(java_script_enabled=False).new_page()
    show(page, inspect(make_run())._repr_mimebundle_()["text/html"])
    assert page.locator("img").is_visible()
    assert "run: step 200" in page.locator(".faint").inner_text()


def test_hovering_reads_the_nearest_point(chromium_page, make_run):
    show(chromium_page, inspect(make_run(), smoothing=0).html())
    chromium_page.mouse.move(*at(chromium_page, 0.5, 0.6))
    read = legend(chromium_page)
    assert read["training"][:2] == ["100", "3"]
    assert read["validation"][0] == "100" and read["validation"][-1] == "3.500"
    assert chromium_page.locator(".hover .dots").count() == 2
    chromium_page.mouse.move(5, 5)
    assert legend(chromium_page)["training"][0] == "200"


def test_a_range_is_zoomed_moved_and_left(chromium_page, make_run):
    show(chromium_page, inspect(make_run()).html())
    whole = ticks(chromium_page)
    drag(chromium_page, 0.4, 0.6)
    zoomed = ticks(chromium_page)
    assert float(zoomed[0]) >= 75 and float(zoomed[-1]) <= 125
    chromium_page.keyboard.down("Shift")
    drag(chromium_page, 0.2, 0.7)
    chromium_page.keyboard.up("Shift")
    assert float(ticks(chromium_page)[0]) < float(zoomed[0])
    chromium_page.mouse.dblclick(*at(chromium_page, 0.5))
    assert ticks(chromium_page) == whole


def test_controls_choose_quantity_axes_and_smoothing(chromium_page, make_run):
    show(chromium_page, inspect(make_run()).html())
    chromium_page.select_option("[name=x]", "minutes")
    assert ticks(chromium_page)[-1] == "20"
    chromium_page.select_option("[name=y]", "perplexity")
    assert chromium_page.is_checked("[name=log_y]")
    assert legend(chromium_page)["training"][:2] == ["20", "7.389"]
    chromium_page.check("[name=log_x]")
    assert [*ticks(chromium_page)[:2]] == ["0.1", "0.2"]
    chromium_page.locator("[name=smoothing]").fill("0")
    assert legend(chromium_page)["training"][1:3] == ["7.389", "7.389"]


def test_a_click_hides_a_run_and_shows_it_again(chromium_page, make_run):
    html = compare(make_run("a"), make_run("<b>预训练", start=5.0)).html()
    show(chromium_page, html)
    assert list(legend(chromium_page)) == ["a", "<b>预训练"]
    curves = chromium_page.locator("svg svg > g")
    assert curves.count() == 4
    chromium_page.get_by_role("button", name="预训练").click()
    assert curves.count() == 2
    chromium_page.get_by_role("button", name="a", exact=True).click()
    assert (
        "no values here"
        in chromium_page.locator(".minimind-chart > svg").text_content()
    )
    chromium_page.get_by_role("button", name="a", exact=True).click()
    assert curves.count() == 2


def test_an_update_of_the_same_key_keeps_what_the_reader_chose(chromium_page, make_run):
    show(chromium_page, '<div id="cell"></div>', inspect(make_run("other")).html("o"))

    def update(history):
        code = """html => {
            const cell = document.querySelector("#cell");
            cell.replaceChildren(document.createRange().createContextualFragment(html));
            return cell.getBoundingClientRect().height;
        }"""
        return chromium_page.evaluate(code, inspect(history).html("k"))

    height = update(make_run("r"))
    drag(chromium_page, 0.4, 0.6)
    zoomed = ticks(chromium_page)
    chromium_page.get_by_role("button", name="validation").first.click()
    chromium_page.locator("[name=smoothing]").first.fill("75")
    assert update(make_run("r", steps=300)) == height
    assert ticks(chromium_page)[: len(zoomed)] == zoomed
    first = chromium_page.locator(".minimind-chart").first
    assert first.locator("svg svg > g").count() == 1
    assert first.locator("output").inner_text() == "0.999"
    assert (
        chromium_page.locator(".minimind-chart").last.locator("svg svg > g").count()
        == 2
    )


@pytest.mark.parametrize(
    ("style", "ink"), [(LIGHT, "rgb(34, 34, 34)"), (DARK, "rgb(238, 238, 238)")]
)
def test_the_colours_fit_the_page(chromium_page, make_run, style, ink):
    show(chromium_page, inspect(make_run()).html(), style=style)
    read = "(node, name) => getComputedStyle(node)[name]"
    title = chromium_page.locator(".minimind-chart .title")
    assert title.evaluate(read, "color") == ink
    curve = chromium_page.locator("svg .eval").first
    assert curve.evaluate(read, "stroke") == "rgb(221, 107, 31)"


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("steps", "lost"), [(0, ()), (1, ()), (1, (1,)), (9, (3, 4))])
def test_odd_runs_raise_nothing(chromium_page, make_run, steps, lost, log):
    history = make_run(steps=steps, lost=lost, start=0.02)
    show(chromium_page, inspect(history, smoothing=0.5).html())
    for name in ("log_x", "log_y"):
        chromium_page.set_checked(f"[name={name}]", log)
    chromium_page.mouse.move(*at(chromium_page, 0.5))
    drag(chromium_page, 0.1, 0.9)
    empty = History(history.path.with_name("none.jsonl"))
    show(chromium_page, inspect(empty).html())
    assert (
        "no rows yet" in chromium_page.locator(".minimind-chart > svg").text_content()
    )


def test_a_narrow_page_is_filled_and_a_redraw_is_fast(chromium_page, make_run):
    history = make_run(steps=5_000)
    history.rows *= 4
    show(chromium_page, inspect(history).html())
    chromium_page.set_viewport_size({"width": 500, "height": 700})
    box = chromium_page.locator(".minimind-chart").bounding_box()
    assert box["width"] < 500
    code = """() => {
        const box = document.querySelector("[name=log_x]"), start = performance.now();
        box.click();
        return performance.now() - start;
    }"""
    times = [chromium_page.evaluate(code) for _ in range(8)]
    assert statistics.median(times) < 500  # 15 ms where nothing else runs
