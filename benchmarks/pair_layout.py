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
import numpy as np

from spo_jax import CompletionBatch, completion_logprobs, init_model, make_logprobs_fn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--completion", type=int, default=128, help="tokens")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    model = init_model(
        {
            "model_type": "llama",
            "vocab_size": 8192,
            "hidden_size": options.hidden,
            "intermediate_size": options.hidden * 11 // 4,
            "num_hidden_layers": options.layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": options.hidden // 8,
            "rope_theta": 1e4,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
        }
    )
    params = model.init(jax.random.key(0))
    logprobs = make_logprobs_fn(model, chunk_tokens=512)
    pairs = make_pairs(options)

    def dpo(sums):
        return jnp.mean(jax.nn.softplus(-0.1 * (sums[:, 0] - sums[:, 1])))

    def in_pair_layout(params):
        return dpo(completion_logprobs(logprobs, params, pairs))

    def as_two_sequences(params):
        rows = options.pairs
        single = CompletionBatch(
            jnp.repeat(pairs.prompt_tokens, 2, axis=0),
            jnp.repeat(pairs.prompt_mask, 2, axis=0),
            pairs.completion_tokens.reshape(2 * rows, 1, -1),
            pairs.completion_mask.reshape(2 * rows, 1, -1),
            jnp.arange(2 * rows),
        )
        return dpo(completion_logprobs(logprobs, params, single).reshape(rows, 2))

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


def make_pairs(options: argparse.Namespace) -> CompletionBatch:
    """Random pairs that fill their lengths."""
    rng = np.random.default_rng(0)
    rows, prompt, completion = options.pairs, options.prompt, options.completion
    batch = CompletionBatch(
        prompt_tokens=rng.integers(0, 8192, (rows, prompt)).astype(np.int32),
        prompt_mask=np.ones((rows, prompt), bool),
        completion_tokens=rng.integers(0, 8192, (rows, 2, completion)).astype(np.int32),
        completion_mask=np.ones((rows, 2, completion), bool),
        row_ids=np.arange(rows, dtype=np.int32),
    )
    return jax.tree.map(jnp.asarray, batch)


if __name__ == "__main__":
    main()
