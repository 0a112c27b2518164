"""Operations of the model that are written for speed or memory.

They are attention by torch's fused kernels, products joined into one, and the
loss with a backward pass written by hand.
"""

import sys
import timeit
from typing import Callable

import torch
import torch.nn.functional as F


def attention(q, k, v, mask=None) -> torch.Tensor:
    """Attention of queries q [B, n_head, T, d] to k and v [B, n_kv_head, L, d].

    The result is like q. It is causal if there is no mask [B or 1, 1, T, L] of
    what is seen.
    """
    group = q.shape[1] // k.shape[1]
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # No fused kernel of a GPU takes fewer key heads in these cases.
        k = k.repeat_interleave(group, 1)
        v = v.repeat_interleave(group, 1)
        group = 1
    attend = F.scaled_dot_product_attention
    return attend(q, k, v, mask, is_causal=mask is None, enable_gqa=group > 1)


def warn_of_slow_bfloat16(device: str, dtype: str) -> None:
    """A line on stderr where a CPU has no instructions for bfloat16: training takes 20 times as long."""
    if (device, dtype) != ("cpu", "bfloat16"):
        return
    seconds = []
    for kind in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=kind)
        seconds.append(min(timeit.repeat(lambda: x @ x, number=1)))
    times = seconds[1] / seconds[0]
    if times > 2:
        advice = f"this CPU takes {times:.0f} times as long in bfloat16; give --dtype=float32"
        print(f"note: {advice}", file=sys.stderr, flush=True)


@torch.no_grad()
def joined(*linears: torch.nn.Linear) -> Callable:
    """One product that takes the place of linear layers with the same input.

    Their weights become views of its weight, so that nothing is held twice.
    """
    weight = torch.cat([linear.weight for linear in linears])
    bias = None
    if linears[0].bias is not None:
        bias = torch.cat([linear.bias for linear in linears])
    sizes = [len(linear.weight) for linear in linears]
    for linear, rows in zip(linears, weight.split(sizes)):
        linear.weight.data = rows
    return lambda x: F.linear(x, weight, bias)


def head_loss(hidden, weight, targets) -> torch.Tensor:
    """Summed cross-entropy in nats of the logits hidden @ weight.T.

    Logits of 8,192 tokens over 32,000 classes take 1 GB in fp32, and autograd
    would keep several copies of them. Here they are computed in pieces.

    hidden [B, T, n_embd], weight [n_vocab, n_embd], targets [B, T]. A target of -1 is
    not counted.
    """
    hidden = hidden.flatten(0, 1)  # [B * T, n_embd]
    targets = targets.flatten()  # [B * T]
    if hidden.device.type == "cpu":  # on a GPU this question would wait for the device
        counted = targets >= 0
        if not counted.all():
            hidden = hidden[counted]
            targets = targets[counted]
    return HeadLoss.apply(hidden, weight.to(hidden.dtype), targets)


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of a linear layer in pieces.

    At most KEEP bytes of logits are there at once.

    forward   goes by rows of tokens: the logits of a piece give their
              log-sum-exp and the loss.
    backward  goes by rows of the weight: the softmax of a piece comes from the
              logits, which are computed again unless all of them were small
              enough to keep. Each row of the weight's gradient is one product
              over all tokens, so that no bf16 sum is rounded twice.
    """

    KEEP = 256 << 20
    PIECE = {"cpu": 16 << 20, "cuda": 256 << 20}  # bytes in fp32; a CPU's cache holds them

    @staticmethod
    def piece_rows(tensor, width: int) -> int:
        """How many rows of so many fp32 numbers make a piece."""
        n_bytes = HeadLoss.PIECE.get(tensor.device.type, 64 << 20)
        return max(1, n_bytes // (4 * max(1, width)))

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        """hidden [N, n_embd], weight [V, n_embd], targets [N] -> loss, a scalar."""
        N = len(hidden)
        V = len(weight)
        size = HeadLoss.piece_rows(hidden, V)
        keep = hidden.itemsize * N * V <= HeadLoss.KEEP and any(ctx.needs_input_grad)
        wide = F.pad(weight, (0, 0, 0, -V % 8))  # for a GPU's fast kernels
        logits = hidden.new_empty(N if keep else min(N, size), len(wide))
        lse = torch.empty(N, device=hidden.device)
        target_logit = torch.empty(N, device=hidden.device)
        for first in range(0, N, size):
            here = slice(first, min(N, first + size))
            out = logits[here] if keep else logits[: here.stop - first]
            piece = torch.mm(hidden[here], wide.T, out=out)[:, :V]  # [n, V]
            lse[here] = piece.float().logsumexp(dim=1)
            classes = targets[here, None].clamp(min=0)  # [n, 1]
            target_logit[here] = piece.gather(1, classes)[:, 0]
        ctx.save_for_backward(hidden, weight, targets, lse, logits if keep else None)
        return torch.where(targets >= 0, lse - target_logit, 0).sum()

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, lse, logits = ctx.saved_tensors
        N = len(hidden)
        V = len(weight)
        scale = torch.where(targets >= 0, grad, 0)[:, None]  # [N, 1]
        scaled = (hidden * scale).to(hidden.dtype)
        grad_hidden = torch.zeros(hidden.shape, device=hidden.device)  # fp32
        grad_weight = torch.empty_like(weight)
        size = HeadLoss.piece_rows(hidden, N)
        for first in range(0, V, size):
            here = slice(first, min(V, first + size))
            rows = weight[here]
            piece = hidden @ rows.T if logits is None else logits[:, here]  # [N, rows]
            error = torch.sub(piece, lse[:, None]).exp_()  # the softmax, in fp32
            # The gradient of the logits is the softmax minus one at the target's class.
            is_here = (targets >= here.start) & (targets < here.stop)
            classes = (targets - first).clamp(0, len(rows) - 1)
            error.scatter_add_(1, classes[:, None], -is_here.float()[:, None])
            error = error.to(weight.dtype)
            torch.mm(error.T, scaled, out=grad_weight[here])
            if error.dtype == torch.float32:
                grad_hidden.addmm_(error, rows)
            else:
                grad_hidden += error @ rows
        return (grad_hidden * scale).to(hidden.dtype), grad_weight, None
