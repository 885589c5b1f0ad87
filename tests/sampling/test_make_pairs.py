"""Pairs from a policy's own samples: what makes a pair, the file, what training reads."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import datasets
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from spo_jax.checkpoints.atomic import write_rows
from spo_jax.cli import main
from spo_jax.config.schema import DataConfig, ModelConfig
from spo_jax.data import TextRows, encode_prompts, load_tokenizer, tokenize_rows
from spo_jax.models import save_pretrained
from spo_jax.parallel.mesh import make_mesh
from spo_jax.policies.completions import Completion
from spo_jax.policies.loading import Policy, load_policy
from spo_jax.policies.rows import prepare_rows, read_rows
from spo_jax.sampling.make_pairs import PairSettings, Problem, draws, making, pairing, write_pairs
from spo_jax.sampling.make_pairs.journal import PARTIAL, PairFile, meta_path
from spo_jax.sampling.make_pairs.pairing import (
    Counts,
    pairs_of_samples,
    row_to_problem,
    split_ending,
)
from spo_jax.sampling.make_pairs.summary import Progress, summary
from spo_jax.tasks import arithmetic
from spo_jax.types import PreferenceRow, SFTRow
from tests.data.tiny_data import CHATML, char_vocab, ids, make_char_tokenizer, make_marked_tokenizer
from tests.tiny import ARCHITECTURE

# What makes a pair


def right(prompt, gold, output):
    return output.split()[-1:] == gold.split()[-1:]


GOLD = Problem("2+2=", "so 4", 7)


def samples(*texts):
    """Samples with an end; ``(text,)`` is one that was cut off."""
    return [Completion(t[0], False) if isinstance(t, tuple) else Completion(t, True) for t in texts]


def pairs(*texts, problem=GOLD, **options):
    options = {"chosen": "gold", **options}
    rows, counts = pairs_of_samples(problem, samples(*texts), right, **options)
    assert counts.pairs == len(rows)
    return rows, counts


def texts_of(rows):
    return [(row["chosen"], row["rejected"]) for row in rows]


def test_each_distinct_wrong_sample_is_rejected_once():
    rows, counts = pairs("a 3", "b 4", "a 3", " ", "", "c 5", ("d 6",), ("e 4",))
    assert rows == [
        {
            **{"prompt": "2+2=", "chosen": "so 4", "rejected": text},
            **{"chosen_from": "gold", "row": 7, "sample": i},
        }
        for text, i in (("a 3", 0), ("c 5", 5))
    ]
    assert counts == Counts(
        prompts=1, samples=8, right=2, unanswered=1, cut_off=2, empty=2, duplicates=1, pairs=2
    )


def test_cut_off_samples_are_kept_where_asked_for_and_never_chosen():
    rows, _ = pairs(("d 6",), ("e 4",), "a 3", cut_off="keep")
    assert texts_of(rows) == [("so 4", "d 6"), ("so 4", "a 3")]
    rows, _ = pairs(("d 6",), ("e 4",), "f 4", chosen="own", cut_off="keep")
    assert texts_of(rows) == [("f 4", "d 6")]


def test_own_right_samples_take_turns():
    rows, counts = pairs("a 4", "x 1", "b 4", "a 4", "y 2", "z 3", chosen="own")
    assert texts_of(rows) == [("a 4", "x 1"), ("b 4", "y 2"), ("a 4", "z 3")]
    assert [(row["chosen_sample"], row["sample"]) for row in rows] == [(0, 1), (2, 4), (0, 5)]
    assert {row["chosen_from"] for row in rows} == {"own"}
    assert (counts.right, counts.all_right, counts.all_wrong) == (3, 0, 0)


@pytest.mark.parametrize("chosen", ["gold", "own"])
def test_prompts_without_pairs(chosen):
    rows, counts = pairs("a 4", "b 4", chosen=chosen)
    assert (rows, counts.all_right, counts.all_wrong) == ([], 1, 0)
    rows, counts = pairs("x 1", "y 2", chosen=chosen)
    assert (len(rows), counts.all_right, counts.all_wrong) == (2 * (chosen == "gold"), 0, 1)


def test_at_most_so_many_pairs_of_a_prompt():
    assert texts_of(pairs("x 1", "y 2", "z 3", most=2)[0]) == [("so 4", "x 1"), ("so 4", "y 2")]


@pytest.mark.parametrize(("chosen", "others"), [("gold", ()), ("own", ("so 4",))])
def test_white_space_alone_makes_no_pair(chosen, others):
    """The loader would refuse the whole file for it."""

    def picky(prompt, gold, output):
        return output == gold

    drawn = samples(*others, "so 4\n", "x 1")
    rows, counts = pairs_of_samples(GOLD, drawn, picky, chosen=chosen)
    assert texts_of(rows) == [("so 4", "x 1")]
    assert counts.duplicates == 1


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (Problem("2+2=", "so 4", 3), "row 3 .*'so 4' is graded wrong"),
        (Problem("  ", "so 4", 4), "row 4 .*the prompt is empty"),
        (Problem("hello", "so 4", 5), "row 5 .*cannot grade it: invalid literal"),
    ],
)
def test_a_gold_answer_that_fails_names_its_row(problem, message):
    def grader(prompt, gold, output):
        int(prompt[0])
        return False

    with pytest.raises(ValueError, match=message):
        pairs_of_samples(problem, samples("x"), grader, chosen="gold")


# Rows to problems


@pytest.mark.parametrize(
    ("eos", "text", "expected"),
    [
        ("<|im_end|>", "so 4<|im_end|>\n", ("so 4", "")),
        ("</s>", "so 4<|im_end|>\n", ("so 4", "<|im_end|>\n")),
        ("</s>", "so 4<|im_end|>\n</s>\n", ("so 4", "<|im_end|>\n")),
        ("</s>", "so 4</s>", ("so 4", "")),
        ("</s>", " so <|im_end|> 4\n", (" so <|im_end|> 4\n", "")),
        ("</s>", "so 4 \n", ("so 4 \n", "")),
    ],
)
def test_what_a_template_writes_behind_an_answer(eos, text, expected):
    assert split_ending(text, make_char_tokenizer(eos=eos)) == expected


def test_the_last_answer_of_a_dialogue():
    tokenizer = make_char_tokenizer()
    row = SFTRow("a?", (("b", True), ("c?", False), ("d</s>", True)))
    assert row_to_problem(row, 5, tokenizer) == Problem("a?bc?", "d", 5)
    assert row_to_problem(PreferenceRow("a?", "b", "c"), 6, tokenizer) == Problem("a?", "b", 6)


# Settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"task": "chess"}, "task='chess': choose one of arithmetic, gsm8k"),
        ({"samples": 0}, "samples=0: use at least 1"),
        ({"max_pairs_per_prompt": 0}, "max_pairs_per_prompt=0"),
        ({"seed": -1}, "seed=-1"),
        ({"temperature": 0.0}, "the same sample 4 times"),
        ({"chosen": "own", "samples": 1}, "raise samples=1"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        PairSettings(**{"task": "arithmetic", **wrong})


# The file, with samples that are made up

ROWS = 7
SETTINGS = PairSettings("arithmetic", samples=3, seed=5, max_new_tokens=20)
PROBLEMS = [Problem(*arithmetic.solve(10 + i, 5, 2), row=3 * i) for i in range(ROWS)]


class Sampler:
    """Instead of ``complete``: texts that depend on seed and row number alone.

    ``calls`` has the rows of each call; at call number ``fails_at`` it is stopped.
    """

    def __init__(self, fails_at=None, wrong=True):
        self.calls, self.fails_at, self.wrong = [], fails_at, wrong

    def __call__(self, model, params, tokenizer, prompts, *, seed, rows, progress, **settings):
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        self.calls.append(tuple(rows))
        progress(len(prompts), len(prompts))
        return [self.draw(prompt, seed, row) for prompt, row in zip(prompts, rows, strict=True)]

    def draw(self, prompt, seed, row):
        left, right = map(int, prompt.rstrip("=").split("+"))
        off = np.random.default_rng((seed, row)).integers(3) if self.wrong else 0
        text = f"é {left + right + off}"
        return Completion(text, True)


@pytest.fixture
def tokenizer_folder(tmp_path):
    arithmetic.write_tokenizer(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def make(monkeypatch, tokenizer_folder):
    """``write_pairs`` by blocks of two prompts, with a ``Sampler``."""
    params = {"w": jnp.ones(3)}
    policy = Policy(None, params, load_tokenizer(tokenizer_folder), tokenizer_folder)
    monkeypatch.setattr(making, "BLOCK", 2)

    def run(out, sampler=None, problems=PROBLEMS, settings=SETTINGS, **options):
        monkeypatch.setattr(draws, "complete", sampler or Sampler())
        kept = policy._replace(params=options.pop("params", params))
        options = {"batch_size": 2, "model": "mine", **options}
        return write_pairs(kept, problems, out, settings, **options)

    return run


def read(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_and_its_description(make, tmp_path):
    out = tmp_path / "new" / "pairs.jsonl"
    counts = make(out)
    rows = read(out)
    assert len(rows) == counts.pairs > 4
    assert list(rows[0]) == [
        *("prompt", "chosen", "rejected", "chosen_from", "row", "sample", "policy")
    ]
    for row in rows:
        problem = PROBLEMS[row["row"] // 3]
        assert (row["prompt"], row["chosen"]) == problem[:2]
        assert not arithmetic.is_correct(row["prompt"], row["rejected"])
    assert (counts.prompts, counts.samples) == (ROWS, 3 * ROWS)
    assert counts.samples == counts.right + counts.pairs + counts.duplicates
    told = yaml.safe_load(meta_path(out).read_text())
    assert told["counts"] == counts._asdict()
    assert told["model"] == "mine"
    assert told["settings"]["policy"] == rows[0]["policy"]
    assert set(told["versions"]) == {"spo-jax", "jax", "transformers"}
    assert sorted(p.name for p in out.parent.iterdir()) == ["pairs.jsonl", "pairs.meta.yaml"]
    assert f"pairs: {counts.pairs}" in summary(counts)


def test_every_sample_has_a_number_of_its_own(make, tmp_path):
    """Rows by their place in the data, samples by their seed, blocks not at all."""
    sampler, seeds = Sampler(), []
    draw = sampler.draw
    sampler.draw = lambda prompt, seed, row: seeds.append((seed, row)) or draw(prompt, seed, row)
    make(tmp_path / "pairs.jsonl", sampler)
    assert sampler.calls[::3] == [(0, 1), (2, 3), (4, 5), (6,)]
    assert len(set(seeds)) == 3 * ROWS
    assert len({seed for seed, _ in seeds}) == 3
    make(tmp_path / "few.jsonl", problems=PROBLEMS[:5])
    few = (tmp_path / "few.jsonl").read_text()
    assert (tmp_path / "pairs.jsonl").read_text().startswith(few)


@pytest.mark.parametrize("fails_at", [0, 4, 9, 11])
def test_a_stopped_call_goes_on(make, tmp_path, fails_at):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    make(whole)
    with pytest.raises(KeyboardInterrupt):
        make(stopped, Sampler(fails_at))
    assert not stopped.exists()
    rest = Sampler()
    make(stopped, rest, batch_size=1)
    assert len(rest.calls) == 12 - fails_at, "no sample of a block is drawn twice"
    assert stopped.read_bytes() == whole.read_bytes()
    assert meta_path(stopped).read_bytes() == meta_path(whole).read_bytes()


def test_a_machine_with_other_blocks_may_go_on(make, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    make(whole)
    with pytest.raises(KeyboardInterrupt):
        make(stopped, Sampler(3))
    rest = Sampler()
    monkeypatch.setattr(making, "BLOCK", 3)
    make(stopped, rest)
    assert rest.calls[::3] == [(2, 3, 4), (5, 6)]
    assert stopped.read_bytes() == whole.read_bytes()


def test_samples_of_blocks_too_large_for_a_machine_are_drawn_again(make, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    make(whole)
    monkeypatch.setattr(making, "BLOCK", 3)
    with pytest.raises(KeyboardInterrupt):
        make(stopped, Sampler(2))
    monkeypatch.setattr(making, "BLOCK", 2)
    with pytest.raises(KeyboardInterrupt):
        make(stopped, small := Sampler(1))
    assert small.calls == [(0, 1)]
    rest = Sampler()
    make(stopped, rest)
    assert len(rest.calls) == 11, "what the small blocks had begun is taken over"
    assert stopped.read_bytes() == whole.read_bytes()


def test_a_smaller_block_under_way_is_gone_on_with(make, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    make(whole)
    with pytest.raises(KeyboardInterrupt):
        make(stopped, Sampler(5))
    rest = Sampler()
    monkeypatch.setattr(making, "BLOCK", 5)
    make(stopped, rest)
    assert rest.calls == [(2, 3), (4, 5, 6), (4, 5, 6), (4, 5, 6)]
    assert stopped.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("backend", "prompts", "block"),
    [("gpu", 256, 256), ("gpu", 300, 150), ("gpu", 3, 3), ("cpu", 300, 30), ("cpu", 33, 17)],
)
def test_blocks_are_even_and_small_where_sampling_is_slow(monkeypatch, backend, prompts, block):
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    assert making._prompts_of_a_block(prompts) == block


def test_the_first_samples_say_how_long_it_will_take(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    shown = Progress(Counts(), 300, samples=4, drawn=150)
    now[0] = 60.0
    shown.update(Counts(), 300)
    said = capsys.readouterr().err
    # 150 in a minute, 900 to go; those of the stopped call are no speed of this one.
    assert said.startswith("0 of 300 prompts, 300 samples of the next, about 6 min left, 2.5 samp")


def test_a_kill_at_any_byte_shows_not_at_all(make, tmp_path):
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    make(whole)
    with pytest.raises(KeyboardInterrupt):
        make(torn, Sampler(9))
    partial = torn.with_name(torn.name + PARTIAL)
    content = partial.read_bytes()
    lines = content.splitlines(keepends=True)
    ends = [sum(map(len, lines[: i + 1])) for i in range(len(lines))]
    for size in (0, 1, ends[0], ends[1] - 1, ends[1], ends[3] - 5, ends[3], ends[4] - 1, ends[5]):
        partial.write_bytes(content[:size])
        torn.unlink(missing_ok=True)
        rest = Sampler()
        make(torn, rest)
        there = sum(b'"drawn": ' in x and size >= end for x, end in zip(lines, ends, strict=True))
        assert len(rest.calls) == 12 - there, size
        assert torn.read_bytes() == whole.read_bytes(), size
        assert not partial.exists()
    # Torn in the middle, as a disk that lost its power may leave it.
    partial.write_bytes(lines[0] + lines[1] + b"\0" * 40 + b"\n" + lines[3])
    torn.unlink()
    make(torn)
    assert torn.read_bytes() == whole.read_bytes()


def keep_the_partial_file(monkeypatch, copy):
    """As a kill behind the last steps but one would leave it."""
    finish = PairFile.finish
    monkeypatch.setattr(
        PairFile,
        "finish",
        lambda self, told: (shutil.copy(self.partial, copy), finish(self, told)),
    )


def test_a_kill_between_the_last_two_steps(make, tmp_path, monkeypatch):
    out, copy = tmp_path / "pairs.jsonl", tmp_path / "copy"
    keep_the_partial_file(monkeypatch, copy)
    make(out)
    content, partial = out.read_bytes(), out.with_name(out.name + PARTIAL)
    shutil.copy(copy, partial)
    make(out, Sampler(fails_at=0))
    assert (out.read_bytes(), partial.exists()) == (content, False)
    shutil.copy(copy, partial)
    out.write_text("another\n")
    with pytest.raises(FileExistsError, match="remove one of them"):
        make(out)
    assert out.read_text() == "another\n"


def test_what_is_there_is_not_touched(make, tmp_path):
    out = tmp_path / "pairs.jsonl"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match=r"pairs\.jsonl exists: name another"):
        make(out)
    with pytest.raises(ValueError, match=r"ends in \.jsonl"):
        make(tmp_path / "pairs.csv")
    out.unlink()
    partial = out.with_name(out.name + PARTIAL)
    partial.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match="is no unfinished file of pairs"):
        make(out)
    assert partial.read_text() == '{"prompt": "a"}\n'
    with pytest.raises(ValueError, match="batch_size=3: use 1 to 2"):
        make(out, batch_size=3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"settings": PairSettings("arithmetic", samples=3, seed=6, max_new_tokens=20)}, "seed"),
        ({"problems": PROBLEMS[:6]}, "prompts was 7, is 6"),
        ({"problems": [*PROBLEMS[:6], Problem(*arithmetic.solve(1, 2, 2), 18)]}, "data"),
        ({"params": {"w": jnp.zeros(3)}}, "policy"),
    ],
)
def test_other_settings_do_not_go_on(make, tmp_path, changed, message):
    out = tmp_path / "pairs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        make(out, Sampler(4))
    partial = out.with_name(out.name + PARTIAL)
    content = partial.read_bytes()
    with pytest.raises(ValueError, match=f"{message}.*Go on with those, or remove"):
        make(out, **changed)
    assert partial.read_bytes() == content


def test_a_pair_is_in_the_file_once(make, tmp_path):
    """The same prompt twice in the data, with samples that agree; a stop between the two."""
    out = tmp_path / "pairs.jsonl"
    twice = [PROBLEMS[0], PROBLEMS[1], PROBLEMS[0]._replace(row=9)]

    def sampler(fails_at=None):
        made = Sampler(fails_at)
        made.draw = lambda prompt, seed, row: Completion("é 0", True)
        return made

    with pytest.raises(KeyboardInterrupt):
        make(out, sampler(fails_at=4), problems=twice)
    counts = make(out, sampler(), problems=twice)
    assert [row["row"] for row in read(out)] == [0, 3]
    assert (counts.pairs, counts.duplicates, counts.samples) == (2, 7, 9)


@pytest.mark.parametrize(
    ("draw", "settings", "message"),
    [
        ("right", {}, "all are right: raise temperature"),
        ("wrong", {"chosen": "own"}, r"all are wrong \(21 without an answer\).*--chosen gold"),
        ("cut off", {}, "21 were cut off.*--cut-off keep"),
    ],
)
def test_no_pairs_at_all(make, tmp_path, draw, settings, message):
    sampler = Sampler(wrong=False)
    if draw != "right":
        sampler.draw = lambda *_: Completion("none", draw == "wrong")
    settings = PairSettings("arithmetic", samples=3, **settings)
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "pairs.jsonl", sampler, settings=settings)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_without_a_terminal_a_line_now_and_then(capsys, monkeypatch):
    shown = Progress(Counts(), 10, samples=4, seconds=0.0)
    shown.update(Counts(), 8)
    shown.update(Counts(prompts=4, samples=16, right=4, pairs=9))
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("0 of 10 prompts, ")
    assert err[1].startswith("4 of 10 prompts, ")
    assert err[1].endswith("samples/s, 25.0 % right, 9 pairs")
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    shown = Progress(Counts(prompts=10, samples=40), 100, samples=4)
    now[0] = 120.0
    shown.update(Counts(prompts=30, samples=120, right=30), 5)
    said = capsys.readouterr().err.splitlines()[1]
    assert said.startswith("30 of 100 prompts, 5 samples of the next, about 6 min left, 0.7 samp")
    shown = Progress(Counts(prompts=4, samples=16), 10, samples=4)
    shown.update(Counts(prompts=6, samples=24))
    assert capsys.readouterr().err == "going on behind 4 of 10 prompts\n"


# What training reads


def test_training_loads_the_file_as_pairs(make, tmp_path, tokenizer_folder):
    from spo_jax.evaluation.scoring import detect_kind

    out = tmp_path / "new" / "pairs.jsonl"
    make(out)
    rows, tokenizer = read(out), load_tokenizer(tokenizer_folder)
    assert detect_kind(str(out), "train") == "preference"
    # A folder too: what lies beside the file is not taken for data.
    for path in (out, out.parent):
        text = read_rows(DataConfig(train=str(path)), "preference", tokenizer, name="data")
        assert [tuple(row) for row in text] == [
            (row["prompt"], row["chosen"], row["rejected"]) for row in rows
        ]
        options = {} if path.is_dir() else {"data_files": str(path)}
        found = datasets.load_dataset(
            str(path) if path.is_dir() else "json",
            split="train",
            cache_dir=str(tmp_path / "cache"),
            **options,
        )
        assert set(found.column_names) >= {"prompt", "chosen", "rejected"}
        assert found[0] == rows[0]
    prepared = prepare_rows(
        DataConfig(train=str(out), eval_fraction=0.3), "preference", tokenizer, seed=0, name="data"
    )
    assert len(prepared.train) + len(prepared.heldout) == len(rows)


def stand_in(monkeypatch, sampled):
    """``complete`` that decodes the ids of ``sampled``; returns the keywords of its call."""
    given = {}

    def complete(model, params, tokenizer, prompts, **settings):
        given.update(settings)
        return [
            Completion(tokenizer.decode(ids, skip_special_tokens=True), True, tuple(ids))
            for ids in sampled[: len(prompts)]
        ]

    monkeypatch.setattr(draws, "complete", complete)
    return given


def trained_ids(path, tokenizer):
    """``(prompt, chosen, rejected)`` ids of each row, as training has them."""
    text = read_rows(DataConfig(train=str(path)), "preference", tokenizer, name="data")
    rows, _ = tokenize_rows(text, tokenizer, max_prompt_length=999, max_completion_length=999)
    prompts = np.split(rows.prompt_ids, rows.prompt_offsets[1:-1])
    completions = np.split(rows.completion_ids, rows.completion_offsets[1:-1])
    return [
        tuple(x.tolist() for x in (prompt, *completions[2 * i : 2 * i + 2]))
        for i, prompt in enumerate(prompts)
    ]


def make_gsm8k(tmp_path, monkeypatch, tokenizer, sampled):
    """Pairs of a question to each of ``sampled`` (ids); the paths of questions and pairs."""
    data, out = tmp_path / "data.jsonl", tmp_path / "pairs.jsonl"
    rows = [{"question": f"What is {i}", "answer": f"a {i}\n#### {i}"} for i in range(len(sampled))]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = read_rows(DataConfig(train=str(data)), "sft", tokenizer, name="data")
    problems = making.gradable_problems(text, tokenizer, "gsm8k", on_bad_row="error")
    given = stand_in(monkeypatch, sampled)
    policy = Policy(None, {"w": jnp.ones(2)}, tokenizer, tmp_path / "none")
    counts = write_pairs(policy, problems, out, PairSettings("gsm8k", samples=1), model="mine")
    return data, out, given, counts


@pytest.mark.parametrize(
    ("tokenizer", "closes"),
    [
        (lambda: make_char_tokenizer(bos=True), []),
        (lambda: make_char_tokenizer(eos="<|im_end|>", template=CHATML), []),
        # A template that ends a turn with another token than the EOS: sampling stops there,
        # and a row of training ends there.
        (lambda: make_char_tokenizer(template=CHATML), ["<|im_end|>"]),
    ],
    ids=["plain", "EOS ends a turn", "another token ends a turn"],
)
def test_training_has_the_ids_that_were_sampled(tmp_path, monkeypatch, tokenizer, closes):
    tokenizer = tokenizer()
    sampled = [ids(text) for text in (" so 7", "\n x  1 ", "#### 9", "Human: 1<")]
    data, out, given, counts = make_gsm8k(tmp_path, monkeypatch, tokenizer, sampled)
    closing = [char_vocab()[token] for token in closes]
    assert set(given["stop_ids"]) == {tokenizer.eos_token_id, *closing[:1]}
    assert counts.respelled == 0
    prompts = [
        row.prompt for row in read_rows(DataConfig(train=str(data)), "sft", tokenizer, name="")
    ]
    started = encode_prompts(prompts, tokenizer, max_prompt_length=999)
    found = trained_ids(out, tokenizer)
    assert [prompt for prompt, _, _ in found] == started
    assert [rejected for _, _, rejected in found] == [
        [*some, *(closing or [tokenizer.eos_token_id])] for some in sampled
    ]
    # The gold answer is trained on as the same row is in SFT.
    text = read_rows(DataConfig(train=str(data)), "sft", tokenizer, name="data")
    rows, _ = tokenize_rows(text, tokenizer, max_prompt_length=999, max_completion_length=999)
    gold = np.split(rows.completion_ids, rows.completion_offsets[1:-1])
    assert [chosen for _, chosen, _ in found] == [some.tolist() for some in gold]


@pytest.mark.parametrize("style", ["prepend", "metaspace", "byte_level"])
def test_the_blank_that_a_sample_begins_with_is_kept(tmp_path, monkeypatch, style):
    """SentencePiece-like tokenizers drop it from ids that are decoded alone."""
    tokenizer = make_marked_tokenizer(style)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    mark = "Ġ" if style == "byte_level" else "▁"
    words = [[mark + "the"], ["the"[:1], "he"], [mark, "x"]]
    sampled = [tokenizer.convert_tokens_to_ids(some) for some in words]
    _, out, _, counts = make_gsm8k(tmp_path, monkeypatch, tokenizer, sampled)
    assert [row["rejected"] for row in read(out)] == [" the", "the", " x"]
    found = [rejected[:-1] for _, _, rejected in trained_ids(out, tokenizer)]
    assert found == sampled
    assert counts.respelled == 0


def test_samples_that_training_would_spell_otherwise_are_counted():
    tokenizer = make_marked_tokenizer("prepend")

    def sampled(*tokens):
        made = tuple(tokenizer.convert_tokens_to_ids(list(tokens)))
        text = tokenizer.decode([tokenizer.convert_tokens_to_ids("x"), *made])[1:]
        return Completion(text, True, made)

    some = [sampled("12"), sampled("1", "2"), sampled("▁the")]
    assert draws.count_respelled(tokenizer, some) == 1


# With a model


@pytest.fixture(scope="module")
def random_policy(tmp_path_factory):
    """Random weights with the arithmetic tokenizer."""
    section = ModelConfig(init=ARCHITECTURE, tokenizer="builtin:arithmetic")
    return load_policy(section, make_mesh(), seed=0, work=tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def random_model(random_policy, tmp_path_factory):
    """The folder of ``random_policy``, and a file of problems."""
    folder = tmp_path_factory.mktemp("models") / "random"
    save_pretrained(folder, random_policy.params, random_policy.model, source=random_policy.folder)
    data = folder.parent / "data.jsonl"
    problems = [arithmetic.solve(i, 3, 1) for i in range(6)]
    write_rows(data, [p._asdict() for p in problems])
    return folder, data


def command(random_model, out, *more):
    model, data = random_model
    words = ["make-pairs", model, "--data", data, "--task", "arithmetic", "--out", out]
    return main([str(word) for word in (*words, "--max-new-tokens", 6, "--samples", 2, *more)])


@pytest.mark.slow
def test_what_is_drawn_for_a_row_depends_on_nothing_beside_it(random_policy):
    settings = PairSettings("arithmetic", samples=2, max_new_tokens=6, seed=3)
    prompts = [arithmetic.solve(i, 3, 1).prompt for i in range(5)]

    def draw(rows, settings=settings, batch_size=3):
        some = [prompts[i] for i in rows]
        drawn = draws.draw_samples(random_policy, some, settings, rows=rows, batch_size=batch_size)
        return [[sample.ids for sample in samples] for samples in drawn]

    found = draw([0, 1, 2, 3, 4])
    assert draw([3, 1], batch_size=2) == [found[3], found[1]]
    more = draw([0, 1, 2], dataclasses.replace(settings, samples=3))
    assert [samples[:2] for samples in more] == found[:3]
    assert draw([0, 1, 2], dataclasses.replace(settings, seed=4)) != found[:3]
    assert len({ids for samples in found for ids in samples}) == 10


def test_the_command(random_model, tmp_path, capsys):
    out = tmp_path / "pairs.jsonl"
    assert command(random_model, out, "--cut-off", "keep") == 0
    said, rows = capsys.readouterr().out, read(out)
    assert f"spo-jax train CONFIG --data.train {out}" in said
    assert f"pairs: {len(rows)};" in said
    assert {row["row"] for row in rows} == set(range(6))
    assert command(random_model, out) == 2
    assert "exists: name another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--samples", "0"), "samples=0: use at least 1"),
        (("--temperature", "0"), "draws the same sample 2 times"),
        (("--task", "gsm8k"), "no answer behind '####'.*--on-bad-row skip"),
        (("--task", "gsm8k", "--on-bad-row", "skip"), "none of 6 rows is of task gsm8k"),
        (("--batch-size", "999"), "batch_size=999: use 1 to 256"),
        (("--out", "pairs.txt"), "ends in .jsonl"),
        (("--data", "nowhere.jsonl"), "no such file or folder"),
    ],
)
def test_wrong_input_to_the_command(random_model, tmp_path, capsys, more, message):
    out = tmp_path / "pairs.jsonl"
    assert command(random_model, out, *more) == 2
    err = capsys.readouterr().err
    assert err.count("spo-jax: error:") == 1
    assert re.search(message, err), err
    assert not list(tmp_path.iterdir())


def test_rows_that_cannot_be_graded_are_left_out(random_policy, capsys):
    good = [SFTRow(p, ((c, True),)) for p, c in (arithmetic.solve(i, 3, 1) for i in range(3))]
    bad = SFTRow("1+1=", (("1+1+0=02; 3", True),))
    rows = TextRows((good[0], bad, *good[1:]), (0, 4, 5, 9))

    def problems(on_bad_row):
        return making.gradable_problems(
            rows, random_policy.tokenizer, "arithmetic", on_bad_row=on_bad_row
        )

    with pytest.raises(ValueError, match=r"row 4 \(from 0\).*graded wrong.*--on-bad-row skip"):
        problems("error")
    assert [problem.row for problem in problems("skip")] == [0, 5, 9]
    assert "1 rows left out that arithmetic cannot grade" in capsys.readouterr().err


def test_counts_add_up():
    some = Counts(prompts=1, samples=2, pairs=3)
    assert pairing.total([some, some]) == Counts(prompts=2, samples=4, pairs=6)
    assert pairing.total([]) == Counts()
