"""Attention by kernels against plain attention, on the devices that they are made for and on CPUs
in their place; and which of them is taken where."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh

from lomdm_jax.distributed import costs, topologies
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.models import attention
from lomdm_jax.models.visibility import causal, full

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
GPT2 = (8, 1024, 12, 64)


@pytest.fixture
def splash_on_cpu(monkeypatch):
    """As if the CPU were a TPU; small blocks, so that there are several."""
    interpreted = partial(splash_attention.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha", interpreted)
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(attention, "BLOCK", 128)


def heads(rows, length, count=2, size=8, dtype=F32):
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, (rows, length, count, size), dtype) for key in keys)


def documents(length, *ends):
    """Segments of rows [B, L] that end at these places and at the end."""
    places = [np.searchsorted(np.array(each), np.arange(length), side="right") for each in ends]
    return jnp.asarray(np.stack(places), jnp.int32)


def plain(inputs, kind, segment):
    """With a mask that is written out."""
    length = inputs[0].shape[1]
    mask = jnp.tri(length, dtype=bool) if kind is causal else jnp.ones((length, length), bool)
    if segment is not None:
        mask &= segment[:, None] == segment[..., None]
    mask = mask.reshape(-1, 1, length, length)
    return jax.nn.dot_product_attention(*inputs, mask=mask)


def attended(inputs, kind, segment):
    return kind(inputs[0].shape[1], segment).attend(*inputs)[0]


def with_gradients(function, inputs, kind, segment):
    """Mixed values, and the gradients of a sum of them, of an attention."""
    weights = jax.random.normal(jax.random.key(1), inputs[0].shape)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def run(inputs):
        mixed = function(inputs, kind, segment)
        return jnp.sum(weights * mixed), mixed

    gradients, mixed = run(inputs)
    return mixed, *gradients


def assert_same(inputs, kind, segment):
    found = with_gradients(attended, inputs, kind, segment)
    expected = with_gradients(plain, inputs, kind, segment)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-5)


def primitives(jaxpr):
    """Names of all operations, and the shapes of what they make."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, [variable.aval.shape for variable in equation.outvars]
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner)


# --- Splash attention ---


@pytest.mark.parametrize("kind", [full, causal])
@pytest.mark.parametrize("segment", [None, documents(256, [100, 130], [])])
def test_splash_attention_is_attention(splash_on_cpu, kind, segment):
    assert_same(heads(2, 256), kind, segment)


def test_splash_attention_in_half_precision(splash_on_cpu):
    """The result has the inputs' dtype, and the error of rounding it: sums are float32."""
    inputs = heads(1, 256, dtype=BF16)
    found = jax.jit(partial(attended, kind=full, segment=None))(inputs)
    assert found.dtype == BF16
    exact = plain([a.astype(F32) for a in inputs], full, None)
    np.testing.assert_allclose(found.astype(F32), exact, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("segment", [None, documents(128, *([60 + row] for row in range(4)))])
def test_splash_attention_over_a_mesh(splash_on_cpu, segment):
    """Each device has a row or two and one head of its own."""
    for mesh, count in (((2, 2, 2), 2), ((1, 2, 2, 2), 4)):
        inputs = heads(4, 128, count)
        with jax.set_mesh(meshes.make_mesh(*mesh)):
            jaxpr = jax.make_jaxpr(partial(attended, kind=causal, segment=segment))(inputs)
            found = dict(primitives(jaxpr.jaxpr))
            assert np.prod(found["pallas_call"][-1]) == 4 * count * 128 * 8 / 8
            assert_same(inputs, causal, segment)


# --- Which it is ---


@pytest.mark.parametrize(
    ("expected", "platform", "dtype", "shape", "has_segments", "splits"),
    [
        ("cudnn", "cuda", BF16, GPT2, False, (1, 1)),
        ("cudnn", "cuda", F16, (8, 100, 12, 128), False, (8, 4)),
        ("cudnn", "cuda", BF16, (8, 4096, 12, 8), False, (1, 1)),
        ("xla", "cuda", F32, GPT2, False, (1, 1)),
        ("xla", "cuda", BF16, (8, 1024, 12, 60), False, (1, 1)),
        ("xla", "cuda", BF16, (8, 1024, 12, 136), False, (1, 1)),
        ("xla", "cuda", BF16, GPT2, False, (3, 1)),
        ("xla", "cuda", BF16, GPT2, False, (1, 5)),
        ("parts", "cuda", BF16, GPT2, True, (1, 1)),
        ("parts", "cuda", F32, (8, 2048, 12, 64), False, (1, 1)),
        ("xla", "gpu", BF16, GPT2, False, (1, 1)),
        ("splash", "tpu", BF16, GPT2, False, (4, 4)),
        ("splash", "tpu", F32, GPT2, True, (1, 1)),
        ("splash", "tpu", BF16, (8, 512, 12, 256), False, (1, 1)),
        ("splash", "tpu", BF16, (8, 4096, 12, 12), True, (1, 1)),
        ("xla", "tpu", F16, GPT2, False, (1, 1)),
        ("xla", "tpu", BF16, (8, 1024, 12, 512), False, (1, 1)),
        ("xla", "tpu", BF16, (8, 256, 12, 64), False, (1, 1)),
        ("xla", "tpu", BF16, (8, 768, 12, 64), False, (1, 1)),
        ("parts", "tpu", BF16, (8, 256, 12, 64), True, (1, 1)),
        ("parts", "tpu", BF16, (8, 1280, 12, 64), False, (1, 1)),
        ("xla", "tpu", BF16, GPT2, False, (3, 1)),
        ("parts", "tpu", BF16, GPT2, True, (1, 5)),
        ("xla", "cpu", BF16, GPT2, False, (1, 1)),
        ("xla", "cpu", F32, (1, 1, 1, 1), False, (1, 1)),
        ("parts", "cpu", F32, (8, 1025, 12, 64), False, (1, 1)),
        ("parts", "cpu", F32, (1, 1, 1, 1), True, (1, 1)),
    ],
)
def test_what_attends(expected, platform, dtype, shape, has_segments, splits):
    assert attention.backend_of(platform, jnp.dtype(dtype), shape, has_segments, splits) == expected


def test_the_platform_is_that_of_the_mesh():
    assert attention.platform() == "cpu"
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("data",), abstract_device=device)):
        assert attention.platform() == "tpu"


@pytest.mark.parametrize(
    ("version", "capability", "expected"),
    [
        ("cuda 12090", "8.0", "cuda"),
        ("cuda 12090", "12.0", "cuda"),
        ("cuda 12090", "7.5", "gpu"),
        ("rocm 60300", "gfx942", "gpu"),
    ],
)
def test_gpus_with_flash_attention(monkeypatch, version, capability, expected):
    client = SimpleNamespace(platform_version=version)
    device = SimpleNamespace(client=client, compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda backend: [device])
    assert attention.platform() == expected


def test_the_mesh_has_to_divide_evenly(splash_on_cpu):
    """Three rows over two devices: XLA, and the same values."""
    inputs = heads(3, 128)
    with jax.set_mesh(meshes.make_mesh(2)):
        jaxpr = jax.make_jaxpr(partial(attended, kind=full, segment=None))(inputs)
        assert "pallas_call" not in dict(primitives(jaxpr.jaxpr))
        assert_same(inputs, full, None)


# --- Long rows ---

LONG = 4096


@pytest.mark.parametrize("kind", [full, causal])
@pytest.mark.parametrize("length", [1100, 1536])
def test_long_rows_in_parts_are_attended_as_short_ones(kind, length):
    assert_same(heads(1, length, count=1, size=2), kind, None)


def total(inputs, kind, segment):
    return jnp.sum(attended(inputs, kind, segment).astype(F32))


def long_rows(dtype):
    shape = jax.ShapeDtypeStruct((1, LONG, 2, 64), dtype)
    return (shape, shape, shape), jax.ShapeDtypeStruct((1, LONG), jnp.int32)


@pytest.fixture
def cudnn(monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: "cuda")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize("kind", [full, causal])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_no_scores_of_all_pairs(monkeypatch, cudnn, kind, packed, platform):
    """Neither forward nor for the gradient; nor a mask of their shape, nor constants."""
    monkeypatch.setattr(attention, "platform", lambda: platform)
    inputs, segment = long_rows(BF16)
    gradient = jax.grad(partial(total, kind=kind))
    jaxpr = jax.make_jaxpr(gradient)(inputs, segment=segment if packed else None)
    shapes = [shape for _, made in primitives(jaxpr.jaxpr) for shape in made]
    shapes += [np.shape(constant) for constant in jaxpr.consts]
    assert any(LONG in shape for shape in shapes)
    assert max(map(np.prod, shapes)) < LONG**2


@pytest.mark.parametrize(("kind", "mask"), [(full, "NO_MASK"), (causal, "CAUSAL")])
def test_gpus_are_given_flash_attention(cudnn, kind, mask):
    (inputs, _) = long_rows(BF16)
    gradient = jax.jit(jax.grad(partial(total, kind=kind, segment=None)))
    text = gradient.trace(inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax(" in text and "__cudnn$fmhaSoftmaxBackward(" in text
    assert f"mask_type\\22: \\22{mask}\\22" in text
    assert f"{LONG}x{LONG}" not in text


# --- TPU, compiled for but not present ---


@pytest.fixture(scope="module")
def v5e():
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu: pip install 'jax[tpu]'")
    return topologies.topology("v5e:2x2")


@pytest.mark.parametrize("kind", [full, causal])
@pytest.mark.parametrize("packed", [False, True])
def test_tpu_programs_have_the_kernels(v5e, kind, packed):
    """Of two devices, on which an array of all pairs of tokens would be 32 MiB a head."""
    inputs, segment = long_rows(BF16)
    mesh = meshes.make_mesh(1, tensor=2, devices=v5e)
    whole = meshes.replicated(mesh)
    gradient = jax.value_and_grad(partial(total, kind=kind))
    with jax.set_mesh(mesh):
        given = (inputs, segment if packed else None)
        compiled = jax.jit(lambda a, s: gradient(a, segment=s), in_shardings=whole).lower(*given)
        compiled = compiled.compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**23
    visits = costs.visits(costs.parse(compiled.as_text()))
    kernels = [v for v in visits if "tpu_custom_call" in v.instruction.attributes]
    assert len(kernels) == 3
