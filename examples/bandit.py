"""Where plain DPO's probability goes, and what SPO holds: a bandit whose policy is exact.

    python examples/bandit.py

Four prompts with 24 answers each; one pair names two of them. Its completions share most of their
features, so that pushing the rejected down takes the chosen along.
"""

import optax

import spo_jax as spo

if __name__ == "__main__":
    bandit = spo.make_shift_bandit(closeness=0.95)
    levels = spo.make_bandit_levels(bandit, spo.make_preference_loss("dpo", beta=0.1))
    solvers = {
        "plain DPO": spo.make_preference_only(outer=optax.adam(0.05)),
        "DPO + SPO": spo.make_penalty(outer=optax.adam(0.05), penalty_weight=1.0),
    }
    for name, solver in solvers.items():
        path, _ = spo.simulate(bandit, levels, solver, steps=400)
        found = spo.masses(bandit, path)
        print(f"{name}: probability after so many updates\n update  chosen rejected neither")
        for step in (0, 25, 50, 100, 200, 400):
            bar = "c" * round(40 * float(found.chosen[step]))
            bar += "r" * round(40 * float(found.rejected[step]))
            print(
                f"{step:7d}" + "".join(f"{float(m[step]):8.3f}" for m in found) + f"  |{bar:.<40}|"
            )
