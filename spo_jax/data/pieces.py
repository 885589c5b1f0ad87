"""Pieces of text to token ids: starts, continuations, and whose BOS and EOS stands where."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spo_jax.data.chat import control_pattern
from spo_jax.data.messages import MARK

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
    control: re.Pattern[str] | None = None
    turn_end: str | None = None
    turn_end_id: int | None = None
    token_bytes: Sequence[int] | None = None

    def encode(self, texts: Sequence[str], *, as_text: bool = False) -> list[list[int]]:
        """Ids of each text as the start of a sequence, without special tokens.

        A control token behind ``MARK`` is text. ``as_text`` takes all control tokens so.
        """
        if not texts:
            return []
        found = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
            **({"split_special_tokens": True} if as_text else {}),
        )["input_ids"]
        for i, text in enumerate(texts):
            if MARK in text:
                found[i] = self._encode_marked(text)
        return found

    def _encode_marked(self, text: str) -> list[int]:
        """Ids of a text some of whose control tokens are text; between true ones it is whole."""
        ids: list[int] = []
        for number, (part, control) in enumerate(_at_control(text, self.control)):
            if control:
                ids.append(self.tokenizer.convert_tokens_to_ids(part))
            elif part:
                # The text before it is a control token, or there is none.
                encode = self.encode if number == 0 else self.encode_continuations
                ids += encode([part], as_text=True)[0]
        return ids

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each prompt, with the tokenizer's own BOS exactly once at the front."""
        return [self.with_bos(ids) for ids in self.encode(texts)]

    def with_bos(self, ids: list[int]) -> list[int]:
        """``ids`` of a prompt with the tokenizer's own BOS at the front, where it puts one."""
        if self.own_bos is None or ids[:1] == [self.own_bos]:
            return ids
        return [self.own_bos, *ids]

    def surely_reads_back(self, text: str, ids: list[int]) -> bool:
        """Whether the bytes of the tokens are as many as those of the text.

        Only where that decides it: every token stands for its own bytes, and the text is as the
        tokenizer would rewrite it. ``False`` is no answer.
        """
        sizes = self.token_bytes
        if sizes is None or not (text.isascii() or unicodedata.is_normalized("NFC", text)):
            return False
        return sum(map(sizes.__getitem__, ids)) == len(text.encode())

    def decode(self, encoded: Sequence[list[int]]) -> list[str]:
        """The text of each list of ids, control tokens included."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return backend.decode_batch(list(encoded), skip_special_tokens=False)
        return self.tokenizer.batch_decode(list(encoded), clean_up_tokenization_spaces=False)

    def encode_continuations(
        self, texts: Sequence[str], *, as_text: bool = False
    ) -> list[list[int]]:
        """Ids of each text as it reads on behind other text.

        SentencePiece-like tokenizers write a word mark in front of every text, so that pieces
        joined by ids would gain a space. There a text is encoded behind an anchor, and the
        anchor's ids are taken off; an anchor that merges with the text is answered by trying
        the next.

        Raises ``ValueError`` when a text merges with every anchor.
        """
        if not self.anchors:
            return self.encode(texts, as_text=as_text)
        found: list[list[int]] = [[] for _ in texts]
        waiting = [i for i, text in enumerate(texts) if text]
        for anchor, anchor_ids in self.anchors:
            encoded = self.encode([anchor + texts[i] for i in waiting], as_text=as_text)
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


def make_piece_encoder(tokenizer: Any, *, turn_end: str | None = None) -> PieceEncoder:
    """Find out how a tokenizer starts, joins and ends texts.

    ``turn_end`` is a control token that ends a completion as EOS does.

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
        control=control_pattern(tokenizer),
        turn_end=turn_end,
        token_bytes=_token_bytes(tokenizer),
        turn_end_id=None if turn_end is None else tokenizer.convert_tokens_to_ids(turn_end),
    )


def _token_bytes(tokenizer: Any) -> list[int] | None:
    """The bytes each id stands for, in a tokenizer of bytes that rewrites at most to NFC."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not repr(backend.decoder).startswith("ByteLevel("):
        return None
    if backend.normalizer is not None and not repr(backend.normalizer).startswith("NFC("):
        return None
    vocab = backend.get_vocab(with_added_tokens=True)
    sizes = [0] * (max(vocab.values()) + 1)
    added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
    for token, i in vocab.items():
        sizes[i] = len(added[i].encode()) if i in added else len(token)
    return sizes


def without_marks(text: str) -> str:
    """A text as people read it: control tokens in it may be content."""
    return text.replace(MARK, "")


def _at_control(text: str, control: re.Pattern[str] | None) -> list[tuple[str, bool]]:
    """``text`` cut at its control tokens, each part with whether it is one; marks are gone."""
    parts: list[tuple[str, bool]] = []
    done = 0
    for found in control.finditer(text) if control is not None else ():
        if found.start() and text[found.start() - 1] == MARK:
            continue
        words = text[done : found.start()].replace(MARK, "")
        parts += [(words, False), (found[0], True)]
        done = found.end()
    return [*parts, (text[done:].replace(MARK, ""), False)]


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
