"""Which device, number format and threads, and why."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lab.config import ConfigError
from lab.device import (
    PROCESS_COUNTS,
    DeviceConfig,
    autocast,
    check_without_torch,
    keep_freed_memory,
    resolve,
)
from lab.errors import LabError


@pytest.fixture(autouse=True)
def _keep_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_auto_says_what_it_took_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    compute = resolve(DeviceConfig())
    assert compute.device.type == ("cuda" if torch.cuda.is_available() else compute.device.type)
    assert compute.reason.startswith(f"auto: {compute.device.type}")
    assert compute.precision in compute.reason
    assert 1 <= compute.threads <= 4
    assert torch.get_num_threads() == compute.threads


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_device_is_an_error_and_no_downgrade() -> None:
    with pytest.raises(LabError, match="'cuda': not available here"):
        resolve(DeviceConfig(device="cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_run_of_another_device_is_read_on_the_one_there_is(device: str) -> None:
    compute = resolve(DeviceConfig(device=device), elsewhere=True)
    assert compute.device.type in ("cpu", "mps")
    assert compute.reason.startswith(f"{device} of the run's config is not here; auto: ")


@pytest.mark.parametrize("name", ["cuda:", "cuda:x", "cuda:-1", "cpu:0", "gpu", "cuda:99999"])
def test_a_device_that_has_no_such_number(name: str) -> None:
    with pytest.raises(ConfigError, match=r"device\.device"):
        DeviceConfig(device=name)


@pytest.mark.parametrize("threads", [-1, 10**9])
def test_threads_have_bounds(threads: int) -> None:
    with pytest.raises(ConfigError, match=r"device\.threads"):
        DeviceConfig(threads=threads)


@pytest.mark.parametrize("name", PROCESS_COUNTS)
@pytest.mark.parametrize("check", [resolve, check_without_torch])
def test_one_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, check: Any) -> None:
    monkeypatch.setenv(name, "1")
    check(DeviceConfig(device="cpu"))
    monkeypatch.setenv(name, "2")
    with pytest.raises(LabError, match=rf"{name} = 2: a run trains in one process. Start it"):
        check(DeviceConfig(device="cpu"))


def test_named_values_win_over_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    compute = resolve(DeviceConfig(device="cpu", precision="fp32", threads=2))
    assert (compute.device.type, compute.precision, compute.threads) == ("cpu", "fp32", 2)
    assert resolve(DeviceConfig(device="cpu")).threads == 1


def test_a_resumed_run_computes_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = resolve(DeviceConfig(device="cpu", precision="fp32", threads=3)).describe()
    compute = resolve(DeviceConfig(device="cpu"), before)
    assert (compute.precision, compute.threads) == ("fp32", 3)
    assert "as in the run so far" in compute.reason


@pytest.mark.parametrize(
    "before", [{}, {"precision": "fp8", "threads": 1}, {"precision": "fp32", "threads": 10**9}]
)
def test_a_damaged_record_of_how_a_run_computed_is_one_line(before: dict[str, Any]) -> None:
    with pytest.raises(LabError, match=r"run\.json: .* Restore it from a copy"):
        resolve(DeviceConfig(device="cpu"), before)


def test_autocast_is_off_for_fp32_even_inside_another() -> None:
    a = torch.ones(2, 2)
    with autocast("cpu", "bf16"):
        assert (a @ a).dtype == torch.bfloat16
        with autocast("cpu", "fp32"):
            assert (a @ a).dtype == torch.float32
    with autocast("meta", "bf16"):  # meta has none, and must not raise
        pass


def test_denormal_numbers_are_flushed_on_the_cpu() -> None:
    resolve(DeviceConfig(device="cpu", threads=1))
    tiny = torch.tensor([1e-38])
    assert float(tiny * 1e-3) == 0, "they make Adam six times slower"


def test_memory_of_freed_tensors_is_not_fetched_anew() -> None:
    resource = pytest.importorskip("resource", reason="counts page faults")
    if not keep_freed_memory():
        pytest.skip("not this C library")

    def step() -> None:
        layers = [torch.ones(600_000) for _ in range(10)]  # 586 pages each
        del layers

    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        step()
    # All would be 117,000; a kernel short of memory may take some pages of its own accord.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 12_000
