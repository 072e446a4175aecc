"""Reports of compiled steps: what adds up, what a lack of memory says, and TPU programs compiled
without a TPU."""

import json

import jax
import jax.numpy as jnp
import pytest

from lomdm_jax.config import default_config
from lomdm_jax.distributed import compile_ahead as ahead
from lomdm_jax.distributed import costs, partition, remedies, topologies
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.distributed.chips import CHIPS, GIB, chip_of
from lomdm_jax.distributed.gpus import GPUS, target
from lomdm_jax.errors import UserError
from lomdm_jax.generator import init_params, make_generator
from lomdm_jax.run import Plan
from lomdm_jax.training.compiled import traced_step
from lomdm_jax.training.initial import fresh
from lomdm_jax.training.optimizer import make_optimizer

LENGTH, VOCABULARY = 16, 64


def tiny(**changes):
    """A config whose step compiles in seconds; keys are section__name."""
    config = default_config()
    config.data.length = LENGTH
    config.model.update(width=16, layers=1, heads=2, cond_dim=8, head_layers=0, dropout=0.0)
    config.order.name = "mdm"  # one estimate, no heads
    config.train.batch_size = 16
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def lowered(config, devices):
    """The step of a config for devices, and its mesh, state and shardings."""
    mesh = meshes.make_mesh(**config.mesh, devices=devices)
    kinds = {"tokens": jnp.int32, "counted": jnp.bool_}
    rows = (config.train.batch_size, LENGTH)
    batch = {name: jax.ShapeDtypeStruct(rows, kind) for name, kind in kinds.items()}
    generator = make_generator(config, VOCABULARY, VOCABULARY - 1)
    plan = Plan(config, generator, mesh, batch, VOCABULARY)
    optimizer = make_optimizer(config.optimizer)
    with jax.set_mesh(mesh):
        state = jax.eval_shape(fresh(plan, optimizer))
        step = traced_step(plan, generator, optimizer, state).lower()
    return step, dict(mesh=mesh, state=state, shardings=partition.shardings(mesh, state))


def report_of(config, devices, compiled=None):
    step, placed = lowered(config, devices)
    compiled = compiled or remedies.compile_to_fit(step, config, **placed)
    work = dict(flops=4_000_000, model_flops=3_000_000, lowering=1.0, compiling=2.0)
    return ahead.make_report(compiled, tokens=16 * LENGTH, **placed, **work)


@pytest.fixture(scope="module")
def on_cpu():
    return report_of(tiny(mesh__fsdp=2, train__micro_batches=2), jax.devices())


def test_memory_adds_up(on_cpu):
    memory = on_cpu.memory
    params = jax.eval_shape(lambda: init_params(tiny(), VOCABULARY, jax.random.key(0)))
    whole = sum(4 * a.size for a in jax.tree.leaves(params))
    assert whole / 2 < memory.params == memory.ema < 0.6 * whole  # fsdp: half of most arrays
    assert memory.optimizer == 2 * memory.params + 2 * 4  # Adam's two means, and its counters
    assert 0 <= memory.rest < 2000 and 0 <= memory.outputs < 2000 and memory.temporaries > 0
    assert memory.total == sum(memory)


def test_what_a_step_does(on_cpu):
    assert on_cpu.devices == 8 and on_cpu.mesh == dict(data=4, fsdp=2, tensor=1, sequence=1)
    kinds = {each.kind: each for each in on_cpu.collectives}
    assert "all-reduce" in kinds and "all-gather" in kinds  # of gradients, of parameters
    assert on_cpu.bytes_accessed > on_cpu.compiler_bytes  # it counts the micro-batch once


def test_an_unknown_chip_leaves_blanks(on_cpu):
    assert on_cpu.chip is None and on_cpu.seconds is None and on_cpu.fits is None
    told = ahead.text(on_cpu, tiny())
    assert "of unknown" in told and "does not fit" not in told
    assert told.startswith("8 x cpu (data 4 x fsdp 2)")
    values = json.loads(json.dumps(ahead.to_dict(on_cpu)))
    assert values["mfu"] is None and values["memory"]["total"] == on_cpu.memory.total


def test_roofline(on_cpu):
    chip = CHIPS["TPU v5 lite"]
    report = on_cpu._replace(chip=chip)
    seconds = report.seconds
    assert seconds.compute == pytest.approx(4e6 / 8 / 197e12)
    assert seconds.memory == pytest.approx(report.bytes_accessed / 819e9)
    assert seconds.links == pytest.approx(sum(c.moved for c in report.collectives) / 200e9)
    assert report.step_seconds == (max(seconds), sum(seconds))
    assert report.tokens_per_second == (256 / sum(seconds), 256 / max(seconds))
    assert report.mfu[1] == pytest.approx(3e6 / (8 * 197e12 * max(seconds)))
    assert report.fits and "TPU v5e" in ahead.text(report, tiny())


def test_a_known_chip_that_is_too_small(on_cpu):
    small = on_cpu._replace(chip=CHIPS["NVIDIA L4"]._replace(memory=10_000))
    assert small.fits is False
    assert "It does not fit." in ahead.text(small, tiny())
    assert "--config.train.micro_batches=2" in ahead.text(small, tiny())


# --- A lack of memory ---

OF_TEMPORARIES = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(40.64G) exceeds available HBM (15.75G)."
)
OF_ALL = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 40.64G of 15.75G hbm. Exceeded hbm capacity by 24.89G."
)


@pytest.mark.parametrize("message", [OF_TEMPORARIES, OF_ALL])
def test_remedies_in_order_of_cost(message):
    config = tiny(train__batch_size=512)
    error = remedies.does_not_fit(jax.errors.JaxRuntimeError(message), config, 32, 8 * GIB)
    assert isinstance(error, UserError)
    first, *advice = str(error).splitlines()
    assert "40.64G of 15.75G" in first
    assert [line.split(":")[0].strip() for line in advice] == [
        "--config.train.micro_batches=2 (or 4, 8, 16)",
        "--config.model.remat=dots",
        "--config.model.remat=full",
        "--config.mesh.fsdp=16 --config.mesh.data=-1",
        "--config.model.dtype=bfloat16",
        "more devices than 32",
    ]
    assert "7.50 GiB less" in advice[3]


def test_a_device_with_one_sequence_at_a_time_may_share_it():
    """Four at a time on four devices: of six heads and 16 positions two devices may each take half,
    not four a quarter."""
    config = tiny(train__batch_size=8, train__micro_batches=2, model__heads=6, model__width=24)
    error = str(remedies.does_not_fit(jax.errors.JaxRuntimeError(OF_ALL), config, 4, GIB))
    shared = "--config.mesh.sequence=2 --config.mesh.data=-1 --config.train.micro_batches=4: "
    assert error.splitlines()[1].strip().startswith(shared)
    config.mesh.sequence, config.train.micro_batches = 2, 4
    assert "mesh.sequence" not in remedies.advice(config, 4, GIB, "")


def test_remedies_that_are_taken_are_not_named():
    taken = dict(model__remat="dots", model__dtype="bfloat16", mesh__fsdp=4, mesh__tensor=2)
    config = tiny(train__batch_size=12, train__micro_batches=3, **taken)
    error = str(remedies.does_not_fit(jax.errors.JaxRuntimeError(OF_ALL), config, 8, GIB))
    assert [line.split(":")[0].strip() for line in error.splitlines()[1:]] == [
        "--config.model.remat=full",
        "more devices than 8",
    ]


def test_micro_batches_that_a_group_of_orders_allows():
    """On the ranked layout some rows come in groups of two."""
    config = tiny(order__name="lomdm-ranked", objective__name="order", model__layout="ranked")
    config.update(dict(eval=dict(estimator="order")))
    config.objective.mask_samples, config.objective.order_share = 2, 1.0
    config.train.batch_size = 12
    assert remedies._more_micro_batches(config, 1) == [2, 3, 6]  # 4 and 12 would cut groups


def test_other_errors_pass():
    assert (
        remedies.does_not_fit(jax.errors.JaxRuntimeError("INTERNAL: bug"), tiny(), 8, GIB) is None
    )


# --- TPU, compiled for but not present ---


@pytest.fixture(scope="module")
def v5e():
    pytest.importorskip("libtpu", reason="compiling for TPU needs libtpu: pip install 'jax[tpu]'")
    return topologies.topology("v5e:2x2")


@pytest.mark.parametrize(
    ("name", "devices", "kind"),
    [
        ("v4:2x2x1", 4, "TPU v4"),
        ("v5e:16x16", 256, "TPU v5e"),
        ("v5e:1x1", 1, "TPU v5e"),
        ("v5p:2x2x1", 4, "TPU v5p"),
        ("v6e:4x8", 32, "TPU v6e"),
        ("tpu7x:2x2x1", 8, "TPU7x, half a chip"),
    ],
)
def test_slices(v5e, name, devices, kind):
    found = topologies.topology(name)
    assert len(found) == devices
    assert chip_of(found[0]).name == kind
    assert meshes.make_mesh(-1, devices=found).size == devices


@pytest.mark.parametrize("name", ["v5e", "nonsense:2x2", "v5e:3x5", "v5e:0x2", ""])
def test_no_such_slice(v5e, name):
    with pytest.raises(UserError, match="v5e:16x16"):
        topologies.topology(name)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]'"):
        topologies.topology("v5e:2x2")


def test_gpus_without_their_compiler(monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    with pytest.raises(UserError, match=r"pip install 'jax\[cuda12\]'"):
        topologies.topology("h200:1")


@pytest.mark.parametrize("name", ["h200", "h100:0", "a100:2x4", "h200:x"])
def test_no_such_machine(monkeypatch, name):
    plugin = type("Plugin", (), {"name": "xla_cuda12"})
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [plugin])
    with pytest.raises(UserError, match=f"{name}.* has no number of GPUs: use {name[:4]}:8"):
        topologies.topology(name)


@pytest.mark.parametrize("name", GPUS)
def test_gpus_are_described_by_what_they_can_do(name):
    said, chip = target(GPUS[name]), CHIPS[GPUS[name].kind]
    assert f"device_memory_size: {chip.memory}\n" in said
    assert f"memory_bandwidth: {int(chip.bandwidth)}\n" in said
    assert said.count("{") == said.count("}") and f'name: "{GPUS[name].kind}"' in said


@pytest.fixture(scope="module")
def h200():
    reason = "compiling for GPUs needs their compiler: pip install 'jax[cuda12]'"
    pytest.importorskip("jax_plugins.xla_cuda12", reason=reason)
    return topologies.topology("h200:4")


def test_a_step_on_gpus(h200):
    config = tiny(model__dtype="bfloat16", model__width=32, mesh__tensor=2)
    report = report_of(config, h200)
    assert report.fits and report.chip.name == "H200 SXM" and report.memory.total > 0
    assert {each.kind for each in report.collectives} >= {"all-reduce"}
    assert report.bytes_accessed > 3 * report.memory.params
    step, placed = lowered(config, h200)
    assert "cudnn$fmha" in remedies.compile_to_fit(step, config, **placed).as_text()


def test_a_step_on_tpu(v5e):
    report = report_of(tiny(train__micro_batches=4), v5e)
    assert report.fits and report.chip.name == "TPU v5e" and report.memory.total > 0
    gradients = next(each for each in report.collectives if each.kind == "all-reduce")
    assert gradients.size >= report.memory.params  # float32, summed at least once
    assert report.bytes_accessed > 3 * report.memory.params  # read, changed, written
    assert "unknown" not in ahead.text(report, tiny())


def test_loops_of_tpu_programs_have_a_length(v5e):
    mesh = meshes.make_mesh(-1, devices=v5e)
    split = meshes.over_batch(mesh)

    def body(_, a):
        return a * jnp.sum(jnp.sin(a), axis=0)

    function = jax.jit(lambda a: jax.lax.fori_loop(0, 5, body, a), in_shardings=split)
    compiled = function.lower(jax.ShapeDtypeStruct((64, 128), jnp.float32)).compile()
    found = costs.collectives(costs.parse(compiled.as_text()))
    assert found == [("all-reduce", 5, 5 * 128 * 4, 5 * 2 * 128 * 4 * 3 // 4)]


def test_a_step_that_does_not_fit(v5e):
    config = tiny(train__batch_size=2**20)
    step, placed = lowered(config, v5e)
    with pytest.raises(UserError, match=r"of 15\.75G[^$]*micro_batches=2 \(or 4, 8, 16\)"):
        remedies.compile_to_fit(step, config, **placed)
