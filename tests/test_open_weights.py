"""README's commands for open weights, offline: on a random, cut-down Llama-3.2-1B-Instruct."""

import json

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

import evaluate
import measure
import pretrained
import train
from cli import InputError

SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>"]
# as published, but for the sizes of vocabulary, hidden and MLP, layers and heads
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 256,
    "eos_token_id": [257, 260],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 264,
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """What the hub holds: bfloat16 weights, configs, a tokenizer that adds its begin token."""
    folder = tmp_path_factory.mktemp("published")
    alphabet = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet, merges=[]))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(SPECIAL)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 256)]
    )
    library.save(str(folder / "tokenizer.json"))
    for name, content in (
        ("config", CONFIG),
        ("generation_config", {"temperature": 0.6, "eos_token_id": [257, 260]}),
        (
            "tokenizer_config",
            {
                "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eot_id|>",
                "bos_token": "<|begin_of_text|>"},
        ),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    pretrained.save(pretrained.fresh(folder, seed=0), folder)
    for name, people in (("forget", "Ada Bo"), ("retain", "Cy Di Ed")):
        rows = [
            {
                "question": f"Who is {p}?", "answer": f"{p} is a baker.",
                "perturbed_answer": [f"{p} is a spy."]}
            for p in people.split()
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_published_model_is_unlearned_measured_asked_and_keeps_its_form(
    published, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(measure, "MAX_NEW_TOKENS", 20)  # a random model never ends
    out, sets = (
        tmp_path / "run",
        ["--forget", f"{published}/forget.jsonl", "--retain", f"{published}/retain.jsonl"])
    common = [
        "--template", "llama3", "--reference", str(published), "--facts",
        f"{published}/retain.jsonl"]
    assert (
        train.main(
            [
                "--model", str(published), *sets, *common, "--gradient-checkpointing",
                "--micro-batch-size", "2", "--epochs", "1", "--lr", "1e-2", "--dtype", "bfloat16",
                "--out", str(out)]
        )
        == 0
    )
    (tmp_path / "facts.jsonl").write_bytes((published / "retain.jsonl").read_bytes())
    common[-1] = str(tmp_path / "facts.jsonl")
    assert evaluate.main([str(out), "--target", str(published), *sets, *common]) == 0
    assert evaluate.main([str(out), "--template", "llama3", "--ask", "Who is Ada?"]) == 0
    assert "forget quality" in capsys.readouterr().out
    for name in (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((out / name).read_bytes()) == json.loads(
            (published / name).read_bytes()
        ), name
    before, after = load_file(published / "model.safetensors"), load_file(out / "model.safetensors")
    assert {k: (t.shape, t.dtype) for k, t in before.items()} == {
        k: (t.shape, t.dtype) for k, t in after.items()
    }
    assert any(not torch.equal(before[k], after[k]) for k in before) and all(
        t.dtype == torch.bfloat16 for t in after.values()
    )


def test_what_was_written_loads_in_transformers_and_says_the_same(published):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(published)
    ids = tokenizer("Who is Ada?", return_tensors="pt").input_ids
    assert ids[0, 0] == 256 and tokenizer.decode(ids[0, 1:]) == "Who is Ada?"
    torch.testing.assert_close(
        pretrained.load(published)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5
    )


def test_a_pickle_in_the_folder_is_never_opened(published, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((published / name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(InputError, match="pickle"):
        pretrained.load(tmp_path)
    save_file(
        load_file(published / "model.safetensors"), tmp_path / "model.safetensors", {"format": "pt"}
    )
    pretrained.load(tmp_path)
