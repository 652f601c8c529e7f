"""MLflow's own pages about runs that this program shipped to a server: what a person finds there."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.browser.conftest import EXPERIMENT, Served
from tests.conftest import Electra

PATIENCE_S = 60
STAGES = {"seen_base": ("seen_base tokenize", "seen_base pretrain"),
          "seen_wide": ("seen_wide tokenize", "seen_wide pretrain")}  # fmt: skip
EXPANDER = "[data-component-id$='runnamecellrenderer.tsx_46']"
"""Unfolds a run that has runs below it; MLflow gives the button no other name."""

LINKS = """return [...document.querySelectorAll(".ag-row a[href*='/runs/']")]
.sort((a, b) => a.closest(".ag-row").getAttribute("row-index") - b.closest(".ag-row").getAttribute("row-index"))"""
DRAWN = """return [...document.querySelectorAll(arguments[0] + " .js-plotly-plot")]
.map(plot => plot.data || [])
.map(traces => traces.filter(({x}) => x && x.length == 12).map(({name, x}) => [name, [...x]]))"""
Show = Callable[[str], None]


@pytest.fixture(autouse=True)
def _blank_after(chromium: Any) -> Iterator[None]:
    """The next test's address may differ behind the # only, which alone loads nothing."""
    yield
    chromium.get("about:blank")


@pytest.fixture
def show(chromium: Any, served: Served) -> Show:
    """Opens a page of the server; MLflow's assistant, which takes a third of it, is closed."""

    def show(path: str) -> None:
        chromium.get(f"{served.uri}/#/{path}")
        until(chromium, lambda: "MLflow" in chromium.title and len(text(chromium)) > 100)
        close = "[data-component-id='mlflow.assistant.chat_panel.close']"
        if chromium.find_elements("css selector", close):
            click(chromium, lambda: chromium.find_elements("css selector", close)[0])

    return show


def until(driver: Any, condition: Callable[[], Any]) -> Any:
    """Waits for something to be true; what is being drawn anew counts as not yet there."""
    from selenium.common.exceptions import JavascriptException, StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    ignored = (IndexError, StopIteration, JavascriptException, StaleElementReferenceException)
    return WebDriverWait(driver, PATIENCE_S, ignored_exceptions=ignored).until(lambda _: condition())


def click(driver: Any, find: Callable[[], Any]) -> None:
    """Clicks what ``find`` gives, by script: MLflow's pages move while they load."""

    def done() -> bool:
        driver.execute_script("arguments[0].click()", find())
        return True

    until(driver, done)


def press(driver: Any, find: Callable[[], Any]) -> None:
    """Clicks with the pointer, which menus ask for."""
    from selenium.common.exceptions import ElementClickInterceptedException, ElementNotInteractableException

    def done() -> bool:
        element = find()
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        try:
            element.click()
        except (ElementClickInterceptedException, ElementNotInteractableException):
            return False
        return True

    until(driver, done)


def text(driver: Any) -> str:
    return driver.find_element("tag name", "body").text


def rows(driver: Any) -> list[str]:
    """Names of runs in the table, from top to bottom."""
    return driver.execute_script(f"{LINKS}.map(link => link.textContent)")


def curves(driver: Any, among: str = "body") -> dict[str, list[float]]:
    """Abscissae of the curves of twelve points that are drawn, by the name of the run that begins their own."""
    found = [trace for plot in driver.execute_script(DRAWN, among) for trace in plot]
    return {" ".join(name.split()[:2]): places for name, places in found}


def listed(ids: list[str]) -> str:
    return quote(json.dumps(ids))


def test_experiments_are_listed(chromium: Any, served: Served, show: Show, screenshot: Callable[[str], None]) -> None:
    show("experiments")
    until(chromium, lambda: EXPERIMENT in text(chromium))
    screenshot("mlflow_experiments")


def test_a_run_of_the_pipeline_holds_its_stages(
    chromium: Any, served: Served, show: Show, screenshot: Callable[[str], None]
) -> None:
    show(f"experiments/{served.experiment_id}/runs")
    until(chromium, lambda: set(rows(chromium)) == set(STAGES))  # stages are folded away
    expand_all(chromium)
    screenshot("mlflow_tree")
    shown = rows(chromium)
    for parent, stages in STAGES.items():
        place = shown.index(parent)
        assert set(shown[place + 1 : place + 3]) == set(stages), shown


def expand_all(driver: Any) -> None:
    """Unfolds every run of a pipeline that is folded."""
    for parent, stages in STAGES.items():
        until(driver, lambda parent=parent: parent in rows(driver))
        if set(stages) <= set(rows(driver)):
            continue
        row = f"{LINKS}.find(link => link.textContent == '{parent}').closest('.ag-row')"

        def unfolded(row: str = row, stages: Any = stages) -> bool:
            if set(stages) <= set(rows(driver)):
                return True
            driver.execute_script(f'{row}.querySelector("{EXPANDER}").click()')
            deadline = time.monotonic() + 10
            while not set(stages) <= set(rows(driver)) and time.monotonic() < deadline:
                time.sleep(0.2)  # a second click would fold it again
            return set(stages) <= set(rows(driver))

        until(driver, unfolded)


def test_two_runs_compared_differ_in_the_two_keys(
    chromium: Any, served: Served, show: Show, screenshot: Callable[[str], None]
) -> None:
    runs = [served.runs[name] for name in STAGES]
    show(f"compare-runs?runs={listed(runs)}&experiments={listed([served.experiment_id])}")
    click(chromium, lambda: chromium.find_elements("css selector", "[aria-label='Parameters - Show diff only']")[0])
    until(chromium, lambda: "optimizer.lr" in text(chromium) and "optimizer.eps" not in text(chromium))
    screenshot("mlflow_compare")
    shown = text(chromium).partition("Show diff only")[2]
    assert "model.generator_width" in shown
    for same in ("train.steps", "objective.name", "data.sequence_length"):
        assert same not in shown


def test_curves_of_two_runs_against_steps(
    chromium: Any, served: Served, show: Show, screenshot: Callable[[str], None]
) -> None:
    runs = [served.runs[f"{name} pretrain"] for name in STAGES]
    show(
        f"metric?runs={listed(runs)}&metric={quote(json.dumps('train/total_loss'))}"
        f"&experiments={listed([served.experiment_id])}&plot_metric_keys={listed(['train/total_loss'])}"
        "&plot_layout=%7B%7D&x_axis=step"
    )
    until(chromium, lambda: set(curves(chromium)) == {f"{name} pretrain" for name in STAGES})
    assert all(places == list(range(1, 13)) for places in curves(chromium).values())
    screenshot("mlflow_metric")
    until(chromium, lambda: text(chromium).count("(step=12)") >= 2)  # each run's last value


def test_curves_of_two_runs_against_tokens(
    chromium: Any, served: Served, show: Show, screenshot: Callable[[str], None]
) -> None:
    show(f"experiments/{served.experiment_id}/runs?compareRunsMode=CHART")
    expand_all(chromium)
    press(chromium, lambda: by_test_id(chromium, "experiment-view-compare-runs-add-chart"))
    press(chromium, lambda: by_test_id(chromium, "experiment-view-compare-runs-chart-type-line"))
    click(chromium, lambda: chromium.find_elements("css selector", "[role=dialog] input[type=radio][value=metric]")[0])
    choose_metric(chromium, 1, "progress/tokens")
    choose_metric(chromium, 2, "train/total_loss")
    tokens = [8 * 32 * step for step in range(1, 13)]
    expected = {f"{name} pretrain": tokens for name in STAGES}
    try:
        until(chromium, lambda: curves(chromium, "[role=dialog]") == expected)
    finally:
        screenshot("mlflow_tokens")


def by_test_id(driver: Any, name: str) -> Any:
    return driver.find_elements("css selector", f"[data-testid='{name}']")[0]


def choose_metric(driver: Any, number: int, name: str) -> None:
    """Chooses a metric in the dialog's list of that number."""

    from selenium.webdriver.common.keys import Keys

    def box() -> Any:
        return driver.find_elements("css selector", "[role=dialog] [role=combobox]")[number]

    active = "[class*='select-item-option-active']"

    def offered() -> bool:
        return name in [option.text for option in driver.find_elements("css selector", active)]

    def typed() -> bool:
        """A page that is drawn anew meanwhile may lose some of the keys."""
        press(driver, box)
        until(driver, lambda: driver.switch_to.active_element == box())
        driver.switch_to.active_element.send_keys(Keys.CONTROL, "a", Keys.NULL, name)
        deadline = time.monotonic() + 10
        while not offered() and time.monotonic() < deadline:
            time.sleep(0.2)
        return offered()

    until(driver, typed)
    driver.switch_to.active_element.send_keys("\n")


def test_the_program_compares_what_the_server_holds(served: Served, electra: Electra) -> None:
    shown = electra(
        "compare", "seen_base", served.runs["seen_wide pretrain"], "--tracking-uri", served.uri,
        "--experiment", EXPERIMENT, "--json",
    ).stdout  # fmt: skip
    keys = {each["key"]: each["values"] for each in json.loads(shown)["differences"]}
    assert keys == {"model.generator_width": ["0.5", "1.0"], "optimizer.lr": ["0.0005", "0.001"]}
