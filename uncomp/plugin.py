"""Entry point of vLLM's ``vllm.general_plugins`` group.

vLLM calls :func:`register` in every process it starts. It installs one patch, which looks whether a
configuration has uncomp settings; everything else happens only then.
"""

from __future__ import annotations

import logging
import os
import sys


def register() -> None:
    """Install what vLLM has no hook for (see ``patches/``). May be called more than once.

    Raises:
        SystemExit: a patch does not fit this vLLM. vLLM only logs exceptions of plugins and would
            go on without compression, silently; that must not happen to someone who asked for it.
    """
    from uncomp import envs

    if envs.disabled():
        return
    from uncomp.patches.apply import PatchError, apply_entry

    try:
        apply_entry()
    except PatchError as error:
        logging.getLogger("vllm.uncomp").critical("%s", error)
        print(f"uncomp (pid {os.getpid()}): {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error
