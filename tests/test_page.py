"""judge.html in a real browser: hostile text, filters, keys, links, blind mode, narrow and dark screens; page_html."""
import copy
import json
import re
import shutil
import time
from pathlib import Path

import pytest

from common import write_json
from page_snippet import page_html, write_page

REPO = Path(__file__).parent.parent
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
SKY = "The sky looks blue because air scatters short wavelengths of sunlight more than long ones"
PROMPTS = [  # id, prompt, completion a, completion b, tokens a, tokens b, stopped a, stopped b, verdict ab, ba, score
    ("p-sky", "Why is the sky blue?", SKY + ": blue light reaches us from every side, red mostly straight from the Sun.",
     SKY + ".", 34, 19, True, True, "a", "a", 1),
    ("p-bread", "What makes bread rise?", "Yeast eats sugar and gives off carbon dioxide, which the dough holds as bubbles.",
     "Bread rises in the oven since it is hot there.", 18, 12, True, True, "a", "a", 1),
    ("p-72", "How many hours are there in three days?", "72 hours: 3 × 24 = 72.", "Three days have 48 hours.", 12, 8, True, True,
     "a", "tie", 0.5),
    ("p-mona", "Who painted the Mona Lisa?", "Leonardo da Vinci.", "Leonardo da Vinci.", 7, 7, True, True, "tie", "tie", 0.5),
    ("p-list", "Name three colours, one a line.", "red\ngreen\nblue", "Red, green and blue are three colours.", 6, 10, True, True,
     "a", "b", 0.5),
    ("p-wool", "Which is warmer, wool or cotton?", "It depends on many things. " * 40, "Wool, as a rule: its fibres trap more air.",
     256, 14, False, True, "b", "b", 0),
    ("p-null", "Say nothing.", "", "Nothing.", 1, 3, True, True, None, None, None),
    ("p-half", "Write a haiku about rain.", "Rain on the tin roof\nall night it says the same thing\nand I agree",
     "Rain, rain, rain, rain", 20, 9, True, False, "a", None, 0.5),
]
KEYS = ("id prompt completion_a completion_b tokens_a tokens_b stopped_a stopped_b verdict_ab verdict_ba score").split()


def comparison(a="dpo_v1", b="sft_v2", prompts=PROMPTS, circular_why=None, **judge):
    """A record as judge.py writes it."""
    rows = [dict(zip(KEYS, p)) for p in prompts]
    for row in rows:
        row["prompt"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}]
    scores = [row["score"] for row in rows]
    return {
        "schema_version": 1, "a": a, "b": b,
        "rows": {side: {"name": name, "config_hash": "1a2b3c4d", "adapter_sha256": "5e" * 32, "train_invariants": "ad91ded9"}
                 for side, name in (("a", a), ("b", b))},
        "judge": {"kind": "local", "model": "models/judge-7b", "circular": circular_why is not None,
                  "circular_why": circular_why, "temperature": 0.0} | judge,
        "sampling": {"temperature": 0.7, "top_p": 1.0, "max_new_tokens": 256, "seed": 42}, "prompts_fingerprint": "sha256:0af1",
        "summary": {"n": len(rows), "wins": scores.count(1), "ties": scores.count(0.5), "losses": scores.count(0),
                    "unparsable": scores.count(None), "win_rate": 0.615, "win_rate_ci95": [0.549, 0.678], "tie_rate": 0.5,
                    "position_inconsistency": 0.25, "length_controlled_win_rate": 0.48,
                    "length_controlled_ci95": [0.404, 0.561], "mean_tokens_a": 44.25, "mean_tokens_b": 10.25},
        "cost": {"requests": 2 * len(rows), "prompt_tokens": 5210, "completion_tokens": 16, "seconds": 12.5},
        "prompts": rows}  # fmt: skip


def guardrails_row(name, **values):
    return {"name": name, "config_hash": "1a2b3c4d", "adapter_sha256": "5e" * 32, "train_invariants": "ad91ded9", "n": 8,
            "tokens_mean": 44.25, "tokens_sd": 86.1, "eos_rate": 0.875, "refusal_rate": 0.0, "distinct_1": 0.612,
            "distinct_2": 0.874, "distinct_3": 0.931, "longest_repeat_mean": 6.4, "repetition_rate": 0.125,
            "language_drift_rate": 0.0, "kl_sft": 11.62, "kl_sft_se": 0.84, "delta_w": 0.0123} | values  # fmt: skip


GUARDRAILS = {
    "schema_version": 1, "sampling": {"temperature": 0.7, "top_p": 1.0, "max_new_tokens": 256, "seed": 42},
    "prompts_fingerprint": "sha256:0af1", "n_prompts": 8,
    "rows": [guardrails_row("sft_v2", kl_sft=0.0, kl_sft_se=0.0), guardrails_row("dpo_v1"),
             guardrails_row("sft_v2_bo4", kl_sft=0.636, kl_sft_se=None, kl_sft_bound=True, delta_w=None)],
}  # fmt: skip
RECORDS = {
    "dpo_v1_vs_sft_v2": comparison(),
    "dpo_v1_vs_sft_v2.rm_v1": comparison(prompts=PROMPTS[:3], kind="reward", model="runs/rm_v1",
                                         circular_why="runs/rm_v1 is the reward model that ppo_v1 was trained against"),
    "ppo_v1_vs_sft_v2": comparison("ppo_v1", prompts=PROMPTS[::-1]),
}
EVIL = ("</script><script>window.pwned = 1</script>", "<!--", "--><img src=x onerror='window.pwned = 2'>", "<!--<script>",
        "<svg onload=window.pwned=3>", "<img src='http://127.0.0.1:9/x.png'>", "\u2028\u2029\u0085\x00\x0b\r\n\ud800",
        "&lt;b&gt; &#x3c;i&#x3e;", "</p></article></body></html>", "javascript:window.pwned=4", "\"'`${window.pwned=5}`",
        "\\u003c/script>", "]]>", "שלום עולם \u202eevil\u202c مرحبا")


def write(results, records=RECORDS, guardrails=GUARDRAILS):
    """index.html of these records, written as judge.py does it; its path."""
    for name, record in records.items():
        write_ascii(results / "judge" / f"{name}.json", record)
    if guardrails:
        write_ascii(results / "judge" / "guardrails.json", guardrails)
    write_page(results)
    return results / "judge" / "index.html"


def write_ascii(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))  # a lone surrogate has no UTF-8


# -- the browser ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -r requirements-test.lock")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (Debian: apt-get install chromium-headless-shell)")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, tmp_path):
    """open(file, hash, **context options) -> a page; at the end none has said an error, shown a dialog or asked for more."""
    contexts, said, requests, files = [], [], [], set()

    def open_page(file, place="", **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
        contexts.append(context)
        context.set_default_timeout(10_000)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url.split("#")[0]))
        page.on("popup", lambda popup: said.append(popup.url))
        files.add(file.as_uri())
        page.goto(file.as_uri() + place)
        return page
    yield open_page
    for context in contexts:
        context.close()
    assert said == [] and set(requests) == files


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write(tmp_path_factory.mktemp("results"))


def count(page):
    return page.get_by_role("status").inner_text()


def place(page):
    return page.url.partition("#")[2]


def completions(page):
    return page.locator("#answers .text").evaluate_all("texts => texts.map(text => text.textContent)")


def listed(page):
    """Ids of the prompts in the list, by their texts."""
    ids = {p[1]: p[0] for p in PROMPTS}
    return [ids[text] for text in page.locator("#list span:last-child").all_inner_texts()]


# -- page_html, write_page ------------------------------------------------------------------------

def test_the_records_come_back_from_the_page():
    """One data element, in ASCII, that ends where it should: what a browser reads in it is what was given."""
    records = [{"file": "evil", **comparison(prompts=[(f"p-{i}", text, text, text[::-1], 1, 1, True, True, "a", "a", 1)
                                                      for i, text in enumerate(EVIL)])}]
    html = page_html(records, GUARDRAILS)
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert json.loads(data) == {"comparisons": records, "guardrails": GUARDRAILS}
    assert data.isascii() and "<" not in data
    assert html.replace(data, "null") == (REPO / "judge.html").read_text()


def test_write_page_takes_the_comparisons_in_the_order_of_their_names(tmp_path):
    (tmp_path / "judge" / "cache").mkdir(parents=True)
    write_json(tmp_path / "judge" / "cache" / "x_vs_y.json", {"not": "a comparison"})
    index = write(tmp_path, dict(reversed(RECORDS.items())))
    first = index.read_bytes()
    (data,) = re.findall(r'id="data">(.*?)</script>', first.decode(), re.S)
    assert [c["file"] for c in json.loads(data)["comparisons"]] == sorted(RECORDS)
    assert json.loads(data)["guardrails"] == GUARDRAILS
    write_page(tmp_path)
    assert index.read_bytes() == first
    assert sorted(p.name for p in index.parent.iterdir()) == sorted(
        ["cache", "guardrails.json", "index.html", *(f"{name}.json" for name in RECORDS)])


def test_a_record_that_is_not_json_is_named(tmp_path, capsys):
    index = write(tmp_path)
    before = index.read_bytes()
    (tmp_path / "judge" / "kto_v1_vs_sft_v2.json").write_text("{")
    with pytest.raises(SystemExit):
        write_page(tmp_path)
    assert "kto_v1_vs_sft_v2.json is not JSON" in capsys.readouterr().err
    assert index.read_bytes() == before


# -- what a person sees ---------------------------------------------------------------------------

def test_nothing_to_compare_is_said(opened, tmp_path):
    for name, html in (("empty.html", page_html([], None)), ("template.html", (REPO / "judge.html").read_text())):
        (tmp_path / name).write_text(html)
        page = opened(tmp_path / name)
        assert page.get_by_text("Nothing to compare yet").is_visible()
        assert page.get_by_role("button").count() == page.get_by_role("combobox").count() == page.get_by_role("table").count() == 0
        page.keyboard.press("j")
        page.keyboard.press("b")
    page = opened(write(tmp_path, {}))
    assert page.get_by_text("Nothing to compare yet").is_visible() and page.get_by_role("table").is_visible()
    page = opened(write(tmp_path, {"a_vs_b": comparison(prompts=[])}))
    assert count(page) == "No prompt of 0 matches."


def test_summary_of_each_comparison(opened, index):
    page = opened(index)
    summary = page.locator("#summary")
    assert page.get_by_label("Comparison").locator("option").all_inner_texts() == [
        "dpo_v1 against sft_v2, by models/judge-7b", "dpo_v1 against sft_v2, by runs/rm_v1", "ppo_v1 against sft_v2"]
    text = summary.inner_text()
    for part in ("8 prompts, judged by models/judge-7b", "61.5 % [54.9, 67.8]", "above 50 %: dpo_v1 is preferred", "48.0 % [40.4, 56.1]",
                 "not told from 50 %", "orders disagree 25.0 %", "dpo_v1 wins 2 25.0 %", "ties 4 50.0 %", "sft_v2 wins 1 12.5 %",
                 "unparsable 1 12.5 %", "44.3 tokens (dpo_v1) and 10.3 (sft_v2)"):
        assert part in re.sub(r"\s+", " ", text), part
    widths = page.locator("#bar > div").evaluate_all("parts => parts.map(part => part.getBoundingClientRect().width)")
    assert [round(w / widths[0], 1) for w in widths] == [1, 2, 0.5, 0.5]
    assert page.get_by_text("Circular").count() == 1 and not page.get_by_text("Circular").is_visible()
    summary.get_by_text("How it was made").click()
    for part in ("temperature 0.7", "at most 256 tokens", "seed 42", "16 requests", "sha256:0af1", "1a2b3c4d"):
        assert part in summary.inner_text(), part
    page.get_by_label("Comparison").select_option("dpo_v1 against sft_v2, by runs/rm_v1")
    assert "3 prompts, judged by runs/rm_v1 (a reward model)" in summary.inner_text()
    assert "runs/rm_v1 is the reward model that ppo_v1 was trained against" in page.get_by_text("Circular").inner_text()


def test_guardrails_of_each_row(opened, index):
    page = opened(index)
    table = page.get_by_role("table")
    cells = [row.locator("th, td").all_inner_texts() for row in table.locator("tr").all()]
    assert [row[0] for row in cells] == ["row", "sft_v2", "dpo_v1", "sft_v2_bo4"]
    assert cells[2] == ["dpo_v1", "44.3 ± 86.1", "87.5 %", "0.0 %", "12.5 %", "6.4", "0.612", "0.874", "0.931", "0.0 %",
                        "11.62 ± 0.84", "1.2 %"]
    assert cells[3][-2:] == ["≤ 0.64", "–"]


def test_one_prompt(opened, index):
    """Both answers, their lengths, the verdict in both orders, the marks."""
    page = opened(index, "#dpo_v1_vs_sft_v2/p-wool")
    assert completions(page) == [PROMPTS[5][2], PROMPTS[5][3]]
    a, b = [article.inner_text() for article in page.locator("article").all()]
    assert "dpo_v1" in a and "256 tokens, 242 more" in a and "EOS missing" in a and "preferred" not in a
    assert "sft_v2" in b and "14 tokens" in b and "more" not in b and "EOS missing" not in b and "preferred" in b
    assert page.locator("#messages").inner_text().split("\n") == ["system", "Be brief.", "user", PROMPTS[5][1]]
    verdicts = {"p-wool": "Judge: sft_v2 wins · dpo_v1 shown first: sft_v2 · sft_v2 shown first: sft_v2",
                "p-72": "Judge: tie · dpo_v1 shown first: dpo_v1 · sft_v2 shown first: tie",
                "p-half": "Judge: tie · dpo_v1 shown first: dpo_v1 · sft_v2 shown first: unparsable",
                "p-null": "Judge: unparsable · dpo_v1 shown first: unparsable · sft_v2 shown first: unparsable",
                "p-mona": "Judge: tie · dpo_v1 shown first: tie · sft_v2 shown first: tie · The answers are identical."}
    for name, verdict in verdicts.items():
        page.evaluate("place => { location.hash = place }", f"#dpo_v1_vs_sft_v2/{name}")
        page.wait_for_function("name => document.querySelector('#messages').textContent.includes(name)",
                               arg=dict((p[0], p[1]) for p in PROMPTS)[name])
        assert page.locator("#verdict").inner_text() == verdict
    page.evaluate("location.hash = '#dpo_v1_vs_sft_v2/p-null'")
    page.get_by_text("(empty)").wait_for()
    page.evaluate("location.hash = '#dpo_v1_vs_sft_v2/p-sky'")
    page.get_by_text("Greyed: the same in both.").first.wait_for()
    assert page.locator(".shared").all_inner_texts() == [SKY.rpartition(" ")[0] + " "] * 2
    assert completions(page) == [PROMPTS[0][2], PROMPTS[0][3]]


@pytest.mark.parametrize("width", [1280, 320])
def test_hostile_text_is_only_text(opened, tmp_path, width):
    """In prompts, completions, ids, names: shown letter by letter, nothing runs, nothing is fetched (see `opened`)."""
    texts = [*EVIL, "".join(EVIL), "x" * 100_000, "word " * 20_000]
    prompts = [(f"{text[:30]}/{i}#%", text, text, text[::-1], 1, 1, True, True, "a", "a", 1) for i, text in enumerate(texts)]
    record = comparison(a="<img src=x onerror=window.pwned=6>", b="</script><b>b", prompts=prompts, circular_why=EVIL[0],
                        model="<script>window.pwned=7</script>")
    guardrails = copy.deepcopy(GUARDRAILS)
    guardrails["rows"][0]["name"] = EVIL[2]
    file = write(tmp_path, {"evil_vs_good": record}, guardrails)
    page = opened(file, viewport={"width": width, "height": 700})
    elements = page.evaluate("document.querySelectorAll('img, svg, iframe, script').length")
    assert elements == 2
    for i, text in enumerate(texts):
        shown = page.evaluate("[...document.querySelectorAll('#reader .text')].map(text => [...text.textContent].map(c => c.codePointAt()))")
        assert shown == [[ord(c) for c in part] for part in ("Be brief.", text, text, text[::-1])]
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        if i < len(texts) - 1:
            page.keyboard.press("j")
    assert "x onerror" in page.locator("#versus").inner_text() and EVIL[2] in page.get_by_role("table").inner_text()
    link = page.url
    page.get_by_label("Search").fill("onerror='window")
    assert count(page) == "Prompt 1 of 2, 17 in all"
    assert page.evaluate("[window.pwned, document.querySelectorAll('img, svg, iframe, script').length]") == [None, 2]
    page = opened(file, "#" + link.partition("#")[2], viewport={"width": width, "height": 700})
    assert count(page) == f"Prompt {len(texts)} of {len(texts)}"


def test_filters_search_and_order(opened, index):
    page = opened(index)
    buttons = page.get_by_role("group", name="Verdict").get_by_role("button")
    assert buttons.all_inner_texts() == ["all 8", "dpo_v1 wins 2", "ties 4", "sft_v2 wins 1", "unparsable 2", "orders disagree 2"]
    expected = {"dpo_v1 wins": ["p-sky", "p-bread"], "ties": ["p-72", "p-mona", "p-list", "p-half"], "sft_v2 wins": ["p-wool"],
                "unparsable": ["p-null", "p-half"], "orders disagree": ["p-72", "p-list"], "all": [p[0] for p in PROMPTS]}
    for label, ids in expected.items():
        page.get_by_role("button", name=re.compile(f"^{label} \\d")).click()
        assert listed(page) == ids
        assert count(page).startswith(f"Prompt {ids.index(place(page).split('/')[1]) + 1} of {len(ids)}")
        assert page.get_by_role("group", name="Verdict").locator("[aria-pressed=true]").all_inner_texts() == [f"{label} {len(ids)}"]
    page.get_by_label("Order").select_option("dpo_v1 longer first")
    assert listed(page) == ["p-wool", "p-sky", "p-half", "p-bread", "p-72", "p-mona", "p-null", "p-list"]
    page.get_by_label("Order").select_option("sft_v2 longer first")
    assert listed(page) == ["p-list", "p-null", "p-mona", "p-72", "p-bread", "p-half", "p-sky", "p-wool"]
    page.get_by_label("Order").select_option("as judged")
    search = page.get_by_label("Search")
    for query, ids in {"BREAD": ["p-bread"], "leonardo": ["p-mona"], "rain": ["p-half"], " 3 × 24 ": ["p-72"], "?": [
            "p-sky", "p-bread", "p-72", "p-mona", "p-wool"], "a.b": [], "[": []}.items():
        search.fill(query)
        assert listed(page) == ids
        assert count(page) == (f"Prompt 1 of {len(ids)}, 8 in all" if ids else "No prompt of 8 matches.")
        assert page.locator("#answers").is_visible() is bool(ids)
    search.fill("rain")
    assert page.evaluate("[...CSS.highlights.get('found')].map(range => range.toString())") == ["rain", "Rain", "Rain", "rain", "rain", "rain"]
    page.get_by_role("button", name=re.compile("^dpo_v1 wins")).click()  # together with the search
    assert listed(page) == []
    search.press("Escape")
    assert listed(page) == ["p-sky", "p-bread"] and not page.evaluate("CSS.highlights.has('found')")


def test_keys(opened, index):
    page = opened(index)
    order = [p[0] for p in PROMPTS]

    def at():
        return order.index(place(page).split("/")[1])
    for key, expected in [("j", 1), ("ArrowRight", 2), ("k", 1), ("ArrowLeft", 0), ("k", 0), ("Control+j", 0), ("ArrowDown", 0)]:
        page.keyboard.press(key)
        assert at() == expected, key
        assert completions(page)[0] == PROMPTS[expected][2]
    assert page.get_by_role("button", name="Previous").is_disabled()
    page.keyboard.press("/")
    page.keyboard.type("jkbr")
    assert page.get_by_label("Search").input_value() == "jkbr" and listed(page) == []
    page.keyboard.press("Escape")
    assert page.get_by_label("Search").input_value() == "" and listed(page) == order
    page.get_by_role("button", name=re.compile("^all ")).click()  # focus on a button doesn't take the keys away
    page.keyboard.press("j")
    assert at() == 1
    page.locator("#list button").nth(3).click()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert at() == 5 and page.evaluate("document.activeElement.innerText").endswith(PROMPTS[5][1])
    page.keyboard.press("ArrowUp")
    assert at() == 4
    for _ in order:
        page.get_by_role("button", name="Next").click(force=True)
    assert at() == 7 and page.get_by_role("button", name="Next").is_disabled()
    assert page.locator("#list [tabindex='0']").count() == page.locator("[aria-current]").count() == 1


def test_links(opened, index):
    page = opened(index, "#ppo_v1_vs_sft_v2/p-72")
    assert count(page) == "Prompt 6 of 8" and page.title() == "Completions side by side: ppo_v1 against sft_v2"
    page.get_by_label("Comparison").select_option("dpo_v1 against sft_v2, by runs/rm_v1")
    assert place(page) == "dpo_v1_vs_sft_v2.rm_v1/p-72"  # the same prompt in the other comparison
    page.keyboard.press("k")
    link = place(page)
    assert link == "dpo_v1_vs_sft_v2.rm_v1/p-bread"
    page.get_by_label("Search").fill("sky")
    page.evaluate("location.hash = '#dpo_v1_vs_sft_v2/p-list'")  # a link leads to its prompt whatever was searched for
    page.wait_for_function("document.title.length && document.querySelector('#count').textContent === 'Prompt 5 of 8'")
    assert completions(page)[0] == "red\ngreen\nblue"
    assert completions(opened(index, "#" + link))[0] == PROMPTS[1][2]
    for unknown in ("#nowhere/p-72", "#dpo_v1_vs_sft_v2/nothing", "#%E0%A4%A", "#blind-99/p-72", "#blind-0", "#"):
        assert count(opened(index, unknown)).startswith("Prompt ")


NAMES = re.compile(r"dpo|ppo|sft|rm_v1|judge-7b|wins|tie|unparsable|preferred|disagree|%|shown first|circular", re.I)


def test_blind_mode_hides_names_verdicts_and_figures(opened, index):
    page = opened(index)
    page.get_by_label("Order").select_option("dpo_v1 longer first")
    assert NAMES.search(page.locator("body").inner_text())
    page.get_by_role("button", name="Blind").click()
    assert page.get_by_role("button", name="Blind").get_attribute("aria-pressed") == "true"
    left = {}
    for comparison_number, name in enumerate(sorted(RECORDS)):
        page.get_by_label("Comparison").select_option(f"number {comparison_number + 1}")
        prompts = {p["id"]: p for p in RECORDS[name]["prompts"]}
        while page.get_by_role("button", name="Previous").is_enabled():
            page.keyboard.press("k")
        for id in prompts:  # in the order of the file
            assert place(page) == f"blind-{comparison_number + 1}/{id}"
            for text in (page.locator("body").inner_text(), page.locator("body").aria_snapshot(), page.title()):
                assert not NAMES.search(text), NAMES.search(text)
            answers = [article.locator("h3").inner_text() for article in page.locator("article").all()]
            assert answers == ["Answer 1", "Answer 2"] and page.locator("article[class*=wins]").count() == 0
            before = completions(page)
            assert sorted(before) == sorted(filter(None, (prompts[id]["completion_a"], prompts[id]["completion_b"])))
            page.keyboard.press("r")
            assert completions(page) == before  # the answers stay where they are
            assert page.locator("#verdict").inner_text().startswith("Judge: ") and not page.locator("#summary").is_visible()
            names = [article.locator("h3").inner_text() for article in page.locator("article").all()]
            side = {RECORDS[name]["a"]: "completion_a", RECORDS[name]["b"]: "completion_b"}
            assert [prompts[id][side[n]] for n in names if prompts[id][side[n]]] == before
            left[name, id] = names[0] == RECORDS[name]["a"]
            page.keyboard.press("j")
    assert 0.2 < sum(left.values()) / len(left) < 0.8  # neither row has a side of its own
    page.reload()
    assert not NAMES.search(page.locator("body").inner_text())  # the link keeps it
    page.get_by_role("button", name="Reveal").click()
    assert (page.locator("h3").first.inner_text() == "ppo_v1") is left["ppo_v1_vs_sft_v2", PROMPTS[0][0]]
    page.keyboard.press("b")
    assert [h.inner_text() for h in page.locator("h3").all()] == ["ppo_v1", "sft_v2"] and page.locator("#summary").is_visible()


# -- screens --------------------------------------------------------------------------------------

@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_sideways_scroll_and_answers_stack_on_a_phone(opened, index, width):
    page = opened(index, "#dpo_v1_vs_sft_v2/p-wool", viewport={"width": width, "height": 700})
    page.locator("summary").click()
    page.get_by_label("Comparison").select_option("dpo_v1 against sft_v2, by runs/rm_v1")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    first, second = [article.bounding_box() for article in page.locator("article").all()]
    if width < 700:
        assert second["y"] >= first["y"] + first["height"] and first["x"] == second["x"] and first["width"] > 0.85 * width
    else:
        assert second["y"] == first["y"] and second["x"] >= first["x"] + first["width"]
    page.keyboard.press("j")
    page.keyboard.press("b")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


# Ratio of every visible text to what is behind it, by WCAG 2's formula; {text: ratio}
CONTRAST = """() => {
  const parts = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const found = {}, walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), element = walker.currentNode.parentElement;
    if (!text || !element.checkVisibility() || element.closest("script, option")) continue;
    let behind = element;
    while (parts(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const [low, high] = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor].map(c => luminance(parts(c)))
      .sort((a, b) => a - b);
    found[text.slice(0, 40)] = (high + 0.05) / (low + 0.05);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(opened, index, scheme):
    page = opened(index, "#dpo_v1_vs_sft_v2/p-sky", color_scheme=scheme)
    backgrounds = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", backgrounds)[:3])) < 60) is (scheme == "dark")
    page.locator("summary").click()
    seen = {}
    for _ in PROMPTS:
        seen |= page.evaluate(CONTRAST)
        page.keyboard.press("j")
    page.get_by_label("Comparison").select_option("dpo_v1 against sft_v2, by runs/rm_v1")
    seen |= page.evaluate(CONTRAST)
    page.keyboard.press("b")
    seen |= page.evaluate(CONTRAST)
    assert {"Guardrails", "EOS missing", "✓ preferred", "dpo_v1", "Answer 1", "EOS missing"} <= seen.keys() and len(seen) > 80
    assert {text: ratio for text, ratio in seen.items() if ratio < 4.5} == {}


def test_every_control_has_a_name_and_the_focus_is_seen(opened, index):
    page = opened(index)
    names = page.evaluate("""[...document.querySelectorAll("button, select, input, [tabindex='0']")].filter(e => e.checkVisibility())
        .map(e => (e.labels?.[0] ?? e).innerText || e.getAttribute("aria-label") || e.getAttribute("aria-labelledby"))""")
    assert len(names) > 15 and all(names)
    stops = []
    for _ in range(20):
        page.keyboard.press("Tab")
        outline, width, tag = page.evaluate("""(style => [style.outlineStyle, style.outlineWidth, document.activeElement.id ||
            document.activeElement.tagName])(getComputedStyle(document.activeElement))""")
        if tag == "BODY":
            break
        assert outline == "solid" and width == "3px", tag
        stops.append(tag)
    assert {"pair", "blind", "search", "sort", "messages", "next", "SUMMARY"} <= set(stops)


def test_seven_comparisons_of_two_hundred_prompts_are_quick(opened, tmp_path):
    """One list and one prompt are built, not all of them; opening and forty steps take moments."""
    prompts = [(f"p{i}", f"Prompt {i}? " + "why " * 60, f"A{i} " + "some words " * 200, f"B{i} " + "other words " * 200, 400, 400, True,
                True, "a", "b", 0.5) for i in range(200)]
    file = write(tmp_path, {f"row{i}_vs_sft_v2": comparison(f"row{i}", prompts=prompts) for i in range(7)})
    assert file.stat().st_size > 5e6
    started = time.perf_counter()
    page = opened(file)
    assert count(page) == "Prompt 1 of 200"
    assert page.locator("#answers .text").count() == 2 and page.evaluate("document.querySelectorAll('*').length") < 1200
    for _ in range(20):
        page.keyboard.press("j")
    page.get_by_label("Search").fill("A19")
    assert count(page) == "Prompt 1 of 11, 200 in all"
    for number in range(7):
        page.get_by_label("Comparison").select_option(str(number))
    assert time.perf_counter() - started < 10
