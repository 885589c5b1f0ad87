"""Tokens per second of ``spo_jax.generate``, beside what reading or multiplying the weights takes.

    python benchmarks/generation.py
    python benchmarks/generation.py --model FOLDER --batch 8 --new 256 --transformers

Without ``--model`` the model has random weights and the shape of SmolLM2-135M. Every case runs
once before: compiling is printed and not counted. A step is what one token of all rows takes: the
time of a run less that of a run for one token. Two limits stand beside it, measured in the same
round on the model's own matrices: their bytes at the rate of products with one row, and the
step's products at the rate of products with as many rows as the batch has, in the better order of
the factors. Attention, norms and drawing are in neither.

``ending early`` is a run that samples with a random part of the vocabulary as EOS, so that rows
have ``--mean`` tokens on average, if the model finds all tokens about equally likely, and counts
tokens up to each row's EOS. ``--transformers`` times ``model.generate`` too, greedily, in float32
and with no EOS; it needs PyTorch.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax import Execution, Model, generate, init_model, load_model, load_params, save_pretrained

ARCHITECTURE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "rope_theta": 100000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


class Case(NamedTuple):
    """What is generated: rows, dtype, how tokens are drawn, what ends a row."""

    rows: int
    dtype: str
    temperature: float
    stops: tuple[int, ...] = ()

    def __str__(self) -> str:
        drawn = f"temperature {self.temperature:g}" if self.temperature else "greedy"
        return f"{self.rows} rows, {self.dtype}, {drawn}" + (", ending early" if self.stops else "")


def read_options(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder (default: random weights)")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 64], help="rows [8 64]")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--prompt", type=int, default=96, help="tokens of each prompt [96]")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate [32]")
    parser.add_argument("--long", type=int, default=128, help="most tokens, ending early [128]")
    parser.add_argument("--mean", type=int, default=16, help="mean tokens, ending early [16]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transformers", action="store_true", help="time its generate too")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Print facts, and a line a case."""
    options = read_options(words)
    params = None
    print(
        f"{datetime.date.today()}; {os.cpu_count()} cores ({platform.machine()}), load before the "
        f"start {os.getloadavg()[0]:.1f}; python {platform.python_version()}, jax "
        f"{jax.__version__} on {jax.devices()[0].platform}"
    )
    for dtype in options.dtype:
        model = read_model(options.model, Execution(compute_dtype=dtype))
        if params is None:
            params = read_params(options.model, model)
            count = sum(x.size for x in jax.tree.leaves(params))
            print(
                f"{options.model or 'random weights'}: {count} parameters; prompt "
                f"{options.prompt}, {options.new} new tokens, {options.long} at most ending early"
            )
        stops = random_stops(model.config.vocab_size, options.mean)
        for rows in options.batch:
            for temperature in options.temperature:
                time_case(model, params, Case(rows, dtype, temperature), options)
            time_ending(model, params, Case(rows, dtype, 1.0, stops), options)
    if options.transformers:
        time_transformers(options, params)


def read_model(folder: Path | None, execution: Execution) -> Model:
    """The model of ``folder``, or of ``ARCHITECTURE``."""
    return init_model(ARCHITECTURE, execution) if folder is None else load_model(folder, execution)


def read_params(folder: Path | None, model: Model) -> Any:
    """The weights of ``folder``, or random ones."""
    return model.init(jax.random.key(0)) if folder is None else load_params(folder, model)


def random_stops(vocabulary: int, mean: int) -> tuple[int, ...]:
    """Ids that end a row after ``mean`` tokens, where all are equally likely."""
    found = np.random.default_rng(1).permutation(vocabulary)[: max(1, vocabulary // mean)]
    return tuple(int(i) for i in found)


def random_prompts(model: Model, rows: int, length: int) -> np.ndarray:
    """Prompts of equal length."""
    shape = (rows, length)
    return np.random.default_rng(0).integers(0, model.config.vocab_size, shape).astype(np.int32)


def make_ours(model: Model, params: Any, case: Case, prompt: int) -> Callable[[int], np.ndarray]:
    """``generate`` for a number of tokens, its result on the host."""
    tokens = jnp.asarray(random_prompts(model, case.rows, prompt))
    mask = jnp.ones(tokens.shape, bool)
    keys = jax.random.split(jax.random.PRNGKey(0), case.rows)

    def run(new: int) -> np.ndarray:
        found = generate(
            model, params, tokens, mask, max_new_tokens=new, temperature=case.temperature,
            eos_ids=case.stops, pad_id=-2, keys=keys,
        )  # fmt: skip
        return np.asarray(found)

    return run


def seconds(run: Callable[[], Any]) -> float:
    """What ``run`` takes, its result awaited."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def make_products(model: Model, rows: int) -> list[Callable[[], Any]]:
    """The products of one step with ``rows`` rows on matrices of the model's sizes.

    In both orders of the factors; nothing else is computed.
    """
    abstract = model.abstract_params()
    shapes = [
        x.shape[1:]
        for path, x in jax.tree_util.tree_leaves_with_path(abstract["layers"])
        if path[-1].key == "kernel"
    ] * model.config.num_layers
    shapes.append((model.config.hidden_size, model.config.vocab_size))
    dtype = model.execution.compute_dtype
    matrices = [jnp.full(shape[::-1], 0.01, dtype) for shape in shapes]
    inputs = {n: jnp.ones((rows, n), dtype) for n in {shape[0] for shape in shapes}}

    def make(product):
        @jax.jit
        def run(inputs, matrices):
            return [product(matrix, inputs[matrix.shape[1]]) for matrix in matrices]

        return lambda: run(inputs, matrices)

    return [make(lambda w, x: w @ x.T), make(lambda w, x: x @ w.T)]


def limits(model: Model, rows: int, rounds: int) -> tuple[float, float]:
    """Seconds a step: to read the matrices, and to multiply ``rows`` rows with them."""
    found = []
    for n in (1, rows):
        products = make_products(model, n)
        found.append(min(seconds(run) for run in products for _ in range(rounds + 1)))
    return found[0], found[1]


def time_case(model: Model, params: Any, case: Case, options: argparse.Namespace) -> None:
    """Print tokens per second and the step of runs that nothing ends, beside its limits."""
    run = make_ours(model, params, case, options.prompt)
    compiling = [seconds(lambda n=n: run(n)) for n in (1, options.new)]
    whole, step, read, multiply = [], [], [], []
    for _ in range(options.rounds):
        first, last = (seconds(lambda n=n: run(n)) for n in (1, options.new))
        found = limits(model, case.rows, 2)
        whole.append(last)
        step.append((last - first) / max(1, options.new - 1))
        read.append(found[0])
        multiply.append(found[1])
    share = max(min(read), min(multiply)) / min(step)
    print(
        f"{case}: {case.rows * options.new / min(whole):.0f} tokens/s (median "
        f"{case.rows * options.new / statistics.median(whole):.0f}); a step {min(step) * 1e3:.3g} "
        f"ms, reading the weights {min(read) * 1e3:.3g} ms, products {min(multiply) * 1e3:.3g} ms: "
        f"{share:.0%} of the limit; first run {sum(compiling):.0f} s",
        flush=True,
    )


def useful_tokens(drawn: np.ndarray, stops: Iterable[int]) -> int:
    """Tokens of all rows, each up to its first stop id, that included."""
    ended = np.isin(drawn, list(stops))
    lengths = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, drawn.shape[1])
    return int(lengths.sum())


def time_ending(model: Model, params: Any, case: Case, options: argparse.Namespace) -> None:
    """Print useful tokens per second of a run whose rows end early."""
    run = make_ours(model, params, case, options.prompt)
    compiling = seconds(lambda: run(options.long))
    useful = useful_tokens(run(options.long), case.stops)
    taken = [seconds(lambda: run(options.long)) for _ in range(options.rounds)]
    print(
        f"{case}: {useful / min(taken):.0f} useful tokens/s (median "
        f"{useful / statistics.median(taken):.0f}), {useful / case.rows:.1f} a row; first run "
        f"{compiling:.0f} s",
        flush=True,
    )


def time_transformers(options: argparse.Namespace, params: Any) -> None:
    """Print the ratio to ``transformers``, round by round, and how far the tokens agree."""
    model = read_model(options.model, Execution())
    with tempfile.TemporaryDirectory() as work:
        folder = options.model
        if folder is None:
            folder = Path(work) / "model"
            save_pretrained(folder, params, model, source=ARCHITECTURE)
        for rows in options.batch:
            ours = make_ours(model, params, Case(rows, "float32", 0.0), options.prompt)
            theirs = make_theirs(folder, random_prompts(model, rows, options.prompt))
            same = (ours(options.new) == theirs(options.new)).mean()
            ratios = []
            for _ in range(options.rounds):
                fast, slow = (
                    seconds(lambda side=side: side(options.new)) for side in (ours, theirs)
                )
                ratios.append(slow / fast)
            rounds = " ".join(f"{ratio:.1f}" for ratio in ratios)
            print(
                f"transformers, {rows} rows, float32, greedy: takes "
                f"{statistics.median(ratios):.1f} times as long (rounds: {rounds}); {same:.1%} of "
                "the tokens are equal"
            )


def make_theirs(folder: Path, tokens: np.ndarray) -> Callable[[int], np.ndarray]:
    """``model.generate`` on the prompts, with its defaults for attention, cache and threads."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # An argument of None would mean "as configured": here it means "never stop".
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    prompts = torch.tensor(tokens, dtype=torch.long)
    mask = torch.ones_like(prompts)

    def run(new: int) -> np.ndarray:
        with torch.inference_mode():
            whole = model.generate(
                prompts, attention_mask=mask, max_new_tokens=new, do_sample=False, use_cache=True
            )
        return whole[:, prompts.shape[1] :].numpy()

    return run


if __name__ == "__main__":
    main()
