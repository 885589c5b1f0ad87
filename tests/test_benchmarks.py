"""Benchmarks of one step: their arithmetic, their checks, and our sides for real, on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.data import rows_to_batch
from spo_jax.models import init_model
from spo_jax.models.attention import Layout
from spo_jax.objective.levels import make_logprobs_fn
from spo_jax.objective.logprobs import scored_mask
from tests.data.test_packing import mixed_rows
from tests.data.tiny_data import make_rows
from tests.models.tiny_models import HF_CONFIGS, write_folder
from tests.tiny import random_batch, tiny_model, tiny_params

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    """``script(name)`` imports a file of ``benchmarks/`` as it is when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        patch.syspath_prepend(str(FOLDER / "peers_sides"))
        yield importlib.import_module
    ours = {path.stem for path in FOLDER.glob("**/*.py")}
    for name in ours & set(sys.modules):
        del sys.modules[name]


# Arithmetic and checks


def test_the_studies_data_are_cut_and_chosen_as_said(script, tmp_path, capsys, monkeypatch):
    made = script("study_data")
    problems = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(1110)]
    files = {"train": problems, "test": problems[:3]}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stories = ["Once.", "Zoë.", "Twice."]
    (tmp_path / "stories.json").write_text(json.dumps(stories))
    mawps = [str(tmp_path / f"{name}.jsonl") for name in files]
    words = ["--mawps", *mawps, "--tinystories", str(tmp_path / "stories.json")]
    monkeypatch.setattr("sys.argv", ["study_data", "--out", str(tmp_path / "data"), *words])
    made.main()
    assert "mawps_validation.jsonl: 10 rows" in capsys.readouterr().out
    found = {p.stem: made.read(p) for p in (tmp_path / "data").iterdir()}
    cut = [found[f"mawps_{name}"] for name in ("sft", "pairs", "validation")]
    assert [len(rows) for rows in cut] == [800, 300, 10]
    assert [row for rows in cut for row in rows] == problems
    assert found["tinystories"] == [{"text": "Once."}, {"text": "Twice."}]

    talk = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = made.pair({"chosen": f"{talk} d", "rejected": f"{talk} e"})
    assert row == {"prompt": talk, "chosen": " d", "rejected": " e"}
    other = {"chosen": "\n\nHuman: x\n\nAssistant: d", "rejected": f"{talk} e"}
    pairs = [{"prompt": f"{i % 450}", "chosen": "a", "rejected": "b"} for i in range(900)]
    parts = made.preferences([*pairs, made.pair(other), {**pairs[0], "rejected": "a"}])
    assert [len(parts[f"hh_{name}"]) for name in ("train", "test")] == [500, 400]
    assert not {r["prompt"] for r in parts["hh_train"]} & {r["prompt"] for r in parts["hh_test"]}


def test_rank_correlation_by_hand(script):
    of = script("displacement")
    assert of.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert of.spearman(x, x**3) == pytest.approx(1)
    assert of.spearman(x, -np.exp(x)) == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with d = (0, 1, 1, 0).
    assert of.spearman(x, np.array([1.0, 9.0, 5.0, 10.0])) == pytest.approx(1 - 12 / 60)


def test_flops_of_a_perfect_step_by_hand(script):
    sides = script("step_sides")
    tiny = sides.llama_config(16, 3, 50)
    shape = sides.Shape(prompt=2, completion=4, pairs=5)
    # q and o 16 x 16, k and v 16 x 8, gate, up and down 16 x 44: 2880 weights in each of 3 layers.
    linear = 6 * 3 * 2880 * 5 * (2 + 2 * 4)
    head = 6 * 16 * 50 * 5 * 2 * 4
    # 2 pairs of positions within the prompt; 8 to it and 8 within each completion.
    attention = 12 * 8 * 2 * 3 * 5 * (2 + 2 * (8 + 8))
    assert sides.perfect_flops(shape, tiny) == linear + head + attention
    assert (shape.computed, shape.counted) == (50, 60)
    full = sides.llama_config(512, 8, 32000)
    found = [sides.perfect_flops(sides.Shape(*s, 4), full) for s in ((128, 384), (384, 128))]
    assert found == pytest.approx([0.859e12, 0.500e12], rel=2e-3)


def test_flops_of_a_model_without_head_dim_in_its_configuration(script):
    qwen = script("accelerator").MODELS["qwen2.5-0.5b"].architecture
    sides = script("step_sides")
    # q and o 896 x 896, k and v 896 x 2 * 64, the MLP 896 x 4864.
    layers = 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864)
    seen = 128**2 / 2 + 2 * (384 * 128 + 384**2 / 2)
    by_hand = 6 * (layers * 8 * (128 + 2 * 384) + 896 * 151936 * 8 * 2 * 384)
    by_hand += 12 * 896 * 24 * 8 * seen
    assert sides.perfect_flops(sides.Shape(128, 384, 8), qwen) == by_hand


def test_models_have_the_sizes_of_those_they_are_called_after(script):
    sizes = {
        "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-1.5b": 1_543_714_304,
        "llama-3-8b": 8_030_261_248,
    }
    for name, size in sizes.items():
        model = init_model(script("accelerator").MODELS[name].architecture)
        assert sum(math.prod(x.shape) for x in jax.tree.leaves(model.abstract_params())) == size


def test_sides_that_compute_something_else_are_named(script):
    disagreeing = script("step_sides").disagreeing
    ln2 = math.log(2)
    losses = {"a": [ln2, 0.6], "b": [ln2, 0.60005], "c": [ln2, 0.6], "other solver": [ln2, 0.5]}
    alike = {"a", "b", "c"}
    assert not disagreeing(losses, alike, 1e-4)
    (found,) = disagreeing(losses, {*alike, "other solver"}, 1e-4)
    assert found.startswith("other solver: the second loss is 0.5")
    (found,) = disagreeing({**losses, "d": [0.7, 0.6]}, alike, 1e-4)
    assert found.startswith("d: the first loss is 0.7")
    found = disagreeing({**losses, "e": [math.nan] * 2}, {*alike, "e"}, 1e-4)
    assert [line.split(":")[0] for line in found] == ["e", "e"]


def test_a_shape_is_two_numbers(script, capsys):
    for name in ("peers", "accelerator"):
        with pytest.raises(SystemExit):
            script(name).read_options(["--shape", "128"])
        assert "PROMPT/COMPLETION" in capsys.readouterr().err


def test_the_step_without_a_pair_layout_computes_the_same(script):
    model = tiny_model()
    params, batch = tiny_params(model), random_batch(rows=3)

    def value(logprobs, params):
        return jnp.sum(jnp.sin(jnp.where(scored_mask(batch), logprobs(params, batch), 0)))

    fns = script("shared").make_full_logits_fn(model), make_logprobs_fn(model)
    found, ours = (jax.value_and_grad(lambda p, fn=fn: value(fn, p))(params) for fn in fns)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, ours)


def test_what_runs_inside_a_loop_is_not_the_loops(script):
    events = [("loop", 0, 10), ("dot", 1, 4), ("dot", 5, 8), ("inside", 6, 7), ("after", 10, 12)]
    found = sorted(script("operations")._own_times(events))
    assert found == [("after", 2), ("dot", 2), ("dot", 3), ("inside", 1), ("loop", 4)]


def test_kernels_that_overlap_by_a_little_keep_their_time(script):
    events = [("one", 0, 10), ("two", 9, 20), ("three", 19, 22)]
    found = sorted(script("operations")._own_times(events))
    assert found == [("one", 10), ("three", 3), ("two", 11)]


# The sides of accelerator.py

TINY = [
    "--models", "tiny", "--shape", "4/6", "--pairs", "2", "--product", "64", "--steps", "1",
    "--warmup", "1", "--dtype", "float32", "--learning-rate", "1e-2",
]  # fmt: skip


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def check_record(record):
    assert record["losses"][0] == pytest.approx(math.log(2), abs=1e-4)
    # By hand: 2880 weights a layer of 2, tokens once 2 (4 + 12), a head of 16 x 40 for 24 of them.
    flops = 6 * (2 * 2880 * 32 + 16 * 40 * 24) + 12 * 16 * 2 * 2 * (8 + 2 * (24 + 18))
    assert record["flops"] == flops
    assert min(record["rate"], record["peak_bytes"], *record["seconds"]) > 0


@pytest.mark.long
def test_a_side_is_written_down_shown_and_not_run_again(script, tmp_path, capsys):
    accelerator, file = script("accelerator"), tmp_path / "found.jsonl"
    words = [*TINY, "--json", str(file), "--sides", "ours"]
    accelerator.main([*words, "--profile", str(tmp_path / "traces")])
    shown = capsys.readouterr().out
    (record,) = read(file)
    check_record(record)
    operations = [found["seconds"] for found in record["operations"]]
    assert operations == sorted(operations, reverse=True)
    assert 1 <= len(operations) <= 5
    assert record["operations"][0]["name"][:100] in shown
    seconds = record["seconds"][0]
    share = record["flops"] / seconds / record["rate"]
    assert f"| ours | {seconds:.4f} | {40 / seconds:,.0f} | - | " in shown  # 2 x 2 x (4 + 6) tokens
    assert f"| {share:.1%} | " in shown
    accelerator.main([*words, "ours + penalty", "--minutes", "0"])
    assert len(read(file)) == 1
    shown = capsys.readouterr().out
    assert "tiny 4/6 ours: done before" in shown
    assert "1 sides are left" in shown


@pytest.mark.long
def test_all_our_sides_run_and_agree(script, tmp_path):
    accelerator, file = script("accelerator"), tmp_path / "found.jsonl"
    ours = [name for name, side in accelerator.SIDES.items() if side.library == "ours"]
    accelerator.main([*TINY, "--json", str(file), "--sides", *ours])  # ends badly unless they agree
    records = {record["side"]: record for record in read(file)}
    assert list(records) == ours
    for name, record in records.items():
        check_record(record)
        if accelerator.SIDES[name].same_update:
            assert record["losses"][1] == pytest.approx(records["ours"]["losses"][1], abs=1e-4)
    assert math.log(2) - records["ours"]["losses"][1] > 1e-3  # a step of this size is seen
    assert records["ours + penalty"]["losses"][1] != records["ours"]["losses"][1]


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL")
def test_trls_side_runs(script, tmp_path):
    file = tmp_path / "found.jsonl"
    script("accelerator").main([*TINY, "--json", str(file), "--sides", "TRL", "TRL online"])
    best, online = read(file)
    check_record(best)
    assert online["losses"][1] == pytest.approx(best["losses"][1], abs=1e-4)
    assert math.log(2) - best["losses"][1] > 1e-3


def test_a_side_without_memory_is_a_row_and_one_that_failed_is_run_again(script, tmp_path, capsys):
    accelerator, sides = script("accelerator"), script("step_sides")

    class Fails:
        def __init__(self, status, words):
            self.ended = status, words

        def run(self, name, script, **more):
            raise sides.SideFailed(name, script, *self.ended)

    ends = {
        "ours": (1, "jax: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."),
        "ours online": (-9, ""),
        "TRL": (1, "torch.OutOfMemoryError: CUDA out of memory."),
        "TRL flash": (1, "Traceback ...\nImportError: no flash\n"),
    }
    shape, file = sides.Shape(4, 6, 2), tmp_path / "found.jsonl"
    options = accelerator.read_options(TINY)
    told = {"rate": 1e12, "flops": 1e6}
    records = []
    for name, end in ends.items():
        found = accelerator.run_side(name, accelerator.MODELS["tiny"], Fails(*end), None)
        key = accelerator.key_at("tiny", shape, name, options)
        records.append(found | dict(zip(accelerator.KEY, key, strict=True)) | told)
    accelerator.show(records, shape)
    shown = capsys.readouterr().out
    for name in ("ours", "ours online", "TRL"):
        assert f"| {name} | out of memory |" in shown
    assert "| TRL flash | failed: ImportError: no flash |" in shown
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [key[-1] for key in accelerator.read_records(file)] == ["ours", "ours online", "TRL"]


def test_rows_are_compared_with_the_fastest_of_trl(script):
    accelerator, sides = script("accelerator"), script("step_sides")
    told = {"wall_seconds": 1.0, "peak_bytes": 1, "flops": 6e12, "rate": 8e12}
    seconds = {"ours": [1.0, 9.0, 1.5], "TRL": [4.0], "TRL online": [3.0]}
    records = [{"side": name, "seconds": found, **told} for name, found in seconds.items()]
    rows = accelerator.table(records, sides.Shape(128, 384, 4))
    assert [row["ratio_to_trl"] for row in rows] == [2.0, 0.75, 1.0]
    assert rows[0]["share"] == 0.5
    assert rows[0]["tokens_per_second"] == 4 * 2 * 512 / 1.5


def test_a_profile_is_of_our_sides(script, capsys):
    with pytest.raises(SystemExit):
        script("accelerator").read_options(["--profile", "x", "--sides", "ours", "TRL"])
    assert "--profile would be ignored for TRL" in capsys.readouterr().err


# The sides of peers.py, the steps of tpu_step.py


@pytest.mark.long
def test_our_sides_beside_peers_run_and_agree(script, tmp_path, capsys):
    sides = ["ours online", "ours precomputed"]
    script("peers").main(
        ["--shape", "4/6", "--pairs", "2", "--hidden", "16", "--layers", "1", "--vocabulary", "40",
         "--rounds", "1", "--steps", "1", "--warmup", "1", "--learning-rate", "1e-2",
         "--json", str(tmp_path / "found.json"), "--sides", *sides]
    )  # fmt: skip
    shown = capsys.readouterr().out
    assert all(side in shown for side in sides)
    (shape,) = json.loads((tmp_path / "found.json").read_text())["shapes"]
    rows = {row["side"]: row for row in shape["table"]}
    assert list(rows) == sides
    online, precomputed = (rows[side]["losses"][1] for side in sides)
    assert online == pytest.approx(precomputed, abs=1e-4)
    assert math.log(2) - online > 1e-3  # a step of this size is seen
    for row in rows.values():
        assert min(row[k] for k in ("seconds", "tokens_per_second", "peak_bytes", "share")) > 0


@pytest.mark.long
def test_the_usual_step_computes_and_holds_more(script, tmp_path, capsys):
    tpu_step, sides = script("tpu_step"), script("step_sides")
    (tmp_path / "small.json").write_text(json.dumps(sides.llama_config(64, 2, 4096)))
    names = ["ours precomputed", "usual precomputed", "usual online"]
    tpu_step.main(
        ["--topology", "cpu:1", "--shape", "64/16", "--remat", "none", "--steps", *names,
         "--architecture", str(tmp_path / "small.json"), "--json", str(tmp_path / "found.json")]
    )  # fmt: skip
    steps = json.loads((tmp_path / "found.json").read_text())["steps"]
    ours, usual, online = steps
    assert [step["step"] for step in steps] == names
    # The head runs on 2 x 80 positions a pair, not on 2 x 16; the frozen model once more.
    head = 2 * 64 * 4096 * 2 * 2
    assert usual["flops"] - ours["flops"] > 3 * head * (80 - 16)
    assert online["flops"] - usual["flops"] > head * 80
    assert usual["temporaries"] - ours["temporaries"] > 4 * 4096 * 2 * 2 * (80 - 16)
    shown = capsys.readouterr().out
    assert all(tpu_step.line(name, step) in shown for name, step in zip(names, steps, strict=True))


def test_a_step_that_the_compiler_refuses_is_a_line(script):
    found = {"refusal": "too large", "needed": 20 * 2**30, "available": 16 * 2**30}
    shown = script("tpu_step").line("usual online", found)
    assert shown == "| usual online | the compiler refuses it: 20.0 of 16.00 GiB | | | | |"


# lora.py


@pytest.mark.long
def test_adapters_are_timed_beside_all_weights(script, capsys):
    words = "--model tiny --shape 4/4 --pairs 2 --rank 2 --steps 1"
    script("lora").main(words.split())
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("tiny, 4/4, 2 pairs, ")
    found = [
        re.search(r"([\d,]+) trained +(\d+) MiB \(([\d.]+)\) +(\d+) tokens/s", x) for x in lines
    ]
    trained, _, shares, rates = zip(*(x.groups() for x in found), strict=True)
    assert int(trained[0].replace(",", "")) > 20 * int(trained[1].replace(",", ""))
    assert trained[1] == trained[2]
    whole, on_base, in_four_bits = map(float, shares)
    assert whole == 1 > on_base > in_four_bits
    assert min(map(int, rates)) > 0


# generation.py


def test_useful_tokens_end_with_the_first_stop_id(script):
    drawn = np.array([[5, 1, 2, 1], [1, 9, 9, 9], [3, 4, 5, 6]])
    assert script("generation").useful_tokens(drawn, (1, 2)) == 2 + 1 + 4


@pytest.mark.long
def test_generation_is_timed_beside_its_limits(script, tmp_path, capsys):
    folder = write_folder(tmp_path, HF_CONFIGS["llama"])
    words = f"--model {folder} --batch 3 --dtype float32 --prompt 4 --new 3 --long 6 --mean 2"
    script("generation").main([*words.split(), "--rounds", "1"])
    _, facts, greedy, sampled, early = capsys.readouterr().out.splitlines()
    assert "prompt 4, 3 new tokens" in facts
    assert greedy.startswith("3 rows, float32, greedy: ")
    assert sampled.startswith("3 rows, float32, temperature 1: ")
    for line in (greedy, sampled):
        numbers = [float(n) for n in re.findall(r"([\d.]+) (?:tokens/s|ms)", line)]
        assert len(numbers) == 4
        assert min(numbers) > 0
    assert early.startswith("3 rows, float32, temperature 1, ending early: ")
    assert 1 <= float(re.search(r"([\d.]+) a row", early)[1]) <= 6


def test_padding_counts_what_is_laid_out(script):
    padding = script("padding")
    rows = make_rows([([1] * 3, [[2] * 4, [2] * 2]), ([1], [[2] * 8, [2]])])
    batches = [
        rows_to_batch(rows, np.array(ids), prompt_length=8, completion_length=16)
        for ids in ([0, 1], [[1, 0, -1]])
    ]
    found = padding.tokens_of(rows, batches)
    assert found.real == 2 * (3 + 4 + 2 + 1 + 8 + 1)
    assert found.laid_out == (2 + 1) * (8 + 2 * 16)
    assert found.shapes == {(2, 8, 16), (1, 8, 16, 3)}
    plain, packed = (
        padding.tokens_of(some, padding.batches_of(some, 16, 1, 1, packing=packing))
        for some in (mixed_rows(96),)
        for packing in (False, True)
    )
    assert plain.real == packed.real
    assert packed.laid_out < 0.8 * plain.laid_out


@pytest.mark.long
def test_the_cost_of_a_token_is_drawn(script, tmp_path, capsys):
    picture = tmp_path / "cost.png"
    words = "--pairs 1 2 --tokens 16 32 --hidden 64 --layers 1 --repeats 1"
    script("linear_cost").main([*words.split(), "--picture", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    cases = [line.split(" | ")[:2] for line in lines if line.startswith("| 1") or line[2] == "2"]
    assert [[c[0].strip("| "), c[1]] for c in cases] == [
        ["1", "256"], ["2", "256"], ["1", "16"], ["1", "32"],
    ]  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_is_not_the_tokens_own_is_taken_off(script):
    linear_cost = script("linear_cost")
    cost = linear_cost.Cost(step=1.0, without=0.5, weights=0.25)
    assert cost.per_token(linear_cost.Case(2, 1000)) == (500.0, 125.0)


def test_a_step_without_attention_knows_of_no_other_token(script):
    linear_cost = script("linear_cost")
    context = linear_cost.BranchAttention(jnp.ones((2, 4), int), Layout(2, 2, 2), "auto", None)
    q, k, v = (np.random.default_rng(i).normal(size=(1, 6, n, 4)) for i, n in enumerate((4, 2, 2)))
    with linear_cost.without_attention():
        out, _ = context.attend(*map(jnp.asarray, (q, k, v)), None, None)
    expected = q + np.repeat(k + v, 2, axis=2)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert linear_cost.BranchAttention.attend.__name__ == "attend"  # as it was


@pytest.mark.long
def test_experts_are_timed_beside_every_one(script, monkeypatch, capsys):
    experts = script("experts")
    monkeypatch.setitem(experts.LAYERS, "mixtral", experts.Sizes(4, 2, 8, 16))
    experts.main(["--layers", "mixtral", "--tokens", "32", "--steps", "1"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"mixtral \(2 of 4\): picked_experts \d+ ms, every_expert .*as fast", line)
