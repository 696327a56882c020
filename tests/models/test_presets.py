"""Presets have the published models' parameter counts, and transformers' models of the same config.json have them."""

import math

import pytest

from dpojax.models.params import param_specs
from dpojax.models.presets import PRESETS, preset

# Model cards' "Tensor type / model size", in full; of Gemma 3 with images, the language model's share.
PUBLISHED = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "gptj-6b": 6_050_882_784,
    "gpt2-large": 774_030_080,
}


def test_every_preset_has_a_published_count():
    assert set(PRESETS) == set(PUBLISHED)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_as_many_as_published(name):
    config, _ = preset(name)
    assert sum(math.prod(spec.shape) for spec in param_specs(config).values()) == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_has_as_many(name):
    torch = pytest.importorskip("torch", reason="transformers counts with torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = dict(PRESETS[name])
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == PUBLISHED[name]
