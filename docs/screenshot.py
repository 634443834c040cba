"""Takes the README's picture of a report with Debian's chromium: curves of a run, and a response replayed.

    python docs/screenshot.py runs/demo/dipo docs/report.png

Needs selenium (requirements.txt) and the packages chromium and chromium-driver.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image  # noqa: E402

from plumbing.common import InputError, run_script  # noqa: E402
from plumbing.config import Parser, folder_name, picture_name  # noqa: E402
from plumbing.report import make_report  # noqa: E402

WIDTH, HEIGHT = 1180, 325  # pixels: room for the head of the curves and a row of them


def take(report: Path) -> list[Image.Image]:
    """The curves of a report, and its first trajectory three steps before its end.

    Raises:
        InputError: no browser, or a report without trajectories.
    """
    try:
        from selenium import webdriver
        from selenium.common.exceptions import WebDriverException
    except ImportError as error:
        raise InputError("the package selenium is missing: pip install selenium") from error
    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    if not all(programs):  # selenium would look for one on the network
        raise InputError("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("headless=new", "no-sandbox", "hide-scrollbars", f"window-size={WIDTH},{HEIGHT}"):
        options.add_argument(f"--{argument}")
    try:
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    except WebDriverException as error:
        raise InputError(f"no browser: {error.msg.splitlines()[0]}") from error
    try:
        # The page from its curves down.
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(report.resolve().as_uri())
        browser.execute_script("document.querySelector('h2').scrollIntoView()")
        pictures = [Image.open(io.BytesIO(browser.get_screenshot_as_png()))]

        # A trajectory on its way.
        size["height"] = 2 * HEIGHT
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        if not browser.execute_script("return document.querySelector('[data-key]') !== null"):
            raise InputError(f"{report}: no rollouts to show")
        browser.execute_script("document.querySelector('[data-key]').click()")
        while not browser.execute_script("return document.getElementById('stream') !== null"):
            time.sleep(0.05)
        slider = "document.querySelector('dialog input[type=range]')"
        browser.execute_script(f"{slider}.value -= 3; {slider}.dispatchEvent(new Event('input'))")
        dialog = browser.execute_script("return document.querySelector('dialog')")
        browser.execute_script("arguments[0].style.borderRadius = 0; document.activeElement.blur()", dialog)
        return [*pictures, Image.open(io.BytesIO(dialog.screenshot_as_png))]
    finally:
        browser.quit()


def main() -> None:
    """Take the picture."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=folder_name, help="folder of a training run")
    parser.add_argument("picture", type=picture_name, help="PNG to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        curves, viewer = take(make_report([options.run], Path(folder) / "report.html"))
    whole = Image.new("RGB", (curves.width, curves.height + viewer.height), "white")
    whole.paste(curves.convert("RGB"), (0, 0))
    whole.paste(viewer.convert("RGB"), ((curves.width - viewer.width) // 2, curves.height))
    whole.quantize(256).save(options.picture, optimize=True)


if __name__ == "__main__":
    run_script(main)
