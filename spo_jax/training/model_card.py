"""The README.md of an exported policy: what it was trained with, on what, and how it did.

Paths of this machine do not go into it: of a file its name, of a model its name on the hub.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from spo_jax import __version__
from spo_jax.config.choices import loss_function
from spo_jax.config.parsing import Dumper, read_tree
from spo_jax.config.schema import BUILTIN_TASK
from spo_jax.parallel.copies import local_path
from spo_jax.policies.loading import find_run
from spo_jax.training.pinned import INPUTS
from spo_jax.training.starts import read_starts

CARD_FILE = "README.md"

_OF_PAIRS = ("lora", "loss", "objective", "solver", "outer", "inner", "train", "data")
_OF_SFT = ("lora", "sft_optimizer", "sft", "sft_data")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(run: Path, *, name: str, step: int, dtype: str) -> str:
    """The card of the policy of ``run`` after ``step`` updates, to be called ``name``."""
    tree = read_tree(run / "config.yaml")
    stage = _stage(run)
    base = base_of(run)
    front = {
        "library_name": "transformers",
        "base_model": base.name if base.on_hub else None,
        "license": base.license,
        "datasets": sorted({x for x in _sources(tree, stage) if _HUB_NAME.fullmatch(x)}) or None,
        "tags": ["spo-jax", *(() if stage == "sft" else ("preference-optimization",))],
    }
    parts = [
        f"# {name}",
        _method(tree, stage, step),
        _start(base),
        _data(run, tree, stage),
        _figures(run, step),
        _settings(tree, stage),
        _software(run, dtype),
    ]
    known = {key: value for key, value in front.items() if value is not None}
    return f"---\n{_yaml(known)}---\n\n" + "\n\n".join(p for p in parts if p) + "\n"


class Base(NamedTuple):
    """The model that a run began with; ``license`` as its own card has it, if there is one."""

    name: str | None = None
    on_hub: bool = False
    license: str | None = None


def base_of(run: Path) -> Base:
    """Followed back through runs that began with the policy of another one."""
    seen: set[Path] = set()
    path = (read_tree(run / "config.yaml").get("model") or {}).get("path")
    while path is not None and (before := find_run(path)) is not None:
        if before.resolve() in seen:
            return Base()
        seen.add(before.resolve())
        path = (read_tree(before / "config.yaml").get("model") or {}).get("path")
    if path is None:
        return Base()
    folder = local_path(path).expanduser()
    on_hub = not folder.is_dir() and _HUB_NAME.fullmatch(path) is not None
    card = _card_on_hub(path) if on_hub else folder / CARD_FILE
    return Base(path if on_hub else folder.name, on_hub, _license(card))


def _card_on_hub(name: str) -> Path | None:
    """Of a model that was fetched from the hub, its card among what was kept."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, CARD_FILE)
    return Path(found) if isinstance(found, str) else None


def _license(card: Path | None) -> str | None:
    if card is None or not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---\n", card.read_text(errors="replace"), re.DOTALL)
    try:
        found = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return None
    value = found.get("license") if isinstance(found, dict) else None
    return value if isinstance(value, str) else None


def _stage(run: Path) -> str:
    """From the first line of its configuration, which every version wrote."""
    header = (run / "config.yaml").read_text().partition("\n")[0]
    found = re.search(r"stage (\w+)", header)
    return found[1] if found else "preference"


def _losses(tree: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    loss = tree["loss"]
    return list(loss) if isinstance(loss, list) else [loss]


def _method(tree: Mapping[str, Any], stage: str, step: int) -> str:
    after = f"{step:,} updates"
    if stage == "sft":
        return f"Supervised fine-tuning, {after}."
    solver = "preference_only" if stage == "baseline" else tree["solver"]["name"]
    if solver == "inner_only":
        return f"Supervised fine-tuning on the rows of the preference stage, {after}."
    first = ", after a stage of supervised fine-tuning" if "sft" in tree["stages"] else ""
    lines = [f"Preference optimization, {after}{first}. The loss:\n"]
    lines += [f"- `{loss['name']}`: {_what(loss['name'])}" for loss in _losses(tree)]
    moving = (tree.get("reference") or {}).get("moving")
    if moving:
        lines.append(
            f"\nIts reference followed the policy (TR-DPO, {_arxiv('2404.09656')}): alpha "
            f"{moving['alpha']:g}, every {moving['every']:,} updates."
        )
    if solver == "preference_only":
        return "\n".join([*lines, "\nThe loss alone, without a safe region."])
    held = f"Stable Preference Optimization ({_arxiv('2507.07723')}), solver `{solver}`"
    return "\n".join([*lines, f"\nInside a safe region of supervised fine-tuning: {held}."])


def _what(name: str) -> str:
    text = (loss_function(name).__doc__ or "a function of its author's own").strip()
    first = " ".join(text.partition("\n\n")[0].split())
    papers = dict.fromkeys(re.findall(r"arXiv (\d{4}\.\d{5})", text))
    shown = ", ".join(map(_arxiv, papers))
    return f"{first.replace('``', '`')} {shown}".rstrip()


def _arxiv(number: str) -> str:
    return f"[arXiv {number}](https://arxiv.org/abs/{number})"


def _start(base: Base) -> str:
    if base.name is None:
        return "It began with random weights."
    name = f"[{base.name}](https://huggingface.co/{base.name})" if base.on_hub else f"`{base.name}`"
    rights = (
        f"whose license is {base.license}"
        if base.license
        else "whose license is not known here: look it up, it holds for this model too"
    )
    return f"It began with {name}, {rights}."


def _sections(stage: str, tree: Mapping[str, Any]) -> tuple[str, ...]:
    if stage == "sft":
        return ("sft_data",)
    own = (tree.get("objective") or {}).get("inner_data") == "sft"
    return ("data", "sft_data") if own or "sft" in tree["stages"] else ("data",)


def _sources(tree: Mapping[str, Any], stage: str) -> Iterator[str]:
    for section in _sections(stage, tree):
        for _, train in _data_sets(tree.get(section)):
            yield train


def _data_sets(section: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Key and name of each data set that a section trains on."""
    section = section or {}
    found = [("train", section.get("train"))]
    found += [(f"mix.{i}", part["train"]) for i, part in enumerate(section.get("mix") or ())]
    return [(key, train) for key, train in found if train is not None]


def _data(run: Path, tree: Mapping[str, Any], stage: str) -> str:
    files = json.loads((run / INPUTS).read_text()) if (run / INPUTS).is_file() else {}
    lines = []
    for section in _sections(stage, tree):
        for key, train in _data_sets(tree.get(section)):
            name = section if key == "train" else f"{section}.{key}"
            hub = train == BUILTIN_TASK or (_HUB_NAME.fullmatch(train) and not Path(train).exists())
            sums = files.get(f"{section}.{key}", {})
            first = list(sums.items())[:8]
            known = "".join(f"; `{Path(f).name}` sha256 {sha}..." for f, sha in first)
            more = f"; {len(sums) - 8} files more" if len(sums) > 8 else ""
            lines.append(f"- `{name}`: `{train if hub else Path(train).name}`{known}{more}")
    return "## Data\n\n" + "\n".join(lines)


def _figures(run: Path, step: int) -> str:
    """Held-out figures of the last look up to ``step``."""
    found: dict[str, float] = {}
    at = 0
    for row in _whole_lines(run / "metrics.jsonl"):
        looked = {k: v for k, v in row.items() if k.startswith("eval/")}
        if looked and row["step"] <= step:
            found, at = found | looked, row["step"]
    if not found:
        return "## Held-out figures\n\nNone were taken."
    rows = "\n".join(f"| `{k}` | {_number(v)} |" for k, v in sorted(found.items()))
    return f"## Held-out figures\n\nAfter {at:,} updates.\n\n| | |\n|---|---|\n{rows}"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Without a last one that a killed run did not finish."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _settings(tree: Mapping[str, Any], stage: str) -> str:
    names = _OF_SFT if stage == "sft" else _OF_PAIRS
    if stage != "sft" and "sft" in tree["stages"]:
        names = dict.fromkeys((*_OF_SFT, *names))
    shown = {k: _without_paths(tree[k]) for k in names if tree.get(k) is not None}
    return f"## Settings\n\n```yaml\n{_yaml({'seed': tree.get('seed'), **shown})}```"


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_paths(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_paths(v) for v in value]
    is_path = isinstance(value, str) and (value.startswith(("/", "~", ".")) or Path(value).exists())
    return Path(value).name if is_path else value


def _software(run: Path, dtype: str) -> str:
    starts = read_starts(run)
    lines = [f"Exported in {dtype} by spo-jax {__version__}."]
    for start in starts[-1:]:
        told = ", ".join(f"{name} {number}" for name, number in start["versions"].items())
        machine = start["devices"]
        lines.append(f"Trained on {machine['count']} x {machine['kind']}; {told}.")
    if len(starts) > 1:
        lines.append(f"The run was started {len(starts)} times; this is of the last.")
    return "## Software\n\n" + "\n".join(lines)


def _yaml(tree: Mapping[str, Any]) -> str:
    return yaml.dump(dict(tree), Dumper=Dumper, sort_keys=False, allow_unicode=True)
