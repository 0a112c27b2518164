"""Drawing a token from logits, with noise that depends on keys alone."""

import math

import torch


def keyed_uniform(state: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The last round of data.lib.corpus.hash_uniform, on the device.

    state: hash_state of the other keys, int64 [n]. position: int64 [n].
    Returns float64 [n] in [0, 1).
    """

    def shift(h, bits):  # a logical shift of a signed number
        return (h >> bits) & ((1 << (64 - bits)) - 1)

    # The constants of data/lib/corpus.py as signed numbers; overflow wraps.
    h = (state ^ position) - 0x61C8864680B583EB
    h = (h ^ shift(h, 30)) * -0x40A7B892E31B1A47
    h = (h ^ shift(h, 27)) * -0x6B2FB644ECCEEE15
    return shift(h ^ shift(h, 31), 12).double() * 2.0**-52


def draw(logits, uniform, temperature: float = 1.0, top_p: float = 1.0):
    """One token for each row of fp32 logits [n, n_vocab].

    uniform: float64 [n] in [0, 1), where the cumulated probabilities are
    inverted. Returns the tokens [n] and their log-probabilities, float64 [n],
    in the distribution that they were drawn from. temperature 0: the likeliest
    token. top_p below 1: only tokens of the nucleus.
    """
    if temperature not in (0, 1):
        logits = logits / temperature
    if top_p < 1 and temperature > 0:
        logits = nucleus(logits, top_p)
    best = logits.amax(dim=-1, keepdim=True)
    mass = torch.exp(logits - best)  # [n, n_vocab]
    blocks = block_sums(mass)  # [n, n_blocks]
    cumulated = blocks.cumsum(dim=1)
    total = cumulated[:, -1:]
    if temperature == 0:
        tokens = logits.argmax(dim=-1, keepdim=True)
    else:
        point = uniform[:, None] * total
        tokens = invert(mass, blocks, cumulated, point)
    log_p = (logits.gather(1, tokens) - best).double() - total.log()
    return tokens[:, 0], log_p[:, 0]


def block_sums(mass: torch.Tensor) -> torch.Tensor:
    """mass [n, n_vocab] -> its sums over blocks of isqrt(n_vocab) tokens.

    float64 [n, n_blocks]; the last block may be shorter.
    """
    size = math.isqrt(mass.shape[1])
    whole = mass.shape[1] // size * size
    blocks = mass[:, :whole].unflatten(1, (-1, size))
    blocks = blocks.sum(-1, dtype=torch.float64)
    if whole < mass.shape[1]:
        rest = mass[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
        blocks = torch.cat((blocks, rest), dim=1)
    return blocks


def invert(mass, blocks, cumulated, point) -> torch.Tensor:
    """The token [n, 1] at `point` [n, 1] of the cumulated mass.

    Its block is found first, so that only the block's tokens are cumulated.
    """
    n_vocab = mass.shape[1]
    size = math.isqrt(n_vocab)
    block = torch.searchsorted(cumulated, point, right=True)
    block = block.clamp_(max=blocks.shape[1] - 1)  # [n, 1]
    before = (cumulated - blocks).gather(1, block)
    members = block * size + torch.arange(size, device=mass.device)  # [n, size]
    inside = mass.gather(1, members.clamp(max=n_vocab - 1)).double()
    inside = inside.masked_fill_(members >= n_vocab, 0).cumsum(dim=1)
    # The point is scaled to the sum of the block's tokens taken one by one and
    # kept below it, so that rounding never leads to a token without mass.
    share = (point - before) / blocks.gather(1, block)
    point = share.clamp_(0, 1 - 1e-12) * inside[:, -1:]
    index = torch.searchsorted(inside, point, right=True).clamp_(max=size - 1)
    return block * size + index


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """logits [n, n_vocab] with -inf outside the nucleus (Holtzman et al. 2020).

    The nucleus is made of the likeliest tokens whose probabilities add up to
    top_p or just beyond.
    """
    n_vocab = logits.shape[1]
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    # 64 tokens nearly always suffice. On a GPU a captured step cannot look
    # whether they did, so all are sorted there.
    k = n_vocab if logits.is_cuda else min(n_vocab, 64)
    while True:
        values = logits.topk(k, dim=-1).values  # [n, k], falling
        mass = (values - total).exp().cumsum(dim=-1)
        if k == n_vocab or bool((mass[:, -1] >= top_p).all()):
            break
        k = min(n_vocab, 8 * k)
    last = (mass < top_p).sum(dim=-1, keepdim=True).clamp(max=k - 1)
    return logits.masked_fill(logits < values.gather(1, last), -torch.inf)
