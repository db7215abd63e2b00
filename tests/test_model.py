"""model.py: the same numbers as transformers; packing, caching and checkpointing change none.

transformers is the oracle where it is installed. tests/fixtures holds three tiny random checkpoints
with logits that it computed, for where it is not. `python tests/test_model.py` writes them anew.
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
import pretrained  # noqa: E402
from cli import InputError  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
PLACES = slice(13, 224, 14)  # of the 224 positions, those whose logits are stored

SIZES = dict(
    vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
LLAMA = dict(model_type="llama", **SIZES, num_key_value_heads=2, max_position_embeddings=256)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64)
CONFIGS = {
    "llama": dict(
        LLAMA, head_dim=12, rms_norm_eps=1e-3, rope_theta=500.0, rope_scaling=LLAMA3,
        tie_word_embeddings=True),
    "qwen3": dict(
        LLAMA, model_type="qwen3", head_dim=16, attention_bias=True, rms_norm_eps=1e-3,
        rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "gpt2": dict(
        model_type="gpt2", vocab_size=48, n_embd=32, n_inner=48, n_layer=2, n_head=4,
        n_positions=256, layer_norm_epsilon=1e-3),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)


def oracle_model(transformers, folder, raw, seed=0, dtype=torch.float32):
    """A random transformers model of config.json `raw`, saved in folder in dtype beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(seed)
    m = (
        transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(folder)
        )
        .float()
        .eval()
    )
    # far from the start: norms off 1, biases off 0, attention with contrast
    for name, p in m.named_parameters():
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
    one_of, yes_or_no = (
        (lambda *choices: draw(st.sampled_from(choices))), lambda: draw(st.booleans()))
    kind, act = (
        one_of("llama", "llama", "mistral", "qwen2", "qwen3", "gpt2"),
        one_of(*pretrained.ACTIVATIONS))
    kv_heads, shared, head_dim, layers = (
        one_of(1, 2, 3), one_of(1, 2, 3), one_of(4, 8, 10), one_of(1, 2))
    heads, inner = kv_heads * shared, draw(st.integers(3, 40))
    common = dict(
        model_type=kind, vocab_size=48, tie_word_embeddings=yes_or_no(), initializer_range=0.1
    )
    if kind == "gpt2":
        return dict(
            common, n_embd=heads * head_dim, n_head=heads, n_layer=layers, n_positions=256,
            n_inner=one_of(None, inner), activation_function=act, scale_attn_weights=yes_or_no(),
            scale_attn_by_inverse_layer_idx=yes_or_no())
    raw = dict(
        common, hidden_size=heads * head_dim, num_attention_heads=heads,
        num_key_value_heads=kv_heads, num_hidden_layers=layers, intermediate_size=inner,
        max_position_embeddings=256, hidden_act=act, rms_norm_eps=one_of(1e-6, 1e-2))
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
def test_logits_and_what_save_writes_equal_transformers_on_random_models(
    transformers, tmp_path_factory, raw, seed
):
    folder = tmp_path_factory.mktemp("random")
    oracle, tokens = oracle_model(transformers, folder, raw, seed), some_tokens(2, 210, seed=seed)
    decoder = pretrained.load(folder)
    with torch.no_grad():
        theirs = oracle(tokens).logits
        assert relative_error(decoder(tokens), theirs) < 1e-4
        pretrained.save(decoder, folder / "saved")
        again, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "saved", output_loading_info=True
        )
        assert not any(report.values())
        assert relative_error(again.eval()(tokens).logits, theirs) < 1e-6
    pretrained.save(pretrained.load(folder / "saved"), folder / "again")
    for name in ("config.json", "model.safetensors"):
        assert (folder / "saved" / name).read_bytes() == (folder / "again" / name).read_bytes()


@EVERY
def test_bfloat16_error_is_no_worse_than_that_of_transformers(transformers, tmp_path, name):
    exact = oracle_model(transformers, tmp_path, CONFIGS[name], dtype=torch.bfloat16)
    rounded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16
    ).eval()
    tokens, decoder = some_tokens(4, 210), pretrained.load(tmp_path, dtype=torch.bfloat16)
    masters = pretrained.load(tmp_path)
    with torch.no_grad():
        want = exact(tokens).logits
        assert relative_error(decoder(tokens), want) < 1.1 * relative_error(
            rounded(tokens).logits, want
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(masters(tokens), want) < 1.1 * relative_error(
                exact(tokens).logits, want
            )


@EVERY
def test_greedy_text_equals_that_of_transformers_for_prompts_of_any_length(
    transformers, tmp_path, name
):
    oracle, decoder = oracle_model(transformers, tmp_path, CONFIGS[name]), pretrained.load(tmp_path)
    prompts = [some_tokens(n, seed=n).tolist() for n in (1, 40, 7, 23, 40, 2)]
    T, ends = max(map(len, prompts)), [5, 11, 17, 20, 29, 40]
    left = torch.tensor([[0] * (T - len(p)) + p for p in prompts])
    seen = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])
    out = oracle.generate(
        left, attention_mask=seen, max_new_tokens=30, do_sample=False, eos_token_id=ends,
        pad_token_id=ends[0])
    theirs = [[*r, ends[0]] for r in out[:, T:].tolist()]
    theirs = [r[: min(r.index(e) for e in ends if e in r)][:30] for r in theirs]
    assert model.generate(decoder, prompts, 30, ends) == theirs
    assert len(set(map(len, theirs))) > 1  # some rows ended early, some did not


def test_logits_equal_those_that_transformers_once_gave(folder):
    stored = load_file(folder / "expected.safetensors")
    ours = pretrained.load(folder)(stored["tokens"][None])[0, PLACES]
    assert relative_error(ours, stored["logits"]) < 1e-4


# ---- packing, caching, checkpointing: nothing changes


def test_packing_and_checkpointing_keep_the_values_and_gradients_of_each_row_alone(folder):
    decoder, lengths = (
        pretrained.load(folder, dtype=torch.float64),
        torch.tensor([30, 1, 17, 8, 2, 30, 5, 9, 21, 3, 3]))
    tokens = some_tokens(len(lengths), 30)  # more than model.GROUP rows, which attend in groups
    alone = torch.cat(
        [decoder.hidden(row[None, :n])[0] for row, n in zip(tokens, lengths, strict=True)]
    )
    decoder.checkpointing = True
    packed = decoder.hidden(tokens, lengths)
    # norms and rotary are float32 whatever comes in
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    weight = torch.randn(
        packed.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    together, apart = (
        torch.autograd.grad((x * weight).sum(), list(decoder.parameters()), allow_unused=True)
        for x in (packed, alone)
    )
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def greedy_without_cache(decoder, prompt, limit, ends):
    answer = []
    while len(answer) < limit:
        answer.append(decoder(torch.tensor([prompt + answer]))[0, -1].argmax().item())
        if answer[-1] in ends:
            return answer[:-1]
    return answer


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 12),
    st.sampled_from(sorted(CONFIGS)))
@settings(max_examples=12)
def test_greedy_text_equals_the_loop_without_a_cache(lengths, limit, name):
    decoder, ends = pretrained.load(FIXTURES / name), {3, 4, 40}
    prompts = [some_tokens(n, seed=n + i).tolist() for i, n in enumerate(lengths)]
    with torch.no_grad():
        assert model.generate(decoder, prompts, limit, ends) == [
            greedy_without_cache(decoder, p, limit, ends) for p in prompts
        ]


def test_generation_stops_where_the_context_is_full_and_leaves_the_mode_alone(folder):
    decoder = pretrained.load(folder).train()
    long, short = model.generate(decoder, [[1] * 250, [1] * 3], 10, None)
    assert (len(long), len(short)) == (6, 10) and decoder.training
    assert model.generate(decoder, [], 10, 0) == []
    for prompts in ([[1], []], [[1] * 257], [[1] * 256]):
        with pytest.raises(InputError, match="tokens"):
            model.generate(decoder, prompts, 10, 0)
    with pytest.raises(InputError, match="context of 256"):
        decoder(torch.zeros(1, 257, dtype=torch.int64))


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
