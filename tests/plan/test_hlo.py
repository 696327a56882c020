"""The parser of compiled programs: trip counts, FLOPs, traffic and groups of devices."""

import jax
import jax.numpy as jnp
import pytest

from dpojax.plan.account import exposed_of
from dpojax.plan.collectives import Collective, Layout, collectives_of, group_of
from dpojax.plan.flops import Visits, flops_of, kernel_flops, product_flops
from dpojax.plan.hlo import executed, parse, runs_of
from dpojax.plan.traffic import memory_bytes

# As a TPU's compiler prints a scan of three layers: no known_trip_count, a slice inside of a fusion, attributes that go
# on over lines, and a product as a convolution whose window runs over heads.
TPU = """HloModule jit_f, is_scheduled=true

%fused (param_0: bf16[3,8,4], param_1: s32[]) -> bf16[8,4] {
  %param_0 = bf16[3,8,4]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %slice = bf16[1,8,4]{2,1,0} dynamic-slice(%param_0, %param_1, %zero, %zero), dynamic_slice_sizes={1,8,4}
  ROOT %layer = bf16[8,4]{1,0} bitcast(%slice)
}

%heads (a: bf16[16,1,32], b: bf16[32,2,8]) -> bf16[16,2,8] {
  %a = bf16[16,1,32]{2,1,0} parameter(0)
  %b = bf16[32,2,8]{2,1,0} parameter(1)
  ROOT %dot = bf16[16,2,8]{2,1,0} convolution(%a, %b), window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=b0f_i0o->b0f
}

%cond (arg.1: (s32[], bf16[3,8,4])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[3,8,4]{2,1,0}) parameter(0)
  %three = s32[]{:T(128)} constant(3)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %three), direction=LT
}

%body (arg.2: (s32[], bf16[3,8,4])) -> (s32[], bf16[3,8,4]) {
  %arg.2 = (s32[]{:T(128)}, bf16[3,8,4]{2,1,0}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  %w = bf16[3,8,4]{2,1,0} get-tuple-element(%arg.2), index=1
  %one = bf16[8,4]{1,0} fusion(%w, %i.2), kind=kLoop, calls=%fused, frontend_attributes={kernel_metadata={
"note":"{}"
}}, metadata={op_name="jit(f)/slice" stack_frame_id=2}, backend_config={"window_config":{"estimated_cycles":"70"}}
  %on = bf16[8,4]{1,0:T(8,128)S(1)} copy(%one), backend_config={"window_config":{"estimated_cycles":"30"}}
  ROOT %out = (s32[]{:T(128)}, bf16[3,8,4]{2,1,0}) tuple(%i.2, %w)
}

ENTRY %main (p.0: bf16[3,8,4], p.1: bf16[16,1,32], p.2: bf16[32,2,8]) -> bf16[16,2,8] {
  %p.0 = bf16[3,8,4]{2,1,0} parameter(0)
  %p.1 = bf16[16,1,32]{2,1,0} parameter(1)
  %p.2 = bf16[32,2,8]{2,1,0} parameter(2)
  %nought = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, bf16[3,8,4]{2,1,0}) tuple(%nought, %p.0)
  %loop = (s32[]{:T(128)}, bf16[3,8,4]{2,1,0}) while(%start), condition=%cond, body=%body
  ROOT %product = bf16[16,2,8]{2,1,0} fusion(%p.1, %p.2), kind=kOutput, calls=%heads, metadata={op_name="jit(f)/dot"}
}

FileNames
1 "/somewhere/else/optax/update.py"
2 "/somewhere/dpojax/models/block.py"

FunctionNames
1 "apply"
2 "project.<locals>.inner"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=78 end_line=78 column=1 end_column=2}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}
"""


@pytest.fixture(scope="module")
def module():
    return parse(TPU)


def test_a_loops_passes_stand_in_its_condition(module):
    runs = runs_of(module)
    assert (runs.trips, runs.unknown) == ({"loop": 3}, ())
    assert runs.times == {"main": 1, "body": 3}


@pytest.mark.parametrize(
    ("start", "limit", "step", "passes"), [(0, 3, 1, 3), (0, 8, 2, 4), (0, 7, 2, 4), (2, 8, 3, 2), (5, 3, 1, 0)]
)
@pytest.mark.parametrize("fused", [False, True])
def test_a_loop_may_count_by_another_step(start, limit, step, passes, fused):
    added = "add(%i, %by)" if not fused else "fusion(%i, %by), kind=kLoop, calls=%more"
    text = f"""
%more (a: s32[], b: s32[]) -> s32[] {{
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %sum = s32[] add(%a, %b)
}}

%cond (arg: (f32[], s32[])) -> pred[] {{
  %arg = (f32[], s32[]) parameter(0)
  %at = s32[] get-tuple-element(%arg), index=1
  %limit = s32[] constant({limit})
  ROOT %lt = pred[] compare(%at, %limit), direction=LT
}}

%body (arg.1: (f32[], s32[])) -> (f32[], s32[]) {{
  %arg.1 = (f32[], s32[]) parameter(0)
  %x = f32[] get-tuple-element(%arg.1), index=0
  %i = s32[] get-tuple-element(%arg.1), index=1
  %by = s32[] constant({step})
  %next = s32[] {added}
  ROOT %out = (f32[], s32[]) tuple(%x, %next)
}}

ENTRY %main (p: f32[]) -> (f32[], s32[]) {{
  %p = f32[] parameter(0)
  %first = s32[] constant({start})
  %start = s32[] copy(%first)
  %before = (f32[], s32[]) tuple(%p, %start)
  ROOT %loop = (f32[], s32[]) while(%before), condition=%cond, body=%body
}}
"""
    assert runs_of(parse(text)).trips == {"loop": passes}


def test_cycles_count_as_often_as_they_run(module):
    assert sum(times * (i.cycles or 0) for _, i, times in executed(module, runs_of(module))) == 3 * (70 + 30)


def test_attributes_over_several_lines_are_one_instructions(module):
    one = module.computations["body"].by_name["one"]
    assert one.op_name == "jit(f)/slice"
    assert module.source(one) == ["optax/update.py:7 apply", "dpojax/models/block.py:78 project.inner"]
    assert module.line(one) == "models/block.py:78 project.inner"


def test_a_window_over_heads_counts_what_meets_an_input(module):
    product = module.computations["heads"].by_name["dot"]
    assert product_flops(module.computations["heads"], product) == 2 * 16 * 32 * 2 * 8
    assert flops_of(module, runs_of(module)).total == 2 * 16 * 32 * 2 * 8


def test_a_slice_is_read_and_not_what_it_is_of(module):
    layer = 8 * 4 * 2
    product = 2 * (16 * 32 + 32 * 2 * 8 + 16 * 2 * 8)
    # The fusion reads a layer and an index and writes a layer; the copy reads one and writes to the core's own memory.
    assert memory_bytes(module, runs_of(module)) == 3 * (2 * layer + 4 + layer) + product


HANDED_ON = """HloModule jit_g, is_scheduled=true

%nested (n.0: bf16[3,8,4], n.1: s32[]) -> bf16[1,8,4] {
  %n.0 = bf16[3,8,4]{2,1,0} parameter(0)
  %n.1 = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %part = bf16[1,8,4]{2,1,0} dynamic-slice(%n.0, %n.1, %z, %z), dynamic_slice_sizes={1,8,4}
}

%outer (o.0: bf16[3,8,4], o.1: s32[], o.2: bf16[64,4]) -> (bf16[1,8,4], bf16[64,4]) {
  %o.0 = bf16[3,8,4]{2,1,0} parameter(0)
  %o.1 = s32[] parameter(1)
  %o.2 = bf16[64,4]{1,0} parameter(2)
  %in = bf16[1,8,4]{2,1,0} fusion(%o.0, %o.1), kind=kLoop, calls=%nested
  ROOT %both = (bf16[1,8,4]{2,1,0}, bf16[64,4]{1,0}) tuple(%in, %o.2)
}

ENTRY %main (p.0: bf16[3,8,4], p.1: s32[], p.2: bf16[64,4]) -> (bf16[1,8,4], bf16[64,4]) {
  %p.0 = bf16[3,8,4]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %p.2 = bf16[64,4]{1,0} parameter(2)
  ROOT %f = (bf16[1,8,4]{2,1,0}, bf16[64,4]{1,0}) fusion(%p.0, %p.1, %p.2), kind=kLoop, calls=%outer
}
"""


def test_what_a_fusion_hands_on_is_not_moved():
    module = parse(HANDED_ON)
    layer = 8 * 4 * 2
    assert memory_bytes(module, runs_of(module)) == 2 * layer + 4  # the slice twice, and its index


def compiled(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile().as_text()


def test_a_scan_has_the_flops_of_its_layers_written_out():
    def layer(x, w):
        return jnp.tanh(x @ w), None

    def loss(x, w, scanned):
        x = jax.lax.scan(layer, x, w)[0] if scanned else layer(layer(x, w[0])[0], w[1])[0]
        return jnp.sum(x**2)

    shapes, flops = ((4, 128, 64), (2, 64, 64)), []
    for scanned in (True, False):
        text = compiled(jax.grad(lambda x, w, s=scanned: loss(x, w, s), argnums=(0, 1)), *shapes)
        module = parse(text)
        flops.append(flops_of(module, runs_of(module)).total)
    assert flops[0] == flops[1] == 3 * 2 * (2 * 4 * 128 * 64 * 64)


def test_an_alternation_is_weighed_by_its_shares():
    def f(i, x):
        return jax.lax.switch(i, [lambda x: x @ x, lambda x: x], x)

    text = jax.jit(f).lower(jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((32, 32), jnp.float32))
    module = parse(text.compile().as_text())
    flops = [flops_of(module, runs_of(module, shares)).total for shares in ((), (0.25, 0.75))]
    assert flops == [0.5 * 2 * 32**3, 0.25 * 2 * 32**3]


@pytest.mark.parametrize(
    ("printed", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("replica_groups={}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("source_target_pairs={{0,1},{1,2},{2,0},{3,4},{4,5},{5,3}}", (0, 1, 2)),
    ],
)
def test_every_form_of_groups(printed, group):
    line = f"  %r = f32[8]{{0}} all-reduce(%x), channel_id=1, {printed}, use_global_device_ids=true"
    module = parse("ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n" + line + "\n}\n")
    assert group_of(module.computations["main"].by_name["r"], 8) == group


KERNEL = (
    "  %splash_mha_{kind}_segmented.1 = (bf16[4,8,1536,128]{{3,2,1,0}}) custom-call(%a), "
    'custom_call_target="tpu_custom_call", operand_layout_constraints={{s8[1,3,{grid}]{{2,1,0}}, '
    "bf16[4,8,1536,128]{{3,2,1,0}}, bf16[4,2,1536,128]{{3,2,1,0}}}}, backend_config={{}}"
)


@pytest.mark.parametrize(("kind", "grid", "products"), [("fwd_residuals", 2, 2), ("dq", 2, 3), ("dkv", 3, 4)])
def test_kernels_count_the_blocks_that_they_visit(kind, grid, products):
    text = "ENTRY %main (a: f32[]) -> f32[] {\n" + KERNEL.format(kind=kind, grid=grid) + "\n}\n"
    kernel = parse(text).computations["main"].instructions[0]
    block = 2 * products * 512 * 512 * 128 * 4 * 8
    assert kernel_flops(kernel) == 3 * grid * block
    # A prompt of 512 and two completions of 512: the prompt's block, and of either completion its own and the prompt's.
    assert kernel_flops(kernel, Visits(512, 512)) == 5 * block
    assert kernel_flops(kernel, Visits(512, 512, windows=(None, 1))) == (5 + 3) / 2 * block


def test_a_ragged_products_rows_go_through_one_expert_each():
    text = (
        "ENTRY %main (a: f32[]) -> f32[] {\n  %ragged-dot-none.7 = bf16[3072,96]{1,0} custom-call(%a), "
        'custom_call_target="tpu_custom_call", operand_layout_constraints={s32[5]{0}, bf16[3072,256]{1,0}, '
        "bf16[4,256,96]{2,1,0}}, backend_config={}\n}\n"
    )
    kernel = parse(text).computations["main"].instructions[0]
    assert kernel_flops(kernel) == 2 * 3072 * 256 * 96
    assert kernel_flops(kernel, Visits(experts=16)) == 2 * 3072 * 256 * 96 / 4


CHAIN = """
%begins (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %gather.1 = f32[8]{0} all-gather(%a), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %started = f32[4]{0} custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.2 (b: f32[4]) -> f32[4] {
  %b = f32[4]{0} parameter(0)
  %gather.2 = f32[8]{0} all-gather(%b), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %product = f32[4]{0} negate(%b)
}

%ends (c: f32[4]) -> f32[8] {
  %c = f32[4]{0} parameter(0)
  %gather.3 = f32[8]{0} all-gather(%c), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
  ROOT %done = f32[8]{0} custom-call(%gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  %sum.1 = f32[4]{0} all-reduce(%p), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %sum.2 = f32[4]{0} all-reduce(%sum.1), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %one = f32[4]{0} fusion(%sum.2), kind=kCustom, calls=%begins
  %two = f32[4]{0} fusion(%one), kind=kOutput, calls=%async_collective_fusion.2
  ROOT %three = f32[8]{0} fusion(%two), kind=kCustom, calls=%ends
}
"""


def test_a_collective_over_several_fusions_is_one_and_two_of_one_channel_are_two():
    module = parse(CHAIN)
    found = collectives_of(module, runs_of(module), Layout(("fsdp", "tensor"), (4, 2)))
    assert [(c.kind, c.axes, c.asynchronous) for c in found] == [
        ("all-reduce", "fsdp", False),
        ("all-reduce", "fsdp", False),
        ("all-gather", "tensor", True),
    ]
    assert found[2].total_bytes == 8 * 4 / 2 and found[0].total_bytes == 2 * 4 * 4 * 3 / 4


def test_what_is_behind_a_loop_is_hidden_by_it_once():
    def collective(computation, seconds, asynchronous=True):
        return Collective("all-gather", 1e9, (0, 1), "fsdp", 1.0, seconds, asynchronous, computation)

    busy, inner = {"main": 1.0, "body": 4.0}, {"main": ["body"]}
    assert exposed_of([collective("main", 3.0)], busy, "main", inner) == ({}, 3.0)
    both = [collective("main", 3.0), collective("body", 3.0)]
    assert exposed_of(both, busy, "main", inner) == ({("asynchronous, not hidden", "all"): 1.0}, 5.0)
    late = [collective("body", 5.0), collective("main", 1.0, asynchronous=False)]
    assert exposed_of(late, busy, "main", inner) == (
        {("asynchronous, not hidden", "all"): 1.0, ("all-gather", "fsdp"): 1.0},
        4.0,
    )
