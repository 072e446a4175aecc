"""From prompts to samples: blanks, files of prompts, batches, and what is left of a stream."""

from pathlib import Path

import jax
import numpy as np
import pytest

from lomdm_jax.config import default_config, validate
from lomdm_jax.data.symbols import ByteTokenizer
from lomdm_jax.distributed import mesh as meshes
from lomdm_jax.errors import UserError
from lomdm_jax.generation import Given, compiled, generate, given_of, stream, written
from lomdm_jax.generator import init_params, make_generator
from lomdm_jax.trained import Trained

LENGTH, TOKENIZER = 16, ByteTokenizer()


def settings(**changes):
    config = default_config().sample
    config.update({"count": 2} | changes)
    return config


def given(ignore_first=False, **changes):
    """Of a model without a network."""
    config = default_config()
    config.data.length, config.objective.ignore_first = LENGTH, ignore_first
    return given_of(Trained(config, Path(), TOKENIZER, *[None] * 3), settings(**changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained network of bytes on one device."""
    config = default_config()
    config.model.update({"width": 16, "layers": 1, "heads": 2, "cond_dim": 8})
    config.order.name, config.data.length = "mdm", LENGTH
    params = init_params(config, TOKENIZER.rows, jax.random.key(0))
    generator = make_generator(config, TOKENIZER.rows, TOKENIZER.mask_id)
    mesh = meshes.make_mesh(1, devices=jax.devices()[:1])
    return Trained(config, tmp_path_factory.mktemp("run"), TOKENIZER, generator, mesh, params)


def test_blanks_stand_where_they_are_and_the_rest_follows():
    tokens, known = given(prompt="ab[[3]]c", suffix="z")
    assert tokens.shape == (2, LENGTH)
    expected = [1, 1, 0, 0, 0, 1, *[0] * 9, 1]
    np.testing.assert_array_equal(known, [np.array(expected) > 0] * 2)
    np.testing.assert_array_equal(tokens[0, [0, 1, 5, 15]], TOKENIZER.encode("abcz"))
    tokens, known = given(prompt="[[1]]a", ignore_first=True)
    assert tokens[0, 0] == TOKENIZER.eos_id
    np.testing.assert_array_equal(known[0, :4], [True, False, True, False])


def test_a_file_of_prompts_gives_rows_of_different_lengths(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\nthree three\n")
    _, known = given(prompts=str(file))
    np.testing.assert_array_equal(known.sum(-1), [3, 3, 11, 11])
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no prompt"):
        given(prompts=str(file))
    with pytest.raises(UserError, match="cannot be read"):
        given(prompts=str(tmp_path / "missing.txt"))


def test_a_prompt_that_does_not_fit_is_refused_with_its_length():
    with pytest.raises(UserError, match=r"12 tokens, blanks included.*5 tokens.*16 tokens"):
        given(prompt="abcd[[8]]", suffix="vwxyz")
    with pytest.raises(UserError, match="a blank of 9999999999 tokens, but a sample has 16"):
        given(prompt="[[9999999999]]")


def test_samples_do_not_depend_on_the_batch_size(model):
    """Seven in batches of three, of which the last is filled up, and all at once."""
    apart, together = (
        generate(model, settings(count=7, batch_size=size, prompt="ab")) for size in (3, 7)
    )
    for name in ("tokens_BT", "revealed_BT", "calls_B"):
        ours, theirs = (getattr(g.samples, name) for g in (apart, together))
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    assert apart.texts == together.texts and len(apart.texts) == 7
    assert int(apart.samples.calls) == 3 * int(together.samples.calls) == 3 * 14
    assert written(together.samples).sum() == 7 * 14 and together.tokens_per_second > 0


def test_a_stream_ends_with_the_samples_and_shows_them_on_the_way(model):
    program = compiled(model, settings(), 2)
    nothing = Given(np.zeros((2, LENGTH), np.int32), np.zeros((2, LENGTH), bool))
    parts = list(stream(program, nothing, seed=2, every=5))
    assert [int((p.revealed_BT > 0).sum()) for p in parts] == [10, 20, 30, 32]
    hidden = parts[0].tokens_BT == TOKENIZER.mask_id
    np.testing.assert_array_equal(hidden, parts[0].revealed_BT == 0)
    end = generate(model, settings()).samples
    np.testing.assert_array_equal(parts[-1].tokens_BT, end.tokens_BT)
    shown = ~hidden
    np.testing.assert_array_equal(parts[0].tokens_BT[shown], end.tokens_BT[shown])


@pytest.mark.parametrize(
    ("order", "changes", "message"),
    [
        ("mdm", {"top_p": 0.0}, "sample.top_p"),
        ("mdm", {"remask": 0.5}, "sample.remask.*ancestral.*linear"),
        ("mdm", {"sampler": "ancestral", "remask": 0.5}, "sample.remask"),
        ("mdm", {"sampler": "velocity", "order_temperature": 2.0}, "draws no positions"),
        ("mdm", {"threshold": 0.5, "reveal": 4}, "sample.threshold.*'race' has none"),
        ("mdm", {"sampler": "confidence", "threshold": 0.5}, "sample.reveal.*2 or more"),
        ("mdm", {"dependence": 1.0}, "sample.reveal.*2 or more"),
        ("mdm", {"stop_at_eos": True, "suffix": "x"}, "sample.suffix"),
        ("mdm", {"prompts": "file", "prompt": "x"}, "sample.prompts"),
        ("mdm", {"length": 32}, "trained on 16 tokens: set sample.block"),
        ("mdm", {"block": 5}, "blocks of 5 must divide 16"),
        ("mdm", {"block": 32, "length": 64}, "at most 16"),
        ("ar", {"block": 4}, "blocks of 1, those of the order"),
        ("r2l", {"length": 32}, "one of all 16 positions"),
        ("block:4", {"length": 30}, "blocks of 4 must divide 30"),
        ("lomdm-ranked", {"block": 4}, "one of all 16 positions"),
        ("mdm", {"sampler": "best"}, "must be one of race"),
    ],
)
def test_what_a_sampler_cannot_do_is_refused_before_anything_starts(order, changes, message):
    config = default_config()
    config.order.name, config.data.length = order, LENGTH
    if order == "lomdm-ranked":
        config.objective.name = "order"
    config.sample.update(changes)
    with pytest.raises(UserError, match=message):
        validate(config)
