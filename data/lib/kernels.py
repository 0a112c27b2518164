"""Hand-written backward passes: the chunked cross-entropy of the output layer, and causal attention on a CPU."""

import torch


def head_loss(hidden, weight, targets) -> torch.Tensor:
    """Summed cross-entropy in nats of hidden [B, T, n_embd] @ weight.T against targets [B, T]; -1: padding, which costs nothing."""
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    real = targets >= 0
    if hidden.device.type == "cpu":  # elsewhere asking whether there is padding would wait for the device
        hidden, targets = (hidden, targets) if real.all() else (hidden[real], targets[real])
    return HeadLoss.apply(hidden, weight.to(hidden.dtype), targets)


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of a linear layer in pieces, so that no more than KEEP bytes of logits are ever there.

    forward   by rows of tokens: logits of a piece -> log-sum-exp and loss.
    backward  by rows of the weight: softmax of a piece from the logits, computed again unless all of them were small enough to keep.
              Each row of the weight's gradient is one product over all tokens, so no bf16 sum is ever rounded twice.
    """

    KEEP = 256 << 20
    PIECE = {"cpu": 16 << 20, "cuda": 64 << 20}  # bytes of a piece in fp32: a CPU's should fit its cache

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        N, V = len(hidden), len(weight)
        size = HeadLoss.PIECE.get(hidden.device.type, 64 << 20) // (4 * V) or 1
        keep = hidden.itemsize * N * V <= HeadLoss.KEEP and any(ctx.needs_input_grad)
        logits = hidden.new_empty(N if keep else min(N, size), V)
        lse, picked = torch.empty(2, N, device=hidden.device)
        for i in range(0, N, size):
            n = min(size, N - i)
            piece = torch.mm(hidden[i : i + n], weight.T, out=logits[i : i + n] if keep else logits[:n])  # [n, V]
            lse[i : i + n] = piece.float().logsumexp(dim=1)
            picked[i : i + n] = piece.gather(1, targets[i : i + n, None].clamp(min=0))[:, 0]
        ctx.save_for_backward(hidden, weight, targets, lse, logits if keep else None)
        return torch.where(targets >= 0, lse - picked, 0).sum()

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, lse, logits = ctx.saved_tensors
        N, V = len(hidden), len(weight)
        scale = torch.where(targets >= 0, grad, 0)[:, None]  # [N, 1]
        scaled = (hidden * scale).to(hidden.dtype)
        grad_hidden, grad_weight = torch.zeros(hidden.shape, device=hidden.device), torch.empty_like(weight)
        size = HeadLoss.PIECE.get(hidden.device.type, 64 << 20) // (4 * max(1, N)) or 1
        for i in range(0, V, size):
            rows = weight[i : i + size]
            piece = hidden @ rows.T if logits is None else logits[:, i : i + size]  # [N, size]
            piece = torch.sub(piece, lse[:, None]).exp_()  # fp32
            here = ((targets >= i) & (targets < i + size)).float()[:, None]
            piece.scatter_add_(1, (targets - i).clamp(0, len(rows) - 1)[:, None], -here)
            piece = piece.to(weight.dtype)
            torch.mm(piece.T, scaled, out=grad_weight[i : i + size])
            if piece.dtype == torch.float32:
                grad_hidden.addmm_(piece, rows)
            else:
                grad_hidden += piece @ rows
        return (grad_hidden * scale).to(hidden.dtype), grad_weight, None


class CausalAttention(torch.autograd.Function):
    """Causal attention for training on a CPU, where torch's own (2.13) takes half as long again: blocks of ROWS queries, each against the keys
    up to its end. Scores and softmax are fp32. q [B, n_head, T, d], k and v [B, n_kv, T, d] -> y as q.

    Inside, the queries that share a key head lie side by side: [B * n_kv, T * group, d], by position first.
    """

    ROWS = 64

    @staticmethod
    def inside(x, n_kv: int):  # [B, n, T, d] -> [B * n_kv, T * n / n_kv, d]
        B, n, T, d = x.shape
        return x.view(B, n_kv, n // n_kv, T, d).transpose(2, 3).reshape(B * n_kv, -1, d)

    @staticmethod
    def outside(x, B: int, T: int):  # and back
        return x.view(B, -1, T, x.shape[1] // T, x.shape[2]).transpose(2, 3).reshape(B, -1, T, x.shape[2])

    @staticmethod
    def blocks(q, k, scores, weights):
        """(rows of q, end, softmax of their scores [B * n_kv, rows, end]), the last block first; scores and weights are room for them."""
        T, group = k.shape[1], q.shape[1] // k.shape[1]
        for first in reversed(range(0, T, CausalAttention.ROWS)):
            end = min(first + CausalAttention.ROWS, T)
            rows, n = slice(first * group, end * group), len(q) * (end - first) * group * end
            s = torch.bmm(q[:, rows], k[:, :end].mT, out=scores[:n].view(len(q), -1, end))
            later = torch.ones(end - first, end - first, dtype=torch.bool).triu(1)
            s[:, :, first:].unflatten(1, (end - first, group)).masked_fill_(later[:, None], -torch.inf)
            yield rows, end, torch.softmax(s, dim=-1, out=weights[:n].view_as(s))

    @staticmethod
    def forward(ctx, q, k, v):
        (B, _, T, d), n_kv = q.shape, k.shape[1]
        q, k, v = (CausalAttention.inside(x, n_kv) for x in (q * d**-0.5, k, v))
        y, room = torch.empty_like(q), torch.empty(2, q[..., 0].numel() * min(T, CausalAttention.ROWS))
        for rows, end, p in CausalAttention.blocks(q.float(), k.float(), *room):
            torch.bmm(p.to(v.dtype), v[:, :end], out=y[:, rows])
        ctx.save_for_backward(q, k, v, y)
        return CausalAttention.outside(y, B, T)

    @staticmethod
    def backward(ctx, dy):
        q, k, v, y = ctx.saved_tensors
        B, _, T, d = dy.shape
        dy = CausalAttention.inside(dy, len(q) // B)
        delta = (dy * y).sum(-1, keepdim=True, dtype=torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.empty(k.shape), torch.empty(v.shape)
        room = torch.empty(2, q[..., 0].numel() * min(T, CausalAttention.ROWS))
        for rows, end, p in CausalAttention.blocks(q.float(), k.float(), *room):
            ds = (dy[:, rows] @ v[:, :end].mT).float().sub_(delta[:, rows]).mul_(p)
            for total, weight, x in ((dv, p, dy), (dk, ds, q)):
                part = weight.mT.to(x.dtype) @ x[:, rows]
                if end == T:  # the first to come, and the only one with all keys
                    total.copy_(part)
                else:
                    total[:, :end] += part
            torch.bmm(ds.to(k.dtype), k[:, :end], out=dq[:, rows])
        return tuple(CausalAttention.outside(x, B, T).to(q.dtype) for x in (dq.mul_(d**-0.5), dk, dv))
