"""Bayesian neural networks: linear regression with its truth, UCI, batches of networks, MNIST."""

from benchmarks import bnn_batch, bnn_linear, bnn_mnist, bnn_uci
from benchmarks.common import parser

UCI, MNIST = "uci_regression_20splits", "mnist"  # folders under --data
PARTS = ("linear", "batch", "uci", "mnist")


def main() -> None:
    options = parser(__doc__, data=True)
    options.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    given = options.parse_args()
    uci, seed, results = given.data / UCI, given.seed, given.results
    if "linear" in given.parts:
        bnn_linear.part(results, seed)
    if "batch" in given.parts:
        bnn_batch.part(uci, results, seed, "bostonHousing", steps=500, singles=20)
    if "uci" in given.parts:
        bnn_uci.part(uci, results, seed, list(bnn_uci.PLANS))
    if "mnist" in given.parts:
        bnn_mnist.part(given.data / MNIST, "fashion-mnist", results, seed, bnn_mnist.Budget())


if __name__ == "__main__":
    main()
