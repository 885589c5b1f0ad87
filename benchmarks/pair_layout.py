"""The pair layout against two full sequences: time of one DPO gradient, interleaved in one run.

    python benchmarks/pair_layout.py

Both sides compute the same loss on the same model; only the layout differs. Prints the median
seconds of each and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from shared import as_sequences, make_llama, random_rows

from spo_jax import completion_logprobs, make_logprobs_fn

VOCABULARY = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--completion", type=int, default=128, help="tokens")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    model = make_llama(options.hidden, options.layers, vocabulary=VOCABULARY, tied=True)
    params = model.init(jax.random.key(0))
    logprobs = make_logprobs_fn(model, chunk_tokens=512)
    sizes = (options.pairs, options.prompt, options.completion)
    pairs = random_rows(*sizes, branches=2, vocabulary=VOCABULARY)

    def dpo(sums):
        return jnp.mean(jax.nn.softplus(-0.1 * (sums[:, 0] - sums[:, 1])))

    def in_pair_layout(params):
        return dpo(completion_logprobs(logprobs, params, pairs))

    def as_two_sequences(params):
        sums = completion_logprobs(logprobs, params, as_sequences(pairs))
        return dpo(sums.reshape(options.pairs, 2))

    sides = {"pair layout": in_pair_layout, "two sequences": as_two_sequences}
    steps = {name: jax.jit(jax.value_and_grad(fn)) for name, fn in sides.items()}
    values = [float(jax.block_until_ready(step(params))[0]) for step in steps.values()]
    assert abs(values[0] - values[1]) < 1e-4, values
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(params))
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    for name, median in medians.items():
        print(f"{name:>14}: {median:.3f} s  (min {min(seconds[name]):.3f})")
    ratio = medians["pair layout"] / medians["two sequences"]
    share = (options.prompt + 2 * options.completion) / (2 * (options.prompt + options.completion))
    print(f"ratio {ratio:.2f}; tokens computed {share:.2f}; on {jax.devices()[0].platform}")


if __name__ == "__main__":
    main()
