"""Takes the pictures of report.html that stand in docs/use/report.md, in headless Chromium.

    python -m moecompile recipe=deepseek_ep hydra.run.dir=runs/report
    python docs/pictures.py runs/report             # writes docs/assets/report_*.png

Needs selenium (an extra of development), chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent / "assets"
VIEWS = ("verdict", "steps", "load", "traffic", "layout", "tokens")
WIDTH, HEIGHT, SECONDS = 960, 900, 60


def main() -> None:
    """Takes one picture of every view, from its heading on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory")
    page = (parser.parse_args().run / "report.html").resolve()
    if not page.is_file():
        sys.exit(f"error: {page}: there is no report. Give the directory of a run that has ended")
    browser = _browser()
    try:
        browser.get(page.as_uri())
        for view in VIEWS:
            path = ASSETS / f"report_{view}.png"
            path.write_bytes(_picture(browser, view))
            print(path)
    finally:
        browser.quit()


def _browser() -> Any:
    from selenium import webdriver

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        sys.exit("error: there is no Chromium. Install chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(argument)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


def _picture(browser: Any, view: str) -> bytes:
    """PNG of a section, at most a window high, when its charts are drawn."""
    from PIL import Image

    section = browser.find_element("id", view)
    browser.execute_script("arguments[0].scrollIntoView()", section)
    in_view = (
        "return [...arguments[0].querySelectorAll('.chart')].filter(c => c.getBoundingClientRect().top < "
        "window.innerHeight).every(c => c.dataset.drawn)"
    )
    end = time.monotonic() + SECONDS
    while not browser.execute_script(in_view, section):
        if time.monotonic() > end:
            raise TimeoutError(f"charts of {view} were not drawn")
        time.sleep(0.05)
    time.sleep(0.5)  # plotly's transitions
    height = int(browser.execute_script("return arguments[0].getBoundingClientRect().bottom", section))
    shot = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    out = io.BytesIO()
    shot.crop((0, 0, shot.width, min(shot.height, height))).quantize(64).save(out, "PNG", optimize=True)
    return out.getvalue()


if __name__ == "__main__":
    main()
