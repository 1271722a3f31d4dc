"""Code, hosts and keys that a config, a run's record or a model's folder names: none without `--trust`."""

import hashlib
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab.cli import main
from lab.errors import LabError
from lab.hub import from_pretrained
from lab.trust import given
from tests.rlhf.test_refusals import furnish, values

NAME = "python:judge.py:count"
CODE = (
    "from pathlib import Path\nPath('it_ran').touch()\ndef count(prompt, answer): return float(len(answer))\n"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose labeler is code of the user's, and the recipe's run."""
    root = tmp_path_factory.mktemp("finished")
    furnish(root)
    (root / "judge.py").write_text(CODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        (root / "config.yaml").write_text(yaml.safe_dump(values(data={"comparisons": "collect"})))
        assert main(["rlhf", "config.yaml", "--out", "run", f"--trust={NAME}"]) == 0
    (root / "it_ran").unlink()
    return root


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, where the commands run."""
    place = Path(shutil.copytree(finished, tmp_path / "place", symlinks=True))
    monkeypatch.chdir(place)
    return place


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main([*arguments]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lab: ")]
    return line


@pytest.mark.parametrize(
    "arguments", [("evaluate", "run"), ("evaluate", "run/ppo"), ("evaluate", "run", "--trust=other")]
)
def test_evaluating_a_run_runs_nothing_that_its_record_names(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    line = refused(capsys, *arguments)
    assert line.startswith(f"lab: {arguments[1]}: ")
    assert f"judge.py. If you trust it, add --trust={NAME}" in line
    assert not (place / "it_ran").exists()


@pytest.mark.parametrize("command", ["rlhf", "collect", "train"])
def test_a_config_is_not_trusted_either(
    place: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    line = refused(capsys, command, "config.yaml", "--out", "other")
    assert NAME in line or (command == "collect" and "stage sft is not begun" in line)
    assert not (place / "it_ran").exists()
    assert not (place / "other").exists()


@pytest.mark.parametrize("flag", ["--trust", f"--trust={NAME}"])
def test_with_consent_it_runs_and_its_hash_is_shown(
    place: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert main(["evaluate", "run", flag, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["policy"]["win_rate"]["mean"] >= 0
    assert said.err.count(hashlib.sha256(CODE.encode()).hexdigest()) == 1
    assert (place / "it_ran").exists()


def test_a_run_keeps_the_hash_of_the_code_and_does_not_go_on_with_other_code(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sha256 = hashlib.sha256(CODE.encode()).hexdigest()
    for stage in ("collect", "eval"):
        parents = json.loads((place / "run" / stage / "run.json").read_text())["parents"]
        assert {"code": NAME, "path": "judge.py", "sha256": sha256} in parents
    (place / "judge.py").write_text(CODE + "# changed\n")
    capsys.readouterr()
    assert main(["rlhf", "config.yaml", "--out", "run", "--trust"]) == 2
    assert "was begun with other code in judge.py than there is now" in capsys.readouterr().err


@pytest.fixture
def listener() -> Iterator[tuple[str, Callable[[], bool]]]:
    """An address on this machine, and whether anybody called there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)

        def called() -> bool:
            try:
                server.accept()[0].close()
            except TimeoutError:
                return False
            return True

        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1", called


@pytest.mark.parametrize("key", ["", "secret"])
def test_a_record_sends_nothing_to_the_host_it_names(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    listener: tuple[str, Callable[[], bool]],
    key: str,
) -> None:
    url, called = listener
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key)
    labeler = {"name": f"judge:{url}", "model": "m", "api_key_env": "AWS_SECRET_ACCESS_KEY"}
    for path in (place / "run").glob("*/run.json"):
        info = json.loads(path.read_text())
        info["config"]["collect"]["labeler"] = info["config"]["eval"]["labeler"] = labeler
        path.write_text(json.dumps(info))
    line = refused(capsys, "evaluate", "run")
    assert f"--trust={'judge:' + url + ('#AWS_SECRET_ACCESS_KEY' if key else '')}" in line.replace("'", "")
    assert "secret" not in line.replace("AWS_SECRET", "")
    assert not called()


def test_keys_travel_encrypted_or_not_at_all(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    labeler = "--collect.labeler={name: 'judge:http://example.com/v1', model: m}"
    line = refused(capsys, "rlhf", "config.yaml", "--out", "other", "--trust", labeler)
    assert "the key in OPENAI_API_KEY would go unencrypted to http://example.com/v1" in line


# ---- models with code of their own ----

CONFIGURATION = """
from pathlib import Path
from transformers import PreTrainedConfig
Path("code_ran").touch()
class OddConfig(PreTrainedConfig):
    model_type = "odd"
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder whose config is a class in it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "configuration_odd.py").write_text(CONFIGURATION)
    settings = {"model_type": "odd", "auto_map": {"AutoConfig": "configuration_odd.OddConfig"}}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("names", [(), ("elsewhere",), None])
def test_code_of_a_model_folder_does_not_run(
    model: Path, names: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    def ask(prompt: str = "") -> str:
        raise AssertionError("nobody is asked")

    monkeypatch.setattr("builtins.input", ask)
    words = rf"runs code of its own \(configuration_odd.py\). If you trust it, add --trust={model}"
    if names is None:  # a program, not a command
        with pytest.raises(LabError, match=words):
            from_pretrained(AutoConfig, model)
    else:
        with given(names), pytest.raises(LabError, match=words):
            from_pretrained(AutoConfig, model)
    assert not Path("code_ran").exists()


def test_with_consent_the_code_of_a_model_folder_runs_and_is_shown(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import AutoConfig, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    with given((str(model),)):
        assert from_pretrained(AutoConfig, model).model_type == "odd"
    assert hashlib.sha256(CONFIGURATION.encode()).hexdigest() in capsys.readouterr().err
    assert Path("code_ran").exists()


def test_code_that_is_on_the_hub_is_not_fetched(model: Path) -> None:
    from transformers import AutoConfig

    settings = {"model_type": "odd", "auto_map": {"AutoConfig": "evil/place--configuration_odd.OddConfig"}}
    (model / "config.json").write_text(json.dumps(settings))
    with (
        given(("",)),
        pytest.raises(LabError, match="is not in it, but evil/place--configuration"),
    ):
        from_pretrained(AutoConfig, model)


@pytest.mark.parametrize("command", ["chat", "rlhf", "tokenizer"])
def test_commands_refuse_code_of_model_folders(
    model: Path, place: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    tokenizer.save_pretrained(model)
    if command == "tokenizer":
        settings = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["configuration_odd.Odd", None]}}
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
    line: Any = refused(
        capsys,
        *{
            "chat": ["chat", str(model), "--prompt", "x"],
            "rlhf": ["rlhf", "config.yaml", "--out", "other", f"--trust={NAME}", f"--model.path={model}"],
            "tokenizer": [
                *("rlhf", "config.yaml", "--out", "other", f"--trust={NAME}"),
                *(f"--model.tokenizer={model}", "--stage=sft"),
            ],
        }[command],
    )
    assert f"--trust={model}" in line
    assert not (place / "code_ran").exists()
