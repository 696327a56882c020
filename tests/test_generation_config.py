"""Every EOS of a model stops sampling, and its generation_config.json stays with it: runs, exports, GGUF."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from dpojax.cli import main
from dpojax.errors import UserError
from dpojax.generate import Samples, make_sampler, sample_all
from dpojax.models import as_reward_model, load_model, load_tokenizer, open_model, save_model
from dpojax.train.by_name import load_policy, open_policy
from tests.conftest import HF_CONFIG

VOCAB = HF_CONFIG["vocab_size"]


def directory(tiny_dir: str, path: Path, generation: object = None, **config: object) -> Path:
    """The tiny model, with this generation_config.json and these fields of config.json."""
    shutil.copytree(tiny_dir, path)
    if generation is not None:
        (path / "generation_config.json").write_text(
            generation if isinstance(generation, str) else json.dumps(generation)
        )
    (path / "config.json").write_text(json.dumps(HF_CONFIG | config))
    return path


@pytest.mark.parametrize(
    ("generation", "eos", "expected"),
    [
        (None, 1, (1,)),
        (None, [1, 7], (1, 7)),
        (None, None, (1,)),  # the tokenizer's
        ({"eos_token_id": [7, 9]}, 1, (7, 9, 1)),
        ({"eos_token_id": 9}, 9, (9, 1)),
        ({"eos_token_id": None, "temperature": 0.6}, None, (1,)),
    ],
)
def test_every_eos_is_found(generation, eos, expected, tiny_dir, tmp_path):
    path = str(directory(tiny_dir, tmp_path / "m", generation, eos_token_id=eos))
    model, tokenizer = load_model(path), load_tokenizer(path)
    assert tokenizer.eos_token_id == 1
    assert model.eos_ids(tokenizer) == expected
    assert model.generation_config == (generation or {})


@pytest.mark.parametrize("eos", [-1, VOCAB, "</s>", True, 1.0, [1, None], {"a": 1}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_eos_that_is_no_token_is_one_sentence(file, eos, tiny_dir, tmp_path):
    fields = {"eos_token_id": eos}
    path = directory(tiny_dir, tmp_path / "m", *([fields] if file != "config.json" else []))
    if file == "config.json":
        (path / file).write_text(json.dumps(HF_CONFIG | fields))
    says = f"{file}: eos_token_id .* is no token of the model, which has 384; fix it, or set null"
    files = open_policy(str(path))
    with pytest.raises(UserError, match=f"/{says}"):
        files.eos_ids(load_tokenizer(tiny_dir))
    (note,) = open_model(str(path)).notes
    assert re.search(f"/{says}, before texts are sampled$", note)


def test_an_eos_that_is_no_token_is_refused_by_sampling_alone(tiny_dir, pairs_file, tmp_path, capsys):
    """Log-probabilities, training and exports have the tokenizer's EOS, and say that sampling would refuse."""
    path, run = directory(tiny_dir, tmp_path / "m", {"eos_token_id": 50256}), tmp_path / "run"
    says = "generation_config.json: eos_token_id 50256 is no token of the model, which has 384"
    flags = ["--batch-size", "8", "--steps", "1", "--max-shapes", "1"]
    for command in (["logps", "--output", str(tmp_path / "out.jsonl")], ["dpo", "--output", str(run), *flags]):
        assert main([*command, "--model", str(path), "--data", pairs_file]) == 0
        printed = capsys.readouterr()
        assert says in " ".join((printed.out + printed.err).split())
    assert main(["export", "--run", str(run), "--output", str(tmp_path / "out")]) == 0
    for model in (path, run):
        assert main(["sample", "--model", str(model), "--prompt", "a"]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_a_reward_model_is_not_padded_with_an_eos_that_is_no_token(tiny_dir, tmp_path):
    path = directory(tiny_dir, tmp_path / "m", eos_token_id=50256, pad_token_id=None)
    assert as_reward_model(load_model(str(path))).hf_config["pad_token_id"] is None


@pytest.mark.parametrize(("text", "says"), [("{", "not valid JSON"), ("[]", "not a JSON object")])
def test_a_broken_file_is_one_sentence(text, says, tiny_dir, tmp_path, capsys):
    path = directory(tiny_dir, tmp_path / "m", text)
    assert main(["sample", "--model", str(path), "--prompt", "a"]) == 2
    error = capsys.readouterr().err
    assert "generation_config.json" in error and says in error and error.count("\n") == 1


def test_a_tokenizer_whose_eos_the_model_lacks_is_one_sentence(tiny_dir):
    class Other:
        name_or_path, eos_token_id = "other", VOCAB

    with pytest.raises(UserError, match="other: its EOS has id 384, but the model has 384 embeddings"):
        load_model(tiny_dir).eos_ids(Other())


def greedy(path: str, eos_ids: tuple[int, ...]) -> list[int]:
    """The greedy completion of "the", as the command samples it."""
    model, tokenizer = load_policy(path), load_tokenizer(path)
    prompt = tokenizer("the", add_special_tokens=False)["input_ids"]
    sampler = make_sampler(model.config, max_new_tokens=12, eos_ids=eos_ids, temperature=0.0)
    return sample_all(sampler, model.params, [prompt]).lists()[0][0]


def sampled(capsys, path: Path) -> str:
    """What ``dpojax sample`` prints behind the prompt."""
    capsys.readouterr()
    args = ["--prompt", "the", "--temperature", "0", "--max-new-tokens", "12"]
    assert main(["sample", "--model", str(path), *args]) == 0
    return capsys.readouterr().out.split("the|", 1)[1].removesuffix("\n")


def test_the_command_stops_at_every_eos_and_leaves_it_out(tiny_dir, tmp_path, capsys):
    free = greedy(tiny_dir, ())
    end = next(i for i, token in enumerate(free) if i > 1 and token not in free[:i] and token != 1)
    path = directory(tiny_dir, tmp_path / "m", {"eos_token_id": [1, free[end]]})
    decoded = load_tokenizer(tiny_dir).decode
    assert sampled(capsys, Path(tiny_dir)) == decoded(free, skip_special_tokens=True)
    assert sampled(capsys, path) == decoded(free[:end], skip_special_tokens=True)


def test_a_run_and_its_export_keep_the_file(tiny_dir, pairs_file, tmp_path, capsys):
    generation = {"bos_token_id": 0, "eos_token_id": [1, 40], "temperature": 0.6}
    path, run, out = directory(tiny_dir, tmp_path / "m", generation), tmp_path / "run", tmp_path / "out"
    flags = ["--batch-size", "8", "--steps", "1", "--max-shapes", "1"]
    assert main(["dpo", "--model", str(path), "--data", pairs_file, "--output", str(run), *flags]) == 0
    assert main(["export", "--run", str(run), "--output", str(out)]) == 0
    for kept in (run / "model", out):
        assert json.loads((kept / "generation_config.json").read_text()) == generation
    assert load_policy(str(run)).eos_ids() == load_model(str(out)).eos_ids() == (1, 40)


def test_a_model_without_the_file_leaves_none(tiny_dir, tmp_path):
    path = directory(tiny_dir, tmp_path / "m", {"eos_token_id": [1, 40]})
    save_model(load_model(tiny_dir), path)
    assert not (path / "generation_config.json").exists()


def test_a_reward_model_is_padded_with_one_token(tiny_dir, tmp_path):
    path = directory(tiny_dir, tmp_path / "m", {"eos_token_id": [7, 1]}, eos_token_id=[7, 1], pad_token_id=None)
    model = as_reward_model(load_model(str(path)))
    assert model.hf_config["pad_token_id"] == 7 and model.generation_config == {}


def test_a_gguf_has_one_of_its_metadata(tmp_path):
    from gguf import GGUFWriter

    from dpojax.models.gguf import GGUFFile

    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_bos_token_id(5)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert GGUFFile(tmp_path / "m.gguf").generation_config() == {"bos_token_id": 5, "eos_token_id": [2, 8]}


def test_texts_are_without_the_eos_that_was_drawn():
    class Letters:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join(chr(ord("a") + i) for i in ids)

    tokens, lengths = np.array([[[0, 1, 2], [3, 2, 0]]]), np.array([[3, 2]])
    drawn = Samples(tokens, lengths, np.zeros((1, 2, 3), np.float32), np.array([[False, True]]))
    assert drawn.texts(Letters()) == [["abc", "d"]]
