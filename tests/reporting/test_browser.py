"""The page in a real browser: nothing on the console, the heatmap switches, answers the pointer and the keyboard, both themes."""

import shutil

import pytest

import moe2dense as m2d
from moe2dense.common.numbers import show_number
from moe2dense.reporting.html import save_report
from moe2dense.reporting.report_file import read_report

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def open_page(made_up_report, tmp_path_factory):
    """(layers, experts, width, height, dark) -> a browser that shows the report. Skipped only where there is no browser."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium with chromedriver on PATH")
    webdriver = pytest.importorskip("selenium.webdriver")
    browsers = []

    def start(layers=4, experts=8, width=1280, height=900, dark=False, page=None):
        folder = tmp_path_factory.mktemp("report")
        page = page or save_report(made_up_report(layers, experts), folder)
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                     "--disable-dev-shm-usage", f"--window-size={width},{height}", f"--user-data-dir={folder / 'profile'}"):  # fmt: skip
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        browsers.append(browser)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}  # no smooth scrolling under the pointer
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme, still]})
        if width < 500:
            metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(page.as_uri())
        return browser

    yield start
    for browser in browsers:
        browser.quit()


def find(browser, selector):
    return browser.find_element("css selector", selector)


def at_cell(browser, row, column, rows, columns):
    """Move the pointer to the middle of a cell of the heatmap."""
    from selenium.webdriver import ActionChains

    chart = find(browser, "#map")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", chart)
    size = chart.size
    x = (column + 0.5) / columns * size["width"] - size["width"] / 2
    y = (row + 0.5) / rows * size["height"] - size["height"] / 2
    return ActionChains(browser).move_to_element_with_offset(chart, round(x), round(y))


def classes(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('#map rect')].map(r => r.getAttribute('class'))"
    )


def test_heatmap_switches_hovers_opens_and_nothing_complains(open_page):
    from selenium.webdriver import Keys
    from selenium.webdriver.support.ui import Select

    browser = open_page()
    cover = classes(browser)
    assert len(cover) == 32 and "u" in cover and len(set(cover)) > 4
    fill = browser.execute_script("return getComputedStyle(document.querySelector('#map rect:not(.u)')).fill")
    assert fill.startswith(("rgb", "oklab", "color"))

    Select(find(browser, "#metric")).select_by_value("error_after")
    assert classes(browser) != cover and "squared distance" in find(browser, "#meaning").text
    assert find(browser, "#experts").get_attribute("data-ramp") == "low"
    find(browser, "#matrix summary").click()
    table = find(browser, "#matrix table")
    assert (
        "Block error, after training" in find(browser, "#matrix").text
        and len(table.find_elements("css selector", "tbody tr")) == 4
    )

    at_cell(browser, 2, 3, 4, 8).perform()
    hover = find(browser, "#hover")
    assert hover.is_displayed() and hover.text.startswith("Layer 2 · expert 3")
    at_cell(browser, 2, 3, 4, 8).click().perform()
    panel = find(browser, "#expert")
    for text in (
        "Layer 2 · expert 3",
        "Block error on its tokens",
        "Its tokens by domain",
        "Its neurons in the student",
        "answers most strongly",
    ):
        assert text in panel.text, text
    assert browser.execute_script("return location.hash") == "#L2E3"

    find(browser, "#map").send_keys(Keys.ARROW_RIGHT)
    assert "Layer 2 · expert 4" in panel.text
    find(browser, "#expert .close").click()
    assert not panel.is_displayed()
    link = find(browser, ".ranked a")
    browser.execute_script("arguments[0].click()", link)
    layer, expert = link.text.replace("layer ", "").split(" · ")
    assert f"Layer {layer} · expert {expert}" in panel.text

    assert complaints(browser) == []
    requests = [e["message"] for e in browser.get_log("performance") if '"Network.requestWillBeSent"' in e["message"]]
    assert all(
        "http://" not in m.split('"url":"')[1][:8] and "https://" not in m.split('"url":"')[1][:9] for m in requests
    )


def complaints(browser):
    return [e["message"] for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]


def test_the_report_of_a_real_run(open_page, tiny, tmp_path):
    from selenium.webdriver.support.ui import Select

    settings = "[data]\neval_blocks = 16\n[build]\nmin_tokens = 4096\n[train]\nbatch = 1024\neval_every = 4\n"
    (tmp_path / "quick.toml").write_text(settings + '[evaluate]\nallow_loss = ["children"]\n')
    run = m2d.convert(
        str(tiny), to="3.2m", init="select+refit", tokens=12_288, out=tmp_path / "out", config=tmp_path / "quick.toml"
    )
    report = read_report(run.out)
    browser = open_page(page=run.report)
    cells = classes(browser)
    assert len(cells) == 32 and len(set(cells)) > 3
    Select(find(browser, "#metric")).select_by_value("kl_after")
    assert classes(browser) != cells
    at_cell(browser, 1, 5, 4, 8).perform()
    assert find(browser, "#hover").text.startswith("Layer 1 · expert 5")
    at_cell(browser, 1, 5, 4, 8).click().perform()
    tokens = report["transfer"]["layers"][1]["tokens"][5]
    panel = find(browser, "#expert").text
    assert f"{tokens:,} held-out tokens" in panel and "answers most strongly" in panel
    shown = find(browser, "#quality").text
    assert "without children" in shown and show_number(report["rows"]["student"]["kl"]["value"]) in shown
    texts = find(browser, "#samples").text
    assert all(r["student"].split()[0] in texts for r in report["samples"]["rows"] if r["student"].split())
    assert report["run"]["hashes"]["model.safetensors"] in find(browser, "#run").text
    light = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    find(browser, "#theme").click()
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != light
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert complaints(browser) == []


@pytest.mark.parametrize("dark", [False, True])
def test_both_themes_are_readable_and_switch(open_page, dark):
    browser = open_page(dark=dark)

    def luminance(prop, selector="body"):
        rgb = browser.execute_script(
            "const c = document.createElement('canvas').getContext('2d');"
            "c.fillStyle = getComputedStyle(document.querySelector(arguments[1]))[arguments[0]]; c.fillRect(0, 0, 1, 1);"
            "return [...c.getImageData(0, 0, 1, 1).data]", prop, selector)  # fmt: skip
        linear = [(v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4) for v in rgb[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(selector):
        a, b = sorted((luminance("color", selector), luminance("backgroundColor")))
        return (b + 0.05) / (a + 0.05)

    for _ in range(2):
        assert (luminance("backgroundColor") < 0.2) == dark
        for selector in ("body", ".lede", ".muted", "a[href='#quality']", "thead th"):
            assert contrast(selector) >= 4.5, (selector, dark)
        find(browser, "#theme").click()
        dark = not dark


def test_a_phone_needs_no_sideways_scrolling(open_page):
    browser = open_page(48, 64, width=390, height=844)
    assert browser.execute_script("return innerWidth") == 390
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    assert find(browser, "#map").size["width"] >= 64 * 6  # cells stay large enough; the map scrolls in its own box
    smallest = browser.execute_script(
        "return Math.min(...[...document.querySelectorAll('main p, main td, main .yt, main .xt')]"
        ".filter(e => e.offsetParent).map(e => parseFloat(getComputedStyle(e).fontSize)))")  # fmt: skip
    assert smallest >= 11


def test_a_large_report_is_ready_quickly(open_page):
    browser = open_page(48, 128)
    assert len(classes(browser)) == 48 * 128
    ready = browser.execute_script("const t = performance.timing; return t.loadEventEnd - t.navigationStart")
    assert ready < 10_000
    at_cell(browser, 40, 100, 48, 128).click().perform()
    assert "Layer 40 · expert 100" in find(browser, "#expert").text
