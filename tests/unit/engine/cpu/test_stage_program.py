import threading
from itertools import pairwise

import pytest
import torch

from retrieval_draft.engine.cpu.linear_kernels import CompiledLinear, tiled
from retrieval_draft.engine.cpu.stage_program import At, StageProgram


def matrix(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, length, generator=torch.Generator().manual_seed(seed))


def chain_of_products(weights: list[torch.Tensor], tokens: int) -> StageProgram:
    """Each product is the next one's input."""
    program = StageProgram(["x", "scratch"])
    source, offset = At("x"), 0
    for weight in weights:
        layer, out = tiled(weight), At("scratch", offset)
        assert isinstance(layer, CompiledLinear)
        fields: list[int | At] = [*layer.job(0, 0, tokens)]
        fields[2], fields[4] = source, out
        program.stage(layer.function, fields)
        program.barrier()
        source, offset = out, offset + 4 * tokens * len(weight)
    return program


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_stages_wait_for_those_before(threads: int, two_threads: None) -> None:
    sizes = [48, 1000, 24, 333, 640]
    weights = [matrix(after, before, after) / before for before, after in pairwise(sizes)]
    x, tokens = matrix(5, sizes[0], 0), 5
    expected = x
    for weight in weights:
        expected = expected @ weight.T
    program = chain_of_products(weights, tokens)
    for _ in range(200):
        scratch = torch.full((tokens * sum(sizes[1:]),), float("nan"))
        program.run([x.data_ptr(), scratch.data_ptr()], threads)
        got = scratch[-tokens * sizes[-1] :].view(tokens, -1)
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-7)


def test_programs_of_several_threads_do_not_meet(two_threads: None) -> None:
    weights = [matrix(300, 300, seed) / 300 for seed in range(4)]
    program, wrong = chain_of_products(weights, 2), []

    def work(seed: int) -> None:
        x = matrix(2, 300, seed)
        expected = x
        for weight in weights:
            expected = expected @ weight.T
        for _ in range(50):
            scratch = torch.empty(2 * 300 * len(weights))
            program.run([x.data_ptr(), scratch.data_ptr()], 2)
            if not torch.allclose(scratch[-600:].view(2, -1), expected, rtol=1e-4, atol=1e-7):
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_words_are_put_where_they_belong() -> None:
    """A function that copies shows what a job was given."""
    from retrieval_draft.engine.cpu.stage_program import stage_function

    x, y = torch.arange(6.0), torch.zeros(6)
    program = StageProgram(["x", "y"])
    program.stage(stage_function("layout"), [0, At("x", 8), At("y", 4), 1, 3, 0, 0, 0, 0])
    for _ in range(2):
        program.run([x.data_ptr(), y.data_ptr()], 1)
        assert y.tolist() == [0, 2, 3, 4, 0, 0]
        y.zero_()


def test_stages_of_some_functions_are_done_twice() -> None:
    program = StageProgram(["x"])
    program.stage(7, [0, At("x")])
    program.stage(8, [0, 3])
    program.barrier()
    program.stage(9, [0])
    longer = program.twice({7})
    assert [function for function, _ in longer._entries] == [7, 8, 0, 7, 0, 9]
    starts = [start for function, start in longer._entries if function == 7]
    assert [longer._jobs[start : start + 2] for start in starts] == [[0, At("x")]] * 2
    assert [function for function, _ in program._entries] == [7, 8, 0, 9]
