"""Reports in a real browser, headless: they work, ask nothing of a network, and run nothing that they show.

apt-get install chromium chromium-driver; pip install selenium
"""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from report_runs import HOSTILE, evaluation, training_run
from test_report import records_of

from plumbing.report import make_report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
Service = pytest.importorskip("selenium.webdriver.chrome.service").Service
ActionChains = webdriver.ActionChains
names = ("Home", "End", "Escape", "Left", "Right")
KEYS = {name: getattr(webdriver.Keys, name.upper()) for name in names}
PROGRAMS = [shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")]
pytestmark = pytest.mark.skipif(not all(PROGRAMS), reason="no chromium with its chromedriver")
KINDS = ("training", "evaluation", "comparison", "hostile training", "hostile evaluation", "old")
WAIT = 20.0  # seconds, at most


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAMS[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(PROGRAMS[1], log_output=subprocess.DEVNULL))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def pages(tiny_folder, tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Reports by kind, each beside the files that it was made of."""
    place = tmp_path_factory.mktemp("pages")
    given = {"tokenizer_folder": tiny_folder, "tokenizer": tokenizer}
    run = training_run(place / "run", steps=70, **given)
    sides = [evaluation(place / side, chance=side, samples=5, **given) for side in "ab"]
    old = training_run(place / "old", place / "gone", steps=3)
    return {
        "training": make_report([run]),
        "evaluation": make_report(sides[:1]),
        "comparison": make_report(sides),
        "hostile training": make_report([training_run(place / "hostile", text=HOSTILE, **given)]),
        "hostile evaluation": make_report([evaluation(place / "<img src=x>", text=HOSTILE, **given)]),
        "old": make_report([old]),
    }


class Page:
    """A report in the browser, with short words for what a reader does."""

    def __init__(self, browser, file: Path, width: int = 1280, height: int = 900):
        self.browser, self.file = browser, file
        before = browser.current_window_handle
        browser.switch_to.new_window("tab")  # which has no memory of what was chosen on another page
        mine = browser.current_window_handle
        browser.switch_to.window(before)
        browser.close()
        browser.switch_to.window(mine)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get_log("browser"), browser.get_log("performance")  # of the page before
        browser.get(file.as_uri())

    def __call__(self, script: str, *arguments):
        """The value of a JavaScript expression."""
        return self.browser.execute_script(f"return {script}", *arguments)

    def until(self, script: str, *arguments):
        """Wait until an expression is true."""
        deadline = time.monotonic() + WAIT
        while not (found := self(script, *arguments)):
            assert time.monotonic() < deadline, script
            time.sleep(0.02)
        return found

    def texts(self, selector: str) -> list[str]:
        """What stands in the elements of a selector."""
        return self("[...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def count(self, selector: str) -> int:
        return self("document.querySelectorAll(arguments[0]).length", selector)

    def open(self, key: str) -> None:
        """Open a trajectory."""
        self("document.querySelector(`[data-key='${arguments[0]}']`).click()", key)
        self.until(
            "viewer.open && current === arguments[0] && document.getElementById('stream') !== null", key
        )

    def press(self, *keys: str) -> None:
        """Press keys as a person does, at what has the focus."""
        for key in keys:
            ActionChains(self.browser).send_keys(KEYS.get(key, key)).perform()

    def masked(self) -> list[int]:
        """Positions that are masked now."""
        return self("[...document.querySelectorAll('#stream .t.m')].map((e) => Number(e.dataset.i))")

    def assert_quiet(self) -> None:
        """Nothing was said on the console, and nothing was asked of a network."""
        assert self.browser.get_log("browser") == []
        events = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        assert [url for url in asked if not url.startswith("data:")] == [self.file.as_uri()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_opens_quietly_and_fits(browser, pages, kind, width):
    page = Page(browser, pages[kind], width)
    assert page("document.title") and page.count("h2") >= 1 and page.count("#rows tbody tr") > 0
    page("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page("document.documentElement.scrollWidth") <= width
    assert page("document.querySelector('#rows').closest('.scroll').scrollWidth") <= width, "nor its table"
    key = page("document.querySelector('[data-key]').dataset.key")
    page.open(key)
    assert page("document.documentElement.scrollWidth") <= width
    assert page("viewer.scrollWidth <= viewer.clientWidth")
    page.assert_quiet()


@pytest.mark.parametrize("kind", ["hostile training", "hostile evaluation"])
def test_hostile_text_is_shown_and_runs_nothing(browser, pages, kind):
    page = Page(browser, pages[kind])
    keys = page("[...document.querySelectorAll('[data-key]')].map((e) => e.dataset.key)")
    for key in keys[:4]:
        page.open(key)
        (asked,) = page.texts("#viewer .asked")
        shown = HOSTILE
        for code in (0x202E, 0x2066, 0x200F, 0x2028, 0, 0x1B, 0xFEFF, 0xE0041):
            shown = shown.replace(chr(code), f"\\u{{{code:x}}}")
        assert shown in asked, "all of it, with its hidden characters as numbers"
    assert page("typeof window.hacked") == "undefined"
    assert (
        page.count("main img, main iframe, main style, main script, dialog img, dialog style, [onload]") == 0
    )
    assert page("getComputedStyle(document.body).display") != "none"
    page.assert_quiet()


def test_an_element_that_gets_in_anyway_runs_nothing(browser, pages):
    """The policy of the page is a second wall: as if some text had become HTML."""
    page = Page(browser, pages["training"])
    page("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked=1\">')")
    page("document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked=2'}))")
    page.until("document.images.length === 1 && document.images[0].complete")
    assert page("typeof window.hacked") == "undefined"
    messages = " ".join(entry["message"] for entry in browser.get_log("browser"))
    assert "Content Security Policy" in messages


# ------------------------------------------------------------------------------- the viewer


def test_slider_and_keys_replay_the_steps(browser, pages):
    """After n steps exactly the tokens of later steps are masked: from the record, not from the page."""
    page = Page(browser, pages["training"])
    records = records_of(pages["training"].parent / "rollouts.jsonl")
    number = max(range(len(records)), key=lambda i: len(set(records[i]["steps"])))
    page("document.getElementById('search').value = arguments[0]", records[number]["question"])
    page("document.getElementById('search').dispatchEvent(new Event('input'))")
    page.open(f"r-{number + 1}")
    steps = records[number]["steps"]
    order = sorted(set(steps))

    def later(n: int) -> list[int]:
        return [i for i, step in enumerate(steps) if step not in order[:n]]

    assert page.masked() == later(len(order)) == []
    page.press("Home")
    assert page.masked() == later(0) == list(range(len(steps)))
    for n in (1, 2, 3):
        page.press("Right")
        assert page.masked() == later(n)
        now = page("[...document.querySelectorAll('#stream .now')].map((e) => Number(e.dataset.i))")
        assert now == [i for i, step in enumerate(steps) if step == order[n - 1]]
    page.press("Left")
    assert page.masked() == later(2)
    assert page.texts("#viewer output")[0].startswith(f"step 2 of {len(order)}: block ")
    page.press("End")
    assert page.masked() == []
    for n in (4, 1, len(order) - 1):
        page("(document.getElementById('step').value = arguments[0])", n)
        page("document.getElementById('step').dispatchEvent(new Event('input'))")
        assert page.masked() == later(n)
    page.press("Home", " ")
    page.until("document.querySelectorAll('#stream .m').length === 0")
    page.assert_quiet()


def test_hover_and_tap_say_how_sure_it_was(browser, pages):
    """Of every position: probability, step, and the holds before, which the test counts by itself."""
    page = Page(browser, pages["training"])
    records = records_of(pages["training"].parent / "rollouts.jsonl")

    def holds(record: dict) -> int:
        """Of all tokens together, if the prompt ends inside a block."""
        return len(record.get("hold_bounds", [])) if record["prompt_tokens"] % 4 else 0

    number = max(range(len(records) - 50, len(records)), key=lambda i: holds(records[i]))
    record = records[number]
    page.open(f"r-{number + 1}")
    steps, order, next_hold = record["steps"], sorted(set(record["steps"])), 0
    kinds, event = set(), "new PointerEvent('pointerover', {bubbles: true})"
    for i, step in enumerate(steps):
        block = (record["prompt_tokens"] + i) // 4
        of_block = {s for j, s in enumerate(steps) if (record["prompt_tokens"] + j) // 4 == block}
        earlier = sorted(s for s in of_block if s < step)
        page(f"document.querySelector(`[data-i='${{arguments[0]}}']`).dispatchEvent({event})", i)
        said = page.texts("#inspect")[0]
        assert f"revealed at step {order.index(step) + 1}," in said
        probability = math.exp(record["logprobs"][i])
        if 0.001 <= probability < 0.9999:
            found = re.search(r"probability at the reveal ([\d.]+?)(?=[A-Z]|$)", said)
            assert float(found[1]) == pytest.approx(probability, abs=2e-4)
        assert ("never held" in said) == (not earlier)
        for hold in earlier:
            bound, mass = (math.exp(record[name][next_hold]) for name in ("hold_bounds", "hold_logprobs"))
            place = order.index(hold) + 1
            found = re.search(rf"Held at step {place}: .*? below ([\d.]+), .*? probability ([\d.]+)", said)
            assert [float(found[1]), float(found[2])] == pytest.approx([bound, mass], abs=2e-4)
            next_hold += 1
        kinds.add(len(earlier))
    assert kinds >= {0, 1, 2} and next_hold == len(record["hold_bounds"])

    # A tap stays when the pointer goes on, until the next one.
    page("document.querySelector('[data-i=\"0\"]').click()")
    first = page.texts("#inspect")
    page(f"document.querySelector('[data-i=\"3\"]').dispatchEvent({event})")
    assert page.texts("#inspect") == first
    page("document.querySelector('[data-i=\"0\"]').click()")
    assert page.texts("#inspect") != first


def test_the_tokens_are_the_text(browser, pages, tokenizer):
    page = Page(browser, pages["training"])
    records = records_of(pages["training"].parent / "rollouts.jsonl")
    for number in (len(records), len(records) - 1):
        page.open(f"r-{number}")
        own = "[...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join('')"
        shown = page(f"[...document.querySelectorAll('#stream .t')].map((e) => {own}).join('')")
        assert shown == tokenizer.decode(records[number - 1]["response_ids"])


def test_next_previous_close_and_the_address(browser, pages):
    page = Page(browser, pages["training"])
    keys = page("[...document.querySelectorAll('#rows [data-key]')].map((e) => e.dataset.key)")
    questions = page.texts("#rows .question")
    asked = "document.querySelector('#viewer .asked').textContent === arguments[0]"
    page.open(keys[1])
    page.press("j")
    page.until(asked, questions[2])
    assert page("location.hash") == f"#{keys[2]}"
    page.press("k")
    page.until(asked, questions[1])
    page.press("Home", "Right")
    before = page.masked()
    page("location.reload()")
    page.until(f"document.querySelector('#viewer .asked') && {asked}", questions[1])
    assert page.masked() == before != []
    page.press("Escape")
    page.until("!viewer.open && location.hash === ''")


def test_an_old_run_has_its_text_and_its_steps(browser, pages):
    page = Page(browser, pages["old"])
    page.open("r-1")
    (record, *_) = records_of(pages["old"].parent / "rollouts.jsonl")
    assert record["text"] in page.texts("#stream")[0]
    page.press("Home", "Right")
    first = min(record["steps"])
    assert page.masked() == [i for i, step in enumerate(record["steps"]) if step != first]


# ---------------------------------------------------------------------- tables, curves, looks


def test_filters_and_search_of_rollouts(browser, pages):
    page = Page(browser, pages["training"])
    records = records_of(pages["training"].parent / "rollouts.jsonl")
    wanted = {
        "right": [r for r in records if r["correct"]],
        "wrong": [r for r in records if not r["correct"]],
        "truncated": [r for r in records if r["finish_reason"] == "length"],
        "all": records,
    }
    for name, of_name in wanted.items():
        page("document.querySelector(`button[value='${arguments[0]}']`).click()", name)
        assert page.texts(f"button[value='{name}']") == [f"{name} {len(of_name)}"]
        while page.count(".more button"):
            page("document.querySelector('.more button').click()")
        shown = page.texts("#rows .question")
        assert sorted(shown) == sorted(r["question"].strip() + " " for r in of_name)
    page("(document.getElementById('search').value = '421?')")
    page("document.getElementById('search').dispatchEvent(new Event('input'))")
    assert page.texts("#rows .question") == ["421? "]
    page("document.getElementById('search').value = ''")
    page("document.getElementById('search').dispatchEvent(new Event('input'))")
    page(
        "[...document.querySelectorAll('th button')].find((b) => b.textContent.startsWith('tokens')).click()"
    )
    tokens = [int(text) for text in page.texts("#rows td[data-name=tokens]")]
    assert tokens == sorted((r["num_tokens"] for r in records), reverse=True)[: len(tokens)]


def test_filters_of_an_evaluation(browser, pages):
    page = Page(browser, pages["evaluation"])
    records = records_of(pages["evaluation"].parent / "responses-test-dynamic.jsonl")
    page("document.querySelector('button[value=\"1\"]').click()")
    questions = [[r for r in records if r["index"] == q] for q in range(9)]

    def majority_wrong(group: list[dict]) -> bool:
        answers = [r["answer"] for r in group if r["finish_reason"] != "length"]
        votes = [answers.count(answer) for answer in answers]
        return not votes or answers[votes.index(max(votes))] != "7"

    wanted = {
        "all": questions,
        "right": [g for g in questions if all(r["correct"] for r in g)],
        "wrong": [g for g in questions if not all(r["correct"] for r in g)],
        "truncated": [g for g in questions if any(r["finish_reason"] == "length" for r in g)],
        "majority wrong": [g for g in questions if majority_wrong(g)],
    }
    assert 0 < len(wanted["majority wrong"]) < 9
    for name, groups in wanted.items():
        page("document.querySelector(`button[value='${arguments[0]}']`).click()", name)
        assert page.texts("#rows div.question") == [g[0]["question"] for g in groups]
        assert page.texts("#rows .chip") == [r["answer"] for g in groups for r in g]
    assert page.count(".charts rect") > 0
    page.assert_quiet()


def test_two_runs_show_where_they_differ(browser, pages):
    page = Page(browser, pages["comparison"])
    place = pages["comparison"].parent.parent
    sides = [records_of(place / side / "responses-test-static.jsonl") for side in "ab"]
    right = [[sum(r["correct"] for r in of if r["index"] == q) for q in range(9)] for of in sides]
    for name, better in (("A is better", 0), ("B is better", 1)):
        page("document.querySelector(`button[value='${arguments[0]}']`).click()", name)
        wanted = {sides[0][5 * q]["question"] for q in range(9) if right[better][q] > right[1 - better][q]}
        assert set(page.texts("#rows div.question")) == wanted != set()


def test_values_at_the_cursor(browser, pages):
    """Every curve shows its value at the step under the pointer, and the marks there."""
    page = Page(browser, pages["training"])
    metrics = records_of(pages["training"].parent / "metrics.jsonl")
    page("document.querySelector('.chart svg').scrollIntoView({block: 'center'})")
    box = page("document.querySelector('.chart svg').getBoundingClientRect().toJSON()")
    step = 30  # 44 and 8 of 360 are margins; 70 steps between them
    x = box["x"] + box["width"] * (44 + (step - 1) / 69 * (360 - 52)) / 360
    move = {"type": "mouseMoved", "x": round(x), "y": round(box["y"] + 50)}
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", move)
    page.until("document.getElementById('now').textContent.startsWith('step 30')")
    reward = float(page.texts(".chart .keys b")[0])
    assert reward == pytest.approx(metrics[step - 1]["reward"], rel=5e-3)
    page("moveCursor(2)")
    assert page.texts("#now") == ["step 3: loss is nan "]
    page("moveCursor(6)")
    assert page.texts("#now") == ["step 7: 6 of 8 useful groups after max_rounds=3"]
    assert (
        page.count(".chart path.mark-skipped")
        == page.count(".chart")
        == page.count(".chart path.mark-resume")
    )


def test_a_missing_value_breaks_the_line(browser, pages):
    """The loss of step 3 is null: its line begins anew at step 4."""
    page = Page(browser, pages["training"])
    title = "[...document.querySelectorAll('.chart')].find((c) => c.textContent.startsWith('Loss'))"
    path = page(f"{title}.querySelector('.raw').getAttribute('d')")
    assert path.count("M") == 2 and path.split("M")[1].count("L") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(browser, pages, scheme):
    page = Page(browser, pages["training"])
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def is_dark() -> bool:
        color = page("getComputedStyle(document.body).backgroundColor")
        return int(color.split("(")[1].split(",")[0]) < 128

    try:
        assert is_dark() == (scheme == "dark")
        seen = []
        for _ in range(3):  # light, dark, and as the system again
            page("document.getElementById('theme').click()")
            seen.append((page.texts("#theme")[0].split()[1], is_dark()))
        assert seen == [("light", False), ("dark", True), ("auto", scheme == "dark")]
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_running_page_reloads_itself_and_keeps_the_place(browser, tiny_folder, tmp_path):
    folder = training_run(tmp_path / "run", tiny_folder, steps=70)
    make_report([folder], running=True)
    page = Page(browser, folder / "report.html")
    page("document.querySelector('button[value=wrong]').click()")
    page("document.querySelector('details').open = true")
    page("window.scrollTo(0, 700)")
    page("(window.mine = true)")
    lines = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(lines + '{"step": 71, "reward": 3}\n')
    make_report([folder], running=True)
    page("(() => { const now = Date.now; Date.now = () => now() + 60000; })()")
    page.until("!window.mine && document.readyState === 'complete'")
    assert "running, step 71 of 70" in page.texts(".lead")[0]
    assert abs(page("window.scrollY") - 700) <= 2
    assert page("document.querySelector('details').open")
    assert page("document.querySelector('button[value=wrong]').getAttribute('aria-pressed')") == "true"


def test_a_finished_page_stays(browser, pages):
    page = Page(browser, pages["training"])
    page("(window.mine = true)")
    page("(() => { const now = Date.now; Date.now = () => now() + 10 ** 9; })()")
    time.sleep(2.5)  # a page that reloads looks every second
    assert page("window.mine")


def test_the_picture_of_the_readme(pages, tmp_path):
    """docs/screenshot.py: curves above, below them a trajectory on its way."""
    root, picture = Path(__file__).resolve().parents[1], tmp_path / "report.png"
    command = [sys.executable, root / "docs/screenshot.py", pages["training"].parent, picture]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(picture) as image:
        assert image.width == 1180 and image.height > 500 and len(image.convert("RGB").getcolors(10**6)) > 50
