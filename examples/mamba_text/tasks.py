"""What the language model is asked: the next token, the last word, and which of two word orders.

All come from the documents held out. Every item is a sequence of tokens, with the token to predict
at every place that counts and -1 elsewhere, as the metrics of `bitwright evaluate` want it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from examples.mamba_text.text import START, Tokenizer

Tokens = npt.NDArray[np.int64]

PER_DOCUMENT = 4  # verses of a document that become items
WORDS = 8  # that a verse has at least
CONTEXT = 2  # verses in front of one


@dataclass(frozen=True)
class Row:
    """One sequence.

    Attributes
    ----------
    document, item
        What it belongs to.
    right
        Whether it is the right option of its item.
    characters
        Length of the option.
    tokens, labels
        What the model reads, and what it should predict there.
    """

    document: int
    item: int
    right: bool
    characters: int
    tokens: Tokens
    labels: Tokens


def _row(
    tokenizer: Tokenizer, document: int, item: int, context: str, option: str, *, right: bool
) -> Row:
    """The tokens of the option are predicted, behind those of the context."""
    before, behind = [START, *tokenizer.encode(context)], tokenizer.encode(option)
    tokens = np.array([*before, *behind], np.int64)
    labels = np.full(len(tokens) - 1, -1)
    labels[len(before) - 1 :] = behind
    # The last token has nothing to predict, so the model need not read it.
    return Row(document, item, right, len(option), tokens[:-1], labels)


def next_tokens(tokenizer: Tokenizer, documents: Sequence[str]) -> list[Row]:
    """Each document from its start: the perplexity."""
    return [
        _row(tokenizer, number, number, "", text, right=True)
        for number, text in enumerate(documents)
    ]


def _chosen(documents: Sequence[str], seed: int) -> list[tuple[int, str, str]]:
    """Document, the verses in front, and the verse, of all items."""
    generator = np.random.default_rng(seed)
    found = []
    for number, document in enumerate(documents):
        verses = document.splitlines()
        long = [index for index, verse in enumerate(verses) if len(verse.split()) >= WORDS]
        picked = generator.permutation(long)[:PER_DOCUMENT]
        for index in sorted(int(index) for index in picked):
            before = "".join(verse + "\n" for verse in verses[max(0, index - CONTEXT) : index])
            found.append((number, before, verses[index]))
    return found


def last_words(tokenizer: Tokenizer, documents: Sequence[str], *, seed: int = 0) -> list[Row]:
    """The last word of a verse among three that end other verses: `cloze4`, `last-word`."""
    generator = np.random.default_rng(seed + 1)
    items = _chosen(documents, seed)
    endings = [verse.rpartition(" ")[2] for _, _, verse in items]
    others = sorted({ending.strip(".,;:?!()'") for ending in endings})
    rows = []
    for item, (document, before, verse) in enumerate(items):
        start, _, ending = verse.rpartition(" ")
        word = ending.strip(".,;:?!()'")
        options = [word, *generator.permutation([other for other in others if other != word])[:3]]
        for number, option in enumerate(options):
            # The verse ends with the same signs whatever its last word.
            text = " " + ending.replace(word, str(option), 1)
            rows.append(_row(tokenizer, document, item, before + start, text, right=number == 0))
    return rows


def word_orders(tokenizer: Tokenizer, documents: Sequence[str], *, seed: int = 0) -> list[Row]:
    """A verse, and the same with two neighbouring words exchanged: `choice` of two."""
    generator = np.random.default_rng(seed + 2)
    rows = []
    for item, (document, before, verse) in enumerate(_chosen(documents, seed)):
        words = verse.split()
        different = [
            index
            for index, (one, next_) in enumerate(itertools.pairwise(words))
            # The first and the last word tell by their capital or full stop.
            if 0 < index < len(words) - 2 and one.lower() != next_.lower()
        ]
        place = int(generator.choice(different))
        swapped = list(words)
        swapped[place : place + 2] = reversed(words[place : place + 2])
        for order in (words, swapped):
            rows.append(
                _row(tokenizer, document, item, before, " ".join(order), right=order is words)
            )
    return rows


def arrays(rows: Sequence[Row], *, choice: bool) -> dict[str, Tokens]:
    """Arrays for `bitwright evaluate`: rows padded at their ends, where no label counts."""
    length = max(len(row.tokens) for row in rows)
    tokens = np.full((len(rows), length), START)
    labels = np.full((len(rows), length), -1)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = row.tokens
        labels[number, : len(row.labels)] = row.labels
    if choice:
        head = [[row.item, int(row.right), row.characters] for row in rows]
        labels = np.concatenate([np.array(head), labels], axis=1)
    return {"tokens": tokens, "labels": labels}


def likelihood(row: Row, logits: npt.NDArray[np.float32]) -> tuple[float, int]:
    """Log-likelihood of what a row asks for, and of how many tokens."""
    counted = row.labels >= 0
    scores = logits[counted].astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    right = np.take_along_axis(scores, row.labels[counted][:, None], -1)[:, 0]
    return float((right - np.log(np.exp(scores).sum(axis=-1))).sum()), int(counted.sum())
