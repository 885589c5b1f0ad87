"""A solver of your own, beside plain DPO and SPO's default, where every probability is exact.

    python examples/own_solver.py

In a run, from this folder:

    spo-jax train quickstart --solver '{name: "own_solver:make_smooth_hinge", tolerance: -0.025}'
"""

import jax
import jax.numpy as jnp
import optax

import spo_jax as spo


def make_smooth_hinge(
    *,
    outer: optax.GradientTransformation,
    penalty_weight: float = 30.0,
    tolerance: float = 0.0,
    width: float = 0.01,
) -> spo.Solver:
    """Update: ``outer`` on ``grad F + penalty_weight * sigmoid((g - tolerance) / width) * grad g``.

    The slope of a softplus: 0 inside the safe region and 1 outside, but over some ``width``
    (nats per token, above 0), not at once as that of the hinge.
    """
    if width <= 0:
        raise ValueError(f"width={width}: expected a positive number")

    def init(params: object) -> spo.SolverState:
        return spo.SolverState(params, outer.init(params))

    def update(state: spo.SolverState, batch: object, levels: spo.Levels):
        def weights(loss: jax.Array, gap: jax.Array):
            return 1.0, penalty_weight * jax.nn.sigmoid((gap - tolerance) / width)

        ((loss, gap), aux), grads = levels.gradient(state.params, batch, weights)
        updates, outer_state = outer.update(grads, state.outer, state.params)
        metrics = {"grad_norm": optax.tree.norm(grads), "penalty_weight": weights(loss, gap)[1]}
        params = optax.apply_updates(state.params, updates)
        return spo.SolverState(params, outer_state), (aux, metrics)

    return spo.Solver(init, update)


if __name__ == "__main__":
    bandit = spo.make_shift_bandit()
    levels = spo.make_bandit_levels(bandit, spo.make_preference_loss("dpo", beta=0.1))
    adam = optax.adam(0.05)
    solvers = {
        "plain DPO": spo.make_preference_only(outer=adam),
        "penalty": spo.make_penalty(outer=adam, penalty_weight=1.0),
        "your own": make_smooth_hinge(outer=adam, penalty_weight=1.0, tolerance=-0.5, width=0.1),
    }
    print("probability of chosen, rejected, all other answers after 400 updates; gap (nats)")
    for name, solver in solvers.items():
        path, _ = spo.simulate(bandit, levels, solver, steps=400)
        found = spo.masses(bandit, path[-1])
        gap = -jnp.mean((path[-1] - path[0])[jnp.arange(len(bandit.chosen)), bandit.chosen])
        print(f"{name:>10}" + "".join(f"{float(mass):8.3f}" for mass in found) + f"{gap:8.3f}")
