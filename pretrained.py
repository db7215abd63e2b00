"""Hugging Face model directories: what config.json means in each family, load, fresh and save.

What FAMILIES does not know and the network cannot do is refused by name before a weight is read.
Only safetensors is read, never a pickle. Dropout settings are kept and never applied.
"""
import math
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from cli import InputError, read_bytes, read_json, write_aside
from model import Config, Decoder, RMSNorm

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPANIONS = """generation_config.json tokenizer.json tokenizer_config.json tokenizer.model
    special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template.jinja
    chat_template.json""".split()
DTYPES = "F64", "F32", "F16", "BF16"  # safetensors' names
CONSTANTS = r"(.*\.)?(attn\.(masked_)?bias|rotary_emb\.inv_freq)"  # stored in old files, not needed
GELU_TANH = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "relu": F.relu, "gelu": F.gelu,
               "gelu_new": GELU_TANH, "gelu_pytorch_tanh": GELU_TANH}
REFUSED = {"quantization_config": "quantised weights", "add_cross_attention": "cross-attention",
           "num_experts": "mixture of experts", "num_local_experts": "mixture of experts"}
# What transformers takes by Llama's name in every family, and then before the family's own.
TWO_NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
NULLS = "num_key_value_heads", "head_dim", "sliding_window"  # as many as heads, D / H, none

# ---- Families

NETWORK = {"norm": RMSNorm, "gated_mlp": True, "qk_norm": False,
           "qkv_bias": False, "o_bias": False, "mlp_bias": False}
ASSUMED = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
           "sliding_window": 4096, "initializer_range": 0.02}


class Family(NamedTuple):
    """What a model_type means. All words are Llama's but the right sides of keys and names."""
    assumed: dict  # what transformers assumes where config.json is silent, beyond ASSUMED
    network: dict = {}  # fields of Config, beyond NETWORK; a string is the key that says
    rotary: bool = True  # else positions are learned
    window: str = "unused"  # sliding_window: unused, in use if "set", or if "asked" for as well
    keys: dict = {}  # keys of config.json, None for what it lacks; TWO_NAMES go by Llama's, too
    names: dict = {}  # modules in the file
    prefix: str = "model."  # of the names in the file
    transposed: str = "none"  # pattern of the matrices that are stored as (in, out)


FAMILIES = {
    "llama": Family(  # 2 to 3.2, SmolLM2, TinyLlama
        dict(max_position_embeddings=2048),
        dict(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias")),
    "mistral": Family(
        dict(max_position_embeddings=131072, num_key_value_heads=8), window="set"),
    "qwen2": Family(  # and Qwen2.5
        dict(max_position_embeddings=32768, num_key_value_heads=32),
        dict(qkv_bias=True), window="asked"),
    "qwen3": Family(
        dict(max_position_embeddings=32768, num_key_value_heads=32, head_dim=128),
        dict(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm=True), window="asked"),
    "gpt2": Family(
        dict(max_position_embeddings=1024, hidden_act="gelu_new", rms_norm_eps=1e-5,
             tie_word_embeddings=True),
        dict(norm=nn.LayerNorm, gated_mlp=False, qkv_bias=True, o_bias=True, mlp_bias=True),
        rotary=False,
        keys=dict(hidden_size="n_embd", intermediate_size="n_inner", num_hidden_layers="n_layer",
                  num_attention_heads="n_head", num_key_value_heads=None, head_dim=None,
                  max_position_embeddings="n_positions", hidden_act="activation_function",
                  rms_norm_eps="layer_norm_epsilon"),
        names={"embed_tokens": "wte", "embed_positions": "wpe", "layers": "h", "norm": "ln_f",
               "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
               "self_attn.q_proj": "attn.c_attn", "self_attn.k_proj": "attn.c_attn",
               "self_attn.v_proj": "attn.c_attn",  # the three side by side
               "self_attn.o_proj": "attn.c_proj",
               "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
        prefix="transformer.", transposed=r"h\.\d+\.(attn|mlp)\.c_\w+\.weight"),
}


class Files(NamedTuple):
    """What is known of the files that a decoder came from: decoder.files."""
    folder: Path
    text: bytes  # config.json as it is
    keys: "Keys"  # and as it was understood
    family: Family
    dtypes: dict  # parameter: its precision in the files, kept by save


# ---- config.json


class Keys:
    """Typed look-ups in a JSON object; a refusal names the file, and the key as it stands there."""

    def __init__(self, where, values, names=()):
        self.where, self.values, self.names = where, values, dict(names)

    def refuse(self, what):
        raise InputError(f"{self.where}: {what}")

    def get(self, key, default, fits, kind):
        value = default if self.values.get(key) is None else self.values[key]
        if not fits(value):
            found = "absent" if value is None else repr(value)[:40]
            self.refuse(f"{self.names.get(key, key)} must be {kind}, not {found}")
        return value

    def size(self, key, default=None, high=2**24, low=1):
        return self.get(key, default, lambda v: type(v) is int and low <= v <= high,
                        f"a whole number from {low} to {high}")

    def number(self, key, default=None):
        return float(self.get(key, default, lambda v: type(v) in (int, float) and 0 < v < 1e30,
                              "a number above 0"))

    def flag(self, key, default=False):
        return self.get(key, default, lambda v: type(v) is bool, "true or false")

    def choice(self, key, choices):
        return self.get(key, None, lambda v: isinstance(v, str) and v in choices,
                        "one of " + ", ".join(choices))


def read_config(folder):
    """(Config, Files) of a folder, by config.json or, where that is silent, by the family.

    InputError if the file is absent or broken or asks for what is not supported.
    """
    where = Path(folder) / "config.json"
    text = read_bytes(where, "a model folder holds config.json and model.safetensors")
    raw = read_json(where)
    for key, what in REFUSED.items():
        if raw.get(key):
            raise InputError(f"{where}: {key}: {what} is not supported: use another model")
    if raw.get("is_causal") is False:
        raise InputError(f"{where}: is_causal false: a model that looks ahead has no next token: "
                         "use another model")
    family = FAMILIES[Keys(where, raw).choice("model_type", FAMILIES)]

    # A null is as good as an absent key, but for NULLS, where it has a meaning of its own.
    names = {ours: theirs for ours, theirs in family.keys.items()
             if ours not in TWO_NAMES or raw.get(ours) is None}
    renamed = raw | {ours: raw.get(theirs) for ours, theirs in names.items()}
    given = {k: v for k, v in renamed.items() if v is not None or k in NULLS}
    keys = Keys(where, ASSUMED | family.assumed | given, names)
    return _config(keys, family), Files(Path(folder), text, keys, family, {})


def _config(keys, family):
    layers = keys.size("num_hidden_layers", high=1024)
    dim, heads = keys.size("hidden_size"), keys.size("num_attention_heads", high=2**16)
    kv_heads, head_dim = keys.size("num_key_value_heads", heads, 2**16), keys.values.get("head_dim")
    if heads % kv_heads or (head_dim is None and dim % heads):
        keys.refuse(f"sizes do not divide: hidden {dim}, attention heads {heads}, "
                    f"num_key_value_heads {kv_heads}")
    head_dim = keys.size("head_dim", max(1, dim // heads), 2**16)
    context = keys.size("max_position_embeddings")
    _refuse_windows(keys, family.window, layers, context)
    network = {field: keys.flag(value) if isinstance(value, str) else value
               for field, value in (NETWORK | family.network).items()}
    # Only files of models without rotary positions have these two words on q · k.
    scaled = family.rotary or keys.flag("scale_attn_weights", True)
    by_layer = not family.rotary and keys.flag("scale_attn_by_inverse_layer_idx")
    scale = head_dim**-0.5 if scaled else 1.0
    return Config(
        vocab_size=keys.size("vocab_size"),
        hidden_size=dim,
        intermediate_size=keys.size("intermediate_size", None if network["gated_mlp"] else 4 * dim),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        tie_word_embeddings=keys.flag("tie_word_embeddings"),
        activation=ACTIVATIONS[keys.choice("hidden_act", ACTIVATIONS)],
        norm_eps=keys.number("rms_norm_eps"),
        attention_scales=[scale / (i + 1 if by_layer else 1) for i in range(layers)],
        inv_freq=_rotary_frequencies(keys, head_dim, context) if family.rotary else None,
        **network)


def _refuse_windows(keys, when, layers, context):
    """A window narrower than the context would hide tokens that our attention sees."""
    types, window = keys.values.get("layer_types"), keys.values.get("sliding_window")
    if types is None:
        asked = when == "asked" and keys.flag("use_sliding_window")
        used = when == "set" or (asked and layers > keys.size("max_window_layers", 28, low=0))
    else:
        if (not isinstance(types, list) or len(types) != layers
                or any(t not in ("full_attention", "sliding_attention") for t in types)):
            keys.refuse("layer_types must be full_attention or sliding_attention for each layer")
        used = "sliding_attention" in types
    if used and window is not None and not (type(window) is int and window >= context):
        keys.refuse(f"sliding_window {str(window)[:40]} is in use and not supported, "
                    f"as the context is {context}")


def _rotary_frequencies(keys, head_dim, context):
    """(E/2,) radians a position. Old files say rope_theta, rope_scaling, new rope_parameters."""
    outer = keys.values
    rope = outer.get("rope_scaling") or outer.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
        keys.refuse("rope_scaling and rope_parameters must be objects of numbers")
    rope = {k: outer[k] for k in ("rope_theta", "partial_rotary_factor") if k in outer} | rope
    rope = {"rope_type": rope.get("type", "default")} | rope
    if old_context := outer.get("original_max_position_embeddings"):  # goes before the inner one
        rope["original_max_position_embeddings"] = old_context
    keys = Keys(f"{keys.where}: rotary settings", rope)
    kind = keys.choice("rope_type", ["default", "linear", "llama3"])
    if head_dim % 2 or keys.number("partial_rotary_factor", 1) != 1:
        keys.refuse("an odd head_dim or a partial_rotary_factor other than 1 is not supported")
    theta = keys.number("rope_theta", 10000.0)
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if kind == "linear":
        inv_freq = inv_freq / keys.number("factor")
    if kind == "llama3":
        # What turns often in the old context stays, what turns rarely is slowed, the rest is mixed.
        factor, low, high = map(keys.number, ("factor", "low_freq_factor", "high_freq_factor"))
        if low >= high:
            keys.refuse(f"low_freq_factor {low} must be below high_freq_factor {high}")
        old_context = keys.number("original_max_position_embeddings", context)
        turns = old_context * inv_freq / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / factor
    if not inv_freq.isfinite().all():
        keys.refuse("the numbers are out of range: copy the model's own config.json again")
    return inv_freq


# ---- Model directories


def resolve(name_or_path):
    """The folder of a model: a folder as it is, without network, or else org/name from the hub.

    The hub is asked for config, tokenizer and safetensors only. InputError if neither has it.
    """
    name = str(name_or_path)
    if os.path.isdir(name):
        return Path(name)
    hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII)
    if not hub_name or os.path.lexists(name) or os.path.isdir(name.split("/")[0]):
        raise InputError(f"{one_line(name) or repr(name)}: no such folder: give one that holds "
                         "config.json and model.safetensors, or a hub name of the form org/name")
    import huggingface_hub

    wanted = ["config.json", *COMPANIONS, "model*.safetensors", INDEX]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as e:  # whatever went wrong, what is needed is another way to get the model
        raise InputError(
            f"{name}: no such folder, and not from the hub ({type(e).__name__}: {one_line(e)}): "
            "check name, network and licence (hf auth login), or fetch it elsewhere: "
            f"hf download {name} --local-dir DIR") from None


def check(name_or_path):
    """The folder of a model that load will read, by config.json and the headers of its weights."""
    folder = resolve(name_or_path)
    _stored_tensors(_empty(folder))
    return folder


def check_memory(name_or_path, device="cpu", bytes_each=4):
    """The number of parameters, by config.json alone. InputError if they cannot fit into memory.

    bytes_each: of a parameter and what is kept with it; 16 to train all in float32 with Adam.
    """
    config, files = read_config(resolve(name_or_path))
    with torch.device("meta"):  # shapes and no memory; one layer, as all are alike
        one = Decoder(config._replace(attention_scales=[1.0]))
    rest, layers = list(one.layers.parameters()), len(config.attention_scales)
    count = sum(p.numel() for p in [*one.parameters(), *rest * (layers - 1)])
    needed, free = count * bytes_each / 1e9, _free_memory(torch.device(device)) / 1e9
    if needed > free:
        raise InputError(
            f"{files.folder}: {count:,} parameters in {layers} layers need {needed:,.1f} GB of "
            f"memory on {device}, where {free:,.1f} GB are free: use a smaller model")
    return count


def _free_memory(device):
    """Bytes to be had on a GPU or, by Linux's word, a CPU; elsewhere all that the machine has."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    if not os.path.exists("/proc/meminfo"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = Path("/proc/meminfo").read_text()
    return 1024 * sum(map(int, re.findall(r"(?:MemAvailable|SwapFree): *(\d+)", text)))


def _empty(folder):
    """A Decoder of the configuration in a folder, without memory."""
    config, files = read_config(folder)
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.files = files
    return decoder


def load(name_or_path, device="cpu", dtype=torch.float32):
    """A Decoder with the weights of a model directory or hub name, in dtype on device.

    It needs no tokenizer; a tied model may store its embedding twice. InputError, naming the file,
    for what is missing, broken, not finite, not supported or too large for the memory.
    """
    folder = resolve(name_or_path)
    check_memory(folder, device, dtype.itemsize)
    decoder = _empty(folder)
    tensors, table = _stored_tensors(decoder), _stored_names(decoder)
    decoder.to(dtype).to_empty(device=device)
    ours, files = dict(decoder.named_parameters()), decoder.files
    with torch.no_grad():
        for stored, names in table.items():
            tensor = _turned(files.family, stored, _read(*tensors.pop(stored)))
            for name, part in zip(names, tensor.chunk(len(names)), strict=True):
                ours[name].copy_(part)
                files.dtypes[name] = part.dtype
    for file, *where in tensors.values():  # the head of a tied model
        if not torch.equal(_read(file, *where).to(decoder.head), decoder.head):
            raise InputError(f"{file}: lm_head.weight is not the embedding: set "
                             "tie_word_embeddings to false in config.json")
    return decoder


def fresh(name_or_path, seed, device="cpu", dtype=torch.float32):
    """A Decoder with the configuration of a model directory, which needs no weights, and new ones.

    Normal with standard deviation initializer_range, divided by √(2 L) in the two matrices of a
    layer that write to the residual stream; norms 1, biases 0. A seed means the same on any device.
    """
    folder = resolve(name_or_path)
    check_memory(folder, device, dtype.itemsize)
    decoder = _empty(folder).to(dtype).to_empty(device=device)
    keys, generator = decoder.files.keys, torch.Generator().manual_seed(seed)
    std = keys.number("initializer_range")
    stored = str(keys.values.get("dtype") or keys.values.get("torch_dtype"))
    stored = getattr(torch, stored) if stored in ("float16", "bfloat16") else torch.float32
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            decoder.files.dtypes[name] = stored
            if p.ndim == 1:
                p.fill_(0 if name.endswith("bias") else 1)
            else:
                depth = 2 * len(decoder.layers) if re.search("(o_proj|down_proj)", name) else 1
                p.copy_(torch.empty(p.shape).normal_(0, std / depth**0.5, generator=generator))
    return decoder


def save(decoder, path):
    """Write a model directory that transformers loads as it is. path may be the source itself.

    All but the values is the source's: config, companions, precision. Each file is written aside
    and renamed, weights last; then an older model's shards are removed. FloatingPointError, before
    anything is written, for a value that its precision cannot hold; OSError as for any file.
    """
    path, files, tensors = Path(path), decoder.files, {}
    ours, weights = dict(decoder.named_parameters()), path / SINGLE
    for stored, names in _stored_names(decoder).items():
        tensor = torch.cat([ours[name].detach() for name in names])
        tensor = tensor.to("cpu", files.dtypes[names[0]])
        if not _finite(tensor):
            raise FloatingPointError(f"{stored} is not finite in {str(tensor.dtype)[6:]}")
        full = stored if stored == "lm_head.weight" else files.family.prefix + stored
        tensors[full] = _turned(files.family, stored, tensor).contiguous()

    path.mkdir(parents=True, exist_ok=True)
    write_aside(path / "config.json", lambda aside: aside.write_bytes(files.text))
    for companion in (files.folder / name for name in COMPANIONS):
        if companion.is_file() and path.resolve() != files.folder.resolve():
            write_aside(path / companion.name, partial(shutil.copyfile, companion))
    try:
        write_aside(weights, lambda aside: save_file(tensors, aside, metadata={"format": "pt"}))
    except SafetensorError as e:  # its word for a full disk, too
        raise OSError(f"{weights}: cannot be written ({one_line(e)})") from None
    for stale in (*path.glob(INDEX), *path.glob("model-*-of-*.safetensors")):
        stale.unlink()


# ---- Weight files


def _stored_names(decoder):
    """{name in the file, without its prefix: our parameters that lie in it one after the other}"""
    table = {}
    for name, _ in decoder.named_parameters():
        stored = name
        for ours, theirs in decoder.files.family.names.items():
            stored = re.sub(rf"(^|\.){ours}\.", rf"\1{theirs}.", stored)
        table.setdefault(stored, []).append(name)
    return table


def _turned(family, stored, tensor):
    """Between a file's (in, out) and our (out, in), where the family has it so."""
    return tensor.T if re.fullmatch(family.transposed, stored) else tensor


def weight_files(folder):
    """The files with the weights of a model directory: one, or the shards that its index names.

    InputError unless each is a regular file that can be read: a pipe would hang whoever opens it.
    """
    folder, hint = Path(folder), "download the model again"
    files, index = [folder / SINGLE], folder / INDEX
    pickles = [file for end in ("bin", "pt", "pth") for file in folder.glob(f"*.{end}")]
    if os.path.lexists(index) and not os.path.lexists(files[0]):
        shards = read_json(index, hint).get("weight_map")
        shards = list(shards.values()) if isinstance(shards, dict) else [shards]
        for shard in shards:
            if not re.fullmatch(r"\w[\w.-]*\.safetensors", str(shard)):
                raise InputError(f"{index}: weight_map must give for each tensor the plain name of "
                                 f"a safetensors file here, not {str(shard)[:80]!r}: {hint}")
        files = [folder / shard for shard in sorted(set(shards))]
    elif pickles:
        hint = (f"{pickles[0].name} is a pickle, which can run code and is never read: where you "
                "trust it, load it in transformers and save_pretrained it to a new folder")
    for file in files:
        if not (os.path.isfile(file) and os.access(file, os.R_OK)):
            raise InputError(f"{file}: not a regular file that can be read: {hint}")
    return files


def _stored_tensors(decoder):
    """{name without prefix: (file, handle, name)}, by headers alone. InputError: what misfits."""
    found, have, folder = {}, {}, decoder.files.folder
    for file in weight_files(folder):
        try:
            handle = safe_open(file, framework="pt")
            parts = {name: handle.get_slice(name) for name in handle.keys()}
            headers = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
        except (SafetensorError, OSError) as e:
            raise InputError(f"{file}: not a whole safetensors file ({one_line(e)}): "
                             "download it again") from None
        for name, (dtype, shape) in headers.items():
            stored = re.sub(r"^(model|transformer)\.", "", name)
            if re.fullmatch(CONSTANTS, name):
                continue
            if dtype not in DTYPES:
                raise InputError(f"{file}: {stored} is {dtype}, not {', '.join(DTYPES)}: "
                                 "use an unquantised model")
            if stored in found:
                raise InputError(f"{file}: {name} is stored twice: remove one of the two")
            found[stored], have[stored] = (file, handle, name), list(shape)

    tied, embedding = decoder.lm_head is None, next(iter(_stored_names(decoder)))
    if tied and embedding not in found and "lm_head.weight" in found:  # it goes by either name
        found[embedding], have[embedding] = found.pop("lm_head.weight"), have.pop("lm_head.weight")
    ours, want = dict(decoder.named_parameters()), {}
    for stored, names in _stored_names(decoder).items():
        whole = torch.cat([ours[name] for name in names])
        want[stored] = list(_turned(decoder.files.family, stored, whole).shape)
    spare = {"lm_head.weight"} if tied else set()
    lists = {"missing": want.keys() - have.keys(), "unexpected": have.keys() - want.keys() - spare,
             "of another shape": [f"{k} is {have[k]} instead of {shape}"
                                  for k, shape in want.items() if have.get(k, shape) != shape]}
    lists = [f"{what}: {', '.join(sorted(names)[:4])}{' and more' if len(names) > 4 else ''}"
             for what, names in lists.items() if names]
    if lists:
        raise InputError(f"{folder}: the weights do not fit config.json: {'; '.join(lists)}")
    return found


def _read(file, handle, name):
    tensor = handle.get_tensor(name)
    if not _finite(tensor):
        raise InputError(f"{file}: tensor {name} holds values that are not finite: "
                         "download the model again")
    return tensor


def _finite(tensor):
    """Whether all values are. NaN and inf reach the extremes, ten times as fast as isfinite."""
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def one_line(e):
    return " ".join(str(e).split())[:160]
