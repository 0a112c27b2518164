"""The training stream: documents of corpora in a seeded order, with their thoughts, as micro-batches of token ids.

Everything here is a function of (seed, position): the order of documents (one permutation an epoch, no buffer), the coin flip of each
chunk (prior or posterior form), the cut into rows. So neither the number of ranks nor a restart changes what a step trains on, and a
training run's place in its data is its step number. Corpora stay memory-mapped; the order of an epoch costs about 100 bytes a document.

    padded     a row is a document, cut off at seq_len          [BOS x x x x EOS  .  .  .]
    packed     documents end to end, cut into full rows         [.. x EOS BOS x x x x x x]  [x x EOS BOS x ..]
               each row also has the first token of the next, as the target of its last
"""

import bisect
import functools
from typing import NamedTuple

import numpy as np
import torch

from data.lib.corpus import FORM_COIN, POSTERIOR, PRIOR, RAW, Corpus, Thoughts, hash_uniform, layout
from data.lib.tokenizer import Tokenizer

GIVEN = -2  # a token that is read but not learned stands as GIVEN - id in a row


class Batch(NamedTuple):
    """A micro-batch, all [B, T]."""

    ids: torch.Tensor
    targets: torch.Tensor  # the next ids; -1: padding
    documents: torch.Tensor | None  # which document of its row a token belongs to, where attention needs it


class Epoch(NamedTuple):
    """One pass over the mix: its documents in their order. All arrays [n], but `starts` [n + 1]."""

    source: np.ndarray  # which corpus
    doc: np.ndarray  # which document of it
    turn: np.ndarray  # key of the corpus' own pass, for the coin flips
    starts: np.ndarray  # first token of each document, from the start of the epoch


class Stream:
    """The training stream, as a function of (seed, position) alone: not of ranks, workers or restarts.

    An epoch is one seeded permutation of documents. With several corpora it takes from each what its weight allows, so that none is
    used up more than once, and each goes on in its own permutation in the next epoch. Row n is document n (padded), or tokens
    n * seq_len to (n + 1) * seq_len of all documents end to end, and the token after (packed).

    completion: fine-tuning on (question, answer). Questions and the markers behind them are given, not learned; thoughts take the prior form.
    Only padded rows.
    """

    def __init__(self, corpora: list[Corpus], thoughts: list[Thoughts | None], tok: Tokenizer, seq_len: int, seed: int,
                 attention: str = "padded", weights: list[float] = (), bare: float = 0.0, completion: bool = False):  # fmt: skip
        self.corpora, self.thoughts, self.tok = corpora, thoughts, tok
        self.seq_len, self.seed, self.attention, self.bare, self.completion = seq_len, seed, attention, bare, completion
        self.thought_counts = [(int((np.diff(t.chunks) > 0).sum()), len(t.tokens)) if t else (0, 0) for t in thoughts]  # (thoughts, tokens)
        sizes = np.array([self.mean_length(c) * corpora[c].n_docs for c in range(len(corpora))])
        passes = np.array(weights or sizes) / sizes  # how often each is read, but for a common factor
        self.takes = [max(1, round(p / passes.max() * corpus.n_docs)) for p, corpus in zip(passes, corpora)]
        self.firsts = [0]  # first token of each epoch, as far as known (packed)
        self.epoch = functools.lru_cache(2)(self.make_epoch)
        self.permutation = functools.lru_cache(2 * len(corpora))(self.make_permutation)
        self.lengths = functools.lru_cache(2 * len(corpora))(self.make_lengths)
        self.document = functools.lru_cache(1)(self.make_document)

    def mean_length(self, c: int) -> float:
        """Expected tokens of a document of corpus c: BOS and EOS, text, thoughts, and 3 or 5 markers with each thought."""
        n_thoughts, thought_tokens = self.thought_counts[c]
        return 2 + (len(self.corpora[c].tokens) + (1 - self.bare) * (thought_tokens + 4 * n_thoughts)) / self.corpora[c].n_docs

    def mean_document(self) -> float:
        """Expected tokens of a document of the mix."""
        return sum(n * self.mean_length(c) for c, n in enumerate(self.takes)) / sum(self.takes)

    def mean_row(self) -> float:
        """Expected tokens of a row; padded ones by those of the first epoch, for their ends are cut off."""
        return float(np.minimum(np.diff(self.epoch(0).starts), self.seq_len).mean()) if self.attention == "padded" else self.seq_len

    def make_permutation(self, turn: int, n: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[self.seed, turn])).permutation(n)

    def make_epoch(self, number: int) -> Epoch:
        parts = []
        for c, (corpus, take) in enumerate(zip(self.corpora, self.takes)):
            position = np.arange(number * take, (number + 1) * take)
            turns, index = position // corpus.n_docs + (c << 40), position % corpus.n_docs
            doc, length = np.empty(take, np.int64), np.empty(take, np.int64)
            for turn in np.unique(turns):
                here = turns == turn
                doc[here] = self.permutation(int(turn), corpus.n_docs)[index[here]]
                length[here] = self.lengths(c, int(turn))[doc[here]]
            parts.append((np.full(take, c), doc, turns, length))
        source, doc, turn, length = (np.concatenate(arrays) for arrays in zip(*parts))
        if len(self.corpora) > 1:
            order = self.make_permutation(number + (1 << 62), len(doc))
            source, doc, turn, length = source[order], doc[order], turn[order], length[order]
        return Epoch(source, doc, turn, np.concatenate(([0], np.cumsum(length))))

    def forms(self, c: int, turn: int, first: int, last: int) -> np.ndarray:
        """The form that each of the chunks first to last-1 takes in a pass, if it has a thought: RAW with probability `bare`, else one of the
        two others by a fair coin; drawn anew in each pass, for each chunk by itself."""
        if self.completion:
            return np.full(last - first, PRIOR)
        uniform = hash_uniform(FORM_COIN, self.seed, turn, np.arange(first, last))
        return np.where(uniform < self.bare, RAW, np.where(uniform < (1 + self.bare) / 2, PRIOR, POSTERIOR))

    def make_lengths(self, c: int, turn: int) -> np.ndarray:
        """Tokens of each document of a corpus in a pass, markers included; made in pieces, so that any corpus fits."""
        corpus, thoughts, lengths = self.corpora[c], self.thoughts[c], []
        for first in range(0, corpus.n_docs, 100_000):
            docs = corpus.docs[first : first + 100_001]
            length = 2 + np.diff(corpus.chunks[docs])
            if thoughts:
                sizes = np.diff(thoughts.chunks[docs[0] : docs[-1] + 1])
                forms = self.forms(c, turn, docs[0], docs[-1])
                sizes = np.where((sizes > 0) & (forms != RAW), sizes + np.where(forms == PRIOR, 3, 5), 0)
                length += np.diff(np.concatenate(([0], np.cumsum(sizes)))[docs - docs[0]])
            lengths.append(length)
        return np.concatenate(lengths)

    def make_document(self, c: int, doc: int, turn: int) -> np.ndarray:
        """A document as ids; each chunk that has a thought takes the prior or the posterior form by a coin flip."""
        corpus, thoughts = self.corpora[c], self.thoughts[c]
        first, last = int(corpus.docs[doc]), int(corpus.docs[doc + 1])
        chunks = [corpus.chunk(i).tolist() for i in range(first, last)]
        spans = [thoughts.span(i).tolist() if thoughts else [] for i in range(first, last)]
        forms = [form if len(z) else RAW for z, form in zip(spans, self.forms(c, turn, first, last).tolist())]
        ids, parts = layout(self.tok, chunks, spans, forms)
        if self.completion:
            given = np.ones(len(ids), dtype=bool)
            given[-1] = False  # EOS
            for part, asked in zip(parts, corpus.questions[first:last]):
                if not asked:
                    given[slice(*part.thought)] = given[slice(*part.chunk)] = False
            ids = np.where(given, GIVEN - ids, ids)
        return ids

    def find(self, position: int) -> tuple[int, int]:
        """(epoch, place in it) of a row (padded) or token (packed)."""
        if self.attention == "padded":
            return divmod(position, sum(self.takes))
        while self.firsts[-1] <= position:
            self.firsts.append(self.firsts[-1] + int(self.epoch(len(self.firsts) - 1).starts[-1]))
        number = bisect.bisect_right(self.firsts, position) - 1
        return number, position - self.firsts[number]

    def padded_row(self, n: int) -> np.ndarray:
        number, i = self.find(n)
        epoch = self.epoch(number)
        ids = self.document(int(epoch.source[i]), int(epoch.doc[i]), int(epoch.turn[i]))
        return ids[: self.seq_len]

    def whole_length(self, n: int) -> int:
        """Tokens of padded row n before its end is cut off."""
        number, i = self.find(n)
        starts = self.epoch(number).starts
        return int(starts[i + 1] - starts[i])

    def cut_tokens(self, n: int) -> int:
        """Tokens beyond seq_len that the first n padded rows lose."""
        return sum(max(0, self.whole_length(row) - self.seq_len) for row in range(n)) if self.attention == "padded" else 0

    def packed_row(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, document of each) [seq_len + 1]."""
        pieces, have, owner = [], 0, []
        number, place = self.find(n * self.seq_len)
        epoch = self.epoch(number)
        i = int(np.searchsorted(epoch.starts, place, side="right")) - 1
        while have <= self.seq_len:
            if i == len(epoch.doc):
                number, i, place = number + 1, 0, 0
                epoch = self.epoch(number)
            ids = self.document(int(epoch.source[i]), int(epoch.doc[i]), int(epoch.turn[i]))
            pieces.append(ids[place - int(epoch.starts[i]) :][: self.seq_len + 1 - have])
            owner.append(np.full(len(pieces[-1]), len(pieces)))
            have, i = have + len(pieces[-1]), i + 1
            place = int(epoch.starts[i])
        return np.concatenate(pieces), np.concatenate(owner)

    def micro_batches(self, first: int, n: int, groups: int, mine: slice) -> list[Batch]:
        """Rows first to first+n-1 in `groups` micro-batches, of which those of the slice are made. Documents of like length go together."""
        rows = np.arange(first, first + n)
        if self.attention == "padded":
            rows = rows[np.argsort([min(self.whole_length(int(row)), self.seq_len) for row in rows], kind="stable")]
        return [self.micro_batch(group.tolist()) for group in np.array_split(rows, groups)[mine]]

    def micro_batch(self, rows: list[int]) -> Batch:
        if not rows:  # more groups than rows: a rank that has nothing still takes part
            return Batch(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), -1), None)
        if self.attention == "padded":
            return Batch(*pad([self.padded_row(row) for row in rows], "cpu"), None)
        ids, documents = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*(self.packed_row(row) for row in rows)))
        return Batch(ids[:, :-1], ids[:, 1:], documents[:, :-1] if self.attention == "document" else None)

    def n_targets(self, first: int, n: int) -> int:
        """Tokens that rows first to first+n-1 predict."""
        if self.completion:
            return sum(int((self.padded_row(row)[1:] >= 0).sum()) for row in range(first, first + n))
        return n * self.seq_len if self.attention != "padded" else sum(min(self.whole_length(row), self.seq_len) - 1 for row in range(first, first + n))


def pad(sequences: list[np.ndarray], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences as inputs [B, T] and targets [B, T], shifted by one; -1 marks targets that are padding, or only given (GIVEN - id)."""
    ids = np.full((len(sequences), max(map(len, sequences))), -1, dtype=np.int64)
    for row, sequence in zip(ids, sequences):
        row[: len(sequence)] = sequence
    ids = torch.from_numpy(ids).to(device)
    return torch.where(ids <= GIVEN, GIVEN - ids, ids)[:, :-1].clamp(min=0), ids[:, 1:].clamp(min=-1)
