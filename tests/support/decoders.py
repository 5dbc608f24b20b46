"""A second decoder, in numpy and f64: Hugging Face's tensors as they are in the files, and what sets a family apart as data.

It shares nothing with the network: rope turns the pairs that the family says, windows are a mask, and there is no cache.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """What a family does, where it differs from Llama; a layer's entry of `windows` and `thetas` is None for none of it.

    `rope` gives the frequencies f64[r / 2] for a theta and a number of dims, and the factor of cos and sin.
    """

    heads: int
    kv_heads: int
    layers: int
    eps: float = 1e-5
    norm: str = "rms"
    norms: tuple[str | None, str | None, str | None, str | None] = ("input_layernorm", None, "post_attention_layernorm", None)
    parallel: bool = False
    qk_norm: str | None = None
    act: str = "silu"
    windows: tuple = ()
    thetas: tuple = ()
    theta: float = 10000.0
    share: float = 1.0
    interleaved: bool = False
    scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    embedding: float = 1.0
    residual: float = 1.0
    logit: float = 1.0
    factors: tuple = ()
    attention_factor: float = 1.0

    def logits(self, tensors, tokens) -> np.ndarray:
        weights = {name: values.astype(np.float64) for name, values in tensors.items()}
        x = weights["model.embed_tokens.weight"][np.asarray(tokens)] * self.embedding
        for i in range(self.layers):
            prefix = f"model.layers.{i}."
            layer = {name.removeprefix(prefix): values for name, values in weights.items() if name.startswith(prefix)}
            x = self._layer(layer, x, i)
        head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
        model = {name.removeprefix("model."): values for name, values in weights.items()}
        scores = self._norm(model, "norm", x) @ head.T * self.logit
        return _capped(scores, self.logit_cap)

    def _layer(self, layer, x, i):
        before, behind, mlp_before, mlp_behind = self.norms
        y = self._norm(layer, before, x)
        attended = self._norm(layer, behind, self._attention(layer, y, i)) * self.residual
        if self.parallel:
            return x + attended + self._mlp(layer, y)
        x = x + attended
        return x + self._norm(layer, mlp_behind, self._mlp(layer, self._norm(layer, mlp_before, x))) * self.residual

    def _attention(self, layer, x, i):
        fused = _linear(layer, "self_attn.qkv_proj", x) if "self_attn.qkv_proj.weight" in layer else None
        d = (fused.shape[1] if fused is not None else len(layer["self_attn.q_proj.weight"])) // (
            self.heads + 2 * self.kv_heads if fused is not None else self.heads)
        if fused is not None:
            q, k, v = np.split(fused, [self.heads * d, (self.heads + self.kv_heads) * d], axis=1)
        else:
            q, k, v = (_linear(layer, f"self_attn.{part}_proj", x) for part in "qkv")
        q, k = self._qk_norm(layer, "q", q, d), self._qk_norm(layer, "k", k, d)
        q, k, v = (part.reshape(len(x), -1, d) for part in (q, k, v))
        theta = self.thetas[i] if self.thetas else self.theta
        if theta is not None:
            q, k = self._turned(q, theta), self._turned(k, theta)
        groups = self.heads // self.kv_heads
        k, v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
        scores = _capped(np.einsum("shd,thd->hst", q, k) * (d**-0.5 if self.scale is None else self.scale), self.score_cap)
        away = np.arange(len(x))[:, None] - np.arange(len(x))
        window = self.windows[i] if self.windows else None
        scores = np.where((away >= 0) & (away < (window or len(x))), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hst,thd->shd", weights / weights.sum(-1, keepdims=True), v)
        return _linear(layer, "self_attn.o_proj", mixed.reshape(len(x), -1))

    def _qk_norm(self, layer, part, x, d):
        if self.qk_norm == "all":
            return self._norm(layer, f"self_attn.{part}_norm", x)
        heads = x.reshape(len(x), -1, d)
        if self.qk_norm == "head":
            return self._norm(layer, f"self_attn.{part}_norm", heads).reshape(x.shape)
        if self.qk_norm == "each":
            return np.concatenate([self._norm(layer, f"self_attn.{part}_layernorm.norms.{head}", heads[:, head])
                                   for head in range(heads.shape[1])], axis=1)
        return x

    def _turned(self, x, theta):
        r = int(x.shape[-1] * self.share)
        angles = np.arange(len(x))[:, None] * (theta ** -(np.arange(0, r, 2) / r) / (np.asarray(self.factors or 1.0)))
        cos, sin = (f(angles)[:, None] * self.attention_factor for f in (np.cos, np.sin))
        if self.interleaved:
            a, b = x[..., 0:r:2], x[..., 1:r:2]
            turned = np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(*x.shape[:-1], r)
        else:
            a, b = x[..., :r // 2], x[..., r // 2:r]
            turned = np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
        return np.concatenate([turned, x[..., r:]], axis=-1)

    def _mlp(self, layer, x):
        if self.act == "plain":
            return _linear(layer, "mlp.c_proj", _gelu(_linear(layer, "mlp.c_fc", x)))
        if "mlp.gate_up_proj.weight" in layer:
            gate, up = np.split(_linear(layer, "mlp.gate_up_proj", x), 2, axis=1)
        else:
            gate, up = _linear(layer, "mlp.gate_proj", x), _linear(layer, "mlp.up_proj", x)
        return _linear(layer, "mlp.down_proj", (_gelu(gate) if self.act == "gelu" else gate / (1 + np.exp(-gate))) * up)

    def _norm(self, layer, name, x):
        if name is None:
            return x
        weight = layer[f"{name}.weight"] + (self.norm == "rms+1")
        if self.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * weight + layer.get(f"{name}.bias", 0)


def _linear(layer, name, x):
    return x @ layer[f"{name}.weight"].T + layer.get(f"{name}.bias", 0)


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _capped(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)
