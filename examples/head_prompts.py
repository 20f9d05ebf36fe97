"""Writes prompts to train a head with: prose, code, edits, questions on a text (rag).

python examples/head_prompts.py prompts.jsonl
python examples/train_head.py MODEL --prompts prompts.jsonl --out my-head

Code and texts are those of Python's standard library, which is there wherever this runs.
"""

import ast
import json
import random
import re
import sys
import sysconfig
from pathlib import Path

EACH = 160
TOPICS = """a long train journey|the first snow|keeping bees|an old clock|growing tomatoes|
a garden in spring|the moon|chess|a bakery at dawn|wind power|the printing press|saving money|
an evening by the sea|vaccines|volcanoes|a lost key|a school play|electric cars|bread|a stormy night|
friendship|maps|the violin|learning a language|sleeping well|rivers"""
PROSE = """Write a short story about {topic}.|Explain to a beginner what one should know about {topic}.|
Describe {topic}.|What speaks for and against {topic}?|Write a letter to a friend about {topic}.|
Give five pieces of advice on {topic}.|What is special about {topic}?"""
CODE = """Write a Python function {name} with the parameters {args}. {doc}|Write Python code for this: {doc}|
Write a Python class with a method {name}. {doc}|Complete this Python function:\n\n{head}"""
EDITS = """Rename `{name}` to `{name}_all` in this code and print the whole code:\n\n{code}|
Add a docstring to this function and print all of it:\n\n{code}|Add type hints to this function:\n\n{code}|
Correct the spelling mistakes and write the whole text again: {wrong}|
Repeat this text, one sentence a line: {text}"""
RAG = """Text: {text}\n\nAnswer in the words of the text: What does it say about "{word}"?|
{text}\n\nWhich rules does this text state? Use its own words.|Summarise this text in two sentences: {text}|
Read the text and answer the question.\n\n{text}\n\nQuestion: What is said about "{word}"?"""
KINDS = {"prose": PROSE, "code": CODE, "edits": EDITS, "rag": RAG}

draw = random.Random(0)
functions, texts = [], []
for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
    source = path.read_text("utf-8")
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
            paragraphs = [" ".join(part.split()) for part in (ast.get_docstring(node) or "").split("\n\n")]
            texts += [part for part in paragraphs if 160 < len(part) < 500 and ">>>" not in part]
        if isinstance(node, ast.FunctionDef) and len(node.body) > 2 and ast.get_docstring(node):
            code = [
                *lines[node.lineno - 1 : node.end_lineno - 1],
                lines[node.end_lineno - 1][: node.end_col_offset],
            ]
            functions.append((node, "\n".join(code)[node.col_offset :]))

found = {}
while len(found) < EACH * len(KINDS):
    kind = draw.choice([kind for kind in KINDS if sum(each == kind for each in found.values()) < EACH])
    text = draw.choice(texts)
    node, code = draw.choice(functions)
    words = re.findall(r"\w{5,}", text)
    if not words or not 100 < len(code) < 700:
        continue
    swaps = {word: word[:2] + word[3] + word[2] + word[4:] for word in words[::3]}
    facts = {
        "name": node.name.strip("_"),
        "args": ", ".join(arg.arg for arg in node.args.args if arg.arg != "self") or "that you need",
        "doc": " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split()),
        "head": code.split('"""')[0] + '"""' + (ast.get_docstring(node) or "") + '"""',
        "code": code,
        "text": text,
        "word": draw.choice(words),
        "wrong": re.sub(r"\w+", lambda match, swaps=swaps: swaps.get(match[0], match[0]), text),
    }
    facts["topic"] = draw.choice(TOPICS.split("|")).strip()
    found[draw.choice(KINDS[kind].split("|")).strip().format(**facts)] = kind
lines = [
    json.dumps({"id": f"{kind}-{at}", "task": kind, "prompt": text})
    for at, (text, kind) in enumerate(found.items())
]
Path(sys.argv[1]).write_text("\n".join(lines) + "\n")
