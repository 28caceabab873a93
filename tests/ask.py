"""Ask each checkpoint a question through vLLM.

usage: ask.py QUESTION DIRECTORY...
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoTokenizer

from serving import Job, Request, answers


def main(question: str, *directories: str) -> None:
    """Print the answer of each checkpoint."""
    tokenizer = AutoTokenizer.from_pretrained(directories[0])
    chat = [{"role": "user", "content": question}]
    tokens = list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    jobs = [Job(Path(directory), [Request(tokens, max_tokens=4)]) for directory in directories]
    for directory, (answer,) in zip(directories, answers(jobs), strict=True):
        text = tokenizer.decode(answer.token_ids).split(tokenizer.eos_token)[0]
        print(f"{Path(directory).name}: {question} {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
