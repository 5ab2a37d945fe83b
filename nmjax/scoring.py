"""How likely a model finds each of several answers, under per-row interventions."""

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from nmjax.interventions.compose import as_rows
from nmjax.interventions.effect import Context, static
from nmjax.interventions.sites import act
from nmjax.lm import LanguageModel
from nmjax.prefix import Behind, SharedPrefix
from nmjax.rows import Rows, check_context, chunks, encode_all, make_rows, notes, prefaced, row_keys

FLOOR = 1e-12  # the probability of a choice that truncation removed


class ChoiceScores(flax.struct.PyTreeNode):
    """Scores of C choices in B rows. A choice of several tokens has the sum of their log-probabilities."""

    logprobs: jax.Array  # float32 [B, C] over the whole vocabulary, after all effects that remove no token
    sober_logprobs: jax.Array  # float32 [B, C], before the `logits` site
    probs: jax.Array  # float32 [B, C], sum 1: after truncation too; a removed choice has FLOOR before renormalising
    sober_probs: jax.Array  # float32 [B, C], `sober_logprobs` renormalised over the choices
    mass: jax.Array  # float32 [B]: what the choices hold together of the vocabulary's probability
    sober_mass: jax.Array  # float32 [B]
    removed: jax.Array  # float32 [B]: the share of `mass` which truncation removed
    kept: jax.Array  # bool [B, C]: choices that truncation leaves; the likeliest one is among them
    notes: tuple[str, ...] = static(default=())  # doses beyond 1 and clamped values

    def among(self, choices: Sequence[int]) -> "ChoiceScores":
        """The scores of some of the choices, by index, renormalised among them."""
        at = np.asarray(choices)
        return _summarise(self.logprobs[:, at], self.sober_logprobs[:, at], self.kept[:, at]).replace(notes=self.notes)


def score(lm: LanguageModel, prompts, choices, packs=None, **options):
    """Log-probabilities [B, C] of the choices after the prompts, over the vocabulary: `score_choices(...).logprobs`."""
    return score_choices(lm, prompts, choices, packs, **options).logprobs


def score_choices(
    lm: LanguageModel, prompts, choices, packs=None, *, width: int | None = None, batch_size: int | None = None,
    seed=0, row_ids=None, prefix: SharedPrefix | None = None,
) -> ChoiceScores:  # fmt: skip
    """Scores the same number of choices after every prompt.

    Choices are tokenised in context: what prompt + choice adds to the prompt. What all choices of a row begin with
    moves to the prompt, so four one-token choices cost one pass.

    Args:
      prompts: a list of texts or of token id lists.
      choices: a list of texts (or id lists) for all rows, or a list of such lists, one a row.
      packs: one intervention for all rows, or a list with one (or None) a row.
      width: padded prompt length; None = the longest prompt. Fix it over a data set to compile once.
      batch_size: rows run together; None = as many as fit in memory.
      prefix: what the prompts begin with, run before by `share_prefix` under the same interventions. Prompts are given
        whole all the same; only what follows the prefix is run, and `width` is the width of that.
    Raises:
      ValueError: bad input; the message names the argument, the value seen and the value wanted.
    """
    ids = encode_all(lm, prompts)
    interventions = as_rows(packs, len(ids))
    keys = row_keys(seed, row_ids, len(ids))
    stems, endings = _split_all(lm, prompts, ids, choices)
    found = None if prefix is None else prefix.find(stems, interventions)
    stems, spans = prefaced(lm, stems, interventions)
    longest = max(len(ending) for row in endings for ending in row)
    extra = [max(len(ending) for ending in row) - 1 for row in endings]
    check_context(lm, [len(stem) for stem in stems], extra, "tokens of a choice")
    skipped = [0] * len(stems) if prefix is None else prefix.lengths[found].tolist()
    stems = [stem[n:] for stem, n in zip(stems, skipped, strict=True)]
    needed = max(map(len, stems)) + longest - 1
    if width is not None and (isinstance(width, bool) or not isinstance(width, int | np.integer)):
        raise ValueError(f"width={width!r}, wanted an integer of at least {needed}")
    if width is not None and width < needed:
        raise ValueError(f"width={width}, wanted at least {needed}, the longest prompt with its choices")
    batches = []
    for take, real in chunks(lm, interventions, width or needed, batch_size):
        # With one token a choice, the prompt's last position scores them all; else every choice is a row of its own.
        source = [i for i in take for _ in range(1 if longest == 1 else len(endings[i]))]
        tails = [[()] if longest == 1 else [ending[:-1] for ending in endings[i]] for i in take]
        texts = [stems[i] + list(tail) for i, row in zip(take, tails, strict=True) for tail in row]
        lengths = [skipped[i] + len(stems[i]) for i in source]
        rows = make_rows(
            lm, texts, [spans[i] for i in source], [interventions[i] for i in source], width or needed,
            keys[np.asarray(source)], lengths,
        )  # fmt: skip
        targets = _targets([endings[i] for i in take], longest)
        behind = None if prefix is None or found is None else prefix.behind(found[np.asarray(source)], rows)
        batches.append((rows, behind, targets, len(take), real))
    parts = []
    for rows, behind, targets, count, real in batches:  # after all are made, so bad input is found before any compute
        scores = _score(lm.module, lm.variables, rows, rows.follow(targets), behind)
        parts.append([x[: len(targets)].reshape(count, -1)[:real] for x in scores])
    scores = _summarise(*(jnp.concatenate(x) for x in zip(*parts, strict=True)))
    return scores.replace(notes=tuple(notes(interventions)))


def continuation_logprobs(
    lm: LanguageModel, prompts, continuations, packs=None, *, width: int | None = None, room: int | None = None,
    batch_size: int | None = None, seed=0, row_ids=None, prefix: SharedPrefix | None = None,
) -> list[np.ndarray]:  # fmt: skip
    """Log-probability of every token of a continuation, given the prompt and the tokens before it.

    At temperature 1 and before the `logits` site: for what `generate` wrote under the same packs, its `logprobs`.

    Args:
      prompts, packs, batch_size, prefix: as for `score_choices`; the prefix must leave a token of the prompt over.
      continuations: token ids, or texts, one for each prompt; a text is tokenised behind its prompt.
      width, room: padded lengths of prompt + continuation, and of the continuation; None = the longest. Fix them over a
        data set to compile once.
    Returns:
      float32, one array a row, of the continuation's length.
    Raises:
      ValueError: bad input, before any compute; the message names the argument, the value seen and the value wanted.
    """
    return _read_all(
        _of_target, lm, prompts, continuations, packs, width=width, room=room, batch_size=batch_size, seed=seed,
        row_ids=row_ids, prefix=prefix,
    )  # fmt: skip


def mean_logprobs(lm: LanguageModel, prompts, continuations, packs=None, **options) -> list[np.ndarray]:
    """Mean over the vocabulary of ln p, at every token of a continuation: -ln V - KL(uniform || p), in nats.

    p is the prediction of that token, at temperature 1 and before the `logits` site. Arguments, shapes and errors are
    those of `continuation_logprobs`.
    """
    return _read_all(_over_vocabulary, lm, prompts, continuations, packs, **options)


def _read_all(
    read, lm: LanguageModel, prompts, continuations, packs, *, width: int | None = None, room: int | None = None,
    batch_size: int | None = None, seed=0, row_ids=None, prefix: SharedPrefix | None = None,
) -> list[np.ndarray]:  # fmt: skip
    """What `read` says of every token of the continuations, see `continuation_logprobs`."""
    ids = encode_all(lm, prompts)
    if not _is_list(continuations) or len(continuations) != len(ids):
        raise ValueError(f"continuations={continuations!r}, wanted a list of {len(ids)}, one for each prompt")
    interventions = as_rows(packs, len(ids))
    keys = row_keys(seed, row_ids, len(ids))
    wholes = [
        _continue(lm, *row, i, "continuations") for i, row in enumerate(zip(prompts, ids, continuations, strict=True))
    ]
    for i, (whole, row) in enumerate(zip(wholes, ids, strict=True)):
        if whole[: len(row)] != row:
            raise ValueError(
                f"continuations[{i}] merges with the last token of its prompt; wanted token ids, or a space"
            )
    counts = [len(whole) - len(row) for whole, row in zip(wholes, ids, strict=True)]
    found = None if prefix is None else prefix.find(ids, interventions)
    texts, spans = prefaced(lm, [whole[:-1] for whole in wholes], interventions)  # nothing is asked of the last token
    check_context(lm, [len(text) for text in texts], [0] * len(texts), "more")
    lengths = [len(text) + 1 - count for text, count in zip(texts, counts, strict=True)]
    if prefix is not None:
        texts = [text[n:] for text, n in zip(texts, prefix.lengths[found], strict=True)]
    width, room = width or max(map(len, texts)), room or max(counts)
    if width < max(map(len, texts)) or room < max(counts) or room > width:
        raise ValueError(
            f"width={width}, room={room}, wanted at least {max(map(len, texts))} and {max(counts)}, and room <= width"
        )
    results: list[np.ndarray] = []
    for take, real in chunks(lm, interventions, width, batch_size):
        rows = make_rows(
            lm, [texts[i] for i in take], [spans[i] for i in take], [interventions[i] for i in take], width,
            keys[np.asarray(take)], [lengths[i] for i in take],
        )  # fmt: skip
        behind = None if prefix is None or found is None else prefix.behind(found[np.asarray(take)], rows)
        targets = np.zeros((len(take), room), np.int32)
        for target, i in zip(targets, take, strict=True):
            target[room - counts[i] :] = wholes[i][len(wholes[i]) - counts[i] :]
        values = np.asarray(_read(lm.module, read, lm.variables, rows, rows.follow(targets), behind))
        results += [values[k, room - counts[i] :] for k, i in enumerate(take[:real])]
    return results


def _of_target(logprobs, target):
    """float32 [B]: of [B, V], those of one token a row."""
    return jnp.take_along_axis(logprobs, target[:, None], axis=1)[:, 0]


def _over_vocabulary(logprobs, target):
    """float32 [B]: the mean of [B, V] over the vocabulary, whatever the token."""
    return logprobs.mean(axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read(module, read, variables, rows: Rows, targets, behind: Behind | None):
    """float32 [B, P]: `read` of the predictions of the last P positions, whose tokens are [B, P]."""
    P = targets.shape[1]
    variables = rows.adapted(variables)
    _, hidden = _hidden(module, variables, rows, behind)

    def at(position):  # one position of all rows at a time, or the logits of a large vocabulary would not fit
        here, target = position
        logits = module.apply(variables, here[:, None], method="unembed")[:, 0]
        return read(jax.nn.log_softmax(logits), target)

    return jax.lax.map(at, (hidden[:, -P:].swapaxes(0, 1), targets.T), batch_size=8).T


def _split_all(lm, prompts, ids, choices) -> tuple[list[list[int]], list[list[tuple[int, ...]]]]:
    """Stems (what every choice of a row begins with) and what each choice adds to its stem."""
    if not _is_list(choices) or len(choices) == 0:
        raise ValueError(f"choices={choices!r}, wanted a list of choices, or one list for every prompt")
    several = _is_list(choices[0]) and not _is_ids(choices[0])
    if several and len(choices) != len(ids):
        raise ValueError(
            f"choices has {len(choices)} lists, wanted one list of choices, or one list for each of {len(ids)} prompts"
        )
    per_row = list(choices) if several else [choices] * len(ids)
    stems: list[list[int]] = []
    endings: list[list[tuple[int, ...]]] = []
    done: dict[tuple[int, int], int] = {}  # rows that ask the same of the same prompt, under other packs
    for i, row in enumerate(per_row):
        earlier = done.setdefault((id(ids[i]), id(row)), i)
        if earlier < i:
            stems.append(stems[earlier])
            endings.append(endings[earlier])
            continue
        if not _is_list(row) or len(row) != len(per_row[0]):
            raise ValueError(f"choices[{i}]={row!r}, wanted a list of {len(per_row[0])} choices, as for every prompt")
        wholes = [_continue(lm, prompts[i], ids[i], choice, i) for choice in row]
        # The last token of the shortest choice must stay an ending. A single choice shares tokens with the prompt only.
        limit = min(len(whole) - 1 for whole in wholes)
        limit = min(limit, len(ids[i])) if len(wholes) == 1 else limit
        common = 0
        while common < limit and len({whole[common] for whole in wholes}) == 1:
            common += 1
        if common == 0:
            raise ValueError(f"choices: {row!r} merge with the only token of prompts[{i}], wanted a longer prompt")
        stems.append(wholes[0][:common])
        endings.append([tuple(whole[common:]) for whole in wholes])
    return stems, endings


def _is_list(value) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str)


def _is_ids(choice) -> bool:
    return all(isinstance(t, int | np.integer) for t in choice)


def _continue(lm, prompt, ids: list[int], choice, index: int, argument: str = "choices") -> list[int]:
    """Tokens of prompt + choice. Raises ValueError for an empty choice."""
    if isinstance(choice, str) and isinstance(prompt, str):
        whole = lm.encode(prompt + choice, argument)
    else:
        whole = ids + lm.encode(choice, argument, special=False)
    if whole == ids or len(whole) < 2:
        raise ValueError(f"{argument}: {choice!r} adds no token to prompts[{index}]")
    return whole


def _targets(endings: list[list[tuple[int, ...]]], longest: int) -> np.ndarray:
    """int32 [rows, P, C]: the tokens which the last P positions of a row predict, right-aligned, -1 = none."""
    if longest == 1:
        return np.asarray([[[ending[0] for ending in row]] for row in endings], np.int32)
    flat = [ending for row in endings for ending in row]
    return np.asarray([[-1] * (longest - len(ending)) + list(ending) for ending in flat], np.int32)[:, :, None]


@functools.partial(jax.jit, static_argnums=0)
def _score(module, variables, rows: Rows, targets, behind: Behind | None = None):
    """Per row and candidate: log-probability after and before the `logits` site, and whether truncation keeps it."""
    T, P = rows.tokens.shape[1], targets.shape[1]
    variables = rows.adapted(variables)
    ctx, hidden = _hidden(module, variables, rows, behind)
    logits = module.apply(variables, hidden[:, T - P :], method="unembed")
    softeners = tuple(effect for effect in rows.effects if not effect.truncates)
    counts = jnp.zeros((len(rows.tokens), logits.shape[-1]), jnp.int32)
    after, before, kept = jnp.zeros((3, len(rows.tokens), targets.shape[2]))
    for p in range(P):
        column, target = T - P + p, targets[:, p]
        here = ctx.replace(
            q_pos=ctx.q_pos[:, column : column + 1],
            tokens=rows.tokens[:, column : column + 1],
            counts=counts,
            rivals=rows.rivals(logits[:, p]),
        )
        real, index = target >= 0, jnp.maximum(target, 0)

        def log_prob(x, index=index):
            return jnp.take_along_axis(jax.nn.log_softmax(x), index, axis=1)

        cut = act("logits", logits[:, p], here, rows.effects)
        before += jnp.where(real, log_prob(logits[:, p]), 0)
        after += jnp.where(real, log_prob(act("logits", logits[:, p], here, softeners)), 0)
        kept += jnp.where(real & jnp.isneginf(jnp.take_along_axis(cut, index, axis=1)), 1, 0)
        counts = counts.at[jnp.arange(len(counts)), index[:, 0]].add(real[:, 0].astype(jnp.int32))
    return after, before, kept == 0


def _hidden(module, variables, rows: Rows, behind: Behind | None) -> tuple[Context, jax.Array]:
    """The context of a pass over the rows' tokens, behind a prefix or alone, and its hidden states [B, T, D]."""
    if behind is None:
        ctx = rows.context()
        return ctx, module.apply(variables, rows.tokens, ctx=ctx, effects=rows.effects)
    ctx, cache = behind.start(rows)
    hidden, _ = module.apply(variables, rows.tokens, ctx=ctx, effects=rows.effects, cache=cache)
    return ctx, hidden


def _summarise(after, before, kept) -> ChoiceScores:
    best = after == after.max(-1, keepdims=True)
    kept = kept | best  # truncation never removes the likeliest choice
    whole = jnp.exp(after)
    cut = jnp.where(kept, jax.nn.softmax(after), FLOOR)
    return ChoiceScores(
        logprobs=after,
        sober_logprobs=before,
        probs=cut / cut.sum(-1, keepdims=True),
        sober_probs=jax.nn.softmax(before),
        mass=whole.sum(-1),
        sober_mass=jnp.exp(before).sum(-1),
        removed=jnp.where(kept, 0, jax.nn.softmax(after)).sum(-1),
        kept=kept,
    )
