"""The files a study leaves: one page without network, table, pictures."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from spo_jax.report.page import Grid, Section, make_page
from spo_jax.study import results_page
from spo_jax.study.pictures import FIGURES
from spo_jax.study.results_page import make_study_page
from tests.study.grids import grid, record, study

EVIL = '<script>alert("http://x.example/?a=1&b")</script>'


class Page(HTMLParser):
    """What a browser would see of the page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.links, self.texts, self.rows = [], [], [], [], []
        self.in_cell = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.links += [attrs[k] for k in ("src", "href", "srcset", "data") if k in attrs]
        if tag == "img":
            self.images.append(attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.in_cell = tag in ("td", "th")

    def handle_endtag(self, tag):
        self.in_cell = False

    def handle_data(self, data):
        self.texts.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data


def read(path):
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def no_figures(monkeypatch):
    """For what the pictures do not matter to."""
    monkeypatch.setattr(results_page, "FIGURES", {})


def test_the_page_is_one_file_without_network_or_script(tmp_path):
    out = make_study_page(study(grid()), tmp_path / "out")
    assert out == tmp_path / "out" / "study.html"
    seen = read(out)
    pngs = sorted((tmp_path / "out" / "figures").iterdir())
    assert [path.name for path in pngs] == ["accuracy.png", "preference.png", "shift.png"]
    inside = [
        base64.b64decode(i["src"].removeprefix("data:image/png;base64,")) for i in seen.images
    ]
    assert sorted(inside) == sorted(path.read_bytes() for path in pngs)
    assert all(image["alt"] for image in seen.images)
    assert seen.links == [image["src"] for image in seen.images]
    assert not {"script", "link", "iframe", "object"} & set(seen.tags)
    text = out.read_text(encoding="utf-8")
    assert not re.search(r"https?://|url\(|@import", text)


def test_command_facts_claims_and_table_are_on_the_page(tmp_path, no_figures):
    seen = read(make_study_page(study(grid()), tmp_path))
    assert "18 of 18 runs." in seen.texts
    assert ["command", "spo-jax study x.yaml"] in seen.rows
    assert ["machine", "two cores"] in seen.rows
    claims = [row for row in seen.rows if row[0][:2] in ("1.", "2.", "3.", "4.")]
    assert [row[1] for row in claims] == ["✓ holds"] * 4
    assert "DPO falls 28.0 points below SFT" in claims[0][2]
    table = {row[0]: row for row in seen.rows if len(row) == 6}
    assert table["DPO + SPO"][2].startswith("96.0 ± 0.6")
    assert table["DPO + SPO"][3].startswith("+34.0\n[")
    others = {row[0]: row[1:] for row in seen.rows if len(row) == 4}
    assert others["SimPO"][2] == "-2.00 ± 0.06"


def test_pictures_come_with_their_captions_in_order(tmp_path):
    text = make_study_page(study(grid()), tmp_path).read_text(encoding="utf-8")
    captions = [
        FIGURES[n].caption.replace("'", "&#x27;") for n in ("accuracy", "preference", "shift")
    ]
    places = [text.index(caption) for caption in captions]
    assert places == sorted(places)


def test_the_tables_beside_the_page(tmp_path, no_figures):
    make_study_page(study(grid()), tmp_path)
    markdown = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| DPO + SPO | 3 | 96.0 ± 0.6 | +34.0<br>[" in markdown
    assert "### Claims" in markdown
    tree = json.loads((tmp_path / "table.json").read_text())
    assert (tree["finished"], tree["planned"]) == (18, 18)
    assert {claim["verdict"] for claim in tree["claims"]} == {"holds"}
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_running_study_is_shown_as_far_as_it_went(tmp_path, no_figures):
    records = [r for r in grid() if r.loss != "SimPO"]
    seen = read(make_study_page(study(records), tmp_path))
    [lead] = [text for text in seen.texts if text.startswith("12 of 18 runs")]
    assert "6 to go, every number and verdict is preliminary" in lead
    assert ["SimPO", "–", "–", "–", "–", "–"] in seen.rows
    nothing = read(make_study_page(study([], starts=("SFT",), seeds=(0,)), tmp_path))
    assert any(text.startswith("0 of 6 runs") for text in nothing.texts)


def test_pictures_without_data_any_more_go(tmp_path):
    make_study_page(study(grid()), tmp_path)
    (tmp_path / "figures" / "mine.png").write_bytes(b"")
    make_study_page(study([record("SFT", 0, 0.9)]), tmp_path)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["mine.png"]


def test_a_picture_that_fails_costs_no_table(tmp_path, monkeypatch, capsys):
    def broken(study, curves):
        raise TypeError("no <limits>")

    def unread(study):
        raise OSError("curves gone")

    before = make_study_page(study(grid()), tmp_path)
    monkeypatch.setitem(FIGURES, "accuracy", FIGURES["accuracy"]._replace(make=broken))
    monkeypatch.setattr(results_page, "read_curves", unread)
    seen = read(make_study_page(study(grid()), tmp_path))
    [row] = [row for row in seen.rows if row[0] == "pictures that could not be drawn"]
    assert row[1:] == [
        "all curves over updates (OSError: curves gone); accuracy (TypeError: no <limits>)"
    ]
    assert len(seen.images) == 2
    assert not (before.parent / "figures" / "accuracy.png").exists(), "it is of other results"
    assert "96.0 ± 0.6" in (tmp_path / "table.md").read_text()
    said = capsys.readouterr().err
    assert "accuracy (TypeError: no <limits>). The tables are whole" in said


def test_texts_are_escaped(tmp_path):
    evil = study([record(EVIL, 0, 0.5, place=(EVIL, EVIL, {}))], rows=(EVIL,), title=EVIL)
    evil = evil._replace(command=EVIL, facts={EVIL: EVIL}, baseline=EVIL)
    text = make_study_page(evil, tmp_path).read_text(encoding="utf-8")
    assert "<script" not in text
    assert EVIL in Page(text).texts


def test_an_unwritable_folder_says_what_to_do(tmp_path, no_figures):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write the study to .*choose another folder"):
        make_study_page(study(grid()), tmp_path / "file")


def test_a_broken_write_leaves_the_old_page(tmp_path, no_figures, monkeypatch):
    out = make_study_page(study(grid()), tmp_path)
    before = out.read_bytes()
    write = Path.write_bytes

    def fail(path, data):
        if data.startswith(b"<!doctype"):
            write(path, data[:10])
            raise OSError("disk full")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        make_study_page(study(grid(), title="other"), tmp_path)
    assert out.read_bytes() == before


# Grids on a page of the report


def test_a_page_without_columns_has_no_head_row():
    text = make_page("t", "l", [], [("name", ["value"])], [])
    assert "<thead>" not in text
    assert Page(text).rows == [["name", "value"]]


def test_a_grid_is_escaped_and_stands_before_the_pictures():
    found = Grid("<h>", ["", "<c>"], [["<r>", "one\n<two>"]], "<n>")
    text = make_page("t", "l", [], [], [Section("s", [], grids=[found])])
    seen = Page(text)
    assert seen.rows == [["", "<c>"], ["<r>", "one\n<two>"]]
    assert {"<h>", "<n>"} <= set(seen.texts)
    assert "pre-line" in text, "lines of a cell stay lines"


@pytest.mark.slow
def test_the_evidence_needs_no_accelerator_library_of_its_own():
    """Beside what ``spo_jax`` and the report load, nothing starts JAX' devices."""
    program = (
        "import spo_jax.study.results_page, jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'a backend was started'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
