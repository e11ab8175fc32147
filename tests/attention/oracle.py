"""Attention and its gradients in float64 numpy, written from the definition: shares no code with llm.attention."""

import numpy as np


def philox(counter, key):
    """Philox-4x32-10 with 64-bit products on uint64 arrays."""
    c = [np.asarray(x, np.uint64) & 0xFFFFFFFF for x in counter]
    k0, k1 = int(key[0]), int(key[1])
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            p1 & low,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            p0 & low,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def visible(mask, B, N, T, S):
    """The rule of Mask, one query and one key at a time."""
    get = lambda name: None if getattr(mask, name) is None else np.asarray(getattr(mask, name))  # noqa: E731
    q_pos, k_pos = get("q_positions_BT"), get("kv_positions_BS")
    q_pos = np.tile(np.arange(S - T, S), (B, 1)) if q_pos is None else q_pos
    k_pos = np.tile(np.arange(S), (B, 1)) if k_pos is None else k_pos
    q_seg, k_seg, dense = get("q_segments_BT"), get("kv_segments_BS"), get("dense_BNTS")
    lengths, prefix = get("kv_lengths_B"), get("prefix_lengths_B")
    seen = np.ones((B, N, T, S), bool)
    for b in range(B):
        for t in range(T):
            for s in range(S):
                q, k = int(q_pos[b, t]), int(k_pos[b, s])
                ok = True
                if mask.causal and k > q and not (prefix is not None and k < prefix[b]):
                    ok = False
                if mask.window is not None:
                    left, right = mask.window
                    if left is not None and k < q - left:
                        ok = False
                    if right is not None and k > q + right:
                        ok = False
                if lengths is not None and k >= lengths[b]:
                    ok = False
                if q_seg is not None and (q_seg[b, t] == 0 or q_seg[b, t] != k_seg[b, s]):
                    ok = False
                seen[b, :, t, s] = ok
    if dense is not None:
        seen &= dense
    return seen, q_pos, k_pos


def attention(q, k, v, mask, *, bias=None, scale=None, softcap=None, sinks=None, rate=0.0, words=None):
    """Returns a dict with out, lse and a function `gradients(dout, dlse)` -> dict of dq, dk, dv, dbias, dsinks."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    _, S, K, _ = k.shape
    kk, vv = np.repeat(k, N // K, 2), np.repeat(v, N // K, 2)
    scale = 1 / np.sqrt(H) if scale is None else scale
    raw = np.einsum("btnh,bsnh->bnts", q, kk) * scale
    capped = raw if softcap is None else softcap * np.tanh(raw / softcap)
    scores = capped if bias is None else capped + np.asarray(bias, np.float64)
    seen, q_pos, k_pos = visible(mask, B, N, T, S)
    scores = np.where(seen, scores, -np.inf)
    columns = [scores]
    if sinks is not None:
        columns.append(np.broadcast_to(np.asarray(sinks, np.float64)[None, :, None, None], (B, N, T, 1)))
    every = np.concatenate(columns, -1)
    top = every.max(-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    e = np.exp(every - top)
    total = e.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    every_p = e / np.where(total == 0, 1, total)
    p = every_p[..., :S]
    factor = np.ones_like(p)
    if rate:
        b, n = np.arange(B)[:, None, None, None], np.arange(N)[None, :, None, None]
        counter = np.broadcast_arrays(b, n, q_pos[:, None, :, None], k_pos[:, None, None, :] // 4)
        bits = np.stack(philox(counter, words))
        lane = np.broadcast_to(k_pos[:, None, None, :] % 4, p.shape)
        bits = np.take_along_axis(bits, lane[None].astype(int), 0)[0]
        factor = (bits >= round(rate * 2**32)) / (1 - rate)
    out = np.einsum("bnts,bsnh->btnh", p * factor, vv)

    def gradients(dout, dlse=None):
        dout = np.asarray(dout, np.float64)
        dp = np.einsum("btnh,bsnh->bnts", dout, vv) * factor
        inner = (dp * p).sum(-1, keepdims=True)
        if dlse is not None:
            inner = inner - np.moveaxis(np.asarray(dlse, np.float64), 1, 2)[..., None]
        dscores = p * (dp - inner)
        draw = dscores if softcap is None else dscores * (1 - (capped / softcap) ** 2)
        draw = draw * scale
        result = {
            "dq": np.einsum("bnts,bsnh->btnh", draw, kk),
            "dk": np.einsum("bnts,btnh->bsnh", draw, q).reshape(B, S, K, N // K, H).sum(3),
            "dv": np.einsum("bnts,btnh->bsnh", p * factor, dout).reshape(B, S, K, N // K, v.shape[3]).sum(3),
        }
        if bias is not None:
            axes = tuple(a for a in range(4) if np.shape(bias)[a] == 1)
            result["dbias"] = dscores.sum(axes, keepdims=True)
        if sinks is not None:
            result["dsinks"] = -(every_p[..., S:] * inner).sum((0, 2, 3))
        return result

    return {"out": out, "lse": np.moveaxis(lse, 1, 2), "weights": p, "gradients": gradients}


def bucket(relative, *, bidirectional, buckets, max_distance):
    """T5's bucket of one relative position (key minus query), an int."""
    first, distance = 0, -relative
    if bidirectional:
        buckets //= 2
        first, distance = (buckets if relative > 0 else 0), abs(relative)
    distance = max(distance, 0)
    exact = buckets // 2
    if distance < exact:
        return first + distance
    # float32, as published: on a border between two buckets the last bit decides.
    steps = np.log(np.float32(distance) / np.float32(exact)) / np.float32(np.log(max_distance / exact))
    return first + min(buckets - 1, exact + int(np.float32(steps) * np.float32(buckets - exact)))


def bucket_bias(table, q_pos, k_pos, **how):
    """The array (B, N, T, S) of a bias table, and a function that sums a gradient of the array into the table's."""
    find = np.vectorize(lambda r: bucket(int(r), **how))
    index = find(k_pos[:, None, :] - q_pos[:, :, None])

    def collect(dbias):
        result = np.zeros(table.shape)
        np.add.at(result, index, np.moveaxis(dbias, 1, -1))
        return result

    return np.moveaxis(np.asarray(table, np.float64)[index], -1, 1), collect
