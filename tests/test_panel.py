"""The backend panel in ComfyUI's sidebar, and the routes behind it."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfyui.editor_page import EditorPage, OpenEditor
from comfyui.server import ComfyServer
from ui_workflow import WORKFLOWS

from parallel_backend import Backend
from parallel_backend.client.ending import end
from parallel_backend.doctor import as_text
from parallel_backend.doctor.finding import Finding
from parallel_backend.rpc import runtime_dir as files
from parallel_backend.small_checkpoints.mmdit import small_config, write_mmdit

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install '.[test]'")
expect = playwright.expect
expect.set_options(timeout=30_000)
# A backend's start, and what else waits for torch to be imported.
LONG_MS = 90_000
TAB = ".parallel-mmdit-backends-tab-button"
STATUS, BACKEND, LOG = "/parallel_mmdit/status", "/parallel_mmdit/backend", "/parallel_mmdit/log"
JSON = {"Content-Type": "application/json"}
GIB = 2**30


def demo(steps: int, **mesh: Any) -> dict[str, Any]:
    prompt = json.loads((WORKFLOWS / "api" / "demo_text_to_image.json").read_text())
    for node in prompt.values():
        if node["class_type"] == "MeshConfig":
            node["inputs"] |= mesh
        if node["class_type"] == "ParallelSampler":
            node["inputs"] |= {"steps": steps, "seed": time.time_ns() % 2**32}
    return prompt


class Panel:
    """The panel of an editor, opened."""

    def __init__(self, editor: EditorPage) -> None:
        self.editor, self.page = editor, editor.page
        self.asked: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.toggle()
        self.root = self.page.locator(".pm-panel")
        expect(self.root).to_be_visible()

    def toggle(self) -> None:
        self.page.click(TAB)

    def card(self, name: str = "default") -> Any:
        return self.root.get_by_role("region", name=f"Backend {name}", exact=True)

    def press(self, name: str) -> None:
        self.root.get_by_role("button", name=name, exact=True).click(timeout=LONG_MS)

    def asked_for_status(self) -> int:
        return sum(STATUS in url for url in self.asked)

    def tells(self, status: dict[str, Any]) -> None:
        """From now on, in place of the server."""
        self.page.route(f"**{STATUS}", lambda route: route.fulfill(json=status))


@pytest.fixture(autouse=True)
def interrupted(server: ComfyServer) -> Iterator[None]:
    """No prompt of a test goes on in the next one's time."""
    yield
    server.post("/queue", {"clear": True})
    server.post("/interrupt", {})


@pytest.fixture(scope="module", autouse=True)
def alone(server: ComfyServer) -> None:
    """The panel shows no backend that other tests have left; whoever needs one again has it started."""
    for name in files.running_names():
        end(name)


@pytest.fixture
def nothing_runs(default_backend: str) -> str:
    """The name of the default backend, which is not there."""
    end(default_backend)
    return default_backend


def test_a_backend_is_started_watched_freed_and_stopped(editor: EditorPage, nothing_runs: str) -> None:
    panel = Panel(editor)
    expect(panel.root).to_contain_text("No backend runs. The first prompt starts it, or you do now: 2 ranks on cpu.")
    panel.press("Start")
    card = panel.card()
    expect(card).to_contain_text("starting", timeout=LONG_MS)
    expect(card.locator(".pm-mesh svg text", has_text="1: cpu")).to_be_visible(timeout=LONG_MS)
    expect(card).to_contain_text("idle")
    expect(card).to_contain_text("No models held")

    editor.load_prompt(demo(steps=900))
    editor.queue()
    expect(card).to_contain_text("drawing", timeout=LONG_MS)
    expect(card.locator(".pm-far")).to_contain_text("of 900")
    first = step_of(card)
    panel.page.wait_for_function(
        "(first) => Number(document.querySelector('.pm-far').textContent.split(' ')[1]) > first", arg=first
    )
    expect(card).to_contain_text("s a step")
    expect(card.get_by_role("button", name="mmdit.safetensors")).to_have_attribute("aria-pressed", "true")
    expect(card).to_contain_text("cfg=2 · float32 · 44 MiB a rank")
    expect(card.locator(".pm-mesh")).to_contain_text("cfg: cond | uncond")

    panel.press("Stop")
    question = card.get_by_role("alertdialog")
    expect(question).to_contain_text("Stop ends the job that runs (drawing, mmdit.safetensors, step ")
    panel.press("Keep it running")
    expect(question).to_be_hidden()
    expect(card.get_by_role("button", name="Stop", exact=True)).to_be_focused()
    panel.press("Stop")
    panel.press("Stop all the same")
    assert editor.wait_for_end()["kind"] == "execution_error"
    expect(panel.root).to_contain_text("No backend runs.", timeout=LONG_MS)
    expect(card).to_have_count(0)
    assert not editor.errors, editor.errors


def step_of(card: Any) -> int:
    return int(card.locator(".pm-far").inner_text().split()[1])


@pytest.fixture
def drawn(server: ComfyServer, default_backend: str) -> ComfyServer:
    """ComfyUI, whose default backend has just drawn a picture."""
    assert server.run(demo(steps=4)).error is None
    return server


def test_models_are_held_until_they_are_freed_and_the_log_follows(drawn: ComfyServer, open_editor: OpenEditor) -> None:
    panel = Panel(open_editor("nodes2", "light"))
    card = panel.card()
    expect(card).to_contain_text("Models held: 2")
    expect(card).to_contain_text("Last: mmdit.safetensors · 4 steps in ")
    expect(card).to_contain_text("% waiting for other ranks · ")
    panel.press("Show log")
    log = card.locator("pre.pm-log")
    expect(log).to_contain_text("ready: 2 ranks")
    before = log.inner_text().count("Unload")
    panel.press("Free models")
    expect(card).to_contain_text("No models held", timeout=LONG_MS)
    panel.page.wait_for_function(
        "(n) => document.querySelector('pre.pm-log').textContent.split('Unload').length > n + 1", arg=before
    )
    expect(card.get_by_role("button", name="Free models")).to_be_disabled()
    panel.press("Hide log")
    expect(log).to_be_hidden()
    assert drawn.run(demo(steps=4)).error is None


def test_a_restart_gives_other_processes_and_no_models(drawn: ComfyServer, open_editor: OpenEditor) -> None:
    panel = Panel(open_editor("classic"))
    before = files.read_record("default")
    status, told = answered(drawn, BACKEND, {"name": "default", "do": "restart as asked"})
    assert status == 400 and "Nothing else is asked of backend 'default'" in told["error"]["message"]
    panel.press("Restart")
    card = panel.card()
    expect(card).to_contain_text("restarting")
    expect(card.get_by_role("button", name="Stop", exact=True)).to_be_disabled()
    expect(card).to_contain_text("No models held", timeout=LONG_MS)
    after = files.read_record("default")
    assert before is not None and after is not None and before.agent_pid != after.agent_pid


def test_a_node_that_was_refused_opens_the_panel_which_restarts_as_asked(
    drawn: ComfyServer, open_editor: OpenEditor
) -> None:
    editor = open_editor("classic")
    other = Backend.attach("default")
    editor.load_prompt(demo(steps=2, ranks=1))
    ended = editor.run()
    assert ended["exception_type"].endswith("BackendInUseError")
    card = editor.page.get_by_role("region", name="Backend default", exact=True)
    banner = card.locator(".pm-banner")
    expect(banner).to_contain_text("it has 2 ranks, 1 is asked for")
    banner.get_by_role("button", name="Restart as asked").click()
    expect(card.get_by_role("alertdialog")).to_contain_text(f"1 other program does with it (pid {os.getpid()})")
    card.get_by_role("button", name="Restart all the same").click()
    expect(card).to_contain_text("1 rank on CPU", timeout=LONG_MS)
    expect(banner).to_be_hidden()
    other.close()
    assert editor.run()["kind"] == "execution_success"
    end("default")
    assert not editor.errors, editor.errors


def test_a_name_of_a_file_is_text(drawn: ComfyServer, open_editor: OpenEditor, tmp_path: Path) -> None:
    name = "a<b>bold<img src=x onerror=alert(1)>.safetensors"
    backend = Backend.attach("default")
    backend.load_model(write_mmdit(tmp_path / name, small_config("sd3-medium", 5)))
    panel = Panel(open_editor("classic"))
    expect(panel.card().get_by_role("button", name=name)).to_be_visible()
    assert panel.root.locator("b, img").count() == 0
    backend.unload()
    backend.close()


def test_nothing_is_asked_while_nobody_looks(server: ComfyServer, open_editor: OpenEditor) -> None:
    panel = Panel(open_editor("nodes2"))
    panel.page.wait_for_timeout(2500)
    assert panel.asked_for_status() >= 2
    panel.toggle()
    expect(panel.root).to_be_hidden()
    assert asked_within(panel, 2500) == 0
    panel.toggle()
    expect(panel.root).to_be_visible()
    assert asked_within(panel, 2500) >= 2
    see(panel, "hidden")
    assert asked_within(panel, 2500) == 0
    see(panel, "visible")
    assert asked_within(panel, 2500) >= 2


def see(panel: Panel, state: str) -> None:
    """As when the browser's window is covered, or shown again."""
    panel.page.evaluate(
        """(state) => {
            Object.defineProperty(document, "visibilityState", { get: () => state, configurable: true });
            document.dispatchEvent(new Event("visibilitychange"));
        }""",
        state,
    )


def asked_within(panel: Panel, milliseconds: int) -> int:
    """Status requests that begin in so long, but those under way already."""
    panel.page.wait_for_timeout(300)
    before = panel.asked_for_status()
    panel.page.wait_for_timeout(milliseconds)
    return panel.asked_for_status() - before


def test_one_question_at_a_time_and_fewer_while_nobody_answers(server: ComfyServer, open_editor: OpenEditor) -> None:
    panel = Panel(open_editor("classic"))
    held: list[Any] = []
    fails: list[bool] = []

    def answer(route: Any) -> None:
        held.append(route)
        if fails:
            route.abort()

    panel.page.route(f"**{STATUS}", answer)
    panel.page.wait_for_timeout(3000)
    assert len(held) == 1
    fails.append(True)
    held[0].abort()
    expect(panel.root.get_by_role("alert")).to_contain_text("ComfyUI's server does not answer")
    assert asked_within(panel, 7000) <= 2
    panel.page.unroute(f"**{STATUS}")
    panel.toggle()
    panel.toggle()
    expect(panel.root.get_by_role("alert")).to_have_count(0)


def rank(number: int, device: str = "cuda") -> dict[str, Any]:
    used = (7 + 9 * number) % 80
    return {
        "rank": number, "host": "box", "machine": "", "pid": 100 + number, "device": f"{device}:{number}",
        "device_name": "NVIDIA H100 80GB HBM3", "free_bytes": (80 - used) * GIB, "total_bytes": 80 * GIB,
        "used_bytes": used * GIB,
    }  # fmt: skip


def running(name: str, ranks: int, **more: Any) -> dict[str, Any]:
    """What status tells of a backend on so many GPUs."""
    return {
        "name": name, "phase": "running", "version": "0.1.0", "generation": "g", "uptime": 4000.0, "quiet": 5.0,
        "ranks": [rank(number) for number in range(ranks)], "models": [], "running": "", "queued": 0, "jobs_done": 0,
        "clients": ["pid 1"], "job": None, "last": None, "restarts": 0,
    } | more  # fmt: skip


def model(name: str, axes: dict[str, int], patched: int = 0) -> dict[str, Any]:
    mesh = " ".join(f"{axis}={size}" for axis, size in axes.items())
    return {
        "model": name, "name": f"{name}.safetensors", "family": "sd3.5-large", "mesh": mesh, "dtype": "bfloat16",
        "rank_bytes": 8 * GIB, "axes": axes, "patched": patched,
    }  # fmt: skip


JOB = {"kind": "Sample", "model": "sd3.5_large.safetensors", "client": "pid 1", "what": "", "done": 5, "total": 28}
JOB |= {"unit": "", "seconds": 2.1, "step_seconds": 0.41}
LOADING = JOB | {"kind": "LoadModel", "what": "loading", "done": 3.1 * GIB, "total": 8.2 * GIB, "unit": "bytes"}
LAST = {
    "kind": "Sample",
    "model": "sd3.5_large.safetensors",
    "seconds": 11.5,
    "steps": 28,
    "sent_bytes": 9**9,
    "waited": None,
}
SILENT = {
    "code": "backend_lost",
    "message": "Backend 'silent' has not answered within 1.5 s.",
    "remedy": "Wait a little.",
}
MANY = {
    "client": "pid 1",
    "default": {"name": "default", "ranks": 8, "device": "cuda"},
    "backends": [
        running("eight", 8, models=[model("wide", {"ulysses": 8}), model("deep", {"cfg": 2, "ulysses": 4}, 38)], job=JOB, last=LAST,
                queued=2, clients=["pid 1", "pid 7"]),
        running("none", 0),
        running("one", 1, job=LOADING),
        {"name": "silent", "phase": "silent", "error": SILENT},
        running("sixteen", 16, models=[model("a-model-with-a-very-long-name-that-has-no-blank-in-it-at-all", {"dp": 2, "cfg": 2, "tp": 4})]),
        {"name": "starting", "phase": "starting", "waits_for": "2 ranks are meeting"},
        running("two", 2, refusal=[{"there": "2 ranks", "asked": "1 is asked for"}]),
    ],
}  # fmt: skip


SIZE = (1280, 2600)


@pytest.fixture(scope="module")
def panel_of_many(server: ComfyServer, browser: Any) -> Iterator[Panel]:
    editor = EditorPage(browser, server, size=SIZE)
    editor.page.route(f"**{STATUS}", lambda route: route.fulfill(json=MANY))
    yield Panel(editor)
    editor.close()


@pytest.fixture
def many(panel_of_many: Panel) -> Panel:
    """One panel for all that look at many backends, each of which leaves it as it was."""
    panel_of_many.page.set_viewport_size({"width": SIZE[0], "height": SIZE[1]})
    expect(panel_of_many.card("two")).to_be_visible()
    return panel_of_many


def test_any_number_of_ranks_and_backends_fits_a_narrow_sidebar(many: Panel) -> None:
    narrow = many.page.add_style_tag(content=".pm-panel { width: 250px !important; }")
    many.page.wait_for_timeout(1500)
    for name, ranks in (("none", 0), ("one", 1), ("two", 2), ("eight", 8), ("sixteen", 16)):
        assert many.card(name).locator(".pm-mesh svg text", has_text=": cuda:").count() == ranks
    too_wide = many.root.evaluate(
        "(root) => [root, ...root.querySelectorAll('*')].filter((e) => e.scrollWidth > e.clientWidth + 1 && e.clientWidth).map((e) => e.className)"
    )
    narrow.evaluate("(style) => style.remove()")
    assert [name for name in too_wide if name != "pm-spoken"] == []


def test_states_are_told_in_words(many: Panel) -> None:
    told = {
        "eight": ["drawing", "step 5 of 28", "0.41 s a step", "2 jobs wait", "also used by pid 7", "patches on 38 weights",
                  "28 steps in 11.5 s (0.41 a step) · 369 MiB sent", "8 ranks on NVIDIA H100", "up 1 h 6 min · version 0.1.0"],
        "one": ["loading", "3.1 of 8.2 GiB"],
        "silent": ["does not answer", "Backend 'silent' has not answered within 1.5 s.", "Wait a little."],
        "starting": ["starting", "2 ranks are meeting"],
        "two": ["idle", "it has 2 ranks, 1 is asked for"],
    }  # fmt: skip
    for name, words in told.items():
        for word in words:
            expect(many.card(name)).to_contain_text(word)
    mesh = many.card("eight").locator(".pm-mesh")
    expect(mesh).to_contain_text("cfg: uncond")
    many.card("eight").get_by_role("button", name="wide.safetensors").click()
    expect(mesh).to_contain_text("ulysses 0..7")


def test_focus_scroll_and_elements_outlive_an_update(many: Panel) -> None:
    many.page.set_viewport_size({"width": 1280, "height": 500})
    many.page.wait_for_timeout(2500)  # what another test has pressed is drawn by the next update
    many.card("two").get_by_role("button", name="Restart", exact=True).focus()
    many.page.evaluate("window.kept = [document.activeElement, ...document.querySelectorAll('.pm-mesh svg')]")
    many.root.evaluate("(root) => { root.scrollTop = 300; }")
    many.page.wait_for_timeout(2500)
    assert many.page.evaluate("document.activeElement === window.kept[0] && window.kept.every((e) => e.isConnected)")
    assert many.root.evaluate("(root) => root.scrollTop") == 300


def test_the_doctors_page_is_copied_or_shown(server: ComfyServer, open_editor: OpenEditor) -> None:
    panel = Panel(open_editor("classic"))
    found = [Finding("wrong", "no gloo", "Install it."), Finding("ok", "torch")]
    page = as_text(found)
    panel.page.route("**/parallel_mmdit/doctor", lambda route: route.fulfill(json={"page": page}))
    panel.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    panel.press("Copy doctor's page")
    expect(panel.root.locator(".pm-doctor")).to_contain_text("Copied: 1 wrong.")
    assert panel.page.evaluate("navigator.clipboard.readText()") == page
    panel.page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    panel.press("Copy doctor's page")
    shown = panel.root.get_by_label("The doctor's page")
    expect(shown).to_have_value(page)
    expect(shown).to_be_focused()


def test_an_error_is_shown_with_its_remedy(many: Panel) -> None:
    error = {"code": "start", "message": "It did not come up.", "remedy": "Read the log.", "details": "Its log ends: x"}
    many.page.route(f"**{BACKEND}", lambda route: route.fulfill(status=400, json={"error": error}))
    card = many.card("one")
    card.get_by_role("button", name="Restart", exact=True).click()
    card.get_by_role("button", name="Restart all the same").click()
    for words in ("It did not come up.", "Read the log.", "Its log ends: x"):
        expect(card.get_by_role("alert")).to_contain_text(words)
    card.get_by_role("button", name="Dismiss").click()
    expect(card.get_by_role("alert")).to_have_count(0)
    many.page.unroute(f"**{BACKEND}")


# -- the routes, as programs and other pages meet them ---------------------------------------------------------------


def answered(
    server: ComfyServer, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a request with these headers; a body makes it a POST of JSON, where they don't say otherwise."""
    data = None if body is None else json.dumps(body).encode()
    given = (JSON if data else {}) | (headers or {})
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", data, given)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as refused:
        text = refused.read()
        return refused.code, json.loads(text) if text.startswith(b"{") else {}


def test_pages_of_other_origins_are_refused(server: ComfyServer) -> None:
    port = server.port
    own = f"http://127.0.0.1:{port}"
    strangers = [
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": f"http://127.0.0.1:{int(port) + 1}"},
        {"Origin": "http://127.0.0.1"}, {"Origin": f"http://localhost:{port}"}, {"Origin": "http://127.0.0.1:port"},
        {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Sec-Fetch-Site": "same-site", "Origin": own},
    ]  # fmt: skip
    asked: list[tuple[str, Any]] = [(STATUS, None), (f"{LOG}?name=default", None), ("/parallel_mmdit/everywhere", None)]
    asked += [
        (BACKEND, {"name": "none", "do": "stop"}),
        ("/parallel_mmdit/doctor", {}),
        ("/parallel_mmdit/workflow", {}),
    ]
    asked += [("/parallel_mmdit/everywhere", {"on": True}), (f"/api{STATUS}", None)]
    for path, body in asked:
        for headers in strangers:
            status, told = answered(server, path, body, headers)
            assert status == 403 and told["error"]["message"] and told["error"]["remedy"], (path, headers)
    for path, body in asked:
        if body is not None:
            assert answered(server, path, body, {"Content-Type": "text/plain"})[0] == 403, path


def test_comfyuis_own_pages_and_programs_are_answered(server: ComfyServer) -> None:
    own = f"http://127.0.0.1:{server.port}"
    friends: list[dict[str, str]] = [{}, {"Origin": own}, {"Origin": own, "Sec-Fetch-Site": "same-origin"}]
    friends += [{"Sec-Fetch-Site": "none"}, {"Host": "comfy.example", "Origin": "https://comfy.example"}]
    friends += [{"Host": "comfy.example:443", "Origin": "https://comfy.example"}]
    for headers in friends:
        assert answered(server, STATUS, None, headers)[0] == 200, headers
        status, told = answered(server, BACKEND, {"name": "none", "do": "stop"}, headers)
        assert status == 400 and told["error"]["message"] == "No backend 'none' runs.", headers
    assert (
        answered(
            server,
            "/parallel_mmdit/everywhere",
            {"on": False},
            {"Content-Type": "application/json; charset=utf-8"},
        )[0]
        == 200
    )


def test_what_is_no_request_is_refused_by_name(server: ComfyServer) -> None:
    bad: list[tuple[Any, str]] = [
        ([], "asks for nothing"), ({"name": "a", "do": "burn"}, "asks for nothing"), ({"name": 3, "do": "stop"}, "asks for nothing"),
        ({"name": "../x", "do": "stop"}, "Backend name '../x' can't be used"), ({"name": "", "do": "free"}, "can't be used"),
        ({"name": "other", "do": "start"}, "can't be started from here"),
    ]  # fmt: skip
    for body, words in bad:
        status, told = answered(server, BACKEND, body)
        assert status == 400 and words in told["error"]["message"], (body, told)
    for name in ("..", "../default", ".patches", "nowhere", "a/b"):
        assert answered(server, f"{LOG}?name={urllib.request.quote(name)}")[0] == 400


def test_a_backend_that_hangs_is_told_and_keeps_nobody_waiting(server: ComfyServer, runtime_folder: Path) -> None:
    backend = Backend(1, "cpu", "hangs")
    os.kill(backend.record.pid, signal.SIGSTOP)
    begun = time.monotonic()
    told = {entry["name"]: entry for entry in server.get(STATUS)["backends"]}
    assert time.monotonic() - begun < 6
    os.kill(backend.record.pid, signal.SIGCONT)
    assert told["hangs"]["phase"] == "silent" and "has not answered" in told["hangs"]["error"]["message"]
    backend.stop()
