"""The page itself, in gradio: what is asked for on the left, what became of it on the right, one below the other on a phone."""

from __future__ import annotations

import functools
import io
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import gradio as gr
from huggingface_hub.errors import HTTPError
from peft import PeftModel

from . import rendering, serving
from .serving import Request, Service

logger = logging.getLogger(__name__)

MAX_FILE_SIZE = "10mb"
WAITING = 20  # requests in the queue; one is computed at a time
KEPT_SECONDS = 900  # uploads, downloads and answers
SESSIONS = 32  # whose last answer is kept
OPENING = "The history of the town goes back to the thirteenth century, when "
LIVE = "told"  # what comes here is read out by a screen reader, but for what has aria-live='off'
UNKNOWN = {
    "warn: the nearest task's adapter": "warn",
    "shrink: as strong as the reading is sure": "shrink",
    "base: no adapter": "base",
    "raise: refuse": "raise",
}


def _told(run: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Errors of users as one line in the page; of others the page says nothing, and the log all."""

    @functools.wraps(run)
    def told(*inputs: Any) -> Iterator[Any]:
        try:
            yield from run(*inputs)
        except (ValueError, OSError, HTTPError) as error:
            raise gr.Error(serving.one_line(error), duration=None, print_exception=False) from None
        except Exception as error:
            logger.exception("the page")
            raise gr.Error("Something went wrong here; it was noted.", duration=None, print_exception=False) from error

    return told


def build(service: Service) -> gr.Blocks:
    """The page of a generator.

    Args:
        service ([`Service`]): The generator and its base.

    Returns:
        `gradio.Blocks`
    """

    @_told
    def answer(text: str, shown: list[str], examples: str, scene: Any, strength: float, seed: int, unknown: str) -> Iterator[Any]:
        end = time.monotonic() + serving.SECONDS
        request = Request(
            text.strip() or None,
            tuple(line.strip() for line in examples.splitlines() if line.strip()),
            tuple(serving.pictures_of(shown)),
            strength,
            seed,
            unknown,  # type: ignore[arg-type]
        )
        own = serving.pictures_of(scene) if service.detects else []
        with serving.stopped_at(end):
            reading = service.hear(request)
        heard = rendering.heard(reading, request)
        yield heard, "", None, gr.update(visible=False), gr.update(value=None, visible=False)
        with serving.stopped_at(end):  # anew: gradio goes on in another thread
            model = service.adapt(request)
            if service.detects:
                pictures = own or serving.scenes(reading)
                side = rendering.looked_at(service.look(model, pictures), len(pictures))
            else:
                writing = (end - time.monotonic()) / 3  # for each of the two; the rest is for reading what they wrote
                side = rendering.continued(*(service.go_on(one, scene, request.seed, writing) for one in (service.base, model)))
        yield heard, side, model, gr.update(visible=True), gr.skip()

    @_told
    def download(model: PeftModel | None) -> Iterator[Any]:
        with serving.zipped(_there(model)) as file:
            yield gr.update(value=str(file), visible=True)  # gradio copies it to where downloads are, and comes back

    @_told
    def push(model: PeftModel | None, repo_id: str, token: str) -> Iterator[Any]:
        yield "", "Pushing ..."
        yield "", f"Pushed: [{repo_id.strip()}]({serving.push(_there(model), repo_id, token)})"

    tasks = service.generator.config.tasks or []
    known = [task.get("description") or task["name"] for task in tasks] if service.reads else []
    one: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
    with gr.Blocks(title="peft_icm", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS)) as page:
        model = gr.State(None, time_to_live=KEPT_SECONDS)
        gr.Markdown(
            f"# A sentence in, an adapter out\n{len(tasks)} tasks, a LoRA of {service.generator.layout.numel:,} numbers for a"
            f" {type(service.base).__name__}."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                text = gr.Textbox(
                    known[0] if known else "", label="What the adapter is for", max_length=serving.MAX_SENTENCE, visible=service.reads
                )
                if known:
                    gr.Examples(known, text, label="Sentences of its tasks", examples_per_page=6)
                title = "Or show it" if service.reads else "Show what the adapter is for"
                with gr.Accordion(title, open=not service.reads, visible=bool(service.shows)):
                    label = f"Pictures of what is meant (up to {serving.MAX_PICTURES}, 10 MB each)"
                    shown = gr.File(label=label, file_count="multiple", file_types=["image"], visible="images" in service.shows)
                    label = f"Examples of the task, one a line (up to {serving.MAX_EXAMPLES})"
                    examples = gr.Textbox("", label=label, lines=3, visible="examples" in service.shows)
                scene: Any
                if service.detects:
                    label = f"Pictures to look at (up to {serving.MAX_SCENES}, 10 MB each); without any, bundled ones"
                    scene = gr.File(label=label, file_count="multiple", file_types=["image"], height=180)
                else:
                    label = f"Text to go on from (its last {serving.MAX_TEXT:,} characters are read)"
                    scene = gr.Textbox(label=label, value=OPENING, lines=4, max_lines=12)
                with gr.Accordion("Strength, seed, unknown requests", open=False):
                    strength = gr.Slider(0, 2, 1, step=0.05, label="Strength: 0 is the base, 1 the adapter as generated")
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                    unknown = gr.Radio(list(UNKNOWN.items()), value="warn", label="A request that is none of its tasks")
                go = gr.Button("Generate", variant="primary")
            with gr.Column(scale=3, min_width=300):
                heard = gr.HTML(label="What was heard", elem_classes=LIVE)
                side = gr.HTML(
                    "<div class='icm'><p>What is heard, and base and adapted model side by side, come here.</p></div>",
                    elem_classes=LIVE,
                )
                with gr.Column(visible=False) as take:
                    code: dict[str, Any] = {
                        "interactive": False,
                        "wrap_lines": True,
                        "show_line_numbers": False,
                        "lines": 3,
                        "buttons": ["copy"],
                    }
                    gr.Code(service.loading_lines(), label="Three lines that load it", **code)
                    pack = gr.Button("Pack the adapter as a zip")
                    packed = gr.File(label="The PEFT folder, zipped", interactive=False, visible=False)
                    with gr.Accordion("Push it to the Hub", open=False):
                        repo_id = gr.Textbox("", label="Repo, such as me/sofa-lora; made private where there is none", max_length=96)
                        token = gr.Textbox("", label="Access token that may write; it is not kept", type="password", max_length=200)
                        send = gr.Button("Push")
                        pushed = gr.Markdown(elem_classes=LIVE)
        page.load(js=f"() => document.querySelectorAll('.{LIVE}').forEach(one => one.ariaLive = 'polite')")
        asked = [text, shown, examples, scene, strength, seed, unknown]
        for start in (go.click, text.submit):
            start(answer, asked, [heard, side, model, take, packed], show_progress_on=side, **one)
        pack.click(download, model, packed, **one)
        send.click(push, [model, repo_id, token], [token, pushed], api_visibility="private")
    return page


def _there(model: PeftModel | None) -> PeftModel:
    if model is None:
        raise ValueError(f"There is no adapter here, or it is older than {KEPT_SECONDS // 60} minutes: generate it first.")
    return model


@contextmanager
def serving_at(service: Service, *, share: bool = False) -> Iterator[str]:
    """The page, served for as long as the context lasts; whatever is uploaded or packed lies in a temporary folder until then.

    Args:
        service ([`Service`]): The generator and its base.
        share (`bool`, defaults to `False`): Give it a public address, through gradio's servers.

    Yields:
        `str`: Its address.

    Raises:
        `OSError`: If there is to be a public address, and gradio's servers give none.
    """
    with tempfile.TemporaryDirectory(prefix="peft-icm-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        page = build(service).queue(max_size=WAITING)
        # A theme of system fonts and no run history: nothing comes from elsewhere, and no browser keeps a token.
        theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        # The white of its text stands out by 5 to 1, in gradio's own colours by 3.7.
        theme.set(button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700")
        try:
            with redirect_stdout(io.StringIO()):  # on which gradio says more than one line of a public address
                _, local, public = page.launch(
                    share=share, prevent_thread_lock=True, quiet=True, footer_links=[], run_history=False, ssr_mode=False,
                    mcp_server=False, max_file_size=MAX_FILE_SIZE, state_session_capacity=SESSIONS, theme=theme, css=rendering.CSS,
                )  # fmt: skip
            if share and public is None:
                raise OSError("Gradio's servers gave no public address: is there a network? Without --share the page is local.")
            yield public or local
        finally:
            page.close(verbose=False)


def serve(service: Service, *, share: bool = False, say: Callable[[str], None] = print) -> None:
    """Serve the page until the process is stopped.

    Args:
        service ([`Service`]): The generator and its base.
        share (`bool`, defaults to `False`): Give it a public address, through gradio's servers.
        say (`Callable[[str], None]`, defaults to `print`): Is told the address.
    """
    with serving_at(service, share=share) as address:
        say(address)
        threading.Event().wait()
