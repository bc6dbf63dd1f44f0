"""The page in a real Chromium: seconds from opening it to the first result, what it asks of other machines, and the screenshots in docs/.

python benchmarks/page.py                  # needs the extra `app`, and Debian's chromium
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import shutil
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from peft_icm import ICMGenerator, bundled_generator
from peft_icm.app.page import serving_at
from peft_icm.app.serving import Request, Service

SENTENCES = {"text": "continue a Shakespeare play", "detection": "detect sofas"}
OPENING = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n"
WIDTHS = {"desktop": (1200, 800), "phone": (390, 844)}
RESULT = ".icm .sides"


def first_result(page: Page, address: str) -> float:
    """Seconds from opening the page to base and adapted side by side, with what stands in the form."""
    began = time.perf_counter()
    page.goto(address)
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector(RESULT, timeout=60_000)
    return time.perf_counter() - began


def memory(service: Service, requests: int = 120) -> None:
    """What the process holds after one answer and after many, in MB."""

    def held() -> float:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    service.adapt(Request(SENTENCES["text"]))
    before = held()
    for seed in range(requests):
        service.adapt(Request(SENTENCES["text"], seed=seed))
    print(f"memory: {before:.0f} MB after one answer, {held():.0f} MB after {requests} more", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parents[1] / "docs", help="folder of the screenshots")
    output = parser.parse_args().output
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for task, sentence in SENTENCES.items():
            service = Service(ICMGenerator.from_pretrained(bundled_generator(task)))
            if task == "text":
                memory(service)
            with serving_at(service) as address:
                asked: list[str] = []
                for width, (wide, high) in WIDTHS.items():
                    page = browser.new_page(viewport={"width": wide, "height": high})
                    page.on("request", lambda request, to=asked: to.append(request.url))
                    seconds = first_result(page, address)
                    load = os.getloadavg()[0]
                    print(f"{task}, {width}: first result after {seconds:.1f} s ({os.cpu_count()} cores, load {load:.1f})", flush=True)
                    page.get_by_label("What the adapter is for").fill(sentence)
                    if task == "text":
                        page.get_by_label("Text to go on from").fill(OPENING)
                    page.get_by_role("button", name="Generate").click()
                    page.wait_for_selector(RESULT, state="detached")
                    page.wait_for_selector(RESULT, timeout=60_000)
                    page.get_by_role("button", name="Pack the adapter").wait_for()
                    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
                    print(f"{task}, {width}: {overflow} px wider than the window", flush=True)
                    page.mouse.move(0, 0)
                    shot = Image.open(io.BytesIO(page.screenshot(full_page=True)))
                    shot.convert("RGB").quantize(128).save(output / f"app-{task}-{width}.png", optimize=True)
                    page.close()
                foreign = {url for url in asked if not url.startswith((address, "data:", "blob:"))}
                print(f"{task}: asked of other machines: {sorted(foreign) or 'nothing'}", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
