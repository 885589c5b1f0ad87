"""Store what TRL's own trainers compute as losses of a few pairs, and the log-probs they saw.

Run ``python -m tests.losses.trl_values`` from the repository, with TRL 1.16 or later installed.
A tiny model and its tokenizer are made here: nothing is downloaded.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

FILE = Path(__file__).parent / "fixtures" / "trl_values.json"

PAIRS = [  # prompt, chosen, rejected; the first prompt is one token, which nothing predicts
    ("a", "b c d", "d c"),
    ("c a b", "e", "f e d c"),
    ("b b", "a c e g f", "h"),
    ("d e f g", "h g", "a b c d e f"),
    ("h a", "b g a", "c c a"),
]

DPO, CPO, ORPO = "DPOTrainer", "CPOTrainer", "ORPOTrainer"
SIMPO = {"beta": 2.0, "simpo_gamma": 0.8}
CASES = {  # name -> trainer, its settings
    "sigmoid": (DPO, {"loss_type": ["sigmoid"], "beta": 0.3}),
    "sigmoid, smoothing given": (
        DPO,
        {"loss_type": ["sigmoid"], "beta": 0.3, "label_smoothing": 0.2},
    ),
    "aot_unpaired, smoothed": (
        DPO,
        {"loss_type": ["aot_unpaired"], "beta": 0.3, "label_smoothing": 0.2},
    ),
    "sigmoid, ld_alpha": (DPO, {"loss_type": ["sigmoid"], "beta": 0.3, "ld_alpha": 0.4}),
    "ipo, ld_alpha": (DPO, {"loss_type": ["ipo"], "beta": 0.2, "ld_alpha": 0.0}),
    "hinge": (DPO, {"loss_type": ["hinge"], "beta": 0.3}),
    "ipo": (DPO, {"loss_type": ["ipo"], "beta": 0.2}),
    "exo_pair": (DPO, {"loss_type": ["exo_pair"], "beta": 0.3, "label_smoothing": 1e-3}),
    "nca_pair": (DPO, {"loss_type": ["nca_pair"], "beta": 0.3}),
    "robust": (DPO, {"loss_type": ["robust"], "beta": 0.3, "label_smoothing": 0.2}),
    "bco_pair": (DPO, {"loss_type": ["bco_pair"], "beta": 0.3}),
    "sppo_hard": (DPO, {"loss_type": ["sppo_hard"], "beta": 0.2}),
    "apo_zero": (DPO, {"loss_type": ["apo_zero"], "beta": 0.3}),
    "apo_down": (DPO, {"loss_type": ["apo_down"], "beta": 0.3}),
    "sigmoid_norm": (DPO, {"loss_type": ["sigmoid_norm"], "beta": 2.0}),
    "sft": (DPO, {"loss_type": ["sft"]}),
    "two": (
        DPO,
        {"loss_type": ["sigmoid_norm", "apo_zero"], "loss_weights": [0.7, 1.3], "beta": 0.3},
    ),
    "mpo": (
        DPO,
        {
            "loss_type": ["sigmoid", "bco_pair", "sft"],
            "loss_weights": [0.8, 0.2, 1.0],
            "beta": 0.1,
        },
    ),
    "cpo": (CPO, {"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 0.7}),
    "cpo, smoothed": (
        CPO,
        {"loss_type": "sigmoid", "beta": 0.3, "cpo_alpha": 0.7, "label_smoothing": 0.2},
    ),
    "simpo": (CPO, {"loss_type": "simpo", "cpo_alpha": 0.0, **SIMPO}),
    "simpo, smoothed": (
        CPO,
        {"loss_type": "simpo", "cpo_alpha": 0.0, "label_smoothing": 0.2, **SIMPO},
    ),
    "simpo, cpo_alpha": (CPO, {"loss_type": "simpo", "cpo_alpha": 0.7, **SIMPO}),
    "alphapo": (CPO, {"loss_type": "alphapo", "alpha": 0.25, **SIMPO}),
    "alphapo, smoothed": (
        CPO,
        {"loss_type": "alphapo", "alpha": -0.1, "label_smoothing": 0.2, **SIMPO},
    ),
    "orpo": (ORPO, {"beta": 0.3}),
}


def make_tokenizer():
    """A word is a token; TRL itself adds the closing EOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *"abcdefgh"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def make_model(seed: int):
    """A Llama of one layer in float64, its weights large enough for log-ratios of some nats."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, initializer_range=0.2,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def make_trainer(name: str, settings: dict, folder: str):
    """TRL's trainer for those settings, on ``PAIRS``."""
    from datasets import Dataset

    if name == DPO:
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Trainer
    elif name == CPO:
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Trainer
    else:
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Trainer
    rows = [{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in PAIRS]
    return Trainer(
        model=make_model(0),
        args=Config(output_dir=folder, use_cpu=True, bf16=False, report_to="none", **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        **({"ref_model": make_model(1)} if name == DPO else {}),
    )


def loss_of(trainer, rows: list[int]) -> float:
    """The loss of a batch of these rows, along the trainer's own path."""
    import torch

    batch = trainer.data_collator([trainer.train_dataset[i] for i in rows])
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model, batch))


def token_logprobs(model, ids: list[int]) -> list[float]:
    """The log-prob of every token but the first, one row at a time and without padding."""
    import torch

    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [float(logprobs[i, token]) for i, token in enumerate(ids[1:])]


def pair_logprobs(rows: list[dict], model) -> dict[str, list[float]]:
    """Sums and numbers of tokens; of the prompt's, those that are predicted."""
    found: dict[str, list[float]] = {}
    for row in rows:
        scored = len(row["prompt_ids"]) - 1
        for side in ("chosen", "rejected"):
            logprobs = token_logprobs(model, row["prompt_ids"] + row[f"{side}_ids"])
            found.setdefault(side, []).append(sum(logprobs[scored:]))
            found.setdefault(f"{side}_by_token", []).append(logprobs[scored:])
            found.setdefault(f"{side}_length", []).append(len(logprobs) - scored)
        found.setdefault("prompt", []).append(sum(logprobs[:scored]))
        found.setdefault("prompt_length", []).append(scored)
    return found


def texts(trainer) -> list[list[int]]:
    """Every row's chosen and rejected text as the trainer tokenized it, to compare trainers."""
    rows = trainer.train_dataset
    if "prompt_ids" in rows.column_names:
        return [[*r["prompt_ids"], *r[f"{s}_ids"]] for r in rows for s in ("chosen", "rejected")]
    return [r[f"{s}_input_ids"] for r in rows for s in ("chosen", "rejected")]


def trl_values() -> dict:
    """Log-probs of ``PAIRS``; for each case the loss of all pairs together and of each alone."""
    import torch
    import transformers
    import trl

    cases, seen = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name, (kind, settings) in CASES.items():
            trainer = make_trainer(kind, settings, folder)
            if kind == DPO and not seen:
                rows, seen = list(trainer.train_dataset), texts(trainer)
            if texts(trainer) != seen:
                raise ValueError(f"{kind} reads other tokens than {DPO}: {texts(trainer)}, {seen}")
            every = range(len(PAIRS))
            cases[name] = {
                "trainer": kind,
                "settings": settings,
                "together": loss_of(trainer, list(every)),
                "alone": [loss_of(trainer, [i]) for i in every],
            }
    return {
        "made_with": {m.__name__: m.__version__ for m in (trl, torch, transformers)},
        "policy": pair_logprobs(rows, make_model(0)),
        "reference": pair_logprobs(rows, make_model(1)),
        "cases": cases,
    }


def to_text(values: dict) -> str:
    """JSON with one line for every list of numbers and every case."""

    def line(value) -> str:
        return json.dumps(value, allow_nan=False)

    sections = [f'"made_with": {line(values["made_with"])}']
    for key in ("policy", "reference", "cases"):
        inside = ",\n".join(f"  {line(name)}: {line(v)}" for name, v in values[key].items())
        sections.append(f"{line(key)}: {{\n{inside}\n}}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(to_text(trl_values()))
