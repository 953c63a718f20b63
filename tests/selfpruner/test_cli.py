"""The command: light to start, one line for what a user can mend, tracebacks for our defects."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from agent.drivers.driver import DriverError
from selfpruner.cli import main
from selfpruner.config import CONFIGS, RunConfig, load_config
from selfpruner.latency_table import Timing
from selfpruner.run_folder import RunFolder
from selfpruner.stopping import TerminatedError
from selfpruner.workforce import Workforce

DEMO = str(CONFIGS / "demo.yaml")


class Recorder:
    """Stands in for a module of the rooms behind the command and keeps what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str, *names: str) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.error: BaseException | None = None
        self.leaves: str | None = None  # a file in the run folder
        double = types.ModuleType(f"selfpruner.{module}")
        for name in names:
            setattr(double, name, self._function(name))
        monkeypatch.setitem(sys.modules, f"selfpruner.{module}", double)
        monkeypatch.setattr(f"selfpruner.{module}", double, raising=False)

    def _function(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Path:
            self.calls.append((name, arguments, named))
            if self.leaves is not None:
                (arguments[1].path / self.leaves).touch()
            if self.error is not None:
                raise self.error
            return Path("there") / "report.html"

        return call


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recorder:
    monkeypatch.chdir(tmp_path)
    return Recorder(monkeypatch, "pipeline", "compress")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


def test_the_command_loads_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "matplotlib", "datasets", "lm_eval", "langgraph", "numpy")
    code = f"import sys, selfpruner.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_configurations_load_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "datasets")
    code = (
        "import sys; from pathlib import Path; from selfpruner.config import load_config; "
        f"load_config(Path({DEMO!r})); print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in [
        "plan",
        "compress",
        "resume",
        "evaluate",
        "speed",
        "profile",
        "export",
        "experiment",
        "report",
    ]:
        assert name in result.output


def test_plan_loads_nothing_heavy_and_tells_plain_lines() -> None:
    heavy = ("torch", "transformers", "datasets", "langgraph", "scipy")
    code = (
        "import sys; from typer.testing import CliRunner; from selfpruner.cli import main; "
        f"done = CliRunner().invoke(main, ['plan', {DEMO!r}]); print(done.output); "
        f"print(done.exit_code, [m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("smollm2-135m-instruct: 134,515,008 parameters (269.0 MB)")
    assert lines[-1] == "0 []"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("evaluate", "m", "--tasks", "mmlu"), "--tasks: got mmlu; allowed: boolq"),
        (("speed", "m", "--batches", "a"), "--batches: got 'a'; allowed: whole numbers"),
        (("export", "nowhere", "--to", "gguf"), "nowhere: no folder; --to hf"),
        (("report", "nowhere"), "nowhere: not a run folder"),
        (("experiment", "gone.yaml"), "gone.yaml: no such configuration file"),
    ],
)
def test_what_is_wrong_at_sight_is_refused_before_anything_heavy(
    arguments: tuple[str, ...], line: str
) -> None:
    heavy = ("torch", "transformers", "matplotlib", "datasets", "lm_eval", "langgraph")
    code = (
        "import sys; from typer.testing import CliRunner; from selfpruner.cli import main; "
        f"done = CliRunner().invoke(main, {list(arguments)!r}); print(done.stderr, end=''); "
        f"print(done.exit_code, [m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, end = done.stdout.splitlines()
    assert said.startswith(f"selfpruner: {line}")
    assert end == "2 []"


def test_plan_draws_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    result = run("plan", str(CONFIGS / "llama2_13b.yaml"), "--set", "memory=whole")
    assert result.exit_code == 0
    assert "┡━" in result.stdout
    assert "\x1b[31mrefit" in result.stdout
    assert "\x1b[31mload" not in result.stdout
    assert "With memory: streamed the peak would be" in " ".join(result.stdout.split())


def test_plan_prints_json() -> None:
    result = run("plan", DEMO, "--hardware", "h200", "--devices", "2", "--full", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["hardware"]["devices"] == 2
    assert found["parameters"]["dense"] == 134_515_008
    assert found["total"]["seconds"] == pytest.approx(sum(x["seconds"] for x in found["stages"]))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--hardware", "h20"), "selfpruner: hardware: got 'h20'; did you mean h200? allowed: "),
        (("--model", "x/y"), "selfpruner: model: no architecture is known for 'x/y'; allowed: "),
        (("--budget", "parameters=0.001"), "selfpruner: budget.parameters: 0.001 cannot be met; "),
    ],
)
def test_what_plan_cannot_do_is_one_line(arguments: tuple[str, ...], line: str) -> None:
    result = run("plan", DEMO, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(line)
    assert result.stderr.count("\n") == 1


def test_compress_hands_the_resolved_configuration_on(pipeline: Recorder) -> None:
    result = run(
        "compress", DEMO, "--model", "other", "--budget", "macs=0.5", "--set", "seed=3", "--full"
    )
    assert result.exit_code == 0
    assert f"report: {Path('there') / 'report.html'}" in result.output
    [(_, (config, folder, _progress, workforce), _)] = pipeline.calls
    assert isinstance(config, RunConfig)
    assert isinstance(folder, RunFolder)
    assert (config.model, config.seed, config.budget.macs) == ("other", 3, 0.5)
    assert config.evaluation.samples is None
    assert folder.path == Path("runs") / "demo"
    assert workforce.is_alone
    assert load_config(folder.config) == config


def test_workers_are_handed_on_and_what_is_none_is_refused(
    pipeline: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workforce, "check", lambda _: None)
    assert run("compress", DEMO, "--workers", "ray://h:1", "--threads", "3").exit_code == 0
    [(_, (*_, workforce), _)] = pipeline.calls
    assert (workforce.address, workforce.threads, workforce.is_alone) == ("ray://h:1", 3, False)
    for got in ("0", "many", "ray://", "-1"):
        refused = run("compress", DEMO, "--out", "b", "--workers", got)
        assert refused.exit_code == 2
        assert refused.stderr == (
            f"selfpruner: --workers: got {got!r}; allowed: a number from 1, ray or "
            "ray://host:port\n"
        )
        assert not Path("b").exists()


def test_a_second_run_needs_replace(pipeline: Recorder) -> None:
    assert run("compress", DEMO, "--out", "a").exit_code == 0
    refused = run("compress", DEMO, "--out", "a")
    assert refused.exit_code == 2
    assert refused.stderr == (
        "selfpruner: a: exists; `selfpruner resume a` goes on with a run that is there, "
        "--replace removes it, --out names another folder\n"
    )
    assert run("compress", DEMO, "--out", "a", "--replace").exit_code == 0
    assert len(pipeline.calls) == 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("gone.yaml",), "selfpruner: gone.yaml: no such configuration file\n"),
        ((".",), "selfpruner: .: a folder, want a YAML file\n"),
        (
            (DEMO, "--pick", "best"),
            "selfpruner: --pick: front.pick: got 'best'; allowed: 'budget', 'knee', 'fastest' or "
            "'most-accurate'\n",
        ),
        (
            (DEMO, "--set", "search.popsize=3"),
            "selfpruner: --set search.popsize: unknown key search.popsize; "
            "did you mean search.population?\n",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(
    pipeline: Recorder, arguments: tuple[str, ...], line: str
) -> None:
    result = run("compress", *arguments)
    assert (result.exit_code, result.stderr) == (2, line)
    assert not pipeline.calls
    assert not Path("runs").exists()


def test_a_run_that_never_began_leaves_its_name_free(pipeline: Recorder) -> None:
    pipeline.error = FileNotFoundError("no model x")
    assert run("compress", DEMO, "--out", "a").exit_code == 2
    assert not Path("a").exists()
    RunFolder.create(Path("b"), RunConfig(model="m")).write_text("candidates.jsonl", "{}")
    pipeline.error = None
    assert run("compress", DEMO, "--out", "b").exit_code == 2
    assert Path("b", "candidates.jsonl").exists()


@pytest.mark.parametrize("error", [ValueError("no model x"), RuntimeError("a defect")])
def test_what_is_to_be_replaced_comes_back_where_nothing_began(
    pipeline: Recorder, error: Exception
) -> None:
    old = RunFolder.create(Path("a"), RunConfig(model="m"))
    old.write_text("results.json", "{}")
    pipeline.error = error
    result = run("compress", DEMO, "--out", "a", "--replace")
    assert result.exit_code != 0
    assert old.results.read_text() == "{}"
    assert [x.name for x in Path().iterdir()] == ["a"]


def test_a_cluster_that_is_not_there_is_refused_before_a_folder_is_begun(
    pipeline: Recorder,
) -> None:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert run("compress", DEMO, "--workers", f"ray://127.0.0.1:{port}").exit_code == 0
    refused = run("compress", DEMO, "--out", "b", "--workers", f"ray://127.0.0.1:{port}")
    assert refused.exit_code == 2
    line = f"selfpruner: --workers: nothing answers at ray://127.0.0.1:{port} ("
    assert refused.stderr.startswith(line)
    many = run("compress", DEMO, "--out", "b", "--workers", "ray", "--threads", "9999")
    assert "--threads: got 9999; allowed: up to" in many.stderr
    assert not Path("b").exists()
    assert len(pipeline.calls) == 1


def test_a_full_disk_is_one_line(pipeline: Recorder) -> None:
    pipeline.error = OSError(28, "the disk is full; could not write model.safetensors")
    result = run("compress", DEMO)
    assert result.exit_code == 2
    expected = "selfpruner: the disk is full; could not write model.safetensors\n"
    assert result.stderr.endswith(expected)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
        (TerminatedError(), 143, "stopped by SIGTERM"),
        (DriverError("driver http://x: no\nconnection"), 75, "driver http://x: no connection"),
    ],
)
def test_what_can_go_on_says_how(
    pipeline: Recorder, error: BaseException, code: int, words: str
) -> None:
    pipeline.error, pipeline.leaves = error, "candidates.jsonl"
    result = run("compress", DEMO, "--out", "a", "--threads", "1")
    assert result.exit_code == code
    assert result.stderr == f"selfpruner: {words}; `selfpruner resume a --threads 1` goes on\n"


def test_what_was_not_begun_cannot_go_on(pipeline: Recorder) -> None:
    pipeline.error = DriverError("no")
    result = run("compress", DEMO, "--out", "a")
    assert (result.exit_code, result.stderr) == (75, "selfpruner: no\n")
    assert not Path("a").exists()


def test_resume_goes_on_with_the_stored_configuration(pipeline: Recorder) -> None:
    assert run("compress", DEMO, "--out", "a", "--set", "seed=3").exit_code == 0
    assert run("resume", "a").exit_code == 0
    (_, first, _), (_, second, _) = pipeline.calls
    assert second[0] == first[0]
    assert second[1] == first[1]


def test_a_resume_that_fails_early_keeps_the_run(pipeline: Recorder) -> None:
    RunFolder.create(Path("a"), RunConfig(model="m"))
    pipeline.error = DriverError("no network")
    assert run("resume", "a").exit_code == 75
    pipeline.error = None
    assert run("resume", "a").exit_code == 0


def test_resume_of_what_cannot_be_resumed(pipeline: Recorder) -> None:
    result = run("resume", "nowhere")
    assert (result.exit_code, result.stderr) == (
        2,
        "selfpruner: nowhere: not a run folder (no config.yaml and environment.json)\n",
    )
    folder = RunFolder.create(Path("a"), RunConfig(model="m"))
    folder.results.write_text("{}")
    folder.report.write_text("")
    assert run("resume", "a").output == f"finished already; report: {folder.report}\n"
    assert not pipeline.calls


def test_a_run_with_its_results_has_but_the_report_to_write(
    pipeline: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Recorder(monkeypatch, "report", "write_report")
    RunFolder.create(Path("a"), RunConfig(model="m")).results.write_text("{}")
    assert run("resume", "a").output == f"finished already; report: {Path('there/report.html')}\n"
    assert [(name, arguments) for name, arguments, _ in report.calls] == [
        ("write_report", (Path("a"),))
    ]
    assert not pipeline.calls


def test_one_run_has_its_report_in_its_folder(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a", RunConfig(model="m"))
    refused = run("report", str(folder), "--out", "x.html")
    assert (refused.exit_code, refused.stderr) == (
        2,
        "selfpruner: --out: allowed with several runs; that of one is RUN/report.html\n",
    )


@pytest.mark.parametrize("command", ["evaluate", "speed", "profile"])
def test_a_variable_that_is_not_set_is_no_model(command: str) -> None:
    refused = run(command, "")
    assert (refused.exit_code, refused.stderr) == (2, "selfpruner: MODEL: got an empty name\n")


def test_two_processes_never_work_in_one_folder(pipeline: Recorder) -> None:
    folder = RunFolder.create(Path("a"), RunConfig(model="m"))
    with folder.locked():
        for arguments in (("resume", "a"), ("compress", DEMO, "--out", "a", "--replace")):
            result = run(*arguments)
            assert result.exit_code == 2
            assert "another process is at work in this folder" in result.stderr
    assert folder.config.exists()
    assert run("resume", "a").exit_code == 0
    assert len(pipeline.calls) == 1


def test_defects_keep_their_traceback(pipeline: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(*_: object) -> None:
        np.zeros(3).reshape(2)

    monkeypatch.setattr(sys.modules["selfpruner.pipeline"], "compress", defective)
    result = run("compress", DEMO)
    assert isinstance(result.exception, ValueError)
    assert result.exit_code == 1
    assert not pipeline.calls


def test_evaluate_takes_tasks_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Recorder(monkeypatch, "inspection", "evaluate_command")
    result = run("evaluate", "m", "--tasks", "piqa,boolq", "--baseline", "d", "--samples", "5")
    assert result.exit_code == 0, result.output
    [(name, (model,), named)] = judge.calls
    assert (name, model) == ("evaluate_command", "m")
    assert named.pop("progress") is not None
    expected = {
        "baseline": "d",
        "tasks": ["boolq", "piqa"],
        "samples": 5,
        "batch_size": 8,
        "spread": None,
        "trust_remote_code": False,
    }
    assert named == expected
    for option, asked in (("--spread", True), ("--no-spread", False)):
        assert run("evaluate", "m", option).exit_code == 0
        assert judge.calls[-1][2]["spread"] is asked
    refused = run("evaluate", "m", "--tasks", "piqa,mmlu")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("selfpruner: --tasks: got mmlu; allowed: boolq, piqa")


def test_profile_says_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = Recorder(monkeypatch, "profile", "profile_command")
    assert run("profile", "m").exit_code == 0
    more = ("--phase", "prefill", "--batch", "4", "--tokens", "64", "--again", "--out", "there")
    assert run("profile", "m", *more).exit_code == 0
    [(_, (model,), plain), (_, _, named)] = profile.calls
    assert (model, plain["plans"], plain["again"], plain["out"]) == ("m", 12, False, None)
    assert plain["timing"] == Timing()
    assert named["timing"] == Timing("prefill", 4, 64)
    assert (named["again"], named["out"]) == (True, Path("there"))
    assert run("profile", "m", "--phase", "train").exit_code == 2


def test_a_pick_is_a_setting_of_the_front(pipeline: Recorder) -> None:
    targets = "front.targets=[0.8]"
    assert run("compress", DEMO, "--set", targets, "--pick", "knee").exit_code == 0
    assert pipeline.calls[0][1][0].front.pick == "knee"
    refused = run("compress", DEMO, "--pick", "knee", "--out", "other")
    assert refused.exit_code == 2
    assert "front.pick: got 'knee'; allowed without front.targets: budget" in refused.stderr


def test_report_takes_run_folders_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    report = Recorder(monkeypatch, "report", "write_report", "write_comparison")
    a, b = (RunFolder.create(tmp_path / x, RunConfig(model="m")) for x in "ab")
    assert run("report", str(a)).exit_code == 0
    assert run("report", str(a), str(b), "--out", "side.html").exit_code == 0
    assert [call[:2] for call in report.calls] == [
        ("write_report", (a.path,)),
        ("write_comparison", ([a.path, b.path], Path("side.html"))),
    ]
    refused = run("report", str(tmp_path))
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"selfpruner: {tmp_path}: not a run folder")
