"""A run resumed with other settings: said, or refused."""

import pytest

from spo_jax.config.changes import BINDING, ChangedConfig, check_changes
from spo_jax.config.parsing import changed_keys, config_from_tree, config_to_dict, override
from spo_jax.config.schema import Config

TREE = {
    "model": {"path": "a/model", "tokenizer": "a/tokenizer"},
    "outer": {"name": "adamw", "learning_rate": 1e-4, "options": {"b1": 0.9}},
    "loss": {"name": "dpo", "beta": 0.1},
    "train": {"steps": 10},
}


def check(changes, **options):
    saved = config_to_dict(config_from_tree(TREE))
    return check_changes(config_from_tree(override(TREE, changes)), saved, run="RUN", **options)


def test_nothing_changed():
    assert check({}) is None
    assert check({"output_dir": "elsewhere"}) is None


def test_what_a_state_survives_is_said():
    said = check({"train.steps": 20, "outer.learning_rate": 2e-4, "mesh.fsdp": 4, "loss.beta": 0.2})
    for part in (
        "train.steps: 10 -> 20", "outer.learning_rate: 0.0001 -> 0.0002", "mesh.fsdp: 1 -> 4",
        "loss.beta: 0.1 -> 0.2",
    ):  # fmt: skip
        assert part in said


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("model.path", "b/model", "model.path: a/model -> b/model"),
        ("model.tokenizer", "b", "model.tokenizer: a/tokenizer -> b"),
        ("model.param_dtype", "bfloat16", "model.param_dtype: float32 -> bfloat16"),
        ("outer.name", "lion", "outer.name: adamw -> lion"),
        ("outer.options", {"b1": 0.5}, "outer.options.b1: 0.9 -> 0.5"),
        ("solver", {"name": "primal_dual"}, "solver.name: penalty -> primal_dual"),
        ("loss", {"name": "simpo", "beta": 2.0}, "loss.name: dpo -> simpo"),
        ("reference.path", "b", "reference.path: None -> b"),
        ("objective.inner_value", "running_min", "inner_value: reference -> running_min"),
    ],
)
def test_what_would_corrupt_is_refused_unless_told_otherwise(key, value, shown):
    with pytest.raises(ChangedConfig) as caught:
        check({key: value, "train.steps": 20})
    for part in ("RUN cannot be resumed", shown, "--allow-changes"):
        assert part in str(caught.value)
    assert "train.steps" not in str(caught.value)
    assert shown in check({key: value}, allow=True)


def test_an_inner_value_without_a_state_may_become_another():
    assert check({"objective.inner_value": 0.5}) == "objective.inner_value: reference -> 0.5"


def test_what_an_older_version_did_not_know_was_its_default():
    """Else an upgrade in the middle of a run, or of a study, would say that everything changed."""
    saved = config_to_dict(config_from_tree(TREE))
    saved["dynamics"] = None  # a heading alone
    del saved["texts"], saved["data"]["mix"], saved["outer"]["schedule"], saved["lora"]["rank"]

    def resumed(changes):
        return check_changes(config_from_tree(override(TREE, changes)), saved, run="RUN")

    assert resumed({}) is None
    assert resumed({"outer.schedule": "constant"}) == "outer.schedule: cosine -> constant"
    assert resumed({"texts.split": "test"}) == "texts.split: train -> test"
    with pytest.raises(ChangedConfig, match=r"lora\.rank: None -> 4"):
        resumed({"lora.rank": 4})


def test_a_mapping_that_was_empty_or_becomes_so_is_told_by_its_keys():
    tree = override(TREE, {"data.columns": {"prompt": "question"}})
    config, plain = config_from_tree(tree), config_from_tree(TREE)
    key = "data.columns.prompt"
    assert changed_keys(config, config_to_dict(plain)) == {key: (None, "question")}
    assert changed_keys(plain, config_to_dict(config)) == {key: ("question", None)}


def test_of_a_mixture_names_bind_and_weights_do_not():
    losses = [{"name": "dpo", "weight": w, "beta": 0.1} for w in (0.5, 0.2)]
    saved = config_to_dict(config_from_tree({**TREE, "loss": losses}))

    def resumed(loss, **options):
        now = config_from_tree({**TREE, "loss": loss})
        return check_changes(now, saved, run="RUN", **options)

    assert resumed(losses) is None
    assert "loss.1.weight: 0.2 -> 0.4" in resumed([losses[0], {**losses[1], "weight": 0.4}])
    with pytest.raises(ChangedConfig, match=r"loss\.0\.name: dpo -> nca"):
        resumed([{**losses[0], "name": "nca"}, losses[1]])
    with pytest.raises(ChangedConfig, match=r"loss\.0\.name: dpo"):
        resumed({"name": "dpo", "beta": 0.1})


def test_every_binding_key_is_one_of_the_configuration():
    tree = config_to_dict(Config())
    for key in BINDING:
        section, name = key.split(".")
        assert name in tree[section], key


def test_keys_of_a_mapping_that_was_empty_are_said():
    said = check({"data.columns": {"prompt": "frage"}})
    assert said == "data.columns.prompt: None -> frage"
    with pytest.raises(ChangedConfig, match=r"inner.options.b1: None -> 0.9"):
        check({"inner.options": {"b1": 0.9}})
    saved = config_to_dict(config_from_tree(override(TREE, {"data.columns": {"prompt": "a"}})))
    assert "data.columns.prompt: a -> None" in check_changes(
        config_from_tree(TREE), saved, run="RUN"
    )


def test_how_a_reference_moves_may_change_and_whether_it_does_may_not():
    moving = {"reference": {"mode": "online", "moving": {"alpha": 0.6, "every": 512}}}
    saved = config_to_dict(config_from_tree(TREE | moving))

    def resumed(reference, **options):
        now = config_from_tree({**TREE, "reference": reference})
        return check_changes(now, saved, run="RUN", **options)

    other = {"mode": "online", "moving": {"alpha": 1, "every": 64}}
    said = resumed(other)
    assert "reference.moving.alpha: 0.6 -> 1" in said
    assert "reference.moving.every: 512 -> 64" in said
    with pytest.raises(ChangedConfig, match=r"alpha: 0\.6 -> None \(the checkpoint holds a ref"):
        resumed({"mode": "online"})
    assert "reference.moving.alpha: 0.6 -> None" in resumed({"mode": "online"}, allow=True)
    with pytest.raises(ChangedConfig, match=r"reference\.moving\.every: None -> 512"):
        check(moving | {"train.steps": 20})
