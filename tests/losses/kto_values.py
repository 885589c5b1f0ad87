"""Store what TRL's KTO trainer computes for a few rows, and the log-probs it saw.

Run ``python -m tests.losses.kto_values`` from the repository, with TRL 1.16 or later installed.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.losses.trl_values import PAIRS, make_model, make_tokenizer, token_logprobs

FILE = Path(__file__).parent / "fixtures" / "kto_values.json"

ROWS = [
    {"prompt": prompt, "completion": f" {chosen if i % 3 else rejected}", "label": bool(i % 3)}
    for i, (prompt, chosen, rejected) in enumerate(PAIRS)
]
AS_IT_IS = {"policy": "model 0", "reference": "model 1"}
SWAPPED = {"policy": "model 1", "reference": "model 0"}
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
CASES = {  # name -> the settings, which model is which
    "plain": {"settings": {"beta": 0.3}, "models": AS_IT_IS},
    "weighted": {"settings": {"beta": 0.3, **WEIGHTS}, "models": AS_IT_IS},
    "swapped": {"settings": {"beta": 0.3, **WEIGHTS}, "models": SWAPPED},
}
MODELS = {"model 0": 0, "model 1": 1}


def make_trainer(settings: dict, models: dict, folder: str):
    """TRL's trainer for those settings, on ``ROWS`` as one batch."""
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    return KTOTrainer(
        model=make_model(MODELS[models["policy"]]),
        ref_model=make_model(MODELS[models["reference"]]),
        args=KTOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_train_batch_size=len(ROWS),
            train_sampling_strategy="sequential",
            **settings,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=make_tokenizer(),
    )


def row_logprobs(rows: list[dict], seed: int) -> dict[str, list[float]]:
    """Sums over each row's own and its mismatched completion."""
    model, found = make_model(seed), {}
    for name, key in (("completion", "completion_ids"), ("mismatched", "KL_completion_ids")):
        found[name] = [
            sum(token_logprobs(model, row["prompt_ids"] + row[key])[len(row["prompt_ids"]) - 1 :])
            for row in rows
        ]
    return found


def kto_values() -> dict:
    """Rows as TRL reads them, their log-probs, and each case's loss and reference point."""
    import torch
    import transformers
    import trl

    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in CASES.items():
            trainer = make_trainer(**case, folder=folder)
            rows = list(trainer.train_dataset)
            with torch.no_grad():
                loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
            kl = trainer._metrics["train" if trainer.model.training else "eval"]["kl"][-1]
            cases[name] = {**case, "loss": float(loss), "kl": float(kl)}
    keys = ("prompt_ids", "completion_ids", "KL_completion_ids", "label")
    return {
        "made_with": {m.__name__: m.__version__ for m in (trl, torch, transformers)},
        "rows": [{key: row[key] for key in keys} for row in rows],
        **{name: row_logprobs(rows, seed) for name, seed in MODELS.items()},
        "cases": cases,
    }


if __name__ == "__main__":
    lines = (f'"{k}": {json.dumps(v, allow_nan=False)}' for k, v in kto_values().items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
