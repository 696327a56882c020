"""Quantised checkpoints: each scheme, packed here anew, is the model of its dequantised weights, on every mesh."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from dpojax.configs import MeshConfig
from dpojax.errors import UserError
from dpojax.models import Model, load_model, save_model
from dpojax.models.weights import file_tensors
from dpojax.sharding import make_mesh
from tests.conftest import HF_CONFIG
from tests.models.test_families import logits, random_model

F8, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
NAMES = {
    np.float32: "F32",
    np.float16: "F16",
    np.int8: "I8",
    np.uint8: "U8",
    np.int32: "I32",
    np.int64: "I64",
    F8: "F8_E4M3",
    E8M0: "F8_E8M0",
}
Parts = dict[str, np.ndarray]
Pack = Callable[[np.ndarray], tuple[Parts, np.ndarray]]
"""A weight ``[out, in]`` -> the tensors that hold it, and what they stand for."""


def write(path: Path, tensors: Parts) -> None:
    """Write safetensors, of dtypes too that NumPy lacks."""
    header, data = {}, b""
    for name, x in tensors.items():
        start, data = len(data), data + np.ascontiguousarray(x).tobytes()
        header[name] = {"dtype": NAMES[x.dtype.type], "shape": x.shape, "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def saved(directory: Path, tensors: Parts, **config) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    write(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(HF_CONFIG | config))
    return str(directory)


def tensors_of(model: Model) -> Parts:
    return {t.name: np.array(t.fetch()) for t in file_tensors(model.params, model.family, model.config)}


def packed_with(pack: Pack, model: Model) -> tuple[Parts, Parts]:
    """The model's files with its layers' matrices quantised, and with the same matrices dequantised."""
    quantised, plain = {}, {}
    for name, x in tensors_of(model).items():
        if x.ndim == 2 and ".layers." in name:
            parts, plain[name] = pack(x)
            quantised |= {f"{name.removesuffix('.weight')}.{part}": y for part, y in parts.items()}
        else:
            quantised[name] = plain[name] = x
    return quantised, plain


def bits_of(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned integers along the last axis as int32 words, the first in the lowest bits."""
    per = 32 // bits
    padded = np.pad(numbers, [(0, 0), (0, -numbers.shape[1] % per)]).astype(np.uint64)
    words = sum(padded[:, i::per] << np.uint64(bits * i) for i in range(per))
    return words.astype(np.uint32).view(np.int32)


def float8(block: Callable, part: str = "weight_scale", dtype=np.float32, ndim: int = 2) -> Pack:
    """Numbers that share a scale in blocks of ``block(shape)``, the last of which may be cut."""

    def pack(w: np.ndarray) -> tuple[Parts, np.ndarray]:
        (n, m), (a, b) = w.shape, block(w.shape)
        # Powers of two, which E8M0 holds.
        scale = (2.0 ** np.random.default_rng(n).integers(-9, -5, (-(-n // a), -(-m // b)))).astype(dtype)
        each = np.kron(scale.astype(np.float32), np.ones((a, b), np.float32))[:n, :m]
        q = (w / each).astype(F8)
        return {"weight": q, part: scale.reshape(scale.shape if ndim == 2 else (1,) * ndim)}, q.astype(
            np.float32
        ) * each

    return pack


def int8(zero: bool) -> Pack:
    def pack(w: np.ndarray) -> tuple[Parts, np.ndarray]:
        scale = (np.abs(w).max(axis=1, keepdims=True) / 100).astype(np.float32)
        z = np.arange(len(w), dtype=np.int8)[:, None] % 7 if zero else np.zeros((len(w), 1), np.int8)
        q = np.clip(np.round(w / scale) + z, -128, 127).astype(np.int8)
        parts = {"weight": q, "weight_scale": scale} | ({"weight_zero_point": z} if zero else {})
        return parts, (q.astype(np.float32) - z) * scale

    return pack


def pack_quantized(bits: int, group: int, zero: bool = False, order: bool = False) -> Pack:
    def pack(w: np.ndarray) -> tuple[Parts, np.ndarray]:
        rng, (n, m) = np.random.default_rng(w.shape[1]), w.shape
        size = group if group > 0 else m
        groups = rng.permutation(m) // size if order else np.arange(m) // size
        scale = rng.uniform(0.01, 0.05, (n, m // size)).astype(np.float32)
        q = rng.integers(0, 2**bits, (n, m))
        z = rng.integers(0, 2**bits, scale.shape) if zero else np.full(scale.shape, 2 ** (bits - 1))
        parts = {"weight_packed": bits_of(q, bits), "weight_scale": scale, "weight_shape": np.array([n, m])}
        if zero:
            parts["weight_zero_point"] = bits_of(z.T, bits).T
        if order:
            parts["weight_g_idx"] = groups.astype(np.int32)
        return parts, ((q - z[:, groups]) * scale[:, groups]).astype(np.float32)

    return pack


def gptq(bits: int, group: int, add: int, order: bool = False) -> Pack:
    def pack(w: np.ndarray) -> tuple[Parts, np.ndarray]:
        rng, (n, m) = np.random.default_rng(w.shape[1]), w.shape
        size = group if group > 0 else m
        groups = rng.permutation(m) // size if order else np.arange(m) // size
        scale = rng.uniform(0.01, 0.05, (m // size, n)).astype(np.float16)
        q, z = rng.integers(0, 2**bits, (m, n)), rng.integers(add, 2**bits, scale.shape)
        parts = {"qweight": bits_of(q.T, bits).T, "qzeros": bits_of(z - add, bits), "scales": scale}
        parts["g_idx"] = groups.astype(np.int32)
        return parts, ((q - z[groups]) * scale.astype(np.float32)[groups]).T.astype(np.float32)

    return pack


def awq(w: np.ndarray) -> tuple[Parts, np.ndarray]:
    rng, (n, m) = np.random.default_rng(w.shape[1]), w.shape
    scale = rng.uniform(0.01, 0.05, (m // 16, n)).astype(np.float16)
    q, z = rng.integers(0, 16, (m, n)), rng.integers(0, 16, scale.shape)

    def words(x: np.ndarray) -> np.ndarray:
        return bits_of(x.reshape(len(x), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(x.shape), 4)

    parts = {"qweight": words(q), "qzeros": words(z), "scales": scale}
    return parts, ((q - z.repeat(16, axis=0)) * scale.astype(np.float32).repeat(16, axis=0)).T.astype(np.float32)


def row_int8(w: np.ndarray) -> tuple[Parts, np.ndarray]:
    largest = np.abs(w).max(axis=1)
    q = np.round(w / largest[:, None] * 127).astype(np.int8)
    parts = {"weight": q, "SCB": largest, "weight_format": np.array(0, np.uint8)}
    return parts, q.astype(np.float32) * largest[:, None] / 127


def four_bits(kind: str, nested: bool) -> Pack:
    def pack(w: np.ndarray) -> tuple[Parts, np.ndarray]:
        rng, blocks = np.random.default_rng(len(w)), w.size // 16
        table, codes = np.sort(rng.normal(size=16)).astype(np.float32), rng.integers(0, 16, w.size).astype(np.uint8)
        state = {"quant_type": kind, "blocksize": 16, "dtype": "bfloat16", "shape": list(w.shape)}
        absmax = rng.uniform(0.05, 0.2, blocks).astype(np.float32)
        parts = {"weight": (codes[::2] << 4 | codes[1::2])[:, None], "weight.quant_map": table}
        if nested:
            inner, outer = rng.integers(0, 256, blocks).astype(np.uint8), -(-blocks // 24)
            parts["weight.nested_quant_map"] = rng.uniform(0, 1, 256).astype(np.float32)
            parts["weight.nested_absmax"] = rng.uniform(0.1, 0.2, outer).astype(np.float32)
            state |= {"nested_blocksize": 24, "nested_dtype": "float32", "nested_offset": 0.25}
            scale = parts["weight.nested_absmax"].repeat(24)[:blocks]
            absmax, parts["weight.absmax"] = parts["weight.nested_quant_map"][inner] * scale + 0.25, inner
        else:
            parts["weight.absmax"] = absmax
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = text
        return parts, (table[codes] * absmax.repeat(16)).reshape(w.shape)

    return pack


def compressed(form: str, **weights) -> dict:
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": {"weights": weights}}}


TENSOR, ROW, BLOCK = (lambda shape: shape), (lambda shape: (1, shape[1])), (lambda shape: (24, 24))
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}
BNB = {"quant_method": "bitsandbytes"}
SCHEMES: dict[str, tuple[dict, Pack]] = {
    "float8 a tensor": ({"quant_method": "compressed-tensors", "format": "float-quantized"}, float8(TENSOR, ndim=1)),
    "float8 a row": (compressed("float-quantized", type="float", num_bits=8, strategy="channel"), float8(ROW)),
    "float8 a group": (compressed("float-quantized", group_size=16), float8(lambda shape: (1, 16))),
    "int8": (compressed("int-quantized", num_bits=8), int8(zero=False)),
    "int8 zero points": (compressed("naive-quantized", num_bits=8), int8(zero=True)),
    "int4": (compressed("pack-quantized", num_bits=4, group_size=16), pack_quantized(4, 16)),
    "int4 zero points": (compressed("pack-quantized", num_bits=4, group_size=8), pack_quantized(4, 8, zero=True)),
    "int4 ordered": (compressed("pack-quantized", num_bits=4), pack_quantized(4, 16, zero=True, order=True)),
    "int8 packed": (compressed("pack-quantized", num_bits=8, strategy="channel"), pack_quantized(8, -1)),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [24, 24]}, float8(BLOCK, "weight_scale_inv")),
    "fp8 e8m0": (
        {"quant_method": "fp8", "weight_block_size": [24, 24]},
        float8(BLOCK, "weight_scale_inv", E8M0),
    ),
    "fp8 a tensor": ({"quant_method": "fp8"}, float8(TENSOR, "weight_scale_inv", ndim=0)),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, float8(ROW)),
    "llm.int8": (BNB | {"load_in_8bit": True}, row_int8),
    "nf4": (BNB | {"load_in_4bit": True}, four_bits("nf4", nested=False)),
    "fp4 nested": (BNB | {"load_in_4bit": True}, four_bits("fp4", nested=True)),
    "gptq": (GPTQ, gptq(4, 16, add=1)),
    "gptq v2": (GPTQ | {"checkpoint_format": "gptq_v2"}, gptq(4, 16, add=0)),
    "gptq ordered": (GPTQ | {"desc_act": True}, gptq(4, 16, add=1, order=True)),
    "gptq 8": ({"quant_method": "gptq", "bits": 8, "group_size": -1}, gptq(8, -1, add=1)),
    "gptq 2": (GPTQ | {"bits": 2}, gptq(2, 16, add=1)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}, awq),
}


@pytest.fixture(scope="module")
def model() -> Model:
    return random_model(HF_CONFIG)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_quantised_model_is_the_model_of_its_dequantised_weights(name, model, tmp_path):
    quantization, pack = SCHEMES[name]
    quantised, plain = packed_with(pack, model)
    got = load_model(saved(tmp_path / "q", quantised, quantization_config=quantization))
    expected = load_model(saved(tmp_path / "plain", plain))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)  # noqa: E731
    jax.tree.map(close, got.params, expected.params)
    tokens = np.random.default_rng(0).integers(0, 384, (1, 20))
    np.testing.assert_allclose(logits(got, tokens), logits(expected, tokens), rtol=1e-4, atol=1e-4)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    parts = load_model(str(tmp_path / "q"), mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, parts.params, got.params)


def test_an_export_is_in_full_precision(model, tmp_path):
    quantised, _ = packed_with(awq, model)
    got = load_model(saved(tmp_path / "q", quantised, quantization_config=SCHEMES["awq"][0]))
    assert "quantization_config" not in got.hf_config
    save_model(got, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, load_model(str(tmp_path / "out")).params, got.params)


def test_gptqs_own_file_names_its_scheme(model, tmp_path):
    quantised, plain = packed_with(SCHEMES["gptq"][1], model)
    directory = saved(tmp_path / "q", quantised)
    with pytest.raises(UserError, match=r"down_proj.g_idx is of dtype I32, and its config.json has no quantiz"):
        load_model(directory)
    (tmp_path / "q" / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 16, "desc_act": False}))
    expected = load_model(saved(tmp_path / "plain", plain)).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), load_model(directory).params, expected)


def test_float8_is_torchs(tmp_path):
    torch = pytest.importorskip("torch", reason="parity of every float8 needs torch")
    from dpojax.models.safetensors import SafetensorsSource

    codes = np.arange(256, dtype=np.uint8)
    write(tmp_path / "model.safetensors", {"a": codes.view(F8)[:, None]})
    got = SafetensorsSource(tmp_path).read("a", (slice(2, 256), slice(0, 1))).astype(np.float32)
    expected = torch.tensor(codes).view(torch.float8_e4m3fn).float().numpy()[2:, None]
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_words_are_those_of_compressed_tensors(symmetric, model, tmp_path):
    """Their compressor packs; their own decompression is what is expected."""
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": symmetric}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))

    def pack(w: np.ndarray) -> tuple[Parts, np.ndarray]:
        scale = torch.tensor(w).reshape(len(w), -1, 16).abs().amax(-1) / 7
        zero = torch.arange(scale.numel()).reshape(scale.shape).remainder(5).to(torch.int8)
        state = {"weight": torch.tensor(w), "weight_scale": scale, "weight_zero_point": zero * (not symmetric)}
        packed = theirs.PackedQuantizationCompressor.compress(state, scheme)
        plain = theirs.PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
        return {name: x.numpy() for name, x in packed.items()}, plain.numpy()

    quantised, plain = packed_with(pack, model)
    got = load_model(saved(tmp_path / "q", quantised, quantization_config=compressed("pack-quantized", **args)))
    expected = load_model(saved(tmp_path / "plain", plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got.params, expected.params)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_are_those_of_bitsandbytes(kind, nested, tmp_path):
    """On a CPU bitsandbytes itself reads rows narrower than a block wrongly, so no matrix here has any."""
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("bitsandbytes.functional")

    def pack(w: np.ndarray) -> tuple[Parts, np.ndarray]:
        options = {"blocksize": 64, "compress_statistics": nested, "quant_type": kind}
        q, state = theirs.quantize_4bit(torch.tensor(w), **options)
        parts = {"weight": q.numpy()} | {f"weight.{k}": v.numpy() for k, v in state.as_dict(packed=True).items()}
        return parts, theirs.dequantize_4bit(q, state).numpy()

    wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8}
    quantised, plain = packed_with(pack, random_model(HF_CONFIG | wide))
    got = load_model(saved(tmp_path / "q", quantised, quantization_config=BNB, **wide))
    expected = load_model(saved(tmp_path / "plain", plain, **wide))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got.params, expected.params)


Q = "model.layers.0.self_attn.q_proj"
FLOAT8 = SCHEMES["float8 a tensor"][0]


@pytest.mark.parametrize(
    ("change", "quantization", "says"),
    [
        (
            {},
            None,
            "down_proj.weight is of dtype F8_E4M3, and its config.json has no quantization_config that explains it",
        ),
        ({f"{Q}.weight_scale": None}, FLOAT8, f"tensor {Q}.weight_scale is missing, without which"),
        ({f"{Q}.weight_scale": np.ones((5, 1), np.float32)}, FLOAT8, "no block size of config.json explains"),
        ({}, {"quant_method": "hqq"}, "quant_method 'hqq' is not read; use the model in full precision, or one of awq"),
        ({}, {"format": "x"}, "quant_method None is not read"),
        ({}, [1], "quantization_config is not a JSON object"),
        ({}, FLOAT8 | {"format": "marlin-24"}, "compressed-tensors with format 'marlin-24' is not read"),
        ({}, FLOAT8 | {"sparsity_config": {"format": "sparse-bitmask"}}, "sparsity format 'sparse-bitmask'"),
        ({}, FLOAT8 | {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config is not read"),
        ({}, GPTQ | {"bits": 3}, "gptq with bits 3 is not read, but 2, 4, 8 is"),
        ({}, {"quant_method": "gptq"}, "quantization_config of gptq has a value that is not understood"),
        ({}, {"quant_method": "fp8", "weight_block_size": [1, 2, 3]}, "of fp8 has a value that is not understood"),
        ({}, {"quant_method": "awq", "version": "GEMV"}, "awq with version 'gemv' is not read"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(change, quantization, says, model, tmp_path):
    tensors, _ = packed_with(SCHEMES["float8 a tensor"][1], model)
    tensors = {name: x for name, x in (tensors | change).items() if x is not None}
    with pytest.raises(UserError, match=says.replace("[", r"\[")) as error:
        load_model(saved(tmp_path / "q", tensors, **({"quantization_config": quantization} if quantization else {})))
    assert "\n" not in str(error.value)


def test_activations_scales_are_known_and_named(model, tmp_path, capsys):
    tensors, _ = packed_with(SCHEMES["float8 a tensor"][1], model)
    tensors |= {f"{Q}.input_scale": np.ones(1, np.float32), f"{Q[:-6]}k_scale": np.ones(1, np.float32)}
    load_model(saved(tmp_path / "q", tensors, quantization_config=FLOAT8))
    assert "weights alone are quantised here; 2 tensors (model.layers.0.self_attn.k_scale, " in capsys.readouterr().out
