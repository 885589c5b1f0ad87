"""What benchmarks of one step share: shapes, arithmetic, and sides in processes of their own.

No JAX here: the process that starts the sides leaves the device to them.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

SCRIPTS = Path(__file__).parent / "peers_sides"
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
"""Of the first losses, by the dtype of the products."""


JOB = {
    "beta": 0.1, "model": None, "param_dtype": "float32", "optimizer": "adamw", "profile": None,
    "on_cpu": False,
}  # fmt: skip
"""What every side is told; ``model`` is a folder, or ``None`` for random weights of its own."""
OURS = {
    "reference": "precomputed", "solver": "preference_only", "chunk_tokens": None,
    "remat": "elementwise", "attention": "auto", "layout": "pairs", "micro_batches": 1,
}  # fmt: skip
"""What a side of ours is told unless it says otherwise, and one of TRL's below."""
TRL = {"attention": "sdpa", "config": {}}


class Side(NamedTuple):
    """A library and what it is told; ``same_update``: its second loss is that of plain DPO."""

    library: str
    settings: Mapping[str, Any]
    same_update: bool = True


class Shape(NamedTuple):
    """Tokens of a row's prompt and of each of its completions; rows."""

    prompt: int
    completion: int
    pairs: int

    @property
    def computed(self) -> int:
        """Tokens of a batch, prompts once."""
        return self.pairs * (self.prompt + 2 * self.completion)

    @property
    def counted(self) -> int:
        """Tokens of the full sequences of a batch, prompts twice."""
        return self.pairs * 2 * (self.prompt + self.completion)


def read_shapes(parser: ArgumentParser, words: Iterable[str], pairs: int) -> list[Shape]:
    """Shapes from ``PROMPT/COMPLETION``; the parser's error for other words."""
    words = list(words)
    if not all(re.fullmatch(r"[1-9]\d*/[1-9]\d*", word) for word in words):
        parser.error(f"--shape {' '.join(words)}: write PROMPT/COMPLETION, such as 128/384")
    return [Shape(*map(int, word.split("/")), pairs) for word in words]


def llama_config(hidden: int, layers: int, vocabulary: int, *, tied: bool = False) -> dict:
    """A ``config.json``: 8 heads over 4 kv heads, an MLP of 2.75 times the width.

    Tunix reads no other ``rope_theta`` than 1,000,000.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": hidden // 8,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
    }


def perfect_flops(shape: Shape, of: Mapping[str, Any]) -> float:
    """Multiplications and additions of one step that computes nothing twice.

    ``6 (N T + H S) + 12 h d L A``: weights of the layers' products and tokens, those of the head
    and completion tokens, and for heads, head width and layers the pairs a causal mask lets see.
    The frozen log-probs are at hand.
    """
    hidden, heads = of["hidden_size"], of["num_attention_heads"]
    head_dim = of.get("head_dim", hidden // heads)
    width, keys = heads * head_dim, of["num_key_value_heads"] * head_dim
    layer = 2 * hidden * (width + keys) + 3 * hidden * of["intermediate_size"]
    P, C, B = shape
    seen = B * (P**2 / 2 + 2 * (C * P + C**2 / 2))
    linear = of["num_hidden_layers"] * layer * shape.computed
    head = hidden * of["vocab_size"] * B * 2 * C
    return 6 * (linear + head) + 12 * width * of["num_hidden_layers"] * seen


def disagreeing(losses: Mapping[str, list[float]], alike: set[str], tolerance: float) -> list[str]:
    """What is wrong with the first two losses; of ``alike``, the second ones are to agree too."""
    wrong = [
        f"{name}: the first loss is {found[0]:.6f}, not ln 2 = {math.log(2):.6f}"
        for name, found in losses.items()
        if not abs(found[0] - math.log(2)) <= tolerance
    ]
    second = {name: found[1] for name, found in losses.items() if name in alike}
    middle = statistics.median(second.values()) if second else 0.0
    return wrong + [
        f"{name}: the second loss is {found:.6f}, the median of all {middle:.6f}"
        for name, found in second.items()
        if not abs(found - middle) <= tolerance
    ]


class SideFailed(SystemExit):
    """A side's process ended with an error; ``words`` are its last."""

    def __init__(self, name: str, script: str, status: int, words: str) -> None:
        super().__init__(f"{name}: {script}.py ended with {status}:\n{words}")
        self.status, self.words = status, words


class Runner:
    """Runs the scripts of ``peers_sides``, each in a process of its own, one at a time."""

    def __init__(
        self,
        work: Path,
        pythons: Mapping[str, Path | str],
        job: dict[str, Any],
        variables: Mapping[str, str],
    ) -> None:
        self.work, self.pythons, self.job = work, pythons, job
        self.variables = {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(work / "hub"),
            "TOKENIZERS_PARALLELISM": "false",
            **variables,
        }

    def run(self, name: str, script: str, **more: Any) -> dict[str, Any]:
        """What the script found.

        Raises:
            SideFailed: it ended with an error.
        """
        library = script.partition("_")[0]
        job, result, log = (self.work / f"{kind}.json" for kind in ("job", "result", "log"))
        job.write_text(json.dumps(self.job | more | {"result": str(result)}))
        variables = os.environ | self.variables
        if library != "ours":  # packages of this environment are not theirs
            variables.pop("PYTHONPATH", None)
        with log.open("w") as file:
            command = [self.pythons[library], SCRIPTS / f"{script}.py", job]
            done = subprocess.run(
                command, env=variables, stdout=file, stderr=subprocess.STDOUT, check=False
            )
        if done.returncode:
            raise SideFailed(name, script, done.returncode, log.read_text()[-3000:])
        return json.loads(result.read_text())
