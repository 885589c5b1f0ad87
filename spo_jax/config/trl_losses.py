"""The losses of TRL's trainers under our names; ``tests/losses/test_trl.py`` finds them equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from spo_jax.config.parsing import ConfigError, nearest

DPO_LOSSES = {
    "sigmoid": "dpo",
    "hinge": "slic",
    "ipo": "ipo",
    "exo_pair": "exo_pair",
    "nca_pair": "nca",
    "robust": "robust_dpo",
    "bco_pair": "bco_pair",
    "sppo_hard": "sppo_hard",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "sigmoid_norm": "dpo_norm",
}
"""``loss_type`` of ``DPOTrainer`` -> our name; ``sft`` is a level, not a loss."""

REFUSED = {
    "dpo": {
        "aot": "it sorts the log-ratios of a batch, so a pair's loss depends on those beside it",
        "aot_unpaired": "it sorts the log-ratios of a batch, as aot does",
        "discopop": "it overflows for a pair that is far on the wrong side",
    },
    "cpo": {
        "hinge": "slic is against the reference here, and CPOTrainer's is without",
        "ipo": "ipo is against the reference here, and CPOTrainer's is without",
    },
    "kto": {"apo_zero_unpaired": "kto is the only loss of unpaired rows here"},
}
"""``loss_type`` by trainer that has no equal here, with the reason."""

TYPES = {
    "dpo": (*DPO_LOSSES, "sft", *REFUSED["dpo"]),
    "cpo": ("sigmoid", "simpo", "alphapo", *REFUSED["cpo"]),
    "kto": ("kto", *REFUSED["kto"]),
    "orpo": (),
}


class Found(NamedTuple):
    """Our sections, the settings that have a part in them, and what has to be said."""

    sections: dict[str, Any]
    used: frozenset[str]
    notes: tuple[str, ...] = ()


def loss_sections(trainer: str, given: Mapping[str, Any]) -> Found:
    """The sections ``loss``, ``solver`` and ``reference`` for a trainer's settings.

    Raises:
        ConfigError: a loss or a setting of it that has no equal here, with the reason.
    """
    return {"dpo": _dpo, "cpo": _cpo, "orpo": _orpo, "kto": _kto}[trainer](given)


def number(given: Mapping[str, Any], name: str, default: int | float) -> float:
    """A setting that is a number; TRL's ``default`` where it is not set."""
    value = given.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}={value!r}: expected a number")
    return float(value)


def _check_type(trainer: str, kind: Any) -> None:
    kind = str(kind)
    reason = REFUSED[trainer].get(kind)
    if reason:
        raise ConfigError(f"loss_type={kind}: {reason}. Choose another loss")
    if kind not in TYPES[trainer]:
        usable = [t for t in TYPES[trainer] if t not in REFUSED[trainer]]
        raise ConfigError(
            f"loss_type={kind!r}: TRL's {trainer.upper()}Trainer has {', '.join(usable)}"
            f"{nearest(kind, usable)}"
        )


def _dpo(given: Mapping[str, Any]) -> Found:
    types = given.get("loss_type") or ["sigmoid"]
    types = types if isinstance(types, list) else [types]
    weights = given.get("loss_weights")
    weights = [1.0] * len(types) if weights is None else weights
    weights = weights if isinstance(weights, list) else [weights]
    if len(weights) != len(types):
        raise ConfigError(f"loss_weights={weights} for loss_type={types}: one for each is needed")
    for kind in types:
        _check_type("dpo", kind)
    divergence = given.get("f_divergence_type") or "reverse_kl"
    if divergence != "reverse_kl":
        raise ConfigError(
            f"f_divergence_type={divergence}: losses here are those of reverse_kl. Remove it"
        )
    weighted = bool(given.get("use_weighting"))
    members, nll = [], 0.0
    for kind, weight in zip(types, weights, strict=True):
        if kind == "sft":
            nll += number({"loss_weights": weight}, "loss_weights", 1.0)
            continue
        member = {"name": DPO_LOSSES[kind], "weight": weight, **_dpo_options(kind, given)}
        members.append(member | ({"wpo": True} if weighted else {}))
    if not members:
        raise ConfigError("loss_type=sft alone is SFT: spo-jax sft CONFIG, with stages: [sft]")
    if nll and weighted:
        raise ConfigError("use_weighting beside sft: its weights are of pairs. Remove one of them")
    if len(members) == 1 and members[0]["weight"] == 1:
        loss: Any = {k: v for k, v in members[0].items() if k != "weight"}
    else:
        loss = members
    return _with_settings(given, {"loss": loss, "solver": _solver(nll)}, types, weighted)


def _with_settings(given, sections, types, weighted) -> Found:
    used = {"loss_type", "loss_weights", "beta", "f_divergence_type", "use_weighting"}
    notes = []
    if "robust" in types or "exo_pair" in types:
        used.add("label_smoothing")
    if weighted:
        notes.append("wpo: TRL aligns the weight of each token by the whole distribution; not here")
    if given.get("ld_alpha") is not None:
        used.add("ld_alpha")
        alpha = number(given, "ld_alpha", 1.0)
        loss = sections["loss"]
        for member in loss if isinstance(loss, list) else [loss]:
            member["length_desensitized"] = alpha
        sections["reference"] = {"mode": "online"}
    elif given.get("precompute_ref_log_probs") is not None:
        used.add("precompute_ref_log_probs")
        kept = bool(given["precompute_ref_log_probs"])
        sections["reference"] = {"mode": "precomputed" if kept else "online"}
    if given.get("sync_ref_model") is not None:
        used.add("sync_ref_model")
    if given.get("sync_ref_model"):
        used |= _SYNC.keys()
        sections["reference"] = _synced(given)
    return Found(sections, frozenset(used), tuple(notes))


_SYNC = {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512}
"""TRL's settings of a reference that moves, where ``sync_ref_model`` is true, with its defaults."""


def _synced(given: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``reference`` where TRL has ``ref <- alpha policy + (1 - alpha) ref``."""
    if given.get("precompute_ref_log_probs"):
        raise ConfigError(
            "sync_ref_model with precompute_ref_log_probs: log-probs computed once cannot move; "
            "TRL refuses it too. Remove one of them"
        )
    alpha, every = (number(given, name, default) for name, default in _SYNC.items())
    if every != int(every):
        raise ConfigError(f"ref_model_sync_steps={every:g}: expected a whole number")
    return {"mode": "online", "moving": {"alpha": alpha, "every": int(every)}}


def _dpo_options(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    beta, smoothing = number(given, "beta", 0.1), number(given, "label_smoothing", 0.0)
    if kind == "ipo":
        return {"tau": beta, "length_normalized": True}
    if kind == "robust":
        return {"beta": beta, "flip_rate": smoothing}
    if kind == "exo_pair":
        if not smoothing:
            raise ConfigError("loss_type=exo_pair with label_smoothing=0 has no finite loss: 1e-3")
        return {"beta": beta, "target_smoothing": smoothing}
    return {"beta": beta}


def _solver(nll: float) -> dict[str, Any]:
    if not nll:
        return {"name": "preference_only"}
    return {"name": "penalty", "penalty": "linear", "penalty_weight": nll}


def _cpo(given: Mapping[str, Any]) -> Found:
    kind = given.get("loss_type") or "sigmoid"
    _check_type("cpo", kind)
    beta, alpha = number(given, "beta", 0.1), number(given, "alpha", 0.0)
    nll = 0.0 if kind == "alphapo" else number(given, "cpo_alpha", 1.0)
    used = {"loss_type", "beta", "label_smoothing", "alpha"}
    used |= set() if kind == "alphapo" else {"cpo_alpha"}
    options: dict[str, Any] = {"beta": beta}
    if given.get("label_smoothing"):
        options["label_smoothing"] = number(given, "label_smoothing", 0.0)
    if kind == "sigmoid":
        if alpha:
            raise ConfigError(
                f"alpha={alpha:g} with loss_type=sigmoid: alphapo here is on mean log-probs. "
                "Set loss_type: simpo or alphapo"
            )
        loss = {"name": "cpo", **options, "alpha": nll}
        return Found({"loss": loss, "solver": _solver(0.0)}, frozenset(used))
    options["gamma_beta_ratio"] = number(given, "simpo_gamma", 0.5) / beta if beta else 0.0
    loss = {"name": "simpo", **options}
    if alpha:
        loss = {"name": "alphapo", **options, "alpha": alpha}
    return Found({"loss": loss, "solver": _solver(nll)}, frozenset(used | {"simpo_gamma"}))


def _orpo(given: Mapping[str, Any]) -> Found:
    loss = {"name": "orpo", "beta": number(given, "beta", 0.1)}
    note = "orpo: TRL averages the NLL over the prompt's tokens too, here over the completion's"
    return Found({"loss": loss, "solver": _solver(0.0)}, frozenset({"beta"}), (note,))


def _kto(given: Mapping[str, Any]) -> Found:
    _check_type("kto", given.get("loss_type") or "kto")
    loss: dict[str, Any] = {"name": "kto", "beta": number(given, "beta", 0.1)}
    for name in ("desirable_weight", "undesirable_weight"):
        if given.get(name) is not None:
            loss[name] = number(given, name, 1.0)
    found = _with_settings(given, {"loss": loss, "solver": _solver(0.0)}, (), weighted=False)
    return found._replace(used=found.used | {"desirable_weight", "undesirable_weight"})
