"""Does CHES tell which pairs lose their chosen completion? Scores against what training did.

    spo-jax train configs/quickstart.yaml
    spo-jax score-pairs configs/quickstart.yaml
    python benchmarks/displacement.py runs/quickstart

Of a run that began with SFT: rank correlations between a pair's scores before training (the file
that ``spo-jax score-pairs`` wrote) and the change of its chosen log-prob (nats, of the sum): by one
small step on the pair alone (of --pairs of them), and over each stage of pairs; and the mean change
by fifths of the normalised score. Beside CHES two scores that need no model, the lengths of chosen
and rejected.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np

from spo_jax.config.choices import bound_loss
from spo_jax.config.parsing import read_tree
from spo_jax.config.validation import checked_config
from spo_jax.data import eval_batches
from spo_jax.dynamics.law import make_exact_law
from spo_jax.dynamics.row_choice import lay_out
from spo_jax.evaluation.heldout import make_row_logprobs
from spo_jax.parallel.mesh import make_mesh, place_batch
from spo_jax.policies.loading import Policy, as_trained, load_policy, token_logprobs_of
from spo_jax.training.material import rows_of_stage
from spo_jax.training.ranked_pairs import SCORES_FILE


def ranks(values: np.ndarray) -> np.ndarray:
    """Places in ascending order, from 0; equal values share the mean of theirs."""
    order = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(order[2])
    return (ends - (order[2] + 1) / 2)[order[1]]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """The rank correlation."""
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


class Run:
    """The training pairs of a finished run, and the policy that each stage ended with."""

    def __init__(self, root: Path, work: Path):
        self.root, self.work, self.mesh = root, work, make_mesh()
        tree = read_tree(root / "baseline" / "config.yaml", {"output_dir": str(root)})
        self.config = checked_config(tree)
        policy = self.policy("sft")
        self.rows = rows_of_stage(self.config, "baseline", policy, {}, resume=True).own
        self.logprobs = token_logprobs_of(self.config.model, policy.model, self.mesh)

    def policy(self, stage: str) -> Policy:
        """That of the newest checkpoint of ``stage``."""
        return load_policy(as_trained(self.root / stage), self.mesh, seed=0, work=self.work / stage)

    def chosen(self, stage: str) -> np.ndarray:
        """Summed chosen log-probs of all training pairs after ``stage``."""
        batches = eval_batches(self.rows.train, batch_size=128, buckets=self.rows.buckets)
        compute = make_row_logprobs(self.logprobs)
        found = compute(
            self.policy(stage).params, batches, lambda batch: place_batch(batch, self.mesh)
        )
        return found["logprobs"][:, 0]

    def own_step(self, pairs: np.ndarray) -> np.ndarray:
        """The change of the chosen log-prob by a step on each pair alone, from the SFT policy.

        ``pairs`` are ascending. The loss is of those without running statistics.
        """
        loss, params = bound_loss(self.config.loss), self.policy("sft").params
        batch = lay_out(self.rows, pairs)
        frozen = make_row_logprobs(self.logprobs)(params, [batch], jax.device_put)["logprobs"]
        batch = jax.device_put(batch._replace(reference_logprobs=frozen))
        law = jax.jit(make_exact_law(self.logprobs, loss))
        found = law(params, batch, None, params, self.config.dynamics.own_step_rate)
        return np.asarray(found["own_step/chosen_measured"])


def table(name: str, scores: dict[str, np.ndarray], change: np.ndarray) -> list[str]:
    """The lines on one set of changes."""
    lines = [f"{name}: mean change {change.mean():+.3g}, fell for {(change < 0).mean():.1%}"]
    for score, values in scores.items():
        lines.append(f"  rank correlation with {score:<17}{spearman(values, change):+.3f}")
    fifth = np.ceil(5 * (ranks(scores["normalised_ches"]) + 1) / len(change))
    means = [f"{change[fifth == part].mean():+.3g}" for part in range(1, 6)]
    return [*lines, f"  by fifths of normalised_ches, lowest first: {', '.join(means)}"]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run with the stages sft and baseline")
    parser.add_argument("--pairs", type=int, default=500, help="of the step on a pair alone [500]")
    options = parser.parse_args()
    lines = [json.loads(x) for x in (options.run / SCORES_FILE).read_text().splitlines()]
    lines.sort(key=lambda line: line["row"])
    names = ("normalised_ches", "ches", "chosen_tokens", "rejected_tokens")
    scores = {name: np.array([line[name] for line in lines], float) for name in names}
    some = np.sort(np.random.default_rng(0).permutation(len(lines))[: options.pairs])
    with TemporaryDirectory() as work:
        run = Run(options.run, Path(work))
        few = {name: values[some] for name, values in scores.items()}
        print("\n".join(table("a step on the pair alone", few, run.own_step(some))))
        before = run.chosen("sft")
        for stage in ("baseline", "preference"):
            if (options.run / stage).is_dir():
                print("\n".join(table(stage, scores, run.chosen(stage) - before)))


if __name__ == "__main__":
    main()
