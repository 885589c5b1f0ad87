"""Pieces of text to token ids: starts, continuations, and whose BOS and EOS stands where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_PROBES = ("a", "b", "1")
_ANCHORS = ("\n", "a", "1", ".", ")", "é", "\x01")


@dataclass(frozen=True)
class PieceEncoder:
    """A tokenizer and what was found out about it; made by ``make_piece_encoder``.

    ``own_bos`` is the BOS id when the tokenizer puts one at the front by itself. ``anchors``
    is empty for a tokenizer whose pieces simply join; see ``encode_continuations``.
    """

    tokenizer: Any
    eos_token: str
    eos_id: int
    pad_id: int
    bos_id: int | None
    own_bos: int | None
    anchors: tuple[tuple[str, tuple[int, ...]], ...]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as the start of a sequence, without special tokens."""
        if not texts:
            return []
        return self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each prompt, with the tokenizer's own BOS exactly once at the front."""
        encoded = self.encode(texts)
        if self.own_bos is None:
            return encoded
        return [ids if ids[:1] == [self.own_bos] else [self.own_bos, *ids] for ids in encoded]

    def encode_continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as it reads on behind other text.

        SentencePiece-like tokenizers write a word mark in front of every text, so that pieces
        joined by ids would gain a space. There a text is encoded behind an anchor, and the
        anchor's ids are taken off; an anchor that merges with the text is answered by trying
        the next.

        Raises ``ValueError`` when a text merges with every anchor.
        """
        if not self.anchors:
            return self.encode(texts)
        found: list[list[int]] = [[] for _ in texts]
        waiting = [i for i, text in enumerate(texts) if text]
        for anchor, anchor_ids in self.anchors:
            encoded = self.encode([anchor + texts[i] for i in waiting])
            size, merged = len(anchor_ids), []
            for i, ids in zip(waiting, encoded, strict=True):
                if tuple(ids[:size]) == anchor_ids:
                    found[i] = ids[size:]
                else:
                    merged.append(i)
            waiting = merged
        if waiting:
            raise ValueError(f"this tokenizer cannot continue a text by {texts[waiting[0]][:60]!r}")
        return found

    def encode_endings(self, texts: Sequence[str], starts: Sequence[bool]) -> list[list[int]]:
        """Ids of pieces: ``starts[i]`` says that piece i begins its sequence, no prompt before."""
        first = [i for i, start in enumerate(starts) if start]
        later = [i for i, start in enumerate(starts) if not start]
        found: list[list[int]] = [[] for _ in texts]
        for at, ids in zip(first, self.encode([texts[i] for i in first]), strict=True):
            found[at] = ids
        for at, ids in zip(
            later, self.encode_continuations([texts[i] for i in later]), strict=True
        ):
            found[at] = ids
        return found


def make_piece_encoder(tokenizer: Any) -> PieceEncoder:
    """Find out how a tokenizer starts, joins and ends texts.

    Raises ``ValueError`` without an EOS token: nothing could teach the policy to stop.
    """
    if tokenizer.eos_token_id is None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ValueError(
            f"tokenizer {name} has no EOS token, and every completion must end with one: "
            "set eos_token in its tokenizer_config.json"
        )
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return PieceEncoder(
        tokenizer=tokenizer,
        eos_token=tokenizer.eos_token,
        eos_id=eos,
        pad_id=eos if pad is None else pad,
        bos_id=bos,
        own_bos=bos if adds_bos else None,
        anchors=_find_anchors(tokenizer),
    )


def _find_anchors(tokenizer: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def marked(text: str) -> bool:
        tokens = tokenizer.convert_ids_to_tokens(encode(text)[:1])
        return bool(tokens) and tokens[0].startswith(("▁", "Ġ"))

    if not any(marked(probe) for probe in _PROBES):
        return ()
    # An anchor of unknown tokens could swallow unknown characters behind it unseen.
    encoded = [(anchor, tuple(encode(anchor))) for anchor in _ANCHORS]
    unknown = tokenizer.unk_token_id
    return tuple((a, ids) for a, ids in encoded if ids and unknown not in ids)
