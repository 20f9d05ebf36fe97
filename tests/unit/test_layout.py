"""What the project's owner asked for at the top level."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason="a source distribution, which holds no links")
@pytest.mark.parametrize("half", ["index", "engine"])
def test_both_halves_stand_at_the_top_level_too(half: str) -> None:
    link = ROOT / half
    assert link.is_symlink()
    assert link.readlink() == Path("retrieval_draft", half), "relative, so that any checkout has it"
    assert (link / "__init__.py").is_file()
