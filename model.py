"""A causal language model and its greedy text: the network alone. Its files are pretrained.py's.

    x = embed_tokens(tokens); L times: x += self_attn(input_layernorm(x)),
    x += mlp(post_attention_layernorm(x)); logits = head(norm(x))

Modules bear the names of a Llama checkpoint; Config says which variant a network is. No dropout.
Tokens are packed, row after row without padding, (N, D) for linear layers, norms and MLPs. They are
padded to (B, T) only for attention, on the right, where no token can see it.

    B rows   T longest row   N packed tokens   V vocabulary   D hidden size   L layers
    H heads   K key-value heads   E head size   S places in a cache
"""
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cli import InputError

GROUP = 8  # rows that attend together on a CPU: sorted by length, they waste little on padding


class Config(NamedTuple):
    """What a network computes: its sizes, and a choice where models of this kind differ."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of the MLP
    num_attention_heads: int
    num_key_value_heads: int  # each serves H / K attention heads
    head_dim: int
    max_position_embeddings: int  # the context length
    tie_word_embeddings: bool  # the embedding is the head, too
    activation: object  # elementwise function of the MLP
    gated_mlp: bool
    norm: type  # RMSNorm or nn.LayerNorm
    norm_eps: float
    qk_norm: bool  # an RMSNorm over each head's queries and keys
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    attention_scales: list  # a factor of q · k for each layer
    inv_freq: torch.Tensor | None  # (E/2,) rotary radians a position; None: learned positions


class Rows:
    """Where N packed tokens stand in B rows of T places, of which lengths (B,) are filled."""

    def __init__(self, T, lengths):
        self.B, self.T = len(lengths), T
        place = torch.arange(self.B * T, device=lengths.device)
        self.place = place[place % T < lengths.repeat_interleave(T)]  # (N,)
        self.row, self.position = self.place // T, self.place % T  # (N,), (N,)
        self.groups, end = [(slice(None), self)], 0  # (slice of the N tokens, its rows)
        if lengths.device.type == "cpu" and self.B > GROUP and T > 1:
            self.groups = []  # a GPU would rather have one large batch
            for part in lengths.split(GROUP):
                start, end = end, end + int(part.sum())
                self.groups.append((slice(start, end), Rows(int(part.max()), part)))

    def pack(self, x):  # (B, T, ...) -> (N, ...)
        return x.flatten(0, 1)[self.place]

    def pad(self, x):  # (N, ...) -> (B, T, ...)
        x = x.new_zeros(self.B * self.T, *x.shape[1:]).index_copy(0, self.place, x)
        return x.unflatten(0, (self.B, self.T))


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, the mean square in float32."""

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rotate(x, cos, sin):
    """Turn each pair (i, i + E/2) of x (N, heads, E), Hugging Face's order (Meta's own files pair
    neighbours), by an angle that grows with the position. cos, sin (N, 1, E), the first half of
    sin negated, and the result are float32."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1).to(sin.dtype), sin)


class Attention(nn.Module):
    def __init__(self, config, scale):
        super().__init__()
        D, E, bias = config.hidden_size, config.head_dim, config.qkv_bias
        H, K, self.scale = config.num_attention_heads, config.num_key_value_heads, scale
        self.heads = -1, E
        norm = partial(RMSNorm, E, eps=config.norm_eps) if config.qk_norm else nn.Identity
        self.q_proj = nn.Linear(D, H * E, bias=bias)
        self.k_proj = nn.Linear(D, K * E, bias=bias)
        self.v_proj = nn.Linear(D, K * E, bias=bias)
        self.o_proj = nn.Linear(H * E, D, bias=config.o_bias)
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x, rows, rotary, cache=None):
        """x (N, D) -> (N, D). cache (B, S, 2, K, E), if given, takes in these keys and values."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, self.heads))  # (N, H, E)
        k = self.k_norm(self.k_proj(x).unflatten(-1, self.heads))  # (N, K, E)
        v = self.v_proj(x).unflatten(-1, self.heads)  # (N, K, E)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            cache[rows.row, rows.position] = torch.stack((k, v), dim=1).to(cache.dtype)
            if rows.T == 1:  # one new token a row, after its prompt
                return self.o_proj(self.look_back(q, cache, rows.position).flatten(1))
        y = [self.attend(q[part], k[part], v[part], group) for part, group in rows.groups]
        return self.o_proj(torch.cat(y) if len(y) > 1 else y[0])  # (N, H * E) -> (N, D)

    def attend(self, q, k, v, rows):
        """Tokens to their row up to themselves: q (N, H, E), k and v (N, K, E) -> (N, H * E)."""
        q, k, v = (rows.pad(t).transpose(1, 2) for t in (q, k, v))  # (B, H or K, T, E)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale,
                                           enable_gqa=q.shape[1] != k.shape[1])
        return rows.pack(y.transpose(1, 2)).flatten(1)

    def look_back(self, q, cache, position):
        """One new token a row to the cached places up to its own: q (B, H, E) -> (B, H, E)."""
        k, v = (t.to(q.dtype) for t in cache.transpose(1, 3).unbind(2))  # (B, K, S, E)
        q = q.unflatten(1, (k.shape[1], -1))  # (B, K, H/K, E): queries of one key head side by side
        past = torch.arange(k.shape[2], device=q.device) <= position[:, None, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=past, scale=self.scale)
        return y.flatten(1, 2)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.act = config.activation
        self.gate_proj = nn.Linear(D, inner, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)

    def forward(self, x):
        up = self.up_proj(x)
        return self.down_proj(self.act(self.gate_proj(x)) * up if self.gate_proj else self.act(up))


class Layer(nn.Module):
    def __init__(self, config, scale):
        super().__init__()
        norm = partial(config.norm, config.hidden_size, eps=config.norm_eps)
        self.input_layernorm, self.self_attn = norm(), Attention(config, scale)
        self.post_attention_layernorm, self.mlp = norm(), MLP(config)

    def forward(self, x, rows, rotary, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rows, rotary, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A causal language model. checkpointing = True saves memory and costs time."""

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        V, D = config.vocab_size, config.hidden_size
        self.embed_tokens = nn.Embedding(V, D)
        if config.inv_freq is None:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, D)
        self.layers = nn.ModuleList(Layer(config, scale) for scale in config.attention_scales)
        self.norm = config.norm(D, eps=config.norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(D, V, bias=False)

    @property
    def head(self):
        """(V, D), the matrix from hidden states to logits: the embedding's where they are tied."""
        return (self.lm_head or self.embed_tokens).weight

    def forward(self, tokens):
        """tokens (B, T) int64 -> logits (B, T, V). InputError if T exceeds the context."""
        return F.linear(self.hidden(tokens), self.head)

    def hidden(self, tokens, lengths=None):
        """After the final norm: tokens (B, T) int64 -> (B, T, D), or packed, given the lengths (B,)
        of rows padded on the right -> (sum of lengths, D). InputError as in forward."""
        (B, T), context = tokens.shape, self.config.max_position_embeddings
        if T > context:
            raise InputError(f"a row of {T} tokens exceeds the context of {context}: shorten it")
        rows = Rows(T, tokens.new_full((B,), T) if lengths is None else lengths.to(tokens.device))
        x = self.trunk(rows.pack(tokens), rows)  # (N, D)
        return x.unflatten(0, (B, T)) if lengths is None else x

    def trunk(self, tokens, rows, caches=None):
        """tokens (N,) -> (N, D)"""
        x, rotary = self.embed_tokens(tokens), None
        if self.config.inv_freq is None:
            x = x + self.embed_positions(rows.position)
        else:
            angle = rows.position[:, None, None] * self.config.inv_freq.to(x.device)  # (N, 1, E/2)
            cos, sin = angle.cos(), angle.sin()
            rotary = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)  # (N, 1, E) each
        again = self.checkpointing and torch.is_grad_enabled()
        for i, layer in enumerate(self.layers):
            run = partial(checkpoint, layer, use_reentrant=False) if again else layer
            x = run(x, rows, rotary, None if caches is None else caches[i])
        return self.norm(x)


@torch.inference_mode()
def generate(decoder, prompts, max_new_tokens, eos_id):
    """Greedy continuations of prompts, lists of ids -> lists of the new ids alone, in order.

    A row ends at eos_id (an id or several, not part of the result), after max_new_tokens or where
    the context is full. InputError for a prompt that is empty or too long.
    """
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
    context, device = decoder.config.max_position_embeddings, decoder.head.device
    sizes, answers = [len(prompt) for prompt in prompts], [[] for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return answers
    if min(sizes) < 1 or max(sizes) >= context:
        raise InputError(f"prompts of {min(sizes)} to {max(sizes)} tokens: use 1 to {context - 1}")
    lengths, T = torch.tensor(sizes, device=device), max(sizes)
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)  # (N,)
    # Keys and values lie at their token's position: rows of any lengths share the caches.
    places, heads = min(context, T + max_new_tokens), decoder.config.num_key_value_heads
    shape = len(decoder.layers), len(prompts), places, 2, heads, decoder.config.head_dim
    caches = decoder.head.new_zeros(shape)
    rows, alive = Rows(T, lengths), list(range(len(prompts)))
    x = decoder.trunk(tokens, rows, caches)[lengths.cumsum(0) - 1]  # (N, D) -> (B, D)
    for made in range(1, max_new_tokens + 1):
        tokens = F.linear(x, decoder.head).argmax(-1)  # (B,)
        for row, token in zip(alive, tokens.tolist(), strict=True):
            if token not in ends:
                answers[row].append(token)
        going = [len(answers[row]) == made < context - sizes[row] for row in alive]
        if made == max_new_tokens or not any(going):
            return answers
        if not all(going):  # what has ended leaves the batch
            kept = torch.tensor(going, device=device)
            tokens, lengths, caches = tokens[kept], lengths[kept], caches[:, kept]
            alive = [row for row, goes in zip(alive, going, strict=True) if goes]
        rows = Rows(1, torch.ones_like(lengths))
        rows.position, lengths = lengths, lengths + 1
        x = decoder.trunk(tokens, rows, caches[:, :, :int(lengths.max())])
