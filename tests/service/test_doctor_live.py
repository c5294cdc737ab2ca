"""`coloebpf doctor` and `coloebpf config xl` about a host with the engine libxl-live."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from coloebpf.errors import ConfigError
from coloebpf.service.checks import live
from coloebpf.service.checks.finding import FAIL, OK, WARN, Finding, Host
from coloebpf.service.commands import xl_text
from coloebpf.service.config import Address, Config, LibxlLiveConfig, PairConfig, parse
from coloebpf.service.config_example import example

LIBRARY = "usr/lib/x86_64-linux-gnu/libxenlight.so.4.17"
GOOD = """
name = "web"
type = "hvm"
xen_platform_pci = 0
vif = [ 'mac=02:c0:10:00:00:01,type=ioemu,model=e1000,script=vif-coloebpf,bridge=web0-x' ]
disk = [ 'format=raw,vdev=hda,access=ro,target=/w', '/cd.iso,,hdc,cdrom' ]
"""
FILES = {
    LIBRARY: "", "dev/xen/privcmd": "", "etc/xen/scripts/vif-coloebpf": "", "etc/xen/web.cfg": GOOD,
    "lib/modules/6.1/kernel/net/sched/sch_plug.ko": "", "lib/modules/6.1/kernel/net/sched/act_mirred.ko": "",
    "lib/modules/6.1/modules.builtin": "kernel/net/sched/cls_u32.ko\n",
}  # fmt: skip


def make_pair(engine: Literal["libxl-live", "model"] = "libxl-live") -> PairConfig:
    (pair,) = parse(example(), Path("example")).pairs
    config = LibxlLiveConfig(domain="web", listen=Address("127.0.0.1", 0))
    nic = dataclasses.replace(pair.nics[0], vif="web0", standby_vif="web1", mac="02:c0:10:00:00:01")
    return dataclasses.replace(pair, engine=engine, libxl_live=config, nics=(nic,))


def make_config(*pairs: PairConfig) -> Config:
    return dataclasses.replace(parse(example(), Path("example")), pairs=pairs)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A dom0 on which all is well."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return tmp_path


def findings(root: Path) -> list[Finding]:
    return list(live.engine(Host(now=0, root=root, release="6.1", config=make_config(make_pair()))))


def test_a_good_dom0(root: Path) -> None:
    assert [f for f in findings(root) if f.level != OK] == []


def test_no_pair_of_it(root: Path) -> None:
    at = Host(now=0, root=root, config=make_config(make_pair("model")))
    assert [f.text for f in live.engine(at)] == ["no pair's NICs are on ports"]


@pytest.mark.parametrize(
    ("gone", "level", "text", "advice"),
    [
        (LIBRARY, FAIL, "there is no libxenlight", "xen-utils-4.17"),
        ("dev/xen/privcmd", FAIL, "does not run under Xen", "boot the entry with Xen"),
        ("etc/xen/scripts/vif-coloebpf", FAIL, "no hotplug script", "mode 755"),
        ("lib/modules/6.1/kernel/net/sched/sch_plug.ko", FAIL, "the kernel has no sch_plug", "Debian's"),
        ("etc/xen/web.cfg", WARN, "can't be checked", "coloebpf config xl FILE"),
    ],
)
def test_what_is_missing(root: Path, gone: str, level: str, text: str, advice: str) -> None:
    (root / gone).unlink()
    [found] = [f for f in findings(root) if f.level != OK]
    assert (found.level, text in found.text, advice in found.advice) == (level, True, True), found


def test_another_libxl(root: Path) -> None:
    (root / LIBRARY).rename((root / LIBRARY).with_suffix(".14"))
    [found] = [f for f in findings(root) if f.level != OK]
    assert found.text == "libxenlight.so.4.14 is of another version than coloebpf knows: 4.17"


CHANGES = [
    ('"hvm"', '"pvh"', ['type = "hvm"']),
    ("xen_platform_pci = 0", "", ["xen_platform_pci = 0", "xen_emul_unplug=never on the guest kernel's command line"]),
    (",model=e1000", "", ["vif = [ 'mac=02:c0:10:00:00:01,type=ioemu,model=e1000,script=vif-coloebpf,bridge=web0-x' ]"]),
    ("bridge=web0-x", "bridge=xenbr0", ["vif = [ 'mac=02:c0:10:00:00:01,type=ioemu,model=e1000,script=vif-coloebpf,bridge=web0-x' ]"]),
    ("mac=02:c0:10:00:00:01", "mac=02:c0:10:00:00:02", ["mac=02:c0:10:00:00:01"]),
    ("vif = [", "vif = [ 'bridge=br0',", None),
    ("bridge=web0-x", "bridge=web0-x,vifname=x", ["no vifname="]),
    ("access=ro", "access=rw", ["access=ro in its line, or keep the guest's data in its memory"]),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "advice"), CHANGES)
def test_what_has_to_change(root: Path, old: str, new: str, advice: list[str] | None) -> None:
    """doctor and `config xl` say the same."""
    assert old in GOOD
    path = root / "etc/xen/web.cfg"
    path.write_text(GOOD.replace(old, new))
    found = [f.advice for f in findings(root) if f.level != OK]
    assert found == advice or (advice is None and len(found) > 1)
    said = xl_text.changes(path, make_config(make_pair()))
    assert said.code == 1
    assert all(f"    {line}\n" in said.text for line in found)


def test_nothing_has_to_change(root: Path) -> None:
    said = xl_text.changes(root / "etc/xen/web.cfg", make_config(make_pair()))
    assert (said.code, "needs it" in said.text) == (0, True)


def test_a_guest_of_no_pair(root: Path) -> None:
    with pytest.raises(ConfigError, match='no pair with domain = "web" whose NICs are on ports'):
        xl_text.changes(root / "etc/xen/web.cfg", make_config(make_pair("model")))
    with pytest.raises(ConfigError, match="can't be read"):
        xl_text.changes(root / "etc/xen/none.cfg", make_config(make_pair()))


@pytest.mark.parametrize(
    ("text", "level", "says"),
    [
        (None, FAIL, "precopy of pair web: "),
        ("of somebody else", FAIL, "is no library of coloebpf's"),
        ("COLOEBPF_HOLD xc_domain_save", OK, "keeps copies going"),
    ],
)
def test_the_library_of_pre_copy(root: Path, text: str | None, level: str, says: str) -> None:
    if text is not None:
        (root / "precopy.so").write_text(text)
    pair = make_pair()
    assert pair.libxl_live is not None
    pair = dataclasses.replace(pair, libxl_live=dataclasses.replace(pair.libxl_live, precopy=Path("/precopy.so")))
    found = list(live.engine(Host(now=0, root=root, release="6.1", config=make_config(pair))))
    [of_it] = [f for f in found if says in f.text]
    assert of_it.level == level
    assert [f for f in found if f.level != OK and f is not of_it] == []
