"""The page in a real browser: narrow and wide, light and dark, by keyboard alone. Needs Chromium on the PATH."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, sync_playwright

from live import TASKS, live, make_store
from moecl.config import Task, load_stream
from moecl.train import ContinualTrainer
from tiny_stream import write_stream

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(tmp_path_factory, tiny_folder) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page")
    stream = load_stream(write_stream(folder, tiny_folder, rows=16), ["train.epochs=1", "train.precision=fp32"])
    ContinualTrainer(stream, folder / "run").run()
    with live(folder / "run") as server:
        yield server.url


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(params=[380, 1280])
def width(request) -> int:
    return request.param


@pytest.fixture(params=["light", "dark"])
def page(request, browser, url, width) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=request.param)
    found = context.new_page()
    faults: list[str] = []
    found.on("pageerror", lambda error: faults.append(str(error)))
    found.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    found.on("request", lambda asked: asked.url.startswith(url) or faults.append(f"asks elsewhere: {asked.url}"))
    found.goto(url)
    found.wait_for_selector("#loaded:not([hidden])")
    yield found
    context.close()
    assert faults == []


def test_a_task_of_two_fields_that_writes(browser, tmp_path, tiny_folder, monkeypatch):
    both = Task(name="both", kind="generation", instruction="{title}: {text}", max_length=40)
    monkeypatch.setitem(TASKS, "both", both)
    with live(make_store(tmp_path, tiny_folder, "both")) as server, browser.new_context() as context:
        page = context.new_page()
        page.goto(server.url)
        page.fill("#field-title", "News")
        page.fill("#field-text", "a great movie")
        page.evaluate("run.tasks[0].expert = 'an older version'")
        page.click("#go")
        page.wait_for_selector("#answer .who")
        told = server.post("/v1/completions", model="both", prompt=[{"title": "News", "text": "a great movie"}]).json()
        digest = told["system_fingerprint"].rpartition("-")[2]
        assert page.inner_text("#answer .who") == f"Answered by both, version 1, expert {digest}"
        assert page.inner_text("#answer .note") == f"{told['usage']['completion_tokens']} tokens"


def test_a_task_that_reads_chats(browser, tmp_path, tiny_folder):
    with live(make_store(tmp_path, tiny_folder, "write told")) as server, browser.new_context() as context:
        server.service.library.engine.tokenizer.chat_template = "<{{ messages[-1]['content'] }}>"
        page = context.new_page()
        page.goto(server.url)
        page.fill("#field-prompt", "a great movie")
        said = []
        for path, wish in (
            ("completions", {"prompt": "a great movie"}),
            ("chat/completions", {"messages": [{"role": "user", "content": "a great movie"}]}),
        ):
            with page.expect_response(f"**/v1/{path}"):
                page.click("#go")
            page.wait_for_selector("#go:not([disabled])")
            choice = server.post(f"/v1/{path}", model="write", **wish).json()["choices"][0]
            said.append(choice.get("text") or choice["message"]["content"])
            assert page.text_content("#answer .label") == said[-1]
            page.check("#chat")
        assert said[0] != said[1]
        page.select_option("#task", "told")
        assert not page.is_visible("#chat"), "it has words of its own"


def contrast(page: Page, what: str) -> float:
    """WCAG's ratio of an element's colour to what lies behind it."""
    colours = page.eval_on_selector(
        what,
        """node => {
            const drawn = document.createElement("canvas").getContext("2d");
            const paint = (colour) => {
                drawn.fillStyle = colour;
                drawn.fillRect(0, 0, 1, 1);
                return [...drawn.getImageData(0, 0, 1, 1).data].slice(0, 3);
            };
            let behind = paint("Canvas");
            const inside = [];
            for (let one = node; one; one = one.parentElement) inside.unshift(one);
            for (const one of inside) behind = paint(getComputedStyle(one).backgroundColor);
            return [behind, paint(getComputedStyle(node).color)];
        }""",
    )

    def light(colour: list[int]) -> float:
        parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    lower, upper = sorted(map(light, colours))
    return (upper + 0.05) / (lower + 0.05)


def test_by_keyboard(page, width):
    assert page.evaluate("document.activeElement.id") == "task"
    page.keyboard.press("End")  # behind auto and task0
    assert page.input_value("#task") == "task1"
    page.keyboard.press("Tab")
    page.keyboard.type("the day food")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#answer .label")
    assert page.inner_text("#answer .label") in ("good", "bad")
    told = page.inner_text("#answer")
    assert "Answered by task1, version 1" in told
    assert "layer 0" in told
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the window"


def test_tasks_and_scores(page):
    assert [cell.inner_text() for cell in page.query_selector_all("#tasks tbody th")] == ["task0", "task1"]
    assert len(page.query_selector_all("#r tbody td")) == 6
    assert len(page.query_selector_all("#r td.learned")) == 2
    for what in ("#base", "#tasks tbody td", "#r tbody td.heat", "h2", "button"):
        assert contrast(page, what) >= 4.5, what
