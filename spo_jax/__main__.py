"""``python -m spo_jax`` is ``spo-jax``."""

from spo_jax.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
