"""``spo-jax generate``: a policy's outputs on a file of prompts, as AlpacaEval 2 reads them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spo_jax.checkpoints.atomic import replace_text, to_json
from spo_jax.checkpoints.checksums import params_fingerprint
from spo_jax.data import Record, RowError, load_records, make_chat_format
from spo_jax.data.badrow import BadRow
from spo_jax.data.chat import ChatFormat, render_plain
from spo_jax.data.columns import Columns
from spo_jax.data.layouts import ANSWERS, LAYOUTS, QUESTIONS, Layout, asked_in_words
from spo_jax.data.messages import from_json_text, read_text
from spo_jax.data.pieces import without_marks
from spo_jax.data.reader import VARIABLES, Reader
from spo_jax.parallel.mesh import make_mesh
from spo_jax.parallel.processes import say
from spo_jax.policies.completions import Completion, complete_batches, stop_ids
from spo_jax.policies.decoding import check_sampling
from spo_jax.policies.limits import check_texts
from spo_jax.policies.loading import Policy, as_trained, date_of_run, load_policy
from spo_jax.policies.text_statistics import repetition

REPETITIVE = 0.5
"""An output is repetitive from this share of 4-grams that occurred in it before."""

_SAY_EVERY = 5.0
_ASKED = (QUESTIONS[0], "prompt", *QUESTIONS[1:])


class Prompt(NamedTuple):
    """What is asked, as people read it and as the model does, and the data set it comes from."""

    instruction: str
    text: str
    dataset: str | None = None


def read_prompt(row: Mapping[str, Any], reader: Reader, *, templated: bool) -> Prompt:
    """The prompt of one row.

    An ``instruction`` (with its ``input`` behind it), or else that of a pair or an SFT row, as it
    is in training; or else a ``prompt`` (text or messages) or ``question``. What is asked in
    words becomes a user's turn where there is a template (``templated``), and stays as it is
    where there is none. Raises ``BadRow``.
    """
    row = reader.columns.rename(row)
    name = next((name for name in _ASKED if name in row), None)
    layout = None if name == "instruction" else _layout_of(row)
    if layout is not None:
        text = layout.parse(row, reader).prompt
        reader.columns.check(row, layout.read(row) | {"dataset"})
        return Prompt(_in_words(layout, row, text), _not_empty(text), _dataset(row))
    if name is None:
        columns = ", ".join(sorted(map(str, row))) or "none"
        raise BadRow("no prompt", f"expected {', '.join(_ASKED)}, a pair or an SFT row: {columns}")
    beside = {"input", "context", "history"} if name == "instruction" else set()
    read = frozenset([name, "system", *VARIABLES, "dataset", *beside, *ANSWERS])
    reader.columns.check(row, read)
    reader.columns.not_read.update(answer for answer in ANSWERS if answer in row)
    value = from_json_text(row[name], name)
    if not isinstance(value, str) and name == "prompt":
        messages = reader.messages(value, name)
        shown = _without_labels(render_plain(messages, True))
        return Prompt(shown, _not_empty(reader.prompt(row, messages)), _dataset(row))
    if name == "prompt":
        messages = [{"role": "user", "content": _not_empty(read_text(value, name))}]
    else:
        messages = asked_in_words(row, reader)
    text = messages[-1]["content"]
    in_chat = templated or len(messages) > 1 or any(row.get(k) for k in ("system", *VARIABLES))
    asked = reader.prompt(row, messages) if in_chat else reader.plain(text)
    return Prompt(text, asked, _dataset(row))


def _in_words(layout: Layout, row: Mapping[str, Any], text: str) -> str:
    """The prompt as people read it; ``text`` is how the model does."""
    try:
        return _without_labels(layout.parse(row, Reader(_PLAIN)).prompt)
    except BadRow:  # tools and their like have no place in plain text
        return without_marks(text)


_PLAIN = ChatFormat(render_plain, None)


def _layout_of(row: Mapping[str, Any]) -> Layout | None:
    for kind in ("preference", "sft"):
        for layout in LAYOUTS[kind].values():
            if layout.fits(set(row)):
                return layout
    return None


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
    data: str, reader: Reader, *, templated: bool, split: str, max_rows: int | None = None
) -> list[Prompt]:
    """The prompts of all rows. Raises ``RowError`` at a bad one, ``ValueError`` without rows."""
    found: list[Prompt] = []
    records = load_records(data, split=split)
    for record in records:
        if max_rows is not None and len(found) >= max_rows:
            break
        found.append(_record_prompt(record, reader, templated))
    if not found:
        raise ValueError(f"{data}: no row to generate for (max_rows={max_rows})")
    for line in (*records.notes, *reader.lines()):
        say(f"{data}: {line}")
    return found


def _record_prompt(record: Record, reader: Reader, templated: bool) -> Prompt:
    try:
        if record.fields is None:
            raise BadRow(record.reason, record.detail)
        return read_prompt(record.fields, reader, templated=templated)
    except BadRow as problem:
        message = f"{record.file}:{record.row}: {problem}: {problem.mend}, or leave it out"
        place = record.file, record.row
        raise RowError(*place, problem.reason, message, problem.mend) from problem


class Partial:
    """Finished rows on their way: a JSON Lines file headed by the settings they were made with."""

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path, self.rows = path, {}
        if path.exists():
            self._read(settings)
        else:
            path.write_text(to_json({"settings": settings}, str(path)) + "\n")

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
            file.write("".join(to_json(line, str(self.path)) + "\n" for line in lines))
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
    replace_text(path, to_json(value, str(path), indent=2, ensure_ascii=False) + "\n")


def generate_outputs(
    model: str,
    data: str,
    out: str | Path,
    *,
    generator: str | None = None,
    split: str = "test",
    max_rows: int | None = None,
    chat_template: str | None = None,
    columns: Mapping[str, str] | None = None,
    ignore_columns: Sequence[str] = (),
    max_new_tokens: int = 512,
    max_prompt_length: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = 64,
    compute_dtype: str | None = None,
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
        section = as_trained(model, compute_dtype)
        policy = load_policy(section, make_mesh(), seed=0, work=Path(work))
        longest = _prompt_room(policy, max_new_tokens, max_prompt_length)
        chat = make_chat_format(policy.tokenizer, template=chat_template, date=date_of_run(model))
        templated = bool(chat_template or getattr(policy.tokenizer, "chat_template", None))
        if not templated:
            say("no chat template: instructions are used as plain prompts (see --chat-template)")
        reader = Reader(chat, Columns(columns, ignore_columns))
        prompts = read_prompts(data, reader, templated=templated, split=split, max_rows=max_rows)
        check_texts(
            [prompt.text for prompt in prompts],
            policy.model.config,
            policy.tokenizer,
            max_prompt_length=longest,
            max_new_tokens=max_new_tokens,
        )
        sampling = {
            "max_new_tokens": max_new_tokens, "max_prompt_length": longest,
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
            "stop_ids": list(stop_ids(policy.folder, policy.tokenizer)),
        }  # fmt: skip
        made_with = {
            "model": params_fingerprint(policy.params)[:32],
            "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:32],
            "compute_dtype": section.compute_dtype,
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
    _, context = policy.model.config.context
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
