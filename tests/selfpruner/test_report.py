"""The report: complete, escaped, self-contained, the same bytes every time."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from selfpruner.report import write_comparison, write_report

SAMPLE = Path(__file__).parent / "results_sample.json"
EVIL = "<script>alert('x')</script><img src=https://evil.example/x.png onerror=alert(1)>"


def _sample() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(SAMPLE.read_text(encoding="utf-8"))
    return data


def _run(folder: Path, data: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


def _page(folder: Path, data: dict[str, Any]) -> str:
    return write_report(_run(folder, data)).read_text(encoding="utf-8")


def _visible(page: str) -> str:
    """Return the text of the page without styles, charts and tags."""
    page = re.sub(r"<(style|svg)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", " ", page))


class Tags(HTMLParser):
    """Collects tags, attributes and ids, and checks that elements nest."""

    VOID = frozenset({"meta", "br", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _assert_harmless(page: str) -> None:
    tags = Tags(page)
    assert tags.open == []
    for forbidden in ("script", "img", "link", "iframe", "object", "embed", "form", "base", "a"):
        assert tags.names[forbidden] == 0, forbidden
    for tag, name, value in tags.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "srcset", "action"):
            assert value.startswith("#"), (tag, name, value)
    style = "".join(re.findall(r"<style>.*?</style>", page, flags=re.DOTALL))
    assert "@import" not in style
    assert "url(" not in style


def test_texts_of_the_run_are_shown(tmp_path: Path) -> None:
    data = _sample()
    folder = _run(tmp_path / "my-run", data)
    (folder / "config.yaml").write_text("seed: 7  # <b>\n", encoding="utf-8")
    page = write_report(folder).read_text(encoding="utf-8")
    text = _visible(page)
    for sample in data["samples"]:
        assert sample["prompt"] in text
        assert sample["pruned"].strip() in text
    for wanted in (*data["warnings"], data["evaluation"]["mean_convention"], "my-run",
                   "seed: 7  # <b>", "hardware.cpu", "moves"):  # fmt: skip
        assert wanted in text


def test_page_needs_nothing_else(tmp_path: Path) -> None:
    page = _page(tmp_path / "run", _sample())
    _assert_harmless(page)
    assert "http" not in page.replace("http-equiv", "")
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert str(tmp_path) not in page


def test_ids_are_unique_and_references_resolve(tmp_path: Path) -> None:
    page = _page(tmp_path / "run", _sample())
    tags = Tags(page)
    ids = Counter(value for _, name, value in tags.attributes if name == "id")
    assert [name for name, count in ids.items() if count > 1] == []
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page)
    assert used
    assert {a or b for a, b in used} <= set(ids)
    assert tags.names["svg"] == 10


@pytest.mark.parametrize(
    ("placebo", "words"),
    [
        ("layers", "the LLM was told of layers under false numbers."),
        ("fitness", "the LLM was told the fitness of plans in a random order."),
        ("name", "the LLM was not told the name of the model."),
    ],
)
def test_a_run_under_a_placebo_is_called_a_control(
    tmp_path: Path, placebo: str, words: str
) -> None:
    plain, data = _run(tmp_path / "plain", _sample()), _sample()
    data["search"]["placebo"] = placebo
    text = " ".join(_visible(_page(tmp_path / "run", data)).split())
    assert f"This run is a control. Placebo {placebo}: {words}" in text
    assert "control." not in _visible(write_report(plain).read_text(encoding="utf-8"))
    both = write_comparison([plain, tmp_path / "run"], tmp_path / "out.html")
    assert both.read_text(encoding="utf-8").count(f"(placebo {placebo})") == 1


def test_two_writes_are_equal_byte_by_byte(tmp_path: Path) -> None:
    folder = _run(tmp_path / "run", _sample())
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    pages = [write_comparison([folder] * 2, tmp_path / x).read_bytes() for x in "ab"]
    assert pages[0] == pages[1]


def _poison(value: Any) -> Any:
    """Return the value with every free text, and every key of a free table, made hostile."""
    closed = {"kind", "origin", "schema_version"}
    if isinstance(value, dict):
        return {k: v if k in closed else _poison(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_poison(x) for x in value]
    return value + EVIL if isinstance(value, str) else value


def test_hostile_text_is_text(tmp_path: Path) -> None:
    data = _poison(_sample())
    for side in ("dense", "pruned"):
        for table in ("tasks", "perplexity"):
            rows = data["quality"][side][table]
            data["quality"][side][table] = {k + EVIL + "$\\frac{": v for k, v in rows.items()}
    data["controls"] = {EVIL + k: v for k, v in data["controls"].items()}
    data["environment"][EVIL] = EVIL
    data["cost"]["stage_seconds"][EVIL] = 1.0
    folder = _run(tmp_path / "a<b>&run", data)
    (folder / "config.yaml").write_text(EVIL + "{{ 7 * 191 }}", encoding="utf-8")
    page = write_report(folder).read_text(encoding="utf-8")
    _assert_harmless(page)
    assert html.escape(EVIL, quote=True).replace("&#x27;", "&#39;") in page
    assert "{{ 7 * 191 }}" in page
    out = write_comparison([folder, folder], tmp_path / "out.html").read_text(encoding="utf-8")
    _assert_harmless(out)
    assert EVIL in _visible(out)


def test_a_bare_run_still_has_a_report(tmp_path: Path) -> None:
    data = _sample()
    for side in ("dense", "pruned"):
        data["quality"][side].update(tasks={}, mean=None, perplexity={"passages": None})
    data["quality"]["difference"] = None
    data["search"].update(driver=None, strategy=None, best_fitness=None, selection_fitness=None)
    data["cost"] = {"stage_seconds": {}, "peak_memory_bytes": None}
    data["speed"]["rows"] = []
    data.update(history=[], generations=[], samples=[], warnings=[], controls={}, refit=None)
    page = _page(tmp_path / "run", data)
    _assert_harmless(page)
    text = _visible(page)
    assert "Tasks were skipped" in text
    assert "Speed was not measured" in text
    assert "Read this first" not in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("points", "ci95", "words"),
    [
        (-4.32, [-8.75, 1.61], "The drop of 4.32 points is not resolved by the 280 items"),
        (-4.32, [-8.75, -0.61], "The drop of 4.32 points is resolved by the 280 items"),
        (2.5, [1.0, 4.0], "The gain of 2.50 points is resolved by the 280 items"),
        (0.001, [-1.0, 1.0], "The mean has not moved."),
    ],
)
def test_the_report_says_whether_the_sample_resolves_the_drop(
    tmp_path: Path, points: float, ci95: list[float], words: str
) -> None:
    data = _sample()
    data["quality"]["difference"].update(points=points, ci95=ci95)
    assert words in _visible(_page(tmp_path / "run", data))


def test_a_report_of_results_without_p_values_shows_dashes(tmp_path: Path) -> None:
    data = _sample()
    del data["quality"]["difference"]["mcnemar"]
    text = " ".join(_visible(_page(tmp_path / "run", data)).split())
    assert text.count("\N{EN DASH} 40 ") == len(data["quality"]["pruned"]["tasks"])


def test_many_heads_and_wild_fitness_are_drawn(tmp_path: Path) -> None:
    data = _sample()
    data["units_dense"] = {"kv_groups": 8, "q_per_group": 8, "mlp_channels": 28672}
    data["units"] = [{"layer": i, "kv_groups": 1 + i % 8, "q_per_group": 1 + i % 3,
                      "mlp_channels": 320 * (i + 1)} for i in range(80)]  # fmt: skip
    data["history"][4]["fitness"] = 9.9e11
    assert Tags(_page(tmp_path / "run", data)).names["svg"] == 10


@pytest.mark.parametrize(
    ("config", "wants_code"),
    [({"model_type": "llama"}, False), ({"auto_map": {"AutoConfig": "x.Y"}}, True), (None, True)],
)
def test_loading_line_follows_the_export(
    tmp_path: Path, config: dict[str, Any] | None, wants_code: bool
) -> None:
    folder = _run(tmp_path / "run", _sample())
    if config is not None:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    text = _visible(write_report(folder).read_text(encoding="utf-8"))
    assert 'AutoModelForCausalLM.from_pretrained("model"' in text
    assert ("trust_remote_code=True" in text) is wants_code


@pytest.mark.parametrize(("shift", "scale", "is_cut"), [(0.0, 1e6, True), (-5.0, 1e6, False)])
def test_fitness_plot_says_what_it_cuts(
    tmp_path: Path, shift: float, scale: float, is_cut: bool
) -> None:
    data = _sample()
    for row in data["history"]:
        row["fitness"] = None if row["fitness"] is None else row["fitness"] + shift
        row["best"] += shift
    data["history"][4]["fitness"] = scale
    page = _page(tmp_path / "run", data)
    assert (re.search(r"; 1 above [0-9.]+ at the top edge", page) is not None) is is_cut


def test_comparison_shows_each_run(tmp_path: Path) -> None:
    first, second = _sample(), _sample()
    second["search"].update(allocator="uniform", driver=None)
    second["model"]["parameters_pruned"] = 91234567
    second["quality"]["pruned"]["mean"] = 0.4213
    second["quality"]["pruned"]["perplexity"] = {"ptb": 77.31}
    second["speed"]["rows"] = second["speed"]["rows"][:1]
    folders = [_run(tmp_path / "one", first), _run(tmp_path / "two", second)]
    out = write_comparison(folders, tmp_path / "side.html")
    assert out == tmp_path / "side.html"
    page = out.read_text(encoding="utf-8")
    _assert_harmless(page)
    assert Tags(page).names["svg"] == 2
    text = " ".join(_visible(page).split())
    none = "\N{EN DASH}"
    for wanted in (
        "A: one, B: two",
        "102,654,272 91,234,567",
        "45.00 % 42.13 %",
        "llm uniform",
        f"Perplexity, ptb {none} \N{RIGHTWARDS ARROW} {none} {none} \N{RIGHTWARDS ARROW} 77.31",
        f"Speedup, decode 1.23\N{MULTIPLICATION SIGN} (batch 1, 16 tokens) {none}",
        "Tasks, items, batch 7, 280, 8",
        f"Measured with {none} on {none}",
    ):
        assert wanted in text


def test_comparison_refuses_no_runs_and_names_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run folders"):
        write_comparison([], tmp_path / "x.html")
    with pytest.raises(ValueError, match=r"gone.results\.json"):
        write_comparison([tmp_path / "gone"], tmp_path / "x.html")
