"""The VAE family: orderings of objectives, exactness, disentangling, a peer, a full protocol.

Parts by `--parts`, by default those that need only the data sets and a CPU. `pythae` needs that
package (0.1.2); `fashion` is for a GPU (`--device cuda`), and with `--smoke` shows that it runs.
"""

from pathlib import Path

from benchmarks.common import parser
from benchmarks.vae_dsprites import dsprites
from benchmarks.vae_exact import exact
from benchmarks.vae_fashion import fashion
from benchmarks.vae_orderings import orderings
from benchmarks.vae_pythae import pythae

PARTS = {
    "exact": exact,
    "orderings": orderings,
    "dsprites": dsprites,
    "pythae": pythae,
    "fashion": fashion,
}
DEFAULT = ("exact", "orderings", "dsprites")


def main() -> None:
    options = parser(__doc__, data=True)
    options.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(DEFAULT))
    options.add_argument("--epochs", type=int, default=2, help="of the orderings")
    options.add_argument("--steps", type=int, default=2000, help="of each model of dsprites")
    options.add_argument("--seeds", type=int, default=3, help="of dsprites")
    options.add_argument("--picture", type=Path, help="where to draw dsprites, a PNG")
    options.add_argument("--device", default="cpu", help="of fashion")
    options.add_argument("--fashion-data", default="fashion-mnist", help="or a folder")
    options.add_argument("--smoke", action="store_true", help="a short run of fashion")
    given = vars(options.parse_args())
    for name in given.pop("parts"):
        print(f"-- {name}", flush=True)
        PARTS[name](**given)


if __name__ == "__main__":
    main()
