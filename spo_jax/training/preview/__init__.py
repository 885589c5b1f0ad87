"""The rows and batches of a configuration before any training: no weight is read."""

from spo_jax.training.preview.findings import Preview, look_at_data
from spo_jax.training.preview.wording import preview_text

__all__ = ["Preview", "look_at_data", "preview_text"]
