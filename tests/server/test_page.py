"""The page in a real Chromium, at a desk and on a phone: it streams, stops, asks for a key, and is quiet."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import Server, serve

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}; the variable CHROMIUM names one"
)

QUIET = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
FLAGS = ["--no-sandbox", "--disable-gpu", *QUIET.split(), "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
SIZES = {"desk": (1280, 900), "phone": (390, 844)}
KEY = "open-sesame"
A, B = "rgb(91, 143, 217)", "rgb(224, 138, 60)"  # the colours of the first two prompts
COLOURS = """() => {
  const canvas = document.getElementById("fusion"), copy = new OffscreenCanvas(canvas.width, canvas.height);
  const pen = copy.getContext("2d", { willReadFrequently: true });
  pen.drawImage(canvas, 0, 0);
  const data = pen.getImageData(0, 0, canvas.width, canvas.height).data;
  const seen = {};
  for (let i = 0; i < data.length; i += 4) {
    const name = `rgb(${data[i]}, ${data[i + 1]}, ${data[i + 2]})`;
    seen[name] = (seen[name] ?? 0) + 1;
  }
  return seen;
}"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("--max-num-seqs", "8", key=KEY, env={"FLOVER_API_KEY": KEY}) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api.expect.set_options(timeout=15_000)
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, server: Server, size: str = "desk", key: str = KEY, **options: Any) -> Iterator[Any]:
    """A page of its own; what it says on the console and where it connects to is checked when it is closed."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, has_touch=size == "phone", **options)
    if key:
        context.add_init_script(f"sessionStorage.setItem('flover-key', '{key}')")
    page = context.new_page()
    page.set_default_timeout(15_000)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    yield page
    context.close()
    refused = "status of 401" if not key else "status of 400"  # the browser's own line for an answer that is no 200
    assert [line for line in said if refused not in line] == []
    assert [url for url in asked if not url.startswith((f"{server.url}/", "data:"))] == []


def ready(page: Any) -> None:
    api.expect(page.locator("#state")).to_have_text("ready")


def set_up(page: Any, prompts: list[str], **parameters: Any) -> None:
    """So many prompts, and parameters by their labels."""
    ready(page)
    while page.locator(".card").count() > len(prompts):
        page.get_by_role("button", name=re.compile("^Remove")).last.click()
    while page.locator(".card").count() < len(prompts):
        page.get_by_role("button", name="Add a prompt").click()
    for i, prompt in enumerate(prompts):
        page.locator(".card > textarea").nth(i).fill(prompt)
    if not page.locator("#parameters").evaluate("it => it.open"):
        page.get_by_text("Parameters").click()
    for label, value in parameters.items():
        page.get_by_label(label.replace("_", " ")).fill(str(value))


def statuses(page: Any) -> list[str]:
    return [str(text) for text in page.locator(".card .status").all_text_contents()]


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("size", "scheme"), [("desk", "light"), ("phone", "dark")])
def test_one_send_runs_all_prompts_and_the_batch_is_seen(browser: Any, server: Server, size: str, scheme: str) -> None:
    prompts = ["In the beginning", "And Moses said", "The king of"]
    wanted = server.http.post(
        "/v1/completions", json={"prompt": prompts, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    ).json()
    with opened(browser, server, size, color_scheme=scheme) as page:
        set_up(page, prompts, Max_tokens=40, Temperature=0)
        page.get_by_label("Ignore end of text").check()
        page.get_by_role("button", name="Send all").click()
        until(lambda: all(text.startswith("length: 40 tokens in") for text in statuses(page)))
        for i, choice in enumerate(wanted["choices"]):
            assert page.locator(".answers").nth(i).inner_text().strip() == choice["text"].strip()
        until(lambda: {A, B} <= set(page.evaluate(COLOURS)))
        page.locator(".badge").first.click()
        until(lambda: B not in page.evaluate(COLOURS))  # paled
        assert A in page.evaluate(COLOURS)
        page.locator(".badge").first.click()
        until(lambda: B in page.evaluate(COLOURS))
        steps = int(page.locator("#t-rate").inner_text())
        assert steps > 0
        assert re.fullmatch(r"[\d.]+ · [\d.]+", page.locator("#t-ttft").inner_text())
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(246, 247, 249)" if scheme == "light" else "rgb(18, 21, 26)"
        )


def test_text_comes_as_it_is_made_and_stop_frees_the_row(browser: Any, server: Server) -> None:
    with opened(browser, server) as page:
        set_up(page, ["In the beginning", "Hear, O Israel"], Max_tokens=900)
        page.get_by_label("Ignore end of text").check()
        aborted = server.metric("request_aborted_total")
        page.get_by_role("button", name="Send all").click()
        answer = page.locator(".answers").first
        until(lambda: len(answer.inner_text()) > 20)
        before = answer.inner_text()
        until(lambda: len(answer.inner_text()) > len(before) + 20)
        assert answer.inner_text().startswith(before[:20])
        page.get_by_role("button", name="Stop A", exact=True).click()
        until(lambda: server.metric("request_aborted_total") == aborted + 1)
        until(lambda: server.metric("num_requests_running") == 1)
        assert re.fullmatch(r"stopped after \d+ tokens", statuses(page)[0])
        page.keyboard.press("Escape")
        until(lambda: server.metric("num_requests_live") == 0)
        assert statuses(page)[1].startswith("stopped after")
        assert server.metric("request_aborted_total") == aborted + 2


def test_all_of_it_works_by_keyboard(browser: Any, server: Server) -> None:
    def tab_to(selector: str) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"Tab does not reach {selector}")

    with opened(browser, server) as page:
        ready(page)
        tab_to("input[name=mode]")
        page.keyboard.press("ArrowLeft")
        assert page.locator("input[value=chat]").is_checked()
        tab_to(".card > textarea")
        page.keyboard.press("Control+a")
        page.keyboard.type("Who was Aaron?")
        tab_to("input[name=max_tokens]")
        page.keyboard.press("Control+a")
        page.keyboard.type("30")
        page.keyboard.press("Control+Enter")
        until(lambda: all(re.match(r"(length|stop): \d+ tokens", text) for text in statuses(page)))
        page.locator("body").press("Home")
        page.evaluate("document.activeElement.blur()")
        tab_to("#fusion")
        page.keyboard.press("ArrowLeft")  # to the newest step, in which the last has left
        page.keyboard.press("ArrowLeft")
        api.expect(page.locator("#probe")).to_have_text(re.compile(r"Step \d+, row 0: [A-D], (decode|prefill)"))
        assert page.locator("#pause").get_attribute("aria-pressed") == "true"
        page.keyboard.press("ArrowDown")
        api.expect(page.locator("#probe")).to_have_text(re.compile(r"Step \d+, row 1"))
        page.keyboard.press("Escape")
        assert page.locator("#pause").get_attribute("aria-pressed") == "false"
        tab_to("#who summary")
        page.keyboard.press("Enter")
        api.expect(page.locator("#who-rows")).to_have_text("Nothing runs.")
        unnamed = "[...document.querySelectorAll('button, input, select, textarea')].filter((n) => !n.labels?.length"
        assert page.evaluate(f"{unnamed} && !n.textContent.trim() && !n.ariaLabel).length") == 0


def test_a_key_is_asked_for_checked_and_kept_in_the_tab(browser: Any, server: Server) -> None:
    with opened(browser, server, "phone", key="") as page:
        field = page.get_by_label("Key", exact=True)
        api.expect(field).to_be_focused()
        field.fill("wrong")
        field.press("Enter")
        api.expect(page.locator("#key-error")).to_have_text("The server does not accept this key.")
        field.fill(KEY)
        field.press("Enter")
        ready(page)
        assert not page.locator("#key-dialog").is_visible()
        page.reload()
        ready(page)
        assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
        page.get_by_role("button", name="API key").click()
        page.get_by_role("button", name="Forget").click()
        api.expect(field).to_be_focused()  # asked for at once
        page.get_by_role("button", name="Cancel").click()
        api.expect(page.locator("#state")).to_have_text("needs a key")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_copied_command_works(browser: Any, server: Server) -> None:
    with opened(browser, server, permissions=["clipboard-read", "clipboard-write"]) as page:
        set_up(page, ['It\'s "$HOME" \\ and\n`more`'], Max_tokens=3)
        page.get_by_role("button", name="Copy as curl A").click()
        api.expect(page.locator(".status")).to_have_text("copied")
        command = page.evaluate("navigator.clipboard.readText()")
    assert KEY not in command
    environment = {**os.environ, "FLOVER_API_KEY": KEY, "no_proxy": "127.0.0.1"}
    result = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=20)
    assert result.stdout.rstrip().endswith("data: [DONE]"), result.stderr


def test_what_the_server_refuses_is_said_in_its_words(browser: Any, server: Server) -> None:
    with opened(browser, server) as page:
        set_up(page, ["In the beginning"], Max_tokens=100_000)
        page.get_by_role("button", name="Send all").click()
        api.expect(page.locator(".status.error")).to_contain_text("max_tokens=100000")
        page.get_by_label("Max tokens").fill("0")
        page.get_by_role("button", name="Send all").click()
        assert page.evaluate("document.activeElement.name") == "max_tokens"  # not sent: the browser says why


def test_the_theme_is_kept_and_calm_is_calm(browser: Any, server: Server) -> None:
    with opened(browser, server, reduced_motion="reduce", color_scheme="light") as page:
        page.get_by_role("button", name="Dark colours").click()
        page.reload()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        set_up(page, ["In the beginning"], Max_tokens=200)
        page.get_by_role("button", name="Send all").click()
        page.locator(".running").wait_for()
        assert page.evaluate("document.getAnimations().length") == 0
        until(lambda: len(page.locator(".answers").inner_text()) > 30)  # some steps have run
        page.get_by_role("button", name="Stop all").click()
        until(lambda: A in page.evaluate(COLOURS))  # drawn all the same


@pytest.mark.slow  # a server of its own
def test_a_server_that_is_gone_is_noticed(browser: Any) -> None:
    with serve() as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        set_up(page, ["In the beginning"], Max_tokens=900)
        page.get_by_label("Ignore end of text").check()
        page.get_by_role("button", name="Send all").click()
        until(lambda: len(page.locator(".answers").inner_text()) > 30)
        server.process.kill()
        api.expect(page.locator("#state")).to_have_text("no answer")
        api.expect(page.locator(".status.error")).to_have_text("the connection was cut")
        context.close()
