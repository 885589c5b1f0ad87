"""How good a policy is: held-out rows, graded answers, the verdicts of a judge.

``heldout`` has log-probs and margins, ``answers`` what is generated and graded, ``scoring`` both
for ``spo-jax evaluate``, ``judge`` the win rate of one file of outputs over another.
"""
