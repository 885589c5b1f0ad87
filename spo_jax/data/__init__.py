"""Data: raw records to rows of text, to token ids, to batches in the pair layout."""

from spo_jax.data.buckets import LengthBuckets, PlanReport, choose_buckets
from spo_jax.data.chat import ChatFormat, make_chat_format, render_plain
from spo_jax.data.files import Record, Records, load_records
from spo_jax.data.formats import (
    FormatReport,
    RowError,
    TextRows,
    find_layout,
    format_rows,
)
from spo_jax.data.pairs import FILLER, rows_to_batch
from spo_jax.data.pipeline import BatchSource, TrainIterator, eval_batches, make_train_iterator
from spo_jax.data.splits import split_by_prompt
from spo_jax.data.token_rows import TokenizedRows, TokenReport
from spo_jax.data.tokenize import encode_prompts, load_tokenizer, tokenize_rows

__all__ = [
    "FILLER",
    "BatchSource",
    "ChatFormat",
    "FormatReport",
    "LengthBuckets",
    "PlanReport",
    "Record",
    "Records",
    "RowError",
    "TextRows",
    "TokenReport",
    "TokenizedRows",
    "TrainIterator",
    "choose_buckets",
    "encode_prompts",
    "eval_batches",
    "find_layout",
    "format_rows",
    "load_records",
    "load_tokenizer",
    "make_chat_format",
    "make_train_iterator",
    "render_plain",
    "rows_to_batch",
    "split_by_prompt",
    "tokenize_rows",
]
