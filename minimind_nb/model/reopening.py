"""What a fresh process does with an exported folder: open it and say what it computes.

The source of this module is handed to that process, so it needs nothing of ours.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str, question: str, answer: str) -> None:
    """Write the last logits of each row of ids, and what a text is as ids.

    `question` is a JSON file: {"rows", "keep", "text", "code", "gguf"}, the last
    what `from_pretrained` is told of a GGUF file, empty for a folder.
    """
    asked = json.loads(Path(question).read_text(encoding="utf-8"))
    kind: Any = AutoModelForCausalLM
    if asked["code"]:
        file = Path(folder) / f"{asked['code']}.py"
        spec = importlib.util.spec_from_file_location(asked["code"], file)
        assert spec and spec.loader
        module = sys.modules[asked["code"]] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        kind = module.MiniMindForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, **asked["gguf"]).eval()
    logits = {}
    with torch.inference_mode():
        for number, row in enumerate(asked["rows"]):
            found = model(torch.tensor([row]), logits_to_keep=asked["keep"])
            logits[str(number)] = found.logits[0].contiguous()
    if not asked["gguf"]:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.encode(asked["text"], add_special_tokens=False)
        logits["ids"] = torch.tensor(ids)
    save_file(logits, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
