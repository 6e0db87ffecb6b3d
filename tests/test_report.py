"""`Fit.report`: the verdict first, everything escaped, nothing to load, whatever was fitted."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import pvi
from pvi.fit import report_pictures
from pvi.fit.report import gather, make_report
from pvi.fit.report_code import call

X = torch.linspace(-1.0, 1.0, 40)
Y = 1.0 + 2.0 * X + 0.5 * torch.sin(40.0 * X)
DRAWS = 2_000
TITLES = [
    "May it be trusted?",
    "Key numbers",
    "Course of the fit",
    "KL by site",
    "Parameters",
    "Posterior",
    "Does the model predict data like these?",
    "Importance weights",
    "Model",
    "Notes of the fit",
    "How to make this fit again",
]


def line(x: torch.Tensor, y: torch.Tensor | None = None) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 5.0))
    b = pyro.sample("<b>", dist.Normal(0.0, 5.0))
    mean = pyro.deterministic("mid", a + b)
    with pyro.plate("row", len(x)):
        pyro.sample("y & co", dist.Normal(mean + b * x, 0.5), obs=y)


def two_modes(x: torch.Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 3.0))
    peaks = torch.stack([dist.Normal(at, 0.1).log_prob(z) for at in (2.0, -2.0)], -1)
    pyro.factor("peaks", (peaks + torch.tensor([2.0, 1.0]).log()).logsumexp(-1))


def only_a_factor() -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.factor("f", -((a - 1.0) ** 2))


def subsampled(x: torch.Tensor) -> None:
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(x), subsample_size=10) as rows:
        pyro.sample("x", dist.Normal(a, 1.0), obs=x[rows])


def switch(x: torch.Tensor) -> None:
    k = pyro.sample("k", dist.Bernoulli(0.5))
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.Poisson(1.0 + 3.0 * k), obs=x)


def switch_guide(x: torch.Tensor) -> None:
    p = pyro.param("p", torch.tensor(0.5), constraint=constraints.unit_interval)
    pyro.sample("k", dist.Bernoulli(p))


def many_latents(x: torch.Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("row", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def no_latents(x: torch.Tensor) -> None:
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.Normal(pyro.param("w", torch.tensor(0.0)), 1.0), obs=x)


def numbers_alone(x: torch.Tensor) -> None:
    for i in range(55):
        a = pyro.sample(f"a{i}", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(a, 1.0), obs=x)


def small(**options: Any) -> Callable[[], pvi.Fit]:
    return lambda: pvi.fit(line, data=(X, Y), seed=0, **options)


COUNTS = torch.tensor([1.0, 0.0, 2.0, 1.0, 3.0])
KINDS: dict[str, tuple[Callable[[], pvi.Fit], str]] = {
    "good": (small(guide=pvi.guides.FullRank), "good"),
    "correlated": (small(), "correctable|unreliable"),
    "unreliable": (small(steps=2), "unreliable"),
    "point": (small(guide=pvi.guides.Delta, steps=20), "not assessed"),
    "tempered": (small(objective=pvi.BetaELBO(4.0), steps=20), "not assessed"),
    "batches": (small(batch_size=10, epochs=2), "good|correctable|unreliable"),
    "subsampled": (lambda: pvi.fit(subsampled, data=X, steps=20, seed=0), "not assessed"),
    "discrete": (
        lambda: pvi.fit(switch, switch_guide, data=COUNTS, steps=50, seed=0),
        "good|correctable|unreliable",
    ),
    "nothing observed": (lambda: pvi.fit(only_a_factor, seed=0), "good"),
    "nothing latent": (
        lambda: pvi.fit(no_latents, lambda x: None, data=X, steps=20, seed=0),
        "not assessed",
    ),
    "modes": (lambda: pvi.fit(two_modes, data=X, restarts=8, seed=0), "unreliable"),
    "many": (lambda: pvi.fit(many_latents, data=X.repeat(500), steps=5, seed=0), "unreliable"),
    "many sites": (lambda: pvi.fit(numbers_alone, args=(torch.tensor(1.0),), seed=0), "good"),
}


@dataclass
class Page(HTMLParser):
    """What a browser would make of a page."""

    tags: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    alts: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    badges: list[str] = field(default_factory=list)
    text: str = ""
    style: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.links += [given[name] for name in ("src", "href", "data", "action") if name in given]
        if tag == "img":
            self.alts.append(given.get("alt", ""))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "h2":
            self.titles.append("")
        if tag == "span" and "badge" in given.get("class", "").split():
            self.badges.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
            return
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.titles[-1] += data
        if self.open and self.open[-1] == "span" and self.badges and not self.badges[-1]:
            self.badges[-1] = data


def parsed(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    return page


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_fit_has_a_whole_page(kind: str, tmp_path: Path) -> None:
    make, verdict = KINDS[kind]
    path = make().report(tmp_path / "report.html", num_draws=DRAWS)
    page = parsed(path)
    assert page.open == []
    assert page.titles == TITLES
    assert len(page.badges) == 1
    assert re.fullmatch(verdict, page.badges[0]), page.badges
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "@import" not in page.style and "url(" not in page.style
    assert {"script", "link", "iframe", "b"}.isdisjoint(page.tags)
    assert page.alts and all(page.alts)
    assert "could not be drawn" not in page.text
    assert "nan" not in re.findall(r"[a-z]+", page.text)
    assert path.stat().st_size < 2e6


def test_the_page_says_what_the_diagnosis_says(tmp_path: Path) -> None:
    """Number by number the same as `diagnose` with the same seed; names are escaped."""
    fit = small()()
    expected = fit.diagnose(DRAWS, seed=3)
    page = parsed(fit.report(tmp_path / "report.html", num_draws=DRAWS, seed=3, title="<i>"))
    assert page.badges == [expected.verdict]
    assert all(reason in page.text for reason in expected.reasons)
    for row in expected.table:
        cells = (row.mean, row.sd, row.psis_mean, row.psis_sd, row.shift, row.sd_ratio)
        assert row.name in page.text
        assert all(f"{cell:.4g}" in page.text for cell in cells), row
    assert f"{expected.bound:,.2f}" in page.text and f"{expected.khat:.2f}" in page.text
    assert "<b>" in page.text and "<i>" in page.text and "y & co" in page.text  # as text
    assert "mid" in page.text


def test_scalars_have_the_names_that_were_given() -> None:
    def model(x: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("row", len(x)):
            pyro.sample("x", dist.Normal(w.sum(-1, keepdim=True), 1.0), obs=x)

    fit = pvi.fit(model, data=X, seed=0)
    found = gather(fit, DRAWS, coords={"side": ["left", "right"]}, dims={"w": ["side"]})
    assert [row.name for row in found.diagnosis.table] == ["w[left]", "w[right]"]
    plain = fit.diagnose(DRAWS, seed=0)
    assert found.diagnosis.khat == pytest.approx(plain.khat, rel=1e-6)
    assert found.ratios is not None and len(found.ratios) == DRAWS


def test_collapsed_numbers_are_counted(tmp_path: Path) -> None:
    """Two of three latents, on which no observation depends, stay at their prior."""

    def model(x: torch.Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("row", len(x)):
            pyro.sample("x", dist.Normal(w[..., :1], 1.0), obs=x)

    fit = pvi.fit(model, data=X + 1.0, seed=0)
    assert "2 of 3" in parsed(fit.report(tmp_path / "report.html", num_draws=DRAWS)).text


def test_modes_are_listed(tmp_path: Path) -> None:
    fit = KINDS["modes"][0]()
    assert len(fit.modes) == 2
    page = parsed(fit.report(tmp_path / "report.html", num_draws=DRAWS))
    assert "Modes that restarts have found" in page.text
    assert all(f"{mode.bound:.4g}" in page.text for mode in fit.modes)


def test_a_loaded_fit_has_the_same_page(tmp_path: Path) -> None:
    fit = small(steps=30, lr=0.1, guide=pvi.guides.FullRank)()
    fit.save(tmp_path / "fit")
    loaded = pvi.load(tmp_path / "fit", line, pvi.guides.FullRank, (X, Y))
    pages = (f.report(tmp_path / "report.html", num_draws=DRAWS) for f in (fit, loaded))
    one, other = (parsed(path).text for path in pages)
    assert one == other


def test_the_call_makes_the_fit_again() -> None:
    """The code on the page, run as it is, ends at the same parameters."""
    fit = small(steps=30, lr=0.1, guide=pvi.guides.FullRank, batch_size=10)()
    text = call(fit, DRAWS, 0)
    names = {"line": line, "x": X, "y": Y}
    exec(text, names)
    again: Any = names["fit"]
    here, there = (f.posterior.params.tensors() for f in (fit, again))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert "optimizer=" not in call(small()(), DRAWS, 0)  # L-BFGS over fixed draws, by itself


def test_pictures_that_fail_leave_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise ValueError("no room")

    monkeypatch.setattr(report_pictures, "plot_pairs", fail)
    report = make_report(small()(), DRAWS)
    parts = [part for section in report.sections for part in section.parts]
    failed = [part for part in parts if isinstance(part, str) and "could not be drawn" in part]
    assert len(failed) == 1 and "ValueError: no room" in failed[0]


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(pvi.PviError, match=r"pip install 'pvi\[plots\]'"):
        small(steps=2)().report("report.html")
