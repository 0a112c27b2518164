"""The training stream: documents of corpora in a seeded order, with their thoughts, as
micro-batches of token ids.

Everything here is a function of (seed, position): the order of documents (one permutation
an epoch, no shuffle buffer), the coin flip of each chunk (prior or posterior form), and
the cut into rows. So neither the number of ranks nor a restart changes what a step trains
on, and a run's place in its data is its step number. Corpora stay memory-mapped; the order
of an epoch costs about 100 bytes a document.

    padded     a row is a document, cut off at seq_len          [BOS x x x x EOS  .  .  .]
    packed     documents end to end, cut into full rows         [.. x EOS BOS x x x x x x]
               each row also has the first token of the next,   [x x EOS BOS x ..
               as the target of its last
"""

import bisect
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from data.lib.cli import UserError
from data.lib.corpus import (
    FORM_COIN,
    POSTERIOR,
    PRIOR,
    RAW,
    Corpus,
    Thoughts,
    hash_uniform,
    layout,
    marker_count,
    open_corpus,
    open_thoughts,
)
from data.lib.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Rows:
    """How documents become rows."""

    seq_len: int  # tokens
    seed: int = 0
    attention: str = "padded"  # or packed, or document: packed, and rows tell documents apart
    bare: float = 0.0  # share of the chunks that are written without their thought
    completion: bool = False  # only what answers a question is learned; padded rows only
    thoughts_only: bool = False  # documents without any thought are left out


class Batch(NamedTuple):
    """A micro-batch, all [B, T]."""

    ids: torch.Tensor
    targets: torch.Tensor  # the next ids; -1: not counted
    documents: torch.Tensor | None  # which document of its row a token belongs to, if needed


class Document(NamedTuple):
    """A document as it is trained on, or the beginning of one, both [n]."""

    ids: np.ndarray
    learned: np.ndarray  # bool: whether the loss counts a token; others are only read


class Epoch(NamedTuple):
    """One pass over the mix: its documents in their order. All arrays [n], but `starts` [n + 1]."""

    source: np.ndarray  # which corpus
    doc: np.ndarray  # which document of it
    turn: np.ndarray  # key of the corpus' own pass, for the coin flips
    starts: np.ndarray  # first token of each document, from the start of the epoch


class Stream:
    """The training stream, as a function of (seed, position) alone.

    An epoch is one seeded permutation of documents. With several corpora it takes from
    each what its weight allows, so that none is used up more than once, and each goes on
    in its own permutation in the next epoch. Row n is document n (padded), or tokens
    n * seq_len to (n + 1) * seq_len of all documents end to end and one more (packed).

    `thoughts` has a folder for each corpus, or None. `weights` are shares of the tokens, or
    corpora count by size.
    """

    def __init__(
        self,
        corpora: list[Corpus],
        thoughts: list[Thoughts | None],
        tok: Tokenizer,
        rows: Rows,
        weights: list[float] = (),
    ):
        self.corpora = corpora
        self.thoughts = thoughts
        self.tok = tok
        self.rows = rows
        self.seq_len = rows.seq_len
        self.attention = rows.attention
        self.n_thoughts = [int((np.diff(t.chunks) > 0).sum()) if t else 0 for t in thoughts]
        self.thought_tokens = [len(t.tokens) if t else 0 for t in thoughts]
        self.docs = [self.wanted_docs(c) for c in range(len(corpora))]
        sizes = (np.diff(c.chunks[c.docs])[docs] for c, docs in zip(corpora, self.docs))
        self.text_tokens = [int(n.sum()) for n in sizes]
        self.takes = self.documents_of_an_epoch(weights)
        self.firsts = [0]  # packed: the first token of each epoch, as far as known
        # Caches that belong to this stream and go away with it.
        self.epoch = functools.lru_cache(2)(self.make_epoch)
        self.permutation = functools.lru_cache(2 * len(corpora))(self.make_permutation)
        self.lengths = functools.lru_cache(2 * len(corpora))(self.make_lengths)
        self.document = functools.lru_cache(1)(self.make_document)

    # ---- sizes

    def wanted_docs(self, c: int) -> np.ndarray:
        """The documents of corpus c to train on; UserError if there is none."""
        corpus, thoughts = self.corpora[c], self.thoughts[c]
        if not (self.rows.thoughts_only and thoughts):
            return np.arange(corpus.n_docs)
        upto = np.concatenate(([0], np.cumsum(np.diff(thoughts.chunks) > 0)))
        wanted = np.flatnonzero(np.diff(upto[corpus.docs]))
        if not len(wanted):
            raise UserError(f"{thoughts.folder}: no thought, so --thoughts_only leaves none")
        return wanted

    def documents_of_an_epoch(self, weights: list[float]) -> list[int]:
        """How many documents of each corpus an epoch takes: all of the one that is read
        most often, and of the others what their weight allows."""
        n_docs = list(map(len, self.docs))
        sizes = np.array([self.mean_length(c) * n for c, n in enumerate(n_docs)])
        passes = np.array(weights or sizes) / sizes  # but for a common factor
        return [max(1, round(p / passes.max() * n)) for p, n in zip(passes, n_docs)]

    def mean_length(self, c: int) -> float:
        """Expected tokens of a document of corpus c: BOS and EOS, text, and thoughts with
        their markers."""
        markers = marker_count([PRIOR, POSTERIOR]).mean()
        carried = self.thought_tokens[c] + markers * self.n_thoughts[c]
        n_tokens = self.text_tokens[c] + (1 - self.rows.bare) * carried
        return 2 + n_tokens / len(self.docs[c])

    def mean_document(self) -> float:
        """Expected tokens of a document of the mix."""
        total = sum(n * self.mean_length(c) for c, n in enumerate(self.takes))
        return total / sum(self.takes)

    def mean_row(self) -> float:
        """Expected tokens of a row. That of padded rows is taken from the first epoch,
        because long documents are cut off."""
        if self.attention != "padded":
            return self.seq_len
        lengths = np.diff(self.epoch(0).starts)
        return float(np.minimum(lengths, self.seq_len).mean())

    def rows_of_epoch(self) -> int:
        """How many rows the first epoch fills, at least one."""
        epoch = self.epoch(0)
        if self.attention == "padded":
            return len(epoch.doc)
        return max(1, int(epoch.starts[-1]) // self.seq_len)

    # ---- the order of documents

    def make_permutation(self, turn: int, n: int) -> np.ndarray:
        philox = np.random.Philox(key=[self.rows.seed, turn])
        return np.random.Generator(philox).permutation(n)

    def make_epoch(self, number: int) -> Epoch:
        parts = [self.part_of_epoch(c, number) for c in range(len(self.corpora))]
        source, doc, turn, length = (np.concatenate(arrays) for arrays in zip(*parts))
        if len(self.corpora) > 1:
            order = self.make_permutation(number + (1 << 62), len(doc))
            source, doc, turn, length = (x[order] for x in (source, doc, turn, length))
        return Epoch(source, doc, turn, np.concatenate(([0], np.cumsum(length))))

    def part_of_epoch(self, c: int, number: int) -> tuple[np.ndarray, ...]:
        """(corpus, document, turn, length) of the documents that an epoch takes from
        corpus c. They go on in the corpus' own permutations where the last epoch ended."""
        take = self.takes[c]
        docs = self.docs[c]
        position = np.arange(number * take, (number + 1) * take)
        turns = position // len(docs) + (c << 40)
        doc = np.empty(take, np.int64)
        length = np.empty(take, np.int64)
        for turn in np.unique(turns).tolist():
            here = turns == turn
            doc[here] = docs[self.permutation(turn, len(docs))[position[here] % len(docs)]]
            length[here] = self.lengths(c, turn)[doc[here]]
        return np.full(take, c), doc, turns, length

    def forms(self, c: int, turn: int, first: int, last: int) -> np.ndarray:
        """The form that each of the chunks first to last - 1 takes in a pass, if it has a
        thought. It is RAW with probability `bare`, else one of the two others by a fair
        coin, drawn anew in each pass and for each chunk by itself."""
        if self.rows.completion:
            return np.full(last - first, PRIOR)
        bare = self.rows.bare
        uniform = hash_uniform(FORM_COIN, self.rows.seed, turn, np.arange(first, last))
        with_thought = np.where(uniform < (1 + bare) / 2, PRIOR, POSTERIOR)
        return np.where(uniform < bare, RAW, with_thought)

    def make_lengths(self, c: int, turn: int) -> np.ndarray:
        """Tokens of each document of a corpus in a pass, markers included. They are
        counted in pieces, so that any corpus fits into memory."""
        corpus = self.corpora[c]
        lengths = []
        for first in range(0, corpus.n_docs, 100_000):
            docs = corpus.docs[first : first + 100_001]
            length = 2 + np.diff(corpus.chunks[docs])  # BOS and EOS
            if self.thoughts[c]:
                length += self.thought_lengths(c, turn, docs)
            lengths.append(length)
        return np.concatenate(lengths)

    def thought_lengths(self, c: int, turn: int, docs: np.ndarray) -> np.ndarray:
        """Tokens of the thoughts of each document and of their markers; docs [n + 1] are
        the documents' first chunks."""
        first, last = docs[0], docs[-1]
        sizes = np.diff(self.thoughts[c].chunks[first : last + 1])
        forms = np.where(sizes > 0, self.forms(c, turn, first, last), RAW)
        sizes = np.where(forms == RAW, 0, sizes + marker_count(forms))
        upto = np.concatenate(([0], np.cumsum(sizes)))
        return np.diff(upto[docs - first])

    def make_document(self, c: int, doc: int, turn: int) -> Document:
        """A document with its thoughts, each in the form that its coin shows."""
        corpus = self.corpora[c]
        thoughts = self.thoughts[c]
        first, last = int(corpus.docs[doc]), int(corpus.docs[doc + 1])
        chunks = [corpus.chunk(i).tolist() for i in range(first, last)]
        spans = [thoughts.span(i).tolist() if thoughts else [] for i in range(first, last)]
        coins = self.forms(c, turn, first, last).tolist()
        forms = [form if span else RAW for span, form in zip(spans, coins)]
        ids, parts = layout(self.tok, chunks, spans, forms)
        if not self.rows.completion:
            return Document(ids, np.ones(len(ids), dtype=bool))
        learned = np.zeros(len(ids), dtype=bool)
        learned[-1] = True  # EOS
        for part, is_question in zip(parts, corpus.questions[first:last]):
            if not is_question:
                learned[slice(*part.thought)] = True
                learned[slice(*part.chunk)] = True
        return Document(ids, learned)

    # ---- rows

    def find(self, position: int) -> tuple[int, int]:
        """(epoch, place in it) of a row (padded) or of a token (packed)."""
        if self.attention == "padded":
            return divmod(position, sum(self.takes))
        while self.firsts[-1] <= position:
            size = self.epoch(len(self.firsts) - 1).starts[-1]
            self.firsts.append(self.firsts[-1] + int(size))
        number = bisect.bisect_right(self.firsts, position) - 1
        return number, position - self.firsts[number]

    def document_at(self, epoch: Epoch, i: int) -> Document:
        """Document i in the order of an epoch."""
        return self.document(int(epoch.source[i]), int(epoch.doc[i]), int(epoch.turn[i]))

    def padded_row(self, n: int) -> Document:
        """Document n of the stream, cut off at seq_len."""
        number, i = self.find(n)
        ids, learned = self.document_at(self.epoch(number), i)
        return Document(ids[: self.seq_len], learned[: self.seq_len])

    def whole_length(self, n: int) -> int:
        """Tokens of padded row n before it is cut off."""
        number, i = self.find(n)
        starts = self.epoch(number).starts
        return int(starts[i + 1] - starts[i])

    def row_length(self, n: int) -> int:
        """Tokens of padded row n."""
        return min(self.whole_length(n), self.seq_len)

    def cut_tokens(self, n: int) -> int:
        """Tokens beyond seq_len that the first n rows lose."""
        if self.attention != "padded":
            return 0
        return sum(self.whole_length(row) - self.row_length(row) for row in range(n))

    def packed_row(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, which document of the row each belongs to), both [seq_len + 1]."""
        number, place = self.find(n * self.seq_len)
        epoch = self.epoch(number)
        i = int(np.searchsorted(epoch.starts, place, side="right")) - 1
        skip = place - int(epoch.starts[i])  # tokens of the first document in earlier rows
        pieces = []
        room = self.seq_len + 1
        while room > 0:
            if i == len(epoch.doc):
                number += 1
                epoch = self.epoch(number)
                i = 0
            piece = self.document_at(epoch, i).ids[skip : skip + room]
            pieces.append(piece)
            room -= len(piece)
            skip = 0
            i += 1
        owner = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
        return np.concatenate(pieces), owner

    def check_answers(self) -> None:
        """Say how many documents of the first epoch are cut off before anything is learned;
        UserError if all of them are."""
        n = self.rows_of_epoch()
        cut = sum(not self.padded_row(row).learned[1:].any() for row in range(n))
        said = f"{cut} of {n} documents have no answer within --seq_len={self.seq_len}"
        if cut == n:
            raise UserError(f"--loss=completion: {said}; raise it")
        if cut:
            print(f"{said}: nothing of them is learned")

    # ---- batches

    def micro_batches(self, first: int, n: int, groups: int, mine: slice) -> list[Batch]:
        """Rows first to first + n - 1 in `groups` micro-batches, of which those of the
        slice are made. Padded rows are sorted, so that a batch has little padding."""
        rows = np.arange(first, first + n)
        if self.attention == "padded":
            lengths = [self.row_length(row) for row in rows.tolist()]
            rows = rows[np.argsort(lengths, kind="stable")]
        split = np.array_split(rows, groups)
        return [self.micro_batch(group.tolist()) for group in split[mine]]

    def micro_batch(self, rows: list[int]) -> Batch:
        if not rows:  # there are more ranks than rows, but all must take part under FSDP
            nothing = torch.full((1, 1), -1)
            return Batch(torch.zeros_like(nothing), nothing, None)
        if self.attention == "padded":
            ids, targets = pad([self.padded_row(row) for row in rows])
            return Batch(ids, targets, None)
        made = [self.packed_row(row) for row in rows]
        ids = torch.from_numpy(np.stack([ids for ids, _ in made]))  # [B, T + 1]
        documents = torch.from_numpy(np.stack([owner for _, owner in made]))
        wanted = documents[:, :-1] if self.attention == "document" else None
        return Batch(ids[:, :-1], ids[:, 1:], wanted)

    def n_targets(self, first: int, n: int) -> int:
        """How many tokens rows first to first + n - 1 predict."""
        if self.attention != "padded":
            return n * self.seq_len
        rows = range(first, first + n)
        if self.rows.completion:  # where it is none, the loss is 0, and no mean is 0 / 0
            return max(1, sum(int(self.padded_row(row).learned[1:].sum()) for row in rows))
        return sum(self.row_length(row) - 1 for row in rows)


def pad(documents: list[Document]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, both [B, T], the targets shifted by one. A target is -1 where
    there is padding or a token that is not learned."""
    shape = len(documents), max(len(document.ids) for document in documents)
    ids = np.zeros(shape, dtype=np.int64)
    targets = np.full(shape, -1, dtype=np.int64)
    for row, document in enumerate(documents):
        n = len(document.ids)
        ids[row, :n] = document.ids
        targets[row, :n] = np.where(document.learned, document.ids, -1)
    return torch.from_numpy(ids)[:, :-1], torch.from_numpy(targets)[:, 1:]


def rows_of(s, seed: int) -> Rows:
    """How train.py's settings make rows."""
    same = {name: getattr(s, name) for name in ("seq_len", "attention", "bare", "thoughts_only")}
    return Rows(seed=seed, completion=s.loss == "completion", **same)


def open_stream(
    corpora: str, thoughts: str, weights: str, tok: Tokenizer | None, rows: Rows
) -> Stream:
    """The stream of the folders and weights in lists with commas between. Without `tok` the first
    corpus' tokenizer counts. Raises UserError for folders, lists or settings that do not fit
    together."""
    folders = corpora.split(",")
    spans = thoughts.split(",") if thoughts else [""] * len(folders)
    shares = read_shares(weights, len(folders))
    if len(spans) != len(folders) or shares is None:
        raise UserError(
            f"--thoughts={thoughts} --weights={weights}: expected nothing, or "
            f"one a corpus ({len(folders)}), weights above 0"
        )
    opened = []
    for folder in folders:
        corpus = open_corpus(folder, tok)
        if corpus.n_docs == 0:
            raise UserError(f"{folder}: has no documents")
        opened.append(corpus)
        tok = tok or corpus.tokenizer
    if rows.bare > 1:
        raise UserError(f"--bare={rows.bare}: expected a share, at most 1")
    asks = all(corpus.questions.any() for corpus in opened)
    if rows.completion and (rows.attention != "padded" or not asks):
        raise UserError(
            "--loss=completion: needs --attention=padded, and corpora with questions "
            "(questions.npy), for instance data/gsm8k.py's"
        )
    carried = [open_thoughts(span, corpus) if span else None for span, corpus in zip(spans, opened)]
    stream = Stream(opened, carried, tok, rows, shares)
    if rows.completion:
        stream.check_answers()
    return stream


def read_shares(weights: str, n: int) -> list[float] | None:
    """n weights above 0, or none of them; None if the text holds anything else."""
    try:
        shares = [float(share) for share in weights.split(",")] if weights else []
    except ValueError:
        return None
    right = len(shares) in (0, n) and all(0 < share < math.inf for share in shares)
    return shares if right else None
