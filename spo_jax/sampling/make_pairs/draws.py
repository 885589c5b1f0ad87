"""A policy's samples as text that training tokenizes to what was sampled, where it can.

Pairs are text, and training tokenizes it anew, with an EOS behind it: to the ids that were
sampled wherever the tokenizer would have written the text so itself. A policy can also sample
another split of the same text (``12`` as ``1``, ``2``); and special tokens inside a sample, and
bytes that are no UTF-8, are lost in its text (``count_respelled`` counts such samples). Behind
a sample that was cut off, training writes an EOS that was not sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from spo_jax.data import encode_prompts
from spo_jax.data.pieces import make_piece_encoder
from spo_jax.parallel.processes import say
from spo_jax.policies.completions import Completion, complete, stop_ids
from spo_jax.policies.loading import Policy
from spo_jax.sampling.make_pairs.settings import PairSettings

BLOCK = 256
"""Prompts sampled together, one sample of each at a time; a stop costs at most those."""

CPU_BLOCK = 32
"""As ``BLOCK`` on a CPU: more at once are hardly faster there."""


def draw_samples(
    policy: Policy,
    prompts: Sequence[str],
    settings: PairSettings,
    *,
    rows: Sequence[int],
    endings: Iterable[str] = (),
    batch_size: int = BLOCK,
    progress: Callable[[int], Any] | None = None,
    known: Sequence[Sequence[Completion]] = (),
    keep: Callable[[int, list[Completion]], Any] | None = None,
) -> list[list[Completion]]:
    """``settings.samples`` samples of each prompt, of which ``rows`` are the numbers.

    Sample ``i`` of row ``r`` is drawn with the ``r``-th of the keys split off ``hash(seed, i)``:
    which prompts are sampled beside it does not show. ``endings`` end a sample as the model's
    EOS do. ``progress`` is called with the number of samples drawn so far. ``known`` are the
    first samples of all prompts where an earlier call had drawn them; ``keep`` is called with
    each further number and its samples.
    """
    tokenizer = policy.tokenizer
    first = [tokenizer.tokenize(ending)[0] for ending in endings if ending]
    stops = {*stop_ids(policy.folder, tokenizer), *map(tokenizer.convert_tokens_to_ids, first)}

    def draw(i: int) -> Sequence[Completion]:
        if i < len(known):
            return known[i]
        found = complete(
            policy.model,
            policy.params,
            tokenizer,
            prompts,
            max_new_tokens=settings.answer_tokens,
            max_prompt_length=settings.max_prompt_length,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            seed=_seed(settings.seed, i),
            batch_size=batch_size,
            stop_ids=tuple(sorted(stops)),
            rows=rows,
            progress=progress and (lambda done, _: progress(i * len(prompts) + done)),
        )
        if keep is not None:
            keep(i, found)
        return found

    drawn = zip(*(draw(i) for i in range(settings.samples)), strict=True)
    ids = encode_prompts(prompts, tokenizer, max_prompt_length=settings.max_prompt_length)
    return [
        [s._replace(text=continuation_text(tokenizer, prompt, s)) for s in samples]
        for prompt, samples in zip(ids, drawn, strict=True)
    ]


def continuation_text(tokenizer: Any, prompt: Sequence[int], sample: Completion) -> str:
    """The text of a sample as it reads behind its prompt.

    Decoded alone, SentencePiece-like tokenizers drop the blank that it begins with.
    """
    before, after = (
        tokenizer.decode([*prompt, *ids], skip_special_tokens=True) for ids in ((), sample.ids)
    )
    return after.removeprefix(before) if sample.ids and after.startswith(before) else sample.text


def count_respelled(tokenizer: Any, samples: Sequence[Completion]) -> int:
    """How many samples training tokenizes to other ids than were sampled."""
    encoded = make_piece_encoder(tokenizer).encode_continuations([s.text for s in samples])
    return sum(tuple(ids) != s.ids for ids, s in zip(encoded, samples, strict=True))


def checked_prompt_ids(tokenizer: Any, prompts: Sequence[str], most: int) -> list[list[int]]:
    """Ids of the prompts, one id more than ``most`` of those that will be cut, which is said."""
    ids = encode_prompts(prompts, tokenizer, max_prompt_length=most + 1)
    cut = sum(len(found) > most for found in ids)
    if cut:
        say(
            f"{cut} of {len(ids)} prompts are cut on the left to {most} tokens: raise "
            "max_prompt_length, or train on the pairs with the same data.max_prompt_length"
        )
    return ids


def _seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0]) >> 1
