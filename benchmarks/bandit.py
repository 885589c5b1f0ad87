"""The catastrophic shift where every probability is exact: a softmax bandit, solver by solver.

    python benchmarks/bandit.py --out docs/images/bandit.png

Trains the same bandit with plain DPO and with SPO's solvers (or another loss: --loss simpo) and
draws the exact probability of the chosen answers, of the rejected ones, and of all the answers
that no pair names, over the updates. Takes seconds on a CPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import optax

from spo_jax import (
    make_bandit_levels,
    make_preference_loss,
    make_shift_bandit,
    make_solver,
    masses,
    simulate,
)
from spo_jax.report.figures import COLOURS, figure_style, figure_to_png, make_axes

LOSSES = {
    "dpo": {"beta": 0.1},
    "rdpo": {"beta": 0.1, "alpha": 0.02},
    "simpo": {"beta": 2.5, "gamma_beta_ratio": 0.4},
    "alphadpo": {"beta": 2.5, "gamma_beta_ratio": 0.4, "alpha": 0.2},
}
SOLVERS = {
    "preference_only": "plain {loss}",
    "penalty": "{loss} + SPO, penalty",
    "primal_dual": "{loss} + SPO, primal_dual",
    "dynamic_barrier": "{loss} + SPO, dynamic_barrier",
    "alternating": "{loss} + SPO, alternating",
    "unrolled": "{loss}, unrolled",
}
OPTIONS = {"penalty": {"penalty_weight": 1.0}}
PARTS = (("chosen", 0), ("rejected", 1), ("in neither column", 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", choices=LOSSES, default="dpo")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=0.05, help="of Adam [0.05]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="PNG file")
    options = parser.parse_args()
    bandit = make_shift_bandit(seed=options.seed)
    levels = make_bandit_levels(bandit, make_preference_loss(options.loss, **LOSSES[options.loss]))
    found = {}
    print(f"after {options.steps} updates".rjust(30), " chosen  rejected  neither  margin (nats)")
    for name in SOLVERS:
        chains = {"outer": optax.adam(options.learning_rate), "inner": optax.sgd(0.5)}
        solver = make_solver(name, **chains, **OPTIONS.get(name, {}))
        path, _ = simulate(bandit, levels, solver, steps=options.steps)
        found[name] = np.stack(masses(bandit, path))
        rows = np.arange(len(bandit.chosen))
        last = np.asarray(path[-1])
        margin = np.mean(last[rows, bandit.chosen] - last[rows, bandit.rejected])
        chosen, rejected, outside = found[name][:, -1]
        print(f"{name:>30}  {chosen:6.3f}  {rejected:8.3f}  {outside:7.3f}  {margin:6.2f}")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_bytes(picture(found, options.loss.upper()))
        print(options.out)


def picture(found: dict[str, np.ndarray], loss: str) -> bytes:
    """Stacked probabilities over the updates, a panel a solver."""
    with figure_style():
        figure, axes = make_axes(
            f"Where {loss} puts the probability, exactly",
            height=5.2, rows=2, columns=3, sharex=True, sharey=True,
        )  # fmt: skip
        for panel, (name, parts) in zip(axes.ravel(), found.items(), strict=True):
            steps = np.arange(parts.shape[1])
            colours = [COLOURS[i] for _, i in PARTS]
            stack = panel.stackplot(steps, parts, colors=colours, alpha=0.85)
            for area, hatch in zip(stack, ("", "..", "//"), strict=True):
                area.set(hatch=hatch, edgecolor="white", linewidth=0.4)
            panel.set_title(SOLVERS[name].format(loss=loss), loc="left")
            panel.set(xlim=(0, steps[-1]), ylim=(0, 1))
            panel.grid(False)
        for panel in axes[-1]:
            panel.set_xlabel("updates")
        figure.supylabel("probability (mean over prompts)", fontsize=9.5)
        labels = [label for label, _ in PARTS]
        figure.legend(stack, labels, loc="outside lower center", ncols=3, title="answers")
        return figure_to_png(figure)


if __name__ == "__main__":
    main()
