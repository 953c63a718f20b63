"""Drivers from a configuration: what cannot be opened is refused before anything is computed."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent.drivers import vllm, vllm_server
from agent.drivers.driver import Place, Request
from agent.settings import DriverSettings
from selfpruner import driving
from selfpruner.config import CONFIGS, load_config
from selfpruner.driving import check_drivers, open_driver
from selfpruner.progress import Progress
from selfpruner.run_folder import RunFolder
from selfpruner.searching import check_words_and_drivers
from tests.agent.drivers.chat_server import ChatServer, said

DEMO = CONFIGS / "demo.yaml"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "replay", "recording": "gone.jsonl"}, r"recording: gone\.jsonl: no such"),
        ({"kind": "embedded", "model": "gone"}, r"model: unknown model 'gone'"),
        ({"kind": "vllm", "python": "gone/python"}, r"python: gone/python: no such.*venv"),
    ],
)
def test_what_is_not_there_is_refused(settings: dict[str, str], message: str) -> None:
    chains = {
        r"^driver\.": settings,
        r"^driver\.fallbacks\.0\.": {"kind": "embedded", "fallbacks": [settings]},
    }
    for place, chain in chains.items():
        with pytest.raises(ValueError, match=place + message) as refusal:
            check_drivers(DriverSettings.model_validate(chain).chain)
        assert "\n" not in str(refusal.value)


def test_a_server_that_is_there_needs_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"kind": "vllm", "python": "gone/python", "port": 8123}
    chain = DriverSettings.model_validate(settings).chain
    monkeypatch.setattr(vllm_server, "is_healthy", lambda port: port == 8123)
    check_drivers(chain)
    monkeypatch.setattr(vllm_server, "is_healthy", lambda _: False)
    with pytest.raises(ValueError, match="gone/python: no such program"):
        check_drivers(chain)


def test_what_could_not_be_called_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refusal(**settings: str) -> str:
        with pytest.raises(ValueError, match=r"driver\.|llm\.jsonl") as caught:
            check_drivers(DriverSettings.model_validate(settings).chain)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "driver.base_url" in refusal(kind="api", base_url="http://h\x00st/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    assert "more than a key's characters" in refusal(kind="api", base_url="http://host/v1")
    recording = tmp_path / "llm.jsonl"
    recording.write_text("[]\n{}\n")
    assert "line 1: not a call" in refusal(kind="replay", recording=str(recording))


def test_only_a_search_that_asks_needs_its_driver() -> None:
    gone = ("driver.kind=replay", "driver.recording=gone.jsonl")
    with pytest.raises(ValueError, match="no such file"):
        check_words_and_drivers(load_config(DEMO, settings=gone))
    check_words_and_drivers(load_config(DEMO, settings=(*gone, "search.allocator=evolution")))


def test_a_name_is_hidden_only_where_it_is_told() -> None:
    hidden = ("search.placebo=name",)
    with pytest.raises(ValueError, match=r"search\.placebo: got 'name'; search\.strategy moves "):
        check_words_and_drivers(load_config(DEMO, settings=hidden))
    check_words_and_drivers(load_config(DEMO, settings=(*hidden, "search.strategy=knowledge")))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("driver.kind=api", "driver.base_url: missing; driver.kind api needs an address"),
        ("driver.kind=replay", "driver.recording: missing"),
        ("driver.base_url=ftp://host", "driver.base_url: allowed: an http or https address"),
        ("driver.base_url=http://me:sk-secret@host/v1", "without user, password or query"),
        ("driver.base_url=http://host/v1?key=sk-secret", "without user, password or query"),
        ("driver.key_variable=sk-secret", "allowed: the NAME of an environment variable"),
        ("driver.api_key=sk-secret", "unknown key driver.api_key"),
        ("driver.price={prompt: -1}", "driver.price.prompt: got -1"),
        ("driver.fallbacks=[{kind: api}]", "driver.base_url: missing"),
        ("driver.fallbacks=[{kind: none}]", "driver.fallbacks: kind none answers nothing"),
        ("driver.base_url=http://host:port/v1", "driver.base_url: allowed after the host: a port"),
        ("driver.base_url=https://host:8000v1", "driver.base_url: allowed after the host: a port"),
    ],
)
def test_a_wrong_driver_is_one_line_without_its_key(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match="driver") as refusal:
        load_config(DEMO, settings=(setting,))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "sk-secret" not in str(refusal.value)


def test_a_stored_configuration_names_the_variable_and_no_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    settings = ("driver.kind=api", "driver.base_url=http://host/v1", "driver.key_variable=SOME_KEY")
    text = load_config(DEMO, settings=settings).to_yaml()
    assert "SOME_KEY" in text
    assert "sk-secret" not in text


def test_an_endpoint_gets_the_key_in_the_variable_that_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    message = {"role": "user", "content": "Hi!"}
    request = Request(Place(0, 0, "generate", 0), (message,), {"type": "object"}, 16, 0.5, 7)
    unused = cast("Any", None)  # of drivers that compute here
    with ChatServer([said("ok")]) as server:
        settings = {"kind": "api", "base_url": server.url, "key_variable": "SOME_KEY", "model": "m"}
        chain = DriverSettings.model_validate(settings).chain
        folder = cast("Any", SimpleNamespace(llm=tmp_path / "llm.jsonl"))
        driver = open_driver(unused, chain, folder, unused)
        list(driver.complete([request], lambda _: True))
        driver.close()
    assert [x.headers["authorization"] for x in server.calls] == ["Bearer sk-secret"]


def test_a_resumed_replay_gives_no_try_twice(tmp_path: Path) -> None:
    message = {"role": "user", "content": "Hi!"}
    request = Request(Place(0, 0, "generate", 0), (message,), {"type": "object"}, 16, 0.5, 7)
    lines = [_line(call, reply) for call, reply in enumerate((None, "good"))]
    recording, own = tmp_path / "recording.jsonl", tmp_path / "llm.jsonl"
    recording.write_text("".join(lines))
    own.write_text(lines[0])  # the failed try is on file, what came of it is not
    settings = {"kind": "replay", "recording": str(recording)}
    unused = cast("Any", None)
    folder = cast("Any", SimpleNamespace(llm=own))
    driver = open_driver(unused, DriverSettings.model_validate(settings).chain, folder, unused)
    assert [x.text for x in driver.complete([request], lambda _: True)] == ["good"]


def _line(call: int, reply: str | None) -> str:
    fields = {"generation": 0, "slot": 0, "operator": "generate", "attempt": 0, "call": call}
    fields |= {"prompt_hash": "", "messages": [], "reply": reply, "tokens": 3, "estimated": False}
    outcome = "accepted" if reply else "failed: no"
    return (
        json.dumps({**fields, "cost": 0.0, "seconds": 0.0, "model": "m", "outcome": outcome}) + "\n"
    )


def test_a_server_of_our_own_is_started_as_the_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def server(model: str, log: Path, **options: Any) -> str:
        seen.update(options, model=model, log=log)
        return "the server"

    def driver(_: Any, opened: str, **__: Any) -> Any:
        assert opened == "the server"
        return SimpleNamespace(complete=lambda *_: iter(()), close=lambda: None)

    monkeypatch.setattr(vllm_server, "VllmServer", server)
    monkeypatch.setattr(vllm, "VllmDriver", driver)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 512}')
    bench = cast("Any", SimpleNamespace(config=SimpleNamespace(model=str(tmp_path))))
    asked = {"kind": "vllm", "python": "there", "port": 8123, "eager": True, "gpu_share": 0.3}
    chain = DriverSettings.model_validate(asked).chain
    folder = RunFolder(tmp_path)
    list(open_driver(bench, chain, folder, Progress(StringIO())).complete([], lambda _: True))
    assert seen == {
        "model": str(tmp_path),
        "log": tmp_path / "vllm.log",
        "python": "there",
        "port": 8123,
        "eager": True,
        "gpu_share": 0.3,
        "max_model_len": 512,
    }


def test_what_vllm_cannot_load_is_written_once_for_each_model(tmp_path: Path) -> None:
    written: list[Path] = []

    class Written:
        def save_pretrained(self, path: Path) -> None:
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.json").write_text(json.dumps({"max_position_embeddings": 9000}))
            written.append(path)

    config = SimpleNamespace(model="some/model-1B")
    bench = cast("Any", SimpleNamespace(config=config, model=Written(), tokenizer=Written()))
    (first,) = DriverSettings.model_validate({"kind": "vllm", "context": 16_384}).chain
    folder = cast("Any", tmp_path)
    served = driving._served_folder(bench, folder, first)
    assert driving._served_folder(bench, folder, first) == served
    assert (served.name, len(written)) == ("some--model-1B", 2)  # the model and its tokenizer
    assert driving._context(first, served) == 9000
    names = set()
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "tiny.gguf").touch()
        config.model = str(tmp_path / place / "tiny.gguf")
        names.add(driving._served_folder(bench, folder, first).name)
    assert len(names) == 2
    assert all(re.fullmatch(r"tiny-[0-9a-f]{8}", x) for x in names)
