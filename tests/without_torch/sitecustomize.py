"""Commands that tests start are as users have them: PyTorch, here for parity alone, is not there.

On ``PYTHONPATH`` of those processes. It spares each of them the seconds that transformers and
tensorboardX take to import it.
"""

import importlib.util
import sys

_find_spec = importlib.util.find_spec


def _find_spec_but_torch(name, package=None):
    return None if name.partition(".")[0] == "torch" else _find_spec(name, package)


class _NoTorch:
    """A finder that has no PyTorch."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """Raise where PyTorch is imported; None, for other finders to look, elsewhere."""
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")


importlib.util.find_spec = _find_spec_but_torch
sys.meta_path.insert(0, _NoTorch)
