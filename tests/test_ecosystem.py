"""What leaves this library, as lm-eval and alpaca_eval read it, where they are there."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spo_jax.cli import main
from spo_jax.data import load_tokenizer, rows_to_batch, tokenize_rows
from spo_jax.models import init_model, save_pretrained
from spo_jax.objective import completion_logprobs, make_logprobs_fn
from spo_jax.tasks import arithmetic
from spo_jax.types import PreferenceRow
from tests.tiny import ARCHITECTURE

pytestmark = pytest.mark.slow
HF = {**ARCHITECTURE, "vocab_size": arithmetic.vocabulary_size(), "initializer_range": 0.3}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A random model, its parameters, and both as a folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "exported"
    model = init_model(HF)
    params = jax.jit(model.init)(jax.random.key(0))
    save_pretrained(folder, params, model, source=HF)
    arithmetic.write_tokenizer(folder)
    return folder, model, params


def test_lm_eval_scores_completions_as_we_do(exported):
    """But for the EOS, which it does not score."""
    pytest.importorskip("torch")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    folder, model, params = exported
    problems = [arithmetic.solve(a, b, digits=2) for a, b in ((12, 34), (7, 95), (50, 50))]
    rows = [PreferenceRow(p, right, right[:-1]) for p, right in problems]
    tokens, _ = tokenize_rows(
        rows, load_tokenizer(folder), max_prompt_length=8, max_completion_length=32
    )
    batch = rows_to_batch(tokens, np.arange(3), prompt_length=8, completion_length=32)
    last = batch.completion_mask.sum(-1, keepdims=True) - 1
    without_eos = batch.completion_mask & (np.arange(32) != last)
    batch = jax.tree.map(jnp.asarray, batch._replace(completion_mask=without_eos))
    ours = completion_logprobs(make_logprobs_fn(model, chunk_tokens=64), params, batch)
    tool = huggingface.HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)
    asked = [SimpleNamespace(args=(row.prompt, text)) for row in rows for text in row[1:]]
    theirs = [value for value, _ in tool.loglikelihood(asked, disable_tqdm=True)]
    np.testing.assert_allclose(np.ravel(ours), theirs, rtol=1e-4)


def test_alpaca_eval_reads_outputs(exported, tmp_path):
    utils = pytest.importorskip("alpaca_eval.utils", exc_type=ImportError)
    asked, out = tmp_path / "prompts.jsonl", tmp_path / "outputs.json"
    asked.write_text("".join(json.dumps({"instruction": f"{i}+1="}) + "\n" for i in range(3)))
    words = ["generate", str(exported[0]), "--data", str(asked), "--out", str(out)]
    assert main([*words, "--max-new-tokens", "4", "--generator", "mine"]) == 0
    read = utils.load_or_convert_to_dataframe(out)
    assert list(read.columns) == ["instruction", "output", "generator"]
    assert list(read["instruction"]) == ["0+1=", "1+1=", "2+1="]
    assert set(read["generator"]) == {"mine"}
    assert [str(text) for text in read["output"]] == [
        x["output"] for x in json.loads(out.read_text())
    ]
