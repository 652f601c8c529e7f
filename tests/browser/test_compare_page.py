"""The page of `electra compare`, opened from disk with the network off."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Electra
from tests.pipeline.test_compare import entry, write_run

PATIENCE_S = 30
HARMFUL = '<script>window.harmed = 1</script><img src=x onerror="window.harmed = 1"><b>%{x}</b>'
OTHER_KEYS = {"optimizer.lr": "0.25", "train.log_every": "3"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, corpus_path: Path, electra: Electra) -> Path:
    """Two runs that differ in two keys, one of 2,500 lines and one with a name that is markup."""
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("page")
    config_path = folder / "tiny.yaml"
    config_path.write_text(TINY.format(run_dir=folder / "out", corpus=corpus_path), encoding="utf-8")
    auc = "train/discriminator_auc"
    journals = (
        [entry(step, 20 + 2000 / step, **{auc: 0.5 + step / 10_000}) for step in range(1, 2501)],
        [entry(step, 30 + 2000 / step, **{auc: 0.6}) for step in range(1, 11)],
    )
    runs = [
        write_run(config_path, "long", journals[0]),
        write_run(config_path, "harmful", journals[1], *(f"{key}={value}" for key, value in OTHER_KEYS.items())),
    ]
    config = runs[1] / "config.yaml"  # as a run in MLflow may be called
    config.write_text(config.read_text().replace("name: harmful", f"name: {json.dumps(HARMFUL)}", 1))
    electra("compare", *runs, "--out", folder / "compared")
    return folder / "compared/compare.html"


@pytest.fixture
def opened(chromium: Any, page: Path) -> Iterator[Any]:
    """The browser with the page, drawn."""
    chromium.set_network_conditions(offline=True, latency=0, throughput=0)
    chromium.get_log("browser")
    chromium.get(page.as_uri())
    wait(chromium, lambda: len(lines(chromium)) == 2)
    yield chromium
    chromium.delete_network_conditions()
    chromium.get("about:blank")


def wait(driver: Any, condition: Callable[[], Any]) -> None:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    redrawn = [StaleElementReferenceException]
    WebDriverWait(driver, PATIENCE_S, ignored_exceptions=redrawn).until(lambda _: condition())


def lines(driver: Any) -> list[str]:
    """The drawn curves, as the paths of the picture."""
    paths = "[...document.querySelectorAll('#chart .scatterlayer path.js-line')]"
    return driver.execute_script(f"return {paths}.map(path => path.getAttribute('d'))")


def choose(driver: Any, name: str, text: str) -> None:
    """Chooses as a user does, and waits until the axis says so."""
    from selenium.webdriver.support.ui import Select

    Select(driver.find_element("name", name)).select_by_visible_text(text)
    wait(driver, lambda: axis_title(driver, "y" if name == "metric" else "x") == text)


def axis_title(driver: Any, axis: str) -> str:
    return driver.find_element("css selector", f"#chart .{axis}title").text


def test_the_page_is_whole_without_a_network(opened: Any, screenshot: Callable[[str], None]) -> None:
    screenshot("compare")
    assert [message for message in opened.get_log("browser") if message["level"] != "INFO"] == []
    requested = opened.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in requested if not name.startswith(("data:", "blob:"))] == []
    drawn = opened.execute_script("return document.getElementById('chart').data.map(trace => trace.line.color)")
    assert drawn == ["#0072B2", "#D55E00"]
    assert axis_title(opened, "x") == "FLOPs (nominal)"
    assert axis_title(opened, "y") == "train/total_loss"


def test_the_tables_name_the_two_keys(opened: Any) -> None:
    rows = opened.find_elements("css selector", "#differences tbody tr:not(.group)")
    cells = [[cell.text for cell in row.find_elements("css selector", "td")] for row in rows]
    assert cells == [["optimizer.lr", "pretrain", "0.0005", "0.25"], ["train.log_every", "–", "1", "3"]]
    numbers = opened.find_element("id", "measures").text
    assert "at 1,000 tokens, the most that all have" in numbers
    assert "220" in numbers  # 20 + 2000 / 10, of the long run at the short one's end
    assert "230" in numbers


def test_metric_axis_and_scale_change_the_curves(opened: Any, screenshot: Callable[[str], None]) -> None:
    before = lines(opened)
    choose(opened, "metric", "train/discriminator_auc")
    assert lines(opened) != before
    at_flops = opened.execute_script("return document.getElementById('chart').calcdata[1].map(p => [p.x, p.y])")
    assert at_flops == [[pytest.approx(1e6 * step), 0.6] for step in range(1, 11)]
    for title, per_step in (("tokens", 100), ("seconds of training", 0.5), ("step", 1)):
        choose(opened, "axis", title)
        places = opened.execute_script("return document.getElementById('chart').calcdata[1].map(p => p.x)")
        assert places == pytest.approx([per_step * step for step in range(1, 11)])
    before = lines(opened)
    opened.find_element("name", "log_x").click()
    wait(opened, lambda: lines(opened) != before)
    assert opened.execute_script("return document.getElementById('chart')._fullLayout.xaxis.type") == "log"
    screenshot("compare_log")


def test_thinning_is_said(opened: Any) -> None:
    caption = opened.find_element("id", "caption").text
    assert "long: 2,500 logged lines, each point the mean of up to 2 consecutive ones." in caption
    drawn = opened.execute_script("return document.getElementById('chart').calcdata.map(points => points.length)")
    assert drawn == [2000, 10]


def test_a_name_that_is_markup_is_shown_as_text(opened: Any) -> None:
    assert opened.execute_script("return window.harmed") is None
    assert opened.find_element("css selector", "#runs li:nth-child(2) strong").text == HARMFUL
    assert opened.find_elements("css selector", "#chart .legendtext")[1].text == HARMFUL
    assert opened.find_elements("css selector", "img, #runs b, thead b") == []


def test_in_the_dark_and_on_paper(opened: Any, screenshot: Callable[[str], None]) -> None:
    def ink_and_ground() -> tuple[str, str]:
        style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
        return (opened.execute_script(style, "#chart .xtitle", "fill"),
                opened.execute_script(style, "body", "background-color"))  # fmt: skip

    assert ink_and_ground() == ("rgb(28, 30, 33)", "rgb(255, 255, 255)")
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    assert ink_and_ground() == ("rgb(230, 232, 234)", "rgb(22, 24, 26)")
    screenshot("compare_dark")
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", dark | {"media": "print"})
    assert ink_and_ground() == ("rgb(0, 0, 0)", "rgb(255, 255, 255)")
    assert not opened.find_element("id", "controls").is_displayed()
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
