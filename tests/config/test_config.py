"""A configuration: what is read, what wins, what is refused and in which words."""

import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

from spo_jax.config.choices import bound_loss, rows_kind, solver_tolerance, uses_gap
from spo_jax.config.key_help import describe
from spo_jax.config.parsing import (
    ConfigError,
    config_from_tree,
    config_to_dict,
    config_to_yaml,
    parse_value,
    read_tree,
)
from spo_jax.config.schema import Config, Named
from spo_jax.config.validation import checked_config, choices, load_config, unused_sections
from spo_jax.losses import LOSSES, UNPAIRED_LOSSES, PairLogprobs, bco_pair_loss, dpo_loss
from spo_jax.solvers import PENALTIES, SOLVERS, make_solver
from tests.solvers.test_solvers import START, levels

SMALL = {
    "model": {"path": "policy"},
    "data": {"train": "pairs.jsonl"},
    "train": {"steps": 10},
}
"""The least that is a run."""


def checked(**overrides):
    return checked_config(SMALL, **overrides)


def refused(tree=SMALL, /, **overrides):
    """The message that refuses ``tree`` with ``overrides``; double underscores are dots."""
    overrides = {k.replace("__", "."): v for k, v in overrides.items()}
    with pytest.raises(ConfigError) as caught:
        checked_config(tree, **overrides)
    return str(caught.value)


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-7", 5e-7),
        ("-2E+3", -2000.0),
        ("1.5e-1", 0.15),
        (".5e1", 5.0),
        ("3", 3),
        ("true", True),
        ("null", None),
        ("e5", "e5"),
        ("1e5b", "1e5b"),
        ("[64, 1e2]", [64, 100.0]),
        ("{name: dpo, beta: 1e-1}", {"name": "dpo", "beta": 0.1}),
    ],
)
def test_values_are_yaml_with_plain_exponents(text, value):
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


def test_a_value_that_is_no_yaml_is_a_message():
    with pytest.raises(ConfigError, match="put it in quotes"):
        parse_value("{% for m in messages %}")


def test_read_from_a_file_and_overridden(tmp_path):
    path = write(
        tmp_path,
        """
        model: {path: policy}
        data: {train: pairs.jsonl}
        train: {steps: 10, batch_size: 4}
        outer: {learning_rate: 5e-7}
        loss: {name: simpo, beta: 2.5, gamma_beta_ratio: 0.4}
        """,
    )
    config = load_config(path)
    assert config.outer.learning_rate == 5e-7
    assert config.loss == Named("simpo", {"beta": 2.5, "gamma_beta_ratio": 0.4})
    assert (config.train.batch_size, config.seed) == (4, Config().seed)

    overrides = {"outer.learning-rate": 1e-3, "train.batch-size": 6, "loss.beta": 3, "seed": 7}
    config = load_config(path, overrides)
    assert config.outer.learning_rate == 1e-3
    assert config.loss.options == {"beta": 3, "gamma_beta_ratio": 0.4}
    assert (config.train.batch_size, config.train.steps, config.seed) == (6, 10, 7)
    # Nothing of it stays behind.
    assert load_config(path).train.batch_size == 4


def test_a_whole_section_replaces_the_files(tmp_path):
    path = write(tmp_path, yaml.safe_dump(SMALL | {"loss": {"name": "cpo", "beta": 1, "alpha": 1}}))
    whole = parse_value("{name: ipo, tau: 0.1, length_normalized: true}")
    config = load_config(path, {"loss": whole})
    assert config.loss == Named("ipo", {"tau": 0.1, "length_normalized": True})
    # A single key after it adjusts the replacement, and the caller's mapping stays as it is.
    config = load_config(path, {"loss": whole, "loss.tau": 0.2})
    assert config.loss.options["tau"] == 0.2
    assert whole["tau"] == 0.1


def test_an_override_fills_an_empty_section(tmp_path):
    path = write(tmp_path, yaml.safe_dump(SMALL) + "outer:\n")
    assert load_config(path, {"outer.weight_decay": 0.5}).outer.weight_decay == 0.5


def test_an_override_inside_a_value():
    assert "seed is a value" in refused(SMALL | {"seed": 3}, seed__b=1)


def test_options_without_a_name_adjust_the_default_choice():
    assert checked(**{"loss.beta": 0.3}).loss == Named("dpo", {"beta": 0.3})
    solver = checked(**{"solver.penalty_weight": 3.0}).solver
    assert solver == Named("penalty", {"penalty_weight": 3.0})


def test_sections_given_in_part_keep_their_own_defaults():
    config = config_from_tree(
        {"sft_optimizer": {"weight_decay": 0.1}, "outer": {"weight_decay": 0.2}}
    )
    assert config.sft_optimizer == dataclasses.replace(Config().sft_optimizer, weight_decay=0.1)
    assert config.sft_optimizer.learning_rate == Config().sft_optimizer.learning_rate == 2e-5
    assert config.outer.learning_rate == Config().outer.learning_rate == 1e-6


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"did you mean 'quickstart\.yaml'"):
        load_config(tmp_path / "quikstart.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(write(tmp_path, "a: [1"))
    with pytest.raises(ConfigError, match="must be a mapping of keys, got a list"):
        load_config(write(tmp_path, "- a"))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"outher": {}}, ["unknown key outher", "did you mean 'outer'"]),
        ({"outer.learning_rat": 1}, ["unknown key outer.learning_rat", "'learning_rate'"]),
        ({"train": {"step": 3}}, ["unknown key train.step", "'steps'", "train takes steps"]),
        ({"outer.learning_rate": "fast"}, ["outer.learning_rate='fast'", "expected float"]),
        ({"train.steps": 1.5}, ["train.steps=1.5", "expected int | null"]),
        ({"train.batch_size": True}, ["train.batch_size=True", "expected int"]),
        ({"seed": "one"}, ["seed='one'", "expected int, got str"]),
        ({"outer": 3}, ["outer is a section", "got 3"]),
        ({"loss": "dpo"}, ["loss is a section", "got 'dpo'"]),
        ({"model.init": 3}, ["model.init=3", "expected mapping | null"]),
        ({"data.prompt_buckets": [8, "x"]}, ["data.prompt_buckets", "list of int | null"]),
        ({"data.packing": "no"}, ["data.packing", "auto | bool"]),
        (
            {"data.packing": True, "data.completion_buckets": [8]},
            ["data.completion_buckets would be ignored", "data.packing to false"],
        ),
        ({"outer.schedule": "cosin"}, ["outer.schedule='cosin'", "did you mean 'cosine'"]),
        ({"stages": ["sfd"]}, ["stages='sfd'", "sft | preference | baseline", "'sft'"]),
        ({"objective.regularizer": "hing"}, ["nll | hinge | null", "did you mean 'hinge'"]),
        (
            {"objective.inner_value": "running_mn"},
            ["objective.inner_value='running_mn'", "did you mean 'running_min'"],
        ),
    ],
)
def test_unknown_keys_and_wrong_types(overrides, parts):
    message = refused(**{k.replace(".", "__"): v for k, v in overrides.items()})
    assert all(part in message for part in parts), message


def test_values_are_read_as_their_type():
    config = checked(
        **{
            "outer.learning_rate": 1,
            "outer.max_grad_norm": None,
            "stages": "preference",
            "data.prompt_buckets": [8, 16],
            "objective.inner_value": 2,
            "output_dir": 12,
        }
    )
    assert type(config.outer.learning_rate) is float
    assert config.outer.max_grad_norm is None
    assert config.stages == ("preference",)
    assert config.data.prompt_buckets == (8, 16)
    assert config.objective.inner_value == 2.0
    assert config.output_dir == "12"


SFT = {"model": {"path": "policy"}, "stages": ["sft"], "sft_data": {"train": "sft.jsonl"}}
SFT = SFT | {"sft": {"steps": 10}}
IGNORED = [
    ({"loss.gamma_beta_ratio": 0.5}, ["loss.gamma_beta_ratio would be ignored", "dpo takes beta"]),
    (
        {"loss": {"name": "ipo", "tau": 0.1, "length_normalized": False, "label_smoothing": 0.1}},
        ["loss.label_smoothing would be ignored", "ipo takes tau"],
    ),
    (
        {"loss": {"name": "kto", "beta": 0.1, "label_smoothing": 0.1}},
        ["loss.label_smoothing would be ignored", "kto takes beta, desirable_weight, undesirable"],
    ),
    ({"loss": {"name": "kto", "beta": 0.1, "wpo": True}}, ["loss.wpo would be ignored"]),
    (
        {"loss": {"name": "simpo", "beta": 2.0, "gamma_beta": 1.0}},
        ["loss.gamma_beta would be ignored", "'gamma_beta_ratio'"],
    ),
    ({"solver.tolerance": 0.0}, ["solver.tolerance would be ignored", "squared_hinge"]),
    (
        {"solver": {"name": "penalty", "penalty": "linear", "tolerance": 0.1}},
        ["solver.tolerance would be ignored"],
    ),
    ({"solver.initial_weight": 0.1}, ["solver.initial_weight would be ignored", "geometric"]),
    (
        {"solver": {"name": "preference_only", "penalty_weight": 1.0}},
        ["solver.penalty_weight would be ignored", "preference_only takes no options"],
    ),
    ({"inner": {"learning_rate": 1e-5}}, ["inner would be ignored", "takes no inner steps"]),
    ({"sft_optimizer": {"learning_rate": 1e-5}}, ["sft_optimizer would be", "no stage is sft"]),
    ({"sft": {"steps": 3}}, ["sft would be ignored"]),
    ({"sft_data": {"train": "x"}}, ["sft_data would be ignored", "inner_data is not sft"]),
    ({"task": {"digits": 2}}, ["task would be ignored", "builtin:arithmetic"]),
    ({"train.inner_batch_size": 4}, ["train.inner_batch_size would be ignored"]),
    ({"data.eval": "e", "data.eval_fraction": 0.1}, ["data.eval_fraction would be ignored"]),
    ({"outer.schedule": "constant", "outer.final_ratio": 0.1}, ["outer.final_ratio would be"]),
    ({"outer.options": {"momentum": 0.9}}, ["outer.options.momentum would be ignored", "adamw"]),
    ({"reference.mode": "online", "reference.cache_dir": "c"}, ["cache_dir would be ignored"]),
    (
        {
            "solver": {"name": "preference_only"},
            "objective.inner_data": "sft",
            "sft_data.train": "x",
        },
        ["objective.inner_data=sft would be ignored", "preference_only"],
    ),
    (
        {
            "reference": {"mode": "none", "path": "other"},
            "loss": {"name": "cpo", "beta": 1, "alpha": 1},
            "objective.inner_value": 0.0,
        },
        ["reference.path would be ignored"],
    ),
    (
        {"objective.inner_value": "tracked"},
        ["objective.inner_value=tracked would be paid for and ignored", "solver penalty", "hinge"],
    ),
    (
        {"objective.inner_value": "tracked", "solver": {"name": "alternating"}},
        ["objective.inner_value=tracked", "solver alternating"],
    ),
    ({"objective.tracked_steps": 2}, ["tracked_steps=2 would be ignored", "is reference"]),
    (
        {"objective.validation_fraction": 0.1},
        ["validation_fraction=0.1 would be paid for and ignored", "solver penalty", "primal_dual"],
    ),
    (
        {
            "objective": {"validation_fraction": 0.1, "inner_data": "sft"},
            "solver": {"name": "primal_dual"},
        },
        ["validation_fraction=0.1 with objective.inner_data=sft", "Leave one of the two out"],
    ),
    (
        {
            "objective": {"validation_fraction": 0.1, "inner_value": "running_min"},
            "solver": {"name": "primal_dual"},
        },
        ["validation_fraction=0.1 with objective.inner_value=running_min"],
    ),
    ({"train.inner_batch_size": 8}, ["inner_batch_size would be ignored", "validation_fraction"]),
    (
        {"solver": {"name": "inner_only"}, "outer": {"learning_rate": 1e-3}},
        ["outer would be ignored", "inner_only takes no outer steps"],
    ),
]


@pytest.mark.parametrize(("overrides", "parts"), IGNORED)
def test_what_would_be_ignored_is_refused(overrides, parts):
    message = refused(**{k.replace(".", "__"): v for k, v in overrides.items()})
    assert all(part in message for part in parts), message


def test_a_tracked_copy_takes_the_steps_of_the_section_inner():
    tracked = {"objective.inner_value": "tracked", "solver.penalty": "hinge"}
    config = checked(**tracked, inner={"learning_rate": 1e-5})
    assert "inner" not in unused_sections(config)
    assert "learning_rate=0" in refused(
        objective__inner_value="tracked", solver__penalty="hinge", inner={"learning_rate": 0.0}
    )
    # Of the two stages only one has a copy; a baseline alone would have none.
    both = checked(**tracked, stages=["preference", "baseline"])
    assert "inner" not in unused_sections(both)
    assert "inner" in unused_sections(checked(stages=["baseline"]))


@pytest.mark.parametrize("name", SOLVERS)
def test_whether_the_gap_has_a_part_in_an_update_is_known(name):
    """On a problem where every solver that looks at the gap does something else outside."""
    variants = PENALTIES if name == "penalty" else (None,)
    for variant in variants:
        options = {} if variant is None else {"penalty": variant}
        chains = {"outer": optax.sgd(0.1), "inner": optax.sgd(0.1)}
        solver, ends = make_solver(name, **chains, **options), []
        for inner_value in (-100.0, 100.0):
            state = solver.init(START)
            for _ in range(2):
                state, _ = solver.update(state, 0, levels(inner_value))
            ends.append(state.params)
        differ = not all(map(np.array_equal, *map(jax.tree.leaves, ends)))
        assert uses_gap(Named(name, options)) == differ, variant


@pytest.mark.parametrize("section", ["data", "loss", "objective", "solver", "outer", "train"])
def test_an_sft_run_has_no_preference_sections(section):
    assert f"{section} would be ignored: no stage is preference" in refused(SFT, **{section: {}})


def test_sections_that_a_stage_uses_are_taken():
    checked_config(SFT, sft_optimizer={"learning_rate": 1e-5})
    # The baseline takes outer steps whatever the solver beside it takes.
    config = checked(
        stages=["preference", "baseline"],
        solver={"name": "inner_only"},
        inner={"learning_rate": 1e-5},
        outer={"learning_rate": 1e-3},
    )
    assert not {"inner", "outer"} & set(unused_sections(config))
    with_sft = checked(**{"objective.inner_data": "sft", "sft_data.train": "x"})
    assert "sft_data" not in unused_sections(with_sft)
    checked(**{"data.train": "builtin:arithmetic", "task.digits": 2})


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"loss": {"name": "dpo"}}, ["dpo needs loss.beta"]),
        (
            {"loss": {"name": "alphadpo", "beta": 1}},
            ["alphadpo needs loss.gamma_beta_ratio, loss.alpha"],
        ),
        ({"loss.name": "simp", "loss.beta": 1}, ["loss.name='simp'", "did you mean 'simpo'"]),
        ({"loss.beta": "big"}, ["loss.beta='big'", "expected a number"]),
        ({"loss.beta": True}, ["loss.beta=True", "expected a number"]),
        (
            {"loss": {"name": "ipo", "tau": 0.1, "length_normalized": 1}},
            ["loss.length_normalized=1", "expected true or false"],
        ),
        ({"solver.name": "penalti"}, ["solver.name='penalti'", "did you mean 'penalty'"]),
        ({"solver.penalty": "hing"}, ["solver.penalty='hing'", "did you mean 'hinge'"]),
        ({"solver.penalty_weight": "x"}, ["solver.penalty_weight='x'", "expected a number"]),
        (
            {"solver": {"name": "dynamic_barrier", "inside": "hole"}},
            ["solver.inside='hole'", "did you mean 'hold'"],
        ),
        ({"solver": {"name": "dynamic_barrier", "strength": 0}}, ["solver.strength=0.0"]),
        ({"solver": {"name": "primal_dual", "gap_decay": 1.0}}, ["solver.gap_decay=1.0"]),
        ({"solver": {"name": "primal_dual", "form": "lagrange"}}, ["did you mean 'lagrangian'"]),
        ({"solver": {"name": "alternating", "inner_steps": 0}}, ["preference_only"]),
        ({"solver": {"name": "alternating", "inner_steps": -1}}, ["solver.inner_steps=-1"]),
        ({"solver": {"name": "alternating", "inner_steps": 1.5}}, ["expected a whole number"]),
        ({"solver.penalty_weight": -1}, ["solver.penalty_weight=-1.0"]),
        (
            {"solver": {"name": "penalty", "weight_schedule": "geometrical"}},
            ["solver.weight_schedule='geometrical'", "did you mean 'geometric'"],
        ),
        (
            {"solver": {"name": "penalty", "weight_schedule": "geometric", "penalty_weight": 0}},
            ["solver.weight_schedule=geometric", "no factor leads"],
        ),
        ({"solver.name": "unrolled"}, ["inner.name=adamw", "sgd", "unrolled_first_order"]),
        ({"train.steps": None}, ["train.steps or train.epochs, exactly one"]),
        ({"train.epochs": 1}, ["train.steps or train.epochs, exactly one"]),
        ({"model.path": None}, ["model.path", "model.init", "exactly one"]),
        ({"model.init": {"model_type": "llama"}}, ["exactly one"]),
        (
            {"model": {"init": {"model_type": "llama"}}},
            ["set model.tokenizer"],
        ),
        ({"data.train": None}, ["data.train is not set"]),
        ({"data.train": "builtin:maths"}, ["built-in data is builtin:arithmetic"]),
        ({"data.eval_fraction": 1.0}, ["data.eval_fraction=1.0"]),
        ({"objective.regularizer": "nll"}, ["regularizer_weight=0.0", "set both"]),
        ({"objective.regularizer_weight": 0.1}, ["regularizer=None", "set both"]),
        ({"objective.inner_data": "sft"}, ["needs sft_data.train"]),
        (
            {"reference.mode": "none", "objective.inner_value": 0.0},
            ["loss dpo needs the reference"],
        ),
        (
            {"reference.mode": "none", "loss": {"name": "cpo", "beta": 1, "alpha": 1}},
            ["objective.inner_value: reference needs the reference"],
        ),
        (
            {
                "reference.mode": "none",
                "loss": {"name": "cpo", "beta": 1, "alpha": 1},
                "objective": {"inner_value": 0, "regularizer": "hinge", "regularizer_weight": 1},
            },
            ["objective.regularizer: hinge needs the reference"],
        ),
        ({"train.eval_every": 5}, ["train.eval_every needs held-out rows", "data.eval"]),
        (
            {"train.batch_size": 6, "train.gradient_accumulation": 4},
            ["train.batch_size=6 does not divide into gradient_accumulation=4"],
        ),
        ({"train.batch_size": 0}, ["train.batch_size=0", "positive"]),
        ({"train.eval_batch_size": -1}, ["train.eval_batch_size=-1", "positive"]),
        ({"outer.learning_rate": 0}, ["outer.learning_rate=0.0: must be above 0"]),
        ({"outer.learning_rate": float("nan")}, ["outer.learning_rate=nan"]),
        ({"outer.warmup_ratio": 2}, ["outer.warmup_ratio=2.0: expected 0 to 1"]),
        ({"outer.options": {"b1": "x"}}, ["outer.options.b1='x'", "expected bool | int | float"]),
        ({"stages": []}, ["stages is empty"]),
        ({"stages": ["preference", "preference"]}, ["a stage is named twice"]),
    ],
)
def test_what_cannot_run_is_refused(overrides, parts):
    message = refused(**{k.replace(".", "__"): v for k, v in overrides.items()})
    assert all(part in message for part in parts), message


def test_an_sft_stage_is_checked_too():
    assert "set sft.steps or sft.epochs" in refused(SFT, sft__epochs=1.0)
    assert "sft_data.train is not set" in refused(SFT, sft_data__train=None)
    assert "unknown key sft.inner_batch_size" in refused(SFT, sft__inner_batch_size=2)
    assert "unknown key sft.alarm_log_ratio" in refused(SFT, sft__alarm_log_ratio=-1.0)
    assert "sft_optimizer.learning_rate=0.0" in refused(SFT, sft_optimizer__learning_rate=0)


def test_held_out_rows_allow_evaluation():
    for given in (
        {"data.eval": "e"},
        {"data.eval_fraction": 0.1},
        {"data.train": "builtin:arithmetic"},
    ):
        assert checked(**given, **{"train.eval_every": 5}).train.eval_every == 5


def own_loss(policy, reference, *, strength: float, sharp: bool = False):
    return policy.chosen - strength * reference.chosen


def test_a_loss_of_ones_own(monkeypatch):
    module = types.ModuleType("my_losses")
    module.own_loss = own_loss
    monkeypatch.setitem(sys.modules, "my_losses", module)
    loss = {"name": "my_losses:own_loss", "strength": 1.0}
    assert checked(loss=loss).loss.name == "my_losses:own_loss"
    assert "needs loss.strength" in refused(loss={"name": loss["name"]})
    assert "loss.strengt would be ignored" in refused(loss={**loss, "strengt": 1})
    assert "expected a number" in refused(loss={**loss, "strength": "x"})
    assert "expected true or false" in refused(loss={**loss, "sharp": 1})
    no_reference = {"reference__mode": "none", "objective__inner_value": 0.0}
    assert "loss my_losses:own_loss needs the reference" in refused(loss=loss, **no_reference)
    assert "no attribute 'other'" in refused(loss={"name": "my_losses:other"})
    assert "importable from" in refused(loss={"name": "no_such_module:loss"})


def make_own(*, outer: optax.GradientTransformation, strength: float, tolerance: float = -0.5):
    if strength < 0:
        raise ValueError(f"strength={strength}: from 0")
    return make_solver("penalty", outer=outer, inner=outer, penalty_weight=strength)


def test_a_solver_of_ones_own(monkeypatch):
    module = types.ModuleType("my_solvers")
    module.make_own = make_own
    module.make_nothing = lambda *, outer: None
    module.make_of_both = lambda *, outer, inner, penalty="mine", inner_steps=0: make_solver(
        "alternating", outer=outer, inner=inner
    )
    module.positional = lambda outer: None
    monkeypatch.setitem(sys.modules, "my_solvers", module)
    solver = {"name": "my_solvers:make_own", "strength": 1}
    found = checked(solver=solver).solver
    assert (found.name, found.options) == ("my_solvers:make_own", {"strength": 1})
    assert solver_tolerance(found) == -0.5
    assert solver_tolerance(Named(found.name, {"strength": 1, "tolerance": -0.1})) == -0.1
    # It may look at the gap, so a tracked inner value is not paid for in vain.
    tracked = checked(solver=solver, **{"objective.inner_value": "tracked"})
    assert "inner" not in unused_sections(tracked)
    assert "inner" in unused_sections(checked(solver=solver))
    assert "needs solver.strength" in refused(solver={"name": solver["name"]})
    assert "solver.strengt would be ignored" in refused(solver={**solver, "strengt": 1})
    assert "expected a number" in refused(solver={**solver, "strength": "x"})
    assert "solver.strength=-1.0: from 0" in refused(solver={**solver, "strength": -1})
    assert "inner would be ignored" in refused(solver=solver, inner__learning_rate=1.0)
    both = {"name": "my_solvers:make_of_both", "penalty": "yours", "inner_steps": 0}
    assert "inner" not in unused_sections(checked(solver=both))  # nor are these words ours there
    assert "solver.name: <lambda> made a NoneType" in refused(
        solver={"name": "my_solvers:make_nothing"}
    )
    assert "takes 1 positional" in refused(solver={"name": "my_solvers:positional"})
    assert "no attribute 'other'" in refused(solver={"name": "my_solvers:other"})
    assert "importable from" in refused(solver={"name": "no_such_module:make"})


def test_a_file_is_laid_over_its_base(tmp_path):
    (tmp_path / "below.yaml").write_text(
        "seed: 3\nstages: [sft, preference]\ntrain: {steps: 5, batch_size: 4}\n"
        "loss: {name: simpo, beta: 2.0, gamma_beta_ratio: 0.5}\n"
        "data: {columns: {prompt: question}, max_rows: 3}\nsft: {steps: 2}\n"
    )
    (tmp_path / "deeper").mkdir()
    path = tmp_path / "deeper" / "above.yaml"
    path.write_text(
        "base: ../below.yaml\nstages: [preference]\nloss: {name: dpo, beta: 0.1}\n"
        "train: {batch_size: 8}\ndata: {columns: {}}\nsft: {}\n"
    )
    assert read_tree(path, {"train.steps": 6}) == {
        "data": {"columns": {}, "max_rows": 3},
        "sft": {},
        "seed": 3,
        "stages": ["preference"],
        "loss": {"name": "dpo", "beta": 0.1},
        "train": {"steps": 6, "batch_size": 8},
    }


def test_a_base_that_is_none_or_goes_in_a_circle(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("base: b.yaml\n")
    with pytest.raises(ConfigError, match=r"no configuration at .*b\.yaml"):
        read_tree(path)
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match=r"base=a\.yaml of .*b\.yaml goes in a circle"):
        read_tree(path)
    path.write_text("base: [b.yaml]\n")
    with pytest.raises(ConfigError, match=r"base=\['b\.yaml'\] of .*: expected the path"):
        read_tree(path)


def test_the_unrolled_solver_with_the_chain_it_needs():
    config = checked(solver={"name": "unrolled"}, inner={"name": "sgd", "learning_rate": 0.1})
    assert "inner" not in unused_sections(config)
    checked(solver={"name": "unrolled_first_order"}, inner={"learning_rate": 1e-4})


SAVED = {
    "small": SMALL,
    "sft": SFT,
    "overridden": {
        **SMALL,
        "outer": {"learning_rate": 5e-7, "options": {"b1": 0.9}, "max_grad_norm": None},
        "loss": {"name": "simpo", "beta": 2.5, "gamma_beta_ratio": 0.55},
        "solver": {"name": "penalty", "penalty": "hinge", "tolerance": -0.05},
        "objective": {"inner_value": 1.5, "regularizer": "nll", "regularizer_weight": 1e-3},
        "data": {"train": "a.jsonl", "eval_fraction": 0.1, "prompt_buckets": [32, 64]},
    },
    "three stages from random weights": {
        "stages": ["sft", "preference", "baseline"],
        "model": {"init": {"model_type": "llama", "rope_theta": 1e4}, "tokenizer": "builtin:x"},
        "data": {"train": "builtin:arithmetic"},
        "sft_data": {"train": "builtin:arithmetic"},
        "task": {"digits": 2},
        "sft_optimizer": {"weight_decay": 0.1},
        "sft": {"epochs": 1.5},
        "train": {"steps": 3, "eval_every": 1, "save_every": 2},
    },
    "sft rows inside": {
        **SMALL,
        "objective": {"inner_data": "sft", "inner_value": "running_min"},
        "sft_data": {"train": "sft.jsonl"},
        "train": {"epochs": 1, "batch_size": 8, "inner_batch_size": 4, "gradient_accumulation": 4},
        "reference": {"mode": "online", "path": "other"},
        "mesh": {"data": 2, "fsdp": -1},
    },
    "tracked": {
        **SMALL,
        "objective": {"inner_value": "tracked", "tracked_steps": 2},
        "solver": {"name": "primal_dual"},
        "inner": {"learning_rate": 1e-5},
    },
    "validation rows": {
        **SMALL,
        "objective": {"validation_fraction": 0.1},
        "solver": {"name": "primal_dual", "form": "lagrangian"},
        "train": {"epochs": 1, "batch_size": 8, "inner_batch_size": 16},
    },
    "inner only": {**SMALL, "solver": {"name": "inner_only"}, "inner": {"name": "lion"}},
}


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_configuration_loads_as_itself(tmp_path, name):
    config = checked_config(SAVED[name])
    path = tmp_path / "config.yaml"
    text = config_to_yaml(config, without=unused_sections(config), header="spo-jax\nsecond line")
    path.write_text(text)
    assert path.read_text().startswith("# spo-jax\n# second line\n")
    assert load_config(path) == config


def test_help_names_every_key_with_its_default():
    text = describe(choices())
    for item in dataclasses.fields(Config):
        section = getattr(Config(), item.name)
        if isinstance(section, Named):
            assert f"--{item.name}.name" in text
        elif dataclasses.is_dataclass(section):
            for entry in dataclasses.fields(section):
                key = f"--{item.name}.{entry.name.replace('_', '-')} "
                assert text.count(key) == 1, key
        else:
            assert f"--{item.name} " in text
    sft = next(line for line in text.splitlines() if "--sft_optimizer.learning-rate" in line)
    assert sft.endswith("[2e-05]")
    for name in (*LOSSES, *UNPAIRED_LOSSES, *SOLVERS):
        assert f"      {name}: " in text
    assert "simpo: beta, gamma_beta_ratio, label_smoothing [0.0]" in text
    assert "preference_only: no options" in text


def test_what_a_lone_baseline_or_the_built_in_task_would_ignore():
    solver = {"stages": ["baseline"], "solver.name": "penalty"}
    assert "solver would be ignored" in refused(SMALL, **solver)
    checked_config({k: v for k, v in SMALL.items() if k != "solver"} | {"stages": ["baseline"]})
    builtin = SFT | {"sft_data": {"train": "builtin:arithmetic"}}
    checked_config(builtin)
    for key, value in (("eval", "held.jsonl"), ("eval_fraction", 0.1)):
        message = refused(builtin, **{f"sft_data.{key}": value})
        assert f"sft_data.{key} would be ignored: builtin:arithmetic brings" in message


MIXED = [
    {"name": "dpo", "weight": 0.8, "beta": 0.1},
    {"name": "bco_pair", "weight": 0.2, "beta": 0.1},
]


def test_a_list_of_losses_is_their_mixture(tmp_path):
    config = checked(loss=MIXED)
    assert config_to_dict(config)["loss"] == MIXED  # as it was written, and as it is saved
    assert config_from_tree(config_to_dict(config)) == config
    pair = PairLogprobs(*(jnp.asarray([x]) for x in (-8.0, -12.0, 4.0, 8.0)))
    frozen = PairLogprobs(*(jnp.asarray([x]) for x in (-6.0, -9.0, 4.0, 8.0)))
    expected = 0.8 * dpo_loss(pair, frozen, beta=0.1) + 0.2 * bco_pair_loss(pair, frozen, beta=0.1)
    np.testing.assert_allclose(bound_loss(config.loss).loss(pair, frozen), expected, rtol=1e-6)
    path = write(tmp_path, yaml.safe_dump(SMALL))
    assert load_config(path, {"loss": MIXED}).loss == config.loss


def test_the_excess_of_the_longer_completion_may_count_less():
    half = {"name": "dpo", "beta": 0.1, "length_desensitized": 0.5}
    config = checked(loss=half, reference={"mode": "online"})
    assert bound_loss(config.loss).excess_weights == (0.5,)
    whole = checked(loss={**half, "length_desensitized": 1})
    assert bound_loss(whole.loss).excess_weights == ()
    simpo = {
        "name": "simpo",
        "beta": 1,
        "gamma_beta_ratio": 0,
        "length_desensitized": 0,
        "wpo": True,
    }
    assert bound_loss(checked(loss=simpo).loss).excess_weights == (0.0,)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({}, "length_desensitized with reference.mode=precomputed.*reference.mode: online"),
        ({"loss": {"name": "dpo", "beta": 0.1, "length_desensitized": 1.5}}, "use 0 to 1"),
        ({"loss": {"name": "bco", "beta": 0.1, "length_desensitized": 0.5}}, "running statistics"),
        (
            {"loss": {"name": "spo_jax.losses:dpo_loss", "beta": 1, "length_desensitized": 2}},
            "loss.length_desensitized=2.0: use 0 to 1",
        ),
        ({"loss": {"name": "dpo", "beta": 0.1, "length_desensitized": "a"}}, "expected a number"),
        ({"reference": {"mode": "online"}, "dynamics": {"every": 1}}, "probes look at sums"),
    ],
)
def test_where_length_desensitized_cannot_be(sections, said):
    half = {"name": "dpo", "beta": 0.1, "length_desensitized": 0.5}
    with pytest.raises(ConfigError, match=said):
        checked(**{"loss": half, **sections})


def test_any_loss_may_be_weighed_by_the_policy():
    pairs = PairLogprobs(*(jnp.full((1,), x) for x in (-8.0, -12.0, 4.0, 8.0)))
    plain = bound_loss(checked(loss={"name": "simpo", "beta": 1, "gamma_beta_ratio": 0}).loss)
    weighted = {"name": "simpo", "beta": 1, "gamma_beta_ratio": 0, "wpo": True}
    expected = np.exp(-3.5) * plain.loss(pairs)
    np.testing.assert_allclose(bound_loss(checked(loss=weighted).loss).loss(pairs), expected)
    mixed = checked(loss=[{**weighted, "weight": 0.5}, {**weighted, "weight": 0.5, "wpo": False}])
    found = bound_loss(mixed.loss).loss(pairs)
    np.testing.assert_allclose(found, 0.5 * (expected + plain.loss(pairs)), rtol=1e-6)
    with pytest.raises(ConfigError, match=r"loss\.wpo='yes': expected true or false"):
        checked(loss={**weighted, "wpo": "yes"})


@pytest.mark.parametrize(
    ("loss", "parts"),
    [
        ([], ["loss is an empty list"]),
        (["dpo"], ["loss[0]='dpo'", "weight"]),
        ([MIXED[0], {"name": "dpo", "beta": 0.1}], ["loss[1].weight=None", "positive"]),
        ([{**MIXED[0], "weight": 0}], ["loss[0].weight=0", "positive"]),
        (
            [
                {"name": "bco", "weight": 1, "beta": 0.1},
                {"name": "alphadpo", "weight": 1, "beta": 1, "gamma_beta_ratio": 0, "alpha": 0},
            ],
            ["loss: a mixture of losses with running averages of different things"],
        ),
        ([MIXED[0], {**MIXED[1], "alpha": 1}], ["loss[1].alpha would be ignored", "bco_pair"]),
        ([{"name": "dpo", "weight": 1}], ["dpo needs loss[0].beta"]),
        ([{**MIXED[0], "name": "simp"}], ["loss[0].name='simp'", "did you mean 'simpo'"]),
    ],
)
def test_lists_that_are_no_mixture(loss, parts):
    message = refused(loss=loss)
    assert all(part in message for part in parts), message


def test_settings_out_of_their_range_are_refused_before_a_model_is_read():
    message = refused(loss={"name": "robust_dpo", "beta": 0.1, "flip_rate": 0.6})
    assert "loss.flip_rate=0.6" in message
    message = refused(loss=[{"name": "bpo", "weight": 1, "beta": 0.1, "alpha": 2}])
    assert "loss[0].alpha=2" in message


KTO = {"name": "kto", "beta": 0.1}
RAMP = {"name": "dpo_shift_ramp", "beta": 0.1, "initial_weight": 0.5, "final_weight": 1.0}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"objective.reward_calibration": 1.0}, ["reward_calibration=1.0", "0 to below 1"]),
        (
            {"objective.reward_calibration": 0.9, "loss": KTO},
            ["reward_calibration with loss kto", "unpaired"],
        ),
        (
            {"objective.reward_calibration": 0.9, "solver": {"name": "inner_only"}},
            ["reward_calibration would be ignored", "inner_only"],
        ),
        (
            {"objective.reward_calibration": 0.9, "dynamics.every": 5},
            ["dynamics.every with objective.reward_calibration"],
        ),
        ({"loss": RAMP, "dynamics.every": 5}, ["dynamics.every", "changes over the run"]),
        ({"loss": {**RAMP, "final_weight": 2}}, ["loss.final_weight=2.0", "up to 1"]),
    ],
)
def test_what_goes_with_neither_calibration_nor_ramp(overrides, parts):
    message = refused(**{k.replace(".", "__"): v for k, v in overrides.items()})
    assert all(part in message for part in parts), message


def test_calibration_is_taken_around_a_list():
    losses = [{**RAMP, "weight": 0.5}, {"name": "dpo", "weight": 0.5, "beta": 0.1}]
    config = checked(**{"loss": losses, "objective.reward_calibration": 0.98})
    assert config.objective.reward_calibration == 0.98
    assert bound_loss(config.loss).needs_progress


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"loss": {"name": "kto"}}, ["kto needs loss.beta"]),
        ({"loss": {**KTO, "desirable_weight": 0}}, ["loss.desirable_weight=0.0", "positive"]),
        ({"loss": {**KTO, "undesirable_weight": -1}}, ["loss.undesirable_weight=-1.0"]),
        (
            {"loss": [{**KTO, "weight": 1.0}, {"name": "dpo", "weight": 1.0, "beta": 0.1}]},
            ["mixture", "unpaired", "alone"],
        ),
        ({"loss": KTO, "reference.mode": "none"}, ["reference.mode=none", "loss kto needs"]),
        ({"loss": KTO, "dynamics.every": 5}, ["dynamics.every", "unpaired"]),
        ({"loss": KTO, "data.drop_displacing": 0.1}, ["data.drop_displacing", "unpaired"]),
        (
            {"loss": KTO, "objective": {"regularizer": "hinge", "regularizer_weight": 1.0}},
            ["regularizer=hinge", "unpaired", "nll"],
        ),
    ],
)
def test_what_a_loss_of_unpaired_rows_cannot_do(overrides, parts):
    message = refused(**{k.replace(".", "__"): v for k, v in overrides.items()})
    assert all(part in message for part in parts), message


def test_the_loss_says_which_rows_are_read():
    assert rows_kind(checked(loss=KTO).loss) == "unpaired"
    assert rows_kind(checked().loss) == "preference"


def own_unpaired_loss(policy, reference, *, strength: float, kl):
    return strength * (policy.completion - reference.completion - kl)


def test_an_unpaired_loss_of_ones_own():
    named = {"name": f"{__name__}:own_unpaired_loss", "strength": 2.0}
    assert rows_kind(checked(loss=named).loss) == "unpaired"
    assert "loss.wpo would be ignored" in refused(loss={**named, "wpo": True})
