"""A reference is read from files of another form or dtype; one that computes something else is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dpojax.cli import main
from dpojax.configs import MeshConfig
from dpojax.errors import UserError
from dpojax.models import Model, load_model, new_model, save_model
from dpojax.models.same import difference
from dpojax.sharding import make_mesh
from dpojax.train.by_name import open_policy
from dpojax.train.start import Start, reference_of
from tests.conftest import HF_CONFIG, decoder_config
from tests.models.gguf_files import write_gguf

FLAGS = ("--batch-size", "8", "--max-shapes", "1", "--steps", "1", "--warmup-steps", "0")


def reference(policy, name, longest=None):
    files = open_policy(str(policy))
    return reference_of(Start(files, files.config), str(name), longest)


def saved(path, raw, params, **options):
    save_model(Model(decoder_config(raw), params, raw), path, **options)
    return path


@pytest.mark.parametrize("form", ["gguf", "shards", "bfloat16"])
def test_the_form_of_the_files_changes_nothing(tiny_dir, pairs_file, config, params, tmp_path, capsys, form):
    """The reference is the policy itself: at step 0 the loss is ln 2, or near it where weights are rounded."""
    if form == "gguf":
        ref = write_gguf(tmp_path / "ref.gguf", Model(config, params, HF_CONFIG))
    else:
        options = {"dtype": "bfloat16"} if form == "bfloat16" else {"shard_bytes": 20_000}
        ref = saved(tmp_path / "ref", HF_CONFIG | {"max_position_embeddings": 2048}, params, **options)
    run = tmp_path / "run"
    args = ["--model", tiny_dir, "--data", pairs_file, "--output", str(run), "--eval-data", pairs_file]
    assert main(["dpo", *args, "--ref-model", str(ref), *FLAGS]) == 0, capsys.readouterr().err
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    own = json.loads((run / "run.json").read_text())
    same = own["reference_hash"] == own["model_hash"]
    assert (same, first["eval_loss"] == float(np.float32(np.log(2)))) == (
        (True, True) if form != "bfloat16" else (False, False)
    )
    assert first["eval_loss"] == pytest.approx(np.log(2), abs=0.1)


@pytest.mark.parametrize(
    ("change", "field", "theirs", "ours"),
    [
        ({"hidden_size": 48, "head_dim": 8}, "hidden_size", 48, 32),
        ({"num_hidden_layers": 3}, "num_hidden_layers", 3, 2),
        ({"intermediate_size": 96}, "intermediate_size", 96, 64),
        ({"vocab_size": 400}, "vocab_size", 400, 384),
        ({"num_key_value_heads": 4}, "num_key_value_heads", 4, 2),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta", 5e5, 1e4),
    ],
)
def test_another_shape_is_refused_by_the_fields_name(
    tiny_dir, pairs_file, tmp_path, capsys, change, field, theirs, ours
):
    raw = HF_CONFIG | change
    save_model(dataclasses.replace(new_model(decoder_config(raw)), hf_config=raw), tmp_path / "ref")
    args = ["--model", tiny_dir, "--data", pairs_file, "--output", str(tmp_path / "run"), *FLAGS]
    assert main(["dpo", *args, "--ref-model", str(tmp_path / "ref")]) == 2
    says = (
        f"--ref-model {tmp_path / 'ref'}: its {field} is {theirs}, and that of --model is {ours}; use one of its kind"
    )
    assert says in capsys.readouterr().err


UNTIED = HF_CONFIG | {"tie_word_embeddings": False}


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
def test_an_unembedding_that_equals_the_embedding_may_be_stored_apart(params, tmp_path, sizes):
    tied = saved(tmp_path / "tied", HF_CONFIG, params)
    apart = saved(tmp_path / "apart", UNTIED, {**params, "head": params["embed"]})
    mesh = None if sizes is None else make_mesh(MeshConfig(*sizes))
    for policy, ref in ((tied, apart), (apart, tied)):
        shape, files = reference(policy, ref)
        wanted = load_model(str(policy), mesh=mesh)
        model = files.load(mesh)
        assert shape == files.config == model.config == wanted.config
        jax.tree.map(np.testing.assert_array_equal, model.params, wanted.params)


def test_an_unembedding_of_its_own_is_refused_for_a_tied_policy(tiny_dir, params, tmp_path):
    apart = saved(tmp_path / "apart", UNTIED, {**params, "head": 2 * params["embed"]})
    with pytest.raises(UserError, match="its unembedding differs from its embedding, and --model has one for both"):
        reference(tiny_dir, apart)[1].load(None)


def test_a_window_that_no_text_reaches_is_no_difference():
    config = decoder_config(HF_CONFIG)
    windowed = dataclasses.replace(config, kinds=(dataclasses.replace(config.kinds[0], window=64),))
    assert difference(config, windowed, longest=64) is None
    assert difference(config, windowed, longest=65) == ("layers.0.window", None, 64)


def test_numbers_differ_by_float32s_rounding_alone():
    config = decoder_config(HF_CONFIG)
    near, far = (
        dataclasses.replace(config, norm=dataclasses.replace(config.norm, eps=e))
        for e in (1.0000000e-5 * (1 + 5e-8), 1.1e-5)
    )
    assert difference(config, near) is None and difference(config, far) == ("norm.eps", 1e-5, 1.1e-5)
