import json
from pathlib import Path

from common import read_json, write_text

PAGE_DATA = '<script type="application/json" id="data">null</script>'  # the place in judge.html that page_html fills


def page_html(comparisons: list[dict], guardrails: dict | None) -> str:
    """judge.html with the records in it. A comparison is the content of its file plus "file", the file's name without
    .json, which is its address in the page. ASCII JSON without a "<": no text in it can end the script element."""
    data = json.dumps({"comparisons": comparisons, "guardrails": guardrails}, separators=(",", ":"),
                      allow_nan=False).replace("<", "\\u003c")
    return Path(__file__).with_name("judge.html").read_text(encoding="utf-8").replace(
        PAGE_DATA, PAGE_DATA.replace("null", data))


def write_page(results: Path) -> None:
    """<results>/judge/index.html: every comparison <a>_vs_<b>.json there, in the order of their names, and the guardrails."""
    directory = Path(results) / "judge"
    comparisons = [{"file": path.stem, **read_json(path)} for path in sorted(directory.glob("*_vs_*.json"))]
    guardrails = directory / "guardrails.json"
    write_text(directory / "index.html", page_html(comparisons, read_json(guardrails) if guardrails.exists() else None))
