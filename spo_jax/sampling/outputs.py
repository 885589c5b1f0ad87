"""``spo-jax generate``: a policy's outputs on a file of prompts, as AlpacaEval 2 reads them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spo_jax.checkpoints.atomic import replace_text
from spo_jax.checkpoints.checksums import params_fingerprint
from spo_jax.config.schema import ModelConfig
from spo_jax.data import Record, RowError, load_records, make_chat_format
from spo_jax.data.chat import BadRow, ChatFormat, read_messages, read_text, render_plain
from spo_jax.data.layouts import LAYOUTS
from spo_jax.parallel.mesh import make_mesh
from spo_jax.parallel.processes import say
from spo_jax.policies.completions import Completion, complete_batches, stop_ids
from spo_jax.policies.decoding import check_sampling
from spo_jax.policies.loading import Policy, load_policy
from spo_jax.policies.text_statistics import repetition

REPETITIVE = 0.5
"""An output is repetitive from this share of 4-grams that occurred in it before."""

_SAY_EVERY = 5.0
_ASKED = ("instruction", "prompt", "question")


class Prompt(NamedTuple):
    """What is asked, as people read it and as the model does, and the data set it comes from."""

    instruction: str
    text: str
    dataset: str | None = None


def read_prompt(row: Mapping[str, Any], chat: ChatFormat, *, templated: bool) -> Prompt:
    """The prompt of one row.

    An ``instruction`` (with its ``input`` behind it), or else that of a pair or an SFT row, as it
    is in training; or else a ``prompt`` (text or messages) or ``question``. What is asked in
    words becomes a user's turn where there is a template (``templated``), and stays as it is
    where there is none. Raises ``BadRow``.
    """
    name = next((name for name in _ASKED if name in row), None)
    parse = None if name == "instruction" else _layout_of(row)
    if parse is not None:
        shown, text = (_prompt_of(parse, row, c) for c in (_PLAIN, chat))
        return Prompt(_without_labels(shown), _not_empty(text), _dataset(row))
    if name is None:
        columns = ", ".join(sorted(map(str, row))) or "none"
        raise BadRow("no prompt", f"expected {', '.join(_ASKED)}, a pair or an SFT row: {columns}")
    value = row[name]
    if not isinstance(value, str) and name == "prompt":
        messages = read_messages(value, name)
        shown = _without_labels(render_plain(messages, True))
        return Prompt(shown, _not_empty(chat.render(messages, True)), _dataset(row))
    text = read_text(value, name)
    if name == "instruction" and row.get("input"):
        text = f"{text}\n\n{read_text(row['input'], 'input')}"
    _not_empty(text)
    asked = chat.render([{"role": "user", "content": text}], True) if templated else text
    return Prompt(text, asked, _dataset(row))


_PLAIN = ChatFormat(render_plain, None)


def _layout_of(row: Mapping[str, Any]) -> Callable[..., Any] | None:
    for kind in ("preference", "sft"):
        for needed, parse in LAYOUTS[kind].values():
            if set(row) >= set(needed):
                return parse
    return None


def _prompt_of(parse: Callable[..., Any], row: Mapping[str, Any], chat: ChatFormat) -> str:
    return parse(row, chat).prompt


def _not_empty(text: str) -> str:
    if not text.strip():
        raise BadRow("empty prompt")
    return text


def _dataset(row: Mapping[str, Any]) -> str | None:
    return row["dataset"] if isinstance(row.get("dataset"), str) else None


def _without_labels(text: str) -> str:
    """The words of a dialogue that is one question; others keep their labels."""
    found = re.fullmatch(r"\s*Human: (.*?)\s*Assistant:", text, re.DOTALL)
    one = found is not None and not re.search(r"\n\n(Human|Assistant): ", found[1])
    return found[1] if one else text.strip()


def read_prompts(
    data: str, chat: ChatFormat, *, templated: bool, split: str, max_rows: int | None = None
) -> list[Prompt]:
    """The prompts of all rows. Raises ``RowError`` at a bad one, ``ValueError`` without rows."""
    found: list[Prompt] = []
    for record in load_records(data, split=split):
        if max_rows is not None and len(found) >= max_rows:
            break
        found.append(_record_prompt(record, chat, templated))
    if not found:
        raise ValueError(f"{data}: no row to generate for (max_rows={max_rows})")
    return found


def _record_prompt(record: Record, chat: ChatFormat, templated: bool) -> Prompt:
    try:
        if record.fields is None:
            raise BadRow(record.reason, record.detail)
        return read_prompt(record.fields, chat, templated=templated)
    except BadRow as problem:
        message = f"{record.file}:{record.row}: {problem}: mend the row, or leave it out"
        raise RowError(record.file, record.row, problem.reason, message) from problem


class Partial:
    """Finished rows on their way: a JSON Lines file headed by the settings they were made with."""

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path, self.rows = path, {}
        if path.exists():
            self._read(settings)
        else:
            path.write_text(json.dumps({"settings": settings}) + "\n")

    def _read(self, settings: Mapping[str, Any]) -> None:
        content = self.path.read_bytes()
        # A run that was killed while it wrote leaves half a line: that row is made again.
        whole = content[: content.rfind(b"\n") + 1]
        try:
            begun, *lines = [json.loads(line) for line in whole.splitlines()]
            former = begun["settings"]
            self.rows = {line["row"]: line for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} is not what an earlier start left: move it away to begin anew"
            ) from error
        keys = [k for k in {**former, **settings} if former.get(k) != settings.get(k)]
        if keys:
            changes = ", ".join(f"{k}={former.get(k)!r}, now {settings.get(k)!r}" for k in keys)
            raise ValueError(
                f"{self.path} was begun with {changes}: start with the same settings to go on, or "
                "remove it to begin anew"
            )
        if len(whole) != len(content):
            self.path.write_bytes(whole)

    def add(self, batch: Sequence[tuple[int, Completion]]) -> None:
        """Put down a batch; it is on the disk when this returns."""
        lines = [
            {
                "row": row,
                "output": found.text,
                "finished": found.finished,
                "tokens": len(found.ids),
                "repetition": None if len(found.ids) < 4 else repetition([found.ids]),
            }
            for row, found in batch
        ]
        with self.path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {line["row"]: line for line in lines}


def length_report(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Lengths of outputs, and the shares cut off (no EOS), empty (blank) and repetitive.

    Tokens are counted without the EOS. Repetitive: at least ``REPETITIVE`` of the 4-grams of
    tokens occurred before in the same output.
    """

    def lengths(values: Sequence[int]) -> dict[str, float]:
        p90 = float(np.percentile(values, 90, method="higher"))
        median = float(statistics.median(values))
        return {"mean": statistics.fmean(values), "median": median, "p90": p90}

    total = len(lines)
    return {
        "outputs": total,
        "tokens": lengths([line["tokens"] for line in lines]),
        "characters": lengths([len(line["output"]) for line in lines]),
        "cut_off": sum(not line["finished"] for line in lines) / total,
        "empty": sum(not line["output"].strip() for line in lines) / total,
        "repetitive": sum((line["repetition"] or 0) >= REPETITIVE for line in lines) / total,
    }


def shown_lengths(report: Mapping[str, Any]) -> str:
    """The report in two lines."""
    tokens, characters = (
        "mean {mean:.1f}, median {median:.0f}, 90 % up to {p90:.0f}".format(**report[unit])
        for unit in ("tokens", "characters")
    )
    return (
        f"{report['outputs']} outputs; tokens: {tokens}; characters: {characters}\n"
        f"{report['cut_off']:.1%} cut off (no EOS), {report['empty']:.1%} empty, "
        f"{report['repetitive']:.1%} repetitive (half of the 4-grams or more)"
    )


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    replace_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def generate_outputs(
    model: str,
    data: str,
    out: str | Path,
    *,
    generator: str | None = None,
    split: str = "test",
    max_rows: int | None = None,
    chat_template: str | None = None,
    max_new_tokens: int = 512,
    max_prompt_length: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    compute_dtype: str = "float32",
) -> dict[str, Any]:
    """Write ``out``: ``[{instruction, output, generator[, dataset]}, ...]`` in the rows' order.

    ``model`` is a run, a model folder or a hub name; ``generator`` its folder's name where not
    given. Every batch is put down in ``out``.partial.jsonl, from which a second start with the
    same settings goes on. Returns ``length_report``, kept beside ``out`` as .lengths.json.

    Raises:
        FileExistsError: ``out`` is there already.
        ValueError: a setting or row that cannot be, or other settings than those begun with.
    """
    out = Path(out)
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows}: use at least 1")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: use at least 1")
    if out.exists():
        raise FileExistsError(f"{out} exists already: name another file, or move it away")
    with tempfile.TemporaryDirectory() as work:
        section = ModelConfig(path=model, compute_dtype=compute_dtype)
        policy = load_policy(section, make_mesh(), seed=0, work=Path(work))
        longest = _prompt_room(policy, max_new_tokens, max_prompt_length)
        chat = make_chat_format(policy.tokenizer, template=chat_template)
        templated = bool(chat_template or getattr(policy.tokenizer, "chat_template", None))
        if not templated:
            say("no chat template: instructions are used as plain prompts (see --chat-template)")
        prompts = read_prompts(data, chat, templated=templated, split=split, max_rows=max_rows)
        sampling = {
            "max_new_tokens": max_new_tokens, "max_prompt_length": longest,
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
            "stop_ids": list(stop_ids(policy.folder, policy.tokenizer)),
        }  # fmt: skip
        made_with = {
            "model": params_fingerprint(policy.params)[:32],
            "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:32],
            "compute_dtype": compute_dtype,
            **sampling,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Partial(out.with_name(out.name + ".partial.jsonl"), made_with)
        _fill(partial, policy, prompts, batch_size, sampling)
    lines = [partial.rows[i] for i in range(len(prompts))]
    name = generator or Path(model).resolve().name
    found = [
        {"instruction": prompt.instruction, "output": line["output"], "generator": name}
        | ({} if prompt.dataset is None else {"dataset": prompt.dataset})
        for prompt, line in zip(prompts, lines, strict=True)
    ]
    report = length_report(lines)
    write_json(out.with_suffix(".lengths.json"), report)
    write_json(out, found)
    partial.path.unlink()
    return report


def _prompt_room(policy: Policy, new: int, most: int | None) -> int:
    context = policy.model.config.max_position_embeddings
    room = context - new
    if room < 1 or (most is not None and not 1 <= most <= room):
        asked = "" if most is None else f" and max_prompt_length={most}"
        raise ValueError(
            f"max_new_tokens={new}{asked} do not fit into the model's context of {context} tokens: "
            "lower them; prompts need at least 1"
        )
    return most or room


def _fill(
    partial: Partial,
    policy: Policy,
    prompts: Sequence[Prompt],
    batch_size: int,
    sampling: Mapping[str, Any],
) -> None:
    """Generate what ``partial`` does not have yet."""
    left = [i for i in range(len(prompts)) if i not in partial.rows]
    done = len(prompts) - len(left)
    if done:
        say(f"{partial.path}: going on behind {done} of {len(prompts)} outputs")
    start = said = time.monotonic()
    tokens = 0
    batches = complete_batches(
        policy.model, policy.params, policy.tokenizer, [prompts[i].text for i in left],
        rows=left, batch_size=batch_size, **sampling,
    )  # fmt: skip
    for batch in batches:
        partial.add([(left[i], completion) for i, completion in batch])
        tokens += sum(len(completion.ids) for _, completion in batch)
        done, now = done + len(batch), time.monotonic()
        if now - said > _SAY_EVERY or done == len(prompts):
            said = now
            say(f"{done} of {len(prompts)} outputs, {tokens / (now - start):.0f} tokens/s")
