"""One hypothesis profile (no deadline: CI machines stutter), tiny models, an oracle."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import settings

import data
import pretrained

settings.register_profile("etw", deadline=None, max_examples=60, derandomize=True, print_blob=True)
settings.load_profile("etw")
torch.set_num_threads(1)  # tiny matrices: a second thread only waits


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Each run collects garbage: not through all that the tests have loaded."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A model directory: a fresh Llama of 25,000 parameters and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    library.train_from_iterator(
        ["Question: Where was Ada born?\nAnswer: Ada was born in Oru."] * 9, trainer
    )
    library.save(str(folder / "tokenizer.json"))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300,
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": True, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    pretrained.save(pretrained.fresh(folder, seed=0), folder)
    return folder


@pytest.fixture(scope="session")
def stranger(tiny, tmp_path_factory):
    """`tiny` with another tokenizer: as many tokens, two of them exchanged."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("stranger") / "model"))
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(params=["gpt2", "llama", "qwen3"])
def folder(request, tmp_path):
    """A copy of a stored checkpoint."""
    stored = Path(__file__).parent / "fixtures" / request.param
    return Path(shutil.copytree(stored, tmp_path / request.param))


@pytest.fixture(scope="session")
def letters(tiny):
    """The tokenizer of `tiny`: bytes and a few merges, no begin token."""
    return data.Tokenizer(tiny)


@pytest.fixture(scope="session")
def transformers():
    """The oracle where it is installed; where it is not, what asks for it is skipped."""
    oracle = pytest.importorskip("transformers")
    oracle.logging.set_verbosity_error()
    oracle.logging.disable_progress_bar()
    return oracle
