"""One decoder for the Llama family and GPT-2, and the Hugging Face model directories that hold it.

    tokens -> embed_tokens -> L x [x + self_attn(input_layernorm(x)); x + mlp(post_attention_layernorm(x))]
           -> norm -> head -> logits

Modules bear the names of a Llama checkpoint; GPT-2's go through one table, GPT2_NAMES, for reading and writing.
The families: Llama 2 to 3.2, SmolLM2, TinyLlama; Mistral where the sliding window is null or no narrower than
the context; Qwen2, Qwen2.5 (q, k, v biases); Qwen3 (q and k norms); GPT-2 (learned positions, LayerNorm, no gate
in the MLP). What else a config.json asks for is refused by name before a weight is read. Only safetensors is
read, never a pickle. Dropout settings stay in config.json and are never applied.

Inside, tokens are packed: row after row without padding. Linear layers, norms and MLPs work on (N, D); rows are
padded to (B, T) only around attention, on the right, where a causal model cannot see it.

    B rows   T longest row   N packed tokens   V vocabulary
    D hidden size   H heads   K key-value heads   E head size   L layers
"""
import json
import math
import os
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

GROUP = 8  # rows that attend together on a CPU: sorted by length, they waste little on padding


class InputError(ValueError):
    """The user's input is wrong. One line: which file or flag, what is wrong with it, what to do."""


# ------------------------------------------------------------------------------------------------------------
# config.json

FAMILIES = {  # what transformers assumes where a config.json is silent
    "llama": dict(context=2048),
    "mistral": dict(context=131072, kv_heads=8),
    "qwen2": dict(context=32768, kv_heads=32),
    "qwen3": dict(context=32768, kv_heads=32, head_dim=128),
    "gpt2": dict(context=1024),
}
GPT2_KEYS = {
    "hidden_size": "n_embd",
    "intermediate_size": "n_inner",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}
ACTIVATIONS = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class _Keys:
    """Typed look-ups in a JSON object; a complaint names file and key. A null is as good as an absent key."""

    def __init__(self, values, where, names=None):
        self.values, self.where, self.names = values, where, names or {}

    def refuse(self, what):
        raise InputError(f"{self.where}: {what}")

    def get(self, key, default, fits, kind):
        key = self.names.get(key, key)
        value = default if self.values.get(key) is None else self.values[key]
        if not fits(value):
            self.refuse(f"{key} must be {kind}, not {'absent' if value is None else repr(value)[:40]}")
        return value

    def size(self, key, default=None, high=2**24):
        fits = lambda v: type(v) is int and 1 <= v <= high  # noqa: E731
        return self.get(key, default, fits, f"a whole number from 1 to {high}")

    def number(self, key, default=None):
        fits = lambda v: type(v) in (int, float) and 0 < v < 1e30  # noqa: E731
        return float(self.get(key, default, fits, "a number above 0"))

    def flag(self, key, default=False):
        return self.get(key, default, lambda v: type(v) is bool, "true or false")

    def choice(self, key, default, choices):
        fits = lambda v: isinstance(v, str) and v in choices  # noqa: E731
        return self.get(key, default, fits, "one of " + ", ".join(choices))


def read_config(folder):
    """What the decoder needs to know of a model directory's config.json, in Llama's words whatever the family.

    InputError if the file is absent or broken or asks for what is not supported.
    """
    where = Path(folder) / "config.json"
    if not where.is_file():
        raise InputError(f"{where}: no such file; a model folder holds config.json and model.safetensors")
    try:
        text = where.read_bytes()
        raw = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError, OSError) as e:
        raise InputError(f"{where}: cannot be read as JSON ({_one_line(e)}); download it again") from None
    if not isinstance(raw, dict):
        raise InputError(f"{where}: must hold a JSON object, not a {type(raw).__name__}; download it again")

    keys = _Keys(raw, where, GPT2_KEYS if raw.get("model_type") == "gpt2" else None)
    if raw.get("quantization_config") is not None:
        keys.refuse("quantization_config: quantised weights are not supported; use the unquantised model")
    name = str(raw.get("model_type"))[:40]
    if re.search("moe|mixtral", name) or raw.get("num_local_experts") or raw.get("num_experts"):
        keys.refuse(f"model_type {name}: mixture of experts is not supported")
    kind = keys.choice("model_type", None, FAMILIES)
    gpt2, absent = kind == "gpt2", FAMILIES[kind]

    dim, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    layers = keys.size("num_hidden_layers", high=1024)
    context = keys.size("max_position_embeddings", absent["context"])
    kv_heads, head_dim = heads, None if gpt2 else raw.get("head_dim", absent.get("head_dim"))
    if not gpt2:
        silent = "num_key_value_heads" not in raw
        kv_heads = keys.size("num_key_value_heads", absent.get("kv_heads", heads) if silent else heads)
    if heads % kv_heads or (head_dim is None and dim % heads):
        keys.refuse(f"sizes do not divide: hidden {dim}, attention heads {heads}, num_key_value_heads {kv_heads}")
    head_dim = dim // heads if head_dim is None else keys.size("head_dim", head_dim)
    if keys.flag("add_cross_attention"):
        keys.refuse("add_cross_attention is not supported")
    _refuse_windows(keys, kind, layers, context)
    scale = head_dim**-0.5 if keys.flag("scale_attn_weights", True) or not gpt2 else 1.0
    by_layer = gpt2 and keys.flag("scale_attn_by_inverse_layer_idx")
    bias = kind in ("llama", "qwen3") and keys.flag("attention_bias")
    return SimpleNamespace(
        model_type=kind,
        gpt2=gpt2,
        vocab_size=keys.size("vocab_size"),
        hidden_size=dim,
        intermediate_size=keys.size("intermediate_size", 4 * dim if gpt2 else None),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,  # the context length
        tie_word_embeddings=keys.flag("tie_word_embeddings", gpt2),
        hidden_act=keys.choice("hidden_act", "gelu_new" if gpt2 else "silu", ACTIVATIONS),
        norm_eps=keys.number("rms_norm_eps", 1e-5 if gpt2 else 1e-6),
        initializer_range=keys.number("initializer_range", 0.02),
        qkv_bias=bias or kind in ("qwen2", "gpt2"),
        o_bias=bias or gpt2,
        mlp_bias=gpt2 or (kind == "llama" and keys.flag("mlp_bias")),
        attention_scales=[scale / (i + 1 if by_layer else 1) for i in range(layers)],
        inv_freq=None if gpt2 else _rotary_frequencies(keys, head_dim, context),  # (E/2,)
        raw=raw,  # config.json as parsed
        text=text,  # and as it was, for save
    )


def _refuse_windows(keys, kind, layers, context):
    """A window narrower than the context is in use: in Mistral wherever it is set, in Qwen if a layer asks."""
    raw, window = keys.values, None
    types = raw.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(t != "full_attention" for t in types)):
        keys.refuse("layer_types other than full_attention are not supported")
    if kind == "mistral" or (kind in ("qwen2", "qwen3") and keys.flag("use_sliding_window") and types is None):
        window = raw.get("sliding_window", 4096)
    if kind != "mistral" and window is not None and layers <= keys.size("max_window_layers", 28):
        window = None
    if window is not None and not (type(window) is int and window >= context):
        keys.refuse(f"sliding_window {str(window)[:40]} is in use (the context is {context}), it is not supported")


def _rotary_frequencies(keys, head_dim, context):
    """(E/2,) radians per position, float32. Old files say rope_theta and rope_scaling, new ones rope_parameters."""
    raw = keys.values
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
        keys.refuse("rope_scaling and rope_parameters must be objects of numbers")
    rope = {k: raw[k] for k in ("rope_theta", "partial_rotary_factor") if k in raw} | rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    keys = _Keys(rope, f"{keys.where}: rotary settings")
    if kind not in ("default", "linear", "llama3"):
        keys.refuse(f"rope_type {str(kind)[:40]} is not supported; supported are default, linear, llama3")
    if head_dim % 2 or keys.number("partial_rotary_factor", 1) != 1:
        keys.refuse("an odd head_dim or a partial_rotary_factor other than 1 is not supported")
    theta = keys.number("rope_theta", 10000.0)
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if kind == "default":
        return inv_freq
    factor = keys.number("factor")
    if kind == "linear":
        return inv_freq / factor
    # llama3: what turns often in the old context stays, what turns rarely is slowed by factor, the rest is mixed.
    low, high = keys.number("low_freq_factor"), keys.number("high_freq_factor")
    if low >= high:
        keys.refuse(f"low_freq_factor {low} must be below high_freq_factor {high}")
    turns = keys.number("original_max_position_embeddings", context) * inv_freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / factor


# ------------------------------------------------------------------------------------------------------------
# The decoder


class Rows:
    """Where each of N packed tokens stands in B rows of T places, of which lengths (B,) count; None: all do."""

    def __init__(self, B, T, lengths, device):
        place = torch.arange(B * T, device=device)
        self.B, self.T, self.place = B, T, None
        if lengths is not None:
            self.place = place = place[place % T < lengths.to(device).repeat_interleave(T)]  # (N,)
        self.row, self.position = place // T, place % T  # (N,), (N,)
        self.groups = [(slice(None), self)]  # (slice of the N tokens, its rows): what attends together
        if lengths is not None and device.type == "cpu" and B > GROUP:
            sizes, start = lengths.tolist(), 0
            self.groups = []
            for some in (sizes[i:i + GROUP] for i in range(0, B, GROUP)):
                rows = Rows(len(some), max(some), torch.tensor(some), device)
                self.groups.append((slice(start, start + sum(some)), rows))
                start += sum(some)

    def pack(self, x):
        """(B, T, ...) -> (N, ...)"""
        x = x.flatten(0, 1)
        return x if self.place is None else x[self.place]

    def pad(self, x):
        """(N, ...) -> (B, T, ...)"""
        if self.place is not None:
            x = x.new_zeros(self.B * self.T, *x.shape[1:]).index_copy(0, self.place, x)
        return x.unflatten(0, (self.B, self.T))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in float32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def rotate(x, cos, sin):
    """Turn each pair (i, i + E/2) of x (N, heads, E) by an angle that grows with the token's position.

    Pairs are the two halves of a head ("rotate_half", Hugging Face's order), not neighbours (2i, 2i + 1) as in
    Meta's own files. cos (N, 1, E) and sin (N, 1, E), negated in its first half, are float32, as is the result.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1).to(sin.dtype), sin)


class Attention(nn.Module):
    def __init__(self, config, scale):
        super().__init__()
        self.scale, self.head_dim, D = scale, config.head_dim, config.hidden_size
        q_dim, kv_dim = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(D, q_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, kv_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_dim, D, bias=config.o_bias)
        qwen3 = config.model_type == "qwen3"
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if qwen3 else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if qwen3 else None

    def forward(self, x, rows, rotary, cache=None):
        """x (N, D) -> (N, D). cache (B, S, 2, K, E), if given, takes in these tokens' keys and values."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, H, E)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, K, E)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (N, K, E)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            cache[rows.row, rows.position] = torch.stack((k, v), dim=1).to(cache.dtype)
        if cache is not None and rows.T == 1:
            return self.o_proj(self.look_back(q, cache, rows.position).flatten(1))
        y = [self.attend(*(some.pad(t[tokens]) for t in (q, k, v)), some) for tokens, some in rows.groups]
        return self.o_proj(y[0] if len(y) == 1 else torch.cat(y))  # (N, H * E) -> (N, D)

    def attend(self, q, k, v, rows):
        """q (B, T, H, E), k and v (B, T, K, E) -> (N, H * E): each token to those of its row up to itself."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H or K, T, E)
        shared = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=shared)
        return rows.pack(y.transpose(1, 2)).flatten(1)

    def look_back(self, q, cache, position):
        """One new token a row: q (B, H, E) attends to the cached places up to its own -> (B, H, E)."""
        k, v = cache.transpose(1, 3).unbind(2)  # (B, K, S, E)
        q = q.unflatten(1, (k.shape[1], -1))  # (B, K, H/K, E): heads that share keys become queries side by side
        seen = torch.arange(k.shape[2], device=q.device) <= position[:, None, None, None]  # (B, 1, 1, S)
        y = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=seen, scale=self.scale)
        return y.flatten(1, 2)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.act = ACTIVATIONS[config.hidden_act]
        self.gate_proj = None if config.gpt2 else nn.Linear(D, inner, bias=bias)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config, norm, scale):
        super().__init__()
        self.input_layernorm = norm()
        self.self_attn = Attention(config, scale)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(config)

    def forward(self, x, rows, rotary, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rows, rotary, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A causal language model, from the folder source. checkpointing = True saves memory and costs time."""

    def __init__(self, config, source):
        super().__init__()
        self.config, self.source, self.checkpointing = config, Path(source), False
        self.stored_dtypes = {}  # parameter -> its precision in the source's files, kept by save
        norm = partial(nn.LayerNorm if config.gpt2 else RMSNorm, config.hidden_size, eps=config.norm_eps)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.gpt2:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, norm, scale) for scale in config.attention_scales)
        self.norm = norm()
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self):
        """(V, D), the matrix from hidden states to logits: lm_head's, or the embedding's where they are tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens):
        """tokens (B, T) int64 -> logits (B, T, V). InputError if T exceeds the context."""
        return F.linear(self.hidden(tokens), self.head)

    def hidden(self, tokens, lengths=None):
        """Hidden states after the final norm: tokens (B, T) int64 -> (B, T, D).

        With lengths (B,), rows padded on the right -> (sum of lengths, D): the valid positions, row after row.
        InputError if T exceeds the context.
        """
        (B, T), context = tokens.shape, self.config.max_position_embeddings
        if T > context:
            raise InputError(f"{self.source}: a row of {T} tokens exceeds the context of {context}; shorten it")
        rows = Rows(B, T, lengths, tokens.device)
        x = self.trunk(rows.pack(tokens), rows)  # (N, D)
        return x.unflatten(0, (B, T)) if lengths is None else x

    def trunk(self, tokens, rows, caches=None):
        """tokens (N,) -> (N, D)"""
        x, rotary = self.embed_tokens(tokens), None
        if self.config.gpt2:
            x = x + self.embed_positions(rows.position)
        else:
            angle = rows.position[:, None, None] * self.config.inv_freq.to(x.device)  # (N, 1, E/2) float32
            cos, sin = angle.cos(), angle.sin()
            rotary = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)  # (N, 1, E) each
        for i, layer in enumerate(self.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rows, rotary, use_reentrant=False)
            else:
                x = layer(x, rows, rotary, caches[i] if caches else None)
        return self.norm(x)


@torch.inference_mode()
def generate(decoder, prompts, max_new_tokens, eos_id):
    """Greedy continuations of prompts, lists of ids of any lengths -> lists of the new ids alone, in the same order.

    A row ends at eos_id, an id or a collection of ids, which is not part of the result; after max_new_tokens; or
    where the context is full. What has ended leaves the batch. InputError for a prompt that is empty or too long.
    """
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
    answers, config, device = [[] for _ in prompts], decoder.config, decoder.head.device
    sizes, context = [len(p) for p in prompts], config.max_position_embeddings
    if not prompts or max_new_tokens < 1:
        return answers
    if min(sizes) < 1 or max(sizes) >= context:
        bad = max(sizes) if min(sizes) else 0
        raise InputError(f"{decoder.source}: a prompt of {bad} tokens; for an answer it must have 1 to {context - 1} tokens")
    lengths, T = torch.tensor(sizes, device=device), max(sizes)
    tokens = torch.tensor([list(p) + [0] * (T - len(p)) for p in prompts], device=device)  # (B, T)
    # Keys and values lie at their token's position, so rows of any lengths share a cache, and none is padded left.
    shape = (len(prompts), min(context, T + max_new_tokens), 2, config.num_key_value_heads, config.head_dim)
    caches = [torch.zeros(shape, dtype=decoder.head.dtype, device=device) for _ in decoder.layers]
    rows = Rows(*tokens.shape, lengths, device)
    x = decoder.trunk(rows.pack(tokens), rows, caches)[lengths.cumsum(0) - 1]  # (N, D) -> (B, D), each row's last
    alive = list(range(len(prompts)))
    while True:
        tokens, keep = F.linear(x, decoder.head).argmax(-1), []  # (B,)
        for i, token in enumerate(tokens.tolist()):
            row = alive[i]
            if token not in ends:
                answers[row].append(token)
                if len(answers[row]) < max_new_tokens and sizes[row] + len(answers[row]) < context:
                    keep.append(i)
        if not keep:
            return answers
        if len(keep) < len(alive):
            alive, kept = [alive[i] for i in keep], torch.tensor(keep, device=device)
            tokens, lengths, caches = tokens[kept], lengths[kept], [c[kept] for c in caches]
        used = max(sizes[row] + len(answers[row]) for row in alive)
        rows = Rows(len(alive), 1, None, device)
        rows.position, lengths = lengths, lengths + 1
        x = decoder.trunk(tokens, rows, [c[:, :used] for c in caches])


# ------------------------------------------------------------------------------------------------------------
# Model directories

# Ours -> GPT-2's. Its c_attn is q, k and v side by side; the matrices c_attn, c_fc and c_proj are (in, out).
GPT2_NAMES = {
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "layers": "h",
    "input_layernorm": "ln_1",
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
    "norm": "ln_f",
}
CONSTANTS = re.compile(r"(.*\.)?(attn\.(masked_)?bias|rotary_emb\.inv_freq)")  # masks and frequencies in old files
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # safetensors' names
COMPANIONS = """generation_config.json tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json
    added_tokens.json vocab.json merges.txt chat_template.jinja chat_template.json""".split()


def resolve(name_or_path):
    """The folder of a model: a folder as it is, without network, or else org/name from the Hugging Face hub.

    The hub is asked for config, tokenizer and safetensors only. InputError if neither has it.
    """
    name = str(name_or_path)
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise InputError(f"{name}: is a file; give the folder that holds config.json and model.safetensors")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) or os.path.isdir(name.split("/")[0]):
        raise InputError(f"{name}: no such folder; give a model folder, or a hub name of the form org/name")
    import huggingface_hub

    wanted = ["config.json", *COMPANIONS, "model*.safetensors", "model.safetensors.index.json"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as e:  # whatever went wrong, what the user needs is another way to get the model
        raise InputError(
            f"{name}: no such folder, and the hub did not give it ({type(e).__name__}: {_one_line(e)}); check name, "
            f"network and licence (hf auth login), or fetch it elsewhere: hf download {name} --local-dir DIR"
        ) from None


def load(name_or_path, device="cpu", dtype=torch.float32):
    """A Decoder with the weights of a model directory or hub name, in dtype on device. No tokenizer is needed.

    The files' headers are compared with config.json before any weight is read. A tied model may store lm_head.weight
    too if it equals the embedding. InputError, naming the file, for what is missing, broken or not supported.
    """
    decoder, table, found = _checked(name_or_path)
    _allocate(decoder, device, dtype)
    ours = dict(decoder.named_parameters())
    with torch.no_grad():
        for stored, names in table.items():
            tensor = _transpose(decoder, stored, _read(found[stored]))
            for name, part in zip(names, tensor.chunk(len(names)), strict=True):
                ours[name].copy_(part)
                decoder.stored_dtypes[name] = part.dtype
        if decoder.config.tie_word_embeddings and "lm_head.weight" in found:
            if not torch.equal(_read(found["lm_head.weight"]).to(decoder.head), decoder.head):
                file = found["lm_head.weight"][1]
                what = "lm_head.weight is not the embedding; set tie_word_embeddings to false in config.json"
                raise InputError(f"{file}: {what}")
    return decoder


def fresh(name_or_path, seed, device="cpu", dtype=torch.float32):
    """A Decoder with the configuration of a model directory or hub name and new weights; the folder needs none.

    Normal with standard deviation initializer_range, divided by √(2 L) in the two matrices of a layer that write to
    the residual stream; norms 1, biases 0. Drawn on the CPU in float32: a seed means the same on any device.
    """
    decoder = _allocate(_empty(name_or_path), device, dtype)
    generator, config = torch.Generator().manual_seed(seed), decoder.config
    stored = str(config.raw.get("dtype") or config.raw.get("torch_dtype"))
    stored = getattr(torch, stored) if stored in ("float16", "bfloat16") else torch.float32
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            decoder.stored_dtypes[name] = stored
            if p.ndim == 1:
                p.fill_(0 if name.endswith("bias") else 1)
            else:
                depth = 2 * config.num_hidden_layers if re.search("(o_proj|down_proj)", name) else 1
                std = config.initializer_range / depth**0.5
                p.copy_(torch.empty(p.shape).normal_(0, std, generator=generator))
    return decoder


def save(decoder, path):
    """Write a model directory that transformers loads as it is. path may be the source itself.

    config.json, tokenizer and generation files are the source's, and so is the precision of the weights. Each file
    is written aside and renamed, model.safetensors last: in a new folder its presence means that all is there.
    Then shards that an older model left in the folder are removed. Equal weights give equal bytes. FloatingPointError,
    before anything is written, if a weight is not finite in that precision.
    """
    path, ours, tensors = Path(path), dict(decoder.named_parameters()), {}
    prefix = "transformer." if decoder.config.gpt2 else "model."
    for stored, names in _stored_names(decoder).items():
        tensor = torch.cat([ours[name].detach() for name in names]).to("cpu", decoder.stored_dtypes[names[0]])
        full = stored if stored == "lm_head.weight" else prefix + stored
        tensors[full] = _transpose(decoder, stored, tensor).contiguous()
        if not tensor.isfinite().all():
            raise FloatingPointError(f"{stored} is not finite in {str(tensor.dtype)[6:]}")
    path.mkdir(parents=True, exist_ok=True)
    write_aside(path / "config.json", lambda aside: aside.write_bytes(decoder.config.text))
    for companion in (decoder.source / name for name in COMPANIONS):
        if companion.is_file() and path.resolve() != decoder.source.resolve():
            write_aside(path / companion.name, partial(shutil.copyfile, companion))
    write_aside(path / "model.safetensors", lambda aside: save_file(tensors, aside, metadata={"format": "pt"}))

    for stale in [*path.glob("model.safetensors.index.json"), *path.glob("model-*-of-*.safetensors")]:
        stale.unlink()


def write_aside(path, write):
    """Let write(other path) make a file, flush it to disk and rename it: at any moment path is the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        aside.chmod(0o644)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def check(name_or_path):
    """The folder of a model that load will read: its config.json and the headers of its weights, but no weight, are read.
    InputError as in load."""
    return _checked(name_or_path)[0].source


def _checked(name_or_path):
    decoder = _empty(name_or_path)
    table, found = _stored_names(decoder), _read_headers(decoder.source)
    _compare(decoder, table, found)
    return decoder, table, found


def _allocate(decoder, device, dtype):
    try:
        return decoder.to(dtype).to_empty(device=device)
    except (RuntimeError, MemoryError) as e:  # the allocator's
        raise InputError(f"{decoder.source}: does not fit into the memory of {device} ({_one_line(e)[:80]})") from None


def _empty(name_or_path):
    folder = resolve(name_or_path)
    config = read_config(folder)
    with torch.device("meta"):  # shapes and no memory
        return Decoder(config, folder)


def _stored_names(decoder):
    """{name in the file, without its prefix: our parameters that lie in it one after the other}"""
    table = {}
    for name, _ in decoder.named_parameters():
        stored = name
        for ours, theirs in GPT2_NAMES.items() if decoder.config.gpt2 else ():
            stored = re.sub(rf"(^|\.){ours}\.", rf"\1{theirs}.", stored)
        table.setdefault(stored, []).append(name)
    return table


def _transpose(decoder, stored, tensor):
    """Between GPT-2's (in, out) and ours (out, in); all else as it is."""
    return tensor.T if decoder.config.gpt2 and re.search(r"\.c_\w+\.weight$", stored) else tensor


def _weight_files(folder):
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = [f for end in ("bin", "pt", "pth") for f in folder.glob(f"*.{end}")]
        hint = "download the model again"
        if pickles:
            hint = f"{pickles[0].name} is a pickle, which can run code and is never read; convert it where you trust "
            hint += "it: transformers' from_pretrained, then save_pretrained to a new folder"
        raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json; {hint}")
    try:
        shards = sorted(set(json.loads(index.read_bytes().decode("utf-8"))["weight_map"].values()))
        unsafe = [s for s in shards if not re.fullmatch(r"\w[\w.-]*\.safetensors", s)]
    except (ValueError, RecursionError, OSError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: needs a weight_map of tensor names to file names; download it again") from None
    if unsafe:
        raise InputError(f"{index}: {unsafe[0]!r:.80} is not the plain name of a safetensors file beside it")
    missing = [s for s in shards if not (folder / s).is_file()]
    if missing:
        raise InputError(f"{folder}: shards missing: {_few(missing)}; download the model again")
    return [folder / s for s in shards]


def _read_headers(folder):
    """{stored name without prefix: (full name, file, dtype, shape)}, no weight read"""
    found = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118
                    part, stored = f.get_slice(name), re.sub(r"^(model|transformer)\.", "", name)
                    if CONSTANTS.fullmatch(name):
                        continue
                    if stored in found:
                        raise InputError(f"{file}: {name} is stored twice; remove one of the two")
                    found[stored] = name, file, part.get_dtype(), tuple(part.get_shape())
        except (SafetensorError, OSError) as e:
            raise InputError(f"{file}: not a whole safetensors file ({_one_line(e)}); download it again") from None
    return found


def _read(entry):
    name, file, _, _ = entry
    with safe_open(file, framework="pt") as f:
        return f.get_tensor(name)


def _compare(decoder, table, found):
    """Headers against the parameters that config.json asks for; InputError lists by name what does not fit."""
    ours, wrong = dict(decoder.named_parameters()), []
    tied = {"lm_head.weight"} if decoder.config.tie_word_embeddings else set()
    for stored, (_, file, dtype, shape) in found.items():
        if dtype not in DTYPES:
            raise InputError(f"{file}: {stored} is {dtype}, not {', '.join(DTYPES)}; use an unquantised model")
        if stored in table:
            expected = _transpose(decoder, stored, torch.cat([ours[name] for name in table[stored]])).shape
            if shape != expected:
                wrong.append(f"{stored} is {list(shape)} instead of {list(expected)}")
    missing = [stored for stored in table if stored not in found]
    unexpected = [stored for stored in found if stored not in table and stored not in tied]
    lists = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    if any(lists.values()):
        lists = "; ".join(f"{what}: {_few(names)}" for what, names in lists.items() if names)
        raise InputError(f"{decoder.source}: the weights do not fit config.json; {lists}")


def _few(names):
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _one_line(e):
    return " ".join(str(e).split())[:160]
