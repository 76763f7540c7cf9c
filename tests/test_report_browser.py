"""The report's page in a real browser: it fits a phone, asks for nothing, complains of nothing, and its keys work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, Page, find_browser
from test_report_page import make_run

from page_compare import write_comparison
from page_outputs import name_of, pictures_of
from report_page import write_report
from run_record import RunRecord

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium is installed")
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Return a browser, ended after the last test."""
    started = Browser(find_browser())
    yield started
    started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a report of wide grids, long names and three epochs."""
    return write_report(make_run(tmp_path_factory.mktemp("a_run_with_a_name_" + "x" * 60), count=12, epochs=3, side=30))


@pytest.fixture(scope="module")
def comparison(report: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a comparison of two runs."""
    other = make_run(tmp_path_factory.mktemp("other") / "run", count=12, seed=5, side=30, share=0.999)
    return write_comparison(report.parent, other)[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_a_page_fits_and_is_silent(browser, request, name, width, scheme):
    path = request.getfixturevalue(name)
    page = Page(browser, path, width, scheme=scheme)
    page.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    page.value("document.querySelectorAll('button.digit').forEach(e => e.click())")
    page.value("new Promise(done => setTimeout(done, 200))")
    assert page.value("document.documentElement.scrollWidth") <= page.value("document.documentElement.clientWidth")
    wide = "[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('svg')" \
        " && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).length"  # fmt: skip
    assert page.value(wide) == 0
    back = page.value("getComputedStyle(document.body).backgroundColor")
    text = page.value("getComputedStyle(document.body).color")
    brightness = [sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(", "))) for color in (back, text)]
    assert (brightness[0] > brightness[1]) == (scheme == "light") and abs(brightness[0] - brightness[1]) > 450
    assert page.complaints() == [] and page.requests() == [path.resolve().as_uri()]


def test_nothing_can_be_fetched_even_when_asked(browser, report):
    page = Page(browser, report)
    page.value("fetch('https://example.org/').catch(e => 0)")
    assert any("Content Security Policy" in said for said in page.complaints())


def test_j_and_k_go_from_task_to_task_and_open_it(browser, report):
    page = Page(browser, report)
    stops = page.value("document.querySelectorAll('[data-stop]').length")
    where = "at === null ? null : [...document.querySelectorAll('[data-stop]')].indexOf(at)"
    assert stops == 3 + 12 and page.value(where) is None
    found = []
    for key in "jjjjkjjkk":
        page.press(key)
        found.append(page.value(where))
    assert found == [0, 1, 2, 3, 2, 3, 4, 3, 2]
    assert page.value("document.querySelectorAll('#gallery details[data-kinds][open]').length") == 2
    assert page.value("at === document.activeElement && at.getBoundingClientRect().top") == pytest.approx(56, abs=3)
    for _ in range(20):
        page.press("j")
    assert page.value(where) == 14
    assert page.value("document.activeElement.tagName") == "SUMMARY"


def test_digits_are_drawn_over_the_grids_and_go_away(browser, report):
    page = Page(browser, report)
    shown = "[...document.querySelectorAll('.l canvas')].filter(e => getComputedStyle(e).display !== 'none').length"
    page.value("document.querySelector('#sample').scrollIntoView()")
    sizes = page.value("[...document.querySelectorAll('#sample .l img')].map(e => e.width)")
    page.press("d")
    page.value("new Promise(done => setTimeout(done, 300))")
    assert page.value(shown) > 3
    assert page.value("document.querySelector('button.digit').getAttribute('aria-pressed')") == "true"
    # What is read from the pixels is what was written: the target of the first card, digit by digit.
    read = """(() => {
      const img = document.querySelector("#sample .card img[alt^=target]"), c = document.createElement("canvas");
      [c.width, c.height] = [img.naturalWidth, img.naturalHeight];
      const x = c.getContext("2d"); x.drawImage(img, 0, 0);
      const p = x.getImageData(0, 0, c.width, c.height).data;
      return [...Array(c.width * c.height).keys()].map(i => near(data.palette, p[4*i], p[4*i+1], p[4*i+2])).join("");
    })()"""
    targets = {text.split('"target": "')[1].split('"')[0].replace("/", "")
               for text in (report.parent / "predictions" / "tasks.jsonl").read_text().splitlines()}  # fmt: skip
    assert page.value(read) in targets
    page.press("d")
    assert page.value(shown) == 0
    assert page.value("[...document.querySelectorAll('#sample .l img')].map(e => e.width)") == sizes


def test_the_slider_shows_the_sample_at_each_epoch(browser, report):
    page, run = Page(browser, report), RunRecord.read(report.parent)
    state = "[...document.querySelectorAll('#sample .card')].map(c => [c.querySelector('h3').innerText," \
        " [...c.querySelectorAll('[data-slot]')].map(i => [i.src, i.closest('figure').innerText])])"  # fmt: skip
    last = page.value(state)
    for place in (0, 1, 2):
        page.value(f"slider.value = {place}; slider.dispatchEvent(new Event('input'))")
        outputs = {name_of(output): output for output in run.validation(place).outputs}
        found = page.value(state)
        assert len(found) == 3 and (found == last) == (place == 2)
        for name, pictures in found:
            drawn = pictures_of(outputs[name])
            assert pictures == [["data:image/png;base64," + data, caption] for data, _, _, caption in drawn]
        assert page.value("document.querySelector('#which').innerText") == f"epoch {place}"


def test_filters_and_sorting(browser, report):
    page = Page(browser, report)
    left = "[...document.querySelectorAll('#gallery details[data-kinds]')].filter(e => !e.hidden).length"
    kinds = page.value("[...document.querySelectorAll('select.filter option')].map(o => [o.value, o.innerText])")
    for kind, text in kinds:
        page.value(f"s = document.querySelector('select.filter'); s.value = {kind!r};"
                   " s.dispatchEvent(new Event('change'))")  # fmt: skip
        assert f"({page.value(left)})" in text
    column = "[...document.querySelectorAll('#outputs tbody tr')].map(r => +r.cells[9].dataset.v)"
    page.value("document.querySelectorAll('#outputs thead th')[9].click()")
    up = page.value(column)
    page.value("document.querySelectorAll('#outputs thead th')[9].click()")
    assert up == sorted(up) and page.value(column) == up[::-1] and len(set(up)) > 3


def test_without_scripts_the_page_still_shows_everything(browser, report):
    page = Page(browser, report)
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    browser.events.clear()
    page.call("Page.reload")
    browser.wait_for("Page.loadEventFired")
    shown = "[...document.querySelectorAll('.js')].filter(e => getComputedStyle(e).display !== 'none').length"
    assert page.value(shown) == 0
    assert page.value("document.querySelectorAll('#gallery img').length") > 12 * 4
