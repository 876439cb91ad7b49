"""The command line without an engine: help, usage errors, what vLLM is started with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import uncomp
from uncomp.cli import doctor, findings, main, serve
from uncomp.config import UncompConfig
from uncomp.plan import Target
from uncomp.request import RequestSettings


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UNCOMP_DISABLE", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


def uncomp_entry(argv: list[str]) -> dict[str, object]:
    """The settings that vLLM would get."""
    rest = serve.vllm_arguments(argv)
    return json.loads(rest[rest.index("--additional-config") + 1])["uncomp"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert uncomp.__version__ in capsys.readouterr().out


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("serve", "doctor", "demo", "calibrate", "inspect"))


@pytest.mark.parametrize("command", ["serve", "doctor"])
def test_help_shows_our_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--kv-keep" in shown
    assert "streaming" in shown
    if command == "serve":
        assert "vllm serve --help" in shown


def test_help_does_not_load_vllm(tmp_path: Path) -> None:
    code = (
        "import sys; from uncomp.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('LOADED', {'vllm', 'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "LOADED set()"


def test_vllm_arguments_pass_untouched() -> None:
    before, after = ["m", "--port", "80", "--kv-cache-dtype", "auto"], ["-O3", "--max_model_len=1k"]
    rest = serve.vllm_arguments([*before, "--kv-keep", "0.25", *after])
    assert rest[:-2] == [*before, *after]
    assert json.loads(rest[-1]) == {"uncomp": {"keep": 0.25}}


def test_own_additional_config_is_kept() -> None:
    given = '{"other": {"x": 1}, "uncomp": {"keep": 0.5, "sinks": 8}}'
    rest = serve.vllm_arguments(["m", "--kv-keep", "0.1", "--additional-config", given])
    merged = json.loads(rest[rest.index("--additional-config") + 1])
    assert merged == {"other": {"x": 1}, "uncomp": {"keep": 0.1, "sinks": 8}}
    assert rest.count("--additional-config") == 1


def test_additional_config_alone_is_enough() -> None:
    assert uncomp_entry(["m", '--additional-config={"uncomp": {"budget": 99}}']) == {"budget": 99}


def test_additional_config_of_vllms_config_file_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("port: 8000\nadditional-config:\n  other: 1\n")
    rest = serve.vllm_arguments(["m", "--config", str(file), "--kv-keep", "0.5"])
    assert json.loads(rest[-1]) == {"other": 1, "uncomp": {"keep": 0.5}}
    assert rest[:3] == ["m", "--config", str(file)]


def test_dotted_additional_config_is_kept() -> None:
    rest = serve.vllm_arguments(["m", "--additional-config.other.x", "1", "--kv-keep", "0.5"])
    assert rest == [
        "m", "--additional-config.other.x", "1", '--additional-config.uncomp={"keep": 0.5}',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["m"], "--kv-keep RATIO"),
        (["m", "--kv-keep", "2"], r"keep=2.0: must be in (0, 1]"),
        (["m", "--kv-keep", "-1"], r"keep=-1.0: must be in (0, 1]"),
        (["m", "--kv-keep", "0.5", "--kv-policy", "magic"], "must be one of"),
        (["m", "--kv-keep", "0.5", "--additional-config", "{"], "is not JSON"),
        (["m", "--kv-keep", "0.5", "--additional-config", "[]"], "JSON object"),
        (["m", "--additional-config", '{"uncomp": 0.5}'], "must be an object"),
        (["m", "--kv-keep=0.5", "--additional-config.uncomp.sinks", "1"], "--kv-..."),
        (["m", "--kv-config", "missing.yaml"], "missing.yaml"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)
def test_serve_refuses_before_vllm_is_loaded(
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve, "_vllm", lambda argv: pytest.fail("vLLM was started"))
    assert main(["serve", *argv]) == 2
    assert message in capsys.readouterr().err


def test_value_of_the_wrong_type_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "m", "--kv-keep", "much"])
    assert "--kv-keep" in capsys.readouterr().err


def test_plugin_that_would_not_be_loaded_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_resolver,other")
    assert main(["serve", "m", "--kv-keep", "0.5"]) == 2
    assert "add `uncomp`" in capsys.readouterr().err


def test_kill_switch_serves_plain(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setenv("UNCOMP_DISABLE", "1")
    monkeypatch.setattr(serve, "_vllm", lambda argv: started.append(argv) or 0)
    flags = ["--kv-keep", "nonsense", "--kv-reverse", "--kv-policy=magic", "--no-kv-relocate"]
    flags += ["--prefill-keep", "0.5", "--prefill-stages=2,5"]
    assert main(["serve", "m", *flags, "--port", "1"]) == 0
    assert started == [["serve", "m", "--port", "1"]]
    assert "without compression" in capsys.readouterr().err


def test_kill_switch_with_a_doubtful_value_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNCOMP_DISABLE", "maybe")
    assert main(["serve", "m", "--kv-keep", "0.5"]) == 2
    assert "UNCOMP_DISABLE" in capsys.readouterr().err


def test_doctor_refuses_bad_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--kv-keep", "2"]) == 2
    assert "must be in (0, 1]" in capsys.readouterr().err


def test_doctor_finds_a_model_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engines run in processes of their own, in another folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert doctor._model("mine", []) == ["--model", str(tmp_path / "mine")]
    assert doctor._model("owner/name", ["-O0"]) == ["--model", "owner/name", "-O0"]


def test_doctor_needs_a_plugin_that_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNCOMP_DISABLE", "1")
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["facts"][-1]["status"] == "FAIL"


def target(keep: float, recompact_every: int = 512) -> Target:
    settings = RequestSettings(True, keep, None)
    return Target(settings, 8, 8, 4, 256, recompact_every, 32)


def test_expected_blocks_of_one_compaction() -> None:
    # 1,500 tokens: 46 full blocks and 28 tokens; a quarter is 375 tokens, 347 beside the tail
    assert findings.expected_freed(target(0.25), 1500, 24, 4096) == (1, 46 - 11)


def test_expected_blocks_of_several_compactions() -> None:
    # again at 1,536: 48 full blocks, of which 12 stay; at 1,508 and 1,568 there is nothing to gain
    assert findings.expected_freed(target(0.25, 32), 1500, 80, 4096) == (2, 48 - 12)


def test_nothing_is_expected_of_a_short_prompt() -> None:
    assert findings.expected_freed(target(0.25), 100, 24, 4096) == (0, 0)


@pytest.mark.parametrize(
    ("tokens", "counted", "status"),
    [
        (3072, (1, 3072 * 8 + 1536 * 22), "ok"),
        (3072, (1, 3072 * 30), "FAIL"),
        (3072, (0, 0), "FAIL"),
        (1500, (0, 0), "FAIL"),
    ],
    ids=["as-planned", "nothing-dropped", "not-pruned", "prompt-too-short"],
)
def test_a_pruned_probe_is_held_against_the_schedule(
    tokens: int, counted: tuple[int, int], status: str
) -> None:
    # one stage from layer 8 of 30 on; half of 3,072 is a whole number of blocks of 32
    prompts, read = counted
    found = {"prompts_pruned": float(prompts), "prefill_token_layers_read": float(read)}
    seen = {
        "tokens": tokens,
        "block_size": 32,
        "stages": {"starts": [8], "layers": 30},
        "requests": [{}, {}, {"counted": found}],
    }
    config = UncompConfig(keep=0.25, prefill_keep=0.5, prefill_stages="8")
    report = doctor.Report(quiet=True)
    findings.pruning(seen, config, 0.5, report.add)
    assert [fact.status for fact in report.facts] == [status]


def steps(*tokens: int, gap: float = 1.0) -> dict[str, object]:
    """A run: at every step the chosen token and token 9, `gap` nats behind."""
    best = [{str(token): -0.1, "9": -0.1 - gap} for token in tokens]
    return {"tokens": list(tokens), "logprobs": best}


@pytest.mark.parametrize(
    ("stock", "other", "status"),
    [
        (steps(1, 2, 3), steps(1, 2, 3), "ok"),
        (steps(1, 2, 3), steps(1, 9, 4), "FAIL"),
        (steps(1, 2, 3, gap=0.1), steps(1, 9, 4), "ok"),
        (steps(1, 2, 3, gap=0.1), steps(1, 7, 4), "FAIL"),
    ],
    ids=["same", "another-token", "tie", "token-not-among-the-best"],
)
def test_equality_of_outputs(stock: dict, other: dict, status: str) -> None:
    report = doctor.Report(quiet=True)
    findings.equal("output", stock, other, report.add)
    assert [fact.status for fact in report.facts] == [status]
