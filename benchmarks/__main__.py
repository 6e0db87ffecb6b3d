"""Run all benchmarks, or those named: `python -m benchmarks [name ...] [--data DIR]`.

Those that read data sets are left out without `--data`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

NEEDS_DATA = {
    "bnn": "",
    "posteriordb": "posteriordb",
    "radon": "posteriordb",
    "starts": "posteriordb",
    "topics": "",
    "topics_coherence": "",
    "vae": "",
    "verdicts": "posteriordb",
}  # name -> its folder under --data, "" for all
NAMES = (
    "adversaries",
    "parity",
    "from_pyro",
    "gradients",
    "bad_input",
    "densities",
    "minibatch",
    "rates",
    "sandwich",
    "sbc",
    "predictive",
    "guides",
    "checkpoints",
    "distributed",
    "big_data",
    "export",
    "eager",
    "speed",
    "growth",
    "wall",
    "escalate",
    "topics_scale",
    *NEEDS_DATA,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="by default all")
    parser.add_argument("--data", type=Path, help="folder that holds the data sets' folders")
    options = parser.parse_args()
    failed = 0
    for name in options.names or NAMES:
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        if name in NEEDS_DATA:
            if options.data is None:
                print(f"{name}: left out, it needs --data")
                continue
            command += ["--data", str(options.data / NEEDS_DATA[name])]
        print(f"== {name}", flush=True)
        failed += subprocess.run(command, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
