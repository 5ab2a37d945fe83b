"""Selections against a plain loop that follows their definition."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from nmjax.forward_pass import _forward
from nmjax.interventions.where import head_mask, layer_mask, stack_where, where


@pytest.mark.parametrize(
    "layers, count, wanted",
    [
        ("all", 5, [0, 1, 2, 3, 4]),
        ("last", 5, [4]),
        ("shallow", 12, [0, 1, 2, 3]),
        ("mid", 12, [4, 5, 6, 7]),
        ("deep", 12, [8, 9, 10, 11]),
        ("shallow", 32, range(0, 10)),
        ("mid", 32, range(10, 21)),
        ("deep", 32, range(21, 32)),
        ("mid", 2, [0]),
        ([0, -1], 4, [0, 3]),
        (2, 4, [2]),
        ([0.0, 0.5, 1.0], 4, [0, 2, 3]),
        (np.arange(2), 4, [0, 1]),
    ],
)
def test_layers(layers, count, wanted):
    assert np.flatnonzero(layer_mask(layers, count)).tolist() == list(wanted)


@pytest.mark.parametrize("layers", ["middle", [4], [-5], 1.5, [True], "shallow", []])
def test_bad_layers_are_named(layers):
    with pytest.raises(ValueError, match="layers"):
        layer_mask(layers, 2 if layers == "shallow" else 4)


def test_heads():
    assert np.flatnonzero(head_mask([0, -1], 4)).tolist() == [0, 3]
    assert head_mask(None, 3).all()
    for bad in ([4], [0.5], []):
        with pytest.raises(ValueError, match="heads"):
            head_mask(bad, 4)


def by_the_definition(kwargs, position, token, prompt_len) -> bool:
    region = "prompt" if position < prompt_len else "generation"
    place = position if region == "prompt" else position - prompt_len
    end = prompt_len if region == "prompt" else 0

    def named(prefix):
        found = False
        for index in kwargs.get(f"{prefix}_positions", ()):
            found |= place == (index + end if index < 0 else index)
        if f"{prefix}_window" in kwargs:
            start, stop = kwargs[f"{prefix}_window"]
            start = 0 if start is None else start + end if start < 0 else start
            stop = 10**9 if stop is None else stop + end if stop < 0 else stop
            found |= start <= place < stop
        return found or token in kwargs.get(f"{prefix}_tokens", ())

    including = [k for k in kwargs if not k.startswith("exclude_")]
    whole = kwargs.get(region) == "all" or not including
    return (whole or named(region)) and not named(f"exclude_{region}")


CASES = [
    dict(),
    dict(prompt="all"),
    dict(generation="all"),
    dict(prompt_positions=[0, -1]),
    dict(prompt_positions=[2], generation="all"),
    dict(prompt_window=(1, -1)),
    dict(prompt_window=(-3, None), generation_window=(1, 3)),
    dict(prompt_window=(None, 2), exclude_prompt_positions=[0]),
    dict(generation_positions=[0, 2], exclude_generation_tokens=[4]),
    dict(prompt_tokens=[3, 4], generation_tokens=[5]),
    dict(exclude_prompt_window=(0, 2)),
    dict(exclude_prompt_tokens=[4], exclude_generation_window=(2, None)),
    dict(prompt="all", exclude_prompt_positions=[-1]),
]


def test_masks_follow_the_definition_in_one_batch():
    """All cases side by side, at three prompt lengths: fields of different lengths are padded without effect."""
    rows = list(itertools.product(CASES, (4, 6, 9)))
    stacked = stack_where([where(**kwargs) if kwargs else None for kwargs, _ in rows])
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 7, (len(rows), 14))
    # Any order of positions, and -1 for padding: a selection knows a token by its position alone.
    position = rng.permuted(np.tile(np.arange(14), (len(rows), 1)), axis=1)
    lengths = np.asarray([length for _, length in rows])
    seen = stacked.mask(jnp.asarray(position), jnp.asarray(tokens), jnp.asarray(lengths))
    wanted = [
        [by_the_definition(kwargs, position[i, t], tokens[i, t], length) for t in range(14)]
        for i, (kwargs, length) in enumerate(rows)
    ]
    np.testing.assert_array_equal(seen, wanted)
    assert 0.2 < np.mean(wanted) < 0.8


@pytest.mark.parametrize(
    "kwargs, word",
    [
        (dict(prompt_positions=[]), "prompt_positions"),
        (dict(generation_tokens=[]), "generation_tokens"),
        (dict(prompt_window=(3, 3)), "prompt_window"),
        (dict(prompt_window=(-1, -2)), "prompt_window"),
        (dict(generation_positions=[-1]), "generation"),
        (dict(generation_window=(-2, None)), "generation"),
        (dict(prompt="none", generation="none"), "empty"),
        (dict(prompt="some"), "prompt"),
        (dict(prompt_window=(1, 2, 3)), "prompt_window"),
    ],
)
def test_bad_selections_are_named(kwargs, word):
    with pytest.raises(ValueError, match=word):
        where(**kwargs)
    with pytest.raises(TypeError):
        where(prompt_position=[1])  # an unknown selector never passes silently


def test_a_selection_outside_the_prompt_is_an_error(tiny_lm):
    steer = nmjax.steer(np.ones(32), 1.0)
    for selection in (dict(prompt_positions=[3]), dict(prompt_positions=[-4]), dict(prompt_window=(3, 9))):
        with pytest.raises(ValueError, match=r"packs\[0\].*prompt"):
            nmjax.forward(tiny_lm, [[5, 6, 7]], packs=steer.on(**selection))


def test_only_the_selected_tokens_change(tiny_lm):
    """At the embedding nothing mixes tokens, so the changed positions can be read off."""

    class Add(nmjax.Effect):
        def embed(self, x, ctx):
            return x + 1

    prompts = [[5, 6, 7, 8, 9], [5, 6, 7]]
    packs = [Add().on(prompt_positions=[1, -1]), Add().on(prompt_tokens=[6])]
    clean = nmjax.forward(tiny_lm, prompts, capture="embed").activations["embed"]
    moved = nmjax.forward(tiny_lm, prompts, packs=packs, capture="embed").activations["embed"]
    np.testing.assert_allclose(
        np.abs(moved - clean).max(-1), [[0, 1, 0, 0, 1], [0, 0, 0, 1, 0]], atol=1e-6
    )  # the second row is padded by two on the left


def test_selection_is_data_not_program(tiny_lm):
    effect = nmjax.steer(np.ones(32), 1.0)
    before = _forward._cache_size()
    for place in (0, 1, 2):
        nmjax.forward(tiny_lm, [[5, 6, 7]], packs=effect.on(prompt_positions=[place]))
    assert _forward._cache_size() - before == 1
