"""The notebooks in JupyterLab and Chromium, from a copied folder: one runs from top to end, keys move every slider.

Keys also answer a blind test, in a notebook that is written for it.
To save time, one kernel serves all of them, cleared in between, and of the others only those cells are run that the
slider needs.  What it shows is compared with the figure stored below it, so a cell too few is noticed.
"""

import csv
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import symtable
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2] / "notebooks"
spec = importlib.util.spec_from_file_location("notebooks_conftest", ROOT / "conftest.py")
strict = importlib.util.module_from_spec(spec)
spec.loader.exec_module(strict)

NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason=f"no browser: none of {', '.join(NAMES)} on PATH, and CHROMIUM is not set"),
]
MOST_SECONDS = 300  # of waiting for a notebook's cells

SETTINGS = {  # all cells are in the page, also those out of sight; no pop-up asks about news
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
CLOSE = "[...jupyterapp.shell.widgets('main')].forEach(widget => widget.dispose())"
KERNEL = "jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel"
FORGET = (  # also what a notebook sets for the whole process
    "import ipywidgets, torch; ipywidgets.Widget.close_all(); torch.set_grad_enabled(True); "
    "get_ipython().run_line_magic('reset', '-f')"
)
NOTEBOOK = "jupyterapp.shell.currentWidget.content"
CODE = f"{NOTEBOOK}.widgets.filter(cell => cell.model.type === 'code')"


def code(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def slider_cell(path):
    """Which of the code cells makes a slider; None if none does."""
    return next((number for number, cell in enumerate(code(path)) if re.search(r"\bexplore\(", cell.source)), None)


def names(source):
    """(bound, read): the globals that a cell binds, and those that it or its functions read from other cells."""
    tables, read = [symtable.symtable(source, "cell", "exec")], set()
    bound = {s.get_name() for s in tables[0].get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    for table in tables:
        tables += table.get_children()
        symbols = [s for s in table.get_symbols() if s.is_referenced() and (table is tables[0] or s.is_global())]
        read |= {s.get_name() for s in symbols}
    return bound, read - bound


def needed(path):
    """The code cells that the slider needs: its own, those that bind what it reads, what these read, and so on."""
    last = slider_cell(path)
    needed, missing = [last], names(code(path)[last].source)[1]
    for number, cell in reversed(list(enumerate(code(path)[:last]))):
        bound, read = names(cell.source)
        if bound & missing:
            needed.insert(0, number)
            missing = missing - bound | read
    return needed


FIRST, *OTHERS = [path for path in sorted(ROOT.glob("*.ipynb")) if slider_cell(path) is not None]


class Lab:
    """A JupyterLab server in a folder of its own, with a copy of the notebooks and nobody's settings."""

    def __init__(self, folder):
        self.folder, self.kernel = folder / "notebooks", None
        shutil.copytree(ROOT, self.folder)
        for name, values in SETTINGS.items():
            path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(values))
        places = ("JUPYTERLAB_SETTINGS", "JUPYTERLAB_WORKSPACES", "JUPYTER_CONFIG", "JUPYTER_DATA", "JUPYTER_RUNTIME")
        environment = {f"{place}_DIR": str(folder / place.split("_")[1].lower()) for place in places}
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "server.log"
        self.server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
             f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={self.folder}",
             "--IdentityProvider.token=test", "--LabApp.expose_app_in_browser=True"],
            env=os.environ | environment | {"IPYTHONDIR": str(folder / "ipython")},
            stdout=self.log.open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    def ask(self, path, content=None):
        """The server's answer to GET, or to POST if there is content."""
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"{self.url}/api/{path}", data)
        request.add_header("Authorization", "token test")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def wait(self):
        end = time.monotonic() + 60
        while True:
            try:
                return self.ask("status")
            except OSError:
                assert self.server.poll() is None and time.monotonic() < end, self.log.read_text()
                time.sleep(0.2)

    def open(self, page, path):
        """Open a notebook in place of the last one; the first one's kernel, cleared, serves all that follow."""
        if self.kernel:
            self.ask("sessions", {"path": path.name, "name": "", "type": "notebook", "kernel": {"id": self.kernel}})
        page.evaluate(CLOSE)
        execute(page, "docmanager:open", path=path.name)
        ready = f"{CODE}.length === {len(code(path))} && {NOTEBOOK}.widgets.every(cell => cell.isAttached)"
        page.wait_for_function(f"{KERNEL}?.status === 'idle' && {ready}", timeout=60_000)
        if self.kernel:
            page.evaluate(f"code => {KERNEL}.requestExecute({{code}}).done", FORGET)
        self.kernel = page.evaluate(f"{KERNEL}.id")
        execute(page, "notebook:clear-all-cell-outputs")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    try:
        lab.wait()
        yield lab
    finally:
        lab.server.terminate()  # and with it its kernels
        lab.server.wait(60)


@pytest.fixture(scope="module")
def window(request):
    """JupyterLab in a browser window of a laptop's size, and the errors it has reported."""
    reason = "needs playwright: pip install -e '.[test,browser]'; it uses the browser of this machine"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    lab = request.getfixturevalue("lab")  # only now: a server nobody visits need not start
    with playwright.sync_playwright() as engines:
        options = ["--disable-gpu", "--disable-quic", "--disable-sync"]
        browser = engines.chromium.launch(executable_path=CHROMIUM, args=options)
        page, errors = browser.new_page(viewport={"width": 1280, "height": 800}), []

        def note(line):
            url = line.location["url"]  # JupyterLab asks for a Markdown cell's picture at its root, then at its place
            if line.type == "error" and not (lab.folder / url.removeprefix(f"{lab.url}/")).is_file():
                errors.append(f"{line.text} {url}")

        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", note)
        page.goto(f"{lab.url}/lab?token=test&reset")
        page.wait_for_function("window.jupyterapp?.restored.then(() => true)", timeout=60_000)
        yield page, errors
        browser.close()


@pytest.fixture
def page(window):
    """The page; a test must leave no error in it."""
    page, errors = window
    yield page
    seen = errors.copy()
    errors.clear()
    assert not seen


def execute(page, command, **options):
    """Start one of JupyterLab's commands; it may end later."""
    page.evaluate("([command, options]) => { jupyterapp.commands.execute(command, options) }", [command, options])


def select(page, number):
    """Make one of the code cells the active one."""
    page.evaluate(f"{NOTEBOOK}.activeCellIndex = {NOTEBOOK}.widgets.indexOf({CODE}[{number}])")


def wait(page, numbers):
    """Wait until these code cells have run; none may end in an error, after which those behind it never run."""
    done = "({model}) => model.executionCount !== null && model.executionState !== 'running'"
    failed = "({model}) => model.outputs.toJSON().some(output => output.output_type === 'error')"
    ready = f"{CODE}.some({failed}) || {numbers}.map(number => {CODE}[number]).every({done})"
    page.wait_for_function(ready, timeout=1000 * MOST_SECONDS, polling=500)  # ms; each frame would slow it down
    outputs = page.evaluate(f"{CODE}.flatMap(cell => cell.model.outputs.toJSON())")
    assert not [output for output in outputs if output["output_type"] == "error"]


def move(page, path):
    """Reach the slider by Tab, move it by keys, and look at its picture and description after every move."""
    slider, panel = page.locator(".rfsr-slider"), page.locator(".rfsr-panel")
    picture, handle, readout = panel.locator("img"), slider.get_by_role("slider"), slider.locator(".widget-readout")
    seen = {}

    def look():
        picture.wait_for()  # to be seen; there must be one
        picture.evaluate("picture => picture.decode()")  # fails if it is none
        alt = picture.get_attribute("alt")
        assert len(alt) >= 40 and panel.locator("[aria-live]").inner_text() == alt
        seen[readout.inner_text()] = alt, picture.get_attribute("src")
        return alt

    def press(key):
        """Whether the key moves the slider; then the picture has followed."""
        before, alt = readout.inner_text(), look()
        page.keyboard.press(key)
        if readout.inner_text() == before:
            return False
        page.wait_for_function("alt => document.querySelector('.rfsr-panel img').alt !== alt", arg=alt)
        look()
        return True

    select(page, slider_cell(path))
    page.evaluate(f"{NOTEBOOK}.activeCell.node.focus()")
    for _ in range(5):
        page.keyboard.press("Tab")
        if handle.evaluate("handle => handle === document.activeElement"):
            break
    assert handle.evaluate("handle => handle === document.activeElement"), "Tab does not reach the slider"

    press("Home")
    assert not press("ArrowLeft") and press("ArrowRight") and press("End") and not press("ArrowRight")
    assert len(set(seen.values())) == len(seen) >= 3, "positions look alike"

    still = code(path)[slider_cell(path) + 1]  # a figure at one position, which every reader sees
    if "show(*" in still.source:
        (stored,) = (output.data["text/plain"] for output in still.outputs if "data" in output)
        position = re.search(r"slider\.value = (.+)", still.source)[1].strip('"')
        while readout.inner_text() != position:
            assert press("ArrowLeft"), f"no position {position}"
        assert strict.agree(stored, look())


def test_the_first_notebook_runs_whole_and_its_slider_moves(page, lab):
    lab.open(page, FIRST)
    cells = nbformat.read(FIRST, as_version=4).cells
    execute(page, "notebook:run-all-cells")
    wait(page, list(range(len(code(FIRST)))))
    titles = re.findall(r"^#+ ", "\n".join(cell.source for cell in cells if cell.cell_type == "markdown"), re.M)
    assert page.locator(".jp-MarkdownOutput").locator("h1, h2, h3, h4").count() == len(titles)
    pictures = page.locator(".jp-MarkdownOutput img, .jp-OutputArea-output img")
    stored = sum(str(cell.get("outputs", "")).count("<img ") for cell in cells)
    assert pictures.count() == stored + 2  # the picture that opens the course, and the slider's
    assert all(pictures.evaluate_all("all => all.map(one => one.complete && one.naturalWidth > 0 && one.alt > '')"))
    move(page, FIRST)


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_keys_move_the_slider(path, page, lab):
    lab.open(page, path)
    for number in needed(path):
        select(page, number)
        execute(page, "notebook:run-cell")
    wait(page, needed(path))
    move(page, path)


BLIND = """
import torch
from rfsr_ext.notebook import blind
scenes = [(None, {"dark": torch.full((3, 8, 8), k / 9), "light": torch.full((3, 8, 8), k / 9 + 0.2)}) for k in range(3)]
blind(scenes, "answers.csv")
"""


def test_keys_answer_a_blind_test_that_goes_on_after_a_restart(page, lab):
    path = lab.folder / "blind.ipynb"
    notebook = nbformat.read(FIRST, as_version=4)  # for its kernel's name
    notebook.cells = [nbformat.v4.new_code_cell(BLIND.strip())]
    nbformat.write(notebook, path)
    answers, box = lab.folder / "answers.csv", page.locator(".rfsr-blind")

    def focused():
        return page.evaluate("document.activeElement.closest('.rfsr-blind') && document.activeElement.innerText")

    def start():
        select(page, 0)
        execute(page, "notebook:run-cell")
        wait(page, [0])
        box.get_by_role("button").first.wait_for()
        page.evaluate(f"{NOTEBOOK}.activeCell.node.focus()")
        for _ in range(5):
            page.keyboard.press("Tab")
            if focused() == "left":
                break
        assert focused() == "left", "Tab does not reach the button"

    def answer(key, says):
        """What the key chose; then the next pair is shown and the button still has the focus."""
        outline = page.evaluate("getComputedStyle(document.activeElement).outline")
        assert "solid" in outline and "3px" in outline, "the focus is to be seen"
        page.keyboard.press(key)
        page.wait_for_function("says => document.querySelector('.rfsr-blind [aria-live]').innerText === says", arg=says)
        with answers.open(newline="") as file:
            return list(csv.DictReader(file))[-1]

    lab.open(page, path)
    start()
    picture = box.locator("img").get_attribute("src")
    assert box.locator("[aria-live]").inner_text() == "1 of 3: Which is better?"
    row = answer("Enter", "2 of 3: Which is better?")
    assert row["chosen"] == row["left"] and {row["left"], row["right"]} == {"dark", "light"}
    assert box.locator("img").get_attribute("src") != picture and focused() == "left"

    lab.open(page, path)  # with everything forgotten but the file
    start()
    assert box.locator("[aria-live]").inner_text() == "2 of 3: Which is better?"
    page.keyboard.press("Tab")
    assert focused() == "right"
    row = answer("Space", "3 of 3: Which is better?")
    assert row["chosen"] == row["right"]
    answer("Space", "all 3 pairs are answered, thank you")
    assert box.locator("img").count() == 0 and box.locator("button:enabled").count() == 0
    assert sorted(line.split(",")[2] for line in answers.read_text().splitlines()[1:]) == ["0", "1", "2"]
