"""ComfyUI's editor in a real browser: opened, given a workflow, run and looked at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from .server import ComfyServer

if TYPE_CHECKING:  # the package may be missing
    from playwright.sync_api import Browser, ConsoleMessage, Page, Route

Variant = Literal["classic", "nodes2"]
Theme = Literal["dark", "light"]
VARIANTS: tuple[Variant, ...] = ("classic", "nodes2")
_NAMES = ("chromium", "chromium-browser", "google-chrome")
# Without a GPU, a sandbox of its own, and any talk with its maker.
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Dialogs that would cover what is tested.
_QUIET = {"Comfy.TutorialCompleted": True, "Comfy.Notification.ShowVersionUpdates": False}
# Read from ComfyUI 0.33's editor; older ones lack the manager of sidebar tabs and toasts.
_READY = "window.app?.canvas && window.app.extensionManager && window.app.vueAppReady !== false"
_NOTE_ENDS = """
    window.promptEnds = [];
    for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
        window.app.api.addEventListener(kind, (event) => window.promptEnds.push({ kind, ...event.detail }));
"""
# A button in recent editors, in older ones around it.
_RUN = "button[data-testid=queue-button], [data-testid=queue-button] button"
START_SECONDS = 60
# What the editor logs as errors with no pack at all: at its start, of files that it may lack, of other machines.
_OF_THE_EDITOR = ("ComfyApp graph accessed before", "Failed to load resource", "Content Security Policy")


def find_chromium() -> str:
    """$CHROMIUM, else the first of Debian's and Google's on the path. Raises: FileNotFoundError: a sentence for a skip."""
    chosen = os.environ.get("CHROMIUM")
    found = chosen or next(filter(None, map(shutil.which, _NAMES)), "/usr/bin/chromium")
    if not Path(found).is_file():
        raise FileNotFoundError(f"no Chromium at {found}")
    return found


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window.

    Raises: ImportError: playwright is not installed. FileNotFoundError: there is no Chromium.
    """
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_ARGUMENTS)
        yield browser
        browser.close()


class EditorPage:
    """The editor of `server`, ready for a workflow.

    `page` is Playwright's own, for whatever is looked for in it. `errors` are what its scripts and ours have thrown or
    logged as an error since.

    Args:
        variant: with the classic canvas, or with Nodes 2.0, where nodes are Vue components.
        settings: of ComfyUI's, stored before the editor is opened.
    """

    def __init__(
        self,
        browser: Browser,
        server: ComfyServer,
        variant: Variant = "classic",
        theme: Theme = "dark",
        size: tuple[int, int] = (1280, 800),
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.server, self.variant = server, variant
        self.errors: list[str] = []
        chosen = {"Comfy.VueNodes.Enabled": variant == "nodes2", "Comfy.ColorPalette": theme}
        server.post("/settings", _QUIET | chosen | (settings or {}))
        self._context = browser.new_context(viewport={"width": size[0], "height": size[1]})
        self._context.route(self._is_elsewhere, _refuse)
        self.page: Page = self._context.new_page()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._note)
        self.open()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.port}/"

    def open(self) -> None:
        """The editor anew, as after a reload."""
        self.page.goto(self.address)
        self.page.wait_for_function(_READY, timeout=START_SECONDS * 1000)
        self.page.wait_for_selector(_RUN, timeout=START_SECONDS * 1000)
        self.page.evaluate(f"() => {{ {_NOTE_ENDS} }}")

    def load_workflow(self, workflow: dict[str, Any]) -> None:
        """Opens a workflow of the editor's form."""
        self.page.evaluate("(workflow) => window.app.loadGraphData(workflow)", workflow)

    def load_prompt(self, prompt: dict[str, Any]) -> None:
        """Opens a workflow of the API's form."""
        self.page.evaluate("(prompt) => window.app.loadApiJson(prompt, 'prompt.json')", prompt)

    def queue(self) -> None:
        """Clicks Run."""
        self.page.click(_RUN)

    def wait_for_end(self, seconds: float = 180) -> dict[str, Any]:
        """Until the next prompt has ended that no call has yet told of; ComfyUI's event of it, with its `kind`."""
        self.page.wait_for_function("window.promptEnds.length > 0", timeout=seconds * 1000)
        return self.page.evaluate("window.promptEnds.shift()")

    def run(self, seconds: float = 180) -> dict[str, Any]:
        """Clicks Run and waits for the prompt's end."""
        self.queue()
        return self.wait_for_end(seconds)

    def screenshot(self, file: str | os.PathLike[str], selector: str = "") -> Path:
        """What is to be seen of the page, or of one element, as a PNG."""
        seen = self.page.locator(selector).first if selector else self.page
        seen.screenshot(path=file)
        return Path(file)

    def close(self) -> None:
        self._context.close()

    def _is_elsewhere(self, url: str) -> bool:
        address = urlsplit(url)
        return address.scheme.startswith("http") and address.netloc != f"127.0.0.1:{self.server.port}"

    def _note(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not any(known in message.text for known in _OF_THE_EDITOR):
            self.errors.append(f"{message.text} ({message.location['url']})")


def _refuse(route: Route) -> None:
    """Tests ask no other machine."""
    route.abort()


OpenEditor = Callable[..., EditorPage]
