# SPDX-License-Identifier: MIT
"""Scores of every policy on a prefilled prompt: higher is kept. All are [L, H, P] float32 on the cache's device.

kvtier's own policies run in C (scores.py, build/libkvtier-lab.so) on fp16 rows; those that need attention run
here, in torch, from the queries of the prefill. `oracle` needs the queries of the future.
"""
import torch

STAR = ("random", "streaming", "knorm", "vnorm", "keydiff", "lagkv", "cur", "vrange")  # only K and V
ATTENTION = ("tova", "h2o", "snapkv", "expected", "defensive")
LEARNED = ("kvp", "position", "qfilter")  # C policies with a weight file
WINDOW = {"h2o": 64, "snapkv": 64, "defensive": 32}  # recent rows kept, at most half of the budget
FUTURE = 512  # positions that expected-attention looks ahead


def attention(q, k, first):
    """Causal softmax [.., n, P] of queries q [.., n, d], rows first ... first + n - 1, over keys k [.., P, d]."""
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    n, p = s.shape[-2:]
    late = torch.arange(p, device=s.device) > torch.arange(first, first + n, device=s.device)[:, None]
    return s.masked_fill_(late, float("-inf")).softmax(-1)


def last_attention(cache, layer, n):
    """[H, G, n, P]: attention of the last n queries of the prompt."""
    p = cache.k.shape[2]
    return attention(cache.q[layer][:, :, p - n:], cache.k[layer][:, None], p - n)


def pooled(x, width=5):
    """Average over a window of rows around each, edges by what is there."""
    shape = x.shape
    return torch.nn.functional.avg_pool1d(x.reshape(-1, 1, shape[-1]), width, 1, width // 2,
                                          count_include_pad=False).view(shape)


def tova(cache, layer):
    a = last_attention(cache, layer, 1)
    return a.mean((0, 1, 2)).expand(a.shape[0], -1)


def h2o(cache, layer, block=1024):
    """Attention received from all past queries, over the number of queries that see the row."""
    h, p = cache.k.shape[1], cache.k.shape[2]
    total = torch.zeros(h, p, device=cache.k.device)
    for t in range(0, p, block):
        end = min(t + block, p)
        total[:, :end] += attention(cache.q[layer][:, :, t:end], cache.k[layer][:, None, :end], t).mean(1).sum(1)
    return total / torch.arange(p, 0, -1, device=total.device)


def snapkv(cache, layer):
    n = min(WINDOW["snapkv"], cache.k.shape[2])
    return pooled(last_attention(cache, layer, n).mean(2)).mean(1)


def defensive(cache, layer):
    """Worst case of a window: max over group and queries, not below the mean over rows, times |v|."""
    n = min(WINDOW["defensive"], cache.k.shape[2])
    a = pooled(last_attention(cache, layer, n)).amax((1, 2))
    return torch.maximum(a, a.mean(-1, keepdim=True)) * cache.v[layer].norm(dim=-1)


def expected(cache, layer, net):
    """Attention expected from Gaussian queries at the mean of the next FUTURE positions, times |v|."""
    p = cache.k.shape[2]
    q = net.unrope(cache.q[layer], 0)[:, :, min(4, p - 1):]
    mu = q.mean(2)
    sigma = (q - mu[:, :, None]).transpose(-1, -2) @ (q - mu[:, :, None]) / q.shape[2]
    at = torch.arange(p, p + FUTURE, device=q.device, dtype=torch.float64)
    angle = net.theta ** (-torch.arange(0, net.dim, 2, device=q.device, dtype=torch.float64) / net.dim)
    cos, sin = ((f(at[:, None] * angle)).mean(0).float() for f in (torch.cos, torch.sin))
    rotate = torch.zeros(net.dim, net.dim, device=q.device)
    half = torch.arange(net.dim // 2, device=q.device)
    rotate[half, half], rotate[half + len(half), half + len(half)] = cos, cos
    rotate[half, half + len(half)], rotate[half + len(half), half] = -sin, sin
    mu, sigma = mu @ rotate.T, rotate @ sigma @ rotate.T
    k = cache.k[layer][:, None]
    s = (k @ mu[..., None])[..., 0] / net.dim ** 0.5 + ((k @ sigma) * k).sum(-1) / (2 * net.dim)
    return s.softmax(-1).mean(1) * cache.v[layer].norm(dim=-1)


def future_attention(cache, q, first, prompt):
    """Utilities of the first `prompt` rows: (sum over future queries of the group's max, of its mean), [L, H, P].

    cache holds prompt and future; q [L, H, G, F, d] are the future's queries, rows `first` on.
    """
    top, mean = [], []
    for layer in range(cache.k.shape[0]):
        a = attention(q[layer], cache.k[layer][:, None], first)[..., :prompt]
        top.append(a.amax(1).sum(1))
        mean.append(a.mean(1).sum(1))
    return torch.stack(top), torch.stack(mean)


def torch_scores(net, cache, names):
    """Attention-based policies of `names` that are known here."""
    known = {"tova": tova, "h2o": h2o, "snapkv": snapkv, "defensive": defensive}
    out = {}
    for name in names:
        if name == "expected":
            out[name] = torch.stack([expected(cache, i, net) for i in range(net.layers)])
        elif name in known:
            out[name] = torch.stack([known[name](cache, i).float() for i in range(net.layers)])
    return out


class Kvtier:
    """The policies in C, each opened once. weights: {"kvp": path, "position": path, "qfilter": path}."""

    def __init__(self, net, names, weights, threads=0):
        import scores
        self.threads, self.open = threads, {}
        shape = scores.Shape(net.layers, net.heads, net.dim, net.dim, "float16")
        for name in names:
            self.open[name] = scores.open(name.split(":")[0], weights.get(name), shape)

    def __call__(self, cache, nonce=0):
        k, v = (x.to(torch.float16).cpu() for x in (cache.k, cache.v))
        shape = cache.k.shape[:3]
        return {name: torch.from_numpy(p.score(k, v, threads=self.threads, nonce=nonce)).view(shape).to(cache.k.device)
                for name, p in self.open.items()}

    def close(self):
        for p in self.open.values():
            p.close()
