"""Text generation: prefill, then one compiled loop on the device, each row under its own intervention.

    tokens   [_ _ a b c]     slots 0..4: the prompt, left-padded, so every row's next token goes to the same slot
    k_pos    [- - 0 1 2]     the position each slot holds, -1 = empty: masks, RoPE, decay and windows read only this
    decode   slot 5, 6, ...  a finished row writes -1 and is never seen again

Everything a user sweeps (doses, seeds, temperatures, lengths within a bucket) is an array, so nothing recompiles.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from nmjax.forward_pass import gather
from nmjax.interventions.compose import as_rows
from nmjax.interventions.effect import Context
from nmjax.interventions.sites import ACTIVATIONS, act
from nmjax.lm import LanguageModel
from nmjax.rows import (
    Rows,
    bucket,
    check_context,
    chunks,
    encode_all,
    make_rows,
    notes,
    per_row,
    prefaced,
    prompt_width,
    row_keys,
)
from nmjax.sampling import Sampling, choose, token_logprob
from nmjax.signals import Monitor, Seen

STOP_CHECK_EVERY = 16  # tokens between looks at the text, when there are stop strings


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns: one entry a row everywhere."""

    text: list[str]  # the continuation only, up to and without a stop string
    full_text: list[str]  # prompt and continuation
    tokens: list[list[int]]  # generated ids, the one that ended the row included
    logprobs: list[np.ndarray]  # float32, of those tokens at temperature 1 before the `logits` site
    sample_logprobs: list[np.ndarray]  # float32, under the distribution they were drawn from; 0 where greedy
    finish_reason: list[str]  # "eos", "stop" or "length"; "halted" by a monitor
    prompt_tokens: list[list[int]]
    notes: list[str]  # doses beyond 1, clamped values, effects and arguments that greedy decoding makes inert
    # With a monitor, what it saw of each row: signals by name, float32 [steps], and p_yes and p_no of the first step.
    # The token of the step at which a row was halted is not in `tokens`.
    seen: list[dict] | None = None


class Limits(flax.struct.PyTreeNode):
    """When rows end."""

    max_new: np.ndarray  # int32 [B]
    min_new: np.ndarray  # int32 [B]
    eos: np.ndarray  # int32 [E], -1 pads


class DecodeState(flax.struct.PyTreeNode):
    """Everything that changes between steps. M: room for new tokens."""

    step: jax.Array  # int32 []: tokens written so far
    tokens: jax.Array  # int32 [B, M], -1 after a row's end
    logprobs: jax.Array  # float32 [B, M]
    sample_logprobs: jax.Array  # float32 [B, M]
    done: jax.Array  # bool [B]
    k_pos: jax.Array  # int32 [B, S]
    cache: list  # per layer {"k", "v"} [B, K, S, H]
    counts: jax.Array | None  # int32 [B, V], only if an effect reads them
    seen: Seen | None  # only with a monitor


def generate(
    lm: LanguageModel,
    prompts=None,
    packs=None,
    *,
    messages=None,
    max_new_tokens=64,
    min_new_tokens=0,
    temperature=None,
    top_p=1.0,
    top_k=0,
    seed=0,
    row_ids=None,
    stop: str | Sequence[str] = (),
    eos_token_id=None,
    num_return_sequences: int = 1,
    width: int | None = None,
    batch_size: int | None = None,
    monitor: Monitor | None = None,
) -> Generation:
    """Continues every prompt under its own intervention.

    Args:
      prompts: a list of texts or of token id lists.
      packs: one intervention for all rows, or a list with one (or None) a row.
      messages: instead of prompts, a list of chats (lists of {"role", "content"}), through the chat template.
      max_new_tokens, min_new_tokens, temperature, top_p, top_k, seed: one value, or one a row. Greedy unless a
        temperature above 0 is given; it multiplies the temperature of a pack.
      row_ids: which random stream a row draws from, see `rows.row_keys`.
      stop: texts that end a row; they are cut from `text`.
      eos_token_id: an id or several; None = the model's own.
      num_return_sequences: copies of every row, next to each other.
      width: padded prompt length; None = a bucket that holds the longest. Fix it over a data set to compile once.
      batch_size: rows run together; None = as many as fit in memory.
      monitor: watches every step and may halt rows; of as many rows as prompts, see `signals.make_monitor`.
    Raises:
      ValueError: bad input, before any compute; the message names the argument, the value seen and the value wanted.
    """
    ids = _prompt_ids(lm, prompts, messages)
    copies = num_return_sequences
    if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
        raise ValueError(f"num_return_sequences={copies!r}, wanted an integer >= 1")

    if monitor is not None and len(monitor.tau) != len(ids):
        raise ValueError(f"monitor is one of {len(monitor.tau)} rows, wanted {len(ids)}, one a prompt")

    def rowwise(argument, value, dtype, low, high=None):
        return np.repeat(per_row(argument, value, len(ids), dtype, low, high), copies)

    max_new = rowwise("max_new_tokens", max_new_tokens, np.int32, 1)
    min_new = rowwise("min_new_tokens", min_new_tokens, np.int32, 0)
    heat = rowwise("temperature", _or_zero(temperature), np.float32, 0, float(np.finfo(np.float32).max))
    nucleus = rowwise("top_p", top_p, np.float32, 0, 1)
    if (nucleus <= 0).any():
        raise ValueError(f"top_p={top_p!r}, wanted above 0 and at most 1")
    largest = rowwise("top_k", top_k, np.int32, 0)
    interventions = [iv for iv in as_rows(packs, len(ids)) for _ in range(copies)]
    keys = row_keys(seed, row_ids, len(ids), copies)
    ids = [row for row in ids for _ in range(copies)]
    whole, spans = prefaced(lm, ids, interventions)
    check_context(lm, [len(row) for row in whole], max_new.tolist(), "new tokens")
    stops = _stop_strings(lm, stop)
    eos = _eos_ids(lm, eos_token_id)

    width, room = prompt_width(width, max(map(len, whole))), bucket(int(max_new.max()))
    parts = chunks(lm, interventions, width + room, batch_size)
    batches = [  # all of them before the first is run, so that bad input is found before any compute
        make_rows(lm, [whole[i] for i in take], [spans[i] for i in take], [interventions[i] for i in take], width,
                  keys[np.asarray(take)])
        for take, _ in parts
    ]  # fmt: skip
    produced = []
    for rows, (take, real) in zip(batches, parts, strict=True):
        sampling = Sampling(*(rows.follow(values[take]) for values in (heat, nucleus, largest)))
        limits = Limits(rows.follow(max_new[take]), rows.follow(min_new[take]), eos)
        watch = None if monitor is None else monitor.take(rows.follow(np.asarray(take) // copies))
        produced += _run(lm, rows, sampling, limits, room, stops, watch)[:real]
    return _collect(lm, ids, produced, notes(interventions) + _inert(interventions, heat, nucleus, largest))


def _run(
    lm, rows: Rows, sampling: Sampling, limits: Limits, room: int, stops: tuple[str, ...], monitor: Monitor | None
) -> list[dict]:
    """One batch to its end; stop strings are looked for between re-entries of the same program."""
    last = int(limits.max_new.max())
    state = prefill(lm.module, room, lm.variables, rows, sampling, limits, monitor)
    ended: dict[int, tuple[int, str]] = {}  # row -> (tokens kept, text) where a stop string was found
    while True:
        until = min(int(state.step) + STOP_CHECK_EVERY, last) if stops else last
        state = decode(lm.module, lm.variables, rows, sampling, limits, until, state, monitor)
        if stops:
            tokens = np.asarray(state.tokens)
            for i in _asked_for(rows):
                new = tokens[i][tokens[i] >= 0]
                found = None if i in ended else _find_stop(lm, rows.visible(i), new, stops)
                if found:
                    ended[i] = found
            state = state.replace(done=state.done | rows.follow(np.isin(_asked_for(rows), list(ended))))
        if bool(state.done.all()) or int(state.step) >= last:
            break
    tokens, logprobs, sampled = (np.asarray(x) for x in (state.tokens, state.logprobs, state.sample_logprobs))
    seen = jax.tree.map(np.asarray, state.seen)
    results = []
    for i in _asked_for(rows):
        kept = ended[i][0] if i in ended else int((tokens[i] >= 0).sum())
        ids = [int(t) for t in tokens[i, :kept]]
        halted = seen is not None and bool(seen.halted[i]) and i not in ended
        reason = "stop" if i in ended else "halted" if halted else "eos" if ids[-1] in limits.eos else "length"
        text = ended[i][1] if i in ended else None
        row = dict(ids=ids, logprobs=logprobs[i, :kept], sampled=sampled[i, :kept], reason=reason, text=text)
        results.append(row if seen is None else row | dict(seen=seen.of_row(i, kept + halted)))
    return results


def _asked_for(rows: Rows) -> np.ndarray:
    """Indices of the rows that are not hidden."""
    return np.arange(len(rows.tokens) if rows.owner is None else (rows.owner == np.arange(len(rows.owner))).sum())


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(
    module, room: int, variables, rows: Rows, sampling: Sampling, limits: Limits, monitor: Monitor | None = None
) -> DecodeState:
    """Runs the prompts, fills the cache's first T slots, and writes the first new token of every row."""
    B, T = rows.tokens.shape
    variables = rows.adapted(variables)
    dtype = jax.tree.leaves(variables["params"])[0].dtype
    ctx = rows.context()
    cache = module.init_cache(B, T + room, dtype)
    hidden, cache, states = _pass(module, variables, rows.tokens, ctx, rows.effects, cache, monitor)
    logits = module.apply(variables, hidden[:, -1:], method="unembed")[:, 0]
    counted = any(effect.reads_counts for effect in rows.effects)
    state = DecodeState(
        step=jnp.int32(0),
        tokens=jnp.full((B, room), -1, jnp.int32),
        logprobs=jnp.zeros((B, room), jnp.float32),
        sample_logprobs=jnp.zeros((B, room), jnp.float32),
        done=jnp.zeros(B, bool),
        k_pos=jnp.pad(ctx.k_pos, ((0, 0), (0, room)), constant_values=-1),
        cache=cache,
        counts=jnp.zeros(logits.shape, jnp.int32) if counted else None,
        seen=None if monitor is None else monitor.start(B, room, hidden.shape[-1]),
    )
    return _write(state, logits, states, ctx, rows, sampling, limits, monitor)


def _pass(module, variables, tokens, ctx: Context, effects, cache, monitor: Monitor | None):
    """Hidden states [B, T, D], the new cache, and for a monitor the states [L, B, D] after each block at the end."""
    if monitor is None:
        return *module.apply(variables, tokens, ctx=ctx, effects=effects, cache=cache), None
    (hidden, cache), sown = module.apply(
        variables, tokens, ctx=ctx, effects=effects, cache=cache, mutable=[ACTIVATIONS]
    )
    return hidden, cache, gather(sown[ACTIVATIONS], "resid_post")[:, :, -1]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=6)
def decode(
    module, variables, rows: Rows, sampling: Sampling, limits: Limits, until, state: DecodeState,
    monitor: Monitor | None = None,
) -> DecodeState:  # fmt: skip
    """Generates until every row is done or `until` tokens are written."""
    T = rows.tokens.shape[1]
    variables = rows.adapted(variables)

    def more(state):
        return (state.step < until) & ~state.done.all()

    def step(state):
        slot = T + state.step - 1
        tokens = jnp.maximum(jax.lax.dynamic_slice_in_dim(state.tokens, state.step - 1, 1, axis=1), 0)
        position = jnp.where(state.done, -1, rows.prompt_len + state.step - 1)[:, None]
        k_pos = jax.lax.dynamic_update_slice_in_dim(state.k_pos, position, slot, axis=1)
        ctx = Context(position, k_pos, tokens, rows.prompt_len, slot, keys=rows.keys, preface=rows.preface)
        hidden, cache, states = _pass(module, variables, tokens, ctx, rows.effects, state.cache, monitor)
        logits = module.apply(variables, hidden, method="unembed")[:, 0]
        return _write(state.replace(cache=cache, k_pos=k_pos), logits, states, ctx, rows, sampling, limits, monitor)

    return jax.lax.while_loop(more, step, state)


def _write(
    state: DecodeState, logits, states, ctx: Context, rows: Rows, sampling: Sampling, limits: Limits,
    monitor: Monitor | None,
) -> DecodeState:  # fmt: skip
    """Chooses the next token of every row from logits [B, V] and writes it; rows that are done write nothing."""
    B, V = logits.shape
    ctx = ctx.replace(counts=state.counts, rivals=rows.rivals(logits))
    # Before the effects: a cut that left only the end of the text would otherwise leave nothing.
    too_early = (state.step < limits.min_new)[:, None] & (jnp.arange(V) == limits.eos[:, None]).any(0)
    final = act("logits", jnp.where(too_early, -jnp.inf, logits), ctx, rows.effects)
    # One stream a row, indexed by the position of the token being written: neither batch nor chunk can shift it.
    keys = jax.vmap(jax.random.fold_in)(rows.keys, rows.prompt_len + state.step)
    token, sample_logprob = choose(final, sampling, keys)
    token = rows.follow(token)
    logprob = token_logprob(logits, token)
    seen, done = state.seen, state.done
    if monitor is not None and seen is not None:
        seen, halts = monitor.observe(seen, logits, states, token, state.step, ~done)
        done = done | rows.follow(halts)  # before the token is accepted

    def put(buffer, value, blank):
        value = jnp.where(done, blank, value)[:, None]
        return jax.lax.dynamic_update_slice_in_dim(buffer, value, state.step, axis=1)

    counts = state.counts
    if counts is not None:
        counts = counts.at[jnp.arange(B), token].add(jnp.where(done, 0, 1))
    ends = (token[:, None] == limits.eos).any(1) | (state.step + 1 >= limits.max_new)
    return state.replace(
        step=state.step + 1,
        tokens=put(state.tokens, token, -1),
        logprobs=put(state.logprobs, logprob, 0.0),
        sample_logprobs=put(state.sample_logprobs, sample_logprob, 0.0),
        done=done | ends,
        counts=counts,
        seen=seen,
    )


def _prompt_ids(lm: LanguageModel, prompts, messages) -> list[list[int]]:
    if (prompts is None) == (messages is None):
        raise ValueError("prompts, messages: wanted exactly one of them")
    if messages is None:
        return encode_all(lm, prompts)
    if lm.tokenizer is None or not lm.tokenizer.chat_template:
        raise ValueError("messages: this model's tokenizer has no chat template, pass prompts")
    if not isinstance(messages, list | tuple) or not messages or not all(map(_is_chat, messages)):
        raise ValueError(f"messages={messages!r}, wanted a list of chats, each a list of role and content")
    texts = [
        lm.tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=True) for chat in messages
    ]
    # The template writes the special tokens itself.
    return [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def _is_chat(chat) -> bool:
    return isinstance(chat, list | tuple) and bool(chat) and all(isinstance(m, Mapping) and "role" in m for m in chat)


def _or_zero(temperature):
    if isinstance(temperature, list | tuple):
        return [0.0 if t is None else t for t in temperature]
    return 0.0 if temperature is None else temperature


def _stop_strings(lm: LanguageModel, stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else () if stop is None else stop
    if not isinstance(stops, list | tuple) or any(not isinstance(s, str) or not s for s in stops):
        raise ValueError(f"stop={stop!r}, wanted non-empty texts")
    if stops and lm.tokenizer is None:
        raise ValueError(f"stop={stop!r} needs a tokenizer, and this model has none")
    return tuple(stops)


def _eos_ids(lm: LanguageModel, eos_token_id) -> np.ndarray:
    """int32 [E], a multiple of 4, so that one id more is the same program."""
    ids = lm.eos_ids if eos_token_id is None else eos_token_id
    ids = [ids] if isinstance(ids, int | np.integer) else ids
    if not isinstance(ids, list | tuple | np.ndarray) or not all(
        isinstance(i, int | np.integer) and not isinstance(i, bool) and 0 <= i < lm.config.vocab for i in ids
    ):
        raise ValueError(f"eos_token_id={eos_token_id!r}, wanted ids from 0 to {lm.config.vocab - 1}")
    ids = [*ids, -1]
    return np.asarray(ids + [-1] * (-len(ids) % 4), np.int32)


def _find_stop(lm: LanguageModel, prompt, tokens: np.ndarray, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """(tokens up to the one that completed the first stop string, the text before it)."""
    text = _continuation(lm, prompt, tokens)[1]
    if not any(stop in text for stop in stops):
        return None
    for kept in range(1, len(tokens) + 1):
        text = _continuation(lm, prompt, tokens[:kept])[1]
        starts = [text.find(stop) for stop in stops if stop in text]
        if starts:
            return kept, text[: min(starts)]
    return None


def _decode(lm: LanguageModel, tokens) -> str:
    return lm.tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True) if lm.tokenizer else ""


def _continuation(lm: LanguageModel, prompt, tokens) -> tuple[str, str]:
    """The prompt's text, and what the tokens add to it.

    Decoded together, so that a tokenizer which glues pieces keeps the space between them.
    """
    before, whole = _decode(lm, prompt), _decode(lm, [*prompt, *tokens])
    return before, whole[len(before) :] if whole.startswith(before) else _decode(lm, tokens)


def _inert(interventions, heat, nucleus, largest) -> list[str]:
    found = []
    for i, iv in enumerate(interventions):
        if heat[i] > 0:
            continue
        # What follows may add to the logits, and then their scale matters.
        last = [e for e in iv.effects if e.touches("logits")]
        while last and last[-1].keeps_best:
            found.append(f"row {i}: {type(last.pop()).__name__} is inert under greedy decoding")
        if nucleus[i] < 1 or largest[i] > 0:
            found.append(f"row {i}: top_p and top_k are inert under greedy decoding, give a temperature")
    return found


def _collect(lm: LanguageModel, ids: list[list[int]], produced: list[dict], remarks: list[str]) -> Generation:
    text, full_text = [], []
    for prompt, row in zip(ids, produced, strict=True):
        before, continuation = _continuation(lm, prompt, row["ids"])
        if row["text"] is not None:
            continuation = row["text"]
        text.append(continuation)
        full_text.append(before + continuation)
    return Generation(
        text=text,
        full_text=full_text,
        tokens=[row["ids"] for row in produced],
        logprobs=[row["logprobs"] for row in produced],
        sample_logprobs=[row["sampled"] for row in produced],
        finish_reason=[row["reason"] for row in produced],
        prompt_tokens=ids,
        notes=remarks,
        seen=[row["seen"] for row in produced] if produced and "seen" in produced[0] else None,
    )
