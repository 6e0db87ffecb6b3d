"""A Bayesian network of images: calibration, and what it says to images it does not know.

python examples/bnn_mnist.py [--data mnist.npz --outside fashion-mnist] [--steps 1000]

By default it learns scikit-learn's digits 0 to 6, and 7 to 9 are what it does not know.
"""

import argparse

import numpy as np

from pvi.datasets import images
from pvi.figures import new_figure, tidy
from pvi.models.bnn import BNNClassifier, metrics

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", default="digits")
parser.add_argument("--outside")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--out", default="bnn_mnist")
options = parser.parse_args()

found = images(options.data)
X, X_test = (x.flatten(1).numpy() for x in (found.train, found.test))
y, y_test = (np.asarray(labels) for labels in (found.labels, found.test_labels))
if options.outside:
    strange = images(options.outside).test.flatten(1).numpy()
else:
    strange = X_test[y_test > 6]
    X, y, X_test, y_test = X[y <= 6], y[y <= 6], X_test[y_test <= 6], y_test[y_test <= 6]

model = BNNClassifier((100,), steps=options.steps, kl_weight=(1.0, 0.1), lr=5e-3, random_state=0)
model.fit(X, y)
print(model)
for note in model.notes_:
    print("-", note)
p = model.predict_proba(X_test)
known, unknown = model.uncertainty(X_test), model.uncertainty(strange)
print(f"error {1 - model.score(X_test, y_test):.1%} of {len(y_test)} test images")
print(f"log probability of a label {model.log_likelihood(X_test, y_test).mean():.3f} nats")
print(f"ECE {metrics.ece(p, y_test):.3f}, Brier score {metrics.brier(p, y_test):.3f}")
for name in ("total", "epistemic"):
    area = metrics.auroc(getattr(known, name), getattr(unknown, name))
    print(f"AUROC of unknown images by the {name} uncertainty {area:.3f}")

metrics.plot_reliability(p, y_test).savefig(f"{options.out}_reliability.png")
figure = new_figure(6.0, 3.2)
axes = figure.subplots()
bins = np.linspace(0, float(unknown.total.max()), 30)
for name, split in (("known", known), ("unknown", unknown)):
    axes.hist(split.total.numpy(), bins, density=True, alpha=0.6, label=name)
axes.set(xlabel="entropy of the prediction, nats", ylabel="density")
axes.legend(frameon=False)
tidy(axes)
figure.savefig(f"{options.out}_entropy.png")
