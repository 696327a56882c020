"""The sentiment experiment at its smallest size: the quickstart's own code, with a random model."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dpojax.errors import UserError
from dpojax.evaluate.scoring import make_scorer
from dpojax.models import load_model, load_tokenizer
from experiments.sentiment import SentimentConfig, main, make_draw, resolved


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> SentimentConfig:
    return SentimentConfig(preset="tiny", output=str(tmp_path_factory.mktemp("sentiment") / "run"))


@pytest.fixture(autouse=True)
def no_user_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_figures_curves_and_export(config, capsys):
    assert main(config) == 0
    output = Path(config.output)
    results = output / "seed0" / "results.json"
    written = results.read_text()
    before, after = (
        {name: figure["mean"] for name, figure in json.loads(written)["figures"][when].items()}
        for when in ("before", "after")
    )
    by_definition = {"preference accuracy": 0.5, "reward margin": 0.0, "win rate": 0.5, "KL from reference": 0.0}
    assert {name: before[name] for name in by_definition} == by_definition
    assert after.keys() == before.keys() and np.isfinite(list(after.values())).all()
    assert after["reward margin"] != 0 and after["KL from reference"] != 0
    assert (output / "curves.png").read_bytes()[:4] == b"\x89PNG"
    exported, base = load_model(str(output / "seed0" / "exported")), load_model(resolved(config).model)
    assert exported.config == base.config
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), exported.params, base.params)))
    capsys.readouterr()
    assert main(config) == 0  # the same command again finds everything done
    assert "measured already" in capsys.readouterr().out and results.read_text() == written


def test_samplers_log_probabilities_are_the_scorers(config):
    """Those of a sample's tokens as they were drawn are those of a forward pass over the whole completion."""
    name = resolved(config).model
    model, tokenizer = load_model(name), load_tokenizer(name)
    prompts = [tokenizer(text).input_ids[:-1] for text in ("The film is", "I left", "Honestly")]
    draws = make_draw(resolved(config), model, tokenizer, prompts)(model.params, 0, "test")
    scored = make_scorer(model.config, batch_size=8)(model.params, draws.examples, "test")
    np.testing.assert_allclose(draws.logps, scored, atol=1e-3)


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"samples_per_prompt": 0}, "--samples-per-prompt 0: must be at least 1"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path, option, sentence):
    with pytest.raises(UserError, match=sentence):
        resolved(SentimentConfig(preset="tiny", output=str(tmp_path / "run"), **option))
