"""The page in real Chromium: what a person does with it, on a large and on a small screen, and with the server away."""

import pathlib
import re
import shutil

import pytest
import requests

from tests.serve.running import png, server, wait_until
from vitcls.metrics.unknown import MaximumSoftmax
from vitcls.serve import promotion
from vitcls.training import novelty

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium, Debian's package chromium")
AXE = pathlib.Path(__file__).parents[2] / ".ci" / "node_modules" / "axe-core" / "axe.min.js"
WIDE, PHONE = {"width": 1000, "height": 900}, {"width": 360, "height": 640}
# A file in the clipboard or under the mouse, which only a person can put there.
GIVE = """([kind, data]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([Uint8Array.from(data)], "given.png", { type: "image/png" }));
  const name = kind === "paste" ? "clipboardData" : "dataTransfer";
  const event = kind === "paste" ? new ClipboardEvent(kind, { clipboardData: transfer, bubbles: true })
                                 : new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true });
  document.body.dispatchEvent(event);
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser):
    """open_page(url, **options of the context): a page without any error in its console at the end."""
    contexts, complaints = [], []

    def open_(url, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if not is_local(request.url, url) else None)
        page.goto(url)
        return page

    yield open_
    for context in contexts:
        context.close()
    # Chromium itself says so of each answer that is none.
    assert [one for one in complaints if not re.search(r"the server responded with|ERR_CONNECTION", one)] == []


def is_local(asked, url):
    return asked.startswith(("blob:", "/".join(url.split("/")[:3])))


def picture(name="a.png", seed=0):
    return {"name": name, "mimeType": "image/png", "buffer": png(seed)}


def best(served, seed=0):
    return served.predict(("a.png", png(seed))).json()["predictions"][0]["top"][0]


def test_an_image_is_answered(served, open_page):
    page = open_page(served.url, viewport=WIDE)
    playwright.expect(page.locator("h1")).to_have_text("What is it? 3 classes of synthetic")
    playwright.expect(page.locator("#about")).to_contain_text("Percentages are not calibrated.")
    page.set_input_files("#file", [picture("a.png", 0), picture("b.png", 1)])
    cards = page.locator("article")
    playwright.expect(cards).to_have_count(2)
    for card, seed in ((cards.nth(1), 0), (cards.nth(0), 1)):  # the newest is first
        said = best(served, seed)
        assert card.locator("h2").inner_text() == f"{said['class']}, {100 * said['probability']:.1f}\u00a0%"
        assert card.locator(".bars li").count() == 3
        widths = [bar.evaluate("bar => bar.getBoundingClientRect().width") for bar in card.locator(".track i").all()]
        assert widths == sorted(widths, reverse=True) and widths[0] > 20
    assert cards.nth(0).locator(".strange").is_hidden()
    assert page.evaluate("document.querySelector('article img').complete")


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_an_image_is_given_by_hand(served, open_page, kind):
    page = open_page(served.url)
    page.wait_for_selector("#learned:not([hidden])")
    page.evaluate(GIVE, [kind, list(png(3))])
    playwright.expect(page.locator("article h2")).to_contain_text(best(served, 3)["class"])


@pytest.mark.by_turns
def test_feedback_is_one_click(trained, open_page, tmp_path):
    with server(f"--workdir={trained}", f"--database=sqlite:///{tmp_path}/f.db") as running:
        page = open_page(running.url)
        playwright.expect(page.locator("#learned-words")).to_have_text("Nothing yet.")
        page.set_input_files("#file", [picture("a.png", 4), picture("b.png", 5)])
        first, second = page.locator("article").nth(1), page.locator("article").nth(0)
        first.locator(".right").click()
        playwright.expect(first.locator(".thanks")).to_contain_text(f"Kept: {best(running, 4)['class']}.")
        wrong = next(name for name in ("class 0", "class 1") if name != best(running, 5)["class"])
        second.locator(".instead", has_text=wrong).click()  # one of the five
        playwright.expect(second.locator(".thanks")).to_contain_text(f"Kept: {wrong}.")
        second.locator(".feedback select").select_option(wrong)
        second.locator(".wrong").click()  # any of all
        playwright.expect(second.locator(".thanks")).to_contain_text(f"Known already: {wrong}.")
        words = "1 answer was right, 1 was corrected, of 2 images."
        playwright.expect(page.locator("#learned-words")).to_have_text(words)
        assert requests.get(f"{running.url}/v1/feedback").json()["by_class"][wrong] >= 1


def test_it_shows_where_the_model_looks(served, open_page):
    page = open_page(served.url)
    page.set_input_files("#file", picture())
    page.locator("summary").click()
    overlay = page.locator(".overlay")
    playwright.expect(overlay).to_be_visible()
    assert overlay.evaluate("image => image.naturalWidth") > 100
    playwright.expect(page.locator(".evidence")).to_contain_text(re.compile(r"random maps.*\(p = \d\.\d\d\)"))
    methods = page.locator("details select option").all_inner_texts()
    page.locator("details select").select_option(methods[-1])
    playwright.expect(page.locator(".evidence")).to_contain_text("random maps")


def test_what_is_no_image_is_said(served, open_page):
    page = open_page(served.url)
    page.set_input_files("#file", [picture(), {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"hello"}])
    playwright.expect(page.locator("#message")).to_have_text("notes.txt: the file is not an image.")
    playwright.expect(page.locator("article")).to_have_count(1)
    page.set_input_files("#file", {"name": "b.txt", "mimeType": "text/plain", "buffer": b"hello"})
    playwright.expect(page.locator("#message")).to_have_text("b.txt: the file is not an image.")


@pytest.mark.by_turns
def test_many_files_are_sent_in_parcels(served, open_page):
    page = open_page(served.url)
    page.set_input_files("#file", [picture(f"{i}.png", i) for i in range(20)])
    playwright.expect(page.locator("article")).to_have_count(20)
    large = {"name": "large.png", "mimeType": "image/png", "buffer": b"x" * 11 * 2**20}
    page.set_input_files("#file", [picture("c.png"), large])
    playwright.expect(page.locator("#message")).to_have_text("large.png: the file has 11.0 MiB; at most 10 are taken.")
    playwright.expect(page.locator("article")).to_have_count(21)


@pytest.mark.by_turns
def test_what_was_never_seen_is_said(trained, open_page, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    novelty.write(workdir, novelty.Novelty(12, "msp", MaximumSoftmax(), 2.0, 0.95))
    with server(f"--workdir={workdir}") as running:
        page = open_page(running.url)
        page.set_input_files("#file", picture())
        playwright.expect(page.locator(".strange")).to_contain_text("unlike anything that was seen in training")


def test_an_upload_is_one_request_while_the_model_stays(served, open_page):
    page = open_page(served.url)
    page.wait_for_selector("#learned:not([hidden])")
    asked = []
    page.on("request", lambda request: asked.append(request.url.removeprefix(served.url)))
    page.set_input_files("#file", picture())
    page.wait_for_selector(".picture img")
    page.wait_for_selector("body:not([aria-busy])")
    assert [path for path in asked if path.startswith("/v1/")] == ["/v1/predict"]


@pytest.mark.by_turns
def test_it_says_when_another_model_is_served(trained, open_page, tmp_path):
    first, second = (shutil.copytree(trained, tmp_path / name) for name in ("first", "second"))
    with server(f"--workdir={first}") as running:
        page = open_page(running.url)
        page.wait_for_selector("#learned:not([hidden])")
        assert "Served since" not in page.locator("#about").inner_text()
        promotion.promote(first, second)
        wait_until(lambda: requests.get(f"{running.url}/v1/model").json()["since"])
        page.set_input_files("#file", picture())
        playwright.expect(page.locator("#about")).to_contain_text("Served since")


@pytest.mark.by_turns
def test_a_server_that_is_away_is_said(trained, open_page, tmp_path):
    with server(f"--workdir={trained}", f"--database=sqlite:///{tmp_path}/f.db") as running:
        page = open_page(running.url)
        page.wait_for_selector("#learned:not([hidden])")
        running.stop()
        page.set_input_files("#file", picture())
        playwright.expect(page.locator("#message")).to_contain_text("The server cannot be reached.")
        playwright.expect(page.locator("article")).to_have_count(0)


@pytest.mark.by_turns
def test_a_token_is_asked_for(trained, open_page, tmp_path):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123")
    with server(f"--workdir={trained}", f"--token_file={token}", f"--database=sqlite:///{tmp_path}/f.db") as running:
        page = open_page(running.url)
        page.get_by_label("This server asks for a token").fill("wrong wrong wrong")
        page.keyboard.press("Enter")
        playwright.expect(page.locator("#message")).to_contain_text("this is not the token")
        page.get_by_label("This server asks for a token").fill(token.read_text())
        page.keyboard.press("Enter")
        playwright.expect(page.locator("h1")).to_contain_text("3 classes")
        page.set_input_files("#file", picture())
        playwright.expect(page.locator("article")).to_have_count(1)


def test_the_keyboard_is_enough(served, open_page):
    """Each thing that can be done is reached by the tab key, in the order of the page, and shows that it is."""
    page = open_page(served.url)
    page.set_input_files("#file", picture())
    playwright.expect(page.locator("article")).to_have_count(1)
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(7):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
            )
        )
    assert reached == ["file", "photo", "instead", "instead", "right", "SELECT", "SUMMARY"]
    page.keyboard.press("Enter")
    playwright.expect(page.locator(".overlay")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_small_screen_needs_no_scrolling_to_the_side(served, open_page, scheme):
    page = open_page(served.url, viewport=PHONE, color_scheme=scheme, has_touch=True)
    page.set_input_files("#file", picture("a file with a name that is rather long.png"))
    playwright.expect(page.locator("article")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    low = page.locator("button, .button, select").all()
    assert min(one.bounding_box()["height"] for one in low if one.is_visible()) >= 36  # for a thumb
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 28)"}[scheme]


@pytest.mark.skipif(not AXE.exists(), reason="needs axe-core: npm install --prefix .ci axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/", "/docs"])
def test_nothing_stands_in_the_way_of_a_screen_reader(served, open_page, scheme, path):
    page = open_page(served.url + path, color_scheme=scheme)
    if path == "/":
        page.set_input_files("#file", picture())
        page.locator("summary").click()
        playwright.expect(page.locator(".overlay")).to_be_visible()
        page.locator(".right").click()
        playwright.expect(page.locator(".thanks")).not_to_be_empty()
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    assert [(one["id"], one["help"]) for one in found["violations"]] == []
    assert len(found["passes"]) > 15
