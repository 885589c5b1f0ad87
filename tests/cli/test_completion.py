"""The shells' completion: the printed script is sourced and asked, with nothing else in reach."""

import shutil
import subprocess

import pytest

from spo_jax.cli import make_parser
from spo_jax.cli.completion import completion_script

ASK = {
    "bash": """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
_spo_jax
[[ ${#COMPREPLY[@]} == 0 ]] || printf '%s\\n' "${COMPREPLY[@]}"
complete -p spo-jax >/dev/null
""",
    "zsh": """
compdef() { :; }
compadd() { shift; print -l -- $@; }
_files() { print -l -- @files "$@"; }
source "$1"; shift
words=("$@"); CURRENT=$#
_spo_jax
""",
}


@pytest.fixture(scope="module", params=["bash", "zsh"])
def ask(request, tmp_path_factory):
    """``ask(words) -> replies``; the last word is what has been typed of it."""
    shell = shutil.which(request.param)
    if shell is None:
        pytest.skip(f"no {request.param}")
    folder = tmp_path_factory.mktemp(request.param)
    script = folder / "script"
    script.write_text(completion_script(make_parser(), request.param))
    for name in ("run.yaml", "rows.jsonl"):
        (folder / name).touch()
    (folder / "sub").mkdir()

    def asked(*words):
        done = subprocess.run(
            [shell, "-c", ASK[request.param], shell, script, "spo-jax", *words],
            capture_output=True,
            text=True,
            check=True,
            cwd=folder,
            env={"PATH": "/nowhere"},
        )
        assert done.stderr == ""
        found = done.stdout.split()
        # zsh itself compares the replies with what has been typed.
        return [w for w in found if request.param == "bash" or w.startswith((words[-1], "@", "-g"))]

    asked.shell = request.param
    return asked


def files(ask, only_yaml):
    if ask.shell == "zsh":
        return {"@files", *(["-g"] if only_yaml else [])}
    return {"run.yaml", "sub"} if only_yaml else {"run.yaml", "rows.jsonl", "script", "sub"}


def test_commands(ask):
    parser = make_parser()
    (commands,) = (a for a in parser._actions if a.dest == "command")
    assert ask("") == list(commands.choices)
    assert ask("pl") == ["plan"]
    assert ask("config", "") == ["show", "from-trl"]
    assert ask("completion", "") == ["bash", "zsh"]


@pytest.mark.parametrize(
    ("words", "replies"),
    [
        (["train", "--res"], ["--resume"]),
        (["plan", "c.yaml", "--topo"], ["--topology"]),
        (["train", "c.yaml", "--outer.learning"], ["--outer.learning-rate"]),
        (["config", "show", "--mesh."], ["--mesh.data", "--mesh.fsdp", "--mesh.tensor"]),
        (["config", "show", "--only"], ["--only-set"]),
        (["dynamics", "c.yaml", "--loss.gamma"], ["--loss.gamma-beta-ratio"]),
        (["report", "--outer"], []),
        (["study", "--outer"], []),
        (["train", "--model.remat", "do"], ["dots", "dots_no_batch"]),
        (["train", "--model.compute_dtype", "b"], ["bfloat16"]),
        (["sft", "--stages", ""], ["sft", "preference", "baseline"]),
        (["train", "--data.packing", ""], ["auto", "true", "false"]),
        (["plan", "--solver.name", "pref"], ["preference_only"]),
        (["plan", "--stage", ""], ["sft", "preference", "baseline"]),
        (["config", "from-trl", "x", "--trainer", ""], ["dpo", "cpo", "orpo", "kto"]),
        (["export", "--dtype", "f"], ["float32", "float16"]),
    ],
)
def test_flags_keys_and_their_values(ask, words, replies):
    assert ask(*words) == replies


def test_files_where_files_are_wanted(ask):
    for words in (["train"], ["config", "show"], ["plan", "--full"], ["sft", "--resume"]):
        assert files(ask, True) <= set(ask(*words, "")) <= files(ask, True) | {"*.yaml"}
    for words in (["export"], ["train", "--data.train"], ["evaluate", "--data"]):
        assert set(ask(*words, "")) == files(ask, False)


def test_what_only_bash_does(ask):
    if ask.shell != "bash":
        pytest.skip("zsh takes a word with = as it stands")
    assert ask("train", "--model.remat", "=", "f") == ["full"]
    assert ask("train", "--model.remat", "=") == [
        "none", "elementwise", "dots", "dots_no_batch", "full",
    ]  # fmt: skip
    assert ask("train", "--sft_data.max_r") == ["--sft-data.max-rows"]
