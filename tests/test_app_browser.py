"""The page in a real Chromium, as people use it: the extra `app`, and Debian's `apt-get install chromium`."""

import io
import os
import shutil
import zipfile
from contextlib import ExitStack

import pytest
from PIL import Image

gradio = pytest.importorskip("gradio", reason="the page's browser tests need gradio: pip install -e '.[test,app]'")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("the page's browser tests need a browser: apt-get install chromium", allow_module_level=True)

from playwright.sync_api import expect, sync_playwright  # noqa: E402

from peft_icm import ICMGenerator, bundled_generator  # noqa: E402
from peft_icm.app.page import MAX_FILE_SIZE, serving_at  # noqa: E402
from peft_icm.app.serving import Service  # noqa: E402

pytestmark = pytest.mark.slow
PATIENCE = 120_000  # ms: a machine may be busy
SIDES = ".icm .sides"
FOREIGN = "knitting patterns for beginners"


@pytest.fixture(scope="module")
def addresses():
    services = {name: Service(ICMGenerator.from_pretrained(bundled_generator(name))) for name in ("text", "detection")}
    before = os.environ.get("GRADIO_TEMP_DIR")
    with ExitStack() as stack:
        yield {name: stack.enter_context(serving_at(service)) for name, service in services.items()}
    assert not os.path.exists(os.environ["GRADIO_TEMP_DIR"])
    os.environ.pop("GRADIO_TEMP_DIR") if before is None else os.environ.update(GRADIO_TEMP_DIR=before)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, addresses):
    """Opens the page of a generator for one more user; nothing may be asked of another machine."""
    asked, contexts = [], []

    def visit(task):
        contexts.append(browser.new_context(viewport={"width": 390, "height": 844}))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(addresses[task])
        page.get_by_role("button", name="Generate").wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not [url for url in asked if not url.startswith((*addresses.values(), "data:", "blob:"))]


def ask(page, sentence):
    page.get_by_label("What the adapter is for").fill(sentence)
    page.get_by_role("button", name="Generate").click()


def answered(page):
    page.locator(SIDES).wait_for()
    return page.locator(SIDES).inner_text()


def refused(page):
    toast = page.get_by_test_id("toast-body").first
    toast.wait_for()
    return toast.inner_text()


def test_a_sentence(visit):
    page = visit("text")
    ask(page, "continue a Shakespeare play")
    shown = answered(page)
    assert "Base: " in shown and "Adapted: " in shown and "nats a token" in shown
    expect(page.get_by_role("status").filter(has_text="known")).to_contain_text("shakespeare")
    page.get_by_role("button", name="Pack the adapter as a zip").click()
    with page.expect_download() as download:
        page.locator("a[download]").first.click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert "adapter/adapter_model.safetensors" in archive.namelist()
        assert b"/bundled/" not in archive.read("adapter/adapter_config.json")


def test_a_picture(visit, tmp_path):
    Image.new("RGB", (200, 100), (200, 30, 40)).save(tmp_path / "red.png")
    page = visit("detection")
    page.locator("input[type=file]").last.set_input_files(tmp_path / "red.png")
    page.get_by_text("red.png").or_(page.get_by_text("red")).first.wait_for()
    ask(page, "detect sofas")
    answered(page)
    pictures = page.locator(f"{SIDES} svg")
    expect(pictures).to_have_count(2)
    assert pictures.first.get_attribute("viewBox") == "0 0 200 100"
    assert pictures.first.get_attribute("aria-label").startswith("base found: ")


def test_an_unknown_request(visit):
    page = visit("text")
    ask(page, FOREIGN)
    answered(page)
    expect(page.get_by_role("status").filter(has_text="unknown")).to_be_visible()
    page.get_by_role("button", name="Strength, seed, unknown requests").click()
    page.get_by_label("raise: refuse").check()
    ask(page, FOREIGN)
    assert "is none of this generator's tasks" in refused(page)
    expect(page.locator(SIDES)).to_have_count(0)


def bomb():
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no picture at all", "is no picture that can be opened"), (bomb(), "is too large a picture"), (bytes(11 * 2**20), MAX_FILE_SIZE)],
    ids=["text", "bomb", "11 MB"],
)
def test_a_bad_file(visit, addresses, tmp_path, content, message):
    (tmp_path / "bad.png").write_bytes(content)
    page = visit("detection")
    page.locator("input[type=file]").last.set_input_files(tmp_path / "bad.png")
    if message == MAX_FILE_SIZE:
        said = page.get_by_text("maximum", exact=False).first
        said.wait_for()
        said = said.inner_text()
        assert "10" in said
    else:
        page.get_by_text("bad").first.wait_for()
        ask(page, "detect sofas")
        said = refused(page)
        assert message in said and "bad.png" in said
    assert "/tmp" not in said and os.environ["GRADIO_TEMP_DIR"] not in said
    expect(page.locator(SIDES)).to_have_count(0)


def test_nothing_is_asked_for(visit):
    page = visit("text")
    ask(page, " ")
    assert "Say what the adapter is for" in refused(page)


def test_two_users_at_once(visit):
    sentences = {"shakespeare": "continue a Shakespeare play", "bible": "model the King James Bible"}
    pages = {task: visit("text") for task in sentences}
    for task, page in pages.items():
        ask(page, sentences[task])
    shown = {task: answered(page) for task, page in pages.items()}
    for task, page in pages.items():
        expect(page.get_by_role("status").filter(has_text="known")).to_contain_text(task)
    alone = visit("text")
    ask(alone, sentences["bible"])
    assert answered(alone) == shown["bible"] != shown["shakespeare"]


def test_without_a_mouse_and_without_a_trace_of_the_token(visit):
    page = visit("text")
    page.get_by_label("What the adapter is for").focus()
    page.keyboard.press("Enter")
    answered(page)
    for _ in range(40):  # Tab reaches the push
        if page.evaluate("document.activeElement.innerText || ''").startswith("Push it to the Hub"):
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.get_by_label("Repo, such as").fill("me/demo")
    page.get_by_label("Access token").fill("hf_wrong_token")
    page.get_by_role("button", name="Push", exact=True).press("Enter")
    assert "401" in refused(page)
    kept = "[JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.cookie].join()"
    assert "hf_wrong" not in page.evaluate(kept)
    assert page.get_by_label("Access token").input_value() == ""


def test_every_control_has_a_name(visit):
    page = visit("detection")
    nameless = """[...document.querySelectorAll('input, textarea, button, select')].filter(one => one.checkVisibility() &&
        !(one.labels?.length || one.getAttribute('aria-label') || one.getAttribute('aria-labelledby') || one.innerText.trim() || one.title))
        .map(one => one.outerHTML.slice(0, 200))"""
    assert page.evaluate(nameless) == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
