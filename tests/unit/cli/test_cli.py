import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import retrieval_draft
from retrieval_draft.bench.replay import read_traces
from retrieval_draft.cli import demo as demo_module
from retrieval_draft.cli import drafts as drafts_module
from retrieval_draft.cli import generate as generate_module
from retrieval_draft.cli import main
from retrieval_draft.cli import serve as serve_module
from retrieval_draft.models.loading import load_model
from retrieval_draft.models.packaged import PACKAGED
from tests.support.commands import Command
from tests.support.tiny import TEXT, save_tiny


def plain(tiny: str, tokens: int) -> list[int]:
    model, tokenizer = load_model(tiny, device="cpu")
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    return list(model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :].tolist())


def test_text_follows_a_schema_or_a_regular_expression(command: Command, tiny: str, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["yes", "no"]}', encoding="utf-8")
    folder = save_tiny(tmp_path / "model")
    end = load_model(tiny, device="cpu")[1].eos_token_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}), encoding="utf-8")
    words = ["generate", TEXT, "--model", str(folder), "--max-new-tokens", "20", "--json"]
    assert json.loads(json.loads(command(*words, "--json-schema", str(schema))[1])["text"]) in ("yes", "no")
    drafted, plain_ = (
        json.loads(command(*words, "--regex", "[ab]{6}", "--max-draft-tokens", most)[1])
        for most in ("8", "0")
    )
    assert re.fullmatch("[ab]{6}", drafted["text"])
    assert drafted["text"] == plain_["text"]
    assert plain_["stats"]["drafted"] == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--json-schema", "no-such-file"], "Cannot read the schema no-such-file"),
        (["--regex", "a(?=b)"], "regular expression|grammar"),
        (["--regex", "a", "--json-schema", "x"], "follows one grammar"),
    ],
)
def test_grammars_that_cannot_be_are_refused(
    command: Command, tiny: str, options: list[str], reason: str
) -> None:
    code, out, err = command("generate", "x", "--model", tiny, *options)
    assert (code, out) == (1, "")
    assert re.search(reason, err)


def test_no_arguments_print_help(command: Command) -> None:
    code, out, _ = command()
    assert code == 0
    assert "generate" in out
    assert "bench" in out
    code, out, _ = command("bench")
    assert code == 0
    assert "replay" in out


def test_version(command: Command) -> None:
    assert command("--version")[:2] == (0, retrieval_draft.__version__ + "\n")


@pytest.mark.parametrize(
    "words",
    [
        ["generate"],
        ["no-such-command"],
        ["generate", "x", "--model", "m", "--nodes", "-1"],
        ["generate", "x", "--model", "m", "--no-such-option"],
        ["bench", "live", "--model", "m"],
    ],
)
def test_wrong_usage_exits_with_2(command: Command, words: list[str]) -> None:
    code, out, err = command(*words)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert "\nhint:  " in err
    assert "Traceback" not in err


def test_absent_model_is_an_error_with_a_hint(command: Command) -> None:
    code, _, err = command("generate", "x", "--model", "./no-such-folder")
    assert code == 1
    assert err.splitlines()[0].startswith("error: No model folder './no-such-folder'")
    assert err.splitlines()[1].startswith("hint:  ")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (serve_module, ["serve", "--model", "./no-such-folder"]),
        (drafts_module, ["drafts", "serve", "--tokenizer", "./no-such-folder"]),
    ],
)
def test_servers_keep_malloc_small_from_before_they_load(
    module: Any, words: list[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[int] = []
    monkeypatch.setattr(module, "keep_malloc_small", lambda: called.append(1))
    assert command(*words)[0] == 1
    assert called == [1]


def test_debug_shows_the_traceback() -> None:
    from retrieval_draft.errors import ModelFileError

    with pytest.raises(ModelFileError):
        main(["generate", "x", "--model", "./no-such-folder", "--debug"])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["generate", ""], "empty"), (["generate", "x", "--method", "magic"], "magic")],
)
def test_bad_input_is_refused_before_the_model_loads(
    command: Command, words: list[str], message: str
) -> None:
    code, _, err = command(*words, "--model", "./no-such-folder")
    assert code == 1
    assert message in err


def test_generate_prints_what_the_model_says(command: Command, tiny: str) -> None:
    code, out, _ = command("generate", TEXT, "--model", tiny, "--max-new-tokens", "40")
    _, tokenizer = load_model(tiny, device="cpu")
    assert code == 0
    assert out == tokenizer.decode(plain(tiny, 40), skip_special_tokens=True) + "\n"


def test_generate_json_is_one_object(command: Command, tiny: str) -> None:
    code, out, _ = command(
        "generate", TEXT, "--model", tiny, "--max-new-tokens", "40", "--nodes", "8", "--json"
    )
    found = json.loads(out)
    assert code == 0
    assert found["tokens"] == plain(tiny, 40)
    assert len(found["from_draft"]) == 40
    assert sum(found["from_draft"]) == found["stats"]["accepted"]
    assert found["tokens_per_step"] == 39 / found["stats"]["steps"]


def test_generate_reads_stdin(command: Command, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    _, out, _ = command("generate", "-", "--model", tiny, "--max-new-tokens", "5", "--json")
    assert json.loads(out)["tokens"] == plain(tiny, 5)


def test_the_same_seed_gives_the_same_text_with_and_without_drafts(command: Command, tiny: str) -> None:
    def sample(*words: str) -> Any:
        options = ("--temperature", "0.9", "--top-p", "0.95", "--max-new-tokens", "30", "--json")
        return json.loads(command("generate", TEXT, "--model", tiny, *options, *words)[1])["tokens"]

    drafted = sample("--seed", "7", "--nodes", "8")
    assert drafted == sample("--seed", "7", "--method", "none")
    assert drafted != sample("--seed", "8", "--nodes", "8")


def test_stats_go_to_stderr(command: Command, tiny: str) -> None:
    _, out, err = command("generate", TEXT, "--model", tiny, "--max-new-tokens", "5", "--stats")
    assert "tokens per step" in err
    assert "tokens per step" not in out


def test_drafts_are_shown_in_colour_or_brackets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    generate_module.print_piece("a\nb", True)
    generate_module.print_piece("c", False)
    assert capsys.readouterr().out == "\x1b[1;32ma\x1b[0m\n\x1b[1;32mb\x1b[0mc"
    monkeypatch.setenv("NO_COLOR", "1")
    generate_module.print_piece("a", True)
    assert capsys.readouterr().out == "[a]"


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a chat template."""
    folder = save_tiny(tmp_path_factory.mktemp("chatty"))
    _, tokenizer = load_model(str(folder), device="cpu")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompt_file(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": TEXT}) + "\n")
    return str(path)


def test_chat_puts_the_prompt_into_the_template(command: Command, chatty: str) -> None:
    options = ("--model", chatty, "--max-new-tokens", "20", "--nodes", "8", "--json")
    chat = json.loads(command("generate", TEXT, "--chat", *options)[1])
    written = json.loads(command("generate", f"<user>{TEXT}<assistant>", *options)[1])
    assert chat["tokens"] == written["tokens"]
    assert chat["stats"]["prompt_tokens"] == written["stats"]["prompt_tokens"] > len(TEXT)


def test_bench_live_puts_prompts_into_the_template(
    command: Command, chatty: str, prompt_file: str, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.jsonl"
    options = (
        "--prompts",
        prompt_file,
        "--max-new-tokens",
        "8",
        "--methods",
        "stock,none,calibrated",
        "--json",
    )
    code, out, _ = command(
        "bench", "live", "--model", chatty, "--chat", "--record", f"{trace}.gz", "--nodes", "4", *options
    )
    found = json.loads(out)
    assert code == 0
    assert found["chat"] is True
    assert all(entry["different"] == 0 for entry in found["methods"].values())
    _, tokenizer = load_model(chatty, device="cpu")
    [recorded] = read_traces([Path(f"{trace}.gz")])
    assert tokenizer.decode(recorded.prompt.tolist()) == f"<user>{TEXT}<assistant>"


def test_chat_without_a_template_is_refused(command: Command, tiny: str, prompt_file: str) -> None:
    for words in (["generate", "x"], ["bench", "live", "--prompts", prompt_file]):
        code, _, err = command(*words, "--model", tiny, "--chat")
        assert code == 1
        assert f"the tokenizer of {tiny!r} has none" in err
        assert "\nhint:  Leave --chat out, or name" in err


def test_random_ids_are_no_messages(command: Command, chatty: str) -> None:
    code, _, err = command("bench", "live", "--model", chatty, "--chat", "--random-ids", "1")
    assert code == 1
    assert "token ids; a chat template takes text" in err


@pytest.mark.parametrize(
    "words", [["generate"], ["serve"], ["demo"], ["bench", "live"], ["bench", "forward"]]
)
def test_help_names_the_packaged_models(command: Command, words: list[str]) -> None:
    _, out, _ = command(*words, "--help")
    assert all(name in out for name in PACKAGED)


def test_demo_chats_with_a_model_that_can(command: Command, chatty: str, tiny: str) -> None:
    options = ("--max-new-tokens", "4", "--nodes", "4")
    code, out, err = command("demo", "--model", chatty, *options)
    assert code == 0, err
    assert "a chat: each turn drafts from those before" in out
    assert out.count("\n> ") == 2
    by_task = out[out.index("tokens per step by task") :]
    assert all(name in by_task for name in ("plain greedy", "prompt lookup", "retrieval_draft", "quoting"))


def test_demo_without_a_model_to_chat_with_says_how_to_get_one(
    command: Command, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "is_installed", lambda _: False)
    code, out, err = command("demo", "--model", tiny, "--max-new-tokens", "4", "--nodes", "4")
    assert code == 0, err
    assert "A chat: pip install 'retrieval_draft[smollm]'" in out


def test_bench_live_prints_and_writes_the_same_object(
    command: Command, tiny: str, prompt_file: str, tmp_path: Path
) -> None:
    words = (
        "--prompts",
        prompt_file,
        "--max-new-tokens",
        "8",
        "--methods",
        "stock,calibrated",
        "--nodes",
        "4",
    )
    out_file = tmp_path / "result.json"
    code, out, _ = command("bench", "live", "--model", tiny, *words, "--json", "--out", str(out_file))
    assert code == 0
    assert json.loads(out) == json.loads(out_file.read_text())
    assert list(json.loads(out)["methods"]) == ["stock", "calibrated"]


def test_bench_live_table_and_random_ids(command: Command, tiny: str) -> None:
    words = ("--random-ids", "2", "--prompt-length", "20", "--max-new-tokens", "4", "--methods", "stock,none")
    code, out, _ = command("bench", "live", "--model", tiny, *words)
    assert code == 0
    assert "tokens/step" in out
    assert "2 + 0 ties of 2" in out


def test_live_and_methods_print_tables_by_category(command: Command, tiny: str, tmp_path: Path) -> None:
    prompts, trace = tmp_path / "question.jsonl", str(tmp_path / "trace.jsonl.gz")
    kinds = ("writing", "qa")
    prompts.write_text(
        "\n".join(
            json.dumps({"question_id": number, "category": kind, "turns": ["1 2 1 2"]})
            for number, kind in enumerate(kinds)
        )
    )
    words = ("--prompts", str(prompts), "--max-new-tokens", "6", "--methods", "stock,none", "--record", trace)
    code, out, err = command("bench", "live", "--model", tiny, *words)
    assert code == 0, err
    assert "tokens per step by task" in out
    assert all(re.search(rf"{kind} +│ +1 │ 1.00 \(1.00x\)", out) for kind in kinds), out
    words = (trace, "--methods", "prompt_lookup", "--nodes", "2,4")
    code, out, err = command("bench", "methods", *words)
    assert code == 0, err
    assert all(word in out for word in ("by task, 4 nodes", *kinds))
    found = json.loads(command("bench", "methods", *words, "--json")[1])
    assert set(found["by_task"]) == set(kinds)
    assert found["by_task"]["qa"]["prompt_lookup"].keys() == {"2", "4"}


def test_a_difference_exits_with_3(command: Command, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from retrieval_draft.bench import live as live_module

    monkeypatch.setattr(live_module, "compare_outputs", lambda *_: "different")
    words = ("--random-ids", "1", "--prompt-length", "5", "--max-new-tokens", "4", "--methods", "stock")
    assert command("bench", "live", "--model", tiny, *words)[0] == 3


def test_bench_replay(command: Command, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    record = {"task": "loop", "prompt": [1, 2, 3], "output": [1, 2, 3] * 10}
    trace.write_text(json.dumps(record) + "\n")
    code, out, _ = command("bench", "replay", str(trace), "--nodes", "8", "--no-history", "--json")
    assert code == 0
    assert json.loads(out)["tokens_per_step"] > 2
    code, out, _ = command("bench", "replay", str(trace), "--nodes", "8")
    assert code == 0
    assert "loop" in out
    assert command("bench", "replay", str(tmp_path / "absent"), "--nodes", "8")[0] == 1


def test_interruption_exits_with_130(command: Command, monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("retrieval_draft.models.loading.load_model", interrupt)
    assert command("generate", "x", "--model", tiny)[0] == 130


def test_a_closed_pipe_is_no_traceback(tiny: str) -> None:
    program = f"{sys.executable} -m retrieval_draft.cli bench live --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, env=dict(os.environ))
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
