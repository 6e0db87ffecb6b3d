"""Regression with error bars: what is chosen on held-out rows, and whether the bars hold.

python examples/bnn_uci.py [--data FOLDER/bostonHousing.npz] [--steps 1000]

The file, if any, has arrays X `(N, d)` and y `(N,)`; by default it is scikit-learn's diabetes data.
"""

import argparse

import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.linear_model import BayesianRidge
from sklearn.model_selection import train_test_split

from pvi.figures import new_figure, tidy
from pvi.models.bnn import BNNRegressor

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--out", default="bnn_uci.png")
options = parser.parse_args()

if options.data:
    with np.load(options.data) as file:
        X, y = file["X"], file["y"]
else:
    X, y = load_diabetes(return_X_y=True)
X, X_test, y, y_test = train_test_split(X, y, test_size=0.2, random_state=0)

model = BNNRegressor(
    likelihood="heteroscedastic", kl_weight=(1.0, 0.3, 0.1), steps=options.steps, random_state=0
)
model.fit(X, y)
print(model)
for note in model.notes_:
    print("-", note)

mean, sd = model.predict(X_test, return_std=True)
print(f"RMSE {np.sqrt(np.mean((mean - y_test) ** 2)):.3g}")
print(f"log density of a test row {model.log_likelihood(X_test, y_test).mean():.3f} nats")
inside = np.mean(np.abs(mean - y_test) < 2 * sd)
print(f"inside of two sds: {inside:.0%} of the test rows")

line, line_sd = BayesianRidge().fit(X, y).predict(X_test, return_std=True)
density = -0.5 * ((y_test - line) / line_sd) ** 2 - np.log(line_sd * np.sqrt(2 * np.pi))
print(f"a Bayesian line: log density {density.mean():.3f} nats")

split = model.uncertainty(X_test)
order = np.argsort(mean)
figure = new_figure(9.0, 3.4)
left, right = figure.subplots(1, 2)
left.errorbar(np.arange(len(mean)), mean[order], 2 * sd[order], fmt=".", color="#1f77b4", alpha=0.6)
left.plot(np.arange(len(mean)), y_test[order], ".", color="black", markersize=4)
left.set(xlabel="test rows in the order of their prediction", ylabel="y and mean ± 2 sd")
right.plot(split.aleatoric.sqrt(), split.epistemic.sqrt(), ".", color="#1f77b4")
right.set(xlabel="sd of the noise", ylabel="sd of the function")
for axes in (left, right):
    tidy(axes)
figure.savefig(options.out)
