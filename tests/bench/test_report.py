"""The report: everything in it, nothing that runs or loads, the same bytes each time; whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from flover.bench.report import cell
from flover.bench.report_tables import tables_of
from flover.bench.report_timeline import TimelineView
from flover.cli import main
from flover.cli.bench_report import run_report
from flover.metrics import StepStats, Timeline

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
PNG = b"\x89PNG\r\n\x1a\n-"


class Page(HTMLParser):
    """Tags with their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts.append(data)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in attributes.items())]


def put(folder: Path, name: str, **values: Any) -> None:
    figure = {
        "id": name,
        "title": f"Title {name}",
        "paper": {"32 requests": 10.9, "8 requests": 3.5},
        "ours": {"32 requests": 18.2},
        "verdict": "Reproduced: more than the paper's",
        "command": f"flover bench paper --figure {name}",
        "environment": {"gpu": "H200", "torch": "2.11"},
        "seed": 0,
        "data": {"rows": [{"requests": n, "fused_s": 1.5 * n, "serial_s": 2.5 * n} for n in (1, 2, 4)]},
        "notes": ["a faster baseline"],
    }
    (folder / f"{name}.json").write_text(json.dumps(figure | values), encoding="utf-8")


def steps(names: tuple[str, ...] = ("a", "b", "c")) -> list[StepStats]:
    """Three requests; the first leaves, and the last takes its row."""
    a, b, c = names
    first = StepStats(0, 5.0, 5.1, rows=[a, b, c], num_scheduled=[4, 4, 0], prefilling=[True, True, False])
    first.dead, first.joins = [False, False, False], [(0, a, 0), (1, b, 0), (2, c, 0)]
    second = StepStats(1, 5.1, 5.2, rows=[c, b], num_scheduled=[1, 1], prefilling=[False, False], dead=[False, True])
    second.leaves, second.relocations, second.kv_reserved_bytes = [(0, a, "length")], [(2, 0)], 100
    return [first, second]


def made(folder: Path) -> str:
    output = folder / "report.html"
    assert run_report(folder, output) == 0
    return output.read_text(encoding="utf-8")


def test_every_figure_and_its_facts_are_there(tmp_path: Path) -> None:
    for name in ("8", "4a", "zz"):
        put(tmp_path, name)
    text = made(tmp_path)
    assert re.findall(r'<h2><span class="id">(.*?)</span>', text) == ["4a", "8", "zz"], "the paper's order"
    for fact in ("10.9", "18.2", "1.67", "H200", "2.11", "flover bench paper --figure 8", "a faster baseline"):
        assert fact in text
    put(tmp_path, "4a", paper={"x": "1.1 to 1.2"}, ours={})
    assert '<td class="num">1.1 to 1.2</td><td class="num">–</td>' in made(tmp_path), "under numbers, as numbers"
    page = Page(text)
    assert len(page.all("figure")) == 3
    assert "figure-2" in {a.get("id") for _, a in page.tags}
    targets = {a["href"] for a in page.all("a")}
    assert targets <= {f"#{a.get('id')}" for _, a in page.tags}, "every link leads somewhere"


def test_headers_sort_by_keyboard_and_say_so(tmp_path: Path) -> None:
    put(tmp_path, "4a")
    page = Page(made(tmp_path))
    for i, (tag, attributes) in enumerate(page.tags):
        if tag == "th" and attributes.get("scope") == "col":
            assert attributes["aria-sort"] == "none"
            assert page.tags[i + 1] == ("button", {"type": "button"})
    assert page.all("td", **{"data-v": "3.0"}), "cells keep the number they show"


def test_what_comes_from_data_does_not_run(tmp_path: Path) -> None:
    rows = [{EVIL: EVIL, "system": EVIL + str(i), "n": i, f"{EVIL}_s": 1.0, "b_s": 2.0} for i in range(3)]
    put(
        tmp_path,
        EVIL.replace("/", "-"),
        id=EVIL,
        title=EVIL,
        claim=EVIL,
        verdict=EVIL,
        command=EVIL,
        notes=[EVIL],
        environment={EVIL: EVIL},
        paper={EVIL: EVIL},
        ours={EVIL: EVIL},
        data={EVIL: rows},
        gaps=[{EVIL: EVIL, "why": EVIL}],
    )
    Timeline(steps((EVIL, "</script><script>", "<!--<script>"))).to_json(tmp_path / "x-timeline.json")
    page = Page(made(tmp_path))
    assert not page.all("img")
    kinds = [a.get("type") for a in page.all("script")]
    assert kinds == ["application/json", None], "the timeline's data and the page's own"
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    names = json.loads(page.scripts[0])["names"]
    assert names == [EVIL, "</script><script>", "<!--<script>"]


def test_only_the_page_s_own_script_may_run_and_nothing_is_loaded(tmp_path: Path) -> None:
    put(tmp_path, "4a", notes=["see https://example.org"])
    text = made(tmp_path)
    page = Page(text)
    policy = str(page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"])
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    addresses = {a.get(name) or "" for _, a in page.tags for name in ("href", "src")} - {""}
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert set(re.findall(r"https?://[\w.]+", text)) == {"https://example.org", "http://www.w3.org"}  # a name of SVG
    assert "@import" not in text
    assert "url(" not in text


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to read the script with")
def test_the_script_is_javascript(tmp_path: Path) -> None:
    put(tmp_path, "4a")
    script = tmp_path / "page.js"
    script.write_text(Page(made(tmp_path)).scripts[-1], encoding="utf-8")
    subprocess.run(["node", "--check", str(script)], check=True)


def test_the_picture_stands_in_where_there_is_no_data(tmp_path: Path) -> None:
    put(tmp_path, "4a")
    put(tmp_path, "4b", data={})
    for name in ("4a", "4b"):
        (tmp_path / f"{name}.png").write_bytes(PNG)
    images = Page(made(tmp_path)).all("img")
    assert [image["src"] for image in images] == ["data:image/png;base64," + base64.b64encode(PNG).decode()]
    assert images[0]["alt"] == "Title 4b"


def test_gaps_are_named_with_their_reason(tmp_path: Path) -> None:
    put(tmp_path, "4a", gaps=[{"model": "65B", "what": "all systems", "why": "does not fit"}])
    put(tmp_path, "tp", verdict="Gap: one GPU only", ours=None, notes=[])
    put(tmp_path, "random", gaps=[{"ranks": 2, "why": "one device"}, "no vllm"])
    (tmp_path / "8.json").write_text("{", encoding="utf-8")
    (tmp_path / "timeline.json").write_text('{"steps": [{}]}', encoding="utf-8")
    (tmp_path / "other.json").write_text("[1]", encoding="utf-8")
    text = made(tmp_path)
    gaps = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text[text.index('<section id="gaps">') :]))
    assert gaps["4a 65B, all systems"] == "does not fit"
    assert gaps["tp"] == "one GPU only"
    assert gaps["random ranks 2"] == "one device"
    assert gaps["random"] == "no vllm"
    assert gaps["progress"] == "not run"
    assert "cannot be read" in gaps["8.json"]
    assert "cannot be read" in gaps["timeline.json"]
    assert not any("other" in name for name in gaps)


def test_figures_of_the_same_cells_share_their_gaps(tmp_path: Path) -> None:
    gap = {"what": "poisson: draw 0; draw 1; draw 2", "why": "no time"}
    put(tmp_path, "4a", gaps=[gap])
    put(tmp_path, "4b", gaps=[gap, {"what": "all", "why": "no memory"}])
    text = made(tmp_path)
    assert "<dt>4a, 4b poisson: draw 0; 2 more</dt><dd>no time</dd>" in text
    assert "<dt>4b all</dt><dd>no memory</dd>" in text
    assert "draw 2" not in text


@pytest.mark.parametrize(
    ("verdict", "badge"),
    [
        ("Reproduced: it is", "yes"),
        ("yes", "yes"),
        ("Partly, at 32", "partly"),
        ("No: 1.2x", "no"),
        ("gap", "gap"),
        ("", "unknown"),
        (None, "unknown"),
        ("nothing of it", "unknown"),
    ],
)
def test_the_badge_is_the_verdict_s_first_word(tmp_path: Path, verdict: str | None, badge: str) -> None:
    put(tmp_path, "4a", verdict=verdict)
    assert f'class="badge {badge}"' in made(tmp_path)


def test_figures_may_lack_anything_but_an_id(tmp_path: Path) -> None:
    (tmp_path / "4a.json").write_text('{"id": "4a"}', encoding="utf-8")
    put(
        tmp_path,
        "4b",
        paper=10,
        ours="about 12",
        notes="one",
        data=[[1, 2]],
        extra=[{"a": None, "b": [1]}],
        ms=float("nan"),
    )
    assert "about 12" in made(tmp_path)


def test_the_same_folder_gives_the_same_bytes_and_no_partial_file(tmp_path: Path) -> None:
    put(tmp_path, "4a")
    Timeline(steps()).to_json(tmp_path / "timeline.json")
    assert made(tmp_path) == made(tmp_path)
    assert not list(tmp_path.glob("*.partial"))


def test_a_folder_without_figures_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    with pytest.raises(ValueError, match="holds no figure"):
        run_report(tmp_path, output)
    for where in (output, None):
        with pytest.raises(ValueError, match="not a folder"):
            run_report(tmp_path / "none", where)
    put(tmp_path, "4a")
    with pytest.raises(ValueError, match="--output"):
        run_report(tmp_path, tmp_path / "no" / "report.html")
    assert not output.exists()


def test_the_page_lies_beside_its_figures_unless_told_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder := tmp_path / "figures").mkdir()
    put(folder, "4a")
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "report", "figures"]) == 0
    assert (folder / "report.html").exists()
    assert not Path("report.html").exists()


def test_charts_know_keys_from_measures() -> None:
    def chart(rows: list[dict[str, Any]]) -> Any:
        (table,) = tables_of("", rows)
        return table.chart

    wide = chart([{"model": m, "requests": n, "fused_s": 1.0, "serial_s": n} for m in "ab" for n in (1, 2)])
    assert (wide.x, wide.series, wide.filters, wide.bars) == (1, None, [0], False)
    assert wide.ys == [("seconds", [("fused", 2), ("serial", 3)])]
    long = chart([{"model": m, "system": s, "n": n, "y": 1.5} for m in "ab" for s in "cd" for n in (1, 2)])
    assert (long.x, long.series, long.filters) == (2, 1, [0])
    bars = chart([{"plan": p, "moves": n, "bytes": 2} for n, p in enumerate("abc")])
    assert (bars.x, bars.bars, [name for name, _ in bars.ys]) == (0, True, ["moves", "bytes"])
    repeats = chart([{"system": s, "n": n, "y": 1.5} for s in "ab" for n in (1, 2) for _ in range(2)])
    assert (repeats.x, repeats.series) == (1, 0)
    assert chart([{"a": 1, "b": 2}]) is None
    (curves,) = tables_of("", {"fused": [[0, 1], [1, 2]], "serial": [[0, 1]]})
    assert curves.rows == [["fused", 0, 1], ["fused", 1, 2], ["serial", 0, 1]]
    (columns,) = tables_of("", {"x": [1, 2], "y": [3, 4]})
    assert columns.rows == [[1, 3], [2, 4]]
    (long_table,) = tables_of("", [{"x": i, "y": i} for i in range(5000)])
    assert (len(long_table.rows), long_table.every) == (1667, 3)


def test_the_timeline_tells_phases_and_requests(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    Timeline(steps()).to_json(path)
    view = TimelineView.of("t", json.loads(path.read_text(encoding="utf-8"))["steps"])
    first, second = view.data["steps"]
    assert (first["phases"], second["phases"]) == ("pp-", "dx")
    assert (second["ids"], second["leaves"], second["moves"]) == ([2, 1], [[0, 0, "length"]], [[2, 0]])
    assert (view.num_rows, view.num_moves, second["ms"]) == (3, 1, 100.0)
    assert view.requests[0] == ["a", 0, 0, 4, 0, 0, 0, "length"]
    assert view.requests[1] == ["b", 0, 1, 4, 0, 1, 1, ""]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (True, "yes"), (9999, "9999"), (12345, "12,345"), (0.123456, "0.1235"), (12345.6, "12,346")],
)
def test_cells(value: Any, shown: str) -> None:
    assert cell(value) == shown
