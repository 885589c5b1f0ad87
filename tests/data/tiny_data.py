"""Tokenizers and rows small enough that a test can write the ids down."""

import string

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from spo_jax.data import TokenizedRows

PAD = 99
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"


def char_vocab():
    return {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}


def ids(text):
    """Expected ids of plain text under ``make_char_tokenizer``: one a character."""
    vocab = char_vocab()
    return [vocab[c] for c in text]


def make_char_tokenizer(*, bos=False, eos="</s>", pad="<pad>", template=None):
    """One token a character; ``bos``: it puts ``<s>`` at the front by itself."""
    core = Tokenizer(models.WordLevel(char_vocab(), unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens(SPECIAL)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token=pad, unk_token="<unk>"
    )
    made.chat_template = template
    return made


def make_marked_tokenizer(style):
    """BPE that writes a word mark in front of every text, as SentencePiece does."""
    mark = "Ġ" if style == "byte_level" else "▁"
    if style == "byte_level":
        characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        characters = [mark, *string.ascii_letters, *string.digits, *".,!?\n"]
    newline = "Ċ" if style == "byte_level" else "\n"
    merges = [
        (newline, "b"),
        (mark, "t"),
        ("h", "e"),
        (mark + "t", "he"),
        ("a", "b"),
        (mark, "a"),
        ("1", "2"),
    ]
    tokens = [*SPECIAL[:4], *characters, *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    strip = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    if style == "prepend":
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        core.decoder = decoders.Sequence(strip)
    elif style == "metaspace":
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        core.decoder = decoders.Sequence(strip)
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL[:4])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_rows(rows):
    """``[(prompt, [completion, ...]), ...]`` of ids; a completion's even ids are scored."""
    completions = [c for _, branches in rows for c in branches]

    def flat(parts):
        return np.array([t for part in parts for t in part], np.int32)

    def offsets(parts):
        return np.cumsum([0, *map(len, parts)])

    prompts = [p for p, _ in rows]
    return TokenizedRows(
        prompt_ids=flat(prompts),
        prompt_offsets=offsets(prompts),
        completion_ids=flat(completions),
        completion_mask=flat(completions) % 2 == 0,
        completion_offsets=offsets(completions),
        source_rows=np.arange(len(rows)),
        num_completions=len(rows[0][1]),
        pad_id=PAD,
    )
