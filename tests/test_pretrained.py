"""pretrained.py: config.json as transformers reads it, files it reads back, refusals by name."""

import json
import math
import os
import re
import resource
import shutil
import socket
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_model import (
    CONFIGS,
    FIXTURES,
    LLAMA,
    LLAMA3,
    SIZES,
    edit_json,
    oracle_model,
    relative_error,
    some_tokens,
)

import pretrained
from cli import InputError

WEIGHTS, INDEX, NORM = "model.safetensors", "model.safetensors.index.json", "model.norm.weight"


@pytest.mark.parametrize("kind", sorted(pretrained.FAMILIES))
def test_keys_absent_from_config_json_mean_what_transformers_assumes(transformers, tmp_path, kind):
    raw = dict(SIZES, model_type=kind, num_attention_heads=32, hidden_size=64)
    if kind == "gpt2":
        raw = dict(model_type=kind, vocab_size=48, n_embd=32, n_layer=2, n_head=4)
    (tmp_path / "config.json").write_text(json.dumps(dict(raw, sliding_window=None)))
    theirs, (ours, files) = (
        transformers.AutoConfig.from_pretrained(tmp_path), pretrained.read_config(tmp_path))
    assert ours.num_key_value_heads == getattr(
        theirs, "num_key_value_heads", theirs.num_attention_heads
    )
    assert ours.norm_eps == (theirs.layer_norm_epsilon if kind == "gpt2" else theirs.rms_norm_eps)
    assert ours.head_dim == (
        getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    )
    assert files.keys.number("initializer_range") == theirs.initializer_range
    for name in ("max_position_embeddings", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    "raw",
    [
        dict(CONFIGS["llama"], original_max_position_embeddings=16),
        dict(CONFIGS["gpt2"], num_attention_heads=2, num_hidden_layers=1),
        dict(LLAMA, model_type="mistral", head_dim=8, sliding_window=8,
             layer_types=["full_attention"] * 2)],
    ids=["old context", "gpt2", "windows"],
)
def test_of_two_keys_for_one_thing_the_one_that_transformers_follows_counts(
    transformers, tmp_path, raw
):
    oracle, tokens = oracle_model(transformers, tmp_path, raw), some_tokens(2, 100)
    with torch.no_grad():
        assert relative_error(pretrained.load(tmp_path)(tokens), oracle(tokens).logits) < 1e-4


def test_a_new_family_of_the_llama_kind_is_one_entry(transformers, tmp_path, monkeypatch):
    entry = pretrained.Family(
        dict(max_position_embeddings=256), dict(qkv_bias="attention_bias", qk_norm=False)
    )
    monkeypatch.setitem(pretrained.FAMILIES, "seed_oss", entry)
    raw = dict(
        LLAMA, model_type="seed_oss", head_dim=12, attention_bias=True, attention_out_bias=False
    )
    oracle, tokens = oracle_model(transformers, tmp_path, raw), some_tokens(2, 100)
    with torch.no_grad():
        assert relative_error(pretrained.load(tmp_path)(tokens), oracle(tokens).logits) < 1e-4


# ---- model directories


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_save_keeps_precision_config_and_companions(folder, tmp_path, dtype):
    edit_json(folder / "config.json", something_unknown={"kept": [1]})
    kept = ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json"]
    for name in set(kept) - {"config.json"}:
        (folder / name).write_text(f"{name} é")
    weights = {k: v.to(dtype) for k, v in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
    new = tmp_path / "new" / "saved"
    pretrained.save(pretrained.load(folder), new)
    saved = load_file(new / WEIGHTS)
    assert saved.keys() == weights.keys()
    assert all(saved[k].dtype == dtype and torch.equal(saved[k], weights[k]) for k in weights)
    assert sorted(p.name for p in new.iterdir()) == sorted([*kept, WEIGHTS])
    assert all((new / name).read_bytes() == (folder / name).read_bytes() for name in kept)


def split(folder):
    """Turn a single file into two shards with an index."""
    weights = load_file(folder / WEIGHTS)
    names = {
        k: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, k in enumerate(sorted(weights))
    }
    for shard in set(names.values()):
        save_file({k: v for k, v in weights.items() if names[k] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / WEIGHTS).unlink()


def test_shards_give_the_same_model_and_saving_into_the_folder_replaces_them(folder):
    tokens, before = some_tokens(1, 20), (folder / WEIGHTS).read_bytes()
    want = pretrained.load(folder)(tokens)
    split(folder)
    decoder = pretrained.load(folder)
    assert torch.equal(decoder(tokens), want)
    pretrained.save(decoder, folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "expected.safetensors", WEIGHTS]
    assert (folder / WEIGHTS).read_bytes() == before


def test_what_old_files_store_and_nobody_needs_is_accepted(folder):
    want, weights = pretrained.load(folder)(some_tokens(1, 20)), load_file(folder / WEIGHTS)
    bare = {k.removeprefix("transformer.").removeprefix("model."): v for k, v in weights.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 256, 256, dtype=torch.uint8)
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    if "lm_head.weight" not in bare:  # a tied model may store the embedding twice
        bare["lm_head.weight"] = bare.get("wte.weight", bare.get("embed_tokens.weight")).clone()
    save_file(bare, folder / WEIGHTS)
    decoder = pretrained.load(folder)
    assert torch.equal(decoder(some_tokens(1, 20)), want)
    pretrained.save(decoder, folder)
    assert load_file(folder / WEIGHTS).keys() == weights.keys()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_tied_embedding_may_be_stored_as_the_head_alone(tmp_path, name):
    """So safetensors' save_model writes it: of two names for one tensor it keeps the first."""
    folder, tokens = shutil.copytree(FIXTURES / name, tmp_path / name), some_tokens(1, 20)
    want, weights = pretrained.load(folder)(tokens), load_file(folder / WEIGHTS)
    embedding = next(name for name in weights if re.search("embed_tokens|wte", name))
    save_file({"lm_head.weight" if k == embedding else k: v for k, v in weights.items()},
              folder / WEIGHTS)
    decoder = pretrained.load(folder)
    assert torch.equal(decoder(tokens), want)
    pretrained.save(decoder, folder)
    assert load_file(folder / WEIGHTS).keys() == weights.keys()


def test_fresh_weights_follow_the_seed_and_need_no_weights_in_the_folder(folder):
    (folder / WEIGHTS).unlink()
    edit_json(folder / "config.json", torch_dtype="bfloat16")
    one, same, other = (pretrained.fresh(folder, seed) for seed in (1, 1, 2))
    for (name, p), q, r in zip(
        one.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(p, q)
        if p.ndim == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all()
        else:
            want = (
                0.02 / 2 if "o_proj" in name or "down_proj" in name else 0.02
            )  # two layers: sqrt(4)
            assert abs(p.std().item() / want - 1) < 0.15 and not torch.equal(p, r)
    pretrained.save(one, folder)
    assert {t.dtype for t in load_file(folder / WEIGHTS).values()} == {torch.bfloat16}


# ---- refusals

REFUSED_SETTINGS = [  # what is changed in config.json, what the refusal must name
    (dict(model_type="bert"), "bert"),
    (dict(model_type=...), "model_type"),
    (dict(model_type=["llama"]), "model_type"),
    (dict(model_type="mixtral"), "mixtral"),
    (dict(model_type="qwen3_moe"), "qwen3_moe"),
    (dict(num_local_experts=8), "mixture of experts"),
    (dict(add_cross_attention=True), "add_cross_attention"),
    (dict(is_causal=False), "is_causal"),
    (dict(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    # positions
    *(
        (dict(rope_scaling=rope), named)
        for rope, named in [
            ({"rope_type": "yarn", "factor": 4.0}, "yarn"), ({"type": "dynamic"}, "dynamic"),
            (3, "rope_scaling"), ({"rope_type": ["linear"]}, "rope_type"),
            ({"rope_type": "linear"}, "factor"),
            (dict(LLAMA3, low_freq_factor=4.0), "low_freq_factor"),
            (dict(LLAMA3, factor=-1), "factor")]
    ),
    (
        dict(rope_scaling=None, rope_parameters={"full_attention": {"rope_theta": 1.0}}),
        "rope_parameters"),
    (dict(rope_theta="10000"), "rope_theta"),
    (dict(rope_theta=math.nan), "rope_theta"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (dict(head_dim=7), "head_dim"),
    # values of the wrong kind
    *((dict(hidden_size=value), "hidden_size") for value in (..., 0, -32, 32.0, True, 10**30)),
    *(
        (dict([item]), item[0])
        for item in dict(
            hidden_act=3, vocab_size="48", num_hidden_layers=10**9, rms_norm_eps="small",
            num_key_value_heads=3, tie_word_embeddings="yes").items()
    ),
    (dict(hidden_act="quick_gelu"), "quick_gelu"),
    (dict(num_attention_heads=5, head_dim=None), "attention heads"),
    # windows
    (dict(layer_types=["full_attention", "sliding_attention"], sliding_window=8), "sliding_window"),
    *(
        (dict(layer_types=types), "layer_types")
        for types in ("full", ["full_attention"], ["full_attention", "linear_attention"], [[], []])
    ),
    (dict(model_type="mistral", sliding_window=128), "sliding_window"),
    (dict(model_type="mistral", sliding_window=..., max_position_embeddings=8192), "4096"),
    (
        dict(model_type="qwen2", use_sliding_window=True, sliding_window=128, max_window_layers=1),
        "sliding_window"),
    # contradictions between config.json and weights
    (dict(num_hidden_layers=3), "missing: layers.2"),
    (dict(num_hidden_layers=1), "unexpected: layers.1"),
    (dict(hidden_size=64), "another shape"),
    (dict(vocab_size=50), "embed_tokens.weight"),
    (dict(model_type="qwen3"), "q_norm"),
    (dict(model_type="qwen2"), "q_proj.bias"),
    (dict(tie_word_embeddings=False), "missing: lm_head.weight"),
]


def content(text, name="config.json"):
    """A way to spoil a folder: a file holds this, or what a function makes of its bytes."""

    def spoil(folder):
        old = (folder / name).read_bytes() if (folder / name).exists() else b""
        if name == INDEX:
            (folder / WEIGHTS).unlink()
        new = text(old) if callable(text) else text
        (folder / name).write_bytes(new.encode() if isinstance(new, str) else new)

    return spoil


def tensors(**changes):
    """A way to spoil a folder: tensors are made of NORM's by functions, or left out (...)."""

    def spoil(folder):
        stored = load_file(folder / WEIGHTS)
        stored |= {
            name: make if make is ... else make(stored[NORM]) for name, make in changes.items()
        }
        save_file({k: v for k, v in stored.items() if v is not ...}, folder / WEIGHTS)

    return spoil


BROKEN_FOLDERS = [  # how the folder is spoilt, what the refusal must name
    (lambda folder: (folder / "config.json").unlink(), "No such file"),
    *((content(text), "JSON") for text in ("{", b"\xff\xfe{}", "[" * 100_000, "[1]")),
    (lambda folder: (folder / WEIGHTS).unlink(), "model.safetensors: not a regular file"),
    (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "pickle"),
    *(
        (content(text, WEIGHTS), "not a whole")
        for text in (lambda old: old[:-7], b"", b"\x80\x04garbage" * 99)
    ),
    (
        lambda folder: (split(folder), next(folder.glob("model-00002*")).unlink()),
        "model-00002-of-00002"),
    *(
        (content(json.dumps({"weight_map": {"a": file}}), INDEX), "plain name")
        for file in ("../m/model.safetensors", "/etc/passwd")
    ),
    *(
        (content(text, INDEX), "weight_map")
        for text in ('{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "{}")
    ),
    (tensors(**{NORM: ...}), "missing: norm.weight"),
    (tensors(score=torch.clone), "unexpected: score"),
    (tensors(**{NORM: torch.Tensor.char}), "norm.weight is I8"),
    (tensors(**{NORM[6:]: torch.clone}), "stored twice"),
    (tensors(**{"lm_head.weight": lambda norm: torch.ones(48, 32)}), "lm_head.weight"),
]


@pytest.mark.parametrize(
    "spoil, named",
    [
        *(
            (lambda folder, c=changes: edit_json(folder / "config.json", **c), named)
            for changes, named in REFUSED_SETTINGS
        ),
        *BROKEN_FOLDERS,
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_broken_or_not_supported_is_refused_by_name(tmp_path, spoil, named):
    folder = shutil.copytree(FIXTURES / "llama", tmp_path / "m")
    spoil(folder)
    with pytest.raises(InputError, match=named) as refusal:
        pretrained.load(folder)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        dict(model_type="mistral", sliding_window=None),
        dict(model_type="mistral", sliding_window=256),
        dict(model_type="qwen2", use_sliding_window=False, sliding_window=8),
        dict(model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2),
        dict(
            model_type="qwen2", use_sliding_window=True, sliding_window=256, max_window_layers=0),
        dict(
            model_type="qwen2", use_sliding_window=True, sliding_window=256,
            layer_types=["full_attention", "sliding_attention"])],
)
def test_windows_that_no_layer_uses_are_accepted(tmp_path, changes):
    shutil.copy(FIXTURES / "llama" / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    pretrained.read_config(tmp_path)


# ---- what a foreign folder can hold


def put(path, kind):
    """In the place of a file something that blocks, never ends, or is not there."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server, pytest.MonkeyPatch.context() as here:
            here.chdir(path.parent)  # the path of a socket must be short
            server.bind(path.name)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(
            {"device": "/dev/zero", "dangling link": "nowhere", "loop": path.name}[kind]
        )


@pytest.mark.parametrize(
    "name", ["config.json", WEIGHTS, INDEX, "model-00002-of-00002.safetensors"]
)
@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device", "dangling link", "loop"])
def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path, name, kind):
    folder = shutil.copytree(FIXTURES / "llama", tmp_path / "m")
    if name not in ("config.json", WEIGHTS):
        split(folder)
    put(folder / name, kind)
    for read in (pretrained.load, pretrained.check):
        with pytest.raises(InputError, match="regular file|cannot be read") as refusal:
            read(folder)
        assert str(folder / name) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_companion_that_is_no_regular_file_is_not_copied(folder, tmp_path):
    put(folder / "tokenizer.json", "pipe")
    put(folder / "merges.txt", "dangling link")
    pretrained.save(pretrained.load(folder), tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["config.json", WEIGHTS]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_value_that_is_not_finite_is_found_when_loading_though_no_token_meets_it(
    tmp_path, value, dtype
):
    folder = shutil.copytree(FIXTURES / "qwen3", tmp_path / "m")  # its embedding is not the head
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    weights["model.embed_tokens.weight"][47, 3] = value
    save_file(weights, folder / WEIGHTS)
    with pytest.raises(
        InputError, match="tensor model.embed_tokens.weight holds values that are not"
    ):
        pretrained.load(folder)


def test_what_cannot_fit_into_memory_is_refused_by_arithmetic_with_its_size(folder, monkeypatch):
    decoder = pretrained.load(folder)
    count = sum(p.numel() for p in decoder.parameters())
    assert pretrained.check_memory(folder) == count
    monkeypatch.setattr(pretrained, "_free_memory", lambda device: 16 * count)
    pretrained.check_memory(folder, bytes_each=16)
    with pytest.raises(InputError, match=f"{count:,} parameters in 2 layers need .* GB"):
        pretrained.check_memory(folder, bytes_each=17)
    monkeypatch.setattr(pretrained, "_free_memory", lambda device: 4 * count - 1)
    monkeypatch.setattr(torch.nn.Module, "to_empty", None)  # nothing is allocated
    for make in (pretrained.load, lambda path: pretrained.fresh(path, seed=0)):
        with pytest.raises(InputError, match="use a smaller model"):
            make(folder)


@pytest.mark.parametrize(
    "changes",
    [
        dict(hidden_size=2**24), dict(head_dim=2**16, num_attention_heads=2**16, hidden_size=2**24),
        dict(num_hidden_layers=1024, hidden_size=2**16), dict(vocab_size=2**24, hidden_size=2**20)],
)
def test_absurd_sizes_are_refused_before_anything_is_built(tmp_path, changes):
    shutil.copy(FIXTURES / "llama" / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    for read in (
        pretrained.check_memory, pretrained.load, lambda path: pretrained.fresh(path, seed=0)):
        with pytest.raises(InputError, match="GB of memory"):
            read(tmp_path)


def test_a_wrong_config_is_refused_before_a_weight_file_is_opened(tmp_path, monkeypatch):
    folder = shutil.copytree(FIXTURES / "llama", tmp_path / "m")
    edit_json(folder / "config.json", model_type="bert")
    monkeypatch.setattr(pretrained, "safe_open", None)
    for read in (pretrained.check, pretrained.load, pretrained.check_memory):
        with pytest.raises(InputError, match="bert"):
            read(folder)


def test_a_full_disk_is_an_oserror_that_names_the_file_and_leaves_the_old_one(folder):
    decoder, before = pretrained.load(folder), (folder / WEIGHTS).read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # config.json fits
    try:
        with pytest.raises(OSError, match=WEIGHTS):
            pretrained.save(decoder, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (folder / WEIGHTS).read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "expected.safetensors", WEIGHTS]


def test_weights_that_are_not_finite_are_never_written(folder, tmp_path):
    decoder = pretrained.load(folder)
    with torch.no_grad():
        decoder.embed_tokens.weight[0, 0] = 1e6  # more than float16 holds
    with pytest.raises(FloatingPointError, match="float16"):
        pretrained.save(decoder, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), st.lists
)
KEYS = st.sampled_from(
    [*json.loads((FIXTURES / "llama" / "config.json").read_text()), "weight_map"]
)
NUMBERS = st.sampled_from(
    [0, 1, 2, 8, 48, 2**24, 2**63, 10**400, -1, 1e-300, 1e-20, 0.5, 1e29, 1e300, math.nan, math.inf]
)
ROTARY = st.dictionaries(
    st.sampled_from([*LLAMA3, "type", "rope_theta", "partial_rotary_factor"]),
    NUMBERS | JSON | st.sampled_from(["linear", "llama3"]), max_size=6)
VALUES = st.dictionaries(
    st.sampled_from(
        [
            *LLAMA, *pretrained.ASSUMED, "head_dim", "rope_theta", "rope_scaling",
            "rope_parameters", "layer_types", "attention_bias", "mlp_bias", "dtype",
            "use_sliding_window", "max_window_layers"]
    ),
    NUMBERS
    | JSON
    | ROTARY
    | st.sampled_from([True, *pretrained.FAMILIES, *pretrained.ACTIVATIONS]),
    max_size=4,
)


@given(VALUES, st.sampled_from(sorted(FIXTURES.iterdir())))
@settings(max_examples=60)
def test_any_values_in_config_json_give_a_network_or_a_refusal(tmp_path_factory, values, fixture):
    folder = tmp_path_factory.mktemp("config")
    raw = json.loads((fixture / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | values))
    try:
        if pretrained.check_memory(folder) < 100_000:
            assert pretrained.fresh(folder, seed=0)(torch.zeros(1, 1, dtype=torch.int64)).shape[
                :2
            ] == (1, 1)
    except InputError as refusal:
        assert "\n" not in str(refusal) and str(folder) in str(refusal)


@given(st.sampled_from(["config.json", WEIGHTS, INDEX]), st.data())
@settings(max_examples=40)
def test_damaged_files_give_a_model_or_a_refusal_and_nothing_else(tmp_path_factory, name, data):
    folder = shutil.copytree(FIXTURES / "llama", tmp_path_factory.mktemp("damaged") / "m")

    def damage(old):
        at, junk = (
            data.draw(st.integers(0, min(2000, len(old)))),
            data.draw(st.binary(min_size=1, max_size=8)))
        other = json.dumps(data.draw(st.dictionaries(KEYS, JSON, max_size=8))).encode()
        after = data.draw(
            st.sampled_from([b"", junk + old[at:], junk + old[at + len(junk) :], None])
        )
        return other if after is None else old[:at] + after

    content(damage, name)(folder)
    try:
        pretrained.load(folder)
    except InputError as refusal:
        assert "\n" not in str(refusal)


def test_a_folder_never_touches_the_network_and_only_org_slash_name_does(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, **kwargs):
        asked.append((name, kwargs["allow_patterns"]))
        raise OSError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "file").touch()
    assert pretrained.resolve("weights") == Path("weights")
    for name in (
        "weights/missing", "nowhere", "a/b/c", "../a", "/no/where", "file", "", "a/b\0", "x" * 5000,
        "./a", " ", "\0", "a\nb", "org/name/"):
        with pytest.raises(InputError, match="folder") as refusal:
            pretrained.resolve(name)
        assert "\n" not in str(refusal.value)
    assert not asked
    with pytest.raises(InputError, match="hf download org/name") as refusal:
        pretrained.load("org/name")
    assert asked[0][0] == "org/name" and "\n" not in str(refusal.value)
    assert not any("bin" in pattern or pattern == "*" for pattern in asked[0][1])
