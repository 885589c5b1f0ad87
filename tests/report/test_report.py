"""The report of run folders: what is read, what the page holds, and what is refused."""

import base64
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from spo_jax import report
from spo_jax.cli import main
from spo_jax.report import make_report
from spo_jax.report.figures import FIGURES
from spo_jax.report.page import Picture, Samples, Section, make_page
from spo_jax.report.runs import find_stages, read_description, read_stage, tolerance_of

CONFIG = """\
# spo-jax 0.1.0, jax 0.10.2, stage {stage}
seed: 7
stages: [{stages}]
loss: {{name: dpo, beta: 0.1}}
solver: {{name: {solver}}}
"""
TRAIN = {"loss": 0.7, "rewards/margins": 0.1, "gap": 0.01, "lr": 1e-4, "tokens_per_second": 900.0}
HELD = {"eval/rewards/accuracies": 0.75, "eval/gap": 0.125, "eval/log_ratio/chosen": -1.5}
EVIL = '<script>alert("http://x.example/?a=1&b")</script>'


def probing(step, **more):
    return {
        "step": step,
        "summary": {"repetition": 0.1, "log_ratio/chosen": 0.5},
        "pairs": {"law/chosen_rate": [1.0, None, -3.0], "entropy/chosen": [None, None, None]},
        "row_ids": [4, 5, 6],
        "settings": {"gradients": "head", "max_new_tokens": None},
        "samples": [{"prompt": f"after {step}", "chosen": EVIL, "greedy": "a\nb", "sampled": ""}],
        **more,
    }


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_stage(folder, *, stage="preference", stages=None, solver="penalty", dynamics=(), steps=3):
    """A folder as ``spo-jax train`` writes it for one stage, as far as a report reads it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        CONFIG.format(stage=stage, stages=stages or stage, solver=solver)
    )
    lines = [{"step": k, **TRAIN} for k in range(1, steps + 1)]
    first = {"step": 0, **dict.fromkeys(HELD, 0.0)}
    write_lines(folder / "metrics.jsonl", [first, *lines, {"step": steps, **HELD}])
    if dynamics:
        write_lines(folder / "dynamics.jsonl", dynamics)
    return folder


def write_run(folder, stages=("sft", "preference", "baseline")):
    for stage in stages:
        write_stage(folder / stage, stage=stage, stages=", ".join(stages))
    return folder


class Page(HTMLParser):
    """What a browser would see of the page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.images, self.links, self.texts, self.rows = [], [], [], [], []
        self.in_cell = False
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.links += [attrs[k] for k in ("src", "href", "srcset", "data") if k in attrs]
        if tag == "img":
            self.images.append(attrs)
        if tag == "tr":
            self.rows.append([])
        self.in_cell = tag in ("td", "th")
        if self.in_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.in_cell = False

    def handle_data(self, data):
        self.texts.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data

    @property
    def facts(self):
        return {row[0]: row[1:] for row in self.rows if row}


@pytest.fixture
def one_figure(monkeypatch):
    """For what the pictures do not matter to."""
    monkeypatch.setattr(report, "FIGURES", {"loss": FIGURES["loss"]})


def pngs(folder):
    return {path.stem for path in folder.glob("*.png")}


# The page


@pytest.mark.slow
def test_the_page_is_one_file_without_network_or_script(tmp_path):
    run = write_stage(tmp_path / "run", dynamics=[probing(0), probing(3)])
    out = make_report([run])
    assert out == run / "report.html"
    page = Page(out)
    assert page.images
    for image in page.images:
        assert image["src"].startswith("data:image/png;base64,")
        png = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert png.startswith(b"\x89PNG\r\n")
        assert image["alt"]
    assert page.links == [image["src"] for image in page.images]
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in page.text
    assert "url(" not in page.text


@pytest.mark.slow
def test_figures_of_what_was_logged_and_no_others(tmp_path):
    run = write_stage(tmp_path / "run", dynamics=[probing(0)])
    page = Page(make_report([run]))
    logged = {"loss", "margin", "gap", "learning_rate", "throughput", "accuracy", "log_ratios"}
    logged |= {"mass_log_ratios", "law_falling", "law_rates", "text_health"}
    assert pngs(run / "report_figures") == logged
    assert len(page.images) == len(logged)
    captions = [FIGURES[name].caption for name in FIGURES if name in logged]
    found = [page.text.index(caption.replace("'", "&#x27;")) for caption in captions]
    assert found == sorted(found), "each with its caption, in the order of the table"
    headings = re.findall("<h2>(.*?)</h2>", page.text)
    assert headings == [
        "Optimization", "Safe region", "Where the mass goes", "First-order law", "Text",
    ]  # fmt: skip


def test_an_sft_run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_lines(run / "metrics.jsonl", [{"step": 1, "inner_loss": 2.0, "lr": 0.1}])
    (run / "config.yaml").write_text("stages: [sft]\n")
    page = Page(make_report([run]))
    assert pngs(run / "report_figures") == {"inner_loss", "learning_rate"}
    assert page.facts["solver"] == ["inner_only"]
    assert "tolerance" not in page.facts
    assert re.findall("<h2>(.*?)</h2>", page.text) == ["Optimization", "Safe region"]


def test_sample_texts_are_escaped_and_the_last_ones(tmp_path, one_figure):
    run = write_stage(tmp_path / "run", dynamics=[probing(0), probing(9), probing(12, samples=[])])
    page = Page(make_report([run]))
    assert "<script" not in page.text
    assert "&lt;script&gt;" in page.text
    assert EVIL in page.texts
    assert "run: answers after update 9" in page.texts
    assert "after 0" not in page.texts
    assert ["prompt", "chosen", "greedy"] in page.rows, "no column without a text"


def test_everything_on_the_page_is_escaped():
    bad = "<i>&\"'"
    samples = Samples(bad, [bad], [{bad: bad}])
    section = Section(bad, [Picture(bad, b"", bad)], [samples])
    text = make_page(bad, bad, [bad], [(bad, [bad])], [section], [bad])
    assert "<i>" not in text
    assert text.count("&lt;i&gt;&amp;&quot;&#x27;") == 13


def test_long_samples_are_cut_with_words():
    samples = Samples("h", ["chosen"], [{"chosen": "x" * 2000}])
    text = make_page("t", "l", [], [], [Section("s", [], [samples])])
    assert "x" * 1500 + " … (500 more characters)" in text
    assert "x" * 1501 not in text


def test_table_of_runs(tmp_path, one_figure):
    run = write_stage(
        tmp_path / "run", solver="primal_dual, tolerance: 0.02", dynamics=[probing(0)]
    )
    facts = Page(make_report([run])).facts
    assert facts[""] == ["run"]
    assert facts["folder"] == [str(run)]
    assert facts["loss"] == ["dpo (beta=0.1)"]
    assert facts["solver"] == ["primal_dual (tolerance=0.02)"]
    assert facts["seed"] == ["7"]
    assert facts["updates done"] == ["3"]
    assert facts["preference accuracy"] == ["75.0 %"]
    assert facts["chosen log-ratio"] == ["-1.50 nats"]
    assert facts["gap"] == ["+0.1250 nats per token"]
    assert facts["margin"] == ["+0.100 *"], "not evaluated: marked"
    assert facts["tolerance"] == ["0.02"]
    assert facts["throughput"] == ["900 tokens/s"]
    assert facts["probes"] == ["3 pairs, gradients=head"]


def test_a_reference_that_moves_is_named_and_what_it_does_to_the_curves(tmp_path, one_figure):
    still, moving = (write_stage(tmp_path / name) for name in ("still", "moving"))
    told = "reference: {mode: online, moving: {alpha: 0.6, every: 8}}\n"
    with (moving / "config.yaml").open("a") as file:
        file.write(told)
    page = Page(make_report([still, moving], tmp_path / "both.html"))
    assert page.facts["reference"] == ["–", "follows the policy (alpha=0.6, every=8 updates)"]
    assert "fall back whenever it has followed" in page.text
    alone = Page(make_report([still]))
    assert "reference" not in alone.facts
    assert "whenever it has followed" not in alone.text


# Several runs


@pytest.mark.slow
def test_two_runs_are_overlaid(tmp_path, monkeypatch):
    drawn = {}

    def keep(name, runs, draw=report.draw):
        drawn[name] = draw(name, runs)
        return drawn[name]

    monkeypatch.setattr(report, "draw", keep)
    runs = [write_stage(tmp_path / name, dynamics=[probing(0)]) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    out = make_report(runs)
    assert out.resolve() == tmp_path / "report.html"
    page = Page(out)
    assert pngs(tmp_path / "report_figures") == {n for n, f in drawn.items() if f is not None}
    for name, figure in drawn.items():
        if figure is None:
            continue
        labels = {line.get_label() for axes in figure.axes for line in axes.get_lines()}
        shown = {label.split(":")[0] for label in labels if not label.startswith("_")}
        assert shown == {"a", "b"}, name
    assert page.facts[""] == ["a", "b"]
    assert all(image["alt"].endswith("(a, b)") for image in page.images)


def test_a_run_of_stages_is_its_preference_beside_its_baseline(tmp_path, one_figure):
    run = write_run(tmp_path / "run")
    out = make_report([run])
    assert out == run / "report.html"
    facts = Page(out).facts
    assert facts[""] == ["preference (dpo + penalty)", "baseline (dpo)"]
    assert facts["stage"] == ["preference", "baseline"]
    assert facts["solver"] == ["penalty", "preference_only"], "not what its configuration names"
    assert [p.name for p in find_stages(write_run(tmp_path / "s", ["sft"]))] == ["sft"]
    assert [p.name for p in find_stages(write_run(tmp_path / "p", ["sft", "preference"]))] == [
        "preference"
    ]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (
            None,
            ["run: preference (dpo + penalty)", "run: baseline (dpo)", "other/preference", "one"],
        ),
        (["x", "y", "y"], ["x: preference (dpo + penalty)", "x: baseline (dpo)", "y", "y (2)"]),
    ],
)
def test_labels(tmp_path, one_figure, labels, expected):
    write_run(tmp_path / "other")
    runs = [write_run(tmp_path / "run"), tmp_path / "other" / "preference"]
    runs.append(write_stage(tmp_path / "one"))
    out = make_report(runs, tmp_path / "out" / "page.html", labels=labels)
    assert Page(out).facts[""] == expected
    assert pngs(tmp_path / "out" / "page_figures")


def test_equal_labels_are_made_distinct(tmp_path, one_figure):
    runs = [write_stage(tmp_path / folder / "run") for folder in "abc"]
    facts = Page(make_report(runs, tmp_path / "r.html", labels=["s", "s (2)", "s"])).facts
    assert facts[""] == ["s", "s (2)", "s (3)"]


# Reading


def read(folder):
    config, stage = read_description(folder)
    return read_stage(folder, stage, config, label="a")


def test_values_arrive_unbent(tmp_path):
    found = read(write_stage(tmp_path / "run", dynamics=[probing(0), probing(5)]))
    assert found.curves.train["loss"].steps.tolist() == [1, 2, 3]
    assert found.curves.train["loss"].values.tolist() == [0.7, 0.7, 0.7]
    assert found.curves.heldout["gap"].values.tolist() == [0.0, 0.125]
    assert "step" not in found.curves.train
    first, _ = found.curves.probes
    np.testing.assert_array_equal(first.pairs["law/chosen_rate"], [1, np.nan, -3])
    assert first.summary == {"repetition": 0.1, "log_ratio/chosen": 0.5, "law/chosen_rate": -1.0}
    assert found.curves.probed["repetition"].steps.tolist() == [0, 5]


def test_lines_cut_short_and_values_that_are_no_numbers_are_left_out(tmp_path):
    run = write_stage(tmp_path / "run", dynamics=[probing(0)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": NaN, "gap": null, "lr": true, "note": "x"}\n')
        file.write('[1]\n\n{"loss": 3.0}\n{"step": 5, "lo')
    with (run / "dynamics.jsonl").open("ab") as file:
        file.write('{"step": 9, "samples": [{"prompt": "é'.encode()[:-1])
    found = read(run)
    assert found.curves.train["loss"].steps.tolist() == [1, 2, 3]
    assert found.curves.train["lr"].steps.tolist() == [1, 2, 3]
    assert "note" not in found.curves.train
    assert len(found.curves.probes) == 1


def test_a_run_that_is_still_going_needs_no_checkpoint_nor_configuration(tmp_path):
    run = tmp_path / "preference"
    run.mkdir()
    write_lines(run / "metrics.jsonl", [{"step": 1, "loss": 0.7, "gap": 0.1}])
    page = Page(make_report([run]))
    assert page.facts["stage"] == ["preference"]
    assert "seed" not in page.facts


@pytest.mark.parametrize(
    ("stage", "solver", "expected"),
    [
        ("preference", {"name": "penalty", "penalty": "hinge", "tolerance": 0.25}, 0.25),
        ("preference", {"name": "penalty"}, 0.0),
        ("preference", {"name": "preference_only"}, 0.0),
        ("baseline", {"name": "penalty", "penalty": "hinge", "tolerance": 0.25}, 0.0),
        ("preference", {}, 0.0),
    ],
)
def test_tolerance_is_the_solvers_option_or_its_default(stage, solver, expected):
    assert tolerance_of(stage, {"solver": solver}) == expected


def test_tolerance_falls_back_to_the_default_of_the_solver(monkeypatch):
    table = {"solver": {"mine": {"tolerance": 0.5}, "needy": {"tolerance": None}}}
    monkeypatch.setattr(report.runs, "choices", lambda: table)
    assert tolerance_of("preference", {"solver": {"name": "mine"}}) == 0.5
    assert tolerance_of("preference", {"solver": {"name": "needy"}}) == 0.0


# Writing


@pytest.mark.slow
def test_a_new_report_replaces_the_old_and_its_figures(tmp_path):
    run = write_stage(tmp_path / "run", dynamics=[probing(0)])
    make_report([run])
    (run / "report_figures" / "mine.png").write_bytes(b"")
    (run / "dynamics.jsonl").unlink()
    make_report([run])
    found = pngs(run / "report_figures")
    assert "law_rates" not in found
    assert {"loss", "mine"} <= found
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_the_same_runs_give_the_same_page(tmp_path):
    run = write_stage(tmp_path / "run", dynamics=[probing(0)])
    first = make_report([run]).read_bytes()
    assert make_report([run]).read_bytes() == first


def test_an_old_report_survives_one_that_fails(tmp_path, one_figure, monkeypatch):
    run = write_stage(tmp_path / "run")
    old = make_report([run]).read_bytes()

    def fail(*_):
        raise RuntimeError("drawing")

    monkeypatch.setattr(report, "draw", fail)
    with pytest.raises(RuntimeError):
        make_report([run])
    assert (run / "report.html").read_bytes() == old


# What is refused


def test_no_such_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: expected .* output_dir"):
        make_report([tmp_path / "nowhere"])


def test_a_folder_without_metrics(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no metrics.jsonl: expected .* baseline"):
        make_report([tmp_path])


def test_a_run_without_a_usable_line(tmp_path):
    for text in ("", '{"step": 1, "lo', '{"step": 1}\n'):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"metrics.jsonl has no line with a step and a value"):
            make_report([tmp_path])
    assert not (tmp_path / "report.html").exists()


def test_labels_of_another_number(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match=r"2 labels \(a, b\) for 1 runs: give one label a run"):
        make_report([run], labels=["a", "b"])


def test_nothing_to_report_and_nowhere_to_write(tmp_path, one_figure):
    with pytest.raises(ValueError, match="no run given"):
        make_report([])
    run = write_stage(tmp_path / "run")
    with pytest.raises(ValueError, match=r"is a folder: name a file .*report\.html"):
        make_report([run], tmp_path)
    with pytest.raises(OSError, match=r"cannot write the report .* give --out another"):
        make_report([run], run / "metrics.jsonl" / "report.html")


# The command


def test_command_writes_and_names_the_page(tmp_path, one_figure, capsys):
    run = write_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    out = tmp_path / "both.html"
    runs = [str(run / "preference"), str(run / "baseline")]
    assert main(["report", *runs, "--out", str(out), "--label", "SPO", "DPO"]) == 0
    assert Page(out).facts[""] == ["SPO", "DPO"]


@pytest.mark.parametrize("arguments", [["nowhere"], [".", "--label", "a", "b"]])
def test_command_says_what_is_wrong(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    assert capsys.readouterr().err.startswith("spo-jax: error: ")


def test_command_without_a_run(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report"])
    assert stop.value.code == 2
    assert "RUN" in capsys.readouterr().err
