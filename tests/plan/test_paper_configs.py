"""The studies at the paper's size: each loads, resolves and compiles at its model's true shapes."""

import json
import math
import re
import resource
from pathlib import Path

import jax
import pytest

from spo_jax.config.validation import checked_config
from spo_jax.data import load_tokenizer
from spo_jax.data.chat import make_chat_format
from spo_jax.models import init_model
from spo_jax.plan import compile_pair_update, memory_summary
from spo_jax.study import read_study
from spo_jax.study.grid import resolved, run_cells, start_cells
from spo_jax.tasks import arithmetic
from tests.data.real_templates import make_family_tokenizer

FOLDER = Path(__file__).parents[2] / "configs" / "paper"
PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3-8b": 8_030_261_248,
}
"""What the models' publishers count: a wrong dimension in a file cannot hit it."""
CHIPS = {"qwen2.5-0.5b": 8, "llama-3.2-1b": 8, "llama-3-8b": 4}
"""Of the hardware that the headers name."""
DATA = ("ultrafeedback", "gsm8k")
STUDIES = [(model, data) for model in PARAMETERS for data in DATA]
METHODS = ("DPO", "CPO", "DPOP", "R-DPO", "SimPO", "AlphaDPO")

study_files = pytest.mark.parametrize(("model", "data"), STUDIES)


def read(model, data):
    return read_study(FOLDER / f"{model}-{data}.yaml")


def cells(study):
    return {cell.row: cell for cell in run_cells(study)}


def differing(one, other):
    return {key for key in {**one, **other} if one.get(key) != other.get(key)}


def architecture_of(model):
    return json.loads((FOLDER / "architectures" / f"{model}.json").read_text())


@pytest.mark.wide
@study_files
def test_six_methods_plain_and_with_spo_and_the_control(model, data):
    study = read(model, data)
    grid = [row for name in METHODS for row in (name, f"{name} + SPO")]
    assert [cell.row for cell in run_cells(study)] == ["SFT continued", *grid]
    assert [cell.row for cell in start_cells(study)] == ["SFT"]
    assert resolved(start_cells(study)[0])["sft_optimizer"]["learning_rate"] == 2e-5


@pytest.mark.wide
@study_files
def test_plain_and_spo_differ_in_the_solver_alone(model, data):
    found = {row: resolved(cell) for row, cell in cells(read(model, data)).items()}
    for name in METHODS:
        plain, spo = found[name], found[f"{name} + SPO"]
        assert differing(plain, spo) == {"solver", "output_dir"}
        assert plain["solver"] == {"name": "preference_only"}
        assert spo["solver"]["name"] == "penalty"
        assert differing(plain, found["DPO"]) <= {"loss", "output_dir"}
    control = found["SFT continued"]
    # It has no use for a loss, but for the held-out figures that it is reported with.
    assert differing(control, found["DPO"]) - {"loss"} == {"solver", "outer", "inner", "output_dir"}
    assert control["solver"] == {"name": "inner_only"}
    assert control["inner"] == found["DPO"]["outer"]


@pytest.mark.long
def test_all_studies_share_methods_and_rhythm():
    studies = [read(model, data) for model, data in STUDIES]
    assert all(s.losses == studies[0].losses for s in studies)
    assert all(s.variants == studies[0].variants for s in studies)
    assert len({s.output_dir for s in studies}) == len({s.title for s in studies}) == len(studies)
    for study in studies:
        config = checked_config(cells(study)["DPO"].tree)
        assert (config.train.batch_size, config.train.epochs) == (128, 1)
        assert (config.outer.schedule, config.outer.warmup_ratio) == ("cosine", 0.1)
        assert (config.model.param_dtype, config.model.compute_dtype) == ("float32", "bfloat16")
        assert (config.answers.data, config.answers.split) == ("openai/gsm8k", "test")


@pytest.mark.wide
@study_files
def test_longest_rows_have_a_bucket_and_evaluations_are_no_larger_than_updates(model, data):
    study = read(model, data)
    config = checked_config(cells(study)["DPO"].tree)
    for section in (config.data, checked_config(start_cells(study)[0].tree).sft_data):
        assert section.prompt_buckets[-1] == section.max_prompt_length
        assert section.completion_buckets[-1] == section.max_completion_length
    # Evaluations are forward passes alone, but of all their rows at once.
    micro = config.train.batch_size // config.train.gradient_accumulation
    assert config.train.eval_batch_size <= 2 * micro


@pytest.mark.parametrize(
    ("model", "family"),
    [("llama-3-8b", "llama3_first"), ("llama-3.2-1b", None), ("qwen2.5-0.5b", "qwen25")],
)
def test_the_second_reading_starts_from_instruct_models(model, family):
    """As they are, on the same pairs; problems are asked in their own format, and for the mark."""
    study, first = read(model, "instruct"), read(model, "ultrafeedback")
    text = (FOLDER / f"{model}-instruct.yaml").read_text()
    assert text.startswith("# A SECOND READING of the paper's GSM8K column")
    reported = re.findall(r"^#   \S+ +\d.*", text, re.M)
    assert reported == re.findall(
        r"^#   \S+ +\d.*", (FOLDER / f"{model}-gsm8k.yaml").read_text(), re.M
    )
    assert len(reported) == 1 + len(METHODS)
    assert [cell.row for cell in run_cells(study)] == [cell.row for cell in run_cells(first)]
    (start,) = start_cells(study)
    assert start.tree["stages"] == ["preference"]
    assert start.tree["model"]["path"].endswith("-Instruct")
    found, expected = (resolved(cells(each)["DPO + SPO"]) for each in (study, first))
    own = {"model", "answers", "output_dir", "data", "reference"}
    assert differing(found, expected) <= own
    assert differing(found["data"], expected["data"]) <= {"chat_template"}
    if family is None:
        return
    ask = '\nReason step by step, then end with a line "#### " and the answer as a number.'
    asked = [{"role": "user", "content": "How many?"}]
    template = found["answers"]["chat_template"]
    tokenizer = make_family_tokenizer(family)
    theirs = make_chat_format(tokenizer)
    expected = theirs.render([{"role": "user", "content": f"How many?{ask}"}], True)
    assert make_chat_format(tokenizer, template=template).render(asked, True) == expected


@pytest.mark.parametrize("model", PARAMETERS)
def test_architectures_are_the_models_own(model):
    built = init_model(architecture_of(model))
    leaves = jax.tree.leaves(built.abstract_params())
    assert sum(math.prod(x.shape) for x in leaves) == PARAMETERS[model]
    text = (FOLDER / f"{model}-gsm8k.yaml").read_text()
    assert f"{PARAMETERS[model] / 1e9:.2f} billion parameters" in text


@pytest.mark.wide
@study_files
def test_headers_say_what_is_reported_and_what_was_compiled(model, data):
    text = (FOLDER / f"{model}-{data}.yaml").read_text()
    head = " ".join(x.removeprefix("# ") for x in text.splitlines() if x.startswith("#"))
    assert "reported, not measured here" in head
    assert "compiled ahead of time, not run" in head
    assert all(f"{name} " in head for name in ("SFT", *METHODS))
    config = checked_config(cells(read(model, data))["DPO + SPO"].tree)
    parts = config.train.gradient_accumulation
    prompt, completion = config.data.prompt_buckets[-1], config.data.completion_buckets[-1]
    micro = f"{parts} micro-batches of {config.train.batch_size // parts} pairs"
    assert f"{micro}, prompt {prompt}, completions {completion}" in head
    assert re.search(r"takes \d+\.\d GiB a chip", head)


def test_dialogues_are_written_alike_for_all_models(tmp_path):
    config = checked_config(cells(read("qwen2.5-0.5b", "ultrafeedback"))["DPO"].tree)
    arithmetic.write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    plain = make_chat_format(tokenizer, template=config.data.chat_template)
    untold = make_chat_format(tokenizer)
    for messages, prompt in (
        (asked, True),
        ([*asked, {"role": "assistant", "content": "a"}], False),
    ):
        assert plain.render(messages, prompt) == untold.render(messages, prompt)
    exam = make_chat_format(tokenizer, template=config.answers.chat_template)
    prompt = exam.render(asked, True)
    assert prompt.startswith("\n\nSystem: s\n\nHuman: q\nReason step by step")
    assert prompt.endswith('"#### " and the answer as a number.\n\nAssistant:')
    whole = exam.render([*asked, {"role": "assistant", "content": "a"}], False)
    assert whole == f"{prompt} a"


@pytest.mark.parametrize("model", PARAMETERS)
@pytest.mark.long
def test_update_compiles_at_the_true_shapes_and_nothing_is_allocated(model):
    """As configured: 128 pairs in micro-batches, prompt 1800, completions 1024, on as many devices.

    Only the code generator's optimizer is off (``conftest``), and the devices are simulated.
    """
    config = checked_config(cells(read(model, "ultrafeedback"))["DPO + SPO"].tree)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before_it = jax.live_arrays()  # Held, so that none of them is freed and its place taken.
    compiled = compile_pair_update(
        config,
        architecture_of(model),
        devices=jax.devices()[: CHIPS[model]],
        prompt_length=config.data.prompt_buckets[-1],
        completion_length=config.data.completion_buckets[-1],
    )
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    _, batch, _ = compiled.args_info[0]
    assert batch.preference.completion_tokens.shape == (128, 2, 1024)
    held = {id(x) for x in before_it}
    assert not [x.shape for x in jax.live_arrays() if id(x) not in held]
    assert grown < 4 * PARAMETERS[model]
    # Parameters and Adam's moments in float32, cut over the devices, all but norms and biases.
    state = 12 * PARAMETERS[model] / CHIPS[model]
    assert state < memory_summary(compiled)["arguments"] < 1.01 * state
