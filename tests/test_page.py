"""judge.html in a real browser: hostile text, filters, keys, links, blind mode, narrow and dark screens; page_html."""

import copy
import json
import re
import shutil
import time
from pathlib import Path

import pytest

from common import write_json
from judge import page_html, write_page

REPO = Path(__file__).parent.parent
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
SKY = "The sky looks blue because air scatters short wavelengths of sunlight more than long"
PROMPTS = [  # id, prompt, answers of a and b, their tokens, whether they stopped, verdicts in both orders, score
    ("p-sky", "Why is the sky blue?", f"{SKY} ones, so blue reaches us from every side.", f"{SKY} wavelengths.",
     34, 19, True, True, "a", "a", 1),
    ("p-bread", "What makes bread rise?", "Yeast eats sugar and gives off gas, which the dough holds as bubbles.",
     "Bread rises in the oven since it is hot there.", 18, 12, True, True, "a", "a", 1),
    ("p-72", "How many hours are there in three days?", "72 hours: 3 × 24 = 72.", "Three days have 48 hours.",
     12, 8, True, True, "a", "tie", 0.5),
    ("p-mona", "Who painted the Mona Lisa?", "Leonardo da Vinci.", "Leonardo da Vinci.",
     7, 7, True, True, "tie", "tie", 0.5),
    ("p-list", "Name three colours, one a line.", "red\ngreen\nblue", "Red, green and blue are three colours.",
     6, 10, True, True, "a", "b", 0.5),
    ("p-wool", "Which is warmer, wool or cotton?", "It depends on many things. " * 40, "Wool: its fibres trap air.",
     256, 14, False, True, "b", "b", 0),
    ("p-null", "Say nothing.", "", "Nothing.", 1, 3, True, True, None, None, None),
    ("p-half", "Write a haiku about rain.", "Rain on the tin roof\nall night it says the same thing\nand I agree",
     "Rain, rain, rain, rain", 20, 9, True, False, "a", None, 0.5),
]  # fmt: skip
IDS = [p[0] for p in PROMPTS]
KEYS = "id prompt completion_a completion_b tokens_a tokens_b stopped_a stopped_b verdict_ab verdict_ba score".split()
SAMPLING = {"temperature": 0.7, "top_p": 1.0, "max_new_tokens": 256, "seed": 42}


def comparison(a="dpo_v1", b="sft_v2", prompts=PROMPTS, circular_why=None, **judge):
    """A record as judge.py writes it."""
    hashes = {"config_hash": "1a2b3c4d", "adapter_sha256": "5e" * 32, "train_invariants": "ad91ded9"}
    rows = [dict(zip(KEYS, p)) for p in prompts]
    for row in rows:
        row["prompt"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}]
    scores = [row["score"] for row in rows]
    return {
        "schema_version": 1, "a": a, "b": b, "rows": {"a": {"name": a, **hashes}, "b": {"name": b, **hashes}},
        "judge": {"kind": "local", "model": "models/judge-7b", "circular": circular_why is not None,
                  "circular_why": circular_why, "temperature": 0.0, **judge},
        "sampling": SAMPLING, "prompts_fingerprint": "sha256:0af1",
        "summary": {"n": len(rows), "wins": scores.count(1), "ties": scores.count(0.5), "losses": scores.count(0),
                    "unparsable": scores.count(None), "win_rate": 0.615, "win_rate_ci95": [0.549, 0.678],
                    "tie_rate": 0.5, "position_inconsistency": 0.25, "length_controlled_win_rate": 0.48,
                    "length_controlled_ci95": [0.404, 0.561], "mean_tokens_a": 44.25, "mean_tokens_b": 10.25},
        "cost": {"requests": 2 * len(rows), "prompt_tokens": 5210, "completion_tokens": 16, "seconds": 12.5},
        "prompts": rows,
    }  # fmt: skip


def guardrails_row(name, **values):
    return {
        "name": name, "config_hash": "1a2b3c4d", "adapter_sha256": "5e" * 32, "train_invariants": "ad91ded9", "n": 8,
        "tokens_mean": 44.25, "tokens_sd": 86.1, "eos_rate": 0.875, "refusal_rate": 0.0, "distinct_1": 0.612,
        "distinct_2": 0.874, "distinct_3": 0.931, "longest_repeat_mean": 6.4, "repetition_rate": 0.125,
        "language_drift_rate": 0.0, "kl_sft": 11.62, "kl_sft_se": 0.84, "delta_w": 0.0123, **values,
    }  # fmt: skip


GUARDRAILS = {
    "schema_version": 1, "sampling": SAMPLING, "prompts_fingerprint": "sha256:0af1", "n_prompts": 8,
    "rows": [guardrails_row("sft_v2", kl_sft=0.0, kl_sft_se=0.0), guardrails_row("dpo_v1"),
             guardrails_row("sft_v2_bo4", kl_sft=0.636, kl_sft_se=None, kl_sft_bound=True, delta_w=None)],
}  # fmt: skip
WHY = "runs/rm_v1 is the reward model that ppo_v1 was trained against"
RECORDS = {
    "dpo_v1_vs_sft_v2": comparison(),
    "dpo_v1_vs_sft_v2.rm_v1": comparison(prompts=PROMPTS[:3], kind="reward", model="runs/rm_v1"),
    "ppo_v1_vs_sft_v2": comparison("ppo_v1", prompts=PROMPTS[::-1], circular_why=WHY),
}
EVIL = ("</script><script>window.pwned=1</script>", "<!--", "--><img src=x onerror='window.pwned=2'>", "<!--<script>",
        "<svg onload=window.pwned=3>", "<img src='http://127.0.0.1:9/x.png'>", "\u2028\u2029\u0085\x00\x0b\r\n\ud800",
        "&lt;b&gt; &#x3c;i&#x3e;", "</p></article></body></html>", "javascript:window.pwned=4",
        "\"'`${window.pwned=5}`", "\\u003c/script>", "]]>", "שלום עולם \u202eevil\u202c مرحبا")  # fmt: skip


def write(results, records=RECORDS, guardrails=GUARDRAILS):
    """index.html of these records, written as judge.py does it; its path."""
    results.mkdir(parents=True, exist_ok=True)
    for name, record in {**records, **({"guardrails": guardrails} if guardrails else {})}.items():
        (results / f"{name}.json").write_text(json.dumps(record))  # ASCII: a lone surrogate has no UTF-8
    write_page(results)
    return results / "index.html"


def records_in(html):
    """What a browser would find in the page's data element."""
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return data, json.loads(data)


# -- page_html, write_page ------------------------------------------------------------------------


def test_the_records_come_back_from_the_page():
    """One data element, in ASCII, that ends where it should; nothing else of the template changes."""
    prompts = [(f"p-{i}", text, text, text[::-1], 1, 1, True, True, "a", "a", 1) for i, text in enumerate(EVIL)]
    records = [{"file": "evil", **comparison(prompts=prompts)}]
    html = page_html(records, GUARDRAILS)
    data, found = records_in(html)
    assert found == {"comparisons": records, "guardrails": GUARDRAILS}
    assert data.isascii() and "<" not in data
    assert html.replace(data, "null") == (REPO / "judge.html").read_text()


def test_write_page_takes_the_comparisons_in_the_order_of_their_names(tmp_path):
    (tmp_path / "cache").mkdir(parents=True)
    write_json(tmp_path / "cache" / "x_vs_y.json", {"not": "a comparison"})
    index = write(tmp_path, dict(reversed(RECORDS.items())))
    first = index.read_bytes()
    _, found = records_in(first.decode())
    assert [c.pop("file") for c in found["comparisons"]] == sorted(RECORDS)
    assert found == {"comparisons": [RECORDS[name] for name in sorted(RECORDS)], "guardrails": GUARDRAILS}
    write_page(tmp_path)
    assert index.read_bytes() == first
    names = ["cache", "guardrails.json", "index.html", *(f"{name}.json" for name in RECORDS)]
    assert sorted(p.name for p in index.parent.iterdir()) == sorted(names)


def test_a_record_that_is_not_json_is_named(tmp_path, capsys):
    index = write(tmp_path)
    before = index.read_bytes()
    (tmp_path / "kto_v1_vs_sft_v2.json").write_text("{")
    with pytest.raises(SystemExit):
        write_page(tmp_path)
    assert "kto_v1_vs_sft_v2.json is not JSON" in capsys.readouterr().err
    assert index.read_bytes() == before


# -- the browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: requirements-test.lock has it")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} (Debian: apt-get install chromium-headless-shell)")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """opened(file, hash, **options) -> a page. In the end none has said anything on its console, shown a dialog, opened
    a window or asked for more than its file."""
    contexts, said, requested, files = [], [], set(), set()

    def open_page(file, place="", **options):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
        contexts.append(context)
        context.set_default_timeout(10_000)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("popup", lambda popup: said.append(popup.url))
        page.on("request", lambda request: requested.add(request.url.split("#")[0]))
        files.add(file.as_uri())
        page.goto(file.as_uri() + place)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == [] and requested == files


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write(tmp_path_factory.mktemp("results"))


def count(page):
    return page.get_by_role("status").inner_text()


def place(page):
    """What stands behind # in the page's address, asked of the page itself: page.url may lag behind under load."""
    return page.evaluate("location.hash.slice(1)")


def completions(page):
    return page.locator("#answers .text").evaluate_all("texts => texts.map(text => text.textContent)")


def headings(page):
    return page.locator("#answers h3").all_inner_texts()


def listed(page):
    """Ids of the prompts in the list, by their texts."""
    ids = {p[1]: p[0] for p in PROMPTS}
    return [ids[text] for text in page.locator("#list [dir=auto]").all_inner_texts()]


def follow(page, link):
    """A link to another place in the page, as from its address bar."""
    page.evaluate("link => { location.hash = link }", link)
    page.wait_for_function("link => location.hash === '#' + link && document.title", arg=link)


# -- what a person sees ---------------------------------------------------------------------------


def test_nothing_to_compare_is_said(opened, tmp_path):
    for name, html in (("empty.html", page_html([], None)), ("template.html", (REPO / "judge.html").read_text())):
        (tmp_path / name).write_text(html)
        page = opened(tmp_path / name)
        page.keyboard.press("j")
        page.keyboard.press("b")
        assert page.locator("body").inner_text().split("\n\n")[0] == "Completions side by side"
        assert page.get_by_text("Nothing to compare yet").is_visible()
        roles = ("button", "combobox", "searchbox", "table", "status")
        assert not any(page.get_by_role(role).count() for role in roles)
    page = opened(write(tmp_path, {}))
    assert page.get_by_text("Nothing to compare yet").is_visible() and page.get_by_role("table").is_visible()
    page = opened(write(tmp_path / "no_prompts", {"a_vs_b": comparison(prompts=[])}, None))
    assert count(page) == "No prompt of 0 matches." and not page.get_by_role("table").is_visible()


def test_summary_of_each_comparison(opened, index):
    page = opened(index)
    assert page.get_by_label("Comparison").locator("option").all_inner_texts() == [
        "dpo_v1 against sft_v2, by models/judge-7b", "dpo_v1 against sft_v2, by runs/rm_v1", "ppo_v1 against sft_v2"]
    page.get_by_text("How it was made").click()
    text = re.sub(r"\s+", " ", page.locator("#summary").inner_text())
    for part in ("8 prompts, judged by models/judge-7b (a local model)", "Win rate 61.5 % [54.9, 67.8]",
                 "above 50 %: dpo_v1 is preferred", "Length-controlled 48.0 % [40.4, 56.1]", "not told from 50 %",
                 "Orders disagree 25.0 %", "dpo_v1 wins 2 25.0 %", "ties 4 50.0 %", "sft_v2 wins 1 12.5 %",
                 "unparsable 1 12.5 %", "44.3 tokens (dpo_v1), 10.3 (sft_v2)", "temperature 0.7", "top-p 1",
                 "at most 256 tokens", "seed 42", "16 requests", "5,210 tokens", "sha256:0af1", "1a2b3c4d"):
        assert part in text, part
    widths = page.locator("#bar > div").evaluate_all("parts => parts.map(part => part.getBoundingClientRect().width)")
    assert [round(w / widths[0], 1) for w in widths] == [1, 2, 0.5, 0.5]
    assert not page.get_by_role("note").is_visible()
    page.get_by_label("Comparison").select_option("dpo_v1 against sft_v2, by runs/rm_v1")
    assert "3 prompts, judged by runs/rm_v1 (a reward model)" in page.locator("#summary").inner_text()
    page.get_by_label("Comparison").select_option("ppo_v1 against sft_v2")
    assert page.get_by_role("note").inner_text() == f"Circular judge, no evidence of quality: {WHY}"


@pytest.mark.parametrize("ci, reading", [([0.51, 0.6], "above 50 %: dpo_v1 is preferred"),
                                         ([0.5, 0.6], "not told from 50 %"),
                                         ([0.4, 0.49], "below 50 %: sft_v2 is preferred"), ([None, None], "no interval")])
def test_what_an_interval_says(opened, tmp_path, ci, reading):
    record = comparison()
    rate = None if None in ci else sum(ci) / 2
    record["summary"] |= {"win_rate_ci95": ci, "win_rate": rate, "position_inconsistency": None}
    page = opened(write(tmp_path, {"dpo_v1_vs_sft_v2": record}))
    assert page.locator("#rates .muted").first.inner_text() == reading
    assert "Orders disagree –" in page.locator("#summary").inner_text()
    assert page.locator("#rates .point").count() == (1 if rate is None else 2)


def test_guardrails_of_each_row(opened, index):
    page = opened(index)
    rows = [row.locator("th, td").all_inner_texts() for row in page.get_by_role("table").locator("tr").all()]
    assert [row[0] for row in rows] == ["row", "sft_v2", "dpo_v1", "sft_v2_bo4"]
    assert dict(zip(rows[0], rows[2])) == {
        "row": "dpo_v1", "tokens ± sd": "44.3 ± 86.1", "ends with EOS": "87.5 %", "refusals": "0.0 %",
        "loops": "12.5 %", "longest repeat": "6.4", "distinct 1": "0.612", "distinct 2": "0.874", "distinct 3": "0.931",
        "other language": "0.0 %", "KL to SFT": "11.62 ± 0.84", "‖ΔW‖ / ‖W‖": "1.2 %"}  # fmt: skip
    assert rows[3][-2:] == ["≤ 0.64", "–"]


VERDICTS = {
    "p-wool": "Judge: sft_v2 wins · with dpo_v1 first: sft_v2 · with sft_v2 first: sft_v2",
    "p-72": "Judge: tie · with dpo_v1 first: dpo_v1 · with sft_v2 first: tie",
    "p-half": "Judge: tie · with dpo_v1 first: dpo_v1 · with sft_v2 first: unparsable",
    "p-null": "Judge: unparsable · with dpo_v1 first: unparsable · with sft_v2 first: unparsable",
    "p-mona": "Judge: tie · with dpo_v1 first: tie · with sft_v2 first: tie · the answers are identical",
    "p-sky": "Judge: dpo_v1 wins · with dpo_v1 first: dpo_v1 · with sft_v2 first: dpo_v1"
             " · grey: the beginning they share",
}


def test_one_prompt(opened, index):
    """Both answers, their lengths and marks, the verdict in both orders, what is the same in both."""
    page = opened(index)
    for name, verdict in VERDICTS.items():
        follow(page, f"dpo_v1_vs_sft_v2/{name}")
        prompt = PROMPTS[IDS.index(name)]
        assert page.locator("#messages p").all_inner_texts() == ["system", "Be brief.", "user", prompt[1]]
        assert page.locator("#verdict").inner_text() == verdict
        assert completions(page) == [text for text in prompt[2:4] if text]
        assert page.get_by_text("(empty)").count() == (name == "p-null")
        assert page.locator(".shared").all_inner_texts() == ([SKY + " "] * 2 if name == "p-sky" else [])
    heads = {}
    for name in ("p-wool", "p-half", "p-mona"):
        follow(page, f"dpo_v1_vs_sft_v2/{name}")
        heads[name] = [head.replace("\n", " ") for head in page.locator("#answers article > .row").all_inner_texts()]
    assert heads == {"p-wool": ["dpo_v1 256 tokens, 242 more EOS missing", "sft_v2 14 tokens ✓ preferred"],
                     "p-half": ["dpo_v1 20 tokens, 11 more", "sft_v2 9 tokens EOS missing"],
                     "p-mona": ["dpo_v1 7 tokens", "sft_v2 7 tokens"]}  # fmt: skip


@pytest.mark.parametrize("width", [1280, 320])
def test_hostile_text_is_only_text(opened, tmp_path, width):
    """In prompts, completions, ids, names: shown letter by letter, nothing runs, nothing is fetched (see `opened`)."""
    texts = [*EVIL, "".join(EVIL), "x" * 100_000, "word " * 20_000]
    prompts = [(f"{i}/#%?&<{text[:9]}".replace("\ud800", ""), text, text, text[::-1], 1, 1, True, True, "a", "a", 1)
               for i, text in enumerate(texts)]  # fmt: skip
    record = comparison("<img src=x onerror=window.pwned=6>", "</script><b>b", prompts, EVIL[0], model=EVIL[2])
    guardrails = copy.deepcopy(GUARDRAILS)
    guardrails["rows"][0]["name"] = EVIL[2]
    file = write(tmp_path, {"evil_vs_good": record}, guardrails)
    page = opened(file, viewport={"width": width, "height": 700})
    for i, text in enumerate(texts):
        shown = page.evaluate("JSON.stringify([...document.querySelectorAll('#reader .text')].map(e => e.textContent))")
        assert json.loads(shown) == ["Be brief.", text, text, text[::-1]]
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        if i < len(texts) - 1:
            page.keyboard.press("j")
    assert page.locator("#versus").inner_text() == f"{record['a']} against {record['b']}"
    assert EVIL[2] in page.get_by_role("table").inner_text() and EVIL[0] in page.get_by_role("note").inner_text()
    link = place(page)
    page.get_by_label("Search").fill("onerror='window")
    assert count(page) == f"Prompt 1 of 2, {len(texts)} in all"
    assert count(opened(file, "#" + link)) == f"Prompt {len(texts)} of {len(texts)}"
    for page in page.context.pages:
        elements = page.evaluate("document.querySelectorAll('img, svg, iframe, script').length")
        assert elements == 2 and page.evaluate("window.pwned === undefined")


def test_filters_search_and_order(opened, index):
    page = opened(index)
    filters = page.get_by_role("group", name="Verdict")
    expected = {"dpo_v1 wins 2": ["p-sky", "p-bread"], "ties 4": ["p-72", "p-mona", "p-list", "p-half"],
                "sft_v2 wins 1": ["p-wool"], "any unparsable 2": ["p-null", "p-half"],
                "orders disagree 2": ["p-72", "p-list"], "all 8": IDS}  # fmt: skip
    assert sorted(filters.get_by_role("button").all_inner_texts()) == sorted(expected)
    for label, ids in expected.items():
        filters.get_by_role("button", name=label).click()
        assert listed(page) == ids
        at, total = ids.index(place(page).split("/")[1]) + 1, "" if label == "all 8" else ", 8 in all"
        assert count(page) == f"Prompt {at} of {len(ids)}{total}"
        assert filters.locator("[aria-pressed=true]").all_inner_texts() == [label]
    page.get_by_label("Order").select_option("dpo_v1 longer first")
    assert listed(page) == ["p-wool", "p-sky", "p-half", "p-bread", "p-72", "p-mona", "p-null", "p-list"]
    page.get_by_label("Order").select_option("sft_v2 longer first")
    assert listed(page) == ["p-list", "p-null", "p-mona", "p-72", "p-bread", "p-half", "p-sky", "p-wool"]
    page.get_by_label("Order").select_option("as judged")
    search = page.get_by_label("Search")
    for query, ids in {"BREAD": ["p-bread"], "leonardo": ["p-mona"], "haiku": ["p-half"], " 3 × 24 ": ["p-72"],
                       "?": IDS[:4] + ["p-wool"], "be brief": IDS, "a.b": [], "[": [], "\\": []}.items():  # fmt: skip
        search.fill(query)
        assert listed(page) == ids
        assert page.locator("#answers").is_visible() is bool(ids)
        assert bool(ids) or count(page) == "No prompt of 8 matches."
    search.fill("rain")
    marked = page.evaluate("[...CSS.highlights.get('found')].map(range => range.toString())")
    assert marked == ["rain", "Rain", "Rain", "rain", "rain", "rain"]
    filters.get_by_role("button", name="dpo_v1 wins").click()  # together with the search
    assert listed(page) == []
    search.press("Escape")
    assert listed(page) == ["p-sky", "p-bread"] and page.evaluate("CSS.highlights.get('found').size") == 0


def test_keys(opened, index):
    page = opened(index)

    def at():
        return IDS.index(place(page).split("/")[1])

    for key, expected in (("j", 1), ("ArrowRight", 2), ("k", 1), ("ArrowLeft", 0), ("k", 0), ("Control+j", 0),
                          ("ArrowDown", 0)):  # fmt: skip
        page.keyboard.press(key)
        assert at() == expected, key
        assert completions(page) == list(PROMPTS[expected][2:4])
    assert page.get_by_role("button", name="Previous").is_disabled()
    page.keyboard.press("/")
    page.keyboard.type("jkbr/")
    assert page.get_by_label("Search").input_value() == "jkbr/" and listed(page) == []
    page.keyboard.press("j")
    page.keyboard.press("Escape")
    assert page.get_by_label("Search").input_value() == "" and listed(page) == IDS and at() == 0
    page.get_by_role("button", name="ties").click()
    page.get_by_role("button", name="all").click()  # the focus on a button doesn't take the keys away
    page.keyboard.press("k")
    assert at() == 1
    page.locator("#list button").nth(3).click()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert at() == 5 and page.evaluate("document.activeElement.innerText").endswith(PROMPTS[5][1])
    page.keyboard.press("ArrowUp")
    assert at() == 4
    while page.get_by_role("button", name="Next").is_enabled():
        page.get_by_role("button", name="Next").click()
    assert at() == 7
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
    follow(page, "dpo_v1_vs_sft_v2/p-list")  # leads to its prompt, whatever was searched for
    assert count(page) == "Prompt 5 of 8" and page.get_by_label("Search").input_value() == ""
    assert completions(page)[0] == "red\ngreen\nblue"
    assert completions(opened(index, "#" + link))[0] == PROMPTS[1][2]
    for unknown in ("#nowhere/p-72", "#dpo_v1_vs_sft_v2/nothing", "#%E0%A4%A", "#blind-99/p-72", "#blind-0", "#"):
        assert re.fullmatch("Prompt [13] of 8", count(opened(index, unknown))), unknown


NAMES = re.compile(r"dpo|ppo|sft|rm_v1|judge-7b|wins|\btie|unparsable|preferred|disagree|%|first:|circular", re.I)


def test_blind_mode_hides_names_verdicts_and_figures(opened, index):
    page = opened(index)
    page.get_by_label("Order").select_option("dpo_v1 longer first")
    assert NAMES.search(page.locator("body").inner_text()) and NAMES.search(page.locator("body").aria_snapshot())
    page.get_by_role("button", name="Blind").click()
    a_first = {}
    for number, name in enumerate(sorted(RECORDS), 1):
        page.get_by_label("Comparison").select_option(f"number {number}")
        while page.get_by_role("button", name="Previous").is_enabled():
            page.keyboard.press("k")
        for prompt in RECORDS[name]["prompts"]:  # in the order of the file
            assert place(page) == f"blind-{number}/{prompt['id']}"
            for text in (page.locator("body").inner_text(), page.locator("body").aria_snapshot(), page.title()):
                assert not NAMES.search(text), NAMES.search(text)
            assert page.locator("[title], .badge.a, .badge.b, [class*=wins-], h3.a, h3.b").count() == 0
            before = completions(page)
            assert headings(page) == ["Answer 1", "Answer 2"]
            page.keyboard.press("r")
            assert completions(page) == before  # the answers stay where they are
            assert page.locator("#verdict").inner_text().startswith("Judge: ")
            assert not page.locator("#summary").is_visible()
            sides = ["ab"[shown == RECORDS[name]["b"]] for shown in headings(page)]
            assert sorted(sides) == ["a", "b"]
            assert before == [prompt[f"completion_{side}"] for side in sides if prompt[f"completion_{side}"]]
            a_first[name, prompt["id"]] = sides[0] == "a"
            page.keyboard.press("j")
    assert 0.2 < sum(a_first.values()) / len(a_first) < 0.8  # neither row has a place of its own
    page.reload()
    assert not NAMES.search(page.locator("body").inner_text())  # the link is to the blind page
    page.get_by_role("button", name="Reveal").click()
    assert (headings(page)[0] == "ppo_v1") is a_first["ppo_v1_vs_sft_v2", "p-sky"]
    page.keyboard.press("b")
    assert headings(page) == ["ppo_v1", "sft_v2"] and page.locator("#summary").is_visible()


# -- screens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_sideways_scroll_and_answers_stack_on_a_phone(opened, index, width):
    page = opened(index, "#ppo_v1_vs_sft_v2/p-wool", viewport={"width": width, "height": 700})
    page.get_by_text("How it was made").click()
    for key in ("j", "k", "b", "r", "b"):
        page.keyboard.press(key)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    first, second = [article.bounding_box() for article in page.locator("article").all()]
    if width < 700:
        assert first["x"] == second["x"] and first["width"] > 0.85 * width
        assert second["y"] >= first["y"] + first["height"]
    else:
        assert first["y"] == second["y"] and second["x"] >= first["x"] + first["width"]
    for control in page.locator("button:visible, select:visible, input:visible").all():
        box = control.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width


# Every visible text, placeholders too, against what is behind it, by WCAG 2's formula: {text: ratio}
CONTRAST = """() => {
  const parts = color => color.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const found = {};
  const measure = (text, element, pseudo) => {
    let behind = element;
    while (parts(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const colors = [getComputedStyle(element, pseudo).color, getComputedStyle(behind).backgroundColor];
    const [low, high] = colors.map(color => luminance(parts(color))).sort((a, b) => a - b);
    found[text] = Math.min((high + 0.05) / (low + 0.05), found[text] ?? 21);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim().slice(0, 40), element = walker.currentNode.parentElement;
    if (text && element.checkVisibility() && !element.closest("script, option")) measure(text, element);
  }
  measure("placeholder", document.querySelector("input"), "::placeholder");
  measure("select", document.querySelector("select"));
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(opened, index, scheme):
    page = opened(index, "#ppo_v1_vs_sft_v2/p-sky", color_scheme=scheme)
    background = re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert all((int(part) < 60) is (scheme == "dark") for part in background)
    page.get_by_text("How it was made").click()
    seen = {}
    for key in "kkkkkkkbr":
        for text, ratio in page.evaluate(CONTRAST).items():
            seen[text] = min(ratio, seen.get(text, 21))
        page.keyboard.press(key)
    assert {"Guardrails", "EOS missing", "✓ preferred", "ppo_v1", "sft_v2", "Answer 1", "?", "=", "system", "select",
            "placeholder", SKY[:40], f"Circular judge, no evidence of quality: {WHY}"[:40]} <= seen.keys()  # fmt: skip
    assert {text: round(ratio, 2) for text, ratio in seen.items() if ratio < 4.5} == {}


def test_every_control_has_a_name_and_shows_the_focus(opened, index):
    page = opened(index)
    names = page.evaluate("""[...document.querySelectorAll("button, select, input, [tabindex='0']")]
        .filter(e => e.checkVisibility()).map(e => (e.labels?.[0] ?? e).innerText || e.getAttribute("aria-label"))""")
    assert len(names) > 15 and all(names)
    stops = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        stop, outline = page.evaluate("""(e => [e.id || e.getAttribute("aria-current") || e.tagName,
            getComputedStyle(e).outlineStyle + " " + getComputedStyle(e).outlineWidth])(document.activeElement)""")
        if stop == "BODY":
            break
        assert outline == "solid 3px", stop
        stops.add(stop)
    assert {"pair", "blind", "search", "sort", "true", "messages", "next", "SUMMARY"} <= stops


def test_seven_comparisons_of_two_hundred_prompts_are_quick(opened, tmp_path):
    """Only the list and the prompt in view are built; opening, searching and stepping take moments."""
    prompts = [(f"p{i}", f"Prompt {i}? " + "why " * 60, f"A{i} " + "some words " * 200, f"B{i} " + "other words " * 200,
                400, 400, True, True, "a", "b", 0.5) for i in range(200)]  # fmt: skip
    file = write(tmp_path, {f"row{i}_vs_sft_v2": comparison(f"row{i}", prompts=prompts) for i in range(7)})
    assert file.stat().st_size > 5e6
    started = time.perf_counter()
    page = opened(file)
    assert count(page) == "Prompt 1 of 200"
    for _ in range(20):
        page.keyboard.press("j")
    assert count(page) == "Prompt 21 of 200"
    page.get_by_label("Search").fill("A19")
    assert count(page) == "Prompt 1 of 11, 200 in all"
    page.get_by_label("Search").fill("")
    for number in range(7):
        page.get_by_label("Comparison").select_option(str(number))
    assert time.perf_counter() - started < 20
    assert page.locator(".text").count() == 4 and page.evaluate("document.querySelectorAll('*').length") < 1200
