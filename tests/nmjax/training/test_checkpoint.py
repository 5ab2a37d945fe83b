"""Checkpoints: every damage is found and the one before used; what comes back is equal in bits, on any devices."""

import re
import shutil
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmjax.training import checkpoint
from nmjax.training.checkpoint import Checkpoints
from nmjax.training.loop import TrainConfig, TrainState, init_state, make_optimizer, train

CONFIG = TrainConfig(steps=24, peak_lr=0.1, warmup=4, log_every=4, save_every=6)


class Points:
    """Batches of a linear regression, by step; there are none from step `last` on."""

    def __init__(self, last=1000):
        self.last = last

    def __getitem__(self, step):
        if step >= self.last:
            raise Interrupted
        rng = np.random.default_rng(int(step))
        x = rng.normal(size=(8, 3)).astype(np.float32)
        return {"x": x, "y": x @ np.array([[1.0], [-2.0], [0.5]], np.float32) + 0.3}


class Interrupted(Exception):
    pass


def loss_fn(params, batch, key):
    noise = 0.01 * jax.random.normal(key, params["w"].shape)  # makes the key matter
    error = batch["x"] @ (params["w"] + noise) + params["b"] - batch["y"]
    return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def initial():
    return {"w": jnp.full((3, 1), 0.1), "b": jnp.zeros((1,))}


def run(folder=None, last=1000):
    checkpoints = None if folder is None else Checkpoints(folder)
    return train(loss_fn, initial(), Points(last), CONFIG, checkpoints=checkpoints, progress=False)


def state_of(step: int) -> TrainState:
    state = init_state(initial(), make_optimizer(CONFIG))
    return state.replace(step=jnp.int32(step), params=jax.tree.map(lambda leaf: leaf + step, state.params))


def files_of(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.fixture(scope="module")
def unbroken():
    return run()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that ended, with the checkpoints 18 and 24; to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


@pytest.fixture
def pair(tmp_path, finished):
    """A copy of `finished`, to be damaged."""
    return Checkpoints(shutil.copytree(finished, tmp_path / "run"))


# --- What comes back --------------------------------------------------------------------------------------------------


def test_keys_narrow_types_scalars_and_a_leading_seed_axis_come_back_in_bits(tmp_path):
    params = {"w": jnp.full((2, 3, 1), np.pi, jnp.bfloat16), "keys": jax.random.split(jax.random.key(3), 2)}
    other = {"array": np.arange(3, dtype=np.int32), "scalar": np.float32(0.5), "none": None}
    state = TrainState(jnp.int32([7, 7]), jnp.uint32([1, 2]), params, other)
    Checkpoints(tmp_path).save(7, state, {})
    loaded, _ = Checkpoints(tmp_path).load(jax.tree.map(jnp.zeros_like, state))
    chex.assert_trees_all_equal_shapes_and_dtypes(loaded.params, params)
    chex.assert_trees_all_equal(
        *(s.replace(params={**s.params, "keys": jax.random.key_data(s.params["keys"])}) for s in (state, loaded))
    )
    shapes, _ = Checkpoints(tmp_path).load(jax.eval_shape(lambda: state))
    np.testing.assert_array_equal(shapes.params["w"], params["w"])


def test_notes_come_back_as_plain_json_or_are_refused_by_place(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    notes = {"data": {"next_index": np.int64(3), "workers": {"0": np.uint8(1)}}, "history": [{"loss": np.float32(0.1)}]}
    checkpoints.save(3, state_of(3), notes)
    loaded = checkpoints.load(state_of(0))[1]
    assert loaded == {"data": {"next_index": 3, "workers": {"0": 1}}, "history": [{"loss": float(np.float32(0.1))}]}
    assert type(loaded["data"]["next_index"]) is int
    with pytest.raises(TypeError, match=r"notes.data.state has the type bytes"):
        checkpoints.save(4, state_of(4), {"data": {"state": b"{}"}})
    with pytest.raises(ValueError, match=r"notes.history\[0\].loss is nan"):
        checkpoints.save(4, state_of(4), {"history": [{"loss": float("nan")}]})
    with pytest.raises(ValueError, match=r"state\['w'\] must have at least one element, got shape \(0, 3\)"):
        checkpoints.save(4, {"w": jnp.zeros((0, 3))}, {})
    assert checkpoints.steps() == [3]


def test_another_state_is_refused_leaf_by_leaf(pair):
    like = state_of(0)
    wrong = like.replace(params={"w": jnp.zeros((4, 1)), "c": jnp.zeros(1)})
    with pytest.raises(ValueError) as error:
        pair.load(wrong)
    assert ".params['b'] is float32[1], wanted none" in str(error.value)
    assert ".params['c'] is missing, wanted float32[1]" in str(error.value)
    assert ".params['w'] is float32[3, 1], wanted float32[4, 1]" in str(error.value)
    with pytest.raises(ValueError, match=r".step is int32\[\], wanted float32\[\]"):
        pair.load(like.replace(step=jnp.float32(0)))


# --- Runs that go on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [5, 6, 23])
def test_a_broken_run_goes_on_in_bits(tmp_path, unbroken, last):
    with pytest.raises(Interrupted):
        run(tmp_path, last)
    assert Checkpoints(tmp_path).latest() == (last // 6 * 6 or None)
    state, history = run(tmp_path)
    chex.assert_trees_all_equal(unbroken[0], state)
    assert unbroken[1] == history
    assert Checkpoints(tmp_path).steps() == [18, 24]


def test_a_finished_run_is_not_run_again(pair, unbroken):
    state, history = run(pair.folder, last=0)
    chex.assert_trees_all_equal(unbroken[0], state)
    assert unbroken[1] == history


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(pair, unbroken):
    flip(max(files_of(pair.folder / "step_24" / "arrays"), key=lambda path: path.stat().st_size), 1234)
    with pytest.warns(UserWarning, match=r"step_24 is damaged \(arrays/.* is not as .*step 18 is used instead"):
        state, history = run(pair.folder)
    chex.assert_trees_all_equal(unbroken[0], state)
    assert unbroken[1] == history
    pair.load(state, step=24)


# --- Damage -----------------------------------------------------------------------------------------------------------


def test_flips_and_cuts_of_every_file_are_found(pair):
    rng = np.random.default_rng(0)
    files = files_of(pair.folder / "step_24")
    assert len(files) > 6 and pair.folder / "step_24" / "manifest.json" in files
    like, before = state_of(0), pair.load(state_of(0), step=18)
    for path in files:
        data, name = path.read_bytes(), re.escape(path.relative_to(pair.folder / "step_24").as_posix())
        flips = rng.integers(0, 8 * len(data), 20 if data else 0)
        for bit in flips:
            flip(path, bit)
            with pytest.raises(ValueError, match=rf"step_24 is damaged \({name} is not as it was written\)"):
                pair.load(like, step=24)
            path.write_bytes(data)
        for damaged in [data + b"\0", *([data[: rng.integers(len(data))]] if data else [])]:
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"step_24 is damaged \({name} is not as it was written\)"):
                pair.load(like, step=24)
        path.unlink()
        with pytest.warns(UserWarning, match=f"step_24 is damaged.*{name}.*step 18 is used instead") as caught:
            state, notes = pair.load(like)
        assert len(caught) == 1
        chex.assert_trees_all_equal(state, before[0])
        assert notes == before[1] and notes["history"][-1]["step"] == 16
        path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pair.load(like)[0].step == 24


def test_what_does_not_belong_there_is_damage(pair):
    (pair.folder / "step_24" / "arrays" / "copy").write_text("x")
    with pytest.raises(ValueError, match=r"step_24 is damaged \(arrays/copy does not belong there\)"):
        pair.load(state_of(0), step=24)
    (pair.folder / "step_24" / "arrays" / "copy").unlink()
    (pair.folder / "step_24").rename(pair.folder / "step_30")
    with pytest.warns(UserWarning, match=r"step_30 is damaged \(manifest.json is of step 24\); step 18 is used"):
        assert pair.load(state_of(0))[0].step == 18


def test_no_whole_checkpoint_is_an_error_and_never_a_new_start(pair):
    (pair.folder / "step_24" / "manifest.json").unlink()
    flip(pair.folder / "step_18" / "manifest.json", 99)
    message = r"no checkpoint in .*run can be used: step_24 is damaged \(.*manifest.json'\); step_18 is damaged \(mani"
    with pytest.raises(ValueError, match=message + ".* remove the folder to start from step 0"):
        run(pair.folder)
    with pytest.raises(FileNotFoundError, match=r"must be one of the checkpoints \[18, 24\] in .*run, got 6"):
        pair.load(state_of(0), step=6)
    with pytest.raises(FileNotFoundError, match=r"must be one of the checkpoints \[\] in .*empty, got None"):
        Checkpoints(pair.folder / "empty").load(state_of(0))


def test_the_last_whole_one_stays_when_those_after_it_are_damaged(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (3, 6, 9):
        checkpoints.save(step, state_of(step), {})
    assert checkpoints.steps() == [6, 9]
    flip(tmp_path / "step_9" / "manifest.json", 5)
    checkpoints.save(12, state_of(12), {})
    assert checkpoints.steps() == [6, 12]
    flip(tmp_path / "step_12" / "manifest.json", 5)
    with pytest.warns(UserWarning, match="step 6 is used"):
        state, _ = checkpoints.load(state_of(0))
    chex.assert_trees_all_equal(state, state_of(6))
    checkpoints.save(9, state_of(9), {})
    assert checkpoints.steps() == [6, 9]
    flip(tmp_path / "step_9" / "manifest.json", 5)
    checkpoints.save(9, state_of(10), {})  # over a damaged one
    chex.assert_trees_all_equal(checkpoints.load(state_of(0), step=9)[0], state_of(10))
    checkpoints.save(8, state_of(8), {})  # the run went back behind a whole one, which is not what it goes on from
    assert checkpoints.steps() == [6, 8] and checkpoints.load(state_of(0))[0].step == 8
    with pytest.raises(ValueError, match="keep must be 1 or more, got 0"):
        Checkpoints(tmp_path, keep=0)


def test_what_a_killed_save_left_is_not_a_checkpoint_and_is_cleared_away(pair):
    shutil.copytree(pair.folder / "step_24", pair.folder / "step_30.new")
    shutil.copytree(pair.folder / "step_18", pair.folder / "step_12.old")
    assert pair.steps() == [18, 24]
    with pytest.warns(UserWarning, match="step_30 was not written to its end; step 24 is used instead"):
        assert pair.load(state_of(0))[0].step == 24
    (pair.folder / "step_n").mkdir()  # not ours
    pair.save(36, state_of(36), {})
    assert sorted(path.name for path in pair.folder.iterdir()) == ["step_24", "step_36", "step_n"]


# --- In the background ------------------------------------------------------------------------------------------------


def test_a_save_in_the_background_has_the_numbers_of_its_moment(tmp_path):
    count = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    state = {f"leaf_{i}": jnp.zeros((256, 1024)) for i in range(4)}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (10, 20):
            for _ in range(10):
                state = count(state)
            checkpoints.save(step, state, {}, background=True)
    for step in (10, 20):
        loaded, _ = checkpoints.load(state, step=step)
        assert all((np.asarray(leaf) == step).all() for leaf in loaded.values())


def test_an_error_in_the_background_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state_of(3), {})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomic", full)
        checkpoints.save(6, state_of(6), {}, background=True)
        with pytest.raises(OSError, match="No space left on device"):
            checkpoints.save(9, state_of(9), {})
    assert checkpoints.steps() == [3]
    checkpoints.save(9, state_of(9), {})
    assert checkpoints.load(state_of(0))[0].step == 9
