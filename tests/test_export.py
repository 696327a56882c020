"""What leaves a run: weights of a dtype and in shards, the tokenizer, and a model card of the run's own files."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

import dpojax
from dpojax.cli import main
from dpojax.configs import ExportConfig
from dpojax.errors import UserError
from dpojax.models import Model, load_model, load_tokenizer, save_model
from dpojax.models.families.base import with_earlier_rope
from dpojax.models.safetensors import CARD_MARK, SHARD_BYTES, SafetensorsSource
from dpojax.options import bytes_of
from dpojax.train.by_name import load_policy
from dpojax.train.card import code, model_card
from tests.conftest import HF_CONFIG, write_rows

STEPS = ("--batch-size", "8", "--max-shapes", "1", "--warmup-steps", "0", "--learning-rate", "0.01")


@pytest.fixture(scope="module")
def run(tiny_dir, pairs_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "run"
    flags = (*STEPS, "--loss", "sigmoid+0.2*sft", "--beta", "0.3", "--filter", "prompt!=x", "--steps", "2")
    held_out = ("--eval-data", pairs_file, "--eval-steps", "1")
    assert main(["dpo", "--model", tiny_dir, "--data", pairs_file, "--output", str(out), *flags, *held_out]) == 0
    return out


def export(run, output, *flags):
    return main(["export", "--run", str(run), "--output", str(output), *flags])


def parts_of(card: str) -> tuple[dict, dict[str, str]]:
    """The front matter, and the sections by their headings."""
    _, front, text = card.split("---\n", 2)
    headed = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return yaml.safe_load(front), dict(zip(headed[1::2], headed[2::2], strict=True))


def test_names_shapes_and_values_come_back(tiny_dir, run, tmp_path):
    assert export(run, tmp_path / "m") == 0
    theirs, ours = SafetensorsSource(Path(tiny_dir)), SafetensorsSource(tmp_path / "m")
    assert sorted(ours.names) == sorted(theirs.names)
    assert all(ours.shape(name) == theirs.shape(name) for name in theirs.names)
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == HF_CONFIG | {"dtype": "float32"}
    assert load_tokenizer(str(tmp_path / "m")).chat_template == load_tokenizer(tiny_dir).chat_template


@pytest.mark.parametrize(("dtype", "code"), [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_weights_are_of_the_dtype(run, tmp_path, dtype, code):
    assert export(run, tmp_path / "m", "--dtype", dtype) == 0
    source = SafetensorsSource(tmp_path / "m")
    assert {source.dtype(name) for name in source.names} == {code}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == dtype


def test_files_are_at_most_the_shard_size(run, tmp_path):
    assert export(run, tmp_path / "m", "--max-shard-size", "20KB") == 0
    source = SafetensorsSource(tmp_path / "m")
    sizes = dict.fromkeys(source.names.values(), 0)
    for name, path in source.names.items():
        sizes[path] += 4 * int(np.prod(source.shape(name)))
    alone = {path for name, path in source.names.items() if 4 * np.prod(source.shape(name)) > 20_000}
    assert len(sizes) > 2 and all(size <= 20_000 for path, size in sizes.items() if path not in alone)
    assert len(alone) == 1  # the embedding is larger, and has a file of its own
    assert load_model(str(tmp_path / "m")).config == load_policy(str(run)).config


def test_the_default_is_one_number():
    assert bytes_of(ExportConfig.max_shard_size) == SHARD_BYTES


@pytest.mark.parametrize("size", ["0GB", "five", "-1MB", "5XB", ""])
def test_a_size_that_is_none_is_refused(run, tmp_path, capsys, size):
    assert export(run, tmp_path / "m", f"--max-shard-size={size}") == 2
    assert f"--max-shard-size {size}: must be a size above 0, as in 5GB, 500MB or 2GiB" in capsys.readouterr().err


def test_what_float16_cannot_hold_is_refused_and_nothing_is_written(config, params, tmp_path):
    large = {**params, "embed": params["embed"].at[3, 4].set(7e4)}
    says = r"--dtype float16: tensor model.embed_tokens.weight holds 70000, and the largest number of float16 is 65504"
    with pytest.raises(UserError, match=says):
        save_model(Model(config, large, HF_CONFIG), tmp_path / "m", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_an_older_export_is_replaced_whole(run, tmp_path):
    old = tmp_path / "m"
    assert export(run, old, "--max-shard-size", "20KB") == 0
    for name in ("README.md", "generation_config.json", "merges.txt", "chat_template.jinja"):
        (old / name).write_text("of another model")
    (old / "notes.txt").write_text("mine")
    assert export(run, old) == export(run, tmp_path / "new") == 0
    names = lambda path: {file.name for file in path.iterdir()}  # noqa: E731
    assert names(old) == names(tmp_path / "new") | {"notes.txt"}
    assert CARD_MARK in (old / "README.md").read_text()


def test_without_a_card_ours_goes_and_anothers_stays(config, params, run, tmp_path):
    assert export(run, tmp_path / "ours") == 0
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "README.md").write_text("my model")
    for name in ("ours", "theirs"):
        save_model(Model(config, params, HF_CONFIG), tmp_path / name)
    assert [(tmp_path / name / "README.md").exists() for name in ("ours", "theirs")] == [False, True]


def test_the_card_says_what_the_run_was(run, tiny_dir, pairs_file, tmp_path):
    assert export(run, tmp_path / "my_model") == 0
    card = (tmp_path / "my_model" / "README.md").read_text()
    front, sections = parts_of(card)
    tags = ["dpojax", "preference-optimization", "dpo", "sft"]
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    own = json.loads((run / "run.json").read_text())
    assert r"# my\_model" in card and f"The policy of step 2 of the run `{run.name}`" in card
    for section, said in {
        "Base model": [f"`{tiny_dir}`", own["model_hash"], own["reference_hash"]],
        "Data": [f"`{pairs_file}`", "in an epoch: 24\n", "filter: `prompt!=x`", f"held out: `{pairs_file}`"],
        "Objective": ["`sigmoid+0.2*sft`", "log σ(β h)", "Rafailov et al. 2023", "Beta: 0.3."],
        "Options": ["- `--learning-rate`: `0.01`", "- `--steps`: `2`", f"with `dpojax {dpojax.__version__}, python"],
        "How to load it": ["AutoModelForCausalLM.from_pretrained"],
    }.items():
        assert all(text in sections[section] for text in said), (section, sections[section])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = next(line for line in lines if line["step"] == 2 and "eval_loss" in line)
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"):
        assert f"| `{name}` | " in sections["Held-out figures"]
        assert f" {figures[name]:.6g} |" in sections["Held-out figures"]


def test_a_step_that_was_not_evaluated_is_not_given_anothers_figures(run):
    _, sections = parts_of(model_card(run, 7))
    assert sections["Held-out figures"].startswith("\nStep 7 was not evaluated; these are of step 2.\n")


@pytest.mark.parametrize(
    ("flags", "front", "says"),
    [
        (("--loss", "reward_model"), ("text-classification", ["dpojax", "reward-model", "reward_model"]), "SequenceC"),
        (("--lora-rank", "2"), ("text-generation", ["dpojax", "preference-optimization", "dpo", "lora"]), "the base: "),
        (("--train-top-layers", "1"), ("text-generation", ["dpojax", "preference-optimization", "dpo"]), "--train-top"),
    ],
    ids=["reward", "lora", "top layers"],
)  # fmt: skip
def test_every_kind_of_run_has_a_card(tiny_dir, pairs_file, tmp_path, flags, front, says):
    args = ["--model", tiny_dir, "--data", pairs_file, "--output", str(tmp_path / "run"), *STEPS, "--steps", "1"]
    assert main(["dpo", *args, *flags]) == export(tmp_path / "run", tmp_path / "m") == 0
    card = (tmp_path / "m" / "README.md").read_text()
    raw, sections = parts_of(card)
    assert (raw["pipeline_tag"], raw["tags"]) == front and says in card
    assert sections["Held-out figures"] == "\nThe run held no data out.\n\n"


def test_sft_has_a_card(tiny_dir, pairs_file, tmp_path):
    args = ["--model", tiny_dir, "--data", pairs_file, "--output", str(tmp_path / "run"), *STEPS, "--steps", "1"]
    assert main(["sft", *args]) == export(tmp_path / "run", tmp_path / "m") == 0
    front, sections = parts_of((tmp_path / "m" / "README.md").read_text())
    assert front["tags"] == ["dpojax", "sft"] and "`dpojax sft`, objective `sft`" in sections["Objective"]
    assert "Beta" not in sections["Objective"]


def test_an_adapter_has_a_card_for_peft(tiny_dir, pairs_file, tmp_path, capsys):
    args = ["--model", tiny_dir, "--data", pairs_file, "--output", str(tmp_path / "run"), *STEPS, "--steps", "1"]
    assert main(["dpo", *args, "--lora-rank", "2"]) == export(tmp_path / "run", tmp_path / "m", "--adapter") == 0
    front, _ = parts_of((tmp_path / "m" / "README.md").read_text())
    assert front["library_name"] == "peft"
    assert export(tmp_path / "run", tmp_path / "m") == 2
    assert "holds an adapter, and only one can be meant; name another directory" in capsys.readouterr().err
    assert export(tmp_path / "run", tmp_path / "o", "--adapter", "--max-shard-size", "1GB") == 2
    assert "--max-shard-size 1GB: an adapter is one file" in capsys.readouterr().err


STRANGE = 'a: "b"\n---\n# `x` | [y](z) <b>\u2028\udc80\'*'


def test_text_of_a_run_breaks_neither_yaml_nor_markdown(run, tmp_path):
    """A run's options are a user's text: names of files, filters, spellings."""
    strange = tmp_path / "strange"
    (strange / "model").mkdir(parents=True)
    (strange / "model" / "config.json").write_text(json.dumps(HF_CONFIG))
    own = json.loads((run / "run.json").read_text()) | {"model": STRANGE, "data": [STRANGE, "hub:a/b,split=x=0.5"]}
    own |= {"filter": [STRANGE], "loss": "nothing of ours(", "somebody": STRANGE, "base_hash": STRANGE}
    (strange / "run.json").write_text(json.dumps(own))
    card = model_card(strange, 2, title=STRANGE)
    card.encode()
    front, sections = parts_of(card)
    assert front["datasets"] == ["a/b"] and "base_model" not in front
    assert list(sections) == ["Base model", "Data", "Objective", "Options", "Held-out figures", "How to load it"]
    assert sections["Base model"].splitlines()[1] == f"- model: {code(STRANGE)}"
    assert code(STRANGE) == '`` a: "b"\\n---\\n# `x` | [y](z) <b>\\u2028\\udc80\'* ``'


def test_a_hub_id_is_the_base_in_the_front_matter(run, tmp_path):
    hub = tmp_path / "hub"
    (hub / "model").mkdir(parents=True)
    (hub / "model" / "config.json").write_text(json.dumps(HF_CONFIG))
    own = json.loads((run / "run.json").read_text()) | {"model": "owner/name-1.5B"}
    (hub / "run.json").write_text(json.dumps(own))
    assert parts_of(model_card(hub, 2))[0]["base_model"] == "owner/name-1.5B"


def test_a_file_of_the_users_is_named_and_not_executed(run, tmp_path):
    other = tmp_path / "run"
    (other / "model").mkdir(parents=True)
    (other / "model" / "config.json").write_text(json.dumps(HF_CONFIG))
    own = json.loads((run / "run.json").read_text()) | {"loss": "gone.py:mine+0.1*ipo", "hash of gone.py": "0f"}
    (other / "run.json").write_text(json.dumps(own))
    objective = parts_of(model_card(other, 2))[1]["Objective"]
    assert (
        "`gone.py:mine`: a function of the user's own file, whose hash is `0f`" in objective and "- `ipo`" in objective
    )


def test_rows_of_an_epoch_are_those_that_were_trained_on(tiny_dir, tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(11)]
    data = write_rows(tmp_path / "d.jsonl", rows)
    args = ["--model", tiny_dir, "--data", data, "--output", str(tmp_path / "run"), *STEPS, "--epochs", "2"]
    assert main(["dpo", *args]) == 0
    assert "in an epoch: 11\n" in parts_of(model_card(tmp_path / "run", 3))[1]["Data"]


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("raw", "earlier"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, {"rope_theta": 1e5}),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        (
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (
            {
                "model_type": "gpt_neox",
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
            },
            {"rotary_emb_base": 1e4, "rotary_pct": 0.25},
        ),
        ({"model_type": "gpt2"}, {}),
    ],
    ids=["default", "llama3", "two kinds", "gpt_neox", "none"],
)
def test_rotary_positions_are_in_the_earlier_fields_too(raw, earlier):
    """Other libraries read no rope_parameters, and would take 10000 for the base without a word."""
    assert with_earlier_rope(raw) == raw | earlier
