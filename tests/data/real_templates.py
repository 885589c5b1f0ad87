"""Chat templates as the families' public folders have them, on a tokenizer of characters.

Sources and licences stand in ``templates/SOURCES.md``. The tokenizer has the family's own control
tokens, and one token a character: expected ids can be written down as text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.data.tiny_data import CHARACTERS

FOLDER = Path(__file__).parent / "templates"
TOKENS: dict[str, dict[str, Any]] = json.loads((FOLDER / "tokens.json").read_text())


def template_of(name: str) -> str:
    """The text of a template, its last newline included."""
    return (FOLDER / f"{name}.jinja").read_bytes().decode()


def make_family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One token a character, and the control tokens of the family ``name``."""
    tokens = TOKENS[name]
    special, plain = tokens["special_tokens"], tokens["added_tokens_not_special"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*special, *plain, *CHARACTERS]))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="~"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(special)
    core.add_tokens(plain)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens["bos_token"],
        eos_token=tokens["eos_token"],
        pad_token=tokens["pad_token"],
    )
    made.chat_template = template_of(name)
    return made


def ids_of(name: str, text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids of a text that is written with its control tokens: the longest at each place."""
    tokens = [*TOKENS[name]["special_tokens"], *TOKENS[name]["added_tokens_not_special"]]
    found, at = [], 0
    while at < len(text):
        here = [token for token in tokens if text.startswith(token, at)]
        token = max(here, key=len) if here else text[at]
        found.append(tokenizer.convert_tokens_to_ids(token))
        at += len(token)
    return found
