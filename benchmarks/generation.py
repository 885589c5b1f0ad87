"""Tokens per second of ``spo_jax.policies.decoding`` and of ``transformers``' ``model.generate``.

    python benchmarks/generation.py
    python benchmarks/generation.py --model FOLDER --batch 64 --new 256

Both continue the same prompts of equal length with a KV cache, greedily, in float32, on the CPU of
this machine and for the same number of tokens: no side stops at an EOS. The rounds interleave the
two sides, and the ratio is taken within a round, so that a noisy machine disturbs it little. Both
sides run once before: compiling is printed and not counted. Without ``--model`` the model is a
randomly initialized Llama of 260 thousand parameters that the script writes itself: 5 layers,
width 64, 8 heads over 4 kv heads, MLP 172, vocabulary 512, tied. Needs PyTorch.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from spo_jax import generate, init_model, load_model, load_params, save_pretrained

ARCHITECTURE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    # The usual 0.02 gives logits of nearly equal size, whose order rounding would decide.
    "initializer_range": 0.2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="model folder (default: a random small Llama)")
    parser.add_argument("--batch", type=int, default=64, help="rows [64]")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt [32]")
    parser.add_argument("--new", type=int, default=256, help="tokens to generate [256]")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = options.model or write_random_model(Path(work) / "model")
        compare(folder, options)


def write_random_model(folder: Path) -> Path:
    """The small Llama with weights drawn from seed 0, as a folder both sides load."""
    model = init_model(ARCHITECTURE)
    save_pretrained(folder, model.init(jax.random.key(0)), model, source=ARCHITECTURE)
    return folder


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Time both sides on the model of ``folder`` and print what was found."""
    model = load_model(folder)
    rng = np.random.default_rng(0)
    shape = (options.batch, options.prompt)
    tokens = rng.integers(0, model.config.vocab_size, shape).astype(np.int32)
    sides = {
        "spo_jax": make_ours(folder, tokens, options.new),
        "transformers": make_theirs(folder, tokens, options.new),
    }
    print_facts(folder, options)
    warm, found = {}, {}
    for name, run in sides.items():
        start = time.perf_counter()
        found[name] = run()
        warm[name] = time.perf_counter() - start
        expected = (options.batch, options.new)
        assert found[name].shape == expected, f"{name}: {found[name].shape}, not {expected}"
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    report(seconds, warm, found, options)


def make_ours(folder: Path, tokens: np.ndarray, new: int) -> Callable[[], np.ndarray]:
    """``generate`` on the prompts, its result on the host."""
    model = load_model(folder)
    params = load_params(folder, model)
    prompts, mask = jax.numpy.asarray(tokens), jax.numpy.ones(tokens.shape, bool)

    def run() -> np.ndarray:
        settings = {"max_new_tokens": new, "temperature": 0.0, "eos_ids": ()}
        return np.asarray(generate(model, params, prompts, mask, **settings))

    return run


def make_theirs(folder: Path, tokens: np.ndarray, new: int) -> Callable[[], np.ndarray]:
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

    def run() -> np.ndarray:
        with torch.inference_mode():
            whole = model.generate(
                prompts, attention_mask=mask, max_new_tokens=new, do_sample=False, use_cache=True
            )
        return whole[:, prompts.shape[1] :].numpy()

    return run


def print_facts(folder: Path, options: argparse.Namespace) -> None:
    """What ran, on what, when."""
    import torch
    import transformers

    model = load_model(folder)
    size = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(model.abstract_params()))
    print(
        f"{datetime.date.today()}; {os.cpu_count()} cores ({platform.machine()}), load before the "
        f"start {os.getloadavg()[0]:.1f}, "
        f"{torch.get_num_threads()} PyTorch threads; python {platform.python_version()}, "
        f"jax {jax.__version__} on {jax.devices()[0].platform}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    print(
        f"{options.model or 'random Llama'}: {size} parameters; batch {options.batch}, "
        f"prompt {options.prompt}, {options.new} new tokens, greedy, float32"
    )


def report(
    seconds: dict[str, list[float]],
    warm: dict[str, float],
    found: dict[str, np.ndarray],
    options: argparse.Namespace,
) -> None:
    """Medians, the ratio of each round and its median, and how far the tokens agree."""
    total = options.batch * options.new
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name:>13}: {total / median:10.0f} tokens/s (median of {len(times)}: {median:.3f} s, "
            f"lowest {min(times):.3f} s); first run, compiling included, {warm[name]:.2f} s"
        )
    ratios = [t / o for o, t in zip(seconds["spo_jax"], seconds["transformers"], strict=True)]
    print("ratio of each round:", " ".join(f"{ratio:.1f}" for ratio in ratios))
    fastest = min(seconds["transformers"]) / min(seconds["spo_jax"])
    same = (found["spo_jax"] == found["transformers"]).mean()
    print(
        f"median ratio {statistics.median(ratios):.1f}x, of the fastest runs {fastest:.1f}x; "
        f"{same:.1%} of the tokens are equal"
    )
    if os.getloadavg()[0] > 1.5 * os.cpu_count():
        print(
            f"WARNING: load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores: other work was "
            "running, which slows PyTorch's threads down far more than XLA's; the ratios above "
            "say nothing about a free machine"
        )


if __name__ == "__main__":
    main()
