"""``python -m spo_jax`` is ``spo-jax``."""

from spo_jax.cli import start

if __name__ == "__main__":
    raise SystemExit(start())
