"""How often a fine-tuned demo model calls two tools rightly, and answers from them.

    python benchmarks/tool_use.py [--init_from RUN] [--rows 2000] [--questions 100]

Writes conversations about sums and units, each with a call, its result and the answer;
pretrains a demo model unless a run is named; fine-tunes it on them; and asks it, in a
chat with the two tools, about numbers that no conversation had. A call is right with the
tool and all of its arguments, a final answer to the character.
"""

import argparse
import contextlib
import io
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import minimind_nb as mm
from minimind_nb.monitor.chat import Chat

HELD_OUT = 7  # numbers that this divides are in no conversation that is trained on
TURNS = 5  # of a conversation: the tools' schemas take as much as three of them
UNITS = {"metres": 1000, "feet": 305, "inches": 25, "miles": 1609344, "yards": 914}
WORDS = {"plus": "plus", "and": "plus", "minus": "minus", "times": "times"}


def calculate(a: int, what: str, b: int) -> int:
    """Compute.

    Args:
        a: number
        what: plus, minus or times
        b: number
    """
    return {"plus": a + b, "minus": a - b, "times": a * b}[what]


def convert(amount: int, unit: str) -> int:
    """Look a length up in millimetres.

    Args:
        amount: number
        unit: its unit
    """
    return amount * UNITS[unit]


def ask(numbers: Sequence[int], draw: random.Random) -> tuple[str, dict[str, Any], str]:
    """Return a question, the call that it needs, and the answer with {} for the result."""
    a, b = draw.choice(numbers), draw.choice(numbers)
    if draw.random() < 0.5:
        word = draw.choice([*WORDS])
        asked = draw.choice(["What is {}?", "Compute {}.", "Please tell me {}."])
        arguments = {"a": a, "what": WORDS[word], "b": b}
        call = {"name": "calculate", "arguments": arguments}
        return asked.format(f"{a} {word} {b}"), call, f"{a} {word} {b} is {{}}."
    unit = draw.choice([*UNITS])
    asked = draw.choice(["How long are {}?", "Convert {}.", "What are {} in mm?"])
    call = {"name": "convert", "arguments": {"amount": a, "unit": unit}}
    return asked.format(f"{a} {unit}"), call, f"{a} {unit} are {{}} millimetres."


def compute(call: dict[str, Any]) -> int:
    """Return what the tool of a call gives."""
    tools = {"calculate": calculate, "convert": convert}
    return tools[call["name"]](**call["arguments"])


def write_rows(file: Path, count: int, schemas: list[Any]) -> None:
    """Write conversations without the numbers that are held out."""
    draw = random.Random(0)
    numbers = [n for n in range(2, 1000) if n % HELD_OUT]
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(count):
            messages = []
            for _ in range(TURNS):
                question, call, answer = ask(numbers, draw)
                result = str(compute(call))
                messages += [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": "", "tool_calls": [call]},
                    {"role": "tool", "content": result},
                    {"role": "assistant", "content": answer.format(result)},
                ]
            print(json.dumps({"messages": messages, "tools": schemas}), file=lines)


def examine(source: Any, count: int) -> dict[str, list[tuple[bool, bool]]]:
    """Return by tool whether each call and each final answer was right."""
    draw = random.Random(1)
    numbers = range(HELD_OUT, 1000, HELD_OUT)
    model, tokenizer = mm.load(source)
    settings: dict[str, Any] = {"tools": [calculate, convert], "temperature": 0}
    talk = Chat(model, tokenizer, max_new_tokens=96, **settings)
    found: dict[str, list[tuple[bool, bool]]] = {}
    for number in range(count):
        question, call, answer = ask(numbers, draw)
        talk.clear()
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            said = talk.say(question)
        calls = [one for said in talk.history for one in said.get("tool_calls", [])]
        right = calls == [call], said == answer.format(compute(call))
        found.setdefault(call["name"], []).append(right)
        if number < 2:
            print(f"> {question}\n{shown.getvalue()}")
    return found


def main() -> None:
    """Train, ask and print."""
    from transformers.utils.chat_template_utils import get_json_schema

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--init_from", help="a pretrained run (one is made)")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--max_steps", type=int, default=1400)
    options = parser.parse_args()
    torch.set_num_threads(2)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        source: Any = options.init_from
        out: dict[str, Any] = {"out_dir": folder, "view": False}
        if source is None:
            source = mm.train("demo", preset="demo", recipe="demo", **out).folder
        file = Path(folder, "tool_use.jsonl")
        write_rows(file, options.rows, [*map(get_json_schema, (calculate, convert))])
        run = mm.train(
            file,
            stage="sft",
            recipe="demo-sft",
            init_from=str(source),
            max_seq_len=1024,
            max_steps=options.max_steps,
            eval_interval=200,
            sample_tokens=0,
            **out,
        )
        print(
            f"\ntrained in {time.monotonic() - began:.0f} s, loss {run.history.last('eval')}"
        )
        found = examine(run.folder, options.questions)
    found["both"] = [right for each in found.values() for right in each]
    for name, rights in found.items():
        calls, answers = (sum(each) for each in zip(*rights, strict=True))
        of = len(rights)
        print(f"{name}: calls right {calls} of {of}, final answers {answers} of {of}")
    print(f"in {time.monotonic() - began:.0f} s altogether")


if __name__ == "__main__":
    main()
