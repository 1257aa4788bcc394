"""The page in a browser: nothing is fetched, nothing complains, nothing runs over the edge, and it can be read in both schemes."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slora_dist.report.page import Options, report
from tests.report.made import make

pytestmark = pytest.mark.cluster  # a browser is a package of the system, as SLURM is
CHROMIUM = shutil.which("chromium")
RISING = (0.2, 0.4, 0.3, 0.6)
# what is wider than the window and no scroll box of its own holds it
TOO_WIDE = """() => [...document.querySelectorAll('main *')].filter(
    node => !node.closest('.scroll') && node.getBoundingClientRect().right > innerWidth + 1).map(node => node.outerHTML.slice(0, 80))"""
COLOURS = """() => [getComputedStyle(document.querySelector('figure svg text')).fill, getComputedStyle(document.body).color,
    getComputedStyle(document.body).backgroundColor]"""
LETTERS = """() => Math.min(...[...document.querySelectorAll('figure svg text')].filter(node => node.textContent.trim()).map(
    node => parseFloat(getComputedStyle(node).fontSize) * node.ownerSVGElement.getScreenCTM().a))"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    wanted = {
        "a": ("run.seed=0",), "b": ("run.seed=1",), "c": ("method.name=lora", "method.lowrank.rounds=4"),
        "d": ("method.sparse.density=0.01", "comm.wire.values=bfloat16"),
    }  # fmt: skip
    runs = [make(folder / name, RISING, *overrides) for name, overrides in wanted.items()]
    return report(runs, folder / "out", Options((0.3, 0.5), (1.0, 5.0, 100.0)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM:
        missing = "needs chromium (`make test-cluster` as root installs it)"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_quiet_alone_and_fits(browser: Any, page: Path, width: int, scheme: str) -> None:
    tab = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(node => node.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width and not tab.evaluate(TOO_WIDE)
    letters, ink, paper = tab.evaluate(COLOURS)
    assert letters == ink != paper
    assert tab.evaluate(LETTERS) >= 8, "pixels"
    assert not said
    assert [url for url in asked if url != page.as_uri() and not url.startswith("data:")] == []
    tab.context.close()
