"""`make book`: it builds without a warning, which a link into nowhere would be, and a browser shows it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.notebooks.test_browser import CHROMIUM

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


def test_every_notebook_guide_and_room_has_a_page(book):
    for source in [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/reference/*.md")]:
        assert (book / source.relative_to(ROOT).with_suffix(".html")).is_file(), source.name
    reference = (book / "docs/reference/ops.html").read_text()
    assert "haar_ll_l1_loss" in reference and "input_range" in reference


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium or Chrome on PATH, and CHROMIUM is not set")
def test_a_browser_shows_front_page_chapter_and_reference(book):
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((book / "docs/index.html").as_uri(), wait_until="domcontentloaded")
        assert page.locator("h1").first.inner_text().startswith("rfsr_ext")
        page.locator("article a", has_text="the first notebook").click()
        page.wait_for_load_state("domcontentloaded")
        assert page.locator("article img").count() > 0 and page.locator("article pre").count() > 5
        page.goto((book / "docs/reference/losses.html").as_uri(), wait_until="domcontentloaded")
        assert page.locator("dt#rfsr_ext\\.losses\\.HaarLLLoss, dt[id$='HaarLLLoss']").count() == 1
        browser.close()
    assert not errors
