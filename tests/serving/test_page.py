"""The page in a real browser: typing, running, looking, and doing all of it without a mouse."""

import json
import re

import pytest

api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
expect = api.expect


@pytest.fixture
def page(browser, url):
    """The page, which must not complain."""
    page = browser.new_page()
    complaints = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    expect(page.locator("#sampler option")).to_have_count(4)
    yield page
    page.close()
    expected = getattr(page, "expected", [])
    assert [c for c in complaints if not any(e in c for e in expected)] == []


def run(page):
    page.click("#go")
    expect(page.locator("#status")).to_have_text(re.compile("^Done"))


def shown(page):
    """What can be read of the text, token by token."""
    return [
        "_" if "off" in token.get_attribute("class").split() else token.text_content()
        for token in page.locator(".tok").all()
    ]


def test_a_prompt_is_completed_and_every_token_says_how_it_came(page):
    page.fill("#prompt", "Well,")
    run(page)
    assert shown(page) == ["Well,", "so", " it", " goes", "\n", " <b>&", " end"]
    assert page.locator(".tok.given").count() == 1
    expect(page.locator("#status")).to_have_text("Done: 6 tokens, 6 network calls, 0.10 s")
    for place, text in {"nfe": "6", "tokens": "6", "seconds": "0.10 s", "speed": "60"}.items():
        expect(page.locator(f"#{place}")).to_have_text(text)
    expect(page.locator("#log-p")).to_have_text("-9.0 nats")
    page.hover(".tok >> nth=6")
    for words in ("position 6, step 1 of 6", "share 50.0 %", "-1.50 nats (22.3 %)"):
        expect(page.locator("#tip")).to_contain_text(words)
    page.click("#numbers summary")
    expect(page.locator("#table tr")).to_have_count(8)


def test_tokens_appear_while_they_are_generated(page, fake, eventually):
    page.fill("#prompt", "wait")
    page.click("#go")
    eventually(lambda: fake.started)
    expect(page.locator("#status")).to_have_text("Generating")
    expect(page.locator("#go")).to_be_disabled()
    assert shown(page) == ["wait"] + 6 * ["_"]
    fake.go.set()
    expect(page.locator("#status")).to_have_text(re.compile("^Done"))
    assert shown(page)[1:3] == ["so", " it"]


def test_a_run_is_stopped_and_one_that_waits_says_so(page, fake, url, browser, eventually):
    page.fill("#prompt", "wait")
    page.click("#go")
    eventually(lambda: fake.started)
    other = browser.new_page()
    other.goto(url)
    other.fill("#prompt", "later")
    other.click("#go")
    expect(other.locator("#status")).to_have_text("Waiting: 1 ahead")
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("Stopped")
    expect(page.locator("#go")).to_be_enabled()
    expect(other.locator("#status")).to_have_text(re.compile("^Done"))
    other.close()
    assert fake.ended == ["wait", "later"]


def test_a_replay_shows_the_text_as_it_was(page):
    page.fill("#prompt", "Well,")
    run(page)
    page.locator("#step").fill("2")
    assert shown(page) == ["Well,", *4 * "_", " <b>&", " end"]
    expect(page.locator("#at")).to_have_text("step 2 of 6")
    page.click("#back")
    assert shown(page) == ["Well,", *5 * "_", " end"]
    page.click("#play")
    expect(page.locator("#at")).to_have_text("step 6 of 6")
    assert "_" not in shown(page)
    early, late = (page.locator(".tok").nth(i) for i in (6, 1))
    colours = [
        token.evaluate("e => getComputedStyle(e).backgroundColor") for token in (early, late)
    ]
    assert colours[0] != colours[1]
    page.select_option("#colour", "log_p")
    expect(page.locator("#low")).to_have_text("0")


def test_settings_follow_the_run_and_the_sampler_and_are_sent(page):
    assert page.locator("#sampler option[disabled]").all_text_contents() == ["margin"]
    page.click("#why-not summary")
    expect(page.locator("#why")).to_have_text("margin: for no reason")
    page.select_option("#sampler", "ancestral")
    expect(page.locator("#steps")).to_be_visible()
    expect(page.locator("#reveal")).to_be_hidden()
    page.fill("#steps", "9")
    page.fill("#temperature", "0.5")
    page.fill("#count", "2")
    run(page)
    with page.expect_download() as download:
        page.click("#download")
    trace = json.loads(download.value.path().read_text())
    assert download.value.suggested_filename == "trace-first-5.json"
    asked = trace["settings"]
    assert asked["sampler"] == "ancestral" and asked["steps"] == 9 and asked["temperature"] == 0.5
    assert asked["reveal"] is None and asked["threshold"] is None, "what is hidden is left out"
    assert trace["run"] == "first" and len(trace["samples"]) == 2
    page.click("#tabs button >> nth=1")
    expect(page.locator("#tabs button >> nth=1")).to_have_attribute("aria-pressed", "true")
    page.select_option("#run", "second")
    assert page.locator("#sampler option[disabled]").all_text_contents() == ["velocity", "margin"]
    page.select_option("#sampler", "race")
    page.click("#more summary")
    expect(page.locator("#dependence")).to_be_hidden()
    page.fill("#reveal", "4")
    expect(page.locator("#dependence")).to_be_visible()
    expect(page.locator("#threshold")).to_be_hidden()


def test_what_is_refused_is_said(page, url):
    page.fill("#count", "9")
    page.click("#go")
    expect(page.locator("#error")).to_contain_text("Samples: ")
    page.fill("#count", "1")
    page.fill("#prompt", "x" * 201)
    page.click("#go")
    expect(page.locator("#error")).to_contain_text("201 characters; 200 are the limit")
    page.fill("#prompt", "fail")
    page.click("#go")
    expect(page.locator("#error")).to_have_text("The generation failed: out of paper")
    page.expected = ["422"]  # the browser's own line about a refusal
    page.fill("#prompt", "x" * 150)
    page.route("**/api/generate", lambda route: route.continue_(post_data='{"top_k": "many"}'))
    page.click("#go")
    expect(page.locator("#error")).to_contain_text("top_k: Input should be a valid integer")
    expect(page.locator("#go")).to_be_enabled()
    page.unroute("**/api/generate")
    run(page)
    expect(page.locator("#error")).to_be_hidden()


@pytest.mark.parametrize("width", [380, 1200])
def test_what_happens_comes_into_view(page, width):
    """Below the form on a narrow screen, above the end of a long form on a wide one."""
    page.set_viewport_size({"width": width, "height": 500})
    page.click("#more summary")
    for prompt, place in (("Well,", "#status"), ("fail", "#error")):
        page.fill("#prompt", prompt)
        page.locator("#go").scroll_into_view_if_needed()
        page.click("#go")
        expect(page.locator(place)).to_have_text(re.compile("Done|failed"))
        expect(page.locator(place)).to_be_in_viewport()


def test_a_server_that_is_gone_is_said(page):
    page.expected = ["ERR_FAILED"]
    page.route("**/api/generate", lambda route: route.abort())
    page.click("#go")
    expect(page.locator("#error")).to_contain_text("The server does not answer")
    expect(page.locator("#go")).to_be_enabled()


def test_all_of_it_without_a_mouse(page):
    """From the top: tab to the prompt, insert a blank, generate, go through the tokens, replay."""

    def tab_to(name):
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == name:
                return
        raise AssertionError(f"Tab does not lead to {name}")

    tab_to("prompt")
    page.keyboard.type("Well,")
    tab_to("blank")
    page.keyboard.press("Enter")
    page.keyboard.type("7")  # instead of the number, which is selected
    expect(page.locator("#prompt")).to_have_value("Well,[[7]]")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_have_text(re.compile("^Done"))
    tab_to("step")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#at")).to_have_text("step 5 of 6")
    tab_to("colour")
    page.keyboard.press("Tab")
    page.keyboard.press("End")
    expect(page.locator("#spoken")).to_contain_text('" end": position 6, step 1 of 6')
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#spoken")).to_contain_text('" <b>&": position 5, step 2 of 6')
    tab_to("copy")


def test_what_assistive_technology_is_told(page):
    for box in page.locator("input, select, textarea, button, progress").all():
        named = box.evaluate(
            "e => (e.labels?.length || e.ariaLabel || e.textContent.trim()) ? '' : e.outerHTML"
        )
        assert named == "", "every control has a name"
    run(page)
    expect(page.get_by_role("status").first).to_contain_text("Done")
    expect(page.get_by_role("slider", name="Step")).to_have_attribute(
        "aria-valuetext", "step 6 of 6, 6 tokens revealed"
    )
    page.fill("#prompt", "fail")
    page.click("#go")
    expect(page.get_by_role("alert")).to_have_text("The generation failed: out of paper")


@pytest.mark.parametrize("width", [320, 700, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(page, width, scheme):
    """Nothing is cut off at the side, and text has at least 4.5 to 1 contrast (WCAG AA)."""
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.fill("#prompt", "A prompt of some length, " * 5)
    page.click("#more summary")
    run(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRAST) == []


CONTRAST = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => numbers(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const { backgroundColor } = getComputedStyle(node);
      if (numbers(backgroundColor)[3] !== 0) return backgroundColor;
    }
  };
  const poor = [];
  for (const node of document.querySelectorAll("h1, p, label, dt, dd, button:enabled, .tok, summary"
      + ", #step ~ output, a")) {
    if (!node.checkVisibility() || node.matches(".away, :empty")) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(behind(node))].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) poor.push(`${node.outerHTML} ${(a + .05) / (b + .05)}`);
  }
  return poor;
}"""
