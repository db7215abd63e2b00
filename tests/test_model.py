"""model.py: the same numbers as transformers, files that transformers reads back, and refusals by name.

transformers is the oracle where it is installed. tests/fixtures holds three tiny random checkpoints with logits that
transformers computed, so that the check stays where it is not. `python tests/test_model.py` writes them anew.
"""
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `python tests/test_model.py`
import model  # noqa: E402
from model import InputError  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
WEIGHTS, INDEX, NORM = "model.safetensors", "model.safetensors.index.json", "model.norm.weight"
PLACES = slice(13, 224, 14)  # of the 224 positions, those whose logits are stored

SIZES = dict(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LLAMA = dict(model_type="llama", **SIZES, num_key_value_heads=2, max_position_embeddings=256)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
CONFIGS = {
    "llama": dict(LLAMA, head_dim=12, rms_norm_eps=1e-3, rope_theta=500.0, rope_scaling=LLAMA3,
                  tie_word_embeddings=True),
    "qwen3": dict(LLAMA, model_type="qwen3", head_dim=16, attention_bias=True, rms_norm_eps=1e-3,
                  rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "gpt2": dict(model_type="gpt2", vocab_size=48, n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=256,
                 layer_norm_epsilon=1e-3),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(params=sorted(CONFIGS))
def folder(request, tmp_path):
    """A copy of a stored checkpoint."""
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / request.param))


def oracle_model(transformers, folder, raw, seed=0, dtype=torch.float32):
    """A random transformers model of config.json `raw`, saved in folder in dtype beside that very config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(seed)
    m = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder)).float().eval()
    for name, p in m.named_parameters():  # far from the start: norms off 1, biases off 0, attention with contrast
        centre = 1.0 if p.ndim == 1 and not name.endswith("bias") else 0.0
        torch.nn.init.normal_(p, centre, 0.3 if p.ndim == 1 else 1.5 / math.sqrt(min(p.shape)))
    m.to(dtype).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def relative_error(ours, theirs):
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def some_tokens(*shape, vocabulary=48, seed=1):
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


# ---- the same numbers as transformers


@st.composite
def raw_configs(draw):
    """A random config.json of a random family, in the spelling of old or new files."""
    one_of, yes_or_no = (lambda *choices: draw(st.sampled_from(choices))), lambda: draw(st.booleans())
    kind, act = one_of("llama", "llama", "mistral", "qwen2", "qwen3", "gpt2"), one_of(*model.ACTIVATIONS)
    kv_heads, shared, head_dim, layers = one_of(1, 2, 3), one_of(1, 2, 3), one_of(4, 8, 10), one_of(1, 2)
    heads, inner = kv_heads * shared, draw(st.integers(3, 40))
    common = dict(model_type=kind, vocab_size=48, tie_word_embeddings=yes_or_no(), initializer_range=0.1)
    if kind == "gpt2":
        return dict(common, n_embd=heads * head_dim, n_head=heads, n_layer=layers, n_positions=256,
                    n_inner=one_of(None, inner), activation_function=act, scale_attn_weights=yes_or_no(),
                    scale_attn_by_inverse_layer_idx=yes_or_no())
    raw = dict(common, hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads,
               num_hidden_layers=layers, intermediate_size=inner, max_position_embeddings=256, hidden_act=act,
               rms_norm_eps=one_of(1e-6, 1e-2))
    if kind == "mistral":
        raw["sliding_window"] = one_of(None, 256)
    if kind != "qwen2" and yes_or_no():
        raw["head_dim"] = one_of(2, 6, 16)
    if kind in ("llama", "qwen3"):
        raw["attention_bias"] = yes_or_no()
    if kind == "llama":
        raw.update(mlp_bias=yes_or_no(), pretraining_tp=2)
    rope, theta = one_of({}, dict(rope_type="linear", factor=3.0), LLAMA3), one_of(100.0, 10000.0)
    if yes_or_no():
        return dict(raw, rope_parameters=dict({"rope_type": "default"} | rope, rope_theta=theta))
    old = {("type" if k == "rope_type" and rope is not LLAMA3 else k): v for k, v in rope.items()}
    return dict(raw, rope_theta=theta, rope_scaling=old or None)


@given(raw=raw_configs(), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_logits_and_what_save_writes_equal_transformers_on_random_models(transformers, tmp_path_factory, raw, seed):
    folder = tmp_path_factory.mktemp("random")
    oracle, tokens = oracle_model(transformers, folder, raw, seed), some_tokens(2, 210, seed=seed)
    decoder = model.load(folder)
    with torch.no_grad():
        theirs = oracle(tokens).logits
        assert relative_error(decoder(tokens), theirs) < 1e-4
        model.save(decoder, folder / "saved")
        again, report = transformers.AutoModelForCausalLM.from_pretrained(folder / "saved", output_loading_info=True)
        assert not any(report.values())
        assert relative_error(again.eval()(tokens).logits, theirs) < 1e-6
    model.save(model.load(folder / "saved"), folder / "again")
    for name in ("config.json", "model.safetensors"):
        assert (folder / "saved" / name).read_bytes() == (folder / "again" / name).read_bytes()


@EVERY
def test_bfloat16_error_is_no_worse_than_that_of_transformers(transformers, tmp_path, name):
    exact = oracle_model(transformers, tmp_path, CONFIGS[name], dtype=torch.bfloat16)
    rounded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    tokens, decoder = some_tokens(4, 210), model.load(tmp_path, dtype=torch.bfloat16)
    masters = model.load(tmp_path)
    with torch.no_grad():
        want = exact(tokens).logits
        assert relative_error(decoder(tokens), want) < 1.1 * relative_error(rounded(tokens).logits, want)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(masters(tokens), want) < 1.1 * relative_error(exact(tokens).logits, want)


@EVERY
def test_greedy_text_equals_that_of_transformers_for_prompts_of_any_length(transformers, tmp_path, name):
    oracle, decoder = oracle_model(transformers, tmp_path, CONFIGS[name]), model.load(tmp_path)
    prompts = [some_tokens(n, seed=n).tolist() for n in (1, 40, 7, 23, 40, 2)]
    T, ends = max(map(len, prompts)), [5, 11, 17, 20, 29, 40]
    left = torch.tensor([[0] * (T - len(p)) + p for p in prompts])
    seen = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])
    out = oracle.generate(
        left, attention_mask=seen, max_new_tokens=30, do_sample=False, eos_token_id=ends, pad_token_id=ends[0]
    )
    theirs = [[*r, ends[0]] for r in out[:, T:].tolist()]
    theirs = [r[: min(r.index(e) for e in ends if e in r)][:30] for r in theirs]
    assert model.generate(decoder, prompts, 30, ends) == theirs
    assert len(set(map(len, theirs))) > 1  # some rows ended early, some did not


@pytest.mark.parametrize("kind", sorted(model.FAMILIES))
def test_keys_absent_from_config_json_mean_what_transformers_assumes(transformers, tmp_path, kind):
    raw = dict(SIZES, model_type=kind, num_attention_heads=32, hidden_size=64)
    if kind == "gpt2":
        raw = dict(model_type=kind, vocab_size=48, n_embd=32, n_layer=2, n_head=4)
    (tmp_path / "config.json").write_text(json.dumps(dict(raw, sliding_window=None)))
    ours, theirs = model.read_config(tmp_path), transformers.AutoConfig.from_pretrained(tmp_path)
    assert ours.num_key_value_heads == getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
    assert ours.norm_eps == (theirs.layer_norm_epsilon if kind == "gpt2" else theirs.rms_norm_eps)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    for name in ("max_position_embeddings", "tie_word_embeddings", "initializer_range"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_logits_equal_those_that_transformers_once_gave(folder):
    stored = load_file(folder / "expected.safetensors")
    ours = model.load(folder)(stored["tokens"][None])[0, PLACES]
    assert relative_error(ours, stored["logits"]) < 1e-4


# ---- packing, caching, checkpointing: nothing changes


def test_packing_and_checkpointing_keep_the_values_and_gradients_of_each_row_alone(folder):
    decoder, lengths = model.load(folder, dtype=torch.float64), torch.tensor([30, 1, 17, 8, 2, 30, 5, 9, 21, 3, 3])
    tokens = some_tokens(len(lengths), 30)  # more than model.GROUP rows, which attend in groups
    alone = torch.cat([decoder.hidden(row[None, :n])[0] for row, n in zip(tokens, lengths, strict=True)])
    decoder.checkpointing = True
    packed = decoder.hidden(tokens, lengths)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)  # norms and rotary are float32 whatever comes in
    weight = torch.randn(packed.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    together, apart = (torch.autograd.grad((x * weight).sum(), list(decoder.parameters()), allow_unused=True)
                       for x in (packed, alone))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def greedy_without_cache(decoder, prompt, limit, ends):
    answer = []
    while len(answer) < limit:
        answer.append(decoder(torch.tensor([prompt + answer]))[0, -1].argmax().item())
        if answer[-1] in ends:
            return answer[:-1]
    return answer


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 12), st.sampled_from(sorted(CONFIGS)))
@settings(max_examples=12)
def test_greedy_text_equals_the_loop_without_a_cache(lengths, limit, name):
    decoder, ends = model.load(FIXTURES / name), {3, 4, 40}
    prompts = [some_tokens(n, seed=n + i).tolist() for i, n in enumerate(lengths)]
    with torch.no_grad():
        assert model.generate(decoder, prompts, limit, ends) == [
            greedy_without_cache(decoder, p, limit, ends) for p in prompts]


def test_generation_stops_where_the_context_is_full_and_leaves_the_mode_alone(folder):
    decoder = model.load(folder).train()
    long, short = model.generate(decoder, [[1] * 250, [1] * 3], 10, None)
    assert (len(long), len(short)) == (6, 10) and decoder.training
    assert model.generate(decoder, [], 10, 0) == []
    for prompts in ([[1], []], [[1] * 257], [[1] * 256]):
        with pytest.raises(InputError, match="tokens"):
            model.generate(decoder, prompts, 10, 0)
    with pytest.raises(InputError, match="context of 256"):
        decoder(torch.zeros(1, 257, dtype=torch.int64))


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
    model.save(model.load(folder), new)
    saved = load_file(new / WEIGHTS)
    assert saved.keys() == weights.keys()
    assert all(saved[k].dtype == dtype and torch.equal(saved[k], weights[k]) for k in weights)
    assert sorted(p.name for p in new.iterdir()) == sorted([*kept, WEIGHTS])
    assert all((new / name).read_bytes() == (folder / name).read_bytes() for name in kept)


def split(folder):
    """Turn a single file into two shards with an index."""
    weights = load_file(folder / WEIGHTS)
    names = {k: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, k in enumerate(sorted(weights))}
    for shard in set(names.values()):
        save_file({k: v for k, v in weights.items() if names[k] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / WEIGHTS).unlink()


def test_shards_give_the_same_model_and_saving_into_the_folder_replaces_them(folder):
    tokens, before = some_tokens(1, 20), (folder / WEIGHTS).read_bytes()
    want = model.load(folder)(tokens)
    split(folder)
    decoder = model.load(folder)
    assert torch.equal(decoder(tokens), want)
    model.save(decoder, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "expected.safetensors", WEIGHTS]
    assert (folder / WEIGHTS).read_bytes() == before


def test_what_old_files_store_and_nobody_needs_is_accepted(folder):
    want, weights = model.load(folder)(some_tokens(1, 20)), load_file(folder / WEIGHTS)
    bare = {k.removeprefix("transformer.").removeprefix("model."): v for k, v in weights.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 256, 256, dtype=torch.uint8)
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    if "lm_head.weight" not in bare:  # a tied model may store the embedding twice
        bare["lm_head.weight"] = bare.get("wte.weight", bare.get("embed_tokens.weight")).clone()
    save_file(bare, folder / WEIGHTS)
    decoder = model.load(folder)
    assert torch.equal(decoder(some_tokens(1, 20)), want)
    model.save(decoder, folder)
    assert load_file(folder / WEIGHTS).keys() == weights.keys()


def test_fresh_weights_follow_the_seed_and_need_no_weights_in_the_folder(folder):
    (folder / WEIGHTS).unlink()
    edit_json(folder / "config.json", torch_dtype="bfloat16")
    one, same, other = (model.fresh(folder, seed) for seed in (1, 1, 2))
    for (name, p), q, r in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        if p.ndim == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all()
        else:
            want = 0.02 / 2 if "o_proj" in name or "down_proj" in name else 0.02  # two layers: sqrt(4)
            assert abs(p.std().item() / want - 1) < 0.15 and not torch.equal(p, r)
    model.save(one, folder)
    assert {t.dtype for t in load_file(folder / WEIGHTS).values()} == {torch.bfloat16}


# ---- refusals

REFUSED_SETTINGS = [  # what is changed in config.json, what the refusal must name
    (dict(model_type="bert"), "bert"), (dict(model_type=...), "model_type"), (dict(model_type=["llama"]), "model_type"),
    (dict(model_type="mixtral"), "mixture of experts"), (dict(model_type="qwen3_moe"), "mixture of experts"),
    (dict(num_local_experts=8), "mixture of experts"), (dict(add_cross_attention=True), "add_cross_attention"),
    (dict(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    # positions
    *((dict(rope_scaling=rope), named) for rope, named in [
        ({"rope_type": "yarn", "factor": 4.0}, "yarn"), ({"type": "dynamic"}, "dynamic"), (3, "rope_scaling"),
        ({"rope_type": ["linear"]}, "rope_type"), ({"rope_type": "linear"}, "factor"),
        (dict(LLAMA3, low_freq_factor=4.0), "low_freq_factor"), (dict(LLAMA3, factor=-1), "factor")]),
    (dict(rope_scaling=None, rope_parameters={"full_attention": {"rope_theta": 1.0}}), "rope_parameters"),
    (dict(rope_theta="10000"), "rope_theta"), (dict(rope_theta=math.nan), "rope_theta"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor"), (dict(head_dim=7), "head_dim"),
    # values of the wrong kind
    *((dict(hidden_size=value), "hidden_size") for value in (..., 0, -32, 32.0, True, 10**30)),
    *((dict([item]), item[0]) for item in dict(
        hidden_act=3, vocab_size="48", num_hidden_layers=10**9, rms_norm_eps="small", num_key_value_heads=3,
        tie_word_embeddings="yes").items()),
    (dict(hidden_act="quick_gelu"), "quick_gelu"), (dict(num_attention_heads=5, head_dim=None), "attention heads"),
    # windows
    (dict(layer_types=["sliding_attention"] * 2), "layer_types"), (dict(layer_types="full"), "layer_types"),
    (dict(model_type="mistral", sliding_window=128), "sliding_window"),
    (dict(model_type="mistral", sliding_window=..., max_position_embeddings=8192), "4096"),  # absent means 4096
    (dict(model_type="qwen2", use_sliding_window=True, sliding_window=128, max_window_layers=1), "sliding_window"),
    # contradictions between config.json and weights
    (dict(num_hidden_layers=3), "missing: layers.2"), (dict(num_hidden_layers=1), "unexpected: layers.1"),
    (dict(hidden_size=64), "another shape"), (dict(vocab_size=50), "embed_tokens.weight"),
    (dict(model_type="qwen3"), "q_norm"), (dict(model_type="qwen2"), "q_proj.bias"),
    (dict(tie_word_embeddings=False), "missing: lm_head.weight"),
]


def content(text, name="config.json"):
    """A way to spoil a folder: a file of it holds this text, bytes, or what a function makes of its bytes."""
    def spoil(folder):
        old = (folder / name).read_bytes() if (folder / name).exists() else b""
        if name == INDEX:
            (folder / WEIGHTS).unlink()
        new = text(old) if callable(text) else text
        (folder / name).write_bytes(new.encode() if isinstance(new, str) else new)
    return spoil


def tensors(**changes):
    """A way to spoil a folder: some tensors are replaced, added, or left out (...), given as functions of NORM's."""
    def spoil(folder):
        stored = load_file(folder / WEIGHTS)
        stored |= {name: make if make is ... else make(stored[NORM]) for name, make in changes.items()}
        save_file({k: v for k, v in stored.items() if v is not ...}, folder / WEIGHTS)
    return spoil


BROKEN_FOLDERS = [  # how the folder is spoilt, what the refusal must name
    (lambda folder: (folder / "config.json").unlink(), "no such file"),
    *((content(text), "JSON") for text in ("{", b"\xff\xfe{}", "[" * 100_000, "[1]")),
    (lambda folder: (folder / WEIGHTS).unlink(), "no model.safetensors"),
    (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "pickle"),
    *((content(text, WEIGHTS), "not a whole") for text in (lambda old: old[:-7], b"", b"\x80\x04garbage" * 99)),
    (lambda folder: (split(folder), next(folder.glob("model-00002*")).unlink()), "model-00002-of-00002"),
    *((content(json.dumps({"weight_map": {"a": file}}), INDEX), "plain name")
      for file in ("../m/model.safetensors", "/etc/passwd")),
    *((content(text, INDEX), "weight_map") for text in ('{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "{}")),
    (tensors(**{NORM: ...}), "missing: norm.weight"), (tensors(score=torch.clone), "unexpected: score"),
    (tensors(**{NORM: torch.Tensor.char}), "norm.weight is I8"), (tensors(**{NORM[6:]: torch.clone}), "stored twice"),
    (tensors(**{"lm_head.weight": lambda norm: torch.ones(48, 32)}), "lm_head.weight"),
]


@pytest.mark.parametrize("spoil, named", [
    *((lambda folder, c=changes: edit_json(folder / "config.json", **c), named) for changes, named in REFUSED_SETTINGS),
    *BROKEN_FOLDERS], ids=lambda v: v if isinstance(v, str) else "")
def test_what_is_broken_or_not_supported_is_refused_by_name(tmp_path, spoil, named):
    folder = shutil.copytree(FIXTURES / "llama", tmp_path / "m")
    spoil(folder)
    with pytest.raises(InputError, match=named) as refusal:
        model.load(folder)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("changes", [
    dict(model_type="mistral", sliding_window=None), dict(model_type="mistral", sliding_window=256),
    dict(model_type="qwen2", use_sliding_window=False, sliding_window=8),
    dict(model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)])
def test_windows_that_no_layer_uses_are_accepted(tmp_path, changes):
    shutil.copy(FIXTURES / "llama" / "config.json", tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    model.read_config(tmp_path)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), st.lists)
KEYS = st.sampled_from([*json.loads((FIXTURES / "llama" / "config.json").read_text()), "weight_map"])


@given(st.sampled_from(["config.json", WEIGHTS, INDEX]), st.data())
@settings(max_examples=100)
def test_damaged_files_give_a_model_or_a_refusal_and_nothing_else(tmp_path_factory, name, data):
    folder = shutil.copytree(FIXTURES / "llama", tmp_path_factory.mktemp("damaged") / "m")

    def damage(old):
        at, junk = data.draw(st.integers(0, min(2000, len(old)))), data.draw(st.binary(min_size=1, max_size=8))
        other = json.dumps(data.draw(st.dictionaries(KEYS, JSON, max_size=20))).encode()
        after = data.draw(st.sampled_from([b"", junk + old[at:], junk + old[at + len(junk):], None]))
        return other if after is None else old[:at] + after

    content(damage, name)(folder)
    try:
        model.load(folder)
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
    assert model.resolve("weights") == Path("weights")
    for name in ("weights/missing", "nowhere", "a/b/c", "../a", "/no/where", "file", "", "a/b\0", "x" * 5000, "./a"):
        with pytest.raises(InputError, match="folder"):
            model.resolve(name)
    assert not asked
    with pytest.raises(InputError, match="hf download org/name") as refusal:
        model.load("org/name")
    assert asked[0][0] == "org/name" and "\n" not in str(refusal.value)
    assert not any("bin" in pattern or pattern == "*" for pattern in asked[0][1])


if __name__ == "__main__":  # write the fixtures anew
    import transformers as oracle_library

    for fixture, raw_config in CONFIGS.items():
        shutil.rmtree(FIXTURES / fixture, ignore_errors=True)
        m = oracle_model(oracle_library, FIXTURES / fixture, raw_config, dtype=torch.float16)
        row = some_tokens(224)
        with torch.no_grad():
            logits = m(row[None]).logits[0, PLACES].contiguous()
        save_file({"tokens": row, "logits": logits}, FIXTURES / fixture / "expected.safetensors")
        (FIXTURES / fixture / "generation_config.json").unlink(missing_ok=True)
