import subprocess
import sys
from pathlib import Path

import retrieval_draft


def test_all_names_load_and_are_all_there_is() -> None:
    assert len(retrieval_draft.__all__) <= 12
    assert dir(retrieval_draft) == sorted(retrieval_draft.__all__)
    for name in retrieval_draft.__all__:
        assert getattr(retrieval_draft, name) is not None


def test_all_equals_the_names_with_a_home() -> None:
    assert set(retrieval_draft._HOME) | {"__version__"} == set(retrieval_draft.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(retrieval_draft, "Drafter")


def test_importing_the_package_loads_neither_torch_nor_numba() -> None:
    heavy = "torch", "numba", "transformers", "numpy", "rich"
    program = f"import sys, retrieval_draft; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_types_are_shipped() -> None:
    assert (Path(retrieval_draft.__file__).parent / "py.typed").is_file()
