"""Store what ``transformers`` computes for the tiny models.

Run ``python -m tests.models.make_fixtures`` from the repository, with PyTorch installed.
The stored logits let the parity tests run where it is not.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from tests.models.tiny_models import HF_CONFIGS, padded_tokens, write_folder

LENGTHS, WIDTH = [40, 23], 40


def transformers_model(folder: Path):
    """Load a folder with ``transformers``, float32 and its plainest attention."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def transformers_logits(folder: Path, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Compute the logits of left-padded rows with ``transformers``."""
    import torch

    with torch.no_grad():
        return transformers_model(folder)(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            position_ids=torch.tensor(np.maximum(mask.cumsum(1) - 1, 0)),
        ).logits.numpy()


def main() -> None:
    """Write one file a model: tokens, mask and the logits at every fourth position."""
    for name, hf_config in HF_CONFIGS.items():
        tokens, mask = padded_tokens(0, LENGTHS, WIDTH)
        with tempfile.TemporaryDirectory() as folder:
            logits = transformers_logits(write_folder(Path(folder), hf_config), tokens, mask)
        file = Path(__file__).parent / "fixtures" / f"{name}.npz"
        np.savez_compressed(file, tokens=tokens, mask=mask, logits=logits[:, 3::4])


if __name__ == "__main__":
    main()
