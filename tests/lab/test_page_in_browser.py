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


def test_it_renders_without_an_error_and_loads_nothing(browser: Any, page: Path) -> None:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = [
        m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"
    ]
    outside = [url for url in requested if url.startswith(("http", "ws"))]
    assert page.as_uri() in requested
    assert not outside
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert script(browser, "document.querySelectorAll('.plot .main-svg').length") >= 2
    assert script(browser, "document.querySelectorAll('#curves0 .scatterlayer .trace').length") == 8


def test_it_tells_the_numbers_under_the_mouse(browser: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    assert script(browser, "document.querySelectorAll('#curves0 .hoverlayer .hovertext').length") == 0
    plot = browser.find_element(By.CSS_SELECTOR, "#curves0 .nsewdrag")
    ActionChains(browser).move_to_element(plot).move_by_offset(3, 3).perform()
    told = WebDriverWait(browser, 5).until(
        lambda b: script(b, "document.querySelector('#curves0 .hoverlayer')?.textContent")
    )
    assert "qn" in told


def test_the_filter_leaves_what_it_names(browser: Any) -> None:
    from selenium.webdriver.common.by import By

    def shown() -> set[str]:
        code = (
            "[...document.querySelectorAll('tr[data-filter]')].filter(r => !r.hidden).map(r => r.innerText)"
        )
        return {name for name in ("dqn", "pqn") if any(name in row for row in script(browser, code))}

    def traces() -> int:
        return script(browser, "document.querySelectorAll('#curves0 .scatterlayer .trace').length")

    assert shown() == {"dqn", "pqn"}
    search = browser.find_element(By.ID, "search")
    search.send_keys("pqn")
    assert shown() == {"pqn"}
    assert traces() == 4
    search.clear()
    search.send_keys(" ")
    assert shown() == {"dqn", "pqn"}
    browser.find_element(By.ID, "single").click()
    assert traces() == 4  # a band and a mean each


def test_what_started_from_what_is_drawn(browser: Any) -> None:
    assert script(browser, "document.querySelectorAll('svg rect[rx]').length") == 3
    assert script(browser, "document.querySelectorAll('svg path[stroke=\"#bbb\"]').length") == 2
