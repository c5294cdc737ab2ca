"""What is asked of Xen's `xl` command."""

from __future__ import annotations

import asyncio

from coloebpf.errors import EngineError

TIMEOUT_S = 2.0  # for one xl; it needs some 10 ms when xenstored is well
_NO_SUCH_DOMAIN = "maybe this domain does not exist"  # what `xl domid` says; its exit code is 1 for everything


async def domain_alive(domain: str, xl: str = "xl", timeout_s: float = TIMEOUT_S) -> bool:
    """Whether the domain of that name exists on this host. Raises EngineError if xl can't say."""
    try:
        process = await asyncio.create_subprocess_exec(
            xl, "domid", domain,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
    except OSError as e:
        raise EngineError(f"{xl} can't be run: {e.strerror}") from e
    try:
        _, said = await asyncio.wait_for(process.communicate(), timeout_s)
    except TimeoutError as e:
        process.kill()
        await process.wait()
        raise EngineError(f"{xl} domid {domain} did not answer in {timeout_s} s") from e
    if process.returncode == 0:
        return True
    text = said.decode(errors="replace").strip()
    if _NO_SUCH_DOMAIN in text:
        return False
    raise EngineError(f"{xl} domid {domain} failed with {process.returncode}: {text[-200:]}")
