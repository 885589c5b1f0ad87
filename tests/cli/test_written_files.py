"""A file that cannot be written is found before the work, not behind it."""

import pytest

from spo_jax.cli import main

COMMANDS = {
    "data": ["data", "CONFIG", "--json", "OUT"],
    "plan": ["plan", "CONFIG", "--topology", "gpu:8", "--chip", "h100", "--json", "OUT"],
    "score-pairs": ["score-pairs", "CONFIG", "--out", "OUT"],
    "evaluate": ["evaluate", "MODEL", "--data", "ROWS", "--output", "OUT"],
    "generate": ["generate", "MODEL", "--data", "ROWS", "--out", "OUT"],
    "config from-trl": ["config", "from-trl", "FILE", "--out", "OUT"],
    "make-pairs": ["make-pairs", "MODEL", "--data", "ROWS", "--task", "arithmetic", "--out", "OUT"],
}
MAKES_FOLDERS = {"score-pairs", "generate", "make-pairs"}


def refusal(command, out, capsys):
    # Nothing else of what they name is there: it is not looked at first.
    assert main([str(out) if word == "OUT" else word for word in COMMANDS[command]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder(command, tmp_path, capsys):
    said = refusal(command, tmp_path, capsys)
    assert str(tmp_path) in said
    assert "name a" in said or "exists" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_below_a_file(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = refusal(command, tmp_path / "file" / "below" / "x.json", capsys)
    assert f"{tmp_path / 'file'} is a file, not a folder" in said


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - MAKES_FOLDERS))
def test_in_a_folder_that_is_not_there(command, tmp_path, capsys):
    said = refusal(command, tmp_path / "nowhere" / "x.json", capsys)
    assert "there is no such folder; make it first" in said
