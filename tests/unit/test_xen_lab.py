"""What the Xen lab makes once and keeps, and the order of kernel modules: no host is booted here."""

from pathlib import Path

import pytest

from coloebpf.errors import LabError
from coloebpf.lab.image import Kernel
from tests.xen.cache import KEPT, Cache
from tests.xen.guests import Guest
from tests.xen.modules import load_order


class Maker:
    """Writes a file, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, directory: Path) -> None:
        self.calls += 1
        (directory / "result").write_text(str(self.calls))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", say=lambda _: None)


def test_a_step_is_made_once(cache: Cache) -> None:
    make = Maker()
    first = cache.step("disk", ["an input"], make)
    assert cache.step("disk", ["an input"], make) == first
    assert make.calls == 1
    assert (first / "result").read_text() == "1"


def test_another_input_makes_another_result(cache: Cache, tmp_path: Path) -> None:
    make, file = Maker(), tmp_path / "input"
    file.write_text("one")
    first = cache.step("disk", ["a", file], make)
    file.write_text("two")
    assert cache.step("disk", ["a", file], make) != first
    assert cache.step("disk", ["b", file], make) != first
    assert make.calls == 3


def test_inputs_are_told_apart_by_their_borders(cache: Cache) -> None:
    assert cache.step("disk", ["ab", "c"], Maker()) != cache.step("disk", ["a", "bc"], Maker())


def test_what_was_not_finished_is_made_again(cache: Cache) -> None:
    def fail(directory: Path) -> None:
        (directory / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.step("disk", ["x"], fail)
    result = cache.step("disk", ["x"], Maker())
    assert [path.name for path in result.iterdir()] == ["result"]


def test_old_results_go_and_other_steps_stay(cache: Cache) -> None:
    other = cache.step("disk-of-another-kind", ["0"], Maker())
    made = [cache.step("disk", [str(number)], Maker()) for number in range(KEPT + 2)]
    assert [path.exists() for path in made] == [False] * 2 + [True] * KEPT
    assert other.exists()


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    (tmp_path / "modules.dep").write_text(
        "kernel/fs/ext4/ext4.ko: kernel/fs/jbd2/jbd2.ko kernel/lib/crc16.ko\n"
        "kernel/fs/jbd2/jbd2.ko:\nkernel/lib/crc16.ko:\n"
        "kernel/drivers/net/xen-netfront.ko:\n"
    )
    (tmp_path / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    return Kernel(tmp_path / "vmlinuz", tmp_path)


def test_modules_come_behind_what_they_need(kernel: Kernel) -> None:
    assert load_order(kernel, ["ext4", "jbd2", "xen_netfront"]) == (
        "lib/crc16.ko",
        "fs/jbd2/jbd2.ko",
        "fs/ext4/ext4.ko",
        "drivers/net/xen-netfront.ko",
    )


def test_a_built_in_module_needs_no_file(kernel: Kernel) -> None:
    assert load_order(kernel, ["virtio-pci"]) == ()


def test_an_unknown_module_is_told(kernel: Kernel) -> None:
    with pytest.raises(LabError, match="no module e1000"):
        load_order(kernel, ["e1000"])


@pytest.mark.parametrize(
    ("kind", "vif", "has"),
    [
        ("pv", "vif3.0", ""),
        ("pvh", "vif3.0", 'type = "pvh"'),
        ("hvm", "vif3.0-emu", "xen_emul_unplug=never"),
    ],
)
def test_a_guests_device_and_configuration_follow_from_its_kind(kind: str, vif: str, has: str) -> None:
    guest = Guest("web", kind, 13)
    assert guest.vif(3) == vif
    assert has in guest.config()
    assert "10.77.0.13/24" in guest.config()
    assert "00:16:3e:00:00:0d" in guest.config()
