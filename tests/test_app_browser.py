"""The page in a real Chromium, as people use it: the extra `app`, and Debian's `apt-get install chromium`."""

import io
import os
import shutil
import zipfile
from contextlib import ExitStack

import pytest
import task_worlds
from PIL import Image

gradio = pytest.importorskip("gradio", reason="the page's browser tests need gradio: pip install -e '.[test,app]'")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("the page's browser tests need a browser: apt-get install chromium", allow_module_level=True)

from axe_playwright_python.sync_playwright import Axe  # noqa: E402
from playwright.sync_api import expect, sync_playwright  # noqa: E402

from peft_icm import ICMGenerator, bundled_generator  # noqa: E402
from peft_icm.app import serving  # noqa: E402
from peft_icm.app.page import MAX_FILE_SIZE, serving_at  # noqa: E402
from peft_icm.app.serving import Service  # noqa: E402

pytestmark = pytest.mark.slow
PATIENCE = 120_000  # ms: a machine may be busy
SIDES = ".icm .sides"
FOREIGN = "knitting patterns for beginners"


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    """Of the bundled generators, and of one that reads examples of a task and no sentence."""
    folder = tmp_path_factory.mktemp("llama")
    trainer = task_worlds.trainer(task_worlds.text_world(folder), folder / "work")
    trainer.train()
    services = {"examples": Service(trainer.generator, str(folder))}
    # The one that pictures are uploaded to is the last: gradio has one folder of uploads in a process.
    services |= {name: Service(ICMGenerator.from_pretrained(bundled_generator(name))) for name in ("text", "detection")}
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

    def visit(task, wide=390, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": wide, "height": 844}, color_scheme=scheme))
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
    expect(page.locator(".told p").filter(has_text="known")).to_contain_text("shakespeare")
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
    expect(page.locator(".told p").filter(has_text="unknown")).to_be_visible()
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


def test_examples_in_the_place_of_a_sentence(visit):
    page = visit("examples")
    assert faults(page) == []
    expect(page.get_by_label("What the adapter is for", exact=True)).to_have_count(0)
    page.get_by_role("button", name="Generate").click()
    assert "or show it" in refused(page)
    page.get_by_label("Examples of the task").fill("Shall I compare thee to a summer's day?\nThou art more lovely.")
    page.get_by_role("button", name="Generate").click()
    assert "Adapted: " in answered(page)
    expect(page.locator(".told p").first).to_contain_text("Taken as it is")


def test_a_request_that_takes_too_long_is_stopped_and_the_next_is_answered(visit, monkeypatch):
    page = visit("detection")
    monkeypatch.setattr(serving, "SECONDS", 0.0)
    ask(page, "detect sofas")
    assert "Stopped after 0 seconds" in refused(page)
    monkeypatch.undo()
    ask(page, "detect sofas")
    answered(page)


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
        expect(page.locator(".told p").filter(has_text="known")).to_contain_text(task)
    alone = visit("text")
    ask(alone, sentences["bible"])
    assert answered(alone) == shown["bible"] != shown["shakespeare"]


def tab_to(page, name):
    """Tab until what is so called has the focus; nothing on the way may hold it."""
    focused = "(one => one.getAttribute('aria-label') || one.labels?.[0]?.innerText || one.innerText || '')(document.activeElement)"
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate(focused).strip().startswith(name):
            return
    raise AssertionError(f"Tab does not reach {name!r}.")


def test_without_a_mouse_and_without_a_trace_of_the_token(visit):
    page = visit("text")
    tab_to(page, "model the King James Bible")
    page.keyboard.press("Space")
    expect(page.get_by_label("What the adapter is for")).to_have_value("model the King James Bible")
    tab_to(page, "Strength, seed")
    page.keyboard.press("Enter")
    tab_to(page, "Seed")
    page.keyboard.press("1")
    tab_to(page, "Generate")
    page.keyboard.press("Space")
    answered(page)
    expect(page.locator(".told p").filter(has_text="known")).to_contain_text("bible")
    tab_to(page, "Adapted: nats of each token")
    page.keyboard.press("Enter")
    expect(page.get_by_role("region", name="Adapted: nats of each token")).to_be_visible()
    tab_to(page, "Pack the adapter as a zip")
    page.keyboard.press("Enter")
    page.locator("a[download]").first.wait_for()
    tab_to(page, "Push it to the Hub")
    page.keyboard.press("Space")
    expect(page.get_by_label("Repo, such as")).to_be_visible()
    tab_to(page, "Repo, such as")
    page.keyboard.type("me/demo")
    tab_to(page, "Access token")
    page.keyboard.type("hf_wrong_token")
    tab_to(page, "Push")
    page.keyboard.press("Enter")
    assert "401" in refused(page)
    kept = "[JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.cookie].join()"
    assert "hf_wrong" not in page.evaluate(kept)
    assert page.get_by_label("Access token").input_value() == ""
    tab_to(page, "Close")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("toast-body")).to_have_count(0)


# What axe finds and the page cannot mend.
GRADIOS_OWN = {"nested-interactive": "the header of a message is a button, with the button that closes it inside"}


def faults(page):
    """What axe-core finds wrong, with the elements; of contrast that it cannot compute, what is ours."""
    page.wait_for_timeout(500)  # colours fade in
    found = Axe().run(page).response
    wrong = [(rule["id"], [node["html"][:200] for node in rule["nodes"]]) for rule in found["violations"]]
    unsure = [(rule["id"], node["html"][:200]) for rule in found["incomplete"] for node in rule["nodes"] if ".icm" in str(node["target"])]
    return [one for one in wrong if one[0] not in GRADIOS_OWN] + unsure


@pytest.mark.parametrize(
    ("task", "wide", "scheme"), [("text", 390, "light"), ("text", 1200, "dark"), ("detection", 1200, "light"), ("detection", 390, "dark")]
)
def test_axe_finds_nothing(visit, task, wide, scheme):
    page = visit(task, wide, scheme)
    assert faults(page) == []
    for part in ("Or show it", "Strength, seed, unknown requests"):
        page.get_by_role("button", name=part).click()
    page.get_by_role("button", name="Generate").click()
    answered(page)
    page.get_by_role("button", name="Pack the adapter as a zip").click()
    page.locator("a[download]").first.wait_for()
    page.get_by_role("button", name="Push it to the Hub").click()
    for summary in page.locator(".icm summary").all():
        summary.click()
    assert faults(page) == []
    ask(page, FOREIGN)
    expect(page.locator(".told p").filter(has_text="unknown")).to_be_visible()
    answered(page)
    assert faults(page) == []
    ask(page, " ")
    refused(page)
    assert faults(page) == []


@pytest.mark.parametrize(("task", "said"), [("text", "Adapted: "), ("detection", "adapted found: ")])
def test_a_screen_reader_is_told(visit, task, said):
    """A live region speaks of what comes into it, so it is there before; numbers of single tasks and tokens are not read out."""
    page = visit(task)
    page.evaluate("""document.querySelectorAll('.prose[aria-live=polite]').forEach(one => new MutationObserver(() => {
        const shown = one.cloneNode(true);
        shown.querySelectorAll('[aria-live=off], [aria-hidden=true]').forEach(part => part.remove());
        shown.querySelectorAll('[role=img]').forEach(part => part.textContent = part.getAttribute('aria-label'));
        window.heard = (window.heard || '') + shown.textContent;
    }).observe(one, {childList: true, subtree: true}))""")
    page.get_by_role("button", name="Generate").click()
    answered(page)
    heard = page.evaluate("window.heard")
    assert "Heard" in heard and "known" in heard and said in heard
    assert "threshold" not in heard and "Base: nats of each token" not in heard


def test_every_control_has_a_name(visit):
    page = visit("detection")
    nameless = """[...document.querySelectorAll('input, textarea, button, select')].filter(one => one.checkVisibility() &&
        !(one.labels?.length || one.getAttribute('aria-label') || one.getAttribute('aria-labelledby') || one.innerText.trim() || one.title))
        .map(one => one.outerHTML.slice(0, 200))"""
    assert page.evaluate(nameless) == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
