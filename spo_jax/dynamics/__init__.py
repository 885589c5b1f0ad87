"""Why probabilities move: the first-order law, the probes of a run, an exact bandit.

``law`` is mathematics on any model and loss, ``probes`` measures it in a run on the rows of
``row_choice``, ``bandit`` is a problem whose whole policy can be written down.
"""
