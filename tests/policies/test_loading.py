"""A policy from a folder: what is carried, what is said, what is refused."""

from __future__ import annotations

import json
import random
import shutil
from types import SimpleNamespace

import jax
import pytest

from spo_jax.cli import _is_ours
from spo_jax.config.schema import ModelConfig
from spo_jax.models import load_model, load_params, save_pretrained
from spo_jax.models.folders import files_left_aside, files_to_carry
from spo_jax.parallel.mesh import make_mesh
from spo_jax.policies import load_policy, loading, stop_ids
from spo_jax.policies.loading import compute_dtype_of, execution, narrowest_dtype
from spo_jax.tasks import arithmetic
from tests.models.test_fuzz_folders import spoil_bytes
from tests.models.tiny_models import HF_CONFIGS, write_folder

TOKENIZER_FILES = (
    "added_tokens.json",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "words.tiktoken",
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny model with the tokenizer of the built-in task."""
    folder = tmp_path_factory.mktemp("model") / "model"
    config = HF_CONFIGS["llama_tied"] | {"num_hidden_layers": 1}
    write_folder(folder, config | {"vocab_size": arithmetic.vocabulary_size()})
    arithmetic.write_tokenizer(folder)
    return folder


@pytest.fixture
def folder(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "model")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=1, fsdp=1, tensor=8)


def load(folder, mesh, **section):
    work = folder.with_name("work")
    return load_policy(ModelConfig(path=str(folder), **section), mesh, seed=0, work=work)


def change(file, **changes):
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(found | changes))


def test_every_file_of_a_tokenizer_is_carried(tmp_path):
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    write_folder(source, HF_CONFIGS["llama_tied"])
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        (source / name).write_text("{}")
    for name in (
        "tokenizer.py",
        "hf_token",
        "optimizer.pt",
        "README.md",
        "consolidated.safetensors",
    ):
        (source / name).write_text("")
    expected = sorted((*TOKENIZER_FILES, "config.json", "generation_config.json"))
    assert files_to_carry(source) == expected
    assert files_left_aside(source) == [
        "consolidated.safetensors",
        "hf_token",
        "optimizer.pt",
        "tokenizer.py",
    ]
    model = load_model(source)
    save_pretrained(tmp_path / "out", load_params(source, model), model, source=source)
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    names = sorted(path.relative_to(tmp_path / "out").as_posix() for path in written)
    assert names == sorted([*expected, "model.safetensors"])


def test_a_run_keeps_all_of_it(folder, mesh, capsys):
    (folder / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (folder / name).write_text(f"{{{{ '{name}' }}}}")
    policy = load(folder, mesh)
    assert files_to_carry(policy.folder) == files_to_carry(folder)
    assert set(policy.tokenizer.chat_template) == {"default", "tool_use"}
    assert "several chat templates ('default', 'tool_use'): 'default' is used" in (
        capsys.readouterr().err
    )


def test_of_two_tokenizers_only_one_is_in_a_run(plain, folder, mesh):
    (folder / "chat_template.jinja").write_text("of the model's own tokenizer")
    policy = load(folder, mesh, tokenizer=str(plain))
    assert not (policy.folder / "chat_template.jinja").exists()
    assert policy.tokenizer.chat_template is None


def test_a_folder_without_anything_unused_says_nothing(folder, mesh, capsys):
    load(folder, mesh)
    assert capsys.readouterr().err == ""


def test_what_is_not_used_is_said_by_name(folder, mesh, capsys):
    change(folder / "generation_config.json", temperature=0.6, pad_token_id=99, eos_token_id=1)
    change(folder / "config.json", attention_dropout=0.1)
    change(folder / "tokenizer_config.json", chat_template="{{ 'old' }}")
    change(folder / "chat_template.json", chat_template="{{ 'older' }}")
    (folder / "chat_template.jinja").write_text("{{ 'new' }}\n")
    (folder / "training_args.bin").write_bytes(b"")
    policy = load(folder, mesh)
    assert policy.tokenizer.chat_template.strip() == "{{ 'new' }}"
    said = capsys.readouterr().err.splitlines()
    assert said[:4] == [
        "config.json: not used here: attention_dropout=0.1",
        "generation_config.json: not used here: temperature=0.6, pad_token_id=99",
        "tokenizer_config.json: its chat template is not used, another one is preferred",
        "chat_template.json: its chat template is not used, another one is preferred",
    ]
    assert said[4].endswith("not used here: training_args.bin")
    assert len(said) == 5
    assert 1 in stop_ids(policy.folder, policy.tokenizer)


def test_tokens_without_an_embedding_are_said(folder, mesh, capsys):
    size = arithmetic.vocabulary_size()
    write_folder(
        folder, json.loads((folder / "config.json").read_text()) | {"vocab_size": size - 2}
    )
    load(folder, mesh)
    assert f"2 tokens beyond the model's vocab_size={size - 2}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", r"model/config\.json cannot be read as JSON"),
        ("generation_config.json", b"nope", r"model/generation_config\.json cannot be read"),
        ("generation_config.json", b'{"eos_token_id": [1, 99]}', r"\[1, 99\] is outside of"),
        ("generation_config.json", b'{"eos_token_id": 17}', r"vocabulary of 17: nothing would"),
        ("tokenizer_config.json", b"[]", r"model/tokenizer_config\.json holds a list"),
        ("tokenizer_config.json", b"\xff", r"model/tokenizer_config\.json cannot be read"),
        ("tokenizer.json", b"{", r"tokenizer\.json cannot be read as JSON"),
        ("tokenizer.json", b'{"version": "1.0", "model": 3}', "no tokenizer"),
        ("tokenizer_config.json", b'{"tokenizer_class": 7}', "no tokenizer"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": 7}', "no tokenizer"),
        (
            "tokenizer_config.json",
            b'{"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": 7}',
            "chat_template is int, expected text",
        ),
        ("added_tokens.json", b"{", r"model/added_tokens\.json cannot be read"),
        ("adapter_config.json", b"{}", "holds an adapter"),
    ],
)
def test_broken_files_are_named(name, content, message, folder, mesh):
    (folder / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load(folder, mesh)
    assert _is_ours(error.value)


@pytest.mark.slow
def test_spoiled_tokenizers_are_loaded_or_refused(folder, mesh):
    """Nothing but an error of ours comes out, whatever is wrong with the files."""
    rng = random.Random(5)
    odd = (None, 7, True, [], {}, [1], "", "<none>", {"a": 1}, [{"name": "default"}], 1e9)
    keys = ("chat_template", "eos_token", "pad_token", "tokenizer_class", "model_max_length",
            "added_tokens_decoder", "extra_special_tokens", "padding_side", "auto_map")  # fmt: skip
    loaded = refused = 0
    for number in range(80):
        file = folder / ("tokenizer_config.json", "tokenizer.json")[number % 2]
        before = file.read_bytes()
        if number % 4 == 0:
            change(file, **{rng.choice(keys): rng.choice(odd)})
        else:
            file.write_bytes(spoil_bytes(before, rng))
        try:
            policy = load(folder, mesh)
            stop_ids(policy.folder, policy.tokenizer)
            loaded += 1
        except (ValueError, FileNotFoundError) as error:
            if not _is_ours(error):
                raise
            refused += 1
        file.write_bytes(before)
    assert loaded > 5
    assert refused > 20


def test_a_mistyped_key_of_model_init_is_an_error(tmp_path, mesh):
    init = HF_CONFIGS["llama_tied"] | {"hidden_sise": 16}
    section = ModelConfig(init=init, tokenizer="builtin:arithmetic")
    with pytest.raises(ValueError, match=r"model\.init: .*hidden_sise=16 \(did you mean 'hidden_s"):
        load_policy(section, mesh, seed=0, work=tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", None, "float32"),
        ("tpu", None, "bfloat16"),
        ("gpu", "9.0", "bfloat16"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "7.5", "float32"),
        ("gpu", "12.0", "bfloat16"),
        ("gpu", "gfx942", "bfloat16"),
    ],
)
def test_products_are_in_the_dtype_that_the_device_has(platform, capability, expected):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    assert narrowest_dtype(device) == expected


def test_a_dtype_that_is_named_or_cannot_be_narrower_stays(monkeypatch):
    monkeypatch.setattr(loading, "narrowest_dtype", lambda device: "bfloat16")
    expected = {"float32": "bfloat16", "bfloat16": "bfloat16", "float16": "float32"}
    with jax.default_matmul_precision(None):
        for stored, dtype in expected.items():
            for mesh in (None, make_mesh()):
                assert compute_dtype_of(ModelConfig(param_dtype=stored), mesh) == dtype
    for named in ("float32", "bfloat16", "float16"):
        assert compute_dtype_of(ModelConfig(compute_dtype=named)) == named
    with jax.default_matmul_precision("highest"):
        assert compute_dtype_of(ModelConfig()) == "float32"


@pytest.mark.on_cpu
def test_the_execution_has_a_dtype_and_no_auto():
    assert execution(ModelConfig()).compute_dtype == "float32"
    assert execution(ModelConfig(), make_mesh()).compute_dtype == "float32"
