"""Parts of the site that mkdocs does not make: every command's options, and pages from outside of docs/.

mkdocs.yml names this file under `hooks`; those that begin with ``on_`` are called as it builds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).parents[1]
COMMANDS = "<!-- commands -->"
OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "deploy/README.md": "deployment.md",
}
"""Pages of the site that stand elsewhere in the repository."""


def command_line() -> str:
    """Every command with its arguments and options, in Markdown, as the commands define them."""
    from retrieval_draft.cli import app

    return "\n".join(_command(typer.main.get_command(app), "retrieval-draft"))


def _command(command: Any, path: str) -> Iterator[str]:
    yield f"## {path}\n\n{command.help or ''}\n"
    parameters = [each for each in command.params if not getattr(each, "hidden", False)]
    if parameters:
        yield "| | default | |\n|---|---|---|"
        yield from (_row(each) for each in parameters)
        yield ""
    for name, below in getattr(command, "commands", {}).items():
        yield from _command(below, f"{path} {name}")


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        name = parameter.name.upper()
    else:
        name = ", ".join([*parameter.opts, *parameter.secondary_opts])
    default = parameter.default
    shown = "" if default in (None, False, (), []) or callable(default) else f"`{default}`"
    if parameter.required:
        shown = "needed"
    text = (getattr(parameter, "help", None) or "").replace("|", "\\|").replace("\n", " ")
    return f"| `{name}` | {shown} | {text} |"


def examples() -> str:
    """The programs of examples/, one below the other."""
    parts = ["# Examples\n\nShort programs to copy; the tests run them. Each takes a model's name or folder."]
    for path in sorted((ROOT / "examples").glob("*.py")):
        parts.append(f"## {path.name}\n\n```python\n{path.read_text('utf-8')}```")
    return "\n\n".join(parts) + "\n"


def relinked(text: str, source: str) -> str:
    """A page's text with links that are right in the site.

    Args:
        text: Markdown.
        source: Where it stands in the repository.
    """

    def on_site(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        if re.match(r"\w+:", target):
            return match[0]
        path = (ROOT / source).parent.joinpath(target).resolve()
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else target
        if name.startswith("docs/"):
            found = name.removeprefix("docs/")
        elif name == "examples" or name.startswith("examples/"):
            found = "examples.md"
        elif name == "README.md":
            found = "index.md"
        else:
            found = OUTSIDE.get(name, target)
        up = "../" * (source.count("/") - 1) if source.startswith("docs/") else ""
        return f"]({up}{found}{anchor})"

    return re.sub(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", on_site, text)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that stand outside of docs/."""
    from mkdocs.structure.files import File

    for name, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=relinked((ROOT / name).read_text("utf-8"), name)))
    files.append(File.generated(config, "examples.md", content=examples()))
    return files


def on_page_markdown(markdown: str, page: Any, **rest: Any) -> str:
    """Puts the commands in, and links that leave docs/ right."""
    if page.file.generated_by is None:
        markdown = relinked(markdown, f"docs/{page.file.src_uri}")
    return markdown.replace(COMMANDS, command_line()) if COMMANDS in markdown else markdown
