"""The command line by itself: words in, one line and an exit status out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spo_jax.cli import main, make_parser
from spo_jax.cli.train import format_table, read_overrides
from spo_jax.config import ConfigError

ROOT = Path(__file__).parents[2]


def test_overrides_are_read_as_yaml():
    words = ["--a.b", "5e-7", "--c=[1, 2]", "--d", "{name: dpo, beta: 0.1}", "--e=a=b"]
    expected = {"a.b": 5e-7, "c": [1, 2], "d": {"name": "dpo", "beta": 0.1}, "e": "a=b"}
    assert read_overrides(words) == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [(["a.b", "1"], "--KEY VALUE"), (["--a.b"], "--a.b needs a value"), (["--a", "{"], "quotes")],
)
def test_overrides_that_are_none(words, said):
    with pytest.raises(ConfigError, match=said):
        read_overrides(words)


def test_the_table_has_the_columns_that_rows_have():
    rows = [
        {"stage": "sft", "accuracy": 0.866, "hidden": 1.0},
        {"stage": "preference", "accuracy": 0.948, "log_ratio/chosen": 0.49},
    ]
    title, head, first, second = format_table(rows, "Held out").splitlines()
    assert title == "Held out"
    assert head.split("  ")[-1].strip() == "chosen log-ratio"
    assert first.split() == ["sft", "86.6", "-"]
    assert second.split() == ["preference", "94.8", "+0.490"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["train"], 2, "name a configuration"),
        (["train", "nowhere.yaml"], 2, "no configuration at nowhere.yaml"),
        (["train", "c.yaml", "--allow-changes"], 2, "it goes with --resume"),
        (["export", "nowhere", "out"], 2, "nowhere is not the folder of a run"),
        (["generate", "m", "--data", "d", "--out", "o", "--judge", "j"], 2, "go together"),
    ],
)
def test_wrong_words_are_one_line(words, status, said, capsys):
    assert main(words) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("spo-jax: error: ")
    assert said in line


def test_words_that_no_command_takes(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", "run", "--outer.learning-rate", "1"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --outer.learning-rate 1" in capsys.readouterr().err


def test_every_command_is_in_the_description():
    parser = make_parser()
    (commands,) = (a for a in parser._actions if a.dest == "command")
    named = {name for name in commands.choices if f"spo-jax {name} " in parser.description}
    assert set(commands.choices) - named == {"sft"}  # part of train


@pytest.mark.slow
def test_libraries_say_nothing(tmp_path):
    """Neither that PyTorch is missing nor how far a library is with its own work."""
    code = (
        # PyTorch is hidden where it is installed.
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a)\n"
        "import spo_jax, transformers, datasets\n"
        "assert not transformers.utils.is_torch_available()\n"
        "from spo_jax.data import load_records, load_tokenizer\n"
        "from spo_jax.tasks.arithmetic import write_tokenizer\n"
        "write_tokenizer('model'); load_tokenizer('model')\n"
        "datasets.disable_progress_bars()\n"
        "datasets.Dataset.from_list([{'a': 'b'}] * 9).to_parquet('rows.parquet')\n"
        "datasets.enable_progress_bars()\n"
        "print(len(list(load_records('rows.parquet'))), datasets.is_progress_bar_enabled())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache")},
    )
    assert done.stderr == ""
    assert done.stdout.split() == ["9", "True"]
