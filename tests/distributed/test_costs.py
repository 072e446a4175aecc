"""What programs cost: counted by hand, and as the compiler counts them where it counts all."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from lomdm_jax.config import default_config
from lomdm_jax.distributed import costs
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.generator import init_params, make_generator
from lomdm_jax.models import attention
from lomdm_jax.models.visibility import causal, full
from lomdm_jax.objectives import make_objective
from lomdm_jax.training.optimizer import make_optimizer
from lomdm_jax.training.state import init_state
from lomdm_jax.training.step import make_train_step

M, K, N = 3, 5, 7
LEFT, RIGHT = jax.ShapeDtypeStruct((M, K), jnp.float32), jax.ShapeDtypeStruct((K, N), jnp.float32)
ONE = 2 * M * K * N


def flops(function, *shapes, recomputed=True):
    return costs.matmul_flops(jax.make_jaxpr(function)(*shapes), recomputed=recomputed)


def repeated(a, b):
    body = lambda c, _: (c + jnp.sin(a + c[0, 0]) @ b, None)  # noqa: E731
    return jax.lax.scan(body, jnp.zeros((M, N)), length=11)[0]


def unknown_length(a, b):
    return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + a @ b, jnp.zeros((M, N)))


def either(a, b):
    return jax.lax.cond(a[0, 0] > 0, lambda: a @ b, lambda: 2 * (a @ b) + a @ b * (a @ b))


def gradients(function):
    return jax.grad(lambda a, b: jnp.sum(jnp.sin(function(a, b))), argnums=(0, 1))


def on_every_device(a, b):
    mesh = meshes.make_mesh(4, 2)
    return jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"data"}, check_vma=False
    )(a, b)


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (jnp.matmul, 1),
        (jax.jit(jnp.matmul), 1),
        (repeated, 11),
        (lambda a, b: jax.lax.fori_loop(0, 4, lambda _, c: c + a @ b, jnp.zeros((M, N))), 4),
        (unknown_length, 1),
        (either, 3),
        (gradients(jnp.matmul), 3),  # the product, and one for each factor
        (gradients(repeated), 3 * 11),
        (on_every_device, 4),
    ],
)
def test_products_are_counted_as_often_as_they_are_made(function, products):
    assert flops(function, LEFT, RIGHT) == products * ONE
    assert flops(function, LEFT, RIGHT, recomputed=False) == products * ONE


def test_products_that_are_made_again():
    again = gradients(jax.checkpoint(lambda a, b: jnp.sin(a @ b)))
    assert flops(again, LEFT, RIGHT) == 4 * ONE
    assert flops(again, LEFT, RIGHT, recomputed=False) == 3 * ONE


def test_batches_of_products():
    shapes = [jax.ShapeDtypeStruct((4, 2, *a.shape), a.dtype) for a in (LEFT, RIGHT)]
    assert flops(jnp.matmul, *shapes) == 8 * ONE
    pairs = jax.ShapeDtypeStruct((4, M, 2, K), jnp.float32)
    attention = lambda q, k: jnp.einsum("blhd,bmhd->bhlm", q, k)  # noqa: E731
    assert flops(attention, pairs, pairs) == 2 * 4 * 2 * M * M * K


def test_other_products_are_refused():
    image, kernel = (jax.ShapeDtypeStruct((1, 1, 4, 4), jnp.float32) for _ in range(2))
    with pytest.raises(NotImplementedError, match="conv_general_dilated"):
        flops(lambda a, b: jax.lax.conv(a, b, (1, 1), "SAME"), image, kernel)


# --- A training step ---


def step_and_shapes(**changes):
    """The training step of a small model without loops of its own (so few positions are one part of
    the cross-entropy), and the shapes it takes."""
    config, vocabulary, length, rows = default_config(), 64, 32, 4
    config.data.length = length
    config.model.update(width=64, layers=1, heads=2, cond_dim=16, head_layers=0, dropout=0.0)
    config.train.batch_size = rows
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    generator = make_generator(config, vocabulary, vocabulary - 1)
    objective = make_objective(
        config.objective.name,
        mask_id=vocabulary - 1,
        samples=2,
        eps=config.objective.eps,
        reconstruction_share=config.objective.reconstruction_share,
        one_pass=generator.one_pass,
    )
    optimizer = make_optimizer(config.optimizer)
    init = lambda key: init_state(init_params(config, vocabulary, key), optimizer)  # noqa: E731
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = {
        "tokens": jax.ShapeDtypeStruct((rows, length), jnp.int32),
        "counted": jax.ShapeDtypeStruct((rows, length), jnp.bool_),
    }
    step = make_train_step(generator, objective, optimizer, config)
    return step, (jax.eval_shape(init, key), batch, key)


@pytest.fixture
def one_device():
    with jax.set_mesh(meshes.make_mesh(1)):
        yield


def test_a_step_agrees_with_the_compiler_where_that_counts_all(one_device):
    """It also counts what is no product, an operation for each element: softmax, norms, random
    bits, the optimizer. At width 64 and length 32 these are 5 %. Of an array that a fusion takes a
    few elements of the compiler counts all bytes, if it goes by another name in between."""
    step, shapes = step_and_shapes()
    counted = flops(step, *shapes)
    compiled = jax.jit(step).lower(*shapes).compile()
    assert counted < compiled.cost_analysis()["flops"] < 1.1 * counted
    read = costs.bytes_accessed(costs.parse(compiled.as_text()))
    assert 0.97 < read / compiled.cost_analysis()["bytes accessed"] < 1.002


def test_micro_batches_and_recomputation(one_device):
    whole = flops(*flat(step_and_shapes()))
    assert flops(*flat(step_and_shapes(train__micro_batches=4))) == whole
    first = flops(*flat(step_and_shapes()), recomputed=False)
    for remat, least in (("full", 1.2), ("dots", 1.01)):
        step, shapes = step_and_shapes(model__remat=remat)
        # With all, a forward pass more than the three of training.
        assert least < flops(step, *shapes) / whole < 1.4
        assert flops(step, *shapes, recomputed=False) == first < whole


def flat(pair):
    return pair[0], *pair[1]


# --- Compiled programs ---

LOOP = """HloModule jit_f, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%body (state: (s32[], f32[64,128], f32[5,64,128])) -> (s32[], f32[64,128], f32[5,64,128]) {
  %state = (s32[]{:T(128)}, f32[64,128]{1,0:T(8,128)}, f32[5,64,128]{2,1,0}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %a = f32[64,128]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %all = f32[5,64,128]{2,1,0} get-tuple-element(%state), index=2
  %reduced = f32[64,128]{1,0} all-reduce(%a), channel_id=1, replica_groups=GROUPS, to_apply=%add
  %here = f32[64,128]{1,0:T(8,128)S(1)} copy(%reduced)
  %part = f32[64,128]{1,0} fusion(%all, %i), kind=kLoop, calls=%fused
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, f32[64,128]{1,0}, f32[5,64,128]{2,1,0}) tuple(%next, %part, %all)
}

%fused (p0: f32[5,64,128], p1: s32[]) -> f32[64,128] {
  %p0 = f32[5,64,128]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,64,128]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,128}
  ROOT %flat = f32[64,128]{1,0} bitcast(%cut)
}

%until (state.1: (s32[], f32[64,128], f32[5,64,128])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, f32[64,128]{1,0}, /*index=2*/f32[5,64,128]{2,1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: (s32[], f32[64,128], f32[5,64,128])) -> f32[64,128] {
  %p = (s32[], f32[64,128]{1,0}, f32[5,64,128]{2,1,0}) parameter(0)
  %loop = (s32[], f32[64,128]{1,0}, f32[5,64,128]{2,1,0}) while(%p), condition=%until, body=%body
  ROOT %result = f32[64,128]{1,0} get-tuple-element(%loop), index=1
}
"""
ARRAY = 64 * 128 * 4


@pytest.mark.parametrize(
    ("written", "group"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['a'=4,'b'=2] {'a'}", 4),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("mesh['a'=8] {'a':(2)4}", 4),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}", 2),
        ("{}", 8),
    ],
)
def test_collectives_of_a_loop(written, group):
    """The loop is written as for TPU: its length stands in its condition alone."""
    program = costs.parse(LOOP.replace("GROUPS", written))
    sent = 2 * ARRAY * (group - 1) // group
    assert costs.collectives(program) == [("all-reduce", 5, 5 * ARRAY, 5 * sent)]


def test_bytes_of_a_loop():
    """All-reduce: in and out; the copy: in, its result is on the chip; the fusion: its part, in and
    out; the sum of the counter."""
    program = costs.parse(LOOP.replace("GROUPS", "{}"))
    assert costs.bytes_accessed(program) == 5 * (2 * ARRAY + ARRAY + 2 * ARRAY + 3 * 4)


def test_loops_that_say_how_long_they_are():
    noted = 'condition=%until, backend_config={"known_trip_count":{"n":"7"}}, body=%body'
    loop = LOOP.replace("GROUPS", "{}")
    program = costs.parse(loop.replace("condition=%until, body=%body", noted))
    assert costs.collectives(program)[0].times == 7
    unknown = costs.parse(loop.replace("direction=LT", "direction=NE"))
    assert costs.collectives(unknown)[0].times == 1


def test_groups_in_an_unknown_form_are_not_guessed_at():
    with pytest.raises(ValueError, match=r"replica_groups in an unknown form.*GROUPS"):
        costs.collectives(costs.parse(LOOP))


ASYNC = """HloModule jit_f, is_scheduled=true, num_partitions=4

%step (x: f32[100]) -> f32[400] {
  %x = f32[100]{0} parameter(0)
  ROOT %inner = f32[400]{0} all-gather(%x), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
}

%again (x.1: f32[100]) -> f32[400] {
  %x.1 = f32[100]{0} parameter(0)
  ROOT %inner.1 = f32[400]{0} all-gather(%x.1), channel_id=3, replica_groups={{0,1,2,3}}
}

%aside (y: f32[400]) -> f32[100] {
  %y = f32[400]{0} parameter(0)
  ROOT %part = f32[100]{0} reduce-scatter(%y), channel_id=4, replica_groups=[1,4]<=[4]
}

ENTRY %main (p: f32[100], q: f32[400]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  %q = f32[400]{0} parameter(1)
  %first = (f32[100]{0}, f32[200]{0}) all-gather-start(%p), channel_id=1, replica_groups=[2,2]<=[4]
  %last = f32[200]{0} all-gather-done(%first)
  %spread = f32[400]{0} fusion(%p), kind=kCustom, calls=%step
  %more = f32[400]{0} fusion(%p), kind=kCustom, calls=%again
  %start = ((f32[400]{0}), f32[100]{0}) async-start(%q), calls=%aside
  %done = f32[100]{0} async-done(%start)
  %mixed = f32[100]{0} all-to-all(%done), channel_id=5, replica_groups={{0,1,2,3}}
  ROOT %moved = f32[100]{0} collective-permute(%mixed), source_target_pairs={{0,1},{1,0}}
}
"""


def test_collectives_that_run_aside_count_once():
    assert costs.collectives(costs.parse(ASYNC)) == [
        ("all-gather", 2, 4 * (200 + 400), 4 * (100 + 300)),
        ("reduce-scatter", 1, 4 * 400, 4 * 300),
        ("all-to-all", 1, 4 * 100, 4 * 75),
        ("collective-permute", 1, 4 * 100, 4 * 100),
    ]


def test_sizes():
    sizes = {"f32[2,3]{1,0:T(8,128)}": 24, "bf16[]": 2, "pred[5]": 5, "(s4[4], f8e4m3fn[3])": 5}
    assert {shape: costs.size_of(shape) for shape in sizes} == sizes


@pytest.mark.parametrize("loop", ["scan", "fori"])
def test_collectives_of_a_compiled_loop(loop):
    def body(_, a):
        return a + jnp.sin(jax.lax.psum(a, "data"))

    def shard(a):
        if loop == "fori":
            return jax.lax.fori_loop(0, 5, body, a)
        return jax.lax.scan(lambda c, _: (body(0, c), None), a, length=5)[0]

    mesh = meshes.make_mesh(8)
    function = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    compiled = function.lower(jax.ShapeDtypeStruct((64, 16), jnp.float32)).compile()
    program, part = costs.parse(compiled.as_text()), 8 * 16 * 4
    assert program.partitions == 8
    assert costs.collectives(program) == [("all-reduce", 5, 5 * part, 5 * 2 * part * 7 // 8)]
    once = compiled.cost_analysis()["bytes accessed"]
    assert 3 < costs.bytes_accessed(program) / once <= 5  # a copy is made outside of it


def test_collectives_that_the_partitioner_makes():
    """A product over a dimension that is split needs a sum; a result that is to be whole, a
    gathering."""
    mesh = meshes.make_mesh(8)
    split, whole = (jax.sharding.NamedSharding(mesh, spec) for spec in (P(None, "data"), P()))
    product = jax.jit(lambda a: (a @ a.T, a), in_shardings=split, out_shardings=whole)
    compiled = product.lower(jax.ShapeDtypeStruct((32, 64), jnp.float32)).compile()
    found = {each.kind: each for each in costs.collectives(costs.parse(compiled.as_text()))}
    assert found["all-gather"][1:] == (1, 32 * 64 * 4, 32 * 64 * 4 * 7 // 8)


# --- Attention ---


def attention_flops(kind, packed=False, grad=True, length=2 * attention.BLOCK, recomputed=True):
    """Of 4 rows of 2 heads of size 8, in products of all pairs of tokens; to two digits, as what is
    summed for each token alone is not meant."""
    shape = jax.ShapeDtypeStruct((4, length, 2, 8), jnp.bfloat16)
    segment = jax.ShapeDtypeStruct((4, length), jnp.int32)

    def total(query, key, value, segment):
        mixed, _ = kind(length, segment).attend(query, key, value)
        return mixed.astype(jnp.float32).sum()

    function = jax.value_and_grad(total, argnums=(0, 1, 2)) if grad else total
    given = (shape, shape, shape, segment if packed else None)
    found = flops(function, *given, recomputed=recomputed)
    return round(found / (2 * 4 * 2 * 8 * length**2), 2)


@pytest.mark.parametrize("devices", [None, (1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("packed", [False, True])
def test_splash_attention(monkeypatch, packed, devices):
    """Of two blocks by two a causal mask hides one; forward 2 products, for gradients 4 and 3."""
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    mesh = meshes.make_mesh(*devices) if devices else jax.sharding.AbstractMesh((), ())
    with jax.set_mesh(mesh) if devices else jax.sharding.use_abstract_mesh(mesh):
        assert attention_flops(full, packed, grad=False) == 2
        assert attention_flops(full, packed) == 2 + 4 + 3
        assert attention_flops(full, packed, recomputed=False) == 6
        assert attention_flops(causal, packed, recomputed=False) == 4.5
        assert attention_flops(causal, packed) == 6.75  # 3 / 4 of it
        assert attention_flops(causal, packed, length=4 * attention.BLOCK) == 5.63  # 10 / 16 of it


def test_attention_of_cudnn(monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: "cuda")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    assert attention_flops(full, grad=False) == 2 and attention_flops(full) == 7
    assert attention_flops(causal, grad=False) == 1 and attention_flops(causal) == 3.5
    assert attention_flops(full, recomputed=False) == 6


def test_attention_without_a_kernel():
    assert attention_flops(full, length=128) == attention_flops(causal, length=128) == 6
    assert attention_flops(full, length=2048) == 7  # in parts: the scores again for the gradient
    assert attention_flops(full, length=2048, recomputed=False) == 6


def test_other_kernels_are_refused():
    def multiply(a, b, out):
        out[...] = a[...] @ b[...]

    kernel = pl.pallas_call(multiply, jax.ShapeDtypeStruct((M, N), jnp.float32))
    with pytest.raises(NotImplementedError, match="pallas_call"):
        flops(kernel, LEFT, RIGHT)
