"""The King James Bible as documents of a language model, and its byte pair encoding.

The text comes from the Debian packages named in `PACKAGES`, which `fetch` unpacks without
installing them. A document is a chapter; a line of it is a verse. Every `HELD_OUT_EVERY`-th chapter
is held out, so that all books are in both parts.
"""

from __future__ import annotations

import collections
import hashlib
import heapq
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

PACKAGES = ("bible-kjv", "bible-kjv-text")
SHA256 = "cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d"
HELD_OUT_EVERY = 15

START = 0  # the token in front of every document
_PIECES = re.compile(r" ?[A-Za-z]+|\n| ?[^\sA-Za-z]+|\s")


def fetch(folder: Path) -> str:
    """Download the text into a folder, once; one verse a line, each with its place in front."""
    final = folder / "kjv.txt"
    if not final.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as name:
            work = Path(name)
            _run("apt-get", "download", *PACKAGES, cwd=work)
            for package in sorted(work.glob("*.deb")):
                _run("dpkg-deb", "-x", str(package), "unpacked", cwd=work)
            program, data = work / "unpacked/usr/bin/bible", work / "unpacked/usr/lib"
            text = _run(str(program), "-p", str(data), "-f", "gen1:1-rev22:21", cwd=work)
            (work / "kjv.txt").write_text(text, encoding="ascii")
            (work / "kjv.txt").replace(final)
    found = final.read_bytes()
    if hashlib.sha256(found).hexdigest() != SHA256:
        raise SystemExit(
            f"{final} is not the text that the figures of the README are for (version 4.38 of "
            f"{PACKAGES[1]}); remove it, and say which version your Debian has"
        )
    return found.decode("ascii")


def _run(*command: str, cwd: Path) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise SystemExit(
            f"{command[0]} was not found: the text comes from the Debian packages "
            f"{' and '.join(PACKAGES)}, so training needs Debian or a system like it; "
            f"measure.py needs neither"
        ) from error
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"{' '.join(command)}: {error.stderr.strip()}") from error
    return done.stdout


def chapters(text: str) -> list[str]:
    """Split into chapters; verses lose the place in front of them."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        place, _, verse = line.partition(" ")
        found.setdefault(place.partition(":")[0], []).append(verse)
    return ["\n".join(verses) + "\n" for verses in found.values()]


def split(documents: Sequence[str]) -> tuple[list[str], list[str]]:
    """Give the documents to train with, and those held out."""
    held_out = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    kept = [
        document
        for number, document in enumerate(documents, start=1)
        if number % HELD_OUT_EVERY != 0
    ]
    return kept, list(held_out)


class Tokenizer:
    """Byte pair encoding (Sennrich et al., 2016) of words with the space in front of them.

    Parameters
    ----------
    characters
        The alphabet; characters outside it are left out of what is encoded.
    merges
        Pairs of pieces that become one, the most frequent first.
    """

    def __init__(self, characters: str, merges: Sequence[tuple[str, str]]) -> None:
        self.characters, self.merges = characters, list(merges)
        pieces = ["<start>", *characters, *(left + right for left, right in self.merges)]
        self.pieces = list(dict.fromkeys(pieces))
        self._ids = {piece: number for number, piece in enumerate(self.pieces)}
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._known: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Give the tokens of a text; the start token is not among them."""
        tokens: list[int] = []
        for word in _PIECES.findall(text):
            if word not in self._known:
                self._known[word] = [self._ids[piece] for piece in self._merge(word)]
            tokens.extend(self._known[word])
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """Join the pieces of tokens."""
        return "".join(self.pieces[token] for token in tokens)

    def _merge(self, word: str) -> list[str]:
        pieces = [character for character in word if character in self._ids]
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            pieces = _joined(pieces, best)
        return pieces

    def save(self, path: Path) -> None:
        """Write a JSON file."""
        merges = [" ".join((a.replace(" ", "_"), b.replace(" ", "_"))) for a, b in self.merges]
        path.write_text(
            json.dumps({"characters": self.characters, "merges": merges}, indent=0) + "\n",
            encoding="ascii",
        )

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read what `save` wrote."""
        stored = json.loads(path.read_text(encoding="ascii"))
        pairs = [merge.replace("_", "\0").split(" ") for merge in stored["merges"]]
        return cls(
            stored["characters"],
            [(a.replace("\0", " "), b.replace("\0", " ")) for a, b in pairs],
        )

    @classmethod
    def train(cls, documents: Iterable[str], size: int) -> Tokenizer:
        """Learn an encoding with `size` tokens; of equally frequent pairs the smaller is first."""
        counts = collections.Counter(
            word for document in documents for word in _PIECES.findall(document)
        )
        characters = "".join(sorted(set("".join(counts))))
        words = [(list(word), count) for word, count in sorted(counts.items())]
        where: dict[tuple[str, str], set[int]] = collections.defaultdict(set)
        totals: collections.Counter[tuple[str, str]] = collections.Counter()
        for number, (pieces, count) in enumerate(words):
            for pair in itertools.pairwise(pieces):
                totals[pair] += count
                where[pair].add(number)
        heap = [(-count, pair) for pair, count in totals.items()]
        heapq.heapify(heap)
        merges: list[tuple[str, str]] = []
        while len(merges) + len(characters) + 1 < size and heap:
            count, pair = heapq.heappop(heap)
            if -count != totals[pair]:
                if totals[pair] > 0:
                    heapq.heappush(heap, (-totals[pair], pair))
                continue
            merges.append(pair)
            changed: set[tuple[str, str]] = set()
            for number in where.pop(pair):
                pieces, times = words[number]
                for old in itertools.pairwise(pieces):
                    totals[old] -= times
                    changed.add(old)
                pieces[:] = _joined(pieces, pair)
                for new in itertools.pairwise(pieces):
                    totals[new] += times
                    where[new].add(number)
                    changed.add(new)
            for other in changed - {pair}:
                if totals[other] > 0:
                    heapq.heappush(heap, (-totals[other], other))
        return cls(characters, merges)


def _joined(pieces: Sequence[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    index = 0
    while index < len(pieces):
        if tuple(pieces[index : index + 2]) == pair:
            joined.append(pieces[index] + pieces[index + 1])
            index += 2
        else:
            joined.append(pieces[index])
            index += 1
    return joined
