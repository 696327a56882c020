"""Plans, checked where the truth can be had: bytes on CPU devices, FLOPs by hand."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from dpojax import cli
from dpojax.configs import DPOConfig, MeshConfig, PlanConfig, SFTConfig
from dpojax.errors import UserError
from dpojax.models import init_params
from dpojax.plan.analysis import estimate
from dpojax.plan.build import abstract_batch, build, devices_of, raw_config, run_options, state_bytes
from dpojax.plan.chips import TPUS, Chip, Topology, topology_of
from dpojax.plan.collectives import Layout, seconds_of
from dpojax.plan.plan import compile_program, make_plan, sentence_of
from dpojax.plan.report import as_json, sections, verdict
from dpojax.plan.search import candidates
from dpojax.plan.workload import full_rows, model_flops, read_lengths, rows_of_lengths
from dpojax.train import initial_state
from dpojax.train.program import abstract_inputs

CPU = Topology(
    "cpu", Chip(flops=1e12, memory=1e12, bandwidth=1e11, link=1e10, cycle_flops=1, dimensions=1, ring=4), (8,)
)
MESH = MeshConfig(data=1, fsdp=4, tensor=2)


def options(model, kind=DPOConfig, **more):
    fixed = {"model": str(model), "data": ("none",), "output": "none", "batch_size": 16, "max_length": 64}
    return kind(**{**fixed, "mesh": MESH, **more})


def built(model, **more):
    return build(options(model, **more), CPU, jax.devices())


def of_device(tree, device):
    """Bytes of arrays that lie on a device."""
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == device]
    return sum(s.data.nbytes for s in shards)


@pytest.mark.parametrize("more", [{}, {"optim": "adamw"}, {"optim_dtype": "bfloat16"}, {"lora_rank": 2}], ids=str)
def test_bytes_of_the_state_are_those_on_a_device(tiny_dir, more):
    found = built(tiny_dir, **more)
    predicted = state_bytes(found)
    shape, program = found.start.config, found.program
    if "lora_rank" in more:
        from dpojax.models import with_adapter

        params = with_adapter(shape, init_params(shape.base, 0, program.mesh), 0, program.mesh)
    else:
        params = init_params(shape, 0, program.mesh)
    state, device = initial_state(program, params), jax.devices()[0]
    assert predicted["parameters"] == of_device((state.params, state.frozen), device)
    assert predicted["optimizer"] == of_device(state.opt_state, device)
    assert predicted["gradients"] == of_device(state.params, device)


def test_state_falls_with_the_devices_that_share_it(tiny_dir):
    each = {n: state_bytes(built(tiny_dir, mesh=MeshConfig(data=8 // n, fsdp=n))) for n in (1, 2, 4, 8)}
    for n in (2, 4, 8):
        for name in ("parameters", "optimizer"):
            # Norms, which are whole everywhere, are all that does not fall.
            assert each[n][name] == pytest.approx(each[1][name] / n, rel=0.05)


@pytest.mark.parametrize(
    "more", [{"reference": "live"}, {"remat": "block"}, {"gradient_accumulation_steps": 2}], ids=str
)
def test_bytes_of_the_step_are_those_of_the_run(tiny_dir, more):
    """Of a step compiled for abstract inputs, and for the arrays of a run."""
    found = built(tiny_dir, **more)
    predicted = make_plan(found)
    program, work = found.program, found.work
    state = initial_state(program, init_params(found.start.config, 0, program.mesh))
    _, batch, ref = abstract_inputs(program, abstract_batch(found))
    batch, ref = jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding), (batch, ref))
    compiled = program.step.lower(state, batch, ref).compile()
    measured = compiled.memory_analysis()
    assert predicted.step.memory["temp"] == pytest.approx(measured.temp_size_in_bytes, rel=0.05)
    lies = of_device((state, batch, ref), jax.devices()[0])
    m = predicted.memory
    assert m["parameters"] + m["optimizer"] + m["batch, results, program"] == pytest.approx(lies, rel=0.05)
    assert m["reference"] == (m["parameters"] if "reference" in more else 0)
    assert predicted.fits and work.real_share == 1


MEASURE = """
import dataclasses, gc, json, re, sys
from pathlib import Path
import jax, numpy as np
from tests.plan.test_plan import CPU, options
from dpojax.configs import MeshConfig
from dpojax.models import init_params
from dpojax.plan.build import abstract_batch, build
from dpojax.plan.plan import make_plan
from dpojax.train import initial_state
from dpojax.train.program import abstract_inputs

config = options(sys.argv[1], mesh=MeshConfig(), batch_size=8, max_length=256, optim="adamw")
found = build(config, dataclasses.replace(CPU, shape=(1,)), jax.devices()[:1])
predicted = make_plan(found)
program = found.program
state = initial_state(program, init_params(found.start.config, 0, program.mesh))
_, batch, ref = abstract_inputs(program, abstract_batch(found))
batch, ref = jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding), (batch, ref))
compiled = program.step.lower(state, batch, ref).compile()
kilobytes = lambda name: int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
for _ in range(2):  # the first has its threads' buffers to make
    gc.collect()
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    state, metrics = jax.block_until_ready(compiled(state, batch, ref))
    peak = 1024 * (kilobytes("VmHWM") - before)
print(json.dumps({"predicted": predicted.step.memory["temp"], "measured": peak}))
"""

LARGE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 4096}
LARGE |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count of a process' memory")
def test_a_steps_memory_is_what_the_process_takes(tmp_path):
    """Measured by the kernel, of a step whose temporaries are most of the process."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **LARGE}))
    env = {name: value for name, value in os.environ.items() if not name.startswith("XLA_")}
    env |= {"JAX_PLATFORMS": "cpu", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "config.json")],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.05)


def test_flops_of_the_step_are_the_models(tiny_dir):
    """Of a step that recomputes nothing: the products of the compiled program, attention's whole blocks apart."""
    found = built(tiny_dir, mesh=MeshConfig(data=8), logprob_chunk_tokens=4096, batch_size=8)
    predicted = make_plan(found)
    a, work = found.start.config.attention, found.work
    # Attention computes whole blocks of scores: of the prompt, and of each completion behind it.
    P, C = work.prompt, work.completion
    blocks = 4 * a.heads * a.head_dim * (P * P + 2 * C * (P + C)) * work.rows * found.start.config.layers
    exact = 4 * a.heads * a.head_dim * work.scores(None) * found.start.config.layers
    assert predicted.flops == pytest.approx((predicted.model.total + 3 * (blocks - exact)) / 8, rel=0.02)
    assert predicted.recomputed == 0


def test_model_flops_of_8b():
    """By hand: 6 FLOPs a parameter and token of the layers, of the unembedding and target, and 12 a score."""
    from dpojax.models.presets import preset

    config, _ = preset("llama3-8b")
    flops = model_flops(config, full_rows(256, 2, 512, 512, 256))
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    scores = 512 * 513 / 2 + 2 * (512 * 512 + 512 * 513 / 2)
    attention = 12 * 32 * 32 * 128 * scores
    assert flops.step == pytest.approx(256 * (6 * 1536 * weights + 6 * 1024 * 4096 * 128256 + attention))
    assert flops.reference == 0
    live = model_flops(config, full_rows(256, 2, 512, 512, 256), live=True)
    assert live.reference == pytest.approx(flops.step / 3)


def test_a_window_and_a_mixture_need_less():
    from dpojax.models.presets import preset

    work = full_rows(64, 2, 4096, 4096, 64)
    assert work.scores(512) < work.scores(None) / 3 and work.scores(8192) == work.scores(None)
    mixture, _ = preset("qwen3-30b-a3b")
    active = model_flops(mixture, full_rows(1, 1, 1, 1, 1)).step / 6 / 2  # of two tokens
    assert 2.8e9 < active < 3.5e9  # "A3B"


def test_rings():
    """An axis that is a ring has two links, an open one one; a whole torus all of them."""
    pod = topology_of("v5e:16x16")
    places = tuple((i // 16, i % 16) for i in range(256))
    layout, link = Layout(("fsdp", "tensor"), (16, 16), pod, places), TPUS["v5e"].link
    row, F = tuple(range(16)), 1e9
    assert layout.axes_of(row) == "tensor" and layout.axes_of((0, 16)) == "fsdp"
    assert seconds_of("all-gather", F, row, layout) == pytest.approx(F * 15 / 16 / (2 * link))
    assert seconds_of("all-reduce", F, row, layout) == pytest.approx(2 * F * 15 / 16 / (2 * link))
    assert seconds_of("all-gather", F, row[:4], layout) == pytest.approx(F * 3 / 4 / link)
    assert seconds_of("reduce-scatter", F, range(256), layout) == pytest.approx(F * 255 / 256 / (4 * link))
    assert seconds_of("collective-permute", F, (0, 15), layout, [(0, 15), (15, 0)]) == pytest.approx(F / link)
    assert not topology_of("v5e:4x4").closes(0) and topology_of("v5p:4x4x8").closes(2)


@pytest.mark.parametrize("name", ["v5e", "v5e:16", "v5p:4x4", "h100:8", "tpu:2x2", "v5e:0x2", "16x16"])
def test_a_topology_that_is_none_is_refused_in_a_sentence(name):
    with pytest.raises(UserError, match=r"--topology .*v5e:16x16"):
        topology_of(name)


def test_topologies():
    assert topology_of("v5p:8x8x8").devices == 512
    assert topology_of("tpu7x:2x2x1").devices == 2 * topology_of("tpu7x:2x2x1").chips == 8
    assert topology_of("H100:2x8").chip.gpu
    clocks = {name: round(chip.clock / 1e9, 2) for name, chip in TPUS.items()}
    assert clocks == {"v4": 1.05, "v5e": 1.5, "v5p": 1.75, "v6e": 1.75, "tpu7x": 2.2}


def test_lengths_are_packed_as_a_run_packs_them(tmp_path):
    file = tmp_path / "lengths.jsonl"
    file.write_text('{"prompt": 90, "completions": [30, 10]}\n{"prompt": 5, "completions": [8, 8]}\n' * 8)
    lengths = read_lengths(str(file), 2, 100)
    assert lengths[0].tolist() == [70, 30, 10]  # the prompt loses its start
    work = rows_of_lengths(lengths, 8, 4, "a file")
    assert work.real_tokens == 8 * (110 + 21) / 2 and 0.5 < work.real_share <= 1
    assert (work.prompt, work.completion, work.sequences) == (70, 30, 4)


@pytest.mark.parametrize(
    "line", ["", "{}", "[1, 2]", '{"prompt": 3, "completions": [4]}', '{"prompt": 0, "completions": [1, 2]}']
)
def test_lengths_that_are_none_are_refused(tmp_path, line):
    file = tmp_path / "lengths.jsonl"
    file.write_text(line and line + "\n")
    with pytest.raises(UserError, match=r"--lengths .*(line 1|is empty).*prompt"):
        read_lengths(str(file), 2, 100)


def planned(capsys, **values):
    status = cli.run(PlanConfig(**values))
    words = capsys.readouterr()
    return status, words.out, words.err


BIG = {"model": "llama3-8b", "dtype": "bfloat16", "optim": "adamw", "batch_size": 64}


def test_a_plan_of_gpus_is_an_analysis(capsys, tmp_path):
    mesh = {"mesh": MeshConfig(data=1, fsdp=64), "remat": "block"}
    file = tmp_path / "plan.json"
    status, out, _ = planned(capsys, **BIG, **mesh, topology="h100:8x8", rows=10_000, json=str(file))
    assert status == 0 and "an analysis, nothing was compiled" in out and "GPU-hours" in out
    assert not re.search(r"compiler's cycles", out)
    found = json.loads(file.read_text())
    assert (
        found["fits"]
        and not found["compiled"]
        and found["memory"]["parameters"] == pytest.approx(4 * 8.03e9 / 64, rel=0.01)
    )


def test_what_does_not_fit_has_status_1(capsys):
    status, out, _ = planned(capsys, **BIG, topology="h100:8x8", mesh=MeshConfig(data=64))
    assert status == 1 and "does not fit: it needs" in out


def test_a_search_finds_what_fits(capsys):
    status, out, _ = planned(capsys, **BIG, topology="h100:1x8", search=2)
    assert status == 0 and re.search(r"ways to run; \d+ could fit by analysis; compiling the best 2", out)


def test_a_search_ranks_what_fits_first(tiny_dir):
    config = options(tiny_dir)
    ranked, tried = candidates(config, CPU, lambda c: build(c, CPU, jax.devices()))
    assert tried > len(ranked) > 4 and {c.built.config.remat for c in ranked} >= {"none", "block"}
    assert all(c.built.program.mesh.size == 8 for c in ranked)
    fitting = [c.seconds for c in ranked if c.fits]
    assert fitting == sorted(fitting)


def test_a_run_is_planned_by_its_own_command(capsys, tiny_dir, tmp_path):
    for kind in (DPOConfig, SFTConfig):
        status = cli.run(options(tiny_dir, kind, output=str(tmp_path / "run"), plan="h100:1x8"))
        out = capsys.readouterr().out
        assert status == 0 and "rows a second" in out and ("sft" if kind is SFTConfig else "sigmoid") in out
    assert not (tmp_path / "run").exists()


def test_a_plans_options_are_those_of_a_run(tiny_dir):
    config = PlanConfig(model=tiny_dir, topology="h100:1x1", loss="kto", lora_rank=4, remat="dots")
    run = run_options(config)
    shared = {f.name for f in dataclasses.fields(PlanConfig)} & {f.name for f in dataclasses.fields(DPOConfig)}
    assert {"loss", "lora_rank", "remat", "mesh", "reference", "batch_size", "max_length"} <= shared
    assert all(getattr(run, name) == getattr(config, name) for name in shared)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model": "no-such-model"}, "the presets are"),
        ({"mesh": MeshConfig(data=3)}, "does not fit 8 devices"),
        ({"mesh": MeshConfig(data=1, tensor=8)}, "--mesh"),
        ({"prompt_length": 5000}, "--prompt-length 5000"),
        ({"batch_size": 12}, "--batch-size"),
        ({"json": "/no/such/directory/plan.json"}, "--json"),
        ({"loss": "no_such_loss"}, "--loss no_such_loss"),
        ({"lengths": "/no/such/file"}, "--lengths /no/such/file"),
        ({"topology": "h100"}, "--topology h100"),
        ({"search": 1, "batch_size": 1}, "--search 1"),
    ],
    ids=str,
)
def test_bad_options_are_one_sentence(capsys, tiny_dir, values, sentence):
    status, _, err = planned(capsys, **({"model": tiny_dir, "topology": "h100:1x8"} | values))
    assert status == 2 and sentence in err and err.startswith("dpojax: ") and err.count("\n") == 1


def test_a_config_alone_is_a_model(tmp_path, tiny_dir):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", **LARGE}))
    assert raw_config(str(file)) == raw_config(str(tmp_path)) and raw_config("llama3-8b")["hidden_size"] == 4096
    for name in (str(file), str(tmp_path)):
        assert built(name).start.config.width == 512


def test_without_libtpu_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match=r"pip install 'dpojax\[plan\]'"):
        devices_of(topology_of("v5e:2x2"))


def test_what_the_compiler_says_of_memory_is_a_sentence():
    said = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM. Used 20G of 15.75G hbm.\n\nTotal hbm usage >= 20G:\n  reserved"
    )
    assert sentence_of(said) == "Ran out of memory on HBM. Used 20G of 15.75G hbm."


def test_a_step_that_the_compiler_refuses_does_not_fit(tiny_dir, monkeypatch, capsys):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM. Used 20G of 15.75G.\nMore")

    found = built(tiny_dir)
    refused = compile_program(found, Lowered())
    assert refused.refused == "Ran out of memory on HBM. Used 20G of 15.75G." and refused.account is None
    monkeypatch.setattr("dpojax.plan.plan.compile_program", lambda built, lowered: refused)
    whole = make_plan(found)
    assert not whole.fits and whole.need == pytest.approx(whole.estimate.total_memory)
    assert verdict(whole) == f"does not fit: the compiler says, {refused.refused}"
    assert [s.title for s in sections(whole)] == ["Memory"] and not as_json(whole)["fits"]


def test_analysis_of_memory_is_near_the_programs(tiny_dir):
    """It decides what is compiled, so it may be wrong by a factor, and by no more."""
    for remat in ("none", "block"):
        found = built(tiny_dir, remat=remat, batch_size=64, max_length=512)
        step = make_plan(found).step.memory
        assert 1 / 3 < estimate(found).total_memory / (step["temp"] + step["argument"]) < 3
