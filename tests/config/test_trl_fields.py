"""The table of TRL's settings: all of them, for the right trainers, and on the page."""

import json
from pathlib import Path

import pytest

from spo_jax.config.parsing import config_to_dict
from spo_jax.config.schema import Config
from spo_jax.config.trl_fields import CARRIED, FIELDS, OWN, RENAMED, TRAINERS, fields_text
from spo_jax.config.trl_losses import DPO_LOSSES, REFUSED, TYPES
from tests.config.trl_fields import FILE, SHARED, trl_fields

STORED = json.loads(FILE.read_text())
PAGE = (Path(__file__).parents[2] / "docs" / "from_trl.md").read_text()
OF = {trainer: f"{trainer.upper()}Config" for trainer in TRAINERS}


def test_the_table_has_every_setting_and_no_other():
    names = {name for of in STORED.values() for name in of}
    assert set(FIELDS) == names
    assert not set(RENAMED) & names
    assert set(RENAMED.values()) <= names


def test_settings_that_only_some_trainers_have():
    special = {name for of in OF.values() for name in STORED[of]}
    found = {n: tuple(t for t in TRAINERS if n in STORED[OF[t]]) for n in special}
    assert {n: of for n, of in found.items() if of != TRAINERS} == OWN


def test_what_is_stored_is_what_trl_has():
    pytest.importorskip("trl", minversion="1.16")
    live = trl_fields()
    assert live == STORED, "python -m tests.config.trl_fields"
    assert len(live[SHARED]) > 100


def test_keys_of_ours_that_the_table_names_exist():
    tree = config_to_dict(Config())
    named = [w.strip(",;:") for f in FIELDS.values() for w in f.text.split() if "." in w[1:-1]]
    ours = [w for w in named if w.partition(".")[0] in tree]
    assert len(ours) > 30
    free = ("loss", "solver")  # their options are those of the choice
    missing = [w for w in ours if (s := w.split("."))[0] not in free and s[1] not in tree[s[0]]]
    assert not missing


def test_what_is_refused_is_a_known_type():
    assert all(set(REFUSED[t]) <= set(TYPES[t]) for t in REFUSED)


def test_the_page_has_the_table():
    _, _, rest = PAGE.partition("<!-- table: spo_jax.config.trl_fields.fields_text -->\n")
    assert rest.partition("<!-- end -->")[0].strip() == fields_text()


def test_the_page_has_every_loss():
    table = PAGE.partition("## Losses")[2].partition("\n## ")[0]
    for trainer, kinds in TYPES.items():
        for kind in kinds:
            assert f"`{kind}`" in table, (trainer, kind)
    for ours in DPO_LOSSES.values():
        assert f"`{ours}`" in table


def test_every_reason_is_said_once():
    assert {f.kind for f in FIELDS.values()} == {
        CARRIED, "always so here", "not here yet", "no counterpart",
    }  # fmt: skip
    reasons = [f for f in FIELDS.values() if f.kind != CARRIED]
    assert all(f.text and not f.text.endswith(".") for f in reasons)
