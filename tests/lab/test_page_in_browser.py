"""The comparison page in a real browser: it renders, answers the mouse, filters, and loads nothing."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import cli
from tests.lab.runs import make_run

METRIC = "eval/mean_reward"
DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    not (DRIVER and BROWSER), reason="needs chromium and chromedriver (Debian: chromium-driver)"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    for algorithm, gain in (("dqn", 1.0), ("pqn", 2.0)):
        for seed in range(2):
            rows = [(step, {METRIC: gain * step + seed}) for step in range(0, 60, 10)]
            config = {"seed": seed, "agent": {"algorithm": algorithm}}
            parents = [{"run_id": "abc", "stage": "sft", "sha256": "00"}] if seed else []
            make_run(folder / "runs" / f"{algorithm}{seed}", rows, config=config, parents=parents)
    assert (
        cli.main(["compare", str(folder / "runs"), "--by=agent.algorithm", "--out", str(folder / "out")]) == 0
    )
    return folder / "out" / "comparison.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, page: Path) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--window-size=1200,1000"),
        *(
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-quic",
        ),
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    driver.get(page.as_uri())
    yield driver
    driver.quit()


def script(browser: Any, code: str) -> Any:
    return browser.execute_script(f"return {code}")


def marks(browser: Any) -> int:
    """Groups whose curves are drawn."""
    return script(browser, "document.querySelectorAll('#curves0 path.mark').length")


def runs(browser: Any) -> int:
    """Runs whose curves are drawn."""
    return script(browser, "document.querySelectorAll('#curves0 path.run').length")


def test_it_renders_without_an_error_and_loads_nothing(browser: Any, page: Path) -> None:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = [
        m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"
    ]
    outside = [url for url in requested if url.startswith(("http", "ws"))]
    assert page.as_uri() in requested
    assert not outside
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert script(browser, "document.querySelectorAll('.plots svg').length") >= 2
    assert (marks(browser), runs(browser)) == (2, 4)


def test_it_tells_the_numbers_under_the_mouse(browser: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    assert script(browser, "document.getElementById('tip').hidden")
    plot = browser.find_element(By.CSS_SELECTOR, "#curves0 svg")
    ActionChains(browser).move_to_element(plot).perform()
    told = script(browser, "document.getElementById('tip').textContent")
    assert "qn" in told
    assert "agent steps" in told
    assert script(browser, "document.querySelectorAll('#curves0 .group.lit').length") == 1
    row = browser.find_element(By.CSS_SELECTOR, "tbody tr[data-group=dqn]")
    ActionChains(browser).move_to_element(row).click().perform()
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    lit = "[...document.querySelectorAll('svg .lit')].map(g => g.dataset.group)"
    assert set(script(browser, lit)) == {"dqn"}, "a click keeps it"
    row.click()
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    assert script(browser, lit) == []


def test_a_part_can_be_looked_at_and_an_axis_made_logarithmic(browser: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    def ticks() -> list[str]:
        return script(
            browser,
            "[...document.querySelectorAll('#curves0 text[text-anchor=middle]')].map(t => t.textContent)",
        )

    whole = ticks()
    plot = browser.find_element(By.CSS_SELECTOR, "#curves0 svg")
    ActionChains(browser).move_to_element(plot).click_and_hold().move_by_offset(60, 0).release().perform()
    assert ticks() != whole
    ActionChains(browser).double_click(browser.find_element(By.CSS_SELECTOR, "#curves0 svg")).perform()
    assert ticks() == whole
    browser.find_element(By.ID, "logx").click()
    assert ticks()[:2] == ["10", "100"] or "10" in ticks()
    browser.find_element(By.ID, "logx").click()
    assert ticks() == whole


def test_tables_are_sorted_by_value(browser: Any) -> None:
    from selenium.webdriver.common.by import By

    head = browser.find_element(By.XPATH, "//table//th[button[starts-with(text(), 'mean')]]")

    def column() -> list[float]:
        code = "[...document.querySelector('tbody').rows].map(r => +r.cells[2].dataset.value)"
        return script(browser, code)

    for order, reverse in (("ascending", False), ("descending", True)):
        head.find_element(By.TAG_NAME, "button").click()
        assert head.get_attribute("aria-sort") == order
        assert column() == sorted(column(), reverse=reverse)


def test_who_hears_the_page_hears_what_is_drawn(browser: Any) -> None:
    named = "s.getAttribute('role') == 'img' && s.getAttribute('aria-label')"
    assert script(browser, f"[...document.querySelectorAll('svg')].every(s => {named})")
    assert script(browser, "[...document.querySelectorAll('table')].every(t => t.caption)")
    assert script(browser, "[...document.querySelectorAll('thead th')].every(t => t.scope == 'col')")
    assert script(
        browser, "[...document.querySelectorAll('input')].every(i => i.ariaLabel || i.labels.length)"
    )


def test_the_filter_leaves_what_it_names(browser: Any) -> None:
    from selenium.webdriver.common.by import By

    def shown() -> set[str]:
        code = (
            "[...document.querySelectorAll('tr[data-filter]')].filter(r => !r.hidden).map(r => r.innerText)"
        )
        return {name for name in ("dqn", "pqn") if any(name in row for row in script(browser, code))}

    assert shown() == {"dqn", "pqn"}
    search = browser.find_element(By.ID, "search")
    search.send_keys("pqn")
    assert shown() == {"pqn"}
    assert (marks(browser), runs(browser)) == (1, 2)
    search.clear()
    search.send_keys(" ")
    assert shown() == {"dqn", "pqn"}
    browser.find_element(By.ID, "single").click()
    assert (marks(browser), runs(browser)) == (2, 0)


def test_what_started_from_what_is_drawn(browser: Any) -> None:
    assert script(browser, "document.querySelectorAll('svg rect[rx]').length") == 3
    assert script(browser, "document.querySelectorAll('svg path:not([class])').length") == 2
