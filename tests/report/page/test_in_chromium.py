"""report.html in a real browser: no error, nothing fetched, controls work, on a phone, in the dark and in print."""

from __future__ import annotations

import base64
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moecompile.report.page import write_report
from moecompile.report.page.sweeps import SweepJob, write_sweep_report
from tests.report.page.runs import a_run

pytestmark = pytest.mark.slow
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="report.html is NOT tested: selenium is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("report.html is NOT tested in a browser: install chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


def opened(browser: Any, path: Path, *, dark: bool = False) -> float:
    """Opens a page; seconds until its first chart in view can be drawn."""
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    start = time.perf_counter()
    browser.get(path.as_uri())
    waited(browser, "return document.documentElement.dataset.ready")
    return time.perf_counter() - start


def waited(browser: Any, script: str, *arguments: Any) -> Any:
    end = time.monotonic() + 60
    while not (found := browser.execute_script(script, *arguments)):
        assert time.monotonic() < end, script
        time.sleep(0.02)
    return found


def drawn(browser: Any, chart: str) -> Any:
    """A chart, scrolled into view and drawn."""
    element = browser.find_element("id", chart)
    browser.execute_script("arguments[0].scrollIntoView()", element)
    waited(browser, "return arguments[0].dataset.drawn", element)
    return element


def errors(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] != "INFO"]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    a_run(folder)
    return write_report(folder, "train")


def test_every_chart_is_drawn_without_an_error_and_nothing_is_fetched(browser: Any, page: Path) -> None:
    opened(browser, page)
    charts = [element.get_attribute("id") for element in browser.find_elements("css selector", ".chart")]
    assert len(charts) >= 9
    for chart in charts:
        drawn(browser, chart)
    fetched = "return performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith('data:'))"
    assert browser.execute_script(fetched) == []
    assert errors(browser) == []


def test_the_slider_changes_the_map(browser: Any, page: Path) -> None:
    opened(browser, page)
    element = drawn(browser, "load-map")
    assert browser.execute_script("return arguments[0].data[0].customdata[0][0]", element) > 0
    first = element.find_elements("css selector", ".slider-rail-touch-rect")[0]
    from selenium.webdriver import ActionChains

    left = -first.size["width"] // 2 + 3
    ActionChains(browser).move_to_element_with_offset(first, left, 0).click().perform()
    # In the first step, expert 0 of layer 0 has no tokens.
    waited(browser, "return arguments[0].data[0].customdata[0][0] === 0", element)
    assert browser.execute_script("return arguments[0].data[0].z[0][0]", element) == -2
    assert errors(browser) == []


def test_a_legend_hides_a_part(browser: Any, page: Path) -> None:
    opened(browser, page)
    element = drawn(browser, "by-layer-and-rank")
    element.find_elements("css selector", ".legendtoggle")[0].click()
    waited(browser, "return arguments[0].data.some((trace) => trace.visible === 'legendonly')", element)


def test_dark_light_and_print(browser: Any, page: Path) -> None:
    def ink() -> str:
        return browser.execute_script("return document.getElementById('loss')._fullLayout.font.color")

    opened(browser, page, dark=True)
    drawn(browser, "loss")
    waited(browser, "return document.getElementById('loss')._fullLayout.font.color !== '#444'")
    dark, back = ink(), browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    printed = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert printed.startswith(b"%PDF")
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    )
    waited(browser, f"return document.getElementById('loss')._fullLayout.font.color !== '{dark}'")
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != back
    assert errors(browser) == []


def test_a_phone_scrolls_in_one_direction(browser: Any, page: Path) -> None:
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        opened(browser, page)
        for chart in ("load-map", "traffic-map", "loss"):
            drawn(browser, chart)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_61_layers_of_256_experts_and_1000_steps_open_fast(browser: Any, tmp_path: Path) -> None:
    a_run(tmp_path, layers=61, experts=256, steps=1000)
    start = time.perf_counter()
    path = write_report(tmp_path, "train")
    written = time.perf_counter() - start
    assert path.stat().st_size < 5e6
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    seconds = opened(browser, path)
    metrics = {m["name"]: m["value"] for m in browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}
    drawn(browser, "load-map")
    assert errors(browser) == []
    print(f"\nwritten in {written:.2f} s, {path.stat().st_size / 1e6:.2f} MB, opened in {seconds:.2f} s")
    assert 0 < metrics["TaskDuration"] < 2  # seconds of the page's own thread, whatever else the machine does


def test_a_sweep_is_compared(browser: Any, tmp_path: Path) -> None:
    jobs = []
    for number in range(2):
        a_run(tmp_path / str(number), seed=number)
        write_report(tmp_path / str(number), "train")
        figures = {"val_loss": 1.0 + number, "tokens_per_second": 10.0}
        jobs.append(
            SweepJob(name=str(number), settings={"seed": str(number)}, status="ok", task="train", figures=figures)
        )
    opened(browser, write_sweep_report(tmp_path, jobs))
    for chart in ("loss", "bars-val_loss", "bars-tokens_per_second"):
        drawn(browser, chart)
    assert errors(browser) == []
    browser.find_element("link text", "1").click()
    waited(browser, "return document.title === 'tiny: train' && document.documentElement.dataset.ready")
    assert errors(browser) == []
