"""One stream of tokens for both models, and what of it is held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from experiments.lookahead.config import ConfidenceExperimentConfig
from nmjax.data.bpe import text_tokenizer
from nmjax.data.documents import read_documents, split_documents
from nmjax.data.token_stream import Chunks, batches, held_out_batches, token_stream
from nmjax.report import results

# The data themselves have one seed: all replicas learn from the same documents, in orders of their own.
DATA_SEED = 0
FEWEST = 10  # held-out chunks, to cross-validate on


@dataclasses.dataclass(frozen=True)
class ConfidenceData:
    """Chunks of L + 2 tokens: the confidence model reads all of one, the standard model its first L + 1.

    `held_out` are int32 [B, L + 2] each, of documents that are in no training chunk.
    """

    tokenizer: Any
    train: Chunks
    held_out: tuple[np.ndarray, ...]
    held_out_tokens: int  # of all held-out documents, evaluated or not

    @property
    def vocab(self) -> int:
        return len(self.tokenizer)

    def batches(self, batch_size: int, seeds: Sequence[int]) -> grain.DatasetIterator:
        """Training batches int32 [R, B, L + 2], without end; the iterator's state goes into a checkpoint."""
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        return iter(batches(self.train, batch_size, seeds).to_iter_dataset(ahead))

    def fingerprint(self) -> str:
        """A hash of every token that is trained or evaluated on."""
        held_out = [tokens.tobytes().hex() for tokens in self.held_out]
        return results.content_hash([self.train.stream.tobytes().hex(), self.train.context, held_out])


def prepare_confidence_data(config: ConfidenceExperimentConfig, tokenizer: Any = None) -> ConfidenceData:
    """Reads, splits by document, encodes and cuts what `config` asks for.

    Args:
      tokenizer: of transformers; None is the one that the configuration names, trained on the training part if it is to
        be trained.
    Raises:
      ValueError: data or a tokenizer that can't be had, too little text, or a `vocab_size` that isn't the tokenizer's.
    """
    documents = read_documents(config.dataset, config.documents, seed=DATA_SEED)
    train, held_out = split_documents(documents, config.eval_split_ratio, DATA_SEED)
    if tokenizer is None:
        name = f"bpe:{config.vocab_size}" if config.tokenizer == "bpe" else config.tokenizer
        tokenizer = text_tokenizer(name, train)
        if config.tokenizer != "bpe" and config.vocab_size not in (None, len(tokenizer)):
            raise ValueError(
                f"vocab_size={config.vocab_size}, but the tokenizer {config.tokenizer!r} has {len(tokenizer)} tokens; "
                "leave it out"
            )
    chunks = Chunks(token_stream(tokenizer, held_out), config.max_seq_len)
    rows = max(2, config.batch_size)  # of one row there is no other text to be told about
    whole = len(chunks) // rows
    if whole * rows < FEWEST:
        raise ValueError(
            f"eval_split_ratio={config.eval_split_ratio} of the documents are {len(chunks)} chunks of "
            f"{config.max_seq_len} tokens; wanted at least {max(FEWEST, rows)}"
        )
    evaluated = held_out_batches(chunks, rows)[: min(max(config.eval_batches, -(-FEWEST // rows)), whole)]
    return ConfidenceData(
        tokenizer=tokenizer,
        train=Chunks(token_stream(tokenizer, train), config.max_seq_len),
        held_out=tuple(np.asarray(batch["tokens"]) for batch in evaluated),
        held_out_tokens=len(chunks.stream),
    )
