"""What is sampled from a policy into files: outputs for judges, pairs of its own mistakes.

``outputs`` is ``spo-jax generate``, ``make_pairs`` the command of that name, ``builtin`` the rows
of the built-in task. How one policy generates text is in ``policies``.
"""
