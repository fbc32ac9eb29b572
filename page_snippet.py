import json
from pathlib import Path

from common import read_json, write_text

PAGE_DATA = '<script type="application/json" id="data">null</script>'  # in judge.html: where the records go


def page_html(comparisons: list[dict], guardrails: dict | None) -> str:
    """judge.html with the records in it. A comparison is what its file holds and "file", the file's name without .json,
    which is its address in the page. The JSON is ASCII without a "<", so that no text in it ends the script element."""
    records = json.dumps({"comparisons": comparisons, "guardrails": guardrails}, allow_nan=False, separators=(",", ":"))
    html = Path(__file__).with_name("judge.html").read_text(encoding="utf-8")
    return html.replace(PAGE_DATA, PAGE_DATA.replace("null", records.replace("<", "\\u003c")))


def write_page(results: Path) -> None:
    """<results>/judge/index.html: every <a>_vs_<b>.json beside it, in the order of their names, and guardrails.json."""
    directory = Path(results) / "judge"
    comparisons = [{"file": path.stem, **read_json(path)} for path in sorted(directory.glob("*_vs_*.json"))]
    guardrails = directory / "guardrails.json"
    write_text(directory / "index.html", page_html(comparisons, read_json(guardrails) if guardrails.exists() else None))
