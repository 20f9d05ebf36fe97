"""``python -m retrieval_draft.cli``."""

from retrieval_draft.cli import main

main()
