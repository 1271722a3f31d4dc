"""`lab.memory`: what a container leaves of the machine's memory."""

from pathlib import Path

from lab import memory


def test_the_limit_of_a_container_is_the_least_of_its_groups(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")

    def group(name: str, limit: str, used: int, cached: int) -> None:
        folder = tmp_path / "fs" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")

    group("job/step", "max", 70, 0)
    group("job", "100", 70, 20)
    group("", "1000", 500, 0)
    assert memory._limits(tmp_path / "fs", own) == [(100, 50), (1000, 500)]
    own.write_text("5:cpu:/x\n4:memory:/job\n")
    old = tmp_path / "fs" / "memory" / "job"
    old.mkdir(parents=True)
    for name, value in (("limit_in_bytes", 300), ("usage_in_bytes", 40)):
        (old / f"memory.{name}").write_text(str(value))
    (old / "memory.stat").write_text("total_inactive_file 10\n")
    assert memory._limits(tmp_path / "fs", own) == [(300, 30)]
    assert memory._limits(tmp_path / "fs", tmp_path / "none") == []
    assert 0 < memory.free_bytes() <= memory.total_bytes()
