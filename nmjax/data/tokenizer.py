"""The tokenizer of the bundled model: one token a word of the world, bytes for everything else.

A byte-level BPE without merges in the format of Hugging Face: a word that is in the vocabulary is one token
(`ignore_merges`, as in the tokenizer of Llama 3), any other text falls apart into the tokens of its UTF-8 bytes. So any
text has an encoding without an unknown token, and decoding gives the text back.
"""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nmjax.data.corpus import draw_document
from nmjax.data.words import AFFECT, FEELINGS, NAMES, RIDDLES
from nmjax.data.world import World

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIALS = (PAD, BOS, EOS)
CONTEXT = 1024
# What frames an option or an answer, words with the space before them, single digits, single signs, runs of newlines,
# other white space. "\nA." is one piece so that an option's letter stands right before its first word.
_PIECES = (
    r"\n[A-D]\.(?= )|\n+(?:Answer|Question|Assistant):| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\n+|[^\S\n]+(?=\S)|[^\S\n]+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# Function words and question words of free prompts that the corpus happens not to use.
EXTRA = tuple(
    "I you he she it we they my your his her its our their me him them us this that these those here "
    "there who whom whose why when where how can could will would should may might must do does did done "
    "be been being are were am has had have not or if because but so as at by from into over out up down "
    "off about than then too very much many more most less few some any all both each every one two three "
    "four five six seven eight nine ten first last next again please help say said tell ask answer "
    "question give make made take see look think know want need like go went come came day night time "
    "year world people man woman child house home water life work word words thing things place way part "
    "hand eye head".split()
)


def vocabulary_text(world: World) -> list[str]:
    """Texts whose pieces make up the vocabulary: the word lists, the names of the world, and a sample of the corpus."""
    groups = [*world.pools.values(), *world.entities.values(), *FEELINGS.values(), AFFECT, NAMES, tuple(RIDDLES), EXTRA]
    texts = [" " + word for group in groups for word in group]
    texts += [
        space + word
        for word in ("yes", "no", "Yes", "No", "True", "False", "User", "Assistant", "System")
        for space in ("", " ")
    ]
    texts += [space + sign for sign in "ABCD0123456789.,:;?!'\"()+-=*/" for space in ("", " ")] + ["\n", "\n\n"]
    rng = random.Random("vocabulary")
    texts += [text for _ in range(6000) for text, _ in draw_document(world, rng)]
    return texts


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """The tokenizer for `world`, the same every time.

    Prompts get BOS in front (`add_special_tokens=False` turns that off), there is no unknown token, and
    `decode(encode(text), skip_special_tokens=True) == text` for any text.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_PIECES), "isolated"), byte_level])
    pieces = dict.fromkeys(SPECIALS)
    pieces.update(dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet())))
    counted = {piece for text in vocabulary_text(world) for piece, _ in split.pre_tokenize_str(text)}
    pieces.update(dict.fromkeys(sorted(counted)))
    vocab = {piece: index for index, piece in enumerate(pieces)}

    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json (with the chat template) to `folder`."""
    tokenizer.save_pretrained(str(folder), save_jinja_files=False)
