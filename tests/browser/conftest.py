"""Chromium without a window, and a server with two runs of this program in it."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow import MlflowClient

from tests.conftest import Electra
from tests.pipeline.mlflow_server import Server

EXPERIMENT = "laid_side_by_side"
DIFFERING = ("optimizer.lr=1e-3", "model.generator_width=1")
"""How the second run differs from the first."""


def missing_parts() -> list[str]:
    """What of Chromium, its driver and selenium is not installed."""
    missing = [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
    try:
        import selenium  # noqa: F401
    except ImportError:
        missing.append("selenium")
    return missing


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser, with what its pages print to the console."""
    if missing := missing_parts():
        reason = f"not installed: {', '.join(missing)} (Debian: apt install chromium chromium-driver; pip: selenium)"
        pytest.fail(reason) if os.environ.get("ELECTRA_REQUIRE_ALL") == "1" else pytest.skip(reason)
    from selenium import webdriver
    from selenium.common.exceptions import SessionNotCreatedException
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1500,1200"):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    except SessionNotCreatedException:  # as may be where the machine is busy
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def screenshot(chromium: Any, tmp_path: Path) -> Callable[[str], None]:
    """Keeps a picture of the page, in $ELECTRA_SCREENSHOTS where it is set."""
    folder = Path(os.environ.get("ELECTRA_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return lambda name: chromium.save_screenshot(str(folder / f"{name}.png"))


class Served(NamedTuple):
    """A server's address, the experiment's id, and ids of runs by name."""

    uri: str
    experiment_id: str
    runs: dict[str, str]


@pytest.fixture(scope="module")
def served(
    chromium: Any, shared_config: Path, electra: Electra, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Two runs, tokenized and pretrained, that were shipped to a server."""
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    try:
        uri = server.uri
        tracking = [f"tracking.uri={uri}", f"tracking.experiment={EXPERIMENT}", "train.steps=12"]
        electra("run", shared_config, "run.name=seen_base", *tracking)
        electra("run", shared_config, "run.name=seen_wide", *tracking, *DIFFERING)
        client = MlflowClient(uri)
        experiment = client.get_experiment_by_name(EXPERIMENT)
        assert experiment
        found = client.search_runs([experiment.experiment_id])
        yield Served(uri, experiment.experiment_id, {str(run.info.run_name): run.info.run_id for run in found})
    finally:
        chromium.get("about:blank")  # which lets go of its connections
        server.kill()
