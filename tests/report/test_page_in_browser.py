"""The page of runs in Chromium, opened from its file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from written_runs import add_thoughts, large_run, record, write_answers

from sdar_lm_eval.report.changed import changed_documents
from sdar_lm_eval.report.denoising import Denoising
from sdar_lm_eval.report.page.rendering import page_of
from sdar_lm_eval.report.runs import Run, read_runs

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=hacked=1>\u2028 \x00 \ud800 '\"&amp;{{7*7}}${1}"
TOKENS_A = ["The", " sum", " is", ":", "\n", "3", " + 4", " =", " seven", ",", " or", " 7"]
TOKENS_B = ["It", " is", " clear", "ly", " 7"]
STEPS_A, STEPS_B = [0, 1, 1, 2, 1, 0, 0, 0, 0, 1, 2, 3], [1, 0, 0, 2, 0]
CONFIDENCES_A = [3000, 6000, 8000, 9000, 9990, 10000, 9500, 8500, 7000, 5000, 4999, 9999]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two runs of twelve documents.

    Document 0 has records in both runs. In run a, 1 is wrong, 3 is invalid, and 5 has no record; in run b, 2 is wrong,
    4 is cut, and 6 has two answers. All others are right.
    """
    folder = tmp_path_factory.mktemp("runs")
    answers_a = [["".join(TOKENS_A)], *[[f"apples make {8 if n == 1 else 7}"] for n in range(1, 12)]]
    answers_b = [["".join(TOKENS_B)], *[[f"pears make {8 if n == 2 else 7}"] for n in range(1, 12)]]
    answers_b[6] = ["pears make 7", "plums make 9"]
    last_words = ["7" if n != 3 else "[invalid]" for n in range(12)]
    last_words[1] = "8"
    records_a = [record(0, TOKENS_A, STEPS_A, CONFIDENCES_A)]
    records_b = [
        record(0, TOKENS_B, STEPS_B, prompt_tokens=6),
        record(4, ["pears", " make", " 7"], [0, 0, 0], finish_reason="length"),
        record(6, ["pears", " make", " 7"], [0, 1, 2]),
        record(6, ["plums", " make", " 9", "<|im_end|>", "."], [2, 1, 0, 0, 0], repeat=1),
    ]
    common = {"questions": [f"Question {n}?" + " long" * 60 * (n == 2) for n in range(12)]}
    a = write_answers(
        folder / "a", answers_a, records=records_a, extracted=last_words, settings={"threshold": 0.6}, **common
    )
    b = write_answers(folder / "b", answers_b, records=records_b, settings={"threshold": 0.85}, **common)
    return read_runs([a, b])


@pytest.fixture(scope="module")
def file(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _written(tmp_path_factory.mktemp("page") / "report.html", runs)


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    yield from _opened(browser, file)


def _written(file: Path, runs: list[Run], **settings: Any) -> Path:
    file.write_text(page_of(runs, **settings), "utf-8", newline="\n")
    return file


def _opened(browser: Any, file: Path, address: str = "", **settings: Any) -> Iterator[Any]:
    """A page whose console and requests are watched."""
    context = browser.new_context(viewport={"width": 1280, "height": 2000}, **settings)
    page = context.new_page()
    faults, requests = [], []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"file://{file}{address}")
    _ready(page)
    yield page
    assert faults == []
    assert {url.partition("#")[0] for url in requests} == {f"file://{file}"}
    context.close()


def _ready(page: Any) -> None:
    page.wait_for_selector('#table[aria-busy="false"]', state="attached")


def _documents(page: Any) -> list[int]:
    return [int(text) for text in page.locator("#rows .row .id").all_inner_texts()]


def _go(page: Any, step: int) -> None:
    page.locator("#step").evaluate(
        "(range, step) => { range.value = step; range.dispatchEvent(new Event('input')); }", step
    )


def _open(page: Any, document: int) -> None:
    page.locator(f'#rows .row:has(.id:text-is("{document}"))').click()
    page.wait_for_selector("dialog[open]")


def _tokens(page: Any, column: int) -> list[list[list[str]]]:
    """Blocks in sight -> tokens -> text and classes."""
    return (
        page.locator("#answers .column")
        .nth(column)
        .evaluate(  # type: ignore[no-any-return]
            """(column) => [...column.querySelectorAll('.block')].filter((block) => !block.hidden).map((block) =>
             [...block.children].map((token) => [token.textContent, token.className]))"""
        )
    )


def test_the_overview_says_what_differs(page: Any) -> None:
    assert page.locator("#runs thead").inner_text().split()[:3] == ["Run", "Folder", "threshold"]
    scores = page.locator("#scores tbody tr").all_inner_texts()
    assert [text.split()[1] for text in scores] == ["exact_match", "exact_match", "tokens", "tokens/s"]
    assert "83.3" in page.locator("#scores").inner_text() and "91.7" in page.locator("#scores").inner_text()
    assert page.locator("#count").inner_text() == "12 of 12 documents"
    assert page.locator("#runs details dt").first.is_hidden()


def test_filters_and_search(page: Any) -> None:
    def press(name: str) -> list[int]:
        page.locator("#flags button", has_text=name).click()
        return _documents(page)

    assert press("Wrong") == [1, 2, 3]
    assert press("Changed") == [1, 2, 3]
    assert press("Invalid") == [3]
    assert page.locator("#count").inner_text() == "1 of 12 documents"
    page.get_by_role("button", name="Clear").click()
    assert press("Cut") == [4]
    press("Cut")
    assert page.locator("#count").inner_text() == "12 of 12 documents"
    page.locator("#run").select_option("run B")
    assert press("Wrong") == [2]
    page.get_by_role("button", name="Clear").click()
    page.locator("#search").fill("PLUMS make")
    assert _documents(page) == [6]
    page.locator("#search").fill("question 1")
    assert _documents(page) == [1, 10, 11]
    page.locator("#search").fill("nowhere")
    assert _documents(page) == [] and page.locator("#empty").inner_text() == "No document matches."
    assert page.locator("#count").inner_text() == "0 of 12 documents"
    page.keyboard.press("j")
    page.keyboard.press("ArrowDown")


def test_changed_are_the_documents_that_compare_says(page: Any, runs: list[Run]) -> None:
    changed = changed_documents(runs[0], runs[1], "gsm8k_sdar", "exact_match", "flexible-extract")
    page.locator("#flags button", has_text="Changed").click()
    assert _documents(page) == [each.document_a for each in changed]
    page.locator("#comparison a").first.click()  # those that run a alone has right
    api.expect(page.locator("#count")).to_have_text("1 of 12 documents")
    assert _documents(page) == [each.document_a for each in changed if each.a > each.b]
    page.locator("#comparison a").nth(1).click()
    api.expect(page.locator("#count")).to_have_text("2 of 12 documents")
    assert _documents(page) == [each.document_a for each in changed if each.b > each.a]


def test_masks_become_tokens_in_the_order_of_the_records(page: Any, runs: list[Run]) -> None:
    _open(page, 0)
    known: list[Denoising] = [run.results_of("gsm8k_sdar").denoising("gsm8k_sdar")[0] for run in runs]
    last = max(max(each.global_steps or ()) + 1 for each in known)
    assert page.locator("#step").get_attribute("max") == str(last)
    for step in range(last + 1):
        _go(page, step)
        assert page.locator("#told").inner_text() == f"step {step} of {last}"
        for column, each in enumerate(known):
            steps = each.global_steps or ()
            end = max(steps) + 1
            begun = [block for block in each.blocks if min(steps[i] for i in block) <= step < end or step >= end]
            expected = [
                [
                    (each.texts[i].replace("\n", "↵\n"), "new" if steps[i] == step - 1 else "")
                    if steps[i] < step
                    else ("▢", "mask")
                    for i in block
                ]
                for block in begun
            ]
            found = [
                [(text, next((name for name in ("new", "mask") if name in style.split()), "")) for text, style in block]
                for block in _tokens(page, column)
            ]
            assert found == expected, (step, column)
    shades = [style.split()[1] for block in _tokens(page, 0) for _, style in block]
    assert shades == ["c0", "c1", "c2", "c3", "c4", "c4", "c4", "c3", "c2", "c1", "c0", "c4"]
    assert page.locator("#answers .token").first.get_attribute("title") == (
        "token 1, block 1, unmasked in step 1, confidence 0.3000"
    )


def test_an_opened_document(page: Any) -> None:
    _open(page, 3)
    assert page.locator("#verdict").inner_text() == "Document 3: A wrong, B right."
    first = page.locator("#answers .column").first
    assert first.locator(".found tr").all_inner_texts() == [
        "strict-match\tnothing extracted\texact_match ✗", "flexible-extract\tnothing extracted\texact_match ✗",
    ]  # fmt: skip
    assert first.locator(".answer").inner_text() == "apples make 7" and "no denoising record" in first.inner_text()
    assert page.locator("#player").is_hidden()
    assert page.locator("#asked .question").inner_text() == "Question 3?"
    page.get_by_text("Prompt as sent").click()
    assert page.locator("#asked pre").first.inner_text() == "Question: Question 3?\nAnswer:"
    page.get_by_role("button", name="Next").click()
    assert page.locator("#verdict").inner_text() == "Document 4: A right, B right."
    assert "cut at the limit" in page.locator("#answers .column").nth(1).inner_text()


def test_several_answers(page: Any) -> None:
    _open(page, 6)
    column = page.locator("#answers .column").nth(1)
    assert column.locator(".answer").inner_text() == "pears make 7" and "answer 1 of 2" in column.inner_text()
    page.get_by_role("button", name="Next answer of run B").click()
    assert column.locator(".answer").inner_text() == "plums make 9<|im_end|>."
    assert [[text for text, style in block if "beyond" in style] for block in _tokens(page, 1)] == [
        ["<|im_end|>"],
        ["."],
    ]
    page.keyboard.press("]")
    assert column.locator(".answer").inner_text() == "pears make 7"
    page.keyboard.press("[")
    assert "answer 2 of 2" in column.inner_text()


def test_thoughts(browser: Any, tmp_path: Path) -> None:
    """Folded above the answer; their tokens stand beside those that were scored."""
    tokens = ["<think>", "it is 7", "</think>", "\n", "it is", " 7", "."]
    records = [record(0, tokens, [0] * 7), record(1, ["<think>", "hm"], [0, 1], finish_reason="length")]
    folder = write_answers(tmp_path / "run", [["it is 7"], [""], ["7"]], records=records)
    add_thoughts(folder, {0: ("<think>it is 7", True), 1: ("<think>hm", False)})
    for page in _opened(browser, _written(tmp_path / "report.html", read_runs([folder]))):
        _open(page, 0)
        column = page.locator("#answers .column").first
        assert column.locator("summary").inner_text() == "Thought, 14 characters"
        assert column.locator("pre").text_content() == "<think>it is 7"
        scored = [text for block in _tokens(page, 0) for text, style in block if "beyond" not in style]
        assert scored == ["it is", " 7"]
        page.get_by_role("button", name="Next").click()
        assert column.locator("summary").inner_text() == "Thought, 9 characters, without an end"
        assert "ended while thinking, so the scored text is empty" in column.inner_text()
        assert all("beyond" in style for block in _tokens(page, 0) for _, style in block)
        page.get_by_role("button", name="Next").click()
        assert column.locator("summary").count() == 0


def test_keyboard(page: Any) -> None:
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.textContent") == "Question 0?"
    page.keyboard.press("j")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.textContent") == "Question 1?"
    assert page.evaluate("getComputedStyle(document.activeElement.closest('.row')).outlineStyle") == "solid"
    page.keyboard.press("k")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    last = int(page.locator("#step").get_attribute("max"))
    assert page.locator("#told").inner_text() == f"step {last - 1} of {last}"
    assert page.locator("#step").get_attribute("aria-valuetext") == f"step {last - 1} of {last}"
    page.locator("#step").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#told").inner_text() == f"step {last - 2} of {last}"
    page.keyboard.press("j")
    api.expect(page.locator("#document-title")).to_have_text("gsm8k_sdar, document 1")
    page.keyboard.press("Escape")
    assert page.locator("dialog").is_hidden()
    api.expect(page.locator(":focus")).to_have_text("Question 1?")
    page.keyboard.press("/")
    page.keyboard.type("jk/")
    assert page.locator("#search").input_value() == "jk/"


def test_play_and_pause(page: Any) -> None:
    _open(page, 0)
    page.get_by_role("button", name="Play").click()
    api.expect(page.locator("#told")).not_to_have_text("step 0 of 9")
    page.get_by_role("button", name="Pause").click()
    at = page.locator("#told").inner_text()
    page.wait_for_timeout(400)
    assert (
        page.locator("#told").inner_text() == at != "step 9 of 9"
        and page.get_by_role("button", name="Play").is_visible()
    )
    page.keyboard.press("p")
    api.expect(page.locator("#told")).to_have_text("step 9 of 9")
    page.get_by_role("button", name="Play").wait_for()


def test_the_address_keeps_document_step_and_filters(page: Any, file: Path, browser: Any) -> None:
    page.locator("#flags button", has_text="Right").click()
    page.locator("#search").fill("clearly")
    page.locator("#score").select_option("exact_match, flexible-extract")
    _open(page, 0)
    _go(page, 3)
    told = page.locator("#answers").inner_text()
    page.reload()
    _ready(page)
    page.wait_for_selector("dialog[open]")
    assert page.locator("#answers").inner_text() == told and page.locator("#told").inner_text().startswith("step 3 of")
    page.keyboard.press("Escape")
    assert _documents(page) == [0] and page.locator("#search").input_value() == "clearly"
    assert page.locator("#score").input_value() == "exact_match, flexible-extract"
    assert page.locator("#flags button", has_text="Right").get_attribute("aria-pressed") == "true"
    address = "#doc=gsm8k_sdar%2F99&step=x&show=constructor,wrong&run=7&task=none"
    for other in _opened(browser, file, address):
        assert _documents(other) == [1, 2, 3] and other.locator("dialog").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str, browser: Any, file: Path) -> None:
    for page in _opened(browser, file, "#show=changed", color_scheme=scheme):
        assert page.evaluate(_CONTRASTS) == []
        _open(page, 2)
        page.keyboard.press("Escape")
        page.get_by_role("button", name="Clear").click()
        _open(page, 0)
        for step in (1, 4, 99):
            _go(page, step)
            assert page.evaluate(_CONTRASTS) == []
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor").startswith("rgb(20,")
        assert dark == (scheme == "dark")


def test_narrow_screens_do_not_scroll_sideways(browser: Any, file: Path) -> None:
    for page in _opened(browser, file):
        for width in (400, 700, 1000):
            page.set_viewport_size({"width": width, "height": 2000})
            assert page.evaluate("document.documentElement.scrollWidth") == width
            marks = page.locator("#rows .row").first.locator(".mark")
            assert [marks.nth(n).is_visible() for n in range(2)] == [True, True]
            _open(page, 0)
            assert page.evaluate("document.querySelector('dialog').scrollWidth") <= width
            page.keyboard.press("Escape")


def test_names_and_roles(page: Any) -> None:
    _open(page, 6)
    assert page.evaluate(_NAMELESS) == []
    assert page.evaluate("document.activeElement.closest('dialog') !== null")
    page.keyboard.press("Escape")
    assert page.evaluate(_NAMELESS) == []
    for live in ("count", "verdict", "told"):
        assert page.locator(f"#{live}").get_attribute("aria-live") == "polite"
    assert page.get_by_role("table", name="Documents").get_by_role("row").count() == 13
    assert page.locator("#table").get_attribute("aria-rowcount") == "13"
    right = page.get_by_role("row").filter(has_text="Question 0?")
    assert right.get_by_role("img", name="right").count() == 2
    assert page.locator("[id]").count() == page.evaluate(
        "new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size"
    )


def test_hostile_texts_stay_texts(browser: Any, tmp_path: Path) -> None:
    parts = [HOSTILE[:9], HOSTILE[9:]]
    folder = write_answers(
        tmp_path / "run", [[HOSTILE]] * 2, gold=[HOSTILE, "7"], questions=[HOSTILE] * 2, task="t<b>",
        records=[record(0, parts, [0, 1])], settings={HOSTILE: HOSTILE}, extracted=[HOSTILE, "7"],
    )  # fmt: skip
    file = _written(tmp_path / "report.html", read_runs([folder]), title=HOSTILE)
    shown = HOSTILE.replace("\ud800", "\ufffd")
    for page in _opened(browser, file):
        _open(page, 0)
        answer = page.locator("#answers .answer").evaluate("(pane) => pane.textContent")
        assert answer.encode("utf-8", "surrogatepass") in {
            text.encode("utf-8", "surrogatepass") for text in (HOSTILE, shown)
        }
        assert page.evaluate("window.hacked === undefined && document.images.length === 0")
        assert "<img src=x" in page.locator("#asked .question").inner_text()
        assert page.title().startswith("</script>")


def test_the_policy_stops_requests_and_other_scripts(browser: Any, file: Path) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"file://{file}")
    _ready(page)
    ended: list[str | None] = []
    page.on("requestfinished", lambda request: ended.append(request.url))
    page.on("requestfailed", lambda request: ended.append(request.failure))
    page.evaluate(
        """() => { const image = new Image(); image.src = 'https://example.org/x.png'; document.body.append(image);
             const script = document.createElement('script'); script.textContent = 'window.hacked = 1';
             document.body.append(script); }"""
    )
    assert page.evaluate("fetch('https://example.org').then(() => 'sent', () => 'stopped')") == "stopped"
    assert page.evaluate("window.hacked === undefined") and set(ended) <= {"csp"}
    context.close()


def test_print_has_every_row(page: Any) -> None:
    page.set_viewport_size({"width": 1280, "height": 200})
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert _documents(page) == list(range(12))
    assert page.locator("#bar").is_hidden()
    scrolling = page.locator(".scroll, figure").evaluate_all(
        "(all) => all.map((one) => getComputedStyle(one).overflowX)"
    )
    assert set(scrolling) == {"visible"}  # paper does not scroll
    tops = page.locator("#rows .row").evaluate_all("(rows) => rows.map((row) => row.getBoundingClientRect().top)")
    assert tops == sorted(set(tops))
    _open(page, 0)
    assert page.locator("#scores").is_hidden() and page.locator("#answers .token").first.is_visible()


def test_a_run_of_another_model_and_one_without_samples(browser: Any, tmp_path: Path) -> None:
    a = write_answers(tmp_path / "hf", [["it is 7"]], model="hf")
    file = _written(tmp_path / "report.html", read_runs([a]))
    for page in _opened(browser, file):
        _open(page, 0)
        assert page.locator("#answers .answer").inner_text() == "it is 7" and page.locator("#player").is_hidden()
        page.keyboard.press("p")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Escape")
        assert page.locator("#comparison").count() == 0 and page.locator("#flags button").count() == 4
    next(a.glob("samples*")).unlink()
    for page in _opened(browser, _written(tmp_path / "report.html", read_runs([a]))):
        assert page.locator("#empty").inner_text() == "No run has samples. Evaluate with --log_samples."
        assert page.locator("#count").inner_text() == "0 of 0 documents"


def test_many_documents_are_quick(browser: Any, tmp_path: Path) -> None:
    runs = read_runs([large_run(tmp_path / str(seed), documents=1319, tokens=8, seed=seed) for seed in (1, 2)])
    for page in _opened(browser, _written(tmp_path / "report.html", runs)):
        timed = """(words) => { const times = [0, 1, 2].map(() => { const begin = performance.now(); choose('q', words);
                     document.body.offsetHeight; return performance.now() - begin; }); return Math.min(...times); }"""
        assert page.evaluate(timed, "e") < 100 and page.locator("#count").inner_text().startswith("1,3")
        assert page.evaluate(timed, "") < 100
        page.evaluate("scrollTo(0, document.body.scrollHeight)")
        page.wait_for_selector('#rows .id:text-is("1318")')
        assert page.locator("#rows .row").count() < 100
        page.evaluate("moveTo(shown[700])")
        assert page.evaluate("document.activeElement.closest('.row').querySelector('.id').textContent") == "700"
        box = page.evaluate("document.activeElement.getBoundingClientRect().top")
        assert 0 < box < 2000


_CONTRASTS = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 0, 255];
  };
  const found = [];
  const root = document.querySelector('dialog[open]') ?? document.body;
  for (const element of root.querySelectorAll('*')) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility() || element.closest(':disabled, script, style')) continue;
    const [a, b] = [parse(getComputedStyle(element).color), behind(element)].map(light).sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push([element.outerHTML.slice(0, 120), ratio]);
  }
  return found;
}"""
"""The visible elements with text whose contrast (WCAG 2.2, 1.4.3) is below 4.5."""

_NAMELESS = """() => {
  const root = document.querySelector('dialog[open]') ?? document.body;
  const kinds = 'a, button, input, select, summary, img, section, [role=img], [role=group], [role=table]';
  const named = (e) => e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.alt
    || [...(e.labels ?? [])].map((label) => label.textContent).join('').trim()
    || (!['INPUT', 'SELECT'].includes(e.tagName) && e.textContent.trim());
  return [...root.querySelectorAll(kinds)].filter((e) => e.checkVisibility() && !named(e)).map((e) => e.outerHTML);
}"""
"""The visible controls and regions without a name."""
