"""What a run was trained with goes where it goes, and does not change under it."""

import datetime
import json
import shutil

import jax
import pytest
import yaml

from spo_jax.cli import main
from spo_jax.config.parsing import read_tree
from spo_jax.data import load_tokenizer
from spo_jax.models import init_model, save_pretrained
from spo_jax.policies.completions import stop_ids
from spo_jax.training import pinned
from tests.data.tiny_data import CHATML, SPECIAL, make_char_tokenizer
from tests.tiny import ARCHITECTURE

OWN = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
DATED = "{{ strftime_now('%Y-%m-%d') }} " + CHATML
IM_END = SPECIAL.index("<|im_end|>")
ROWS = [
    {"question": f"is {i} odd?", "chosen": "yes" if i % 2 else "no", "rejected": "what?"}
    for i in range(8)
]


def pairs(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder whose tokenizer has a template of its own, and no generation_config."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_char_tokenizer(template=OWN)
    config = {**ARCHITECTURE, "vocab_size": len(tokenizer), "eos_token_id": 2,
              "max_position_embeddings": 256}  # fmt: skip
    built = init_model(config)
    save_pretrained(folder / "it", built.init(jax.random.key(0)), built, source=config)
    tokenizer.save_pretrained(folder / "it")
    return folder / "it"


def started(folder, model, template=CHATML, steps=2, **more):
    """A run of some updates: its configuration and its folder."""
    (folder / "pairs.jsonl").write_text(pairs())
    (folder / "own.jinja").write_text(template)
    tree = {
        "output_dir": str(folder / "run"),
        "model": {"path": str(model)},
        "data": {"train": str(folder / "pairs.jsonl"), "chat_template": str(folder / "own.jinja"),
                 "prompt_buckets": [64], "completion_buckets": [16]},
        "reference": {"cache_dir": str(folder / "cache")},
        "outer": {"learning_rate": 1e-3},
        "train": {"steps": steps, "batch_size": 8},
        **more,
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert main(["train", str(path)]) == 0
    return path, folder / "run"


@pytest.fixture(scope="module")
def begun(tmp_path_factory, model):
    return started(tmp_path_factory.mktemp("begun"), model)


@pytest.fixture
def run(begun, tmp_path):
    """A copy of the begun run that a test may spoil, with its configuration."""
    shutil.copytree(begun[0].parent, tmp_path / "copy")
    path = tmp_path / "copy" / "config.yaml"
    path.write_text(path.read_text().replace(str(begun[0].parent), str(tmp_path / "copy")))
    return path, tmp_path / "copy" / "run"


def resume(path, *more):
    return main(["train", str(path), "--resume", "--train.steps", "3", *more])


@pytest.mark.long
def test_template_and_stop_ids_go_into_the_run_and_its_export(begun, tmp_path):
    out = tmp_path / "out"
    assert main(["export", str(begun[1]), str(out)]) == 0
    for folder in (begun[1] / "model", out):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.chat_template == CHATML
        assert stop_ids(folder, tokenizer) == (2, IM_END)
        asked = tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False,
                                              add_generation_prompt=True)  # fmt: skip
        assert asked == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert read_tree(begun[1] / "config.yaml")["data"]["chat_template"] == CHATML


@pytest.mark.long
def test_evaluate_and_generate_write_prompts_as_the_run_was_trained(begun, tmp_path, capsys):
    data = str(begun[0].parent / "pairs.jsonl")

    def scored(*more):
        assert main(["evaluate", str(begun[1]), "--data", data, *more]) == 0
        return json.loads(capsys.readouterr().out)

    own, same, other = scored(), scored("--chat-template", CHATML), scored("--chat-template", OWN)
    assert own["logprobs/chosen"] == same["logprobs/chosen"] != other["logprobs/chosen"]
    out = tmp_path / "outputs.json"
    command = [
        "generate",
        str(begun[1]),
        "--data",
        data,
        "--out",
        str(out),
        "--max-new-tokens",
        "2",
    ]
    assert main(command) == 0
    assert len(json.loads(out.read_text())) == len(ROWS)


@pytest.mark.long
def test_a_template_file_that_changed_or_went_is_named_and_not_taken(run, capsys):
    path, folder = run
    (folder.parent / "own.jinja").write_text(OWN)
    assert resume(path) == 0
    said = capsys.readouterr().err
    assert "data.chat_template" in said
    assert "own.jinja has changed since the run began" in said
    assert "going on from step 2 of 3" in said
    (folder.parent / "own.jinja").unlink()
    assert main(["train", str(path), "--resume", "--train.steps", "4"]) == 0
    assert "own.jinja is gone" in capsys.readouterr().err
    assert read_tree(folder / "config.yaml")["data"]["chat_template"] == CHATML


def test_rows_that_changed_are_named(run, capsys):
    path, folder = run
    data = folder.parent / "pairs.jsonl"
    data.write_text(pairs([{**ROWS[0], "chosen": "maybe"}, *ROWS[1:]]))
    assert resume(path) == 2
    said = capsys.readouterr().err
    assert "data.train: pairs.jsonl changed" in said
    assert "--allow-changes" in said
    assert resume(path, "--allow-changes") == 0
    assert "the data have changed" in capsys.readouterr().err


@pytest.mark.long
def test_the_day_does_not_change_under_a_run(tmp_path, model, monkeypatch, capsys):
    def on(day):
        class Fixed(datetime.date):
            @classmethod
            def today(cls):
                return datetime.date.fromisoformat(day)

        monkeypatch.setattr(pinned.datetime, "date", Fixed)

    on("2026-11-26")
    path, folder = started(tmp_path, model, template=DATED)
    assert read_tree(folder / "config.yaml")["date"] == "2026-11-26"
    on("2026-11-27")
    assert resume(path) == 0
    assert "going on from step 2 of 3" in capsys.readouterr().err
    assert read_tree(folder / "config.yaml")["date"] == "2026-11-26"
    # What the day would have done: the rows are others, and it is said.
    assert main(["train", str(path), "--resume", "--train.steps", "4", "--date", "2026-11-27"]) == 2
    assert "date: 2026-11-26 -> 2026-11-27" in capsys.readouterr().err
    assert main(["train", str(path), "--date", "tomorrow"]) == 2
    assert "date='tomorrow': expected a day" in capsys.readouterr().err


@pytest.mark.long
def test_model_files_that_changed_are_named_and_not_taken(tmp_path, model, capsys):
    own = tmp_path / "model"
    shutil.copytree(model, own)
    path, folder = started(tmp_path, own)
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|im_end|>"}))
    assert resume(path) == 0
    said = capsys.readouterr().err
    assert f"{own / 'tokenizer_config.json'} has changed since the run began" in said
    assert load_tokenizer(folder / "model").eos_token == "</s>"


@pytest.mark.long
def test_a_run_keeps_the_dtype_it_began_with_on_another_machine(
    model, tmp_path, monkeypatch, capsys
):
    """``auto`` would be another one there; a dtype that is named is a change that is said."""
    with monkeypatch.context() as accelerator:
        accelerator.setattr(pinned, "compute_dtype_of", lambda *_: "bfloat16")
        path, folder = started(tmp_path, model)
    said = "model.compute_dtype: products are taken in bfloat16"
    assert f"{said} (weights are stored in float32" in capsys.readouterr().err
    assert read_tree(folder / "config.yaml")["model"]["compute_dtype"] == "bfloat16"
    assert resume(path) == 0
    assert f"{said} (as the run began; auto)" in capsys.readouterr().err
    assert read_tree(folder / "config.yaml")["model"]["compute_dtype"] == "bfloat16"
    assert resume(path, "--train.steps", "4", "--model.compute_dtype", "float32") == 0
    assert "model.compute_dtype: bfloat16 -> float32" in capsys.readouterr().err
