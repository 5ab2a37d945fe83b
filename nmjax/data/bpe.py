"""Tokenizers for training on free text: a byte-level BPE trained on the spot, the bundled one, or a published one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"  # of GPT-2 and its kin: ends a document, and is what the next one begins after
SMALLEST = 257  # every byte, and END_OF_TEXT


def train_bpe(documents: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al. 2016; the form of GPT-2), the same for the same documents.

    No text has an unknown token, and `decode(encode(text)) == text`. END_OF_TEXT is its one special token: BOS, EOS and
    padding. Nothing is put around a text.

    Args:
        documents: texts that the merges are learnt from.
        vocab: tokens in all, `SMALLEST` or more. There are fewer where the documents have no pair left to merge.

    Raises:
        ValueError: if `vocab` is below `SMALLEST`.
    """
    if vocab < SMALLEST:
        raise ValueError(f"vocab must be {SMALLEST} or more (every byte, and {END_OF_TEXT}), got {vocab}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def text_tokenizer(name: str, documents: Iterable[str]) -> PreTrainedTokenizerFast:
    """The tokenizer that `name` asks for; the model's vocabulary is its `len`.

    Args:
        name: 'bpe:1024' trains one of so many tokens on `documents` (see `train_bpe`); 'bundled' is the bundled
            model's; anything else is a folder, or an id on the hub, such as gpt2, which needs the network once.
        documents: of the training part alone, so that nothing held out shapes the vocabulary.

    Raises:
        ValueError: for a size that is no number or too small, or a tokenizer that is not there or can't be read.
    """
    kind, colon, size = name.partition(":")
    if kind == "bpe" and colon:
        if not size.isdecimal():
            raise ValueError(f"tokenizer={name!r}; wanted bpe:SIZE, such as bpe:1024")
        return train_bpe(documents, int(size))
    if name == "bundled":
        from nmjax.data.tokenizer import build_tokenizer
        from nmjax.data.world import bundled_world

        return build_tokenizer(bundled_world())
    try:
        return _transformers().AutoTokenizer.from_pretrained(os.path.expanduser(name))
    except Exception as error:  # whatever transformers raises, the cause is a tokenizer it can't get or read
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"tokenizer={name!r}; wanted bpe:SIZE, 'bundled', or a tokenizer in a folder or on the hub, but: {reason}"
        ) from error


def _transformers() -> Any:
    # Where torch is missing, transformers says so on import, as if anything were wrong.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers  # slow to import

    return transformers
