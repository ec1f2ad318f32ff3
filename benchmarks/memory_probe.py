"""Runs in a process of its own and prints its peak resident memory, as one line of JSON.

``python -m benchmarks.memory_probe quantize MODEL SAMPLES.npz OUTPUT BATCH`` quantizes a model
and also says how large its batches were (BATCH 0 leaves that to bitwright) and which modules were
loaded. ``python -m benchmarks.memory_probe import`` imports
the modules named on standard input and does nothing else: what the interpreter and the libraries
take by themselves.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path


def peak_bytes() -> int:
    """Return the largest resident set this process has had.

    Returns
    -------
    int
        Bytes.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: its maximum survives exec, so a child of a large process starts high.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _quantize(model: str, samples: str, output: str, batch: str) -> int:
    import bitwright

    calls: list[int] = []
    bitwright.quantize(
        Path(model),
        precision="w8a8",
        calibration=Path(samples),
        output=Path(output),
        overwrite=True,
        batch_size=int(batch) or None,
        progress=lambda done, _total: calls.append(done),
    )
    return calls[0]


def _import(names: list[str]) -> None:
    for name in names:
        # Some entries of sys.modules are aliases that cannot be imported by themselves.
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def main(arguments: list[str]) -> int:
    """Do what the command line says and print the peak.

    Parameters
    ----------
    arguments
        ``quantize MODEL SAMPLES OUTPUT BATCH`` or ``import``.

    Returns
    -------
    int
        The exit code.
    """
    if arguments[:1] == ["quantize"]:
        batch = _quantize(*arguments[1:])
    else:
        batch = 0
        _import(json.loads(sys.stdin.read()))
    modules = sorted(name for name in sys.modules if not name.startswith("__"))
    print(json.dumps({"peak_bytes": peak_bytes(), "modules": modules, "batch": batch}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
