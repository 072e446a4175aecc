"""The training step: what it must equal, and what it must not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from lomdm_jax.config import default_config
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.distributed import partition
from lomdm_jax.generator import init_params, make_generator
from lomdm_jax.objectives import make_objective
from lomdm_jax.objectives.leave_one_out import leaders
from lomdm_jax.sampling import make_sampler
from lomdm_jax.training import guard
from lomdm_jax.training.optimizer import ema_decay, learning_rate, make_optimizer
from lomdm_jax.training.state import init_state
from lomdm_jax.training.step import make_train_step

VOCAB, LENGTH, ROWS = 12, 8, 16
ONE_DOCUMENT = np.zeros((ROWS, LENGTH), np.int32)


def tiny(**changes):
    """A config small enough to compile in a second; keys are section__name."""
    config = default_config()
    config.model.update(width=16, layers=1, heads=4, cond_dim=8, dropout=0.1)
    config.optimizer.update(learning_rate=0.01, warmup_steps=1)
    config.train.batch_size, config.data.length = ROWS, LENGTH
    for key, value in changes.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def batch(seed=0):
    """Rows with between 1 and 8 counted tokens."""
    rng = np.random.default_rng(seed)
    counted = np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (ROWS, 1))
    return {"tokens": rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32), "counted": counted}


def packed(seed=0):
    """`batch` with two documents per row, and pads after what is counted, up to the last place."""
    plain = batch(seed)
    segments = np.arange(LENGTH) >= np.random.default_rng(seed).integers(1, LENGTH, (ROWS, 1))
    padding = ~plain["counted"] & (np.arange(LENGTH) < LENGTH - 1)
    return plain | {"segments": segments.astype(np.int32), "padding": padding}


def run(config, sizes=(1,), steps=3, random=False, batch=batch):
    """Final state and the metrics of each step; sizes: of the mesh; random: before the order is
    learned. What several tests compare with is computed once."""
    state, history = _run(FrozenConfigDict(config), sizes, steps, random, batch)
    return state, [dict(metrics) for metrics in history]


@functools.cache
def _run(config, sizes, steps, random, batch):
    state, step = program(config, sizes, random)
    history = []
    for number in range(steps):
        state, metrics = step(state, batch(number))
        history.append(metrics)
    return jax.device_get(state), history


def program(config, sizes=(1,), random=False):
    """The state before the first step, and (state, host batch) -> (state, metrics on the host)."""
    mesh = meshes.make_mesh(*sizes)
    copies, rows = meshes.replicated(mesh), meshes.over_batch(mesh)
    generator, optimizer = (
        make_generator(config, VOCAB + 1, VOCAB),
        make_optimizer(config.optimizer),
    )
    generator = generator.at_random() if random else generator
    objective = make_objective(
        config.objective.name,
        mask_id=VOCAB,
        samples=config.objective.mask_samples,
        order_share=config.objective.order_share,
        eps=config.objective.eps,
        reconstruction_share=config.objective.reconstruction_share,
        blank_share=config.objective.blank_share,
        one_pass=generator.one_pass,
    )

    def fresh(key):
        return init_state(init_params(config, VOCAB + 1, key), optimizer)

    split = partition.shardings(mesh, jax.eval_shape(fresh, jax.random.key(0)))
    step = jax.jit(
        make_train_step(generator, objective, optimizer, config),
        in_shardings=(split, rows, copies),
        out_shardings=(split, copies),
        donate_argnums=0,
    )
    key = jax.device_put(jax.random.key(1), copies)

    def call(state, batch):
        with jax.set_mesh(mesh):
            state, metrics = step(state, jax.device_put(batch, rows), key)
        assert step._cache_size() == 1, "the step was traced more than once"
        return state, jax.device_get(metrics)

    with jax.set_mesh(mesh):
        return jax.jit(fresh, out_shardings=split)(jax.random.key(0)), call


def assert_close(ours, theirs, rtol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), ours, theirs)


RANKED = dict(order__name="lomdm-ranked", objective__blank_share=0.25, objective__order_share=0.5)
SORTS = {"continuous": {}, "order": {}, "order, ranked": RANKED}


def sort_of(sort, **changes):
    """Adam's first steps are the signs of gradients; its eps keeps rounding from turning them."""
    name = sort.partition(",")[0]
    return tiny(objective__name=name, optimizer__eps=1e-2, **SORTS[sort], **changes)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 2, 2, 2)])
@pytest.mark.parametrize("sort", SORTS)
def test_any_mesh_gives_the_losses_of_one_device(sort, sizes):
    config = tiny(objective__name=sort.partition(",")[0], **SORTS[sort])
    assert_close(run(config)[1], run(config, sizes)[1], 2e-4)


@pytest.mark.parametrize(
    ("sort", "remat"), [("continuous", "full"), ("order", "dots"), ("order, ranked", "full")]
)
def test_what_is_computed_again_changes_nothing(sort, remat):
    """Neither losses nor parameters; dropout included."""
    plain, again = run(sort_of(sort)), run(sort_of(sort, model__remat=remat))
    assert_close(plain[1], again[1], 1e-5)
    assert_close(plain[0].params, again[0].params, 1e-5)


def test_all_savings_at_once_change_nothing():
    """Parameters split, products split, blocks computed again, a batch in parts."""
    plain = run(sort_of("order"))
    saved = sort_of("order", model__remat="full", train__micro_batches=2)
    saving = run(saved, (1, 2, 2, 2))
    assert_close(plain[0].params, saving[0].params, 2e-4)


@pytest.mark.parametrize("sort", SORTS)
def test_accumulation_equals_the_plain_step(sort):
    """Also with dropout and with rows of unequal counts in every micro-batch."""
    plain, parts = (run(sort_of(sort, train__micro_batches=count), steps=2) for count in (1, 4))
    for metrics in plain[1] + parts[1]:  # quantiles of a part are not those of the whole
        for key in [key for key in metrics if key.startswith("exponent_q")]:
            del metrics[key]
    assert_close(plain[1], parts[1], 2e-4)
    assert_close(plain[0].params, parts[0].params, 2e-4)


def test_pads_and_segments_are_cut_with_their_rows():
    """A fresh network pays log V for what is counted, and for no pad; what a trained one pays
    depends on what it sees."""
    config = tiny(order__name="ar", objective__name="order", train__micro_batches=4)
    _, apart = run(config, batch=packed)
    _, joined = run(config, batch=lambda seed: packed(seed) | {"segments": ONE_DOCUMENT})
    assert apart[0]["tokens"] == packed()["counted"].sum()
    assert apart[0]["loss"] == joined[0]["loss"] == pytest.approx(np.log(VOCAB), rel=1e-5)
    assert apart[2]["loss"] != pytest.approx(joined[2]["loss"], rel=1e-5)


def test_c1_one_c2_zero_is_masked_diffusion_to_the_last_bit():
    """Same loss terms, same backbone after training, same samples from the same key."""
    for name in ("continuous", "order"):
        learned = tiny(objective__name=name, order__name="lomdm", order__c1=1.0, order__c2=0.0)
        fixed = tiny(objective__name=name, order__name="mdm")
        states, histories = zip(*(run(config) for config in (learned, fixed)), strict=True)
        for ours, theirs in zip(*histories, strict=True):
            for term in ("loss", "main", "order", "clock", "reconstruction"):
                assert ours[term] == theirs[term], term
        backbones = [state.params["backbone"] for state in states]
        jax.tree.map(np.testing.assert_array_equal, *backbones)
        samples = [draw(c, s.params) for c, s in zip((learned, fixed), states, strict=True)]
        jax.tree.map(np.testing.assert_array_equal, *samples)


@pytest.mark.parametrize("name", ["continuous", "order"])
def test_equal_exponents_from_the_heads_are_masked_diffusion_too(name):
    """c2 = 1e-12 runs the heads, but 1 + 1e-12 * NormSig is 1 in float32: equal to rounding."""
    learned = tiny(objective__name=name, order__name="lomdm", order__c1=1.0, order__c2=1e-12)
    histories = [run(c)[1] for c in (learned, tiny(objective__name=name, order__name="mdm"))]
    for ours, theirs in zip(*histories, strict=True):
        assert ours["order"] == theirs["order"] == 0 and ours["clock"] == theirs["clock"] == 0
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("order", "objective"),
    [("lomdm", "continuous"), ("lomdm", "order"), ("lomdm-order", "order"), ("genmd4", "order")],
)
def test_a_learned_order_starts_as_masked_diffusion(order, objective):
    """Same draws, same losses, same backbone; and what the order is learned with stays as it was.
    The programs differ, and so does the rounding of gradients, which a large eps keeps small."""
    changes = dict(objective__name=objective, order__c1=1.0, order__c2=0.5, optimizer__eps=1e-2)
    early, early_history = run(tiny(order__name=order, **changes), random=True)
    fixed, fixed_history = run(tiny(order__name="mdm", **changes))
    for ours, theirs in zip(early_history, fixed_history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["order"] == ours["clock"] == 0
    assert_close(early.params["backbone"], fixed.params["backbone"], 1e-5)
    start = init_params(tiny(order__name=order), VOCAB + 1, jax.random.key(0))
    for name in start.keys() - {"backbone"}:
        assert_close(early.params[name], start[name], 1e-6)


def test_trials_add_up_what_each_walk_has_cost():
    """In groups of four every text is tried under every walk. A fresh network gives every token
    log V nats, so the first step costs each of them the same; later steps do not."""
    changes = dict(objective__mask_samples=4, objective__order_share=0.5, model__dropout=0.0)
    config = tiny(objective__name="order", order__name="lomdm-ranked", **changes)
    state, (first,) = run(config, steps=1, random=True)
    counted = batch()["counted"][leaders(ROWS, 4, 0.5)].sum(-1)
    expected = counted[:2].sum() / 2 * ROWS / counted.sum() * np.log(VOCAB)
    np.testing.assert_allclose(state.trials, np.full(4, expected), rtol=1e-5)
    assert first["order"] == 0 and first["loss"] == pytest.approx(np.log(VOCAB), rel=1e-5)
    later, _ = run(config, steps=6, random=True)
    assert len(set((later.trials - state.trials).tolist())) == 4
    learned, _ = run(config, steps=1)
    assert not learned.trials.any(), "a learned order tries nothing"


def test_the_gradient_of_pointers_is_clipped_by_itself():
    """However large it is, the backbone moves as if it were not there."""
    config = tiny(order__name="lomdm-ranked", objective__name="order").optimizer
    optimizer = make_optimizer(config)
    params = {"backbone": {"w": jnp.ones(3)}, "prior_head": {"distance": jnp.ones(3)}}

    def scaled(factor):
        grads = {
            "backbone": {"w": jnp.arange(3.0)},
            "prior_head": {"distance": factor * jnp.arange(3.0)},
        }
        state = optimizer.init(params)
        for _ in range(2):  # the rate of the first step is zero
            _, state = optimizer.update(grads, state, params)
        return jax.tree.leaves(state)

    small, large = scaled(1.0), scaled(1e4)
    assert_close(small, large, 1e-6)
    assert not any(
        np.allclose(a, b) for a, b in zip(scaled(1e-3), large, strict=True) if a.size > 4
    )


def draw(config, params):
    generator = make_generator(config, VOCAB + 1, VOCAB)
    nothing = jnp.zeros((4, LENGTH), jnp.int32)
    sampler = make_sampler(config.sample, generator, eos_id=0, window=LENGTH)
    keys = jax.random.split(jax.random.key(5), 4)
    sample = jax.jit(lambda *inputs: sampler(*inputs))
    return jax.device_get(sample(params, keys, nothing, nothing > 0))


def test_bfloat16_compute_trains_float32_parameters_on_float32_losses():
    exact, rough = (run(tiny(model__dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert {a.dtype for a in jax.tree.leaves(rough[0].params)} == {np.dtype("float32")}
    for ours, theirs in zip(rough[1], exact[1], strict=True):
        assert ours["loss"].dtype == np.float32
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
    assert any(a["loss"] != b["loss"] for a, b in zip(rough[1], exact[1], strict=True))


@pytest.mark.parametrize("conditioned", [True, False])
def test_only_time_conditioning_lets_the_network_see_t(conditioned):
    config = tiny(model__time_conditioning=conditioned)
    generator = make_generator(config, VOCAB + 1, VOCAB)
    params = init_params(config, VOCAB + 1, jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.1 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), params)
    z = jnp.full((2, 3, LENGTH), VOCAB)
    early, late = (
        generator.reverse(params)(z, jnp.log(jnp.full(3, t)))[0].logits for t in (0.1, 0.9)
    )
    assert bool(jnp.any(early != late)) == conditioned


def test_the_heads_learn_at_their_own_rate():
    """With Adam's first step each parameter moves by the rate, up to its sign."""
    base, slow = (run(tiny(optimizer__head_multiplier=m), steps=2)[0].params for m in (1.0, 0.25))
    fresh = init_params(tiny(), VOCAB + 1, jax.random.key(0))
    moved = [
        np.abs(
            params["reverse_head"]["mlp"]["2"]["kernel"]
            - fresh["reverse_head"]["mlp"]["2"]["kernel"]
        )
        for params in (base, slow)
    ]
    np.testing.assert_allclose(0.25 * moved[0], moved[1], rtol=1e-3)


def test_masked_diffusions_loss_is_the_familiar_weighted_cross_entropy():
    """mdm, continuous: CE / t over masked positions, with its weight and its reconstruction."""
    config = tiny(order__name="mdm", model__dropout=0.0, objective__mask_samples=1)
    generator = make_generator(config, VOCAB + 1, VOCAB)
    params = init_params(config, VOCAB + 1, jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.1, params)
    eps, share = config.objective.eps, config.objective.reconstruction_share
    objective = make_objective(
        "continuous", mask_id=VOCAB, samples=1, eps=eps, reconstruction_share=share
    )
    from lomdm_jax.objectives.nelbo import Batch

    data = batch()
    uniform = jnp.linspace(0, 0.99, ROWS)
    rows = Batch(
        data["tokens"], data["counted"], jax.random.split(jax.random.key(3), ROWS), uniform
    )
    estimate = objective.estimate(
        rows, generator.forward(params, rows.tokens_BL), generator.reverse(params)
    )
    mask = estimate.mask_KBL[0]
    tokens, _ = generator.reverse(params)(jnp.where(mask, VOCAB, data["tokens"])[None], None)
    log_p = jax.nn.log_softmax(tokens.logits[0, ..., :VOCAB])
    nll = -jnp.take_along_axis(log_p, data["tokens"][..., None], -1)[..., 0]
    summed = jnp.sum(nll * mask, -1)
    t = eps + (1 - eps) * (uniform - share) / (1 - share)
    main = jnp.where(uniform < share, 0, (1 - eps) / (1 - share) * summed / t)
    np.testing.assert_allclose(estimate.terms.main[0], main, rtol=1e-4, atol=1e-5)
    end = jnp.where(uniform < share, summed / share, 0)
    np.testing.assert_allclose(estimate.terms.reconstruction[0], end, rtol=1e-4, atol=1e-5)
    assert (estimate.terms.order == 0).all() and (estimate.terms.clock == 0).all()


@pytest.mark.parametrize("parts", [1, 4])
def test_a_given_first_position_costs_nothing_but_is_counted(parts):
    """Fresh networks give every token log V nats, so the first loss is that of the targets."""
    changes = dict(order__name="mdm", objective__name="order", objective__ignore_first=True)
    _, (metrics,) = run(tiny(**changes, train__micro_batches=parts), steps=1)
    counted = batch()["counted"]
    assert metrics["tokens"] == counted.sum()
    share = counted[:, 1:].sum() / counted.sum()
    assert metrics["main"] == pytest.approx(share * np.log(VOCAB), rel=1e-5)


@pytest.mark.parametrize(("steps", "rates"), [(0, [0.01] * 3), (2, [0.0, 0.005, 0.01])])
def test_the_rate_climbs_over_the_warm_up_or_is_there_at_once(steps, rates):
    config = tiny(optimizer__warmup_steps=steps).optimizer
    np.testing.assert_allclose([float(learning_rate(config)(n)) for n in range(3)], rates)


def test_ema_warms_up_as_mdlms():
    assert ema_decay(0.9999, jnp.int32(0)) == pytest.approx(2 / 11)
    assert ema_decay(0.9999, jnp.int32(10**7)) == pytest.approx(0.9999)


def test_ema_follows_the_parameters():
    config = tiny()
    state, _ = run(config, steps=1)
    fresh = init_params(config, VOCAB + 1, jax.random.key(0))
    expected = jax.tree.map(lambda old, new: old + (1 - 2 / 11) * (new - old), fresh, state.params)
    assert_close(state.ema, expected, 1e-6)


def test_the_running_loss_is_mean_and_variance_of_good_steps_and_forgets():
    rng = np.random.default_rng(0)
    losses = rng.normal(5, 0.5, 300).astype(np.float32)
    losses[50] = np.nan
    running, flags = running_losses(losses, spike=0.0)
    good = np.delete(losses[: guard.HORIZON + 1], 50)
    np.testing.assert_allclose(running[guard.HORIZON], [100, good.mean(), good.var()], rtol=1e-4)
    assert flags == [number == 50 for number in range(300)]
    np.testing.assert_array_equal(running[50], running[49])
    weights = 0.99 ** np.arange(199)[::-1] * 0.01
    mean = weights @ losses[101:] + (1 - weights.sum()) * good.mean()
    np.testing.assert_allclose(running[-1][1], mean, rtol=1e-4)


def test_a_spike_is_found_once_enough_steps_were_seen_and_is_not_learned_from():
    losses = np.random.default_rng(0).normal(5, 0.5, 200).astype(np.float32)
    assert not any(running_losses(losses, spike=5.0)[1]), "a normal run"
    falling = losses + 5 * np.exp(-np.arange(200) / 30).astype(np.float32)
    assert not any(running_losses(falling, spike=5.0)[1]), "as losses fall at first"
    losses[[99, 100, 150, 151]] = 10.0
    running, flags = running_losses(losses, spike=5.0)
    assert np.flatnonzero(flags).tolist() == [100, 150, 151], "99 were seen before 99"
    np.testing.assert_array_equal(running[151], running[149])
    assert not any(running_losses(losses, spike=0.0)[1])
    losses[150] = -10.0
    assert not running_losses(losses, spike=5.0)[1][150], "a low loss is no spike"


def running_losses(losses, spike):
    """The running loss after each step, and which steps are bad."""
    judge = jax.jit(lambda running, metrics: guard.judge(running, metrics, spike))
    running, found, flags = jnp.zeros(3), [], []
    for loss in losses:
        bad, running, metrics = judge(running, {"loss": loss, "grad_norm": jnp.ones(())})
        found.append(np.asarray(running))
        flags.append(bool(bad))
        assert metrics["bad_steps"] == bad
    return found, flags


def uncounted(number, bad):
    """`batch`, but with nothing to learn from in batch `bad`: 0 / 0."""
    plain = batch(number)
    return plain | {"counted": plain["counted"] & (number != bad)}


@pytest.mark.parametrize("sizes", [(1,), (2, 2, 2)])
def test_a_skipped_step_leaves_all_but_the_step_number_to_the_last_bit(sizes):
    """Going on from there equals a run that never made the step, with its number given away."""
    state, step = program(tiny(train__on_bad_step="skip"), sizes)
    states = [jax.device_get(state)]
    for number in range(4):
        state, metrics = step(state, uncounted(number, bad=2))
        states.append(jax.device_get(state))
        assert metrics["bad_steps"] == (number == 2)
        assert np.isnan(metrics["loss"]) == np.isnan(metrics["grad_norm"]) == (number == 2)
    assert states[3].step == 3
    jax.tree.map(np.testing.assert_array_equal, states[3], states[2].replace(step=np.int32(3)))
    state, step = program(tiny(train__on_bad_step="skip"), sizes)
    for number in (0, 1):
        state, _ = step(state, batch(number))
    state = state.replace(step=jax.device_put(np.int32(3), state.step.sharding))
    state, _ = step(state, batch(3))
    jax.tree.map(np.testing.assert_array_equal, states[4], jax.device_get(state))
    moved = jax.tree.map(lambda a, b: np.any(a != b), states[4].params, states[3].params)
    assert any(jax.tree.leaves(moved)), "a good step moves on"


def test_what_stops_a_run_says_so_and_keeps_nothing():
    """Without skipping the update is made; the loop stops before it is saved."""
    state, history = run(tiny(), batch=lambda number: uncounted(number, bad=2))
    assert [metrics["bad_steps"] for metrics in history] == [0, 0, 1]
    assert np.isnan(jax.tree.leaves(state.params)[0]).all()
    assert state.running_loss[0] == 2 and np.isfinite(state.running_loss).all()


@pytest.mark.parametrize(("mean", "bad"), [(0.5, 1), (2.4, 0)])
def test_a_spike_is_skipped_like_a_loss_that_is_not_finite(mean, bad):
    """A fresh network's loss is log 12 = 2.48."""
    state, step = program(tiny(train__on_bad_step="skip", train__spike=6.0))
    known = np.array([guard.HORIZON, mean, 0.01], np.float32)
    state = state.replace(running_loss=jax.device_put(known, state.running_loss.sharding))
    before = jax.device_get(state)
    after, metrics = step(state, batch())
    after = jax.device_get(after)
    same = jax.tree.map(np.array_equal, before.replace(step=np.int32(1)), after)
    assert metrics["bad_steps"] == bad == all(jax.tree.leaves(same))
    assert metrics["loss_mean"] == np.float32(mean)
    assert metrics["loss_deviation"] == pytest.approx(0.1)


def test_guards_change_nothing_in_a_run_without_bad_steps():
    guards = dict(train__on_bad_step="skip", train__spike=6.0)
    plain, history = run(sort_of("continuous"), steps=6)
    guarded, same = run(sort_of("continuous", **guards), steps=6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-9)  # two programs
    jax.tree.map(close, history, same)
    jax.tree.map(close, plain, guarded)
