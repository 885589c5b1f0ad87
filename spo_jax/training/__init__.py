"""A run from its configuration to its last checkpoint.

``run`` is the table of contents: mesh, model, rows, reference, objective, solver, optimizer, state,
loop. ``update`` is the pure step, ``loop`` what repeats it and must not lose one.
"""
