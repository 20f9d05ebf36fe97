from __future__ import annotations

from benchmarks.turns import first_token
from tests.support.servers import serving, tiny_drafter, tiny_model, tiny_tokenizer


def test_a_turn_is_timed_and_counted() -> None:
    tokenizer = tiny_tokenizer()
    drafter = tiny_drafter(tiny_model(tokenizer), tokenizer, prefix_cache_bytes=1 << 22)
    prompt = [number % 17 for number in range(40)]
    with serving(drafter, tokenizer) as running:
        seconds, reply, known = first_token(running.port, prompt, 4)
        assert (len(reply), known) == (4, 0)
        assert seconds > 0
        assert running.wait_idle()
        assert first_token(running.port, [*prompt, *reply, 1], 4)[2] == 43
