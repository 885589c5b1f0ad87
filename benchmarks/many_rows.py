"""Pairs as many and as long as UltraFeedback's: to ids, kept, read again, held, waited for.

python benchmarks/many_rows.py TOKENIZER_FOLDER [--rows 100000] [--folder FOLDER] [--step 0.1]

Each start is a process of its own, as in a run. Memory is what holding the rows adds to the
process, against the bytes of their ids; its peak lies within reading. Waiting is measured by the
loop's own clock, beside a device that takes --step seconds for a batch of --batch pairs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LETTERS = "etaoinshrdlucmfwypvbgk"
WORDS = "the of and to in is that it for on with as be this from by one".split()  # noqa: SIM905


def write_pairs(path: Path, count: int, seed: int = 0) -> None:
    """Pairs in the columns of ultrafeedback_binarized; lengths are log-normal."""
    draw = random.Random(seed)
    rare = ["".join(draw.choices(LETTERS, k=draw.randint(4, 9))) for _ in range(500)]
    words = [*WORDS * 60, *rare]

    def turn(role: str, median: int) -> dict[str, str]:
        size = min(1000, max(3, int(median * draw.lognormvariate(0, 0.8))))
        return {"role": role, "content": " ".join(draw.choices(words, k=size)) + "."}

    with path.open("w") as file:
        for i in range(count):
            asked = turn("user", 70)
            chosen, rejected = ([asked, turn("assistant", n)] for n in (150, 130))
            row = {
                "prompt": asked["content"],
                "prompt_id": f"{i:064x}",
                "chosen": chosen,
                "rejected": rejected,
                "messages": chosen,
                "score_chosen": draw.uniform(5, 10),
                "score_rejected": draw.uniform(1, 5),
            }
            file.write(json.dumps(row) + "\n")


def memory(name: str) -> int:
    """Bytes: ``VmRSS`` as it is, ``VmHWM`` at its peak since ``forget_peak``."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def forget_peak() -> None:
    """The peak begins anew."""
    Path("/proc/self/clear_refs").write_text("5")


def start(options: argparse.Namespace) -> dict[str, float]:
    """One start: the rows as a run gets them, and how it waits for their batches."""
    import gc

    import jax

    from spo_jax.config.schema import DataConfig
    from spo_jax.data import load_tokenizer, make_train_iterator
    from spo_jax.policies.rows import prepare_rows
    from spo_jax.training.loop import Throughput

    tokenizer = load_tokenizer(options.tokenizer)
    tokenizer.apply_chat_template([{"role": "user", "content": "a"}])
    jax.devices()
    data = DataConfig(train=str(options.folder / "pairs.jsonl"))
    gc.collect()
    before, begun = memory("VmRSS"), time.perf_counter()
    forget_peak()
    cache = str(options.folder / "cache")
    rows = prepare_rows(data, "preference", tokenizer, seed=0, name="data", cache=cache)
    found = {"seconds": time.perf_counter() - begun, "peak": memory("VmHWM") - before}
    rows.train.fingerprint()
    gc.collect()
    found["held"] = memory("VmRSS") - before
    found["ids"] = rows.train.prompt_ids.nbytes + rows.train.completion_ids.nbytes
    batches = make_train_iterator(
        rows.train, batch_size=options.batch, buckets=rows.buckets, seed=0, num_epochs=None
    )
    clock = Throughput(window=options.steps)
    for _ in range(options.steps + 1):
        clock.add(1)
        with clock.waiting():
            next(batches)
        time.sleep(options.step)
    clock.add(1)
    return {**found, "waiting": clock.data_wait_share}


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="for pairs and cache (default: a temporary)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--step", type=float, default=0.1, help="seconds")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Write the pairs, start twice, and print what was measured."""
    options = read_options(arguments)
    if options.start:
        print(json.dumps(start(options)))
        return
    with tempfile.TemporaryDirectory() as work:
        options.folder = options.folder or Path(work)
        options.folder.mkdir(parents=True, exist_ok=True)
        write_pairs(options.folder / "pairs.jsonl", options.rows)
        given = [f"--{k}={v}" for k, v in vars(options).items() if k not in ("tokenizer", "start")]
        command = [sys.executable, __file__, options.tokenizer, *given, "--start"]
        for name in ("first", "second"):
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            speed, size = options.rows / found["seconds"], found["ids"] / 2**20
            held, peak = (found[k] / found["ids"] for k in ("held", "peak"))
            print(
                f"{name} start: {found['seconds']:.1f} s, {speed:,.0f} rows/s; held {held:.2f} "
                f"times the {size:,.0f} MiB of ids, at most {peak:.2f} times; waiting for data "
                f"{found['waiting']:.2%} of the time",
                flush=True,
            )


if __name__ == "__main__":
    main()
