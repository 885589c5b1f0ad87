"""The judge of the user's: what it is asked, what is made of its answers, and how it may fail."""

import json
import shlex
import sys

import pytest

from spo_jax.cli import main
from spo_jax.evaluation.judge import (
    JudgeError,
    Pair,
    ask_judge,
    judge_outputs,
    match_outputs,
    read_outputs,
    summary,
)

LOOP = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    a, b = len(asked["output_1"]), len(asked["output_2"])
    answer = {answer}
    print(json.dumps({{"id": asked["id"], "preference": answer}}), flush=True)
"""
LONGER = "1 if a > b else 2 if b > a else 1.5"


def command(tmp_path, source, name="judge.py"):
    """A judge that is a Python program."""
    file = tmp_path / name
    file.write_text(source)
    return shlex.join([sys.executable, str(file)])


def write(path, rows):
    path.write_text(json.dumps([{"instruction": i, "output": o} for i, o in rows]))
    return path


@pytest.fixture
def files(tmp_path):
    """Of four pairs the first two are longer, the third is as long, the fourth shorter."""
    ours = [("a", "long" * 5), ("b", "x" * 21), ("c", "same"), ("d", "s"), ("mine alone", "?")]
    theirs = [("d", "longer"), ("b", "y" * 20), ("a", "l"), ("c", "even"), ("yours alone", "!")]
    return write(tmp_path / "ours.json", ours), write(tmp_path / "theirs.json", theirs)


def test_a_judge_that_prefers_the_longer(files, tmp_path):
    found = judge_outputs(*files, command=command(tmp_path, LOOP.format(answer=LONGER)))
    assert (found["pairs"], found["outputs"], found["others"]) == (4, 5, 5)
    assert found["win_rate"] == (1 + 1 + 0.5 + 0) / 4
    low, high = found["win_rate_interval"]
    assert 0 < low < found["win_rate"] < high < 1
    assert found["order_disagreements"] == 0
    assert found["similar_length"]["pairs"] == 2
    assert found["similar_length"]["win_rate"] == 0.75
    assert found["mean_characters"] == (20 + 21 + 4 + 1) / 4
    assert found["mean_characters_other"] == (1 + 20 + 4 + 6) / 4
    verdicts = [json.loads(x) for x in (tmp_path / "ours.verdicts.jsonl").read_text().splitlines()]
    assert {v["id"]: v["preference"] for v in verdicts} == {
        "0/1": 1, "0/2": 2, "1/1": 1, "1/2": 2, "2/1": 1.5, "2/2": 1.5, "3/1": 2, "3/2": 1,
    }  # fmt: skip


def test_a_judge_that_always_takes_the_first_is_found_out(files, tmp_path):
    found = judge_outputs(*files, command=command(tmp_path, LOOP.format(answer="1")))
    assert found["win_rate"] == 0.5
    assert found["order_disagreements"] == 1


def test_zero_is_a_tie_and_fractions_count(files, tmp_path):
    found = judge_outputs(*files, command=command(tmp_path, LOOP.format(answer="0")))
    assert (found["win_rate"], found["order_disagreements"]) == (0.5, 0)
    pairs = [Pair("a", "x", "y" * 9)]
    by_hand = summary(pairs, {"0/1": 1.25, "0/2": 1.5})
    assert by_hand["win_rate"] == (0.75 + 0.5) / 2
    assert by_hand["order_disagreements"] == 1
    assert by_hand["similar_length"] == {"pairs": 0}


def test_a_judge_may_read_everything_before_it_answers(files, tmp_path):
    source = LOOP.format(answer=LONGER).replace("in sys.stdin", "in reversed(list(sys.stdin))")
    assert judge_outputs(*files, command=command(tmp_path, source))["win_rate"] == 0.625


DIES = "import sys\nprint('out of memory', file=sys.stderr)\nsys.exit(3)\n"
ANSWERS_ONE = LOOP.format(answer="1") + "    print('no credit left', file=sys.stderr)\n    break\n"
HANGS = "import sys, time\nprint('thinking', file=sys.stderr, flush=True)\ntime.sleep(60)\n"


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        (DIES, ["exit status 3", "8 of 8 verdicts are missing", "stderr: out of memory"]),
        (ANSWERS_ONE, ["stopped early", "7 of 8 verdicts", "no credit left"]),
        ("print('Sure! Output 1 is better')", ["answered 'Sure! Output 1", '"preference": 1 to 2']),
        (LOOP.format(answer="3"), ["answered", '"preference": 3']),
        (LOOP.format(answer="True"), ['"preference": true']),
        (LOOP.format(answer="1").replace('asked["id"]', '"9/1"'), ['"id": "9/1"']),
        (LOOP.format(answer="1").replace('asked["id"]', '"0/1"'), ['"id": "0/1"', "7 of 8"]),
        (HANGS, ["no answer for 0.7 s", "stderr: thinking"]),
    ],
    ids=["dies", "answers one", "words", "range", "bool", "foreign id", "twice", "hangs"],
)
def test_a_judge_that_fails_is_one_clear_error(files, tmp_path, source, parts):
    timeout = 0.7 if source is HANGS else 20.0
    with pytest.raises(JudgeError) as error:
        judge_outputs(*files, command=command(tmp_path, source), timeout=timeout)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert read_outputs(files[0])


def test_verdicts_that_came_are_not_asked_again(files, tmp_path):
    good = LOOP.format(answer=LONGER)
    judge = command(tmp_path, good + "    if asked['id'] == '1/1': break\n")
    with pytest.raises(JudgeError, match="5 of 8 verdicts are missing"):
        judge_outputs(*files, command=judge)
    kept = (tmp_path / "ours.verdicts.jsonl").read_text().splitlines()
    assert len(kept) == 3
    with (tmp_path / "ours.verdicts.jsonl").open("a") as file:
        file.write("\n{half")
    counted = good.replace("a, b =", "open('asked', 'a').write('.'); a, b =")
    command(tmp_path, counted.replace("'asked'", repr(str(tmp_path / "asked"))))
    assert judge_outputs(*files, command=judge)["win_rate"] == 0.625
    assert (tmp_path / "asked").read_text() == "....."
    assert judge_outputs(*files, command=judge)["pairs"] == 4
    assert (tmp_path / "asked").read_text() == "....."
    # Another judge is asked anew.
    other = command(tmp_path, LOOP.format(answer="1"), "other.py")
    assert judge_outputs(*files, command=other)["win_rate"] == 0.5


def test_the_judge_is_started_once_and_gone_afterwards(tmp_path):
    pid = tmp_path / "pid"
    begin = f"import os\nopen({str(pid)!r}, 'a').write(str(os.getpid()) + ' ')\n"
    words = shlex.split(command(tmp_path, begin + LOOP.format(answer="1")))
    asked = {str(i): {"id": str(i), "output_1": "a", "output_2": "b"} for i in range(50)}
    assert len(list(ask_judge(words, asked, timeout=20.0))) == 50
    (only,) = pid.read_text().split()
    with pytest.raises(ProcessLookupError):
        __import__("os").kill(int(only), 0)


def test_equal_instructions_meet_in_order():
    ours = [{"instruction": "a", "output": o} for o in "12"]
    theirs = [{"instruction": "a", "output": o} for o in "345"]
    assert match_outputs(ours, theirs) == [Pair("a", "1", "3"), Pair("a", "2", "4")]
    with pytest.raises(ValueError, match="none of the 2 instructions"):
        match_outputs(ours, [{"instruction": "b", "output": ""}])


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("{", "not JSON"),
        ("{}", "expected a list of outputs, found dict"),
        ("[]", "expected a list"),
        ('[{"instruction": "a", "output": 3}]', "element 0: expected an object with a text 'out"),
        ('[{"output": "a"}]', "a text 'instruction'"),
        ("[3]", "element 0"),
    ],
)
def test_files_that_are_no_outputs(tmp_path, content, word):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=word):
        read_outputs(path)


def test_the_command(files, tmp_path, capsys):
    judge = command(tmp_path, LOOP.format(answer=LONGER))
    ours, theirs = map(str, files)
    assert main(["judge", ours, theirs, "--judge", judge]) == 0
    said = capsys.readouterr().out
    assert "win rate 62.5% (95 % interval" in said
    assert "not a length-controlled win rate" in said
    assert "1 of 5 outputs had no counterpart" in said
    kept = json.loads((tmp_path / "ours.judged.json").read_text())
    assert kept["win_rate"] == 0.625
    assert main(["judge", ours, str(tmp_path / "none.json"), "--judge", judge]) == 2
    assert "no such file of outputs" in capsys.readouterr().err
    assert main(["judge", ours, theirs, "--judge", "no-such-judge --x"]) == 2
    assert "there is no program 'no-such-judge'" in capsys.readouterr().err
    assert main(["judge", ours, theirs, "--judge", command(tmp_path, DIES, "dies.py")]) == 2
    assert "out of memory" in capsys.readouterr().err
